"""What judging buys, and what each part of it is worth: SPARK and GRPO at equal rollouts, with seeds, on two tasks, one
of them from two starts (trusting: Countdown by a model that rarely checks what it judges, benchmarks/trusting.py) and
three times as long (longer), and with a real model (smollm2: arithmetic by SmolLM2-135M, models/smollm2.py, half of the
rollouts in 4 micro-steps, on equations as well; the task equations measures these runs there).

    python -m benchmarks.learning --task digits --variants grpo spark --seeds 0 1 2 [--jobs 2] [--split dev]
    python -m benchmarks.learning --task digits --table [--minus spark] [--figure FILE.png]

Each run is a plain call of train_spark.py and of benchmarks.measures, in a process of its own with its share of the
cores; it takes a few minutes, is kept under runs/learning/ and goes on where it was. Choices are made on the dev split;
`--split test` measures finished runs on the held-out questions, once (the digits have a second set, `unseen`). Of every
run benchmarks/results/learning_TASK_SPLIT.json has the settings, seconds, tokens, measures and outcomes; what is there
stays there until the same run is made again.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import recycle
from benchmarks import record, trusting
from benchmarks.intervals import half_width, spread, values_of
from data.cli import Parser

RUNS = Path("runs/learning")
QUESTIONS = 250
G = 8  # rollouts of a prompt
PROMPTS = 40  # a step, policy and recycled together


@dataclass(frozen=True)
class Task:
    """What is trained, how long and on what; `made` is what is not shipped: path -> the module that makes it."""

    start: str
    recipe: str
    steps: int
    measures: str  # its name in benchmarks/measures.py
    made: dict[str, str] = field(default_factory=dict)
    share: int = 1  # of the variants' batch, one in so many
    trained_as: str | None = None  # the task whose runs are measured, if not its own


COUNTDOWN = Task(
    start="models/countdown",
    recipe="recipes/countdown.yaml",
    steps=60,
    measures="countdown",
    made={"runs/countdown/train.json": "data.countdown --split train --n 2700 --output runs/countdown/train.json"},
)
TRUSTING = str(trusting.START)
SMOLLM2 = Task(
    start="runs/smollm2_135m_start",
    recipe="recipes/smollm2_135m_cpu.yaml",
    steps=20,
    measures="arithmetic",
    made={
        "runs/smollm2_135m_start": "models.smollm2 runs/smollm2_135m_start",
        "runs/words/train-arithmetic.json": "data.arithmetic --output runs/words/train-arithmetic.json",
        "runs/words/train-equations.json": "data.equations --output runs/words/train-equations.json",
    },
    share=8,
)
TASKS = {
    "digits": Task(start="models/digits", recipe="recipes/demo.yaml", steps=42, measures="digits"),
    "countdown": COUNTDOWN,
    "longer": replace(COUNTDOWN, steps=180),
    "trusting": replace(COUNTDOWN, start=TRUSTING, made=COUNTDOWN.made | {TRUSTING: "benchmarks.trusting"}),
    "smollm2": SMOLLM2,
    "equations": replace(SMOLLM2, measures="equations", trained_as="smollm2"),
}


def spark(prompts: int, recycled: float, **settings) -> dict:
    """So many policy prompts a step, and at most so many recycled ones."""
    return {"per_device_train_batch_size": prompts * G, "recycle_ratio": recycled / prompts, **settings}


# All but grpo_same_* roll out 320 completions a step on average, at most (324 at ratio 0.125).
VARIANTS = {
    "grpo": {"per_device_train_batch_size": PROMPTS * G, "recycle_ratio": 0},
    "grpo_same_prompts": {"per_device_train_batch_size": 16 * G, "recycle_ratio": 0},
    "grpo_same_tokens": {"per_device_train_batch_size": 42 * G, "recycle_ratio": 0},  # as ratio 0.25 reads and writes
    "spark": spark(16, 24),
    "unmatched": spark(16, 24, recycle_matched=False),
    "paper_labels": spark(16, 24, recycle_matched=False, recycle_balance=False),
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
    "ratio_0.25_weight_4": spark(32, 8, recycle_weight=4.0),  # as if it were a loss of its own, by its own tokens
    # Two optimizer steps for each generation: of the questions and then of the recycled prompts; of half of all.
    "apart": spark(16, 24, recycle_apart=True, steps_per_generation=2, per_device_train_batch_size=8 * G),
    "apart_0.25": spark(32, 8, recycle_apart=True, steps_per_generation=2, per_device_train_batch_size=16 * G),
    "grpo_two_updates": spark(PROMPTS, 0, steps_per_generation=2, per_device_train_batch_size=PROMPTS // 2 * G),
    "two_updates_0.25": spark(32, 8, steps_per_generation=2, per_device_train_batch_size=16 * G),
    # A third of the steps for judging and reflecting (as much as there is to judge), the rest for answering alone.
    "judge_first": spark(8, 32),
}
VARIANTS |= {
    f"ratio_0.25_no_{out}": spark(32, 8, recycle_tasks=[task for task in recycle.TASKS if task != out])
    for out in recycle.TASKS
}
# The verifier errs for so many percent of the answers (benchmarks/noisy.py).
NOISY = ("grpo", "ratio_0.25", "spark")
VARIANTS |= {f"{variant}_noise_{n}": VARIANTS[variant] for n in (5, 10, 20) for variant in NOISY}
VARIANTS["ratio_0.25_label_noise_20"] = VARIANTS["ratio_0.25"]  # only the labels err


def commands_of(task: str, variant: str, seed: int, folder: Path, steps: int, vllm: bool = False) -> list[list[str]]:
    """The calls of train_spark.py; the last one makes `folder`/model."""
    settings = {"seed": seed, "recycle_seed": seed, "log_completions": False, "save_total_limit": 1}
    settings |= {"model_name_or_path": TASKS[task].start, **VARIANTS[variant]}
    if vllm:
        settings["use_vllm"] = True
    if "noise" in variant:
        noisy = f"benchmarks/noisy.py:{TASKS[task].measures}_{variant.rpartition('_')[2]}"
        settings["reward_funcs"] = [noisy, f"{noisy}_undone"] if "label_noise" in variant else noisy
    steps *= VARIANTS[variant].get("steps_per_generation", 1)
    if variant != "judge_first":
        return [command_of(task, folder / "model", settings | {"max_steps": steps})]
    first = command_of(task, folder / "first", settings | {"max_steps": steps // 3})
    then = settings | VARIANTS["grpo"] | {"max_steps": steps - steps // 3, "model_name_or_path": folder / "first"}
    return [first, command_of(task, folder / "model", then)]


def command_of(task: str, output: Path, settings: dict) -> list[str]:
    batch = settings["per_device_train_batch_size"] // TASKS[task].share
    settings = settings | {"per_device_train_batch_size": batch}
    command = [sys.executable, "train_spark.py", "--config", TASKS[task].recipe, "--output_dir", str(output)]
    for name, value in settings.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*command, "--resume_from_checkpoint", "latest"]


def folder_of(task: str) -> Path:
    return RUNS / (TASKS[task].trained_as or task)


def outcome_of(task: str, split: str) -> str:
    return f"{task}_{split}.json" if TASKS[task].trained_as else f"{split}.json"


class Failed(Exception):
    pass


def one_run(task: str, variant: str, seed: int, args) -> dict:
    """Train, unless that is done, and measure, unless that is done."""
    folder = folder_of(task) / ("start" if variant == "start" else f"{variant}_{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    # vLLM on the CPU, if at all: no run binds itself to the cores of another, or reserves its memory.
    shared = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env = {"OMP_NUM_THREADS": threads, **shared, **os.environ, "HF_HUB_OFFLINE": "1"}
    model = TASKS[task].start if variant == "start" else str(folder / "model")
    with open(folder / "log.txt", "a", encoding="utf-8") as log:

        def call(command: list[str]) -> None:
            if subprocess.run(command, check=False, env=env, stdout=log, stderr=log).returncode:
                raise Failed(f"{' '.join(command[1:4])} failed; {folder / 'log.txt'} says why")

        commands = []
        if variant != "start":
            commands = commands_of(task, variant, seed, folder, args.steps or TASKS[task].steps, args.vllm)
        if commands and (folder / "trained.json").exists():
            earlier = json.loads((folder / "trained.json").read_text(encoding="utf-8"))["command"]
            if steps_of(earlier.split()) != steps_of(list(itertools.chain(*commands))):
                raise Failed(f"{folder}: was trained for another number of steps; remove it to train it anew")
        elif commands:
            resumed = any(folder.glob("*/checkpoint-*"))
            begun = time.perf_counter()
            for command in commands:
                call(command)
            phases = [log_history(Path(command[command.index("--output_dir") + 1])) for command in commands]
            logs = [row for phase in phases for row in phase]
            trained = {
                "command": " && ".join(" ".join(["python", *command[1:]]) for command in commands),
                "commit": record.commit(),
                "versions": record.versions(),
                "seconds": None if resumed else time.perf_counter() - begun,
                "tokens": sum(max(row.get("num_tokens", 0) for row in phase) for phase in phases),
                "rollouts": sum(row["recycle/rows"] for row in logs if "recycle/rows" in row),
                "trained_rows": sum(row.get("recycle/trained_rows", 0) for row in logs),
                "curve": [
                    {k: round(v, 4) for k, v in row.items() if k.startswith(("policy/", "judge/", "reflection/"))}
                    for row in logs
                    if "loss" in row
                ],
            }
            (folder / "trained.json").write_text(json.dumps(trained), encoding="utf-8")
        outcome = folder / outcome_of(task, args.split)
        if not outcome.exists():
            measured = ["--task", TASKS[task].measures, "--split", args.split, "--questions", str(args.questions)]
            measured += ["--vllm"] * args.vllm
            call([sys.executable, "-m", "benchmarks.measures", model, *measured, "--output", str(outcome)])
    print(f"{task} {variant} seed {seed}: done", flush=True)
    trained = {} if variant == "start" else json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    return {"variant": variant, "seed": seed, **trained, **outcomes(outcome)}


def outcomes(path: Path) -> dict:
    """What benchmarks.measures wrote, without how it was called."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: how for name, how in found.items() if name in ("greedy", "sampled")}


