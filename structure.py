r"""What an answer is made of: its kind and its parts, or its number and its unit.

    structure(r"x=1, y=2")              # ("list", ["x=1", "y=2"])
    structure(r"[0,\infty)")            # ("[)", ["0", r"\infty"])
    split_unit(r"5.4\text{ cm}^2")      # ("5.4", "cm^2")

Texts are those of normalisation.clean. equality.py compares what is found here, part by part.
"""

import re
from functools import lru_cache

from calculator import FUNCTIONS, TooBig
from normalisation import ROW, as_words, closing_bracket, split, squeeze, strip_braces, unwrap_text

MAX_ITEMS = 64  # elements of a list, set, tuple or matrix

_RELATIONS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx"}
FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_VARIABLE = re.compile(r"(?!\\pi$)\\?[A-Za-z]+(?:_\{?\w\}?)?")
_QUANTITY = (  # x, a_1, f(2), |AB|, \angle ABC, \text{area}, but not the curve xy = 4
    r"(?!\\pi$|[xyz]{2,}$)(?:\\?[A-Za-z]+|\\text\{[^{}]*\})(?:_(?:\{[^{}]*\}|\w+))?'?(?:\^\{-1\})?(?:\([\w\s,\\]*\))?|"
    r"\|[^|]+\||m?\\angle [A-Z]+|\\frac\{d\w?\}\{d\w\}|\\overline\{[A-Z]+\}"
)
NAME = re.compile(rf"{_QUANTITY}|\(\\?\w+(?:\s*,\s*\\?\w+)+\s*\)")  # may stand to the left of "= answer"
_TERM = rf"(?![xyz]+(?![\w']))(?:{_QUANTITY})"
_COMBINED = re.compile(  # so may these, if the answer is a number; x + y = 5 is a line
    rf"{_TERM}(?:\s*(?:[/+-]|\\cdot|\\times)\s*{_TERM})+|\\frac\{{{_TERM}\}}\{{{_TERM}\}}|"
    rf"(?:{_QUANTITY})(?:\s*:\s*(?:{_QUANTITY}))+"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)
_LIST_SIGNS = {",", ";", "&", "and", "or"}
_BOUNDED = ("()", "[]", "[)", "(]")
_REALS = (r"\mathbb R", r"\R", "all real numbers", "all reals")


def structure(text: str) -> tuple[str, list]:
    """What kind of answer this is, and its parts.

    ("list" | "set" | "union" | "()" | "[]" | "[)" | "(]", elements), ("relation", [parts, signs]),
    ("matrix", rows) or ("scalar", [text]).
    """
    text = strip_braces(text.strip())
    if any(sign in text for sign in _LIST_SIGNS) and not _is_one_number(text):
        parts, signs = split(text, _LIST_SIGNS)
        if len(parts := [p for p in parts if p]) > 1:
            both = _intersection(*parts) if signs == ["and"] else None
            return both or _elements("list", parts)
    parts, signs = split(text, _RELATIONS)
    if signs and all(parts):
        return "relation", [parts, signs]
    parts, _ = split(text, {r"\cup"})
    if len(parts) > 1:
        return "union", parts
    if matrix := _MATRIX.fullmatch(text):
        return "matrix", [[c.strip() for c in row.split("&")] for row in matrix[2].split(ROW) if row.strip()]
    bracketed = re.fullmatch(r"(\\\{|\\langle|[(\[])(.*?)(\\\}|\\rangle|[)\]])", text, re.DOTALL)
    if bracketed and closing_bracket(text, 0) == len(text) - 1:
        opening, inner, closing = bracketed[1], bracketed[2].strip(), bracketed[3]
        parts = [p for p in split(inner, {",", ";"})[0] if p]
        if opening == r"\{":
            builder = re.fullmatch(r"(\w+)\s*(?:\\in\s*\\mathbb\{R\})?\s*[|:](.*)", inner)
            if builder and len(parts) == 1:
                return structure(builder[2])
            return _elements("list" if any(structure(p)[0] == "relation" for p in parts) else "set", parts)
        if len(parts) == 1 and opening + closing in ("()", "[]"):
            return structure(inner)
        vector = opening == r"\langle" or (opening + closing == "[]" and len(parts) > 2)  # no interval
        return _elements("()" if vector else opening + closing, parts)
    expanded = _plus_minus(text)
    return ("list", expanded) if len(expanded) > 1 else ("scalar", [text])


