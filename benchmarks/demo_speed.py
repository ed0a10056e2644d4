"""The demo's training as it is, as it was at an earlier commit, and plain GRPO's, in turns: seconds, rollouts, tokens.

    python -m benchmarks.demo_speed [--before eb2d1ef] [--repeats 2] [--steps 42]

    then      ratio 1.5 (16 prompts a step, as many as 24 recycled), as demo.py called it at the earlier commit, which
              runs from a git worktree in the same environment. eb2d1ef is the last one before rows without gradient
              were left out and images shared
    now       the same, by today's code
    recipe    recipes/demo.yaml as it is: ratio 0.25
    grpo      40 prompts a step and nothing recycled: as many rollouts, trained on all of them

Writes benchmarks/results/demo_speed.json.
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


BATCH = "--per_device_train_batch_size"
PAPERS = {BATCH: 128, "--recycle_ratio": 1.5}
SETTINGS = {
    "then": PAPERS,
    "now": PAPERS,
    "recipe": {BATCH: 256, "--recycle_ratio": 0.25},
    "grpo": {BATCH: 320, "--recycle_ratio": 0},
}


def trained(code: str, root: Path, folder: Path, steps: int) -> dict:
    """One run of the code in `root`."""
    command = [sys.executable, "train_spark.py", "--config", "recipes/demo.yaml", "--output_dir", str(folder)]
    command += ["--max_steps", str(steps), "--save_strategy", "no"]
    command += [str(part) for setting in SETTINGS[code].items() for part in setting]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    per_step = [row for row in logs if "loss" in row]
    rollouts = SETTINGS[code][BATCH] * len(per_step) + sum(row.get("recycle/rows", 0) for row in per_step)
    return {
        "code": code,
        "seconds": next(row["train_runtime"] for row in logs if "train_runtime" in row),
        "rollouts": rollouts,
        "tokens": max(row["num_tokens"] for row in per_step),
        "last_accuracy": statistics.fmean(row["policy/accuracy"] for row in per_step[-10:]),
    }


def costs(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Medians over each code's runs: seconds, seconds a rollout, seconds a token."""
    return {
        code: {
            "seconds": statistics.median(row["seconds"] for row in rows if row["code"] == code),
            "seconds a rollout": statistics.median(r["seconds"] / r["rollouts"] for r in rows if r["code"] == code),
            "seconds a token": statistics.median(r["seconds"] / r["tokens"] for r in rows if r["code"] == code),
        }
        for code in dict.fromkeys(row["code"] for row in rows)
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
                for code in SETTINGS:
                    root = then if code == "then" else here
                    rows.append(trained(code, root, Path(folder) / f"{code}_{i}", args.steps))
                    print(json.dumps(rows[-1]), flush=True)
        finally:
            subprocess.run(["git", "-C", here, "worktree", "remove", "--force", then], check=True)
    cost = costs(rows)
    table = {
        "now, times as fast as then": {unit: cost["then"][unit] / cost["now"][unit] for unit in cost["now"]},
        "now over grpo": {unit: cost["now"][unit] / cost["grpo"][unit] for unit in cost["now"]},
        "recipe over grpo": {unit: cost["recipe"][unit] / cost["grpo"][unit] for unit in cost["now"]},
    }
    for name, ratios in table.items():
        print(f"{name}: " + ", ".join(f"{unit} {ratio:.2f}" for unit, ratio in ratios.items()))
    record.write(RESULTS, before=args.before, table=table, rows=rows)


if __name__ == "__main__":
    main()
