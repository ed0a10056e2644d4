r"""Which answers are equal: the rules, from whole answers down to single expressions.

    decide(r"\dfrac12", "0.5")          # Result(verdict=True, reason="rules")

An answer is normalized (normalize.py), taken apart (structure.py, units.py) and evaluated (calculator.py): most pairs
are decided in microseconds. Every rule is three-valued: True, False, or None where only math-verify can tell, which may
hang or take all memory, so it runs in the processes of workers.py and nowhere else.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from answers.calculator import CANNOT_EVALUATE, TooBig, common_factor, evaluate, same_values
from answers.normalize import ZERO_WIDTH, as_words, clean, has_words, squeeze, unwrap_text, with_powers_of_ten
from answers.structure import (
    FLIP,
    NAME,
    Answer,
    assignments,
    exact_part,
    intervals,
    is_named,
    solutions,
    take_apart,
    values_of,
)
from answers.units import plain_number, split_unit, unit_name

MAX_CHARS = 2000  # longer answers are equal only if identical
DIGITS = 6  # significant digits from which on a decimal may stand for the exact gold that it rounds
FLOAT_DIGITS = 15  # from which on a decimal gold is a float that a program printed
DIGITS_OF_PART = 5  # the same inside a list, tuple or interval, where the other parts must be right too

_PLAIN_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)")
_STATEMENTS = re.compile(r"(?:\(\d\)\s*){2,}")
_LISTED = re.compile(r"\(\d\)(?:[\s,;]*\(\d\))*")


@dataclass(frozen=True)
class Result:
    """A verdict and why: True, False, or None where the pair is unscorable or hit a limit."""

    verdict: bool | None
    reason: str


class GoldTooBig(TooBig):
    """The gold is beyond the limits, not the prediction: the pair is unscorable unless identical."""


def last_resort(pred: str, gold: str) -> bool | None:
    """What the calculator can't read: undecided (None) here; in a worker this is workers.math_verify."""
    return None


def decide(pred: str | None, gold: str) -> Result | None:
    """Compare one pair; None where only a worker can tell."""
    pred = pred or ""
    if pred.strip() == gold.strip():
        return Result(True, "identical")
    if len(gold) > MAX_CHARS:
        return Result(None, "gold too long")
    if len(pred) > MAX_CHARS:
        return Result(False, "too long")
    if _PLAIN_NUMBER.fullmatch(pred) and _PLAIN_NUMBER.fullmatch(gold):  # most pairs: 4 microseconds, not 70
        a, b = Fraction(pred), Fraction(gold)
        return Result(a == b or _same_rounded(a, b, pred, gold, DIGITS), "numbers")
    if not pred.isprintable() and _has_control_characters(pred):
        return Result(False, "control characters")
    try:
        p, g = clean(pred), clean(gold)
        if not g:
            return Result(None, "empty gold")
        if not p:
            return Result(False, "no answer")
        if p == g:
            return Result(True, "identical after normalization")
        if "-" in g and (pieces := _hyphenated(g)) is not None:  # a gold of 3 to 4 may be a ratio
            return Result(_hyphenated(split_unit(p)[0]) == pieces, "hyphenated")
        result = _by_rules(p, g)
        if result is None or not result.verdict:
            powers = with_powers_of_ten(p), with_powers_of_ten(g)
            again = _by_rules(*powers) if powers != (p, g) else None
            result = again if again is not None and again.verdict else result
        return result
    except GoldTooBig as error:
        return Result(None, f"gold too big: {error}")
    except TooBig as error:
        return Result(False, f"too big: {error}")
    except RecursionError:
        return Result(False, "nested too deeply")


def _by_rules(pred: str, gold: str) -> Result | None:
    if (verdict := _same_choice(pred, gold)) is not None:
        return Result(verdict, "multiple choice")
    verdict = _same(pred, gold)
    return None if verdict is None else Result(verdict, "rules")


def _hyphenated(text: str) -> list[int] | None:
    """The numbers of a date, a telephone number or a range (10-20), which are no differences to work out."""
    pieces = re.sub(r"\s+(?:to|through)\s+", "-", unwrap_text(text)).split("-")
    if not all(re.fullmatch(r"\d{1,9}", piece, re.ASCII) for piece in pieces):
        return None
    numbers = [int(piece) for piece in pieces]
    return numbers if len(numbers) > 2 or (len(numbers) == 2 and numbers[0] < numbers[1]) else None


def _has_control_characters(text: str) -> bool:
    characters = set(text.translate(ZERO_WIDTH)) - set("\t\n\r")
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") for c in characters)


# --------------------------------------------------------------------------- multiple choice