def steps_of(words: list[str]) -> list[str]:
    """The --max_steps of one command or several."""
    return [number for flag, number in itertools.pairwise(words) if flag == "--max_steps"]


def log_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def finished_runs(task: str, split: str) -> list[dict]:
    """Everything that has been trained and measured so far."""
    runs = []
    for folder in sorted(folder_of(task).glob("*")):
        variant, _, seed = folder.name.rpartition("_")
        variant, seed = (variant, int(seed)) if variant else (folder.name, 0)
        if (folder / outcome_of(task, split)).exists():
            trained = folder / "trained.json"
            settings = json.loads(trained.read_text(encoding="utf-8")) if trained.exists() else {}
            outcome = outcomes(folder / outcome_of(task, split))
            for how in outcome.values():
                how["rows"] = {name: as_numbers(row) for name, row in how["rows"].items()}
            runs.append({"variant": variant, "seed": seed, **settings, **outcome})
    return runs


def as_numbers(value):
    """True and False as 1 and 0, a quarter of the bytes."""
    if isinstance(value, list):
        return [as_numbers(part) for part in value]
    return int(value) if isinstance(value, bool) else value


def recorded_runs(path: Path) -> list[dict]:
    """Those of an earlier call, perhaps on another machine."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def table(runs: list[dict], than: str = "grpo") -> dict[str, dict[str, dict]]:
    """variant -> measure -> its mean over seeds with the half width of the 95 % interval, the same of its difference
    from GRPO (or `than`), and the seeds' values (benchmarks/intervals.py)."""
    values = values_of(runs)
    deviations = spread(values)
    cells = {}
    for variant, row in values.items():
        cells[variant] = {}
        for name, seeds in row.items():
            known = deviations.get(name) if variant != "start" else None
            cell = {"mean": statistics.fmean(seeds.values()), "half": half_width(known, len(seeds)), "seeds": seeds}
            plain = values.get(than, {}).get(name)
            if plain and variant != than:
                difference = cell["mean"] - statistics.fmean(plain.values())
                cell["over"] = {"mean": difference, "half": half_width(known, len(seeds), len(plain))}
            cells[variant][name] = cell
    return cells


