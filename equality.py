r"""Which answers are the same: the rules, from whole answers down to single expressions.

    decide(r"\dfrac12", "0.5")          # Result(verdict=True, reason="rules")

Normalised (normalisation.py), taken apart (structure.py) and evaluated (calculator.py), most pairs are
decided in microseconds. Every rule is three-valued: True, False, or None where only math-verify can
tell. It may hang or eat all memory, so that it runs in the processes of workers.py alone; there
nothing stays None.
"""

import logging
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from calculator import CANNOT_EVALUATE, TooBig, common_factor, evaluate, same_values
from normalisation import ROW, ZERO_WIDTH, as_words, clean, has_words, squeeze, unwrap_text
from structure import (
    FLIP,
    NAME,
    assignments,
    intervals,
    is_named,
    plain_number,
    solutions,
    split_unit,
    structure,
    unit_name,
    values_of,
)

logger = logging.getLogger(__name__)

MAX_CHARS = 2000  # longer answers are equal only if identical
DIGITS = 6  # significant digits from which on a decimal may stand for the exact gold that it rounds
DIGITS_OF_PART = 5  # the same inside a list, tuple or interval, where the other parts must be right too
MATH_VERIFY_CHARS = 400  # its grammar takes a millisecond for a few characters

in_worker = False  # True in the processes of workers.py

_PLAIN_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)")
_EMPTY = {"none", "nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset"}


@dataclass(frozen=True)
class Result:
    """A verdict and why: True, False, or None where the pair is unscorable or hit a limit."""

    verdict: bool | None
    reason: str


class _GoldTooBig(TooBig):
    """It is the gold that does: the pair is unscorable unless identical."""


def decide(pred: str | None, gold: str) -> Result:
    """Compare one pair; `verdict` None with reason "open" means that a worker must look."""
    pred = pred or ""
    if pred.strip() == gold.strip():
        return Result(True, "identical")
    if len(gold) > MAX_CHARS:
        return Result(None, "gold too long")
    if len(pred) > MAX_CHARS:
        return Result(False, "too long")
    if _PLAIN_NUMBER.fullmatch(pred) and _PLAIN_NUMBER.fullmatch(gold):
        a, b = Fraction(pred), Fraction(gold)
        return Result(a == b or _same_rounded(a, b, pred, gold), "numbers")
    if not pred.isprintable() and any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\t\n\r" for c in pred.translate(ZERO_WIDTH)
    ):
        return Result(False, "control characters")
    try:
        p, g = clean(pred), clean(gold)
        if not g:
            return Result(None, "empty gold")
        if not p:
            return Result(False, "no answer")
        if p == g:
            return Result(True, "identical after normalisation")
        chosen = _same_choice(p, g)
        if chosen is not None:
            return Result(chosen, "multiple choice")
        verdict = _same(p, g)
    except _GoldTooBig as error:
        return Result(None, f"gold too big: {error}")
    except TooBig as error:
        return Result(False, f"too big: {error}")
    except RecursionError:
        return Result(False, "nested too deeply")
    return Result(verdict, "open" if verdict is None else "rules")


