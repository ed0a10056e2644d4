r"""Equations of reasoning-gym (`simple_equations`), for a small language model: found by undoing, checked by inserting.

    pip install reasoning-gym==0.1.25
    python -m data.equations --output runs/equations/train.json
    python -m data.equations --split test --n 200 --output runs/equations/test.json

Of one unknown, with numbers from 1 to 9. A fifth of the equations is held out (`--split test`), whatever the unknown is
called. reasoning-gym (Apache-2.0) writes the questions; the work and the wrong values are made here:

    >>> equation = Equation.read("Solve for y: 7 - 4*y = -13", "5")
    >>> equation.answer(5)
    '7 - -13 = 20. 20 / 4 = 5. The answer is \\boxed{5}.'
    >>> equation.check(6)
    '4*6 = 24. 7 - 24 = -17. -17 and -13: different.'
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.arithmetic import Split, with_answers
from data.cli import Parser, refuse
from data.rows import BadInput

_SIDES = re.compile(
    r".*: (?:(?P<from>\d+) - )?(?:(?P<factor>\d+)\*)?[a-z](?: (?P<sign>[+-]) (?P<term>\d+))? = (?P<total>-?\d+)"
)
TRIES = 40  # equations drawn for each one that is asked for: the splits and repeated ones take their share


@dataclass(frozen=True)
class Equation:
    """factor*x + term = total, factor*x - term = total (sign "+", "-") or term - factor*x = total (sign "from")."""

    text: str
    factor: int
    sign: str
    term: int
    total: int
    value: int

    @classmethod
    def read(cls, question: str, answer: str) -> "Equation":
        """Of a question as reasoning-gym writes it. Raises BadInput for any other."""
        found = _SIDES.fullmatch(question)
        if not found or (found["from"] is None) == (found["sign"] is None):
            raise BadInput(f"question {question!r}: expected an equation of two terms, one with the unknown")
        factor, total = int(found["factor"] or 1), int(found["total"])
        sign, term = ("from", found["from"]) if found["from"] else (found["sign"], found["term"])
        equation = cls(question, factor, sign, int(term), total, int(answer))
        if equation.left_side(equation.value)[1] != total:
            raise BadInput(f"question {question!r}: {answer} does not solve it")
        return equation

    def left_side(self, value: int) -> tuple[str, int]:
        """(the work of inserting a value, what it comes to)."""
        product = self.factor * value
        comes_to = self.term - product if self.sign == "from" else product + int(f"{self.sign}{self.term}")
        sides = (self.term, "-", product) if self.sign == "from" else (product, self.sign, self.term)
        return f"{self.factor}*{value} = {product}. {' '.join(map(str, sides))} = {comes_to}.", comes_to

    def answer(self, value: int) -> str:
        """Its work and an answer, right or wrong: the terms taken to one side, then divided."""
        product = self.factor * self.value
        sides = {
            "+": f"{self.total} - {self.term}",
            "-": f"{self.total} + {self.term}",
            "from": f"{self.term} - {self.total}",
        }
        return f"{sides[self.sign]} = {product}. {product} / {self.factor} = {value}. The answer is \\boxed{{{value}}}."

    def check(self, value: int) -> str:
        """By inserting a value."""
        work, comes_to = self.left_side(value)
        return f"{work} {comes_to} and {self.total}: {'the same' if comes_to == self.total else 'different'}."

    def slip(self, rng: random.Random) -> int:
        """A wrong value: one to three off, not negative."""
        return rng.choice([n for n in (self.value + by for by in (-3, -2, -1, 1, 2, 3)) if n >= 0])


def split_of(equation: Equation) -> Split:
    """By a hash of all but the unknown's name."""
    text = f"{equation.factor} {equation.sign} {equation.term} {equation.total}"
    return "test" if hashlib.blake2b(text.encode()).digest()[0] < 51 else "train"


def questions(split: Split = "train", n: int = 800, seed: int = 0) -> list[Equation]:
    """`n` equations, none of them twice. Raises BadInput if there are not so many."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise BadInput(f"reasoning-gym: no module {error.name}; pip install reasoning-gym==0.1.25") from error

    drawn = reasoning_gym.create_dataset(
        "simple_equations",
        seed=seed,
        size=TRIES * n,
        min_terms=2,
        max_terms=2,
        max_value=9,
        operators=("+", "-", "*"),
        operators_weights=[0.5, 0.5, 0.0],  # "*" among them gives the unknown a factor
    )
    found: dict[tuple, Equation] = {}
    for row in drawn:
        equation = Equation.read(row["question"], row["answer"])
        if split_of(equation) == split:
            found.setdefault((equation.factor, equation.sign, equation.term, equation.total), equation)
        if len(found) == n:
            return list(found.values())
    raise BadInput(f"--n: expected 1 to {len(found)}, got {n}")


def held_out(split: Split, n: int, seed: int = 1) -> dict[str, list[dict[str, Any]]]:
    """As data.arithmetic's."""
    return with_answers("equations", questions(split, n, seed), split)


def main() -> int:
    parser = Parser(__doc__, prog="data.equations")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--n", type=int, default=800)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        if args.n < 1:
            raise BadInput(f"--n: expected 1 or more, got {args.n}")
        rows = held_out(args.split, args.n, seed=0 if args.split == "train" else 1)["answers"]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    except (BadInput, OSError) as error:
        return refuse("data.equations", error)
    print(f"{args.output}: {len(rows):,} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
