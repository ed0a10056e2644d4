"""The rows of a results file, checked: what calculate_acc.py can count."""

import math
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

from data.rows import BadInput, BadRow
from data.table import records

Row = dict[str, Any]
KINDS = ("answer", "tts", "pointwise", "pairwise", "best_of_n")
AMOUNTS = ("prompt_tokens", "completion_tokens", "first_completion_tokens", "round_num", "cut_off")
PROBABILITIES = {"verdict": "verdict_probability", "verdict_swapped": "verdict_swapped_probability"}
WAYS = {"vote": "majority", "weighted_vote": "weighted", "best_of_n": "best of n", "reflect": "reflect"}


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a JSON list or of JSON lines, one after the other. Raises BadInput."""
    for _, _, row in records(path):
        if isinstance(row, BadRow):
            raise BadInput(f"{path}: {row}")
        yield row


def checked(rows: Iterable[Row], path: str) -> Iterator[Row]:
    """The rows, if they hold what can be counted. Raises BadInput."""
    for index, row in enumerate(rows):
        for name, is_right, expected in checks(row, kind_of(row)):
            if not is_right:
                got = repr(row[name])[:60] if name in row else "nothing"
                raise BadInput(f"{path}: row {index}: field {name}: expected {expected}, got {got}")
        yield row


def checks(row: Row, kind: str) -> Iterator[tuple[str, bool, str]]:
    """(a field, whether it can be counted, what is expected there); a check relies on those before it."""
    yield "dataset", isinstance(row.get("dataset"), str), "the benchmark's name"
    gold = row.get("ground_truth", ...)
    yield "ground_truth", all(map(_is_plain, gold if isinstance(gold, list) else [gold])), "the gold answer"
    for name in AMOUNTS:
        yield name, row.get(name) is None or _is_amount(row[name]), "a number, or null"
    for name in ("is_correct", "first_is_correct") if row.get("verifier") else ():
        yield name, isinstance(row.get(name), (bool, NoneType)), "true, false or null"
    for variant in row.get("variants") or () if kind == "tts" else ():
        fields = variant if isinstance(variant, dict) else {}
        amounts = (fields.get("n"), fields.get("completion_tokens"))
        known = fields.get("variant") in tuple(WAYS) and all(isinstance(a, int) and a >= 0 for a in amounts)
        yield "variants", known, f"objects with variant ({', '.join(WAYS)}), n, answer, completion_tokens"
        yield "variants", _is_plain(fields.get("answer", ...)), "answers as text, or null"
    if kind == "tts" and row.get("variants"):
        has_majority = any(variant["variant"] == "vote" for variant in row["variants"])
        yield "variants", has_majority, "a vote among them"
    categories = row.get("categories") or {}
    are_texts = isinstance(categories, dict) and all(isinstance(v, str) or _are_texts(v) for v in categories.values())
    yield "categories", are_texts, "an object of texts or lists of them"
    group = row.get("group") or ["", ""]
    counted = _are_texts(group) and (len(group) == 2 or (len(group) == 3 and group[2].isdigit()))
    yield "group", counted, "a question, which part of it this is, and how many there are, as text"
    for name in ("extracted_answer", "first_answer") if kind == "tts" else ("extracted_answer",):
        yield name, _is_plain(row.get(name, ...)), "the final answer as text, or null"
    for name in PROBABILITIES.values():
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        yield name, all(p is None or (_is_amount(p) and p <= 1) for p in values), "a probability, or null"
    for name in PROBABILITIES if kind in ("pointwise", "pairwise") else ():
        yield name, isinstance(row.get(name, ...), (str, NoneType)), "a verdict, or null"
    if kind == "best_of_n":
        for name in PROBABILITIES:
            yield name, isinstance(row.get(name), list) and row[name] != [], "a list of verdicts"
        n = len(row["verdict"])
        yield "verdict_swapped", len(row["verdict_swapped"]) == n, "as many verdicts as in verdict"
        for name in PROBABILITIES.values():
            as_many = row.get(name) is None or (isinstance(row[name], list) and len(row[name]) == n)
            yield name, as_many, "as many probabilities as verdicts"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, NoneType))


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def kind_of(row: Row) -> str:
    """The kind of a row; a failed one holds too little to tell, and is "answer" at first."""
    if row.get("error") is not None:
        return "answer"
    task = row.get("task")
    return task if task in KINDS[2:] else "tts" if "first_answer" in row else "answer"