def _same(pred: str, gold: str, digits: int = DIGITS) -> bool | None:
    """Equality of two cleaned answers, by what they are made of."""
    if squeeze(unwrap_text(pred)) == squeeze(unwrap_text(gold)):
        return True
    if _DECIMAL.fullmatch(gold) and re.fullmatch(r"[+-]?\d+,(?:\d{1,2}|\d{4,})", pred):
        pred = pred.replace(",", ".")  # a decimal comma
    p = p_kind, p_parts = structure(pred)
    g = g_kind, g_parts = structure(gold)
    kinds = {p_kind, g_kind}
    p_set, g_set = intervals(*p), intervals(*g)
    if p_set and g_set and kinds & {"relation", "union", "scalar"} and (kinds != {"relation"} or p_set[0] == g_set[0]):
        return _unordered(p_set[1], g_set[1])
    if kinds == {"scalar"}:
        return _same_scalar(p_parts[0], g_parts[0], digits)
    if "list" in kinds and (assignments(*p) or assignments(*g)):
        return _same_assignments(p, g)
    if "relation" in kinds:
        return _same_relations(p_parts, g_parts) if len(kinds) == 1 else _same_value(p, g, pred, gold)
    if kinds == {"set"}:
        p_parts, g_parts = (list(dict.fromkeys(map(squeeze, parts))) for parts in (p_parts, g_parts))
    if kinds <= {"list", "set"} or kinds == {"union"}:
        return _unordered(p_parts, g_parts)
    if kinds == {"matrix"}:
        return len(p_parts) == len(g_parts) and _all(map(_ordered, p_parts, g_parts))
    if kinds == {"matrix", "()"}:  # a column vector may be written as a tuple
        rows = p_parts if p_kind == "matrix" else g_parts
        flat = [cell for row in rows for cell in row]
        return len(flat) == len(rows) and _ordered(*((flat, g_parts) if rows is p_parts else (p_parts, flat)))
    if len(kinds) == 1:
        return _ordered(p_parts, g_parts)
    if kinds == {"set", "scalar"}:
        if not p_parts or not g_parts:
            return _says_empty(gold if g_parts else pred)
        return len(p_parts) == len(g_parts) == 1 and _same(p_parts[0], g_parts[0])
    return False


# --------------------------------------------------------------------------- answers of several parts


def _ordered(pred: list[str], gold: list[str]) -> bool | None:
    return len(pred) == len(gold) and _all(_same(p, g, DIGITS_OF_PART) for p, g in zip(pred, gold, strict=True))


