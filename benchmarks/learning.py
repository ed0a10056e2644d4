"""What judging buys, and what each part of it is worth: SPARK and GRPO at equal rollouts, on two tasks, with seeds.

    python -m benchmarks.learning --task digits --variants grpo spark --seeds 0 1 2 [--jobs 2] [--split dev]
    python -m benchmarks.learning --table

Each run is a plain call of train_spark.py and of benchmarks.measures, in a process of its own with its share of the
cores; it takes a few minutes, is kept under runs/learning/ and goes on where it was. Choices are made on the dev split;
`--split test` measures finished runs on the held-out questions, once. Of every run
benchmarks/results/learning_TASK_SPLIT.json has the settings, seconds, tokens, measures and outcomes.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RUNS = Path("runs/learning")
RECIPES = {"digits": "recipes/demo.yaml", "countdown": "recipes/countdown.yaml"}
STARTS = {"digits": "models/digits", "countdown": "models/countdown"}
STEPS = {"digits": 42, "countdown": 60}
QUESTIONS = 250
G = 8  # rollouts of a prompt
PROMPTS = 40  # a step, policy and recycled together


def spark(prompts: int, recycled: float, **settings) -> dict:
    """So many policy prompts a step, and at most so many recycled ones."""
    return {"per_device_train_batch_size": prompts * G, "recycle_ratio": recycled / prompts, **settings}


# All but grpo_same_prompts roll out 320 completions a step on average, at most.
VARIANTS = {
    "grpo": {"per_device_train_batch_size": PROMPTS * G, "recycle_ratio": 0},
    "grpo_same_prompts": {"per_device_train_batch_size": 16 * G, "recycle_ratio": 0},
    "spark": spark(16, 24),
    "unmatched": spark(16, 24, recycle_matched=False),
    "paper_labels": spark(16, 24, recycle_balance=False),
    "no_pointwise": spark(16, 24, recycle_tasks=["pairwise", "reflection"]),
    "no_pairwise": spark(16, 24, recycle_tasks=["pointwise", "reflection"]),
    "no_reflection": spark(16, 24, recycle_tasks=["pointwise", "pairwise"]),
    "answers_only": spark(16, 24, recycle_source="answer"),
    "reasoning_only": spark(16, 24, recycle_source="cot"),
    "ratio_0.125": spark(36, 4.5),
    "ratio_0.25": spark(32, 8),
    "ratio_0.5": spark(27, 13.5),
    "ratio_1": spark(20, 20),
    "ratio_2": spark(13, 26),
    "every_2": spark(28, 24, recycle_every=2),
    "every_4": spark(34, 24, recycle_every=4),
    "every_4_no_reflection": spark(34, 24, recycle_every=4, recycle_tasks=["pointwise", "pairwise"]),
    "adaptive": spark(20, 40, recycle_adaptive=True),
    "right_reflections": spark(16, 24, recycle_right_reflections=0.25),
    "weight_0.25": spark(16, 24, recycle_weight=0.25),
    "weight_0.5": spark(16, 24, recycle_weight=0.5),
    "apart": spark(16, 24, recycle_apart=True, steps_per_generation=2, per_device_train_batch_size=8 * G),
}


def command_of(task: str, variant: str, seed: int, folder: Path, steps: int) -> list[str]:
    """The call of train_spark.py."""
    settings = {"max_steps": steps, "seed": seed, "recycle_seed": seed, "log_completions": False, "save_total_limit": 1}
    if variant == "apart":  # as many generations
        settings["max_steps"] = 2 * steps
    command = [sys.executable, "train_spark.py", "--config", RECIPES[task], "--output_dir", str(folder / "model")]
    for name, value in (settings | VARIANTS[variant]).items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*command, "--resume_from_checkpoint", "latest"]


def one_run(task: str, variant: str, seed: int, args) -> dict:
    """Train, unless that is done, and measure, unless that is done."""
    folder = RUNS / task / ("start" if variant == "start" else f"{variant}_{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    env = {"OMP_NUM_THREADS": threads, **os.environ, "HF_HUB_OFFLINE": "1"}
    model = STARTS[task] if variant == "start" else str(folder / "model")
    with open(folder / "log.txt", "a", encoding="utf-8") as log:

        def call(command: list[str]) -> None:
            subprocess.run(command, check=True, env=env, stdout=log, stderr=log)

        if variant != "start" and not (folder / "trained.json").exists():
            begun = time.perf_counter()
            command = command_of(task, variant, seed, folder, args.steps or STEPS[task])
            call(command)
            logs = json.loads((folder / "model" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            trained = {
                "command": " ".join(["python", *command[1:]]),
                "commit": record.commit(),
                "seconds": time.perf_counter() - begun,
                "tokens": max(row.get("num_tokens", 0) for row in logs),
                "rollouts": sum(row["recycle/rows"] for row in logs if "recycle/rows" in row),
                "trained_rows": sum(row.get("recycle/trained_rows", 0) for row in logs),
                "curve": [
                    {k: round(v, 4) for k, v in row.items() if k.startswith(("policy/", "judge/", "reflection/"))}
                    for row in logs
                    if "loss" in row
                ],
            }
            (folder / "trained.json").write_text(json.dumps(trained), encoding="utf-8")
        outcome = folder / f"{args.split}.json"
        if not outcome.exists():
            measured = ["--task", task, "--split", args.split, "--questions", str(args.questions)]
            call([sys.executable, "-m", "benchmarks.measures", model, *measured, "--output", str(outcome)])
    print(f"{task} {variant} seed {seed}: done", flush=True)
    trained = {} if variant == "start" else json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    return {"variant": variant, "seed": seed, **trained, **json.loads(outcome.read_text(encoding="utf-8"))}


def finished_runs(task: str, split: str) -> list[dict]:
    """Everything that has been trained and measured so far."""
    runs = []
    for folder in sorted((RUNS / task).glob("*")):
        variant, _, seed = folder.name.rpartition("_")
        variant, seed = (variant, int(seed)) if variant else (folder.name, 0)
        if (folder / f"{split}.json").exists():
            trained = folder / "trained.json"
            settings = json.loads(trained.read_text(encoding="utf-8")) if trained.exists() else {}
            outcome = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
            runs.append({"variant": variant, "seed": seed, **settings, **outcome})
    return runs


def table(runs: list[dict]) -> dict[str, dict[str, dict]]:
    """variant -> measure -> mean over seeds, its 95 % interval (t), and the seeds' values; greedy ones by that name."""
    from scipy.stats import t

    cells: dict[str, dict[str, dict]] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        seeds = [run for run in runs if run["variant"] == variant]
        cells[variant] = {}
        for how, prefix in (("sampled", ""), ("greedy", "greedy: ")):
            for name in seeds[0][how]["measures"]:
                values = [run[how]["measures"][name]["mean"] for run in seeds]
                values = [value for value in values if value is not None]
                half = None
                if len(values) > 1:
                    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
                mean = statistics.fmean(values) if values else None
                cells[variant][prefix + name] = {"mean": mean, "half": half, "values": values}
        for name in ("seconds", "tokens"):
            values = [run[name] for run in seeds if isinstance(run.get(name), (int, float))]
            cells[variant][name] = {
                "mean": statistics.fmean(values) if values else None,
                "half": None,
                "values": values,
            }
    return cells