def _is_one_number(text: str) -> bool:
    """Whether the commas of a text are all between thousands."""
    body = split_unit(text.lstrip("-+"))[0]
    number = _THOUSANDS.match(body)
    return number is not None and not any(sign in body[number.end() :] for sign in _LIST_SIGNS)


def _elements(kind: str, parts: list[str]) -> tuple[str, list]:
    if len(parts) > MAX_ITEMS:
        raise TooBig("too many elements")
    return kind, [q for p in parts for q in _plus_minus(p)] if kind in ("list", "set") else parts


def _plus_minus(text: str) -> list[str]:
    """[text], or the two readings of its plus-minus signs."""
    if r"\pm" not in text and r"\mp" not in text:
        return [text]
    upper = re.sub(r"(^|[=(,])\s*\+", r"\1", text.replace(r"\pm", "+").replace(r"\mp", "-"))
    return [upper, text.replace(r"\pm", "-").replace(r"\mp", "+")]


def _intersection(first: str, second: str) -> tuple[str, list] | None:
    """The relation 2 < x < 5 that `x > 2 and x < 5` means."""
    bounds = [intervals(*structure(part)) for part in (first, second)]
    if not all(bounds) or bounds[0][0] is None or bounds[0][0] != bounds[1][0]:
        return None
    lower_first = sorted(bounds[0][1] + bounds[1][1], key=lambda piece: piece.startswith(r"(-\infty"))
    low, middle, high = "".join(lower_first).partition(r",\infty)(-\infty,")
    signs = [r"\leq" if bracket in "[]" else "<" for bracket in (low[0], high[-1:])]
    return ("relation", [[low[1:], bounds[0][0], high[:-1]], signs]) if middle else None


def intervals(kind: str, parts: list) -> tuple[str | None, list[str]] | None:
    """An answer as (its variable, intervals) if it is made of intervals and simple inequalities."""
    if kind in ("list", "union"):
        inner = [intervals(*structure(p)) for p in parts]
        if not all(inner) or len({name for name, _ in inner}) != 1:
            return None
        return inner[0][0], [piece for _, pieces in inner for piece in pieces]
    if kind in _BOUNDED and len(parts) == 2:
        return None, [f"{kind[0]}{parts[0]},{parts[1]}{kind[1]}"]
    if kind == "scalar" and squeeze(unwrap_text(parts[0])) in _REALS:
        return None, [r"(-\infty,\infty)"]
    if kind != "relation":
        return None
    sides, signs = parts
    if signs == [r"\in"] and _VARIABLE.fullmatch(sides[0]):
        inner = intervals(*structure(sides[1]))
        return (sides[0], inner[1]) if inner else None
    if signs == [r"\neq"] and _VARIABLE.fullmatch(sides[0]):
        return sides[0], [rf"(-\infty,{sides[1]})", rf"({sides[1]},\infty)"]
    if set(signs) <= {">", r"\geq"}:
        sides, signs = sides[::-1], [FLIP[s] for s in signs[::-1]]
    at = next((i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side)), None)
    if not set(signs) <= {"<", r"\leq"} or at is None or len(sides) > 3 or (len(sides) == 3 and at != 1):
        return None
    low = f"{'(' if signs[at - 1] == '<' else '['}{sides[at - 1]}" if at else r"(-\infty"
    high = f"{sides[at + 1]}{')' if signs[at] == '<' else ']'}" if at < len(signs) else r"\infty)"
    return sides[at], [f"{low},{high}"]


