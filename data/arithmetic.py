r"""Arithmetic without images, for a small language model: sums, differences and products.

    python train_spark.py --config recipes/smollm2_135m.yaml --dataset arithmetic

Each prompt begins with two worked examples as earlier turns: a model of 135 M parameters boxes nothing when it is only
told to, and nearly always when it has been shown how. Recycled prompts keep these turns.

    >>> row = arithmetic_rows()[0]
    >>> row["prompt"][1]["content"], row["prompt"][-1]["content"], row["solution"]
    ('2 plus 3 equals 5. The answer is \\boxed{5}.', 'What is 0+0?', '0')

A fifth of the pairs of numbers is held out: `arithmetic_rows("test")`.
"""

import itertools
import operator
import random
from typing import Any, Literal

OPERATIONS = {
    "+": (operator.add, "What is {a}+{b}?", "Add {a} and {b}. What is the total?"),
    "-": (operator.sub, "What is {a}-{b}?", "Take {b} from {a}. What is left?"),
    "*": (operator.mul, "What is {a}*{b}?", "Multiply {a} by {b}. What is the product?"),
}
EXAMPLES = (
    ("What is 2+3?", r"2 plus 3 equals 5. The answer is \boxed{5}."),
    ("Multiply 4 by 2. What is the product?", r"4 times 2 equals 8. The answer is \boxed{8}."),
)


def examples() -> list[dict[str, str]]:
    """The worked examples as chat turns."""
    return [
        {"role": role, "content": text}
        for question, answer in EXAMPLES
        for role, text in (("user", question), ("assistant", answer))
    ]


def arithmetic_rows(split: Literal["train", "test"] = "train", digits: int = 1) -> list[dict[str, Any]]:
    """Every question there is with numbers of at most so many digits: 3 operations x 2 wordings a pair of numbers.

    Differences are not negative, and products of two-digit numbers have one digit on one side.
    """
    held_out = random.Random("arithmetic")
    rows = []
    for a, b in itertools.product(range(10**digits), repeat=2):
        in_test = held_out.random() < 0.2
        if in_test != (split == "test"):
            continue
        for sign, (function, *wordings) in OPERATIONS.items():
            if (sign == "-" and b > a) or (sign == "*" and min(a, b) > 9):
                continue
            for wording in wordings:
                question = {"role": "user", "content": wording.format(a=a, b=b)}
                rows.append({"prompt": [*examples(), question], "solution": str(function(a, b))})
    return rows
