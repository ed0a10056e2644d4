r"""Countdown: make a target from a few numbers, each used exactly once, with + - *. Hard to find, easy to check.

    python -m data.countdown --split train --n 2700 --output runs/countdown/train.json
    python -m data.countdown --split test --n 250 --output runs/countdown/test.json

Both write questions in evaluate.py's format, which training reads too. For dev and test there are two more files for
the judge, test_pairs.json and test_points.json: one right and one wrong answer to each question, written by no model.

    Use 9, 3 and 12, each exactly once, with + - * to make 45.
    12+9=21, 21-3=18, wanted:45: no. 12*3=36, 36+9=45, wanted:45: yes. \boxed{(12*3)+9}

Splits: a hash of a question's numbers, in any order, puts it into train, dev or test, so no two splits share a set of
numbers. Within a split, no combination of numbers and target comes twice.

The reward needs no gold answer: the column `solution` states the task, and the boxed expression is read by a small
grammar, never run as code.

    >>> countdown_reward(None, [r"\boxed{(12*3)+9}", r"\boxed{45}"], ["45 from 9, 3, 12"] * 2)
    [1.0, 0.0]
"""

import hashlib
import json
import operator
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.cli import Parser, refuse
from data.rows import BadInput
from verify import extract_boxed, last_text, log_unscorable

Split = Literal["train", "dev", "test"]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
QUESTIONS = (
    "Use {numbers}, each exactly once, with + - * to make {target}.",
    "Which expression of {numbers} with + - * equals {target}? Each number is used exactly once.",
    "Make {target} with + - * from {numbers}. Use each number exactly once.",
)


# ---------------------------------------------------------------------------------------------------------------------
# The checker

MAX_CHARS = 200
_SPELLINGS = {"\\times": "*", "\\cdot": "*", "×": "*", "·": "*", "⋅": "*", "−": "-", "\\left": "", "\\right": ""}
_SPELLING = re.compile("|".join(map(re.escape, _SPELLINGS)))
_TOKEN = re.compile(r"[0-9]+|\S")
_TASK = re.compile(r"\s*(-?[0-9]{1,9})\s+from\s+([0-9]{1,9}(?:\s*,\s*[0-9]{1,9}){1,15})\s*")
_PRECEDENCE = {"(": 0, ")": 1, "+": 1, "-": 1, "*": 2}

