r"""Numbers as people write them: with units, currencies, thousands separators, or as a word.

    split_unit(r"5.4\text{ cm}^2")      # ("5.4", "cm^2")
    split_unit(r"3 kg\cdot m/s")        # ("3", "kg m/s")
    plain_number("1,250")               # "1250"

Texts are those of normalize.clean.
"""

import re
from collections import Counter
from functools import lru_cache

from answers.calculator import FUNCTIONS
from answers.normalize import as_words

THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d ])")
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
    K: kelvin; A: ampere amp; eV: electronvolt; nm: nanometer nanometre; mA: ; kN: ; mN: ; mV: ; kV: ; mW: ; MW: ; mJ: ;
    MJ: ; ms: millisecond; nC: ; nF: ; pF: ; kohm: ; Mohm: ; microm: micrometer micrometre micron; acre: ; gal: gallon;
    KB: kilobyte; MB: megabyte; GB: gigabyte; ohm: ; unit:
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
    hundredths thousandths factorial choose inverse below above negative out
    """.split()
)
_UNIT_POWERS = dict.fromkeys("square sq sq. squared".split(), "2") | dict.fromkeys("cubic cu cu. cubed".split(), "3")
_SYMBOLS = set("A eV nm mA kN mN mV kV mW MW mJ MJ ms nC nF pF".split())  # units after a plain number, else variables
_RATES = {"m/s", "g/L", "J/K", "N/m", "N/C", "V/m"}  # of single letters, which might be variables
# Symbols beside those of _UNIT_TABLE, which go first: min, ft and cd are no multiples.
_SI = re.compile(r"(?:micro|[pnmcdkMGTh])?(?:mol|Hz|Pa|eV|Wb|Wh|Bq|Sv|cal|ohm|lx|lm|[mgsAKNJWCVFTHL])|r")
_POWER_OF_TEN = r"(?: ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{ ?[+-]?\d{1,3} ?\}|\d))?"
_MEASURE = re.compile(rf"(?P<number>[+-]?\d[\d.,]*{_POWER_OF_TEN})(?P<space> ?)(?P<unit>[A-Za-z\\].{{0,80}})")
_UNIT_TOKEN = re.compile(
    r"(?P<symbol>[A-Za-z]+)(?: ?\^ ?(?:\{ ?(?P<braced>-?\d) ?\}|(?P<power>\d))|(?<=m)(?P<digit>[23]))?"
    r"|(?P<slash>/)|(?P<bracket>[()])|\\cdot|\*| "
)
_DIMENSIONS = {"old", "tall", "long", "wide", "high", "deep", "away", "apart", "total"}
_UNIT_TAIL = re.compile(
    r"(?:\\text\{\s*(?P<text>[^{}]*)\}|(?:(?<=[\d\s}])|(?<=\\pi))(?P<bare>[A-Za-z][A-Za-z./ ]*))"
    r"\s*(?:\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?$"
)


@lru_cache(maxsize=4096)
def plain_number(text: str) -> str:
    """Without thousands separators; a number word as digits."""
    text = THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    words = as_words(text)
    return str(_NUMBER_WORDS.index(words)) if words in _NUMBER_WORDS else text


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


def _powers(unit: str) -> Counter[str] | None:
    r"""The symbols of kg\cdot m/s, mol L^{-1} or J/(kg K), each with its power; None if these are no units."""
    unit = re.sub(r"\\frac ?\{([^{}]*)\} ?\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1/(\2)", unit)
    unit = re.sub(r"(?:\{ ?\} ?)?\^\\circ ?C(?![a-z])", "celsius", unit).replace(r"\Omega", "ohm")
    unit = re.sub(r"\\mu ?", "micro", unit).strip()
    powers: Counter[str] = Counter()
    end, sign = 0, 1
    for token in _UNIT_TOKEN.finditer(unit):
        if token.start() != end or (token["bracket"] and sign > 0):
            return None
        end = token.end()
        if token["slash"]:
            sign = -1  # for all that follows: J/kg K is J/(kg K)
        elif symbol := token["symbol"]:
            si = re.sub("^u(?=[A-Zglms]$)", "micro", symbol)
            name = _UNITS.get(symbol) or (si if _SI.fullmatch(si) else len(symbol) > 1 and _known_unit(symbol))
            if not name:
                return None
            powers[name] += sign * int(token["braced"] or token["power"] or token["digit"] or 1)
    return powers if powers and end == len(unit) else None


def _compound(text: str) -> tuple[str, str] | None:
    """(number, unit) where units are multiplied, divided or prefixed. None for anything else, and where the letters may
    as well be variables: 3mn, 2 m s."""
    measure = _MEASURE.fullmatch(text)
    if measure is None:
        return None
    unit = re.sub(r"\\text\{([^{}]*)\}", r"\1", measure["unit"])
    powers = _powers(unit)
    if powers is None:
        return None
    letters = "".join(powers)
    if "micro" in letters and not measure["space"]:  # 2\mu g, of friction
        return None
    apart = bool(measure["space"]) or measure["unit"].startswith(r"\text")
    if len(powers) == 1 and min(powers.values()) > 0:  # those of the table, of one letter or a power, are split_unit's
        prefixed = len(letters) > 1 and letters not in _UNITS.values()
        mixed = len(letters) > 1 and not letters.islower()  # 5mA, 5kV; 5nm may be a product
        sure = (prefixed and (apart or len(letters) > 2 or mixed)) or (letters in _SYMBOLS and mixed)
    else:
        joined, divided = r"\cdot" in unit, "/" in unit or min(powers.values()) < 0
        sure = len(letters) > len(powers) or (joined and not letters.islower()) or (apart and (joined or divided))
        sure = sure or re.sub(r"\^\{?\d\}?", "", unit) in _RATES
    if not sure:
        return None
    over = [name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()) if power > 0]
    under = [name if power == -1 else f"{name}^{-power}" for name, power in sorted(powers.items()) if power < 0]
    if not over:
        return measure["number"], " ".join(f"{name}^{power}" for name, power in sorted(powers.items()))
    return measure["number"], "/".join([" ".join(over), *under])


@lru_cache(maxsize=4096)
def split_unit(text: str) -> tuple[str, str]:
    """(body, unit), the unit by its canonical name, "" where there is none."""
    if compound := _compound(text):
        return compound
    unit = ""
    for sign, name in _CURRENCY.items():
        if text.startswith((sign, "-" + sign)):
            text, unit = text.replace(sign, "", 1).strip(), name
        elif text.endswith(sign):
            text, unit = text[:-1].strip(), name
    degrees = re.search(r"(?<=.)\^\\circ\s*(?:\\text\{\s*([CFT])\s*\}|([CFT]))?$", text)  # T: a bearing
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
    name = re.sub(r" of [A-Za-z ]+$", "", name)  # cups of feed
    if tail["bare"]:  # only if it cannot be a product of variables
        spaced = text[tail.start() - 1] == " "
        for word in name.replace("/", " ").split():
            known = _known_unit(word) is not None or word.lower() in _UNIT_POWERS
            is_rate = "/" in name and (spaced or name in _RATES or (known and len(name) > 3))
            if word in _SYMBOLS and not (spaced and re.fullmatch(r"[+-]?\d[\d.,]*", body)):
                return text, unit
            single = len(word) == 1 and not (is_rate or (spaced and word == name))
            if single or not (known or (spaced and len(word) > 2)):
                return text, unit
    first, _, rest = name.partition(" ")
    if first.lower() in _SCALES and not tail["power"]:
        more = unit_name(rest) if rest else unit
        return (text, unit) if more is None else (f"({body})*10^{_SCALES[first.lower()]}", more)
    canonical = unit_name(name, tail["power"])
    return (text, unit) if canonical is None else (body, unit or canonical)
