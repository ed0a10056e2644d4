"""Verifiers that err: of so many percent of the answers they say the opposite, always the same of the same answer.

    python train_spark.py ... --reward_funcs benchmarks/noisy.py:countdown_10
    python train_spark.py ... --reward_funcs benchmarks/noisy.py:countdown_20 benchmarks/noisy.py:countdown_20_undone

With the second one only the labels err, which are the first function's: the two rewards come to the true one.
"""

import functools
import hashlib
from collections.abc import Callable

import verify
from data.countdown import countdown_reward
from data.rows import question_key


def erring(reward: Callable, share: float) -> Callable:
    """`reward`, of 0 or 1, turned over for this share of all answers, drawn by question and answer."""

    @functools.wraps(reward)  # with what it calls the same answer (`equal`)
    def noisy(prompts, completions, **columns):
        rewards = reward(prompts=prompts, completions=completions, **columns)
        images = columns.get("images") or [None] * len(prompts)
        return [
            1 - right if right is not None and draw(prompt, completion, shown) < share else right
            for prompt, completion, shown, right in zip(prompts, completions, images, rewards, strict=True)
        ]

    return noisy


def undone(reward: Callable, noisy: Callable) -> Callable:
    """What `noisy` lacks of `reward`."""

    def missing(**rows):
        pairs = zip(reward(**rows), noisy(**rows), strict=True)
        return [None if right is None else right - said for right, said in pairs]

    return missing


def draw(prompt, completion, images=None) -> float:
    """A number in [0, 1) for this answer to this question about these images."""
    text = verify.last_text(completion)
    question = verify.last_text(prompt) if isinstance(prompt, list) else prompt
    seen = question_key({"prompt": question, "images": images or []})
    key = f"{seen}\0{verify.extract_boxed(text) or text}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


digits_5, digits_10, digits_20 = (erring(verify.answer_reward, share) for share in (0.05, 0.1, 0.2))
countdown_5, countdown_10, countdown_20 = (erring(countdown_reward, share) for share in (0.05, 0.1, 0.2))
digits_20_undone, countdown_20_undone = undone(verify.answer_reward, digits_20), undone(countdown_reward, countdown_20)