Terms = tuple[tuple[str, tuple[str, ...]], ...]  # of a sum: a sign and the factors of a product each


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its value, its numbers in order, and its terms, by which two expressions are compared."""

    value: int
    numbers: tuple[int, ...]
    terms: Terms

    @property
    def key(self) -> str:
        """The expression without spaces, needless parentheses and the order of terms and factors."""
        return "".join(sorted(sign + "*".join(factors) for sign, factors in self.terms))


def parse(text: str) -> Expression | None:
    r"""Numbers with + - * and parentheses, at most MAX_CHARS long; `\times`, `\cdot` and the like are read as well.

    None for anything else, a sign before a number included. Operands and operators are on two stacks: no recursion.
    """
    if len(text) > MAX_CHARS:
        return None
    operands: list[Expression] = []
    operators: list[str] = []
    wants_operand = True
    for token in _TOKEN.findall(_SPELLING.sub(lambda match: _SPELLINGS[match[0]], text)):
        is_number = token.isascii() and token.isdigit()
        if wants_operand != (is_number or token == "(") or not (is_number or token in _PRECEDENCE):
            return None
        if is_number:
            number = int(token)
            operands.append(Expression(number, (number,), (("+", (str(number),)),)))
            wants_operand = False
        elif token == "(":
            operators.append(token)
        else:
            while operators and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                _apply(operators.pop(), operands)
            if token != ")":
                operators.append(token)
                wants_operand = True
            elif operators:
                operators.pop()  # its opening one
            else:
                return None
    if wants_operand or "(" in operators:
        return None
    while operators:
        _apply(operators.pop(), operands)
    return operands[0]


def _apply(symbol: str, operands: list[Expression]) -> None:
    b, a = operands.pop(), operands.pop()
    if symbol == "*":
        terms: Terms = (("+", tuple(sorted((*_factors(a), *_factors(b))))),)
    else:
        flipped = {"+": "-", "-": "+"}
        terms = (*a.terms, *((flipped[sign] if symbol == "-" else sign, factors) for sign, factors in b.terms))
    operands.append(Expression(OPERATORS[symbol](a.value, b.value), (*a.numbers, *b.numbers), terms))


def _factors(expression: Expression) -> tuple[str, ...]:
    if len(expression.terms) == 1:  # no sign is read, so that it is positive
        return expression.terms[0][1]
    return (f"({expression.key})",)


def read_task(solution: Any) -> tuple[tuple[int, ...], int] | None:
    """(numbers, target) of a `Question.solution`, or None."""
    match = _TASK.fullmatch(solution) if isinstance(solution, str) else None
    return (tuple(map(int, match[2].split(","))), int(match[1])) if match else None


def solves(answer: str | None, solution: Any) -> bool | None:
    """Whether the expression `answer` uses each number exactly once and equals the target; None if there is no task."""
    if (task := read_task(solution)) is None:
        return None
    numbers, target = task
    expression = parse(answer) if answer is not None else None
    return expression is not None and expression.value == target and sorted(expression.numbers) == sorted(numbers)


def countdown_reward(prompts, completions, solution, **columns) -> list[float | None]:
    """1.0 where the boxed expression solves the task in `solution`, else 0.0; None where that states no task."""
    rewards: list[float | None] = []
    for row, (completion, task) in enumerate(zip(completions, solution, strict=True)):
        solved = solves(extract_boxed(last_text(completion)), task)
        if solved is None:
            log_unscorable(row, task, "expected a solution like '45 from 9, 3, 12'")
        rewards.append(None if solved is None else float(solved))
    return rewards


def same(pairs: Sequence[tuple[str | None, str | None]]) -> list[bool | None]:
    """Which pairs are one answer: the same expression but for spaces, needless parentheses and the order of terms and
    factors. Not by value, or a vote among answers would verify them. None where there is no answer."""

    def key(answer: str) -> str:
        expression = parse(answer)
        return answer.strip() if expression is None else expression.key

    return [None if a is None or b is None else key(a) == key(b) for a, b in pairs]


countdown_reward.equal = same


# ---------------------------------------------------------------------------------------------------------------------
# Questions

DRAWS = 200  # random tries before something counts as impossible


@dataclass(frozen=True)
class Way:
    """One way to combine numbers: its steps (a, operator, b, result), its expression and its value."""

    steps: tuple[tuple[int, str, int, int], ...]
    expression: str
    value: int

    @property
    def work(self) -> str:
        return ", ".join(f"{a}{symbol}{b}={result}" for a, symbol, b, result in self.steps)


@dataclass(frozen=True)
class Question:
    """A question in words, and a way to solve it."""

    numbers: tuple[int, ...]
    text: str
    way: Way

    @property
    def target(self) -> int:
        return self.way.value

    @property
    def solution(self) -> str:
        """What the checker needs to know."""
        return f"{self.target} from {', '.join(map(str, self.numbers))}"


@dataclass(frozen=True)
class Game:
    """Bounds of questions: how many numbers, from 1 to `largest`; the result of each step is from 1 to `most`."""

    counts: tuple[int, ...] = (3,)
    largest: int = 12
    most: int = 99


def split_of(numbers: Sequence[int]) -> Split:
    """The split that a set of numbers belongs to, whatever their order: a fifth to test, a tenth to dev."""
    digest = hashlib.blake2b(" ".join(map(str, sorted(numbers))).encode(), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64
    return "test" if point < 0.2 else "dev" if point < 0.3 else "train"


def random_way(numbers: Sequence[int], most: int, rng: random.Random) -> Way | None:
    """A random way to combine `numbers` with results from 1 to `most`; None if DRAWS tries find none."""
    for _ in range(DRAWS):
        pool = [(n, str(n)) for n in numbers]
        steps = []
        while len(pool) > 1:
            drawn = [pool.pop(rng.randrange(len(pool))) for _ in range(2)]
            (a, left), (b, right) = sorted(drawn, key=lambda item: -item[0])  # the larger one first
            symbol = rng.choice("+-*")
            result = OPERATORS[symbol](a, b)
            if not 1 <= result <= most:
                break
            steps.append((a, symbol, b, result))
            pool.append((result, f"({left}{symbol}{right})"))
        else:
            return Way(tuple(steps), pool[0][1][1:-1], pool[0][0])
    return None


def misses(question: Question, n: int, most: int, rng: random.Random) -> list[Way]:
    """Up to `n` different random ways to combine the question's numbers that miss its target."""
    ways: dict[str, Way] = {}
    for _ in range(DRAWS):
        if len(ways) == n:
            break
        way = random_way(question.numbers, most, rng)
        if way is not None and way.value != question.target:
            ways.setdefault(way.expression, way)
    return list(ways.values())


