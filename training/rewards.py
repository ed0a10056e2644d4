"""Reward functions for answers, made to score judge rows too."""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

import verify
from data.rows import BadInput
from recycle import Item


class JudgingRewards:
    """A user's reward functions, the first of them the verifier. Judge rows are scored by their label, 1 or 0.

    Args:
        recycling: labels are made from the verifier's rewards, so they must be right or wrong.
        correct_at: least reward of a right rollout; None: the verifier gives 0 or 1.

    Attributes:
        functions: what the trainer calls.
        equal: tells which (prediction, gold) pairs are the same answer.
        extract: finds the answer in what was written, or None.
        items: what the rows to be scored were recycled into; None: they are the policy's.
        texts, values, right: of the rows scored last on this process: what was written, its reward, and whether the
            answer is right; None where the verifier has no opinion.

    Raises ValueError where a reward can't make labels.
    """

    def __init__(self, reward_funcs: list, recycling: bool, correct_at: float | None):
        for function in reward_funcs if recycling else ():
            if is_model(function) or is_async_callable(function):
                raise ValueError(
                    f"reward_funcs: expected functions of (prompts, completions, **columns), got {function!r}; "
                    "reward models and async functions can't be used with recycle_ratio > 0"
                )
        self.functions = list(reward_funcs)
        self.equal: Callable[[list[tuple[str, str]]], list[bool | None]] = verify.verify_many
        self.extract: Callable[[str], str | None] = verify.extract_boxed
        self.items: list[Item] | None = None
        self.texts: list[str] = []
        self.values: list[float | None] = []
        self.right: list[bool | None] = []
        self._recycling, self._correct_at = recycling, correct_at
        if not reward_funcs or is_model(reward_funcs[0]) or is_async_callable(reward_funcs[0]):
            return  # plain GRPO by a model's reward, or an environment's: nothing is right or wrong
        self.equal = getattr(reward_funcs[0], "equal", self.equal)
        self.extract = getattr(reward_funcs[0], "extract", self.extract)
        self.functions[0] = self._verifier(reward_funcs[0])
        if recycling:
            self.functions[1:] = [self._other(function) for function in reward_funcs[1:]]

    def _verifier(self, function: Callable) -> Callable:
        def reward(prompts, completions, **columns):
            self.texts = [verify.last_text(completion) for completion in completions]
            self.values = self._answers(function, prompts, completions, columns)
            self.right = self._are_right(self.values, get_callable_name(function))
            for i, item in enumerate(self.items or ()):
                if item.label is not None:
                    self.values[i] = float(verify.parse_verdict(self.texts[i]) == item.label)
            return self.values

        return _named_after(function, reward)

    def _other(self, function: Callable) -> Callable:
        """A further reward function: judge rows, and rows on which the verifier has no opinion, get nothing from it."""

        def reward(prompts, completions, **columns):
            values = self._answers(function, prompts, completions, columns)
            return [None if verdict is None else value for value, verdict in zip(values, self.values, strict=True)]

        return _named_after(function, reward)

    def _answers(self, function: Callable, prompts, completions, columns: dict[str, Any]) -> list[float | None]:
        """`function` of the rows that are answers, None for the others; NaN counts as None."""
        n = len(completions)
        rows = [i for i in range(n) if self.items is None or self.items[i].label is None]
        rewards: list[float | None] = [None] * n
        if not rows:
            return rewards

        def of_rows(values):
            return [values[i] for i in rows] if isinstance(values, list) and len(values) == n else values

        if "images" not in columns and "images" in inspect.signature(function).parameters:  # questions of text alone
            columns["images"] = [[] for _ in range(n)]
        columns = {name: of_rows(values) for name, values in columns.items()}
        scores = function(prompts=of_rows(prompts), completions=of_rows(completions), **columns)
        if len(scores) != len(rows):
            raise ValueError(
                f"{get_callable_name(function)}: gave {len(scores)} rewards, expected {len(rows)}, one a row"
            )
        for i, score in zip(rows, scores, strict=True):
            rewards[i] = None if score is None or math.isnan(score) else float(score)
        return rewards

    def _are_right(self, values: list[float | None], name: str) -> list[bool | None]:
        if self._correct_at is not None:
            return [None if value is None else value >= self._correct_at for value in values]
        other = [value for value in values if value not in (None, 0, 1)]
        if other and self._recycling:
            raise BadInput(
                f"reward_funcs: {name} gave {other[0]:g}, expected 0 or 1 (None: no opinion); set correct_at to the "
                "least reward of a right rollout"
            )
        return [None if value is None or other else bool(value) for value in values]


def _named_after(function: Callable, wrapper: Callable) -> Callable:
    """functools.update_wrapper, and the name that TRL's metrics have for a callable object or a partial."""
    functools.update_wrapper(wrapper, function).__name__ = get_callable_name(function)
    return wrapper


def is_model(function) -> bool:
    """A reward model, by name or loaded."""
    return isinstance(function, (str, torch.nn.Module))


def load_rewards(names: list[str] | None) -> list[Callable]:
    """Reward functions by FILE.py:NAME; without any, the boxed answer against the solution. Raises BadInput."""
    if not names:
        return [verify.answer_reward]
    functions = []
    for spec in names:
        path, _, name = spec.rpartition(":")
        if not path.endswith(".py") or not Path(path).is_file():
            raise BadInput(
                f"reward_funcs: {spec}: expected FILE.py:NAME, a function of (prompts, completions, **columns)"
            )
        found = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(found.name, module)
        sys.path.append(str(Path(path).resolve().parent))  # for what it imports from beside itself, now or when called
        try:
            found.loader.exec_module(module)
        except ImportError as error:
            raise BadInput(f"reward_funcs: {path}: {error}") from error
        if not callable(getattr(module, name, None)):
            raise BadInput(f"reward_funcs: {path} has no function {name!r}")
        functions.append(getattr(module, name))
    return functions
