r"""Arithmetic without images, for a small language model: sums, differences and products.

    python train_spark.py --config recipes/smollm2_135m.yaml                  # the embedded dataset `arithmetic`
    python -m data.arithmetic --output runs/arithmetic/train.json             # the questions alone

Each prompt of the embedded dataset begins with two worked examples as earlier turns: a model of 135 M parameters never
boxes an answer when only told to, and nearly always does when shown how. Recycled prompts keep these turns.

    >>> row = arithmetic_rows()[0]
    >>> row["prompt"][1]["content"], row["prompt"][-1]["content"], row["solution"]
    ('2 plus 3 equals 5. The answer is \\boxed{5}.', 'What is 4+5?', '9')

Half of the questions are about one-digit numbers, half have one of two digits. A fifth of the pairs of numbers is held
out (`--split test`).
"""

import hashlib
import itertools
import json
import operator
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.cli import Parser, refuse
from data.rows import BadInput

Split = Literal["train", "test"]

OPERATIONS = {
    "+": (operator.add, "plus", "What is {a}+{b}?", "Add {a} and {b}. What is the total?"),
    "-": (operator.sub, "minus", "What is {a}-{b}?", "Take {b} from {a}. What is left?"),
    "*": (operator.mul, "times", "What is {a}*{b}?", "Multiply {a} by {b}. What is the product?"),
}
EXAMPLES = (
    ("What is 2+3?", r"2 plus 3 equals 5. The answer is \boxed{5}."),
    ("Multiply 4 by 2. What is the product?", r"4 times 2 equals 8. The answer is \boxed{8}."),
)


@dataclass(frozen=True)
class Question:
    """A question about two numbers, in one of its wordings."""

    a: int
    sign: str
    b: int
    wording: str

    @property
    def value(self) -> int:
        return OPERATIONS[self.sign][0](self.a, self.b)

    @property
    def text(self) -> str:
        return self.wording.format(a=self.a, b=self.b)

    def answer(self, value: int) -> str:
        """As the worked examples are written, right or wrong."""
        return f"{self.a} {OPERATIONS[self.sign][1]} {self.b} equals {value}. The answer is \\boxed{{{value}}}."

    def check(self, value: int) -> str:
        """By working it out again."""
        same = "the same" if value == self.value else "different"
        return f"{self.a} {OPERATIONS[self.sign][1]} {self.b} equals {self.value}. {self.value} and {value}: {same}."

    def slip(self, rng: random.Random) -> int:
        """A wrong value: one, two or ten off, not negative."""
        return rng.choice([n for n in (self.value + by for by in (-10, -2, -1, 1, 2, 10)) if n >= 0])


def examples() -> list[dict[str, str]]:
    """The worked examples as chat turns."""
    return [
        {"role": role, "content": text}
        for question, answer in EXAMPLES
        for role, text in (("user", question), ("assistant", answer))
    ]


def in_test(a: int, b: int) -> bool:
    """A fifth of all pairs, whatever their order."""
    return hashlib.blake2b(f"{min(a, b)} {max(a, b)}".encode()).digest()[0] < 51


def questions(split: Split = "train", digits: int = 1) -> list[Question]:
    """Every question there is with numbers of at most so many digits: 3 operations x 2 wordings a pair of numbers.

    Differences are not negative, and products of two-digit numbers have one digit on one side.
    """
    return [
        Question(a, sign, b, wording)
        for a, b in itertools.product(range(10**digits), repeat=2)
        if in_test(a, b) == (split == "test")
        for sign, (_, _, *wordings) in OPERATIONS.items()
        if not (sign == "-" and b > a) and not (sign == "*" and min(a, b) > 9)
        for wording in wordings
    ]


def mixed_questions(split: Split = "train", n: int = 800, seed: int = 0) -> list[Question]:
    """`n` of them, half (or all there are) with numbers below 10, the others with a larger one.

    Raises BadInput if there are not so many.
    """
    rng = random.Random(f"arithmetic/{split}/{seed}")
    easy = questions(split)
    hard = [question for question in questions(split, 2) if max(question.a, question.b) > 9]
    drawn = rng.sample(easy, max(0, min(n // 2, len(easy))))
    if not 1 <= n <= len(drawn) + len(hard):
        raise BadInput(f"--n: expected 1 to {len(drawn) + len(hard)}, got {n}")
    drawn += rng.sample(hard, n - len(drawn))
    rng.shuffle(drawn)
    return drawn


def arithmetic_rows(split: Split = "train") -> list[dict[str, Any]]:
    """The embedded dataset `arithmetic`: 800 rows to train on, 200 held-out ones."""
    drawn = mixed_questions(split, 800 if split == "train" else 200)
    return [{"prompt": [*examples(), {"role": "user", "content": q.text}], "solution": str(q.value)} for q in drawn]


def held_out(split: Split, n: int, seed: int = 1) -> dict[str, list[dict[str, Any]]]:
    """`n` questions, each with a right and a wrong answer that no model wrote, as rows for evaluate.py: `answers`,
    `pairs` and `points`."""
    return with_answers("arithmetic", mixed_questions(split, n, seed), split)


def with_answers(dataset: str, drawn: list, split: Split) -> dict[str, list[dict[str, Any]]]:
    """What held_out returns, of questions that are drawn already (data/equations.py has others)."""
    rng = random.Random(f"{dataset}/{split}")
    answers, pairs, points = [], [], []
    for question in drawn:
        right, wrong = question.answer(question.value), question.answer(question.slip(rng))
        row = {"dataset": dataset, "problem": question.text}
        answers.append({**row, "answer": str(question.value)})
        pairs.append({**row, "chosen": right, "rejected": wrong})
        points += [{**row, "response": right, "label": "Yes"}, {**row, "response": wrong, "label": "No"}]
    return {"answers": answers, "pairs": pairs, "points": points}


def main() -> int:
    parser = Parser(__doc__, prog="data.arithmetic")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--n", type=int, default=800)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        rows = held_out(args.split, args.n, seed=0 if args.split == "train" else 1)["answers"]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    except (BadInput, OSError) as error:
        return refuse("data.arithmetic", error)
    print(f"{args.output}: {len(rows):,} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
