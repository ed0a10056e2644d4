"""GPQA as published: the right answer and three wrong ones, each in a column. The order of the options is drawn from
the question, so that it is always the same for a row.

Question    Correct Answer  Incorrect Answer 1  Incorrect Answer 2  Incorrect Answer 3
What is it? 10^-4 eV        10^-9 eV            10^-11 eV           10^-8 eV
"""

import random
from typing import Any

from data.rows import Options, Record, RowError

NAME = "gpqa"
COLUMNS = ("Question", "Correct Answer")
WRONG = tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))


def matches(columns: set[str], head: list[dict]) -> bool:
    return {*COLUMNS, *WRONG} <= columns


def record(raw: dict) -> Record:
    """Raises RowError."""
    texts = {name: _text(name, raw.get(name)) for name in (COLUMNS[1], *WRONG)}
    order = random.Random(str(raw.get("Question"))).sample(list(texts), len(texts))
    options = {letter: texts[name] for letter, name in zip("ABCD", order, strict=True)}
    return Record(raw.get("Question"), "ABCD"[order.index(COLUMNS[1])], options=Options(options, True))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise RowError(name, f"expected an option, got {value!r:.60}")
    return str(value).strip()