_CHOICE_GOLD = re.compile(  # (B), B. or B: x = 5, but not the ratio A:B = 1:2
    r"\(?\s*([A-Z])\s*\)?[.:]?|\(\s*([A-Z])\s*\)\s*(\S.*)|"
    r"([A-Z])(?:\s*[.)](?![A-Z]\.)|:(?![A-Z]\S*=|.*=.*:))\s*(\S.*)",
    re.DOTALL,
)
_CHOICE_PRED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\b)?\s*:?\s*|"
    r"(?:正确)?(?:答案|选项|选择|选)\s*[是为]?\s*:?\s*)?"
    r"[(\[]?\s*([A-Z])\s*(?:[)\].:]+\s*(.*)|(?:选?项)?$)",
    re.DOTALL | re.IGNORECASE,
)
_CHOICE_AND_TEXT = re.compile(  # B (12), B, 12, B - 12, B 12; 12 (B)
    r"(?:(?:option|choice|answer)\s+)?([A-Z])(?:\s*,\s*|\s+-\s+|\s+)(?:\((.+)\)|(.+))|(.+?)\s*\(([A-Z])\)",
    re.DOTALL | re.IGNORECASE,
)
_LAST_LETTER = re.compile(r"\s\(?([A-H])\)?$")  # 12 A, 12 (A)
_SEVERAL_CHOICES = re.compile(r"[(\[{\\ ]*[A-H](?:(?:[(),&. ]|and)*[A-H])+[)\]}\\. ]*")
_NEXT_LABEL = re.compile(r"[,;]\s*[A-Z]\s*:")
_OTHER_OPTION = re.compile(
    r"\([A-Z]\)|(?<![A-Za-z])[A-Z][.)]|(?<![A-Za-z])(?:and|or)(?![A-Za-z]).*(?<![A-Za-z])[A-H](?![A-Za-z])|"
    r"^\s*or(?![A-Za-z])"
)


def _same_choice(pred: str, gold: str) -> bool | None:
    """Multiple choice; None here means that the gold is no choice letter."""
    pred, gold = (" ".join(unwrap_text(t).split()) for t in (pred, gold))
    match = _CHOICE_GOLD.fullmatch(gold)
    if not match:  # ACD, or A, C and D
        if not (_SEVERAL_CHOICES.fullmatch(gold) and _SEVERAL_CHOICES.fullmatch(pred)):
            return None
        p, g = re.findall("[A-H]", pred), re.findall("[A-H]", gold)
        return g == p or (pred != "".join(p) and g == sorted(p))
    letter, content = match[1] or match[2] or match[4], match[3] or match[5]
    if content and re.match(r"[A-Z]\s*:", gold) and _NEXT_LABEL.search(content):  # A: 3, B: 4 are two answers
        return None
    if content and (both := _CHOICE_AND_TEXT.fullmatch(pred)) and letter in (both[1], both[5]):
        said = both[2] or both[3] or both[4]
        if squeeze(said) == squeeze(content) or (not _OTHER_OPTION.search(said) and _same(said, content)):
            return True
    if content and (other := _LAST_LETTER.search(pred)) and other[1] != letter and not content.endswith(other[1]):
        return False
    choice = _CHOICE_PRED.fullmatch(pred)
    if not choice or (choice[2] and choice[1].islower()):  # what follows a small letter has to be the option itself
        labelled = choice and content and choice[1].upper() == letter and _same(choice[2], content)
        return labelled or (_same(pred, content) if content else False)
    rest = choice[2] or ""
    if content and choice[1].upper() == letter and squeeze(rest) == squeeze(content):
        return True
    if _OTHER_OPTION.search(rest) or choice[1].upper() != letter:
        return False
    if not content or not rest:
        return True
    if has_words(content) and as_words(content) not in _YES_NO:  # words may be said in another way
        return True
    same = _same(rest, content)
    return same if same is not False else _rounded_or_reworded(rest, content)


_AROUND = re.compile(r"\\text\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z])|\(\s*\)|\\approx")


_DENIED = re.compile(r"(?<![a-z])(?:not|no|less|more|least|most|under|over|below|above|except)(?![a-z])", re.IGNORECASE)


