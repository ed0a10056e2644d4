"""Where the seconds of a training step go: a SparkTrainer with a clock around each part of a step."""

import json
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback

import train_spark
from train_spark import SparkTrainer
from training import images, passes

# "other": callbacks, and transformers' and TRL's own loops.
PARTS = (
    "data",  # the next generation batch from the loader
    "policy generation",
    "recycled generation",
    "weight sync",  # into a colocated engine
    "verification",  # reward functions
    "log-probs",  # forward passes without gradient
    "recycling",  # groups, selection, prompts
    "batch",  # the union, and its passes
    "forward",
    "backward",
    "optimizer",
    "logging",
    "other",
)


class Clock:
    """Exclusive seconds by part: what a part within another takes is not the other's."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []

    @contextmanager
    def __call__(self, part: str):
        start = now()
        self._within.append(0.0)
        try:
            yield
        finally:
            whole = now() - start
            self.seconds[part] += whole - self._within.pop()
            if self._within:
                self._within[-1] += whole

    def around(self, function, part):
        """`function`, timed as `part` (or as what `part()` says when it is called)."""

        def timed(*args, **kwargs):
            with self(part() if callable(part) else part):
                return function(*args, **kwargs)

        return timed


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Marks(TrainerCallback):
    """Where training begins, and the optimizer's part of a step."""

    def __init__(self, trainer: "TimedTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, *rest, **kwargs):
        self.trainer.begin_step(state.num_input_tokens_seen)  # of a resumed run not 0

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.began = now()

    def on_optimizer_step(self, *args, **kwargs):
        self.trainer.clock.seconds["optimizer"] += now() - self.began


class TimedTrainer(SparkTrainer):
    """SparkTrainer that keeps in `steps` the seconds of each optimizer step by part, its rows and tokens, and a line of
    `file` for each, if there is one.

    It times what it inherits by wrapping it on the instance, so that the code that is measured is the code that runs.
    """

    def __init__(self, *args, file: Path | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.file = file
        self.clock = clock = Clock()
        self.steps: list[dict] = []
        self.add_callback(Marks(self))
        around = clock.around

        def generation() -> str:
            return "policy generation" if self._rewards.items is None else "recycled generation"

        self._generate = around(self._generate, generation)
        self._calculate_rewards = around(self._calculate_rewards, "verification")
        self._groups = around(self._groups, "recycling")
        self._passes = around(self._passes, "batch")
        self.get_batch_samples = around(self.get_batch_samples, "data")
        self._get_per_token_logps_and_entropies = around(
            self._get_per_token_logps_and_entropies, lambda: "forward" if torch.is_grad_enabled() else "log-probs"
        )
        self.accelerator.backward = around(self.accelerator.backward, "backward")
        if self.use_vllm:
            self.vllm_generation.sync_weights = around(self.vllm_generation.sync_weights, "weight sync")
        for module, name, part in (
            (train_spark, "recycle", "recycling"),
            (train_spark, "join", "batch"),
            (train_spark, "share_images", "batch"),
            (passes, "merge_images", "batch"),
            (images, "merge_images", "batch"),
        ):
            function = getattr(module, name)
            setattr(module, name, around(getattr(function, "timed", function), part))
            getattr(module, name).timed = getattr(function, "timed", function)

    def begin_step(self, tokens: int) -> None:
        """With so many tokens behind it."""
        self.clock.seconds.clear()
        self._began, self._tokens = now(), tokens

    def log(self, logs, *args, **kwargs):
        with self.clock("logging"):
            super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        whole = now() - self._began
        seconds = {part: self.clock.seconds.get(part, 0.0) for part in PARTS[:-1]}
        row = {
            "step": self.state.global_step,
            "seconds": {**seconds, "other": whole - sum(seconds.values())},
            "whole": whole,
            "tokens": logs["num_tokens"] - self._tokens,
            "rollouts": self.args.generation_batch_size + logs.get("recycle/rows", 0),
            "trained_rows": logs.get("recycle/trained_rows", self.args.generation_batch_size),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "metrics": dict(logs),
        }
        self.steps.append(row)
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.begin_step(logs["num_tokens"])