SHOWN = (
    "greedy: first answer",
    "first answer",
    "one of 4",
    "judge, own answers",
    "judge, independent answers",
    "pairwise, both orders",
    "reflection fixes a wrong answer",
    "reflection harms a right answer",
    "final answer, reflecting on a No",
    "vote of 4",
    "vote of 4 weighed by verdicts",
    "best of 4 by pairs",
    "seconds",
)


def print_table(cells: dict[str, dict[str, dict]]) -> None:
    for variant, row in cells.items():
        n = len(row["first answer"]["values"])
        print(f"\n{variant} ({n} seed{'s' * (n > 1)})")
        for name in SHOWN:
            cell = row[name]
            if cell["mean"] is not None:
                half = "" if cell["half"] is None else f" ± {cell['half']:.3f}"
                print(f"  {name:36}{cell['mean']:.3f}{half}")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--task", choices=RECIPES, required=True)
    parser.add_argument("--variants", nargs="+", default=["grpo", "spark"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="of the runs there are; nothing is trained")
    args = parser.parse_args()
    if not args.table:
        jobs = [("start", 0), *((variant, seed) for seed in args.seeds for variant in args.variants)]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: one_run(args.task, *job, args), jobs))
    runs = finished_runs(args.task, args.split)
    cells = table(runs)
    record.write(record.RESULTS / f"learning_{args.task}_{args.split}.json", indent=None, table=cells, runs=runs)
    print_table(cells)


if __name__ == "__main__":
    main()
