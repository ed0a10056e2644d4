"""The rows of a results file, checked: what calculate_acc.py can count."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from data.rows import BadInput, BadRow
from data.table import records

Row = dict[str, Any]
KINDS = ("answer", "tts", "pointwise", "pairwise", "best_of_n")
AMOUNTS = ("prompt_tokens", "completion_tokens", "first_completion_tokens", "round_num")
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
        if (wrong := fault(row, kind_of(row))) is not None:
            name, expected = wrong
            got = repr(row[name])[:60] if name in row else "nothing"
            raise BadInput(f"{path}: row {index}: field {name}: expected {expected}, got {got}")
        yield row


def fault(row: Row, kind: str) -> tuple[str, str] | None:
    """The first field that can't be counted, and what is expected there."""
    if not isinstance(row.get("dataset"), str):
        return "dataset", "the benchmark's name"
    gold, plain = row.get("ground_truth", ...), (str, int, float, type(None))
    if not isinstance(gold, plain) and not (isinstance(gold, list) and all(isinstance(g, plain) for g in gold)):
        return "ground_truth", "the gold answer"
    for name in AMOUNTS:
        amount = row.get(name)
        if amount is not None and not (isinstance(amount, (int, float)) and 0 <= amount < math.inf):
            return name, "a number, or null"
    for name in ("is_correct", "first_is_correct") if row.get("verifier") else ():
        if not isinstance(row.get(name), (bool, type(None))):
            return name, "true, false or null"
    for variant in row.get("variants") or () if kind == "tts" else ():
        amounts = (variant.get("n"), variant.get("completion_tokens")) if isinstance(variant, dict) else (None,)
        known = set(WAYS) >= {variant.get("variant")} if isinstance(variant, dict) else False
        if not known or not all(isinstance(a, int) and a >= 0 for a in amounts):
            return "variants", f"objects with variant ({', '.join(WAYS)}), n, answer, completion_tokens"
        if not isinstance(variant.get("answer", ...), (str, int, float, type(None))):
            return "variants", "answers as text, or null"
    if not _are_categories(row.get("categories") or {}):
        return "categories", "an object of texts or lists of them"
    group = row.get("group") or ["", ""]
    if not isinstance(group, list) or len(group) != 2 or not all(isinstance(text, str) for text in group):
        return "group", "a question and which part of it this is, as text"
    for name in ("extracted_answer", "first_answer") if kind == "tts" else ("extracted_answer",):
        if not isinstance(row.get(name, ...), (str, int, float, type(None))):
            return name, "the final answer as text, or null"
    for name in PROBABILITIES.values():
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        if not all(p is None or (isinstance(p, (int, float)) and 0 <= p <= 1) for p in values):
            return name, "a probability, or null"
    for name in ("verdict", "verdict_swapped") if kind in ("pointwise", "pairwise", "best_of_n") else ():
        if kind != "best_of_n" and not isinstance(row.get(name, ...), (str, type(None))):
            return name, "a verdict, or null"
        if kind == "best_of_n" and not (isinstance(row.get(name), list) and row[name]):
            return name, "a list of verdicts"
    if kind == "best_of_n" and len(row["verdict_swapped"]) != len(row["verdict"]):
        return "verdict_swapped", "as many verdicts as in verdict"
    for verdict, name in PROBABILITIES.items() if kind == "best_of_n" else ():
        if row.get(name) is not None and (not isinstance(row[name], list) or len(row[name]) != len(row[verdict])):
            return name, "as many probabilities as verdicts"
    return None


def _are_categories(value: Any) -> bool:
    def is_texts(texts) -> bool:
        return isinstance(texts, str) or (isinstance(texts, list) and all(isinstance(text, str) for text in texts))

    return isinstance(value, dict) and all(map(is_texts, value.values()))


def kind_of(row: Row) -> str:
    """The kind of a row; a failed one holds too little to tell, and is "answer" at first."""
    if row.get("error") is not None:
        return "answer"
    task = row.get("task")
    return task if task in KINDS[2:] else "tts" if "first_answer" in row else "answer"
