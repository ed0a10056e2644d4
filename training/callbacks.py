"""What a training run shows, writes and hears: its progress, metrics.jsonl, warnings where it goes wrong, and signals
that end it."""

import importlib
import io
import json
import math
import os
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import verify
from training import console

WINDOW = 20  # logs
LINES = 50  # of progress at most, where it goes into a file
SHOWN = {  # in it
    "policy": "policy/accuracy",
    "pointwise": "judge/pointwise/balanced_accuracy",
    "pairwise": "judge/pairwise/accuracy",
    "fixed": "reflection/fix_rate",
}
TABLE_ROWS = 32  # of a logger's table


class Progress(TrainerCallback):
    """First what the run will do, then one bar with the numbers that matter; where stderr is no terminal (or with
    disable_tqdm), a line every so many steps."""

    def __init__(self):
        self._bar: tqdm | None = None
        self._figures: dict[str, str] = {}
        self._first = 0  # steps done when it began
        self._begun = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        print("\n".join(console.plan_lines(args, state.max_steps, state.global_step)), flush=True)
        self._first, self._begun = state.global_step, time.monotonic()
        if sys.stderr.isatty() and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(1)
        elif state.is_world_process_zero and not control.should_log:
            self._line(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:  # of an evaluation, or at the end
            return
        figures = {k: f"{logs[name]:.2f}" for k, name in SHOWN.items() if logs.get(name) is not None}
        self._figures = figures or self._figures  # of several steps with one generation, only the first has some
        if self._bar is not None:
            self._bar.set_postfix(self._figures)
        else:
            self._line(state)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, state) -> None:
        step, every = state.global_step, max(state.max_steps // LINES, 1)
        if step == self._first + 1 or step % every == 0 or step == state.max_steps:
            each = (time.monotonic() - self._begun) / (step - self._first)
            left = each * (state.max_steps - step) / 60
            figures = "".join(f"  {name} {value}" for name, value in self._figures.items())
            line = f"step {step}/{state.max_steps}{figures}  {each:.1f} s a step, {left:.0f} min left"
            print(line, file=sys.stderr, flush=True)


def show_progress(trainer) -> None:
    """`Progress` instead of what transformers prints."""
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    trainer.add_callback(Progress)


def changed_settings(args) -> dict[str, Any]:
    """The settings that are not the defaults; tokens are masked."""
    values = args.to_dict() if hasattr(args, "to_dict") else vars(args)
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in fields(args)
    }
    return {name: value for name, value in values.items() if name in defaults and value != defaults[name]}


class MetricsFile(TrainerCallback):
    """Writes settings.json, and metrics.jsonl: a line per step, however rarely the trainer logs. `loss`, `grad_norm`
    and whatever else only a log has come with the steps that are logged. An evaluation has a line of its own; so has
    the log of an epoch (`logging_strategy epoch`).

    Args:
        metrics: the trainer's lists of values since the last log.

    Attributes:
        more: settings that are not the trainer's: the command's data and model.
    """

    def __init__(self, metrics: dict[str, list[float]]):
        self.more: dict[str, Any] = {}
        self._metrics = metrics
        self._written: Counter[str] = Counter()  # how many of the values of each list are in lines
        self._path: Path | None = None
        self._line_of = -1  # the last step that has a line

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._path = Path(args.output_dir) / "metrics.jsonl"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            self._path.write_text("".join(kept), encoding="utf-8")  # a resumed run takes the later steps again
            settings = {"model": kwargs["model"].config.name_or_path, **self.more, **changed_settings(args)}
            self._path.with_name("settings.json").write_text(json.dumps(settings, indent=1, default=str))

    def on_step_end(self, args, state, control, **kwargs):
        if self._path is not None and not control.should_log:
            self._write(state, self._step())
            self._line_of = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._path is None or "train_runtime" in logs:  # the sums at the end are no step's
            return
        if "loss" in logs:
            if self._line_of == state.global_step:  # the log of an epoch, whose last step has a line already
                logs = {name: value for name, value in logs.items() if name not in self._metrics}
            logs = {**logs, **self._step()}
            self._written.clear()
        self._write(state, logs)

    def _step(self) -> dict[str, float | None]:
        """Means of what came since the last line."""
        means = {}
        for name, values in self._metrics.items():
            new = values[-1:] if name == "num_tokens" else values[self._written[name] :]  # tokens are a running sum
            self._written[name] = len(values)
            scored = [value for value in new if not math.isnan(value)]
            if new:
                means[name] = sum(scored) / len(scored) if scored else None
        return means

    def _write(self, state, line: dict[str, Any]) -> None:
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **line}) + "\n")