SHOWN = (
    "greedy: first answer",
    "first answer",
    "one of 8",
    "judge, own answers",
    "greedy judge, own answers",
    "judge, own boxed answers",
    "greedy judge, own boxed answers",
    "judge, independent answers",
    "pairwise, both orders",
    "Brier score of verdicts",
    "reflection fixes a wrong answer",
    "reflection harms a right answer",
    "final answer, reflecting on a No",
    "vote of 4",
    "vote of 8",
    "vote of 4 weighed by verdicts",
    "vote of 4 weighed by their probability",
    "vote of 4 weighed by greedy verdicts",
    "best of 4 by pairs",
    "tokens: first answer",
    "recycled rollouts",
)


def print_table(cells: dict[str, dict[str, dict]], than: str = "grpo") -> None:
    """As Markdown: means, and then the differences from GRPO (or `than`)."""
    for of, variants in (("mean", list(cells)), ("over", [v for v in cells if v not in ("start", than)])):
        if not variants:
            continue
        print("\n| " + " | ".join(["" if of == "mean" else f"minus {than}", *variants]) + " |")
        print("| --- |" + " ---: |" * len(variants))
        for name in SHOWN:
            row = [written(cells[v].get(name, {}), of) for v in variants]
            print("| " + " | ".join([name, *row]) + " |")