def _unordered(pred: list[str], gold: list[str]) -> bool | None:
    """Whether the elements pair up in some order (equality is transitive, so greedily)."""
    if len(pred) != len(gold):
        return False
    left, open_question = list(pred), False
    for g in gold:
        verdicts = [_same(p, g, DIGITS_OF_PART) for p in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            open_question = True
        else:
            return False
    return None if open_question else True


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """Like `all`; an open question is settled by one False."""
    result = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = result and verdict
    return result


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    """Like `any`; an open question is settled by one True."""
    opposite = _all(None if v is None else not v for v in verdicts)
    return None if opposite is None else not opposite


def _same_assignments(pred: tuple[str, list], gold: tuple[str, list]) -> bool | None:
    """Values with names, on one side or on both: the solutions are unordered, the values of one are not."""
    a, b = assignments(*pred), assignments(*gold)
    if a and b:
        (p_names, p_rows), (g_names, g_rows) = solutions(a, by_name=True), solutions(b, by_name=True)
        return p_names == g_names and _unordered([_point(row) for row in p_rows], [_point(row) for row in g_rows])
    (names, rows), (kind, parts) = solutions(a or b), gold if a else pred
    if len(rows) == 1 and len(names) > 1:
        return kind in ("()", "list") and _ordered(*((rows[0], parts) if a else (parts, rows[0])))
    values = [_point(row) for row in rows]
    return kind in ("list", "set") and _unordered(*((values, parts) if a else (parts, values)))


def _point(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"({','.join(values)})"


def _same_relations(pred: list, gold: list) -> bool | None:
    """Two equations or inequalities."""
    (p, p_signs), (g, g_signs) = pred, gold
    if p_signs == g_signs and ((same := _all(map(_same, p, g))) or len(g) > 2):
        return same
    if len(p) != 2 or len(g) != 2:  # a chain of equations says one value, of one name
        if is_named(p[0]) and is_named(g[0]) and squeeze(p[0]) != squeeze(g[0]):
            return False
        p, g = values_of(p, p_signs), values_of(g, g_signs)
        return bool(p and g) and _all(_same(x, g[-1]) for x in p)
    if g_signs[0] not in (p_signs[0], FLIP.get(p_signs[0])):
        return False
    names = [squeeze(side[0]) for side in (p, g)]  # y = ... may answer for f(x) = ...
    functions = all(NAME.fullmatch(n) for n in names) and "(" in names[0] + names[1] and {"y", "f(x)"} & set(names)
    if (names[0] == names[1] or functions) and g_signs == p_signs == ["="]:
        same = _same(p[1], g[1])
        if same is not False or any(has_words(s) for s in p + g):
            return same
    elif any(has_words(s) for s in p + g):
        return False
    return _same_equation(p_signs[0], p, g_signs[0], g)


def _same_value(p: tuple[str, list], g: tuple[str, list], pred: str, gold: str) -> bool | None:
    """A relation and something else: `x = 5` may answer for 5, `2x = 10` may not answer for 10."""
    if g[0] == "relation":
        return _any(_same(pred, value) for value in values_of(*g[1]))
    sides, signs = p[1]
    if r"\approx" in signs:  # the exact side is the answer, the rest is commentary
        at = signs.index(r"\approx")
        return _same(sides[1 if at == 0 and NAME.fullmatch(sides[0]) else at], gold)
    values = values_of(sides, signs)
    return bool(values) and _all(_same(value, gold) for value in values)


def _same_equation(p_sign: str, pred: list[str], g_sign: str, gold: list[str]) -> bool | None:
    """`left sign right` on both sides: equivalent if left - right differ by a constant factor."""
    try:
        a, b = (evaluate(f"({left})-({right})") for left, right in (pred, gold))
    except CANNOT_EVALUATE:
        return _last_resort(f"{pred[0]} {p_sign} {pred[1]}", f"{gold[0]} {g_sign} {gold[1]}")
    factor = common_factor(a, b)
    if factor is None or g_sign in ("=", r"\neq"):
        return factor is not None
    return factor.real > 0 if p_sign == g_sign else factor.real < 0


# --------------------------------------------------------------------------- answers of one part


_CHOICE_GOLD = re.compile(  # (B), B. or B: x = 5, but not the ratio A:B = 1:2
    r"\(?\s*([A-Z])\s*\)?[.:]?|\(\s*([A-Z])\s*\)\s*(\S.*)|([A-Z])(?:\s*[.)]|:(?![A-Z]\S*=|.*=.*:))\s*(\S.*)", re.DOTALL
)
_CHOICE_PRED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\b)?\s*:?\s*)?"
    r"[(\[]?\s*([A-Z])\s*(?:[)\].:]+\s*(.*)|$)",
    re.DOTALL | re.IGNORECASE,
)
_SEVERAL_CHOICES = re.compile(r"[(\[{\\ ]*[A-H](?:(?:[(),&. ]|and)*[A-H])+[)\]}\\. ]*")
_OTHER_OPTION = re.compile(r"\([A-Z]\)|(?<![A-Za-z])[A-Z][.)]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")


def _same_choice(pred: str, gold: str) -> bool | None:
    """Multiple choice; None here means that the gold is no choice letter."""
    pred, gold = (" ".join(unwrap_text(t).split()) for t in (pred, gold))
    found = _CHOICE_GOLD.fullmatch(gold)
    if not found:  # ACD, or A, C and D
        if not (_SEVERAL_CHOICES.fullmatch(gold) and _SEVERAL_CHOICES.fullmatch(pred)):
            return None
        p, g = re.findall("[A-H]", pred), re.findall("[A-H]", gold)
        return g == p or (pred != "".join(p) and g == sorted(p))
    letter, content = found[1] or found[2] or found[4], found[3] or found[5]
    chosen = _CHOICE_PRED.fullmatch(pred)
    if not chosen or not (chosen[1].isupper() or not chosen[2]):
        return _same(pred, content) if content else False
    rest = chosen[2] or ""
    if _OTHER_OPTION.search(rest) or chosen[1].upper() != letter:
        return False
    return _same(rest, content) if content and rest else True