def _rounded_or_reworded(rest: str, content: str) -> bool:
    """Whether what follows the right letter is the option's number all the same: rounded, or with other words. Another
    number contradicts the letter."""
    if _DENIED.search(rest):
        return False
    numbers, values = [], []
    (p, p_unit), (g, g_unit) = split_unit(rest), split_unit(content)
    if p_unit and g_unit and p_unit != g_unit:
        return False
    for text in (p, g):
        numbers.append(plain_number(" ".join(_AROUND.sub(" ", _AROUND.sub(" ", text)).split())))
        try:
            (value,) = evaluate(numbers[-1])
        except (TooBig, ValueError, *CANNOT_EVALUATE):
            return False
        values.append(value)
    if same_values(values[:1], values[1:]):
        return True
    return any(
        re.fullmatch(r"[+-]?\d*\.?\d+", number)
        and _significant(number) >= 2
        and _rounds_to(other, Fraction(number), len(number.partition(".")[2]))
        for number, other in ((numbers[0], values[1]), (numbers[1], values[0]))
    )


# --------------------------------------------------------------------------- answers of several parts


def _same(pred: str, gold: str, digits: int = DIGITS) -> bool | None:
    """Equality of two normalized answers, by what they are made of."""
    if squeeze(unwrap_text(pred)) == squeeze(unwrap_text(gold)):
        return True
    if _STATEMENTS.fullmatch(gold) or (_STATEMENTS.fullmatch(pred) and _LISTED.fullmatch(gold)):  # (1)(3) is no product
        return bool(re.fullmatch(r"(?:[\d(),;&\s]|\\text\{and\}|and)+", pred)) and _digits(pred) == _digits(gold)
    if _DECIMAL.fullmatch(gold) and re.fullmatch(r"[+-]?\d+,(?:\d{1,2}|\d{4,})", pred):
        pred = pred.replace(",", ".")  # a decimal comma
    p, g = take_apart(pred), take_apart(gold)
    kinds = {p.kind, g.kind}
    p_set, g_set = intervals(p), intervals(g)
    if p_set and g_set and kinds & {"relation", "union", "scalar"} and (kinds != {"relation"} or p_set[0] == g_set[0]):
        return _unordered(p_set[1], g_set[1])
    if kinds == {"scalar"}:
        return _same_scalar(p.parts[0], g.parts[0], digits)
    if "list" in kinds and (assignments(p) or assignments(g)):
        return _same_assignments(p, g)
    if kinds == {"relation"}:
        return _same_relations(p, g)
    if g.kind == "relation":  # the value alone is accepted for x = 5
        return _any(_same(pred, value) for value in values_of(g))
    if p.kind == "relation":  # x = 5 is accepted for 5, but 2x = 10 is not for 10
        values = values_of(exact_part(p))
        return bool(values) and _all(_same(value, gold) for value in values)
    if kinds == {"set"}:
        return _unordered(*(list(dict.fromkeys(map(squeeze, answer.parts))) for answer in (p, g)))
    if kinds <= {"list", "set"} or kinds == {"union"}:
        return _unordered(p.parts, g.parts)
    if len(kinds) == 1 or kinds == {"()", "vector"}:
        return _ordered(p.parts, g.parts)
    if kinds == {"set", "scalar"}:
        if not p.parts or not g.parts:
            return _says_empty(gold if g.parts else pred)
        return len(p.parts) == len(g.parts) == 1 and _same(p.parts[0], g.parts[0])
    return False


def _digits(text: str) -> list[str]:
    return sorted(re.findall(r"\d", text))


def _ordered(pred: list[str], gold: list[str]) -> bool | None:
    digits = DIGITS_OF_PART if len(gold) > 1 else DIGITS
    return len(pred) == len(gold) and _all(_same(p, g, digits) for p, g in zip(pred, gold, strict=True))