def assignments(kind: str, parts: list) -> list[tuple[str, str]] | None:
    """[(name, value), ...] of `x = 1, y = 2`, `x = 2, -3` or `(x,y) = (1,2)`; None if it is nothing of the kind."""
    pairs = []
    for part in parts if kind == "list" else []:
        inner, data = structure(part)
        if inner == "relation" and data[1] == ["="] and NAME.fullmatch(data[0][0]):
            pairs.append((squeeze(data[0][0]), data[0][1]))
        elif inner != "relation" and pairs:
            pairs.append((pairs[-1][0], part))
        else:
            return None
    if kind == "relation" and parts[1] in (["="], [r"\in"]) and NAME.fullmatch(parts[0][0]):
        inner, data = structure(parts[0][1])
        pairs = [(squeeze(parts[0][0]), v) for v in (data if inner in ("list", "set") else [parts[0][1]])]
    return [pair for name, value in pairs for pair in _coordinates(name, value)] or None


def _coordinates(name: str, value: str) -> list[tuple[str, str]]:
    """`(x,y) = (1,2)` as x = 1, y = 2."""
    names, (kind, values) = name.strip("()").split(","), structure(value)
    is_point = name.startswith("(") and kind == "()" and len(names) == len(values)
    return list(zip(names, values, strict=True)) if is_point else [(name, value)]


def solutions(pairs: list[tuple[str, str]], by_name: bool = False) -> tuple[list[str], list[list[str]]]:
    """(names, values of each solution): `p = 5, q = 2; p = 7, q = 2` are two solutions for p and q.

    Names that follow each other in the alphabet stand in its order, others as they were written, if not `by_name`.
    """
    written = [name for name, _ in pairs]
    names = list(dict.fromkeys(written))
    if written != names * (len(written) // len(names)):  # x = 1, 3; y = 2, 4
        return sorted(written), [[f"({name},{value})"] for name, value in pairs]
    rows = [pairs[i : i + len(names)] for i in range(0, len(pairs), len(names))]
    initials = {ord(name.strip("\\")[0]) for name in names}
    if by_name or max(initials) - min(initials) < len(initials):
        names, rows = sorted(names), [sorted(row) for row in rows]
    return names, [[value for _, value in row] for row in rows]


def values_of(sides: list[str], signs: list[str]) -> list[str]:
    """What a chain of equations says its value is: every side but the name; [] if it names none."""
    if set(signs) - {"=", r"\approx", r"\in"}:
        return []
    if NAME.fullmatch(sides[0]):
        return sides[1:]
    if NAME.fullmatch(sides[-1]):
        return sides[:-1]
    values = sides[1:] if _COMBINED.fullmatch(sides[0]) else sides
    return [] if any(re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", split_unit(v)[0])) for v in values) else values


def is_named(side: str) -> bool:
    """Whether a side of an equation says whose value the other is, and not a value."""
    return bool(NAME.fullmatch(side) or _COMBINED.fullmatch(side))


# --------------------------------------------------------------------------- numbers and units

_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d ])")
_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""".split()
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}
# canonical: other spellings (a plural s is taken off before the look-up)
_UNIT_TABLE = """
    mm: millimeter millimetre; cm: centimeter centimetre; dm: decimeter; m: meter metre; km: kilometer kilometre;
    in: inch; ft: foot feet; yd: yard; mi: mile; mg: milligram; g: gram gm; kg: kilogram; lb: ; oz: ounce; t: ton tonne;
    s: second sec; min: minute; h: hour hr; day: ; wk: week; yr: year; ml: milliliter millilitre mL;
    L: liter litre l; degree: deg; rad: radian; dollar: usd buck; cent: ; pound: gbp; euro: eur; yen: jpy;
    rupee: rs inr; percent: percentage pct; J: joule; N: newton; W: watt; V: volt; Hz: hertz; Pa: pascal;
    mol: mole; celsius: centigrade; mi/h: mph; km/h: kph kmh; am: a.m; pm: p.m; kJ: kilojoule; kW: kilowatt;
    K: kelvin; acre: ; gal: gallon; KB: kilobyte; MB: megabyte; GB: gigabyte; ohm: ; unit:
