"""The demo's training as it is and as it was at an earlier commit, in turns: seconds, rollouts, tokens, accuracy.

    python -m benchmarks.demo_speed [--before eb2d1ef] [--repeats 2] [--steps 42]

The earlier commit runs from a git worktree, in the same environment. eb2d1ef is the last commit before rows without
gradient were left out and images shared. Each run is what demo.py called then, 16 prompts a step and as
many as 24 recycled. Writes benchmarks/results/demo_speed.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "demo_speed.json"


def trained(root: Path, folder: Path, steps: int) -> dict:
    """One run of the code in `root`."""
    command = [sys.executable, "train_spark.py", "--config", "recipes/demo.yaml", "--output_dir", str(folder)]
    command += ["--max_steps", str(steps), "--save_strategy", "no"]
    command += ["--per_device_train_batch_size", "128", "--recycle_ratio", "1.5"]  # the recipe's at that commit
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    per_step = [row for row in logs if "loss" in row]
    rollouts = 128 * len(per_step) + sum(row["recycle/rows"] for row in per_step)
    return {
        "seconds": next(row["train_runtime"] for row in logs if "train_runtime" in row),
        "rollouts": rollouts,
        "tokens": max(row["num_tokens"] for row in per_step),
        "last_accuracy": statistics.fmean(row["policy/accuracy"] for row in per_step[-10:]),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--before", default="eb2d1ef")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=42)
    args = parser.parse_args()
    here = Path(__file__).parents[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        then = Path(folder) / "then"
        subprocess.run(["git", "-C", here, "worktree", "add", "--detach", then, args.before], check=True)
        try:
            for i in range(args.repeats):
                for name, root in (("then", then), ("now", here)):
                    run = {"code": name, **trained(root, Path(folder) / f"{name}_{i}", args.steps)}
                    rows.append(run)
                    print(json.dumps(run), flush=True)
        finally:
            subprocess.run(["git", "-C", here, "worktree", "remove", "--force", then], check=True)
    table = {}
    for unit in ("seconds", "seconds a rollout", "seconds a token"):
        cost = {
            name: statistics.median(
                row["seconds"] / (row[unit.split()[-1] + "s"] if " " in unit else 1)
                for row in rows
                if row["code"] == name
            )
            for name in ("then", "now")
        }
        table[unit] = cost["then"] / cost["now"]
        print(f"{unit}: {table[unit]:.2f} times as fast")
    record.write(RESULTS, before=args.before, times_as_fast=table, rows=rows)


if __name__ == "__main__":
    main()
