"""What a training run shows and hears: one progress bar, warnings where it goes wrong, and signals that end it."""

import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

WINDOW = 20  # logs


class Progress(ProgressCallback):
    """One bar with the numbers that matter, instead of all metrics of every step between its lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {
            "policy": "policy/accuracy",
            "pointwise": "judge/pointwise/balanced_accuracy",
            "pairwise": "judge/pairwise/accuracy",
            "fixed": "reflection/fix_rate",
        }
        if self.training_bar is not None:
            self.training_bar.set_postfix({k: f"{logs[metric]:.2f}" for k, metric in shown.items() if metric in logs})


def troubles(history: list[dict[str, float]]) -> dict[str, str]:
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
    if (unboxed := mean("policy/unboxed")) > 0.5 and series("policy/unboxed"):
        found["unboxed"] = (
            f"{unboxed:.0%} of the rollouts box no answer (policy/unboxed): does the prompt ask for \\boxed{{}} "
            "(prompt_suffix), and is max_completion_length long enough?"
        )
    for task, name, verdicts in (
        ("pointwise", "judge/pointwise/positive_rate", ("correct", "incorrect")),
        ("pairwise", "judge/pairwise/first_rate", ("A", "B")),
    ):
        rate = mean(name)
        if max(rate, 1 - rate) > 0.95:
            found[task] = (
                f"the {task} judge says {verdicts[rate < 0.5]} in {max(rate, 1 - rate):.0%} of its verdicts ({name}): "
                "is recycle_balance on, and does the judge see enough of the rollout (recycle_source)?"
            )
    return found


class Watch(TrainerCallback):
    """Prints each of `troubles` once, when it begins."""

    def __init__(self):
        self._history: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._known: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "reward" not in logs:  # the line at the end of training has none
            return
        self._history.append(logs)
        if len(self._history) == WINDOW:
            found = troubles(list(self._history))
            for name in found.keys() - self._known:
                tqdm.write(f"warning, step {state.global_step}: {found[name]}", file=sys.stderr)
            self._known = set(found)


class RecycledTable(TrainerCallback):
    """Writes the recycled rollouts of the step last logged to completions/recycled_STEP.parquet. `rows` is theirs."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args, state, control, **kwargs):
        if self.rows and state.is_world_process_zero:
            import pandas as pd

            table = pd.DataFrame([{"step": state.global_step, **row} for row in self.rows])
            table.to_parquet(Path(args.output_dir) / "completions" / f"recycled_{state.global_step:05d}.parquet")
            self.rows = []


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end training after the step they come in, with a checkpoint; a second one ends it at once.

    Any process that hears one stops them all, at the same step. `received` is the signal, or None.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}

    def _hear(self, number, frame):
        self.received = signal.Signals(number)
        if self.accelerator.is_main_process:
            tqdm.write(f"{self.received.name}: stopping after this step, with a checkpoint", file=sys.stderr)
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
