"""What train_spark.py says on the console: its help, the first and the last lines of a run, and one progress bar.

`start` runs before torch and TRL are imported: the help needs neither, and both libraries talk while they load.
"""

import ast
import logging
import math
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

WIDTH = 120
USAGE = "train_spark.py --config FILE.yaml [--SETTING VALUE ...]"
NOTHING_GIVEN = """\
train_spark.py: expected a recipe, or at least --model_name_or_path and --dataset
  python train_spark.py --config recipes/demo.yaml    runs one; --plan says beforehand what it will do and need
  python train_spark.py --help                        lists the settings"""
# Logger -> beginnings of messages that a user can do nothing about.
NOISE = {
    "vllm.triton_utils.importing": ("Triton is installed",),
    "DeepSpeed": ("Setting accelerator to CPU",),
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens", "mtime may not be reliable"),
}


def start(arguments: list[str], source: str) -> None:
    """Answer a command line that has no arguments or asks for help, and end."""
    if not arguments:
        print(NOTHING_GIVEN, file=sys.stderr)
        raise SystemExit(2)
    if "-h" in arguments or "--help" in arguments:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager may take a part of it
        print("\n".join(help_lines(Path(source))))
        raise SystemExit
    silence()


def silence() -> None:
    """Silence the messages in `NOISE`."""
    for name, beginnings in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, starts=beginnings: not str(record.msg).startswith(starts))


def quiet() -> None:
    """No progress bars but ours, and those of downloads where somebody sees them."""
    import datasets
    import huggingface_hub.utils
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------------
# Help


def help_lines(source: Path) -> Iterator[str]:
    """The settings of data and of SPARK, and where to find TRL's."""
    from data.arguments import DataArguments, DataSettings
    from recycle import RecycleConfig

    module = ast.parse(source.read_text(encoding="utf-8"))
    yield f"usage: {USAGE}\n"
    yield f"{ast.get_docstring(module)}\n"
    yield _entry("config", None, "A recipe: lines of `setting: value`, which flags override. recipes/ has some.")
    yield "\nData:"
    reading = {each.name for each in fields(DataSettings)}
    yield from map(_entry_of, sorted(fields(DataArguments), key=lambda each: each.name in reading))  # `dataset` first
    yield "\nSPARK:"
    yield from map(_entry_of, fields(RecycleConfig))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "SparkConfig")
    for node in body:  # read, not imported: what it inherits from takes seconds
        if isinstance(node, ast.AnnAssign):
            yield _entry(node.target.id, *map(ast.literal_eval, node.value.args))
    yield "\nThe fields of TRL's GRPOConfig and ModelConfig are settings too (model_name_or_path, output_dir,"
    yield "max_steps, learning_rate, num_generations, use_peft, ...). --help_all lists all of them."


def _entry_of(each) -> str:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    about = each.metadata["help"]
    if choices := each.metadata.get("choices"):
        about += f" One of {', '.join(choices)}."
    return _entry(each.name, None if default is MISSING else default, about)


def _entry(name: str, default: Any, about: str) -> str:
    if default is not None and "default" not in about.lower():
        about += f" [{' '.join(default) if isinstance(default, list) else repr(default)}]"
    return textwrap.fill(about, WIDTH, initial_indent=f"  --{name:<27} ", subsequent_indent=" " * 32)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def plan_lines(args, max_steps: int, done: int) -> list[str]:
    """What the steps after the first `done` will be."""
    from recycle import items_come_in, most_items

    prompts, size = args.generation_batch_size // args.num_generations, args.num_generations
    micro_steps = (max_steps - done) * args.gradient_accumulation_steps
    generations = math.ceil(micro_steps / (args.steps_per_generation * args.num_iterations))
    recycled = most_items(prompts, args, items_come_in(args.world_size, size))
    recycling = math.ceil(generations / args.recycle_every)
    steps = f"{max_steps:,} steps" if not done else f"steps {done + 1:,} to {max_steps:,}"
    line = f"{steps}: {generations * prompts * size:,} rollouts ({prompts:,} prompts x {size} each time)"
    if recycled:
        line += f", at most {recycling * recycled * size:,} recycled ones ({recycled:,} x {size})"
    kept = "metrics.jsonl, completions/" if args.log_completions else "metrics.jsonl"
    also = f"; also logs to {', '.join(args.report_to)}" if args.report_to else ""
    return [line, f"logs: {args.output_dir}/{kept}{also}"]


def show_result(args, state, adapter: bool) -> None:
    """What came out of a run, and what to do with it."""
    from training.model_card import WINDOW, figures

    if not state.is_world_process_zero:
        return
    logs = [entry for entry in state.log_history if "loss" in entry]
    before, after = figures(logs[:WINDOW]), figures(logs)
    changes = ""
    for name, mean in after.items():
        start = f"{before[name]:.2f} -> " if len(logs) > WINDOW and name in before else ""
        changes += f"; {name} {start}{mean:.2f}"
    minutes = next((e["train_runtime"] / 60 for e in reversed(state.log_history) if "train_runtime" in e), 0.0)
    folder = shlex.quote(args.output_dir)
    model = shlex.quote(f"{args.output_dir}/merged" if adapter else args.output_dir)
    following = [f"python -m training.merge {folder}"] if adapter else []
    following += [
        f"python evaluate.py --model {model} --benchmark FILE --mode tts --output results.json",
        f"python report.py {folder} --output report.html",
    ]
    print(f"{state.global_step:,} steps, {minutes:.1f} minutes{changes}")
    if len(after) > 1:
        print("judging and reflecting are scored on the step's own answers, whose mistakes get rarer and harder to see")
    print(f"{args.output_dir}: the {'adapter' if adapter else 'model'}, README.md, metrics.jsonl")
    print("next: " + "\n      ".join(following), flush=True)
