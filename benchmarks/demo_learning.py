"""Does SPARK learn to judge what plain GRPO does not? The demo's table over several seeds, raw rows kept.

    python -m benchmarks.demo_learning [--seeds 0 1 2] [--steps 42] [--jobs 2]

Every run starts from the shipped checkpoint and is measured on the same held-out digits: SPARK (16 prompts x 8 rollouts
and at most 1.5 times as many recycled ones a step), and plain GRPO with that number of rollouts (40 prompts x 8) or of
prompts (16 x 8). Temperature 1 (mean of 4 samples) and greedy. About 20 minutes on two cores; finished runs are kept.
Writes benchmarks/results/demo_learning.json: the table, and of every run the outcome of each question and sample.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import record
from data.cli import Parser, text_table

RESULTS = record.RESULTS / "demo_learning.json"
VARIANTS = {
    "spark": {},
    "spark_nothing_waits": {"recycle_max_age": 0},
    "grpo_same_rollouts": {"recycle_ratio": 0, "per_device_train_batch_size": 320},
    "grpo_same_prompts": {"recycle_ratio": 0},
}


def one_run(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and measure one variant with one seed, in a process of its own; its result is kept under runs/."""
    folder = args.output / f"{variant}_{seed}"
    result = folder / "measured.json"
    if not result.exists():
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        command = [sys.executable, "-m", "benchmarks.demo_learning", "--worker", variant, "--seeds", str(seed)]
        command += ["--steps", str(args.steps), "--questions", str(args.questions), "--output", str(args.output)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            subprocess.run(command, check=True, env={**os.environ, **threads}, stdout=log, stderr=log)
    print(f"{variant} seed {seed}: done", flush=True)
    return json.loads(result.read_text(encoding="utf-8"))


def work(variant: str, seed: int, args: argparse.Namespace) -> None:
    """The body of a worker process."""
    from demo import START, held_out, measure, train

    folder = args.output / f"{variant}_{seed}"
    start = time.perf_counter()
    model = START
    if variant != "start":
        model = folder / "model"
        overrides = {"max_steps": args.steps, "seed": seed, "recycle_seed": seed, "log_completions": False}
        train("recipes/demo.yaml", model, **{**overrides, **VARIANTS[variant]})
    seconds = time.perf_counter() - start
    benchmark = held_out(args.questions)
    measured = {
        "variant": variant,
        "seed": seed,
        "train_seconds": seconds,
        "sampled": measure(str(model), benchmark),
        "greedy": measure(str(model), benchmark, temperature=0.0),
    }
    (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def summary(runs: list[dict]) -> dict:
    """measure -> variant -> mean and standard deviation over seeds, at temperature 1 and greedy."""
    names = runs[0]["sampled"]["measures"]
    table = {}
    for name in names:
        table[name] = {}
        for variant in dict.fromkeys(run["variant"] for run in runs):
            cell = {}
            for how in ("sampled", "greedy"):
                values = [run[how]["measures"][name]["mean"] for run in runs if run["variant"] == variant]
                values = [v for v in values if v is not None]
                spread = statistics.stdev(values) if len(values) > 1 else None
                cell[how] = {"mean": statistics.fmean(values) if values else None, "stdev": spread, "values": values}
            table[name][variant] = cell
    return table


def print_summary(table: dict) -> None:
    variants = list(next(iter(table.values())))
    for how in ("sampled", "greedy"):
        lines = [[how, *variants]]
        for name, row in table.items():
            cells = []
            for variant in variants:
                cell = row[variant][how]
                spread = "" if cell["stdev"] is None else f" ± {cell['stdev']:.3f}"
                cells.append("-" if cell["mean"] is None else f"{cell['mean']:.3f}{spread}")
            lines.append([name, *cells])
        print("", *text_table(lines), sep="\n")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["spark", "grpo_same_rollouts"], choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with its share of the cores")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_learning"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.seeds[0], args)

    jobs = [("start", 0)] + [(variant, seed) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: one_run(*job, args), jobs))
    table = summary(runs)
    record.write(RESULTS, indent=None, table=table, runs=runs)
    print_summary(table)


if __name__ == "__main__":
    main()
