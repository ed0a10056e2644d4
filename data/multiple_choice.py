"""Multiple choice: a question, its options, and which one is right. Options become lettered lines under the question.

    {"question": "Which is prime?", "options": ["4", "7", "9"], "answer": "B"}

`options` (or `choices`) is a list, a JSON list, a dict of letters, or ARC's {"text": [...], "label": [...]}. The answer
is a letter, an option's text, or (a number that is neither) an index from 0, as MMLU has it. The gold is the letter.
"""

import json
from typing import Any

from data.rows import Record, RowError

NAME = "multiple_choice"
OPTIONS = ("options", "choices")
QUESTIONS = ("question", "problem", "prompt", "query")
ANSWERS = ("answer", "answerKey", "solution", "label")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _named(names: tuple[str, ...], columns) -> str | None:
    return next((name for name in names if name in columns), None)


def matches(columns: set[str], head: list[dict]) -> bool:
    return None not in (_named(OPTIONS, columns), _named(QUESTIONS, columns), _named(ANSWERS, columns))


def record(raw: dict, question: str | None = None, answer: str | None = None) -> Record:
    """Raises RowError for options that are none, or an answer that is none of them.

    Args:
        question, answer: names of the columns; by default the first of the usual ones.
    """
    question, answer = question or _named(QUESTIONS, raw), answer or _named(ANSWERS, raw)
    column = _named(OPTIONS, raw)
    if question is None or answer is None or column is None:
        raise RowError("options", "expected a question, options and an answer")
    options = _options(raw[column])
    letter = _letter(raw.get(answer), options)
    text = raw.get(question)
    if not isinstance(text, str) or not text.strip():
        raise RowError(question, "expected a question as text, got nothing")
    lines = [f"{label}. {option}" for label, option in options.items()]
    return Record("\n".join([text.rstrip(), *lines]), letter)


def _options(value: Any) -> dict[str, Any]:
    """label -> option."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("options", f"expected a JSON list of options, got {value:.60}") from None
    labels = None
    if isinstance(value, dict):
        arc = {"label", "text"} <= value.keys()
        labels, value = (value["label"], value["text"]) if arc else (list(value), list(value.values()))
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise RowError("options", f"expected 2 to {len(LETTERS)} options, got {value!r:.60}")
    labels = [str(label) for label in labels] if labels is not None else list(LETTERS[: len(value)])
    if len(set(labels)) != len(value) or any(option in (None, "") for option in value):
        raise RowError("options", "expected options with text, each with a label of its own")
    return dict(zip(labels, value, strict=True))


def _letter(answer: Any, options: dict[str, Any]) -> str:
    labels = list(options)
    text = "" if answer is None else str(answer).strip()
    bare = text.strip("().")
    same = [label for label in labels if label.upper() == bare.upper()]
    if isinstance(answer, str) and same:
        return bare if bare in same else same[0]
    same = [label for label, option in options.items() if str(option).strip() == text]
    if len(same) == 1:
        return same[0]
    if text.isdecimal() and len(text) < 3 and int(text) < len(labels):
        return labels[int(text)]
    raise RowError(
        "answer", f"expected {labels[0]} to {labels[-1]}, an index from 0 or an option's text, got {text!r:.60}"
    )
