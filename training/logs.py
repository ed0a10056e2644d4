"""What a step logs: TRL's own metrics are about the policy's rollouts; those of recycled ones stand apart."""

from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

import verify
from data.rows import images_of
from recycle import Group, Item
from training.metrics import judge_metrics, policy_metrics, recycled_table


class StepLogs:
    """A mixin of GRPOTrainer.

    Attributes:
        _outcomes: what policy and judge (its keys) were right about in this evaluation; see training/metrics.py.
    """

    _outcomes: dict[str, dict[str, list[float]]]

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(float(value))

    @contextmanager
    def _logged(self, recycled: bool, weight: float = 1.0):
        """TRL logs every pass alike. In here its metrics of recycled rows get the prefix recycle/, so that those
        without it are about the policy; all count `weight` times in the mean over passes. Recycled rows are left out of
        its table of completions (`RecycledTable` writes another)."""
        metrics, logs = self._metrics, self._logs
        self._metrics = apart = {"train": defaultdict(list), "eval": defaultdict(list)}
        if recycled:
            self._logs = {name: [] for name in logs} | {"rewards": defaultdict(list), "extra": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics, self._logs = metrics, logs
        for name, values in apart[self._mode].items() if weight else ():
            if name == "num_tokens":  # what the step cost, all of it
                metrics[self._mode][name] = values
            else:
                scale = 1.0 if name == "entropy_coef" else weight
                metrics[self._mode]["recycle/" * recycled + name] += [value * scale for value in values]

    def _log_policy(self, groups: list[Group]) -> None:
        if self.model.training:
            self._log(policy_metrics(groups))
        else:  # all batches count as one: the last may be smaller
            metrics = policy_metrics(groups, self._outcomes["policy"])
            self._metrics["eval"].update({name: [value] for name, value in metrics.items()})

    def _log_judging(self, groups: list[Group], asked: list[Item], advantages: torch.Tensor) -> None:
        texts, rewards = gather_object(self._rewards.texts), gather_object(self._rewards.values)
        advantages = self.accelerator.gather(advantages).tolist()
        right = gather_object(self._rewards.right)
        scored = zip(asked, right, rewards, strict=True)
        outcomes = [fixed if item.label is None else reward for item, fixed, reward in scored]
        if self.model.training:
            self._log(judge_metrics(asked, texts, outcomes))
        else:  # all batches count as one: they have different numbers of items
            metrics = judge_metrics(asked, texts, outcomes, self._outcomes["judge"])
            self._metrics["eval"].update({name: [value] for name, value in metrics.items()})
        if self.model.training and self.log_completions and self.accelerator.is_main_process:
            self._table.rows = recycled_table(groups, asked, texts, rewards, advantages)

    def _log_images(self, inputs: list[dict[str, Any]]) -> None:
        """For TRL's tables: gathered only where a logger shows them, and from every process, with images or without."""
        loggers = {"wandb", "trackio"} & set(self.args.report_to)
        if self.args.log_multimodal and self.log_completions and loggers:
            images = gather_object([images_of(row) for row in inputs])
            self._logs["images"].extend(images if any(images) else [])
        if "wandb" in self.args.report_to:  # whose tables end the run at messages of parts that differ
            for rows in (self._logs["prompt"], self._logs["completion"]):
                texts = [row if isinstance(row, str) else list(map(_as_text, row)) for row in rows]
                rows.clear()
                rows.extend(texts)


def _as_text(message: dict[str, Any]) -> dict[str, str]:
    return {"role": message["role"], "content": verify.last_text([message])}