def diagnose(history: list[dict[str, float]]) -> dict[str, str]:
    """What is going wrong in a window of logged metrics, oldest first: a name, and a line that says what to look at."""

    def series(name: str) -> list[float]:
        return [logs[name] for logs in history if logs.get(name) is not None]  # None: nothing could be scored

    def mean(name: str) -> float:
        values = series(name)
        return sum(values) / len(values) if values else 0.5

    found = {}
    rewards = series("reward")
    if not rewards:
        found["nothing scorable"] = (
            f"no rollout could be scored in the last {len(history)} logs: what does the first reward function expect "
            "in the solution column?"
        )
    elif len(rewards) == len(history) and max(rewards) == min(rewards):
        found["constant reward"] = (
            f"the policy's reward has been {rewards[-1]:g} in all of the last {len(history)} logs: there is "
            "nothing to learn from. Look at the completions: unboxed, cut off (max_completion_length), or other golds?"
        )
    elif len(unmixed := series("frac_reward_zero_std")) == len(history) and min(unmixed) == 1:
        found["no mixed group"] = (
            f"no question had right and wrong rollouts in the last {len(history)} logs: the policy gets no gradient "
            "and there are no pairs. Take questions it sometimes gets right (python -m data.filter), or more rollouts."
        )
    if (unboxed := mean("policy/unboxed")) > 0.5:
        found["unboxed"] = (
            f"{unboxed:.0%} of the rollouts box no answer (policy/unboxed): does the prompt ask for \\boxed{{}} "
            "(prompt_suffix), and is max_completion_length long enough?"
        )
    if (unparsed := mean("judge/unparsed")) > 0.5:
        found["unparsed"] = (
            f"{unparsed:.0%} of the verdicts can't be read (judge/unparsed): look at completions/recycled_*.parquet "
            "(log_completions). They are \\boxed{Yes}, {No}, {A} or {B}; is max_completion_length long enough?"
        )
    balanced = "is recycle_matched or recycle_balance on, and "
    for task, name, verdicts, check in (
        ("pointwise", "judge/pointwise/positive_rate", ("correct", "incorrect"), balanced),
        ("pairwise", "judge/pairwise/first_rate", ("A", "B"), ""),  # always balanced
    ):
        rate = mean(name)
        if max(rate, 1 - rate) > 0.95:
            found[task] = (
                f"the {task} judge says {verdicts[rate < 0.5]} in {max(rate, 1 - rate):.0%} of its verdicts ({name}): "
                f"{check}does the judge see enough of the rollout (recycle_source)?"
            )
    return found


class Watch(TrainerCallback):
    """Prints what `diagnose` finds, each once, when it begins."""

    def __init__(self):
        self._history: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._known: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "reward" not in logs:  # the line at the end of training has none
            return
        self._history.append(logs)
        if len(self._history) == WINDOW:
            found = diagnose(list(self._history))
            for name in found.keys() - self._known:
                tqdm.write(f"warning, step {state.global_step}: {found[name]}", file=sys.stderr)
            self._known = set(found)


class RecycledTable(TrainerCallback):
    """Writes the recycled rollouts of the step last logged to completions/recycled_STEP.parquet, and the first rollout
    of each of some items to the loggers that have tables. `rows` holds the rollouts."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args, state, control, **kwargs):
        if self.rows and state.is_world_process_zero:
            import pandas as pd

            table = pd.DataFrame([{"step": state.global_step, **row} for row in self.rows])
            table.to_parquet(Path(args.output_dir) / "completions" / f"recycled_{state.global_step:05d}.parquet")
            for name in sorted({"trackio", "wandb"} & set(args.report_to)):
                logger = importlib.import_module(name)
                logger.log({"recycled": shown_table(logger, state.global_step, self.rows[:: args.num_generations])})
            self.rows = []


def shown_table(logger, step: int, rows: list[dict[str, Any]]):
    """Rollouts as a table of trackio or wandb."""
    from PIL import Image

    columns = ["step", "task", "shown", "completion", "label", "verdict", "reward", "image"]
    data = []
    for row in rows[:TABLE_ROWS]:
        verdict = verify.parse_verdict(row["completion"]) if row["label"] is not None else None
        image = logger.Image(Image.open(io.BytesIO(row["images"][0]))) if row["images"] else None
        data.append([step, row["task"], row["prompt"], row["completion"], row["label"], verdict, row["reward"], image])
    return logger.Table(columns=columns, data=data)


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end training after the current step, with a checkpoint; a second one ends it at once.

    Any process that hears one stops them all, at the same step. `received` is the signal, or None.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}

    def _hear(self, number, frame):
        self.received = signal.Signals(number)
        if self.accelerator.is_main_process:
            line = f"{self.received.name}: stopping after this step, with a checkpoint"
            if "TORCHELASTIC_RUN_ID" in os.environ:  # accelerate launch, torchrun: they kill what takes longer
                limit = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
                line += f"; the launcher waits {limit} seconds for it (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)"
            tqdm.write(line, file=sys.stderr)
        signal.signal(number, self._before[number])

    def on_step_end(self, args, state, control, **kwargs):
        heard = torch.tensor([self.received or 0], device=self.accelerator.device)
        heard = int(self.accelerator.gather(heard).max())
        if heard:
            self.received = signal.Signals(heard)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)