def written(cell: dict, of: str) -> str:
    """A mean (of: mean), or a difference (of: over), and its half width."""
    value = cell.get("over", {}) if of == "over" else cell
    if value.get("mean") is None:
        return ""
    places = 3 if abs(value["mean"]) < 2 else 1
    mean = round(value["mean"], places) + 0.0  # no -0.000
    half = "" if value["half"] is None else f" ± {value['half']:.{places}f}"
    return f"{mean:{'+' if of == 'over' else ''}.{places}f}{half}"


WAYS = {  # to a final answer, of `measures`, and their marks in the figure
    "vote of 4 weighed by verdicts": "s",
    "vote of 4 weighed by greedy verdicts": "P",
    "vote of 4 weighed by their probability": "D",
    "best of 4 by pairs": "^",
    "final answer, reflecting on a No": "v",
}


MAJORITIES = ("first answer", "vote of 4", "vote of 8")
ALIKE = 1.1  # a way of plain GRPO's that takes this many times the tokens still counts as one of as many


def at_equal_tokens(cells: dict[str, dict[str, dict]], variant: str, way: str) -> dict[str, dict]:
    """A way's accuracy minus that of plain GRPO's smallest majority that takes as many written tokens or more (the
    largest, where none does), and minus the best that plain GRPO reaches with it or with its own judge, for as many
    (`ALIKE`): of runs of the same seed, as `mean_of`. A maximum over several ways is biased, in GRPO's favour."""
    cell, grpo = cells[variant], cells["grpo"]
    over = {"GRPO's majority": [], "GRPO's best": []}
    for seed in cell[way]["seeds"].keys() & grpo[way]["seeds"].keys():
        right, tokens = cell[way]["seeds"][seed], cell[f"tokens: {way}"]["seeds"][seed]
        dear = [name for name in MAJORITIES if grpo[f"tokens: {name}"]["seeds"][seed] >= tokens / ALIKE]
        majority = grpo[dear[0] if dear else MAJORITIES[-1]]["seeds"][seed]
        others = [grpo[w]["seeds"][seed] for w in WAYS if grpo[f"tokens: {w}"]["seeds"][seed] <= ALIKE * tokens]
        over["GRPO's majority"].append(right - majority)
        over["GRPO's best"].append(right - max([majority, *others]))
    return {name: mean_of(differences) for name, differences in over.items()}


