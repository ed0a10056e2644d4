"""The gold of a row: found in what the data hold, and refused where no answer could ever be equal to it."""

import json
import math
import re
import reprlib
from datetime import datetime, time
from typing import Any

from answers.rules import decide
from data.formats.columns import usual
from data.options import letter_of
from data.rows import RowError, literal, unicode_text
from verify import extract_boxed

MAX_WORDS = 30  # of a gold in words; more of them are a text that leads to an answer

# What a spreadsheet writes where a formula failed, in any of its languages, and what other programs write for nothing.
_NOTHING = re.compile(r"#(?:N/A|N/D|NV|[A-ZÀ-Þ/0]{3,}[!?])|Err:\d{3}|n/a|nan|null|<NA>", re.IGNORECASE)

_CURRENCY = r"(?:EUR|CHF|GBP|€|£|kr|zł)"
_COMMA_NUMBER = re.compile(r"[^\d,;()\[\]{}\\]*(\d+(?:\.\d{3})*),(\d+)[^\d,;()\[\]{}\\]*")
_COMMA_SURELY = re.compile(
    rf"(?<![\d.,(\[])[1-9]\d{{0,2}}(?:\.\d{{3}})+,\d+(?![\d.,])|{_CURRENCY}\s*\d+,\d\d?$|"
    rf"^[-+]?\d+,\d\d?\s*{_CURRENCY}"
)

# A last line that says what the answer is, or the whole text where that says it alone.
_ANSWER_LINE = re.compile(
    r"(?:(?:^|\n)[#*\s]*(?:(?:final )?ans(?:wer)?|the answer is)|(?:^|\n)[*\s]*答案)[*\s]*[:：][*\s]*([^\n*]+?)[*\s]*$"
    r"|(?:^|[\n，,。；])\s*故选[:：]?\s*([A-Z])[.。]?$",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<(answer|conclusion)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)

_WORD = re.compile(r"[\u3040-\u9fff]{2}|(?<![\\A-Za-z])[^\W\d_]{2,}")  # no LaTeX command
_SENTENCE = re.compile(r"(?:[^\W\d_]{3}|[\d)\]}$%])[.!?]+\s+(?=[A-Z\d\\$])|[。！？]")
_REASONING = re.compile(r"\b(?:therefore|hence|thus|because)\b|^so\b", re.IGNORECASE)


def gold(value: Any, decimal_comma: bool = False) -> str:
    r"""The answer in a gold: after GSM8K's `####`, in the last `<answer>` or `\boxed{}`, or the gold itself.

    Args:
        decimal_comma: the data may write 3,5 for 3.5, and nothing tells it from a list of two.

    Raises RowError.
    """
    text = extracted(value)
    if not text:
        raise RowError("solution", f"expected a gold answer, got {'nothing' if value is None else reprlib.repr(value)}")
    if _NOTHING.fullmatch(text):
        raise RowError("solution", f"expected a gold answer, got {text!r}, which stands for a missing value")
    if text.startswith("{") and isinstance(found := literal(text), dict) and found:
        raise RowError(
            "solution", f"expected one answer, got an object, {text[:60]!r}; --keep_solution leaves it as it is"
        )
    number = _COMMA_NUMBER.fullmatch(text)
    if _COMMA_SURELY.search(text) or (number and decimal_comma):
        raise RowError("solution", f"expected a number with a decimal point, as 3.5, got {text[:60]!r} with a comma")
    if is_rationale(text):
        raise RowError(
            "solution",
            rf"expected the answer alone, after #### or in \boxed{{}}, got {len(_WORD.findall(text))} words of "
            f"reasoning: {text[:60]!r}",
        )
    return unicode_text(text, "solution")


def kept(value: Any) -> str:
    """A solution as it is, for a verifier of the user's own; a list or an object (test cases) as JSON text. Raises
    RowError for what is neither."""
    if isinstance(value, (list, dict)) and value:
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            raise RowError("solution", f"expected text or JSON, got {reprlib.repr(value)}") from None
    if not isinstance(value, str) or not value.strip():
        raise RowError("solution", f"expected text, got {'nothing' if value is None else reprlib.repr(value)}")
    return unicode_text(value, "solution")


def several(value: Any) -> list | None:
    """The golds of a list; None where there is one."""
    value = _from_text(value)
    return list(value) if isinstance(value, (list, tuple)) and len(value) > 1 else None


def _from_text(value: Any) -> Any:
    """The list that a text of quoted golds stands for (MMMU: "['24/7', '3.429']"); the text [1, 2] is one gold."""
    quoted = isinstance(value, str) and value.lstrip().startswith(("['", '["'))
    return literal(value) if quoted else value


def extracted(value: Any) -> str:
    """The answer as text. Raises RowError for what is not one answer."""
    value = _from_text(value)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and value.get("role") == "assistant":  # TRL's `completion`
        value = value.get("content")
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()
    if isinstance(value, (dict, list, tuple, bytes)):
        raise RowError("solution", f"expected one gold answer, got {reprlib.repr(value)}")
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = str(value).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
        first, _, more = text.partition("\n")
        again = _ANSWER_LINE.fullmatch(more)  # as in MetaMathQA
        text = first.strip() if again and again[1] == first.strip() else text
        if "\n" in text:
            raise RowError("solution", f"expected one line after ####, the answer, got {text[:60]!r}")
    text = text.rpartition("</think>")[2].strip()
    if tagged := _TAGGED.findall(text):
        text = tagged[-1][1].strip()
    if "\\" in text and (boxed := extract_boxed(text)) is not None:
        return boxed
    said = _ANSWER_LINE.search(text)
    return (said[1] or said[2]).strip() if said else text


def refuse_another_gold(raw: dict[str, Any], column: str | None) -> None:
    """Raises RowError where `answer` and `ground_truth` hold different answers, since one may be what a model said (or
    the letter of what the other says), and where a `label` of 0 stands beside an answer, which may then be wrong."""
    label = usual(("label",), raw)
    is_of_it = label not in (None, column) and column in raw and "response" not in raw
    if is_of_it and raw[label] in (0, "0"):  # or False
        raise RowError(
            label,
            f"says {raw[label]!r} of the {column}; expected 1, or --solution_column {column}, if it says no such thing",
        )
    names = ("answer", "ground_truth")
    other = usual(tuple(name for name in names if name != str(column).lower()), raw)
    if str(column).lower() not in names or other is None:
        return
    if all(isinstance(raw.get(name), (str, int, float)) for name in (column, other)):
        here, there = extracted(raw[column]), extracted(raw[other])
        found = decide(here, there) if here and there and not (letter_of(here) or letter_of(there)) else None
        if found is not None and not found.verdict:
            expected = f"expected the answer that {column} has, {here!r:.60}, got {there!r:.60}"
            raise RowError(other, f"{expected}; say with --solution_column which of them is right")


def is_rationale(text: str) -> bool:
    """Whether this is reasoning that leads to an answer: over MAX_WORDS words, several sentences, or words that argue.

    Formulas are no words, whatever their length.
    """
    words = len(_WORD.findall(text))
    sentences = sum(bool(part.strip()) for part in _SENTENCE.split(text))
    argues = " " in text and bool(_REASONING.search(text))
    return words > MAX_WORDS or argues or (sentences > 1 and words > 3)