def draw_question(split: Split, game: Game, rng: random.Random) -> Question:
    """A random question of the split that can be solved and missed. Raises BadInput where DRAWS tries find none."""
    for _ in range(DRAWS):
        numbers = tuple(rng.randint(1, game.largest) for _ in range(rng.choice(game.counts)))
        if split_of(numbers) != split or (way := random_way(numbers, game.most, rng)) is None:
            continue
        *head, last = numbers
        listed = f"{', '.join(map(str, head))} and {last}"
        text = rng.choice(QUESTIONS).format(numbers=listed, target=way.value)
        question = Question(numbers, text, way)
        if misses(question, 1, game.most, rng):
            return question
    raise BadInput(f"expected questions to exist, found none in {DRAWS} tries with {game}")


def draw_questions(split: Split, n: int, game: Game, rng: random.Random) -> list[Question]:
    """`n` questions that differ in their numbers or in their target. Raises BadInput if there are not so many."""
    questions: dict[tuple, Question] = {}
    repeated = 0  # in a row
    while len(questions) < n:
        question = draw_question(split, game, rng)
        key = (*sorted(question.numbers), question.target)
        repeated = repeated + 1 if key in questions else 0
        if repeated > 10 * DRAWS:
            raise BadInput(f"--n: expected at most about {len(questions)} for the split {split}, got {n}")
        questions.setdefault(key, question)
    return list(questions.values())


# ---------------------------------------------------------------------------------------------------------------------
# Answers as the small model writes them

MAX_TRIES = 3
SLIP = 0.5  # share of wrong answers that write the target as the result of their last step


def attempt(question: Question, right: bool, rng: random.Random, most: int, slip: float = SLIP) -> tuple[str, Way]:
    """(an answer with its search, the way that it boxes): up to MAX_TRIES tries, the last one said to be the target.

    A wrong answer says so too, and a share `slip` of them also writes the target as its last result, so that a judge
    has to compute.
    """
    *tries, last = misses(question, rng.randint(1, MAX_TRIES), most, rng)
    if right:
        last = question.way
    work = last.work
    if not right and rng.random() < slip:
        work = f"{work.rpartition('=')[0]}={question.target}"
    tried = [checked(way.work, question.target, False) for way in tries] + [checked(work, question.target, True)]
    return f"{' '.join(tried)} \\boxed{{{last.expression}}}", last


def checked(work: str, target: int, hit: bool) -> str:
    """A try compared with the target: "3+4=7, 7*2=14, wanted:14: yes."."""
    return f"{work}, wanted:{target}: {'yes' if hit else 'no'}."


def held_out(split: Split, n: int, seed: int = 1, game: Game | None = None) -> dict[str, list[dict[str, Any]]]:
    """`n` questions, each with a right and a wrong answer that no model wrote, as rows for evaluate.py: `answers`,
    `pairs` and `points`. For half of the questions the answers come with their search."""
    game = game or Game()
    rng = random.Random(f"countdown/held-out/{split}/{seed}")
    answers, pairs, points = [], [], []
    for question in draw_questions(split, n, game, rng):
        attempts = [attempt(question, right, rng, game.most) for right in (True, False)]
        with_search = rng.random() < 0.5
        right, wrong = (text if with_search else way.expression for text, way in attempts)
        row = {"dataset": f"countdown-{len(question.numbers)}", "problem": question.text, "image_path": None}
        answers.append({**row, "answer": question.solution})
        pairs.append({**row, "chosen": right, "rejected": wrong})
        points += [{**row, "response": right, "label": "Yes"}, {**row, "response": wrong, "label": "No"}]
    return {"answers": answers, "pairs": pairs, "points": points}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__, prog="data.countdown")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="test")
    parser.add_argument("--n", type=int, default=250)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--numbers", type=int, nargs="+", default=[3], help="how many, drawn from these for each row")
    parser.add_argument("--largest", type=int, default=Game.largest, help="numbers are from 1 to this")
    parser.add_argument("--most", type=int, default=Game.most, help="the largest target and result of a step")
    args = parser.parse_args(arguments)
    try:
        for name in ("n", "largest", "most"):
            if getattr(args, name) < 1:
                raise BadInput(f"--{name}: expected 1 or more, got {getattr(args, name)}")
        if not all(2 <= count <= 6 for count in args.numbers):
            raise BadInput(f"--numbers: expected 2 to 6, got {' '.join(map(str, args.numbers))}")
        files = held_out(args.split, args.n, args.seed, Game(tuple(args.numbers), args.largest, args.most))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for kind, rows in files.items():
            if kind == "answers" or args.split != "train":
                name = args.output.stem + ("" if kind == "answers" else f"_{kind}")
                path = args.output.with_stem(name)
                path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
                print(f"{path}: {len(rows):,} rows")
    except (BadInput, OSError) as error:
        return refuse("data.countdown", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