def _unordered(pred: list[str], gold: list[str]) -> bool | None:
    """Whether the parts pair up in some order; greedily, as equality is transitive but for rounding."""
    if len(pred) != len(gold):
        return False
    left, undecided = list(pred), False
    digits = DIGITS_OF_PART if len(gold) > 1 else DIGITS
    for g in gold:
        verdicts = [_same(p, g, digits) for p in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """Like `all`; one False decides, whatever is undecided."""
    result = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = result and verdict
    return result


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    """Like `any`; one True decides, whatever is undecided."""
    opposite = _all(None if v is None else not v for v in verdicts)
    return None if opposite is None else not opposite


def _same_assignments(pred: Answer, gold: Answer) -> bool | None:
    """Values with names, on one side or on both: solutions are unordered, the coordinates of one are not."""
    p_named, g_named = assignments(pred), assignments(gold)
    if p_named and g_named:
        (p_names, p_values), (g_names, g_values) = solutions(p_named, by_name=True), solutions(g_named, by_name=True)
        return p_names == g_names and _unordered(p_values, g_values)
    names, values = solutions(p_named or g_named)
    other, compare, kinds = gold if p_named else pred, _unordered, ("list", "set")
    if len(values) == 1 and len(names) > 1:
        values, compare, kinds = take_apart(values[0]).parts, _ordered, ("list", "()", "vector")
    if other.kind not in kinds:
        return False
    return compare(values, other.parts) if p_named else compare(other.parts, values)


# --------------------------------------------------------------------------- equations and inequalities


def _same_relations(pred: Answer, gold: Answer) -> bool | None:
    (_, p, p_signs), (_, g, g_signs) = pred, gold
    if p_signs == g_signs and ((same := _all(map(_same, p, g))) or len(g) > 2):
        return same
    if len(p) != 2 or len(g) != 2:  # a chain of equations says one value, of one name
        if is_named(p[0]) and is_named(g[0]) and squeeze(p[0]) != squeeze(g[0]):
            return False
        p, g = values_of(pred), values_of(gold)
        return bool(p and g) and _all(_same(x, g[-1]) for x in p)
    if g_signs[0] not in (p_signs[0], FLIP.get(p_signs[0])):
        return False
    in_words = re.search(r"(?<![\\A-Za-z])[A-Za-z]?[a-z]{3}", unwrap_text(g[0])) and not has_words(p[0])
    if g_signs == p_signs == ["="] and in_words and is_named(p[0]) and is_named(g[0]):
        return _same(p[1], g[1])  # A = 9 for Area = 9
    names = [squeeze(side[0]) for side in (p, g)]  # y = ... is accepted for f(x) = ...
    functions = all(NAME.fullmatch(n) for n in names) and "(" in names[0] + names[1] and {"y", "f(x)"} & set(names)
    worded = any(has_words(side) for side in p + g)
    if (names[0] == names[1] or functions) and g_signs == p_signs == ["="]:
        same = _same(p[1], g[1])
        if same is not False or worded:
            return same
    return not worded and _same_equation(p_signs[0], p, g_signs[0], g)


def _same_equation(p_sign: str, pred: list[str], g_sign: str, gold: list[str]) -> bool | None:
    """`left sign right` on both sides: equivalent if left - right differ by a constant factor."""
    try:
        a, b = (evaluate(f"({left})-({right})") for left, right in (pred, gold))
    except CANNOT_EVALUATE:
        return last_resort(f"{pred[0]} {p_sign} {pred[1]}", f"{gold[0]} {g_sign} {gold[1]}")
    factor = common_factor(a, b)
    if factor is None or g_sign in ("=", r"\neq"):
        return factor is not None
    return factor.real > 0 if p_sign == g_sign else factor.real < 0


# --------------------------------------------------------------------------- answers of one part

_YES_NO = {"yes": {"yes"}, "no": {"no"}, "true": {"true", "yes"}, "false": {"false", "no"}}  # gold -> its answers
_EMPTY = {"none", "nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset"}
_RATIO = re.compile(r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+)(.*)")


def _same_scalar(pred: str, gold: str, digits: int) -> bool | None:
    """Two scalars: ratios and times, words, or quantities."""
    plain = [re.sub(r"\s*\\text\{\s*to\s*\}\s*|(?<=\d) to (?=\d)", ":", text) for text in (pred, gold)]
    p_ratio, g_ratio = (_RATIO.fullmatch(text) for text in plain)
    if p_ratio and g_ratio:
        return _same_ratio(*p_ratio.groups(), *g_ratio.groups())
    if g_ratio and not g_ratio[2] and plain[1].count(":") == 1:
        return _same_expression(pred, _quotient(plain[1]))
    if p_ratio and not p_ratio[2] and plain[0].count(":") == 1:
        return not gold.isdigit() and _same_expression(_quotient(plain[0]), gold)
    formulas = [re.sub("[_{} ]", "", unwrap_text(text)) for text in (pred, gold)]
    if formulas[0] == formulas[1] and re.fullmatch(r"[A-Z][A-Za-z0-9]*", formulas[1]):
        return True  # a chemical formula, H_2O
    words = [as_words(text) for text in (pred, gold)]
    if words[0] and words[0] == words[1] and _symbols(pred) == _symbols(gold):
        return True
    if words[1] in _YES_NO:
        return words[0] in _YES_NO[words[1]]
    if _says_empty(gold):
        return _says_empty(pred)
    return _same_quantity(pred, gold, digits)


def _says_empty(text: str) -> bool:
    return as_words(text).replace(" ", "").strip("\\") in _EMPTY


def _symbols(text: str) -> str:
    """The characters that `as_words` drops and that carry meaning in an expression."""
    return re.sub(r"[\w\s.,;:!?'\"(){}\[\]$]|\\text", "", text) if has_words(text) else text


def _quotient(ratio: str) -> str:
    return "({})/({})".format(*ratio.split(":"))


def _same_ratio(pred: str, p_unit: str, gold: str, g_unit: str) -> bool:
    """3:4 is 6:8, unless the gold may be a time of day or a ratio that was to be kept."""
    p, g = ([Fraction(n) for n in text.split(":")] for text in (pred, gold))
    units = {unit_name(unwrap_text(unit)) for unit in (p_unit, g_unit)}
    if len(p) != len(g) or None in units or len(units - {""}) > 1:
        return False
    lowest = bool(g[1]) and Fraction(g[0], g[1]).numerator == g[0]
    if re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?", gold) and not lowest:
        return p == g
    return all(p[i] * g[0] == g[i] * p[0] for i in range(len(p)))


def _same_quantity(pred: str, gold: str, digits: int) -> bool | None:
    """Numbers and expressions with units: the same unit, or one of them has none."""
    (p, p_unit), (g, g_unit) = split_unit(pred), split_unit(gold)
    units = p_unit + g_unit
    if units and (len(units) < 3 or not re.search("[A-Za-z]{2}", f"{p_unit} {g_unit}")) and _same_products(pred, gold):
        return True  # 3 m may be three times m
    if p_unit and g_unit and p_unit != g_unit:
        return False
    p, g = plain_number(p), plain_number(g)
    based = [re.fullmatch(r"\(?(\d[0-9A-Fa-f]*)\)?_\{?(?:\\text\{)?(\w+?)\}*", body) for body in (p, g)]
    if any(based):  # 1011_2: digits and base, the base may be left out
        p_digits, g_digits = (b[1].upper() if b else body.upper() for b, body in zip(based, (p, g), strict=True))
        p_base, g_base = (b and plain_number(b[2]) for b in based)
        return p_digits == g_digits and (p_base in (None, g_base) or (p_base, g_base) == ("10", None))
    if has_words(p) or has_words(g):
        return as_words(pred) == as_words(gold)
    same = _same_expression(p, g, digits)
    if {p_unit, g_unit} != {"", "percent"}:
        return same
    if same:  # the sign may be dropped from a number that exceeds 1
        try:
            value = evaluate(g)[0]
        except CANNOT_EVALUATE:
            return False
        return isinstance(value, Fraction) and (abs(value) > 1 or not value)
    return _same_expression(*(f"({body})/100" if unit else body for body, unit in ((p, p_unit), (g, g_unit))))


def _same_products(pred: str, gold: str) -> bool:
    """Whether two texts are the same where a unit of one letter is a variable."""
    try:
        return same_values(*(evaluate(unwrap_text(text)) for text in (pred, gold)))
    except (TooBig, *CANNOT_EVALUATE):
        return False


# --------------------------------------------------------------------------- expressions and decimals


def _same_expression(pred: str, gold: str, digits: int = DIGITS) -> bool | None:
    """Two expressions without lists, relations or units."""
    if "\\infty" in gold or "\\infty" in pred:
        return gold.replace(" ", "") == pred.replace(" ", "")
    try:
        b = evaluate(gold)
    except TooBig as error:
        raise GoldTooBig(str(error)) from error
    except CANNOT_EVALUATE:
        return last_resort(pred, gold)
    try:
        a = evaluate(pred)
    except CANNOT_EVALUATE:
        return last_resort(pred, gold)
    return same_values(a, b) or (len(a) == len(b) == 1 and _same_rounded(a[0], b[0], pred, gold, digits))


def _same_rounded(p_value, g_value, pred: str, gold: str, digits: int) -> bool:
    """Whether one of the two is a decimal that the other one rounds to.

    A decimal gold counts at its own precision, of two decimals or more, and for a prediction that is itself a decimal
    of three significant digits or more: 0.254 is not 0.25. A decimal of `digits` significant digits counts as exact.
    """
    p_decimal, g_decimal = _DECIMAL.fullmatch(pred), _DECIMAL.fullmatch(gold)
    if g_decimal and _significant(gold) >= FLOAT_DIGITS:
        return not _differ(p_value, g_value)
    if g_decimal:
        enough = len(g_decimal[1]) >= 2 and (not p_decimal or _significant(gold) >= 3)
        return enough and _rounds_to(p_value, g_value, len(g_decimal[1]))
    return bool(p_decimal) and _significant(pred) >= digits and _rounds_to(g_value, p_value, len(p_decimal[1]))


def _differ(value, target: Fraction) -> bool:
    """By more than the rounding of a float."""
    value = value if isinstance(value, Fraction) else value.real if abs(value.imag) < 1e-40 else float("inf")
    return abs(value - target) > abs(target) * 1e-14


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