def mean_of(values: list[float]) -> dict[str, float | None]:
    """Their mean, and the half width of its 95 % interval (t) by their own spread."""
    if not values:
        return {"mean": None, "half": None}
    own = (statistics.stdev(values), len(values) - 1) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "half": half_width(own, len(values))}


def print_at_equal_tokens(cells: dict[str, dict[str, dict]]) -> None:
    variants = [variant for variant in cells if variant != "start"]
    print("\n| at as many tokens, minus | | " + " | ".join(variants) + " |")
    print("| --- | --- |" + " ---: |" * len(variants))
    for way in WAYS:
        rows = {variant: at_equal_tokens(cells, variant, way) for variant in variants}
        for than in ("GRPO's majority", "GRPO's best"):
            written_rows = [written({"over": rows[variant][than]}, "over") for variant in variants]
            print("| " + " | ".join([than, way, *written_rows]) + " |")


def figure(cells: dict[str, dict[str, dict]], variants: list[str], path: str) -> None:
    """Accuracy against tokens written a question: one answer, the majority of 4 and 8, and the ways with a judge."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    plot, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for variant in variants:
        cell = cells[variant]
        votes = [name for name in MAJORITIES if name in cell]
        tokens = [cell[f"tokens: {name}"]["mean"] for name in votes]
        (line,) = axes.plot(tokens, [cell[name]["mean"] for name in votes], "o-", label=f"{variant}: majority")
        for name, mark in WAYS.items():
            x, y = cell[f"tokens: {name}"]["mean"], cell[name]
            error = {} if y["half"] is None else {"yerr": y["half"], "elinewidth": 0.7}
            axes.errorbar(x, y["mean"], fmt=mark, color=line.get_color(), **error)
    for name, mark in WAYS.items():
        axes.plot([], [], mark, color="grey", label=name)
    axes.set(xscale="log", xlabel="tokens written a question", ylabel="right")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plot.savefig(path, dpi=120)


def main() -> None:
    parser = Parser(__doc__, prog="benchmarks.learning")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--variants", nargs="+", default=["grpo", "spark"], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="dev", choices=("dev", "test", "unseen"))
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM, in training and in the measures")
    parser.add_argument("--table", action="store_true", help="of the runs there are; nothing is trained")
    parser.add_argument("--minus", default="grpo", choices=VARIANTS, help="what differences are from (default: grpo)")
    parser.add_argument("--figure", metavar="PNG", help="draw the accuracy of --variants against tokens")
    args = parser.parse_args()
    if not args.table:
        for path, module in TASKS[args.task].made.items():
            if not Path(path).exists():
                parser.error(f"{path}: is missing; python -m {module} makes it")
        jobs = [("start", 0), *((variant, seed) for seed in args.seeds for variant in args.variants)]
        try:
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda job: one_run(args.task, *job, args), jobs))
        except Failed as error:
            parser.exit(1, f"benchmarks.learning: {error}\n")
    path, made = record.RESULTS / f"learning_{args.task}_{args.split}.json", finished_runs(args.task, args.split)
    known = {(run["variant"], run["seed"]): run for run in recorded_runs(path)}
    by_name = {**known, **{(run["variant"], run["seed"]): run for run in made}}
    runs = [by_name[name] for name in sorted(by_name)]
    if by_name != known:
        record.write(path, indent=None, runs=runs)
    cells = table(runs, args.minus)
    shown = {variant: cells[variant] for variant in ("start", *args.variants) if variant in cells}
    print_table(shown, args.minus)
    if "grpo" in shown and args.minus == "grpo":
        print_at_equal_tokens(shown)
    if args.figure:
        figure(cells, [variant for variant in args.variants if variant in cells], args.figure)


if __name__ == "__main__":
    main()