"""
_UNITS = {}
for _entry in _UNIT_TABLE.split(";"):
    _canonical, _, _names = _entry.strip().partition(":")
    _UNITS |= dict.fromkeys([_canonical, *_names.split()], _canonical)
_UNITS["unit"] = ""
_NOT_UNITS = set(
    """
    and or not to than more less minus plus times over half is are was no yes if only of from between about
    approximately least most other else but wrong correct dozen one two three four five six ten
    hundred thousand million billion trillion mod base halves thirds fourths quarters fifths sixths eighths tenths
    hundredths thousandths factorial choose inverse below above negative
    """.split()
)
_UNIT_POWERS = dict.fromkeys("square sq sq. squared".split(), "2") | dict.fromkeys("cubic cu cu. cubed".split(), "3")
_DIMENSIONS = {"old", "tall", "long", "wide", "high", "deep", "away", "apart", "total"}
_UNIT_TAIL = re.compile(
    r"(?:\\text\{\s*(?P<text>[^{}]*)\}|(?:(?<=[\d\s}])|(?<=\\pi))(?P<bare>[A-Za-z][A-Za-z./ ]*))"
    r"\s*(?:\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?$"
)


def _known_unit(word: str) -> str | None:
    lower = word.rstrip(".").lower()
    for name in (word, word.rstrip("."), lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in _UNITS:
            return _UNITS[name]
    return None


def unit_name(text: str, power: str | None = None) -> str | None:
    """One canonical name for a unit ("square centimeters" -> cm^2); None if these are no units."""
    names = []
    for word in text.replace("/", " / ").replace(" per ", " / ").split():
        if word in _DIMENSIONS:
            continue
        if word.lower() in _UNIT_POWERS:
            power = _UNIT_POWERS[word.lower()]
        elif word.lower() in _NOT_UNITS or not re.fullmatch(r"[A-Za-z][A-Za-z.'-]*|/", word):
            return None
        else:
            known = _known_unit(word)
            names.append(word.rstrip(".").lower().removesuffix("s") if known is None else known)
    if len(names) > 5 or (power and not names):
        return None
    name = " ".join(filter(None, names)).replace(" / ", "/")
    return f"{name}^{power}" if power and name and power != "1" else name


@lru_cache(maxsize=4096)
def split_unit(text: str) -> tuple[str, str]:
    """(body, unit): "5.4 \\text{ cm}^2" -> ("5.4", "cm^2"); the unit is "" where there is none."""
    unit = ""
    for sign, name in _CURRENCY.items():
        if text.startswith((sign, "-" + sign)):
            text, unit = text.replace(sign, "", 1).strip(), name
        elif text.endswith(sign):
            text, unit = text[:-1].strip(), name
    degrees = re.search(r"(?<=.)\^\\circ\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?$", text)
    if degrees and not re.search(rf"\\(?:{FUNCTIONS})", text):
        scale = {"C": "celsius", "F": "fahrenheit"}.get(degrees[1] or degrees[2], "degree")
        return text[: degrees.start()].strip(), scale
    if text.endswith("%"):
        return text[:-1].strip(), "percent"
    tail = _UNIT_TAIL.search(text)
    body = text[: tail.start()].strip() if tail else ""
    if not body or body[-1] in "+-*/^=(_" or (re.search(r"\\[A-Za-z]+$", body) and not body.endswith(r"\pi")):
        return text, unit
    name = (tail["text"] if tail["bare"] is None else tail["bare"]).strip()
    if tail["bare"]:  # only if it cannot be a product of variables
        spaced = text[tail.start() - 1] == " "
        for word in name.replace("/", " ").split():
            known = _known_unit(word) is not None or word.lower() in _UNIT_POWERS
            single = len(word) == 1 and not (spaced and (word == name or "/" in name))
            if single or not (known or (spaced and len(word) > 2)):
                return text, unit
    first, _, rest = name.partition(" ")
    if first.lower() in _SCALES and not tail["power"]:
        more = unit_name(rest) if rest else unit
        return (text, unit) if more is None else (f"({body})*10^{_SCALES[first.lower()]}", more)
    canonical = unit_name(name, tail["power"])
    return (text, unit) if canonical is None else (body, unit or canonical)


@lru_cache(maxsize=4096)
def plain_number(text: str) -> str:
    """Thousands separators and number words away."""
    text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    words = as_words(text)
    return str(_NUMBER_WORDS.index(words)) if words in _NUMBER_WORDS else text