_RATIO = re.compile(r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+)(.*)")


def _same_scalar(pred: str, gold: str, digits: int) -> bool | None:
    """Two scalars: words, ratios and times, or quantities."""
    plain = [re.sub(r"\s*\\text\{\s*to\s*\}\s*|(?<=\d) to (?=\d)", ":", t) for t in (pred, gold)]
    p_ratio, g_ratio = (_RATIO.fullmatch(t) for t in plain)
    if p_ratio and g_ratio:
        return _same_ratio(*p_ratio.groups(), *g_ratio.groups())
    if g_ratio and not g_ratio[2] and plain[1].count(":") == 1:
        return _same_expression(pred, _quotient(plain[1]))
    if p_ratio and not p_ratio[2] and plain[0].count(":") == 1:
        return not gold.isdigit() and _same_expression(_quotient(plain[0]), gold)
    formulas = [re.sub("[_{} ]", "", unwrap_text(t)) for t in (pred, gold)]
    if formulas[0] == formulas[1] and re.fullmatch(r"[A-Z][A-Za-z0-9]*", formulas[1]):
        return True  # a chemical formula, H_2O
    words = [as_words(t) for t in (pred, gold)]
    if words[0] and words[0] == words[1] and _symbols(pred) == _symbols(gold):
        return True
    if words[1] in ("yes", "no", "true", "false"):
        return words[0] == words[1]
    if _says_empty(gold):
        return _says_empty(pred)
    return _same_quantity(pred, gold, digits)


def _says_empty(text: str) -> bool:
    return as_words(text).replace(" ", "").strip("\\") in _EMPTY


def _quotient(ratio: str) -> str:
    return "({})/({})".format(*ratio.split(":"))


def _symbols(text: str) -> str:
    """The characters that `as_words` drops and that carry meaning in an expression."""
    return re.sub(r"[\w\s.,;:!?'\"(){}\[\]$]|\\text", "", text) if has_words(text) else text


def _same_ratio(pred: str, p_tail: str, gold: str, g_tail: str) -> bool:
    """3:4 is 6:8, unless the gold may be a time of day or a ratio that was to be kept."""
    p, g = ([Fraction(n) for n in text.split(":")] for text in (pred, gold))
    units = {unit_name(unwrap_text(tail)) for tail in (p_tail, g_tail)}
    if len(p) != len(g) or None in units or len(units - {""}) > 1:
        return False
    lowest = bool(g[1]) and Fraction(g[0], g[1]).numerator == g[0]
    if re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?", gold) and not lowest:
        return p == g
    return all(p[i] * g[0] == g[i] * p[0] for i in range(len(p)))


def _same_quantity(pred: str, gold: str, digits: int) -> bool | None:
    """Numbers and expressions with units: the same unit, or one of them has none."""
    (p, p_unit), (g, g_unit) = split_unit(pred), split_unit(gold)
    if p_unit and g_unit and p_unit != g_unit:
        return False
    p, g = plain_number(p), plain_number(g)
    based = [re.fullmatch(r"\(?([0-9A-Fa-f]+)\)?_\{?(?:\\text\{)?(\w+?)\}*", body) for body in (p, g)]
    if any(based):  # 1011_2: digits and base, the base may be left out
        digits = [b[1].upper() if b else body.upper() for b, body in zip(based, (p, g), strict=True)]
        p_base, g_base = (b and plain_number(b[2]) for b in based)
        return digits[0] == digits[1] and (p_base in (None, g_base) or (p_base, g_base) == ("10", None))
    if has_words(p) or has_words(g):
        return as_words(pred) == as_words(gold)
    units = {p_unit, g_unit}
    same = _same_expression(p, g, digits)
    if units != {"", "percent"}:
        return same
    if same:  # the sign may be dropped from a number that exceeds 1
        try:
            value = evaluate(g)[0]
        except CANNOT_EVALUATE:
            return False
        return isinstance(value, Fraction) and (abs(value) > 1 or not value)
    return _same_expression(*(f"({body})/100" if unit else body for body, unit in ((p, p_unit), (g, g_unit))))


