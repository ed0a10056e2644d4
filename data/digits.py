"""The embedded task: questions about real handwritten digits, and some arithmetic without an image.

Images are two or three digits side by side, from scikit-learn's copy of the UCI optical digits (1,797 real images of
8 x 8, CC BY 4.0). The images of the train and test splits come from disjoint digits. Several kinds of question go with
the same kind of image, so the question must be read; every gold is exact.

    kind        image   question                                     why it is here
    sum         2       What is the sum of these digits?             reading and arithmetic
    difference  2       How far apart are these digits?              order must not matter
    largest     2 or 3  Which of these digits is the largest?        no arithmetic
    smallest    2 or 3  Which of these digits is the smallest?       one word apart from the last
    plus        none    What is 7+5?                                 no image
    factor      none    Which number times 7 gives 35?               checking (7*5) is easier than solving (35/7)

    >>> rows = digit_rows("train", 4, seed=0)
    >>> rows[0]["prompt"], rows[0]["images"], rows[0]["solution"], rows[0]["dataset"]
"""

import math
import random
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from prompts import PROMPT_SUFFIX

Split = Literal["train", "test"]

TILE = 28  # pixels per digit: one merged visual token of Qwen2.5-VL (patch 14, merged 2 x 2)
IMAGE_KINDS = ("sum", "difference", "largest", "smallest")
TEXT_KINDS = ("plus", "factor")
TEXT_SHARE = 0.25
_TEST_SHARE = 0.3

QUESTIONS = {
    "sum": ("What is the sum of these digits?", "Add up these digits. What is the total?"),
    "difference": ("What is the difference of these digits?", "How far apart are these digits?"),
    "largest": ("Which of these digits is the largest?", "What is the greatest of these digits?"),
    "smallest": ("Which of these digits is the smallest?", "What is the least of these digits?"),
    "plus": ("What is {a}+{b}?", "Add {a} and {b}. What is the total?"),
    "factor": ("Which number times {a} is {b}?", "What must {a} be multiplied by to get {b}?"),
}
SOLUTIONS = {
    "sum": sum,
    "difference": lambda values: abs(values[0] - values[1]),
    "largest": max,
    "smallest": min,
    "plus": sum,
    "factor": lambda values: values[1] // values[0],
}


@cache
def _digits(split: Split) -> dict[int, np.ndarray]:
    """value -> images (N, 8, 8) of that value, grey from 0 to 255. The two splits share no image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    n_test = int(len(order) * _TEST_SHARE)
    chosen = order[:n_test] if split == "test" else order[n_test:]
    images = (bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return {value: images[bunch.target[chosen] == value] for value in range(10)}


def draw(values: tuple[int, ...], split: Split, rng: random.Random) -> Image.Image:
    """The digits side by side, each a random real one of its value, as an RGB image of 28 x 28 a digit.

    Training digits are written a little askew each time: there are only 1,258, and they are to be read, not known.
    """
    pool = _digits(split)
    tiles = [Image.fromarray(rng.choice(pool[v])).resize((TILE, TILE), Image.Resampling.BICUBIC) for v in values]
    if split == "train":
        tiles = [_askew(tile, rng) for tile in tiles]
    return Image.fromarray(np.concatenate([np.asarray(tile) for tile in tiles], axis=1)).convert("RGB")


def _askew(tile: Image.Image, rng: random.Random) -> Image.Image:
    """Turned by up to 10 degrees, moved by up to 2 pixels, up to a tenth larger or smaller, in either direction."""
    angle, centre = math.radians(rng.uniform(-10, 10)), (TILE - 1) / 2
    wide, high = rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1)
    a, b = math.cos(angle) / wide, math.sin(angle) / wide
    d, e = -math.sin(angle) / high, math.cos(angle) / high
    x = centre - (a + b) * centre + rng.uniform(-2, 2)
    y = centre - (d + e) * centre + rng.uniform(-2, 2)
    return tile.transform(tile.size, Image.Transform.AFFINE, (a, b, x, d, e, y), Image.Resampling.BICUBIC)


def solve(kind: str, values: tuple[int, ...]) -> int:
    """The exact answer. For the text kinds `values` are the two numbers of the question."""
    return SOLUTIONS[kind](values)


def question(rng: random.Random) -> tuple[str, tuple[int, ...], str]:
    """A random (kind, values, text)."""
    if rng.random() < TEXT_SHARE:
        kind = rng.choice(TEXT_KINDS)
        values = (rng.randrange(1, 10), rng.randrange(1, 10))
        if kind == "factor":
            values = (values[0], values[0] * values[1])
    else:
        kind = rng.choice(IMAGE_KINDS)
        length = rng.choice((2, 3)) if kind in ("largest", "smallest") else 2
        values = tuple(rng.randrange(10) for _ in range(length))
    text = rng.choice(QUESTIONS[kind])
    if kind in TEXT_KINDS:
        text = text.format(a=values[0], b=values[1])
    return kind, values, text


def digit_rows(split: Split, n: int, seed: int = 0, suffix: str = PROMPT_SUFFIX) -> list[dict[str, Any]]:
    """`n` questions, the same for the same seed: prompt (messages), images (PIL, maybe none), solution, dataset."""
    rng = random.Random(f"digits/{split}/{seed}")
    rows = []
    for _ in range(n):
        kind, values, text = question(rng)
        images = [] if kind in TEXT_KINDS else [draw(values, split, rng)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": text + suffix}],  # images go before it
                "images": images,
                "solution": str(solve(kind, values)),
                "dataset": f"digits-{kind}",
            }
        )
    return rows
