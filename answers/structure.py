r"""What an answer is made of: its kind and its parts.

    take_apart(r"x=1, y=2")              # Answer("list", ["x=1", "y=2"])
    take_apart(r"[0,\infty)")            # Answer("[)", ["0", r"\infty"])

Texts are those of normalize.clean. rules.py compares the parts.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from answers.calculator import TooBig
from answers.normalize import ROW, is_enclosed, split, squeeze, strip_braces, unwrap_text
from answers.units import THOUSANDS, plain_number, split_unit

MAX_ITEMS = 64  # elements of a list or set

_RELATIONS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx"}
FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_VARIABLE = re.compile(r"(?!\\pi$)\\?[A-Za-z]+(?:_\{?\w\}?)?(?:\(\w\))?")
_QUANTITY = (  # x, a_1, f(2), |AB|, \angle ABC, \text{area}, but not the curve xy = 4
    r"(?!\\pi$|[xyz]{2,}$)(?:\\?[A-Za-z]+|\\text\{[^{}]*\})(?:_(?:\{[^{}]*\}|\w+))?'?(?:\^\{-1\})?(?:\([\w\s,\\]*\))?|"
    r"\|[^|]+\||m?\\angle [A-Z]+|\\frac\{d\w?\}\{d\w\}|\\overline\{[A-Z]+\}"
)
_SEVERAL_WORDS = (  # Surface Area, S.A., but not negative x
    r"(?!.*\b(?:negative|minus|plus|times|half|twice|double|root|not)\b)(?=[^=]*[A-Za-z]{3})"
    r"[A-Za-z][A-Za-z.]*(?: [A-Za-z.]+)+|[A-Z]\.[A-Z]\."
)
NAME = re.compile(  # may stand to the left of "= answer"
    rf"{_QUANTITY}|{_SEVERAL_WORDS}|\(\\?\w+(?:\s*,\s*\\?\w+)+\s*\)"
)
_TERM = rf"(?![xyz]+(?![\w']))(?:{_QUANTITY})"
_COMBINED = re.compile(  # so may these, if the answer is a number; but x + y = 5 is a line
    rf"{_TERM}(?:\s*(?:[/+-]|\\cdot|\\times)\s*{_TERM})+|\\frac\{{{_TERM}\}}\{{{_TERM}\}}|"
    rf"(?:{_QUANTITY})(?:\s*:\s*(?:{_QUANTITY}))+"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)
_BRACKETED = re.compile(r"(\\\{|\\langle|[(\[])(.*?)(\\\}|\\rangle|[)\]])", re.DOTALL)
_BUILDER = re.compile(r"[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?\|([^|]*)")  # x | x > 2
_LIST_SIGNS = {",", ";", "&", "and", "or"}
_REALS = (r"\mathbb R", r"\R", "all real numbers", "all reals")


class Answer(NamedTuple):
    """The kind is "list", "set", "union", "()", "[]", "[)", "(]", "vector", "matrix", "relation" or "scalar".

    The parts of a matrix are its rows, those of a relation its sides.
    """

    kind: str
    parts: list[str]
    signs: Sequence[str] = ()  # of a relation, between its sides


def take_apart(text: str) -> Answer:
    """What kind of answer this is, and its parts."""
    text = strip_braces(text.strip())
    if (builder := _BUILDER.fullmatch(text)) and split(builder[1], _RELATIONS)[1]:
        return take_apart(builder[1])
    if any(sign in text for sign in _LIST_SIGNS) and not _is_one_number(text):
        parts, signs = split(text, _LIST_SIGNS)
        if len(parts := [part for part in parts if part]) > 1:
            both = _intersection(*parts) if signs == ["and"] or (signs == [","] and r"\neq" in text) else None
            return both or _collection("list", parts)
    parts, signs = split(text, _RELATIONS)
    if signs and all(parts):
        return Answer("relation", parts, signs)
    parts, _ = split(text, {r"\cup"})
    if len(parts) > 1:
        return Answer("union", parts)
    if matrix := _MATRIX.fullmatch(text):
        rows = [[plain_number(cell.strip()) for cell in row.split("&")] for row in matrix[2].split(ROW) if row.strip()]
        if all(len(row) == 1 for row in rows):
            return Answer("vector", [row[0] for row in rows])
        return Answer("matrix", [f"({','.join(row)})" for row in rows])
    if (bracketed := _BRACKETED.fullmatch(text)) and is_enclosed(text):
        return _bracketed(*bracketed.groups())
    readings = _plus_minus(text)
    return Answer("list", readings) if len(readings) > 1 else Answer("scalar", [text])


def _is_one_number(text: str) -> bool:
    """Whether the commas of a text are all between thousands."""
    body = split_unit(text.lstrip("-+"))[0]
    number = THOUSANDS.match(body)
    return number is not None and not any(sign in body[number.end() :] for sign in _LIST_SIGNS)


def _bracketed(opening: str, inner: str, closing: str) -> Answer:
    inner, brackets = inner.strip(), opening + closing
    parts = [part for part in split(inner, {",", ";"})[0] if part]
    if opening == r"\{":
        builder = re.fullmatch(r"(\w+)\s*(?:\\in\s*\\mathbb\{R\})?\s*[|:](.*)", inner)  # {x | x > 2}
        if builder and len(parts) == 1:
            return take_apart(builder[2])
        return _collection("list" if any(take_apart(p).kind == "relation" for p in parts) else "set", parts)
    if len(parts) == 1 and brackets in ("()", "[]"):
        return take_apart(inner)
    is_vector = opening == r"\langle" or (brackets == "[]" and len(parts) > 2)  # no interval
    return Answer("vector" if is_vector else brackets, parts)


def _collection(kind: str, parts: list[str]) -> Answer:
    if len(parts) > MAX_ITEMS:
        raise TooBig("too many elements")
    return Answer(kind, [reading for part in parts for reading in _plus_minus(part)])


def _plus_minus(text: str) -> list[str]:
    """[text], or the two readings of its plus-minus signs."""
    if r"\pm" not in text and r"\mp" not in text:
        return [text]
    upper = re.sub(r"(^|[=(,])\s*\+", r"\1", text.replace(r"\pm", "+").replace(r"\mp", "-"))
    return [upper, text.replace(r"\pm", "-").replace(r"\mp", "+")]


# --------------------------------------------------------------------------- intervals


def intervals(answer: Answer) -> tuple[str | None, list[str]] | None:
    """(variable, intervals) of an answer that is made of intervals and simple inequalities."""
    kind, parts, signs = answer
    if kind in ("list", "union"):
        inner = [intervals(take_apart(part)) for part in parts]
        if not all(inner) or len({name for name, _ in inner}) != 1:
            return None
        return inner[0][0], [piece for _, pieces in inner for piece in pieces]
    if kind in ("()", "[]", "[)", "(]") and len(parts) == 2:
        return None, [f"{kind[0]}{parts[0]},{parts[1]}{kind[1]}"]
    if kind == "scalar" and squeeze(unwrap_text(parts[0])) in _REALS:
        return None, [r"(-\infty,\infty)"]
    if kind != "relation":
        return None
    if signs == [r"\in"] and _VARIABLE.fullmatch(parts[0]):
        inner = intervals(take_apart(parts[1]))
        return (parts[0], inner[1]) if inner else None
    if signs == [r"\neq"] and _VARIABLE.fullmatch(parts[0]):
        return parts[0], [rf"(-\infty,{parts[1]})", rf"({parts[1]},\infty)"]
    if set(signs) <= {">", r"\geq"}:
        parts, signs = parts[::-1], [FLIP[sign] for sign in signs[::-1]]
    at = next((i for i, side in enumerate(parts) if _VARIABLE.fullmatch(side)), None)
    if not set(signs) <= {"<", r"\leq"} or at is None or len(parts) > 3 or (len(parts) == 3 and at != 1):
        return None
    low = f"{'(' if signs[at - 1] == '<' else '['}{parts[at - 1]}" if at else r"(-\infty"
    high = f"{parts[at + 1]}{')' if signs[at] == '<' else ']'}" if at < len(signs) else r"\infty)"
    return parts[at], [f"{low},{high}"]


def _intersection(first: str, second: str) -> Answer | None:
    """The relation 2 < x < 5 that `x > 2 and x < 5` means; the union that `x > 2, x \\neq 5` does."""
    apart = [take_apart(part) for part in (first, second)]
    bounds = [intervals(part) for part in apart]
    if not all(bounds) or bounds[0][0] is None or bounds[0][0] != bounds[1][0]:
        return None
    holes = [part.parts[1] for part in apart if part.signs == [r"\neq"]]
    if holes:
        pieces = [piece for _, pieces in bounds if len(pieces) == 1 for piece in pieces]
        if len(holes) > 1 or len(pieces) != 1:
            return None
        low, high = pieces[0][1:-1].rsplit(",", 1)
        return Answer("union", [f"{pieces[0][0]}{low},{holes[0]})", f"({holes[0]},{high}{pieces[0][-1]}"])
    lower_first = sorted(bounds[0][1] + bounds[1][1], key=lambda piece: piece.startswith(r"(-\infty"))
    low, middle, high = "".join(lower_first).partition(r",\infty)(-\infty,")
    signs = [r"\leq" if bracket in "[]" else "<" for bracket in (low[0], high[-1:])]
    return Answer("relation", [low[1:], bounds[0][0], high[:-1]], signs) if middle else None


# --------------------------------------------------------------------------- names and their values


def assignments(answer: Answer) -> list[tuple[str, str]]:
    """[(name, value), ...] of `x = 1, y = 2`, `x = 2, -3` or `(x,y) = (1,2)`; [] of anything else."""
    pairs = []
    for part in answer.parts if answer.kind == "list" else []:
        inner = take_apart(part)
        if inner.signs == ["="] and NAME.fullmatch(inner.parts[0]):
            pairs.append((squeeze(inner.parts[0]), inner.parts[1]))
        elif inner.kind != "relation" and pairs:
            pairs.append((pairs[-1][0], part))
        else:
            return []
    if answer.signs in (["="], [r"\in"]) and NAME.fullmatch(answer.parts[0]):
        inner = take_apart(answer.parts[1])
        values = inner.parts if inner.kind in ("list", "set") else [answer.parts[1]]
        pairs = [(squeeze(answer.parts[0]), value) for value in values]
    return [pair for name, value in pairs for pair in _coordinates(name, value)]


def _coordinates(name: str, value: str) -> list[tuple[str, str]]:
    """`(x,y) = (1,2)` as x = 1, y = 2."""
    names, point = name.strip("()").split(","), take_apart(value)
    if not name.startswith("(") or point.kind not in ("()", "vector") or len(names) != len(point.parts):
        return [(name, value)]
    return list(zip(names, point.parts, strict=True))


def solutions(pairs: list[tuple[str, str]], by_name: bool = False) -> tuple[list[str], list[str]]:
    """(names, values) of assignments: `p = 5, q = 2; p = 7, q = 2` are the values (5,2) and (7,2) of p and q.

    Names that follow each other in the alphabet are sorted, others remain in the order they were written in
    (sorted too if `by_name`).
    """
    written = [name for name, _ in pairs]
    names = list(dict.fromkeys(written))
    if written != names * (len(written) // len(names)):  # x = 1, 3; y = 2, 4
        return sorted(written), [f"({name},{value})" for name, value in pairs]
    rows = [pairs[i : i + len(names)] for i in range(0, len(pairs), len(names))]
    initials = {ord(name.strip("\\")[0]) for name in names}
    if by_name or max(initials) - min(initials) < len(initials):
        names, rows = sorted(names), [sorted(row) for row in rows]
    values = [",".join(value for _, value in row) for row in rows]
    return names, values if len(names) == 1 else [f"({value})" for value in values]


def values_of(relation: Answer) -> list[str]:
    """What a chain of equations says its value is: every side but the name; [] if it names none."""
    _, sides, signs = relation
    if set(signs) - {"=", r"\approx", r"\in"}:
        return []
    if NAME.fullmatch(sides[0]):
        return sides[1:]
    if NAME.fullmatch(sides[-1]):
        return sides[:-1]
    values = sides[1:] if _COMBINED.fullmatch(sides[0]) else sides
    numbers = [re.sub(r"\\[A-Za-z]+", "", split_unit(value)[0]) for value in values]
    return [] if any(re.search(r"[A-Za-z]", number) for number in numbers) else values


def exact_part(relation: Answer) -> Answer:
    r"""`x = \frac13` of `x = \frac13 \approx 0.33`: the rest is commentary."""
    _, sides, signs = relation
    end = signs.index(r"\approx") if r"\approx" in signs else len(signs)
    if end == 0 and NAME.fullmatch(sides[0]):  # x \approx 0.33
        end = 1
    return Answer("relation", sides[: end + 1], signs[:end])


def is_named(side: str) -> bool:
    """Whether a side of an equation says whose value the other is, and not a value."""
    return bool(NAME.fullmatch(side) or _COMBINED.fullmatch(side))