def _same_expression(pred: str, gold: str, digits: int = DIGITS) -> bool | None:
    """Two expressions without lists, relations or units."""
    if "\\infty" in gold or "\\infty" in pred:
        return gold.replace(" ", "") == pred.replace(" ", "")
    try:
        b = evaluate(gold)
    except TooBig as error:
        raise _GoldTooBig(str(error)) from error
    except CANNOT_EVALUATE:
        return _last_resort(pred, gold)
    try:
        a = evaluate(pred)
    except CANNOT_EVALUATE:
        return _last_resort(pred, gold)
    return same_values(a, b) or (len(a) == len(b) == 1 and _same_rounded(a[0], b[0], pred, gold, digits))


def _same_rounded(p_value, g_value, pred: str, gold: str, digits: int = DIGITS) -> bool:
    """Whether one of the two is the other one rounded to a decimal.

    A decimal gold is met at its own precision, of two decimals or more; by a prediction that is itself a decimal
    only from three significant digits on, for 0.254 is not 0.25. An exact gold is met by a decimal of `digits`.
    """
    p_decimal, g_decimal = _DECIMAL.fullmatch(pred), _DECIMAL.fullmatch(gold)
    if g_decimal:
        enough = len(g_decimal[1]) >= 2 and (not p_decimal or _significant(gold) >= 3)
        return enough and _rounds_to(p_value, g_value, len(g_decimal[1]))
    return bool(p_decimal) and _significant(pred) >= digits and _rounds_to(g_value, p_value, len(p_decimal[1]))


def _significant(decimal: str) -> int:
    """Number of significant digits."""
    return len(re.sub(r"\D", "", decimal).lstrip("0"))


def _rounds_to(value, target: Fraction, decimals: int) -> bool:
    """Whether `value`, rounded half up, is `target`."""
    if not isinstance(value, Fraction):
        if abs(value.imag) > 1e-40 or not abs(value.real) < 1e12:
            return False
        value = Fraction(str(value.real))
    sign = -1 if target < 0 else 1
    return -1 <= (value - target) * sign * 2 * 10**decimals < 1


# --------------------------------------------------------------------------- the last resort

_TOWERS = re.compile(r"\^\s*[{(]*\s*\d+\s*[})]*\s*\^|\^\s*[{(]*\s*-?\d{4,}|\d{4,}\s*[})]*\s*!|!\s*[)}]*\s*!|\d{400}")
_VETTED = re.compile(r"[\w\s+\-*/^=<>()\[\]{}|\\.,:;!&%'~]*", re.ASCII)


def _last_resort(pred: str, gold: str) -> bool | None:
    """What the calculator cannot read: None for "a worker must look", and there math-verify."""
    return math_verify(pred, gold) if in_worker else None


def math_verify(pred: str, gold: str) -> bool:
    """math-verify on two vetted LaTeX strings, by its LaTeX grammar alone (never parse_expr)."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from math_verify import verify
    from sympy import Basic, MatrixBase

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    parsed = []
    for text in (gold, pred):
        text = text.replace(ROW, r"\\")
        if len(text) > MATH_VERIFY_CHARS or _TOWERS.search(text):
            raise TooBig("for sympy") if parsed else _GoldTooBig("for sympy")
        if not _VETTED.fullmatch(text) or "__" in text:
            return False
        try:
            parsed.append(latex2sympy(text, is_real=True, normalization_config=config))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the grammar raises bare Exception for whatever it cannot read
            logger.debug("latex2sympy cannot read %r: %s", text, error)
            return False
    if not all(isinstance(x, Basic | MatrixBase) for x in parsed):
        return False
    return bool(verify(*parsed, float_rounding=12, numeric_precision=30, timeout_seconds=None))
