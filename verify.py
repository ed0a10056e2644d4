r"""Boxed answers, verdicts, answer equality and rewards: every label rests on this file.

    from verify import extract_boxed, parse_verdict, is_equal, verify_many, spark_reward
    is_equal(r"\dfrac12", "0.5")                        # True
    python verify.py '1\frac{1}{2}' '3/2'               # True, and the rule that decided

Read from top to bottom: extraction, verdicts, normalisation, a small calculator, the rules of
equality, the sympy worker, the pool, the rewards. Departures from plain math-verify
(https://github.com/huggingface/Math-Verify), which is the last resort here and not the first:

1. Lists, tuples, sets, intervals, relations, units and words are taken apart in this file, so
   (1,2) is not {1,2}, [1,2) is not (1,2], 2x = 10 is not 10, and `listen` is not `silent`.
2. Numbers are exact fractions. A decimal stands for an exact value only where the gold itself is a
   decimal, and then at the gold's own precision: pi equals a gold 3.14, 3.14 never equals pi.
3. Expressions are evaluated at fixed random points. Rational ones are decided exactly, different
   ones are told apart in microseconds, and only agreement in floating point goes to a worker,
   which decides it with 60 digits; what the calculator cannot read goes to math-verify.
4. Workers are killed when they overrun. No text of a model is ever evaluated as code: sympy's
   `parse_expr` (which calls eval) is never reached, only the LaTeX grammar of latex2sympy2.
"""

import atexit
import cmath
import json
import logging
import os
import re
import selectors
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice

logger = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds of wall time for one comparison in a worker
MAX_CHARS = 2000  # longer answers are equal only if identical
MATH_VERIFY_CHARS = 400  # its grammar takes a millisecond for a few characters
MAX_DEPTH = 50  # nested groups
MAX_ITEMS = 64  # elements of a list, set, tuple or matrix
MAX_BITS = 8192  # size of an exact number (2500 digits)
WORKER_MEMORY = 2 << 30  # bytes of address space
GRACE = 0.5  # seconds beyond the limit after which the parent kills the worker
EARLY = 0.2  # a worker that dies within these seconds was hardly killed by its item
CACHE_BYTES = 16 << 20


@dataclass(frozen=True)
class Result:
    """A verdict and why: True, False, or None where the pair is unscorable or hit a limit."""

    verdict: bool | None
    reason: str


class _Unreadable(Exception):
    """The calculator has no rule for this text: somebody else must decide."""


class _TooBig(Exception):
    """The text asks for a number or a structure beyond the limits."""


class _Overrun(BaseException):
    """Raised by the alarm in a worker; no `except Exception` of sympy's may stop it."""


class _GoldTooBig(_TooBig):
    """It is the gold that does: the pair is unscorable unless identical."""


# --------------------------------------------------------------------------- extraction

_BRACE_TOKENS = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{?|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*([^\s{}$\\]+)")
_FINAL_ANSWER = re.compile(r"(?:####|answer\s+is|answer\s*:)[ \t:]*([^\n]+)", re.IGNORECASE)


def extract_boxed(text: str, lenient: bool = False) -> str | None:
    r"""Content of the last balanced `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`).

    Args:
        text: a whole completion, of any length (one pass).
        lenient: for evaluation only. Where there is no closed box, fall back to an unclosed last
            box, then to the last "answer is ..." or "#### ...", then to the last number.

    Returns:
        The stripped content; None where the box is missing, unclosed or empty.
    """
    last_start, last, unclosed = -1, None, None
    stack = []  # start of the content for a box, None for any other brace
    for token in _BRACE_TOKENS.finditer(text):
        symbol = token.group()
        if symbol.endswith("{") and len(symbol) > 2:
            stack.append(token.end())
            unclosed = token.end()
        elif symbol == "{":
            stack.append(None)
        elif symbol == "}" and stack:
            start = stack.pop()
            if start is not None and start > last_start:
                last_start, last = start, text[start : token.start()]
        elif len(symbol) > 2 and (bare := _BARE_BOX.match(text, token.start())):
            last_start, last = bare.start(1), bare.group(1).rstrip(".,;:")
    content = (last or "").strip() or None
    if content is not None or not lenient:
        return content
    if unclosed is not None and (rest := text[unclosed:].strip().rstrip("$.} ")):
        return rest
    if found := list(_FINAL_ANSWER.finditer(text)):
        return found[-1].group(1).strip().strip("*$. ") or None
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1].rstrip(",") if numbers else None


# --------------------------------------------------------------------------- verdicts

_VERDICT = re.compile(
    r"(?:(?:final\s+)?(?:answer|verdict|option|choice|response|solution)\s*(?:is\b|:)?\s*)?"
    r"[(\[]?\s*(yes|no|a|b)\s*[)\]]?",
    re.IGNORECASE,
)
_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|md|up)?|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox)"


def parse_verdict(text: str) -> str | None:
    r"""A judge's verdict: "Yes", "No", "A", "B", or None for anything else.

    `text` is a completion, whose last box counts, or the bare verdict itself. Case and the usual
    decoration are accepted (`\text{Yes}`, `Yes.`, `**No**`, `(A)`, `Answer: B`); a sentence, both
    verdicts, or an unclosed box are not.
    """
    if "\\boxed" in text or "\\fbox" in text:
        text = extract_boxed(text) or ""
    if len(text) > 200:
        return None
    text = re.sub(_TEXT + r"\s*(?=\{)", "", text)
    text = re.sub(r"\\[,;!]|\\[()\[\]]|[{}$*_`\"'.!\u200b]", " ", text).strip()
    found = _VERDICT.fullmatch(text)
    return found.group(1).capitalize() if found else None


# --------------------------------------------------------------------------- normalisation

_UNICODE = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    **dict.fromkeys("⋅·∙•", r"\cdot "),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("“”„‟", '"'),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("，、", ","),
    "×": r"\times ", "✕": r"\times ", "÷": "/", "√": r"\sqrt ", "∞": r"\infty ", "±": r"\pm ",
    "∓": r"\mp ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "º": r"^\circ ", "∠": r"\angle ", "ℝ": r"\mathbb{R}", "∣": "|", "。": ".",
    "⟨": r"\langle ", "⟩": r"\rangle ", "∶": ":", "％": "%", "￥": "¥", "￡": "£", "∆": r"\Delta ",
}  # fmt: skip
for _c in "αβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΦΨΩ":
    _name = unicodedata.name(_c).split()[-1].lower().replace("lamda", "lambda")
    _UNICODE[_c] = "\\" + (_name if _c.islower() else _name.capitalize()) + " "
_UNICODE_TABLE = str.maketrans(_UNICODE)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|ln|lg|log|exp|sqrt|abs|gcd|lcm"
# One pass each, in this order. Spacing first: `\,` may be a thousands separator or nothing.
_LATEX_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r",\\!|\\!,", ","),
        (r"\\[()\[\]](?!\d*(?:pt|em|ex|mm)\])", " "),
        (
            r"\\(?:!|left(?![a-z])|right(?![a-z])|[bB]igg?[lrm]?(?![a-z])|displaystyle|textstyle|limits)",
            "",
        ),
        (r"\\(?:[,;:> ]|q?quad(?![a-z])|thinspace|hspace\{[^{}]*\})", " "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (
            r"\\(?:mathbf|boldsymbol|bm|vec|overrightarrow)\s*\{\s*(\\?[a-zA-Z]+|\d)\s*\}(?<![a-z]{2}\})",
            r"\1 ",
        ),
        (_TEXT + r"\s*(?=\{)|\\operatorname\*?\s*(?=\{)", r"\\text"),
        (r"\\(?:rm|bf|it|cal)(?![a-z])|\\(?:text)?color\s*\{\w+\}|\\underline(?![a-z])", " "),
        (
            r"(?<=.)[,;]?\s*\(?\s*(?:\\text\{\s*(?:where|for|with)\s*\})?\s*[a-zA-Z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?[+*^]*\s*\)?$",
            "",
        ),
        (r"\\text\{\s*(" + _FUNCTIONS + r")\s*\}", r"\\\1 "),
        (r"\\text\{\s*([:;,.%$]|\\[$%])?\s*\}", r"\1"),
        (r"\\frac\s*\{\\text\{([^{}]*)\}\}\s*\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}"),
        (
            r"\\overline\s*\{([A-Z]{2,})\}|\\(?:hat|widehat)\s*\{?\s*\\?([a-z])(?:math)?\s*\}?",
            r"\1\2 ",
        ),
        (r"\\[lr]?vert(?![a-z])|\\mid(?![a-z])", "|"),
        (r"\\l(?:brace|curly)(?![a-z])", r"\\{"),
        (r"\\r(?:brace|curly)(?![a-z])", r"\\}"),
        (r"\\lbrack(?![a-z])", "["),
        (r"\\rbrack(?![a-z])", "]"),
        (r"\\le(?:qslant|qq)?(?![a-z])|\\leq(?![a-z])", r"\\leq "),
        (r"\\ge(?:qslant|qq)?(?![a-z])|\\geq(?![a-z])", r"\\geq "),
        (r"\\neq?(?![a-z])", r"\\neq "),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\(?:varnothing|O(?![a-zA-Z]))", r"\\emptyset "),
        (r"\^\s*\{?\s*\\(?:circ|degree)(?![a-z])\s*\}?|\\degree(?![a-z])", r"^\\circ "),
        (r"\\colon(?![a-z])", ":"),
        (r"\\%", "%"),
        (r"\\#", "#"),
        (r"\\(?:cdots|dots)(?![a-z])", r"\\ldots "),
    ]
]
_PLAIN_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"~|\s", " "),
        (r"\{,\}", ","),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"!=", r"\\neq "),
        (r"\.\.\.|…", r"\\ldots "),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])(" + _FUNCTIONS + r"|pi|infty|theta|alpha|beta)(?![A-Za-z])", r"\\\1 "),
        (r"(?i)(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"\\sqrt\s+(?=[\d({\[])", r"\\sqrt"),
        (r"\s+", " "),
    ]
]  # fmt: skip
_ROW = "\u240a"  # stands for the \\ between the rows of a matrix
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"))
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}


@lru_cache(maxsize=4096)  # a gold comes once for each of its rollouts
def _clean(text: str) -> str:
    """One spelling for one thing: Unicode to LaTeX, synonyms to one command, decoration away."""
    text = text.translate(_ZERO_WIDTH)
    if not text.isascii():
        text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
        text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
        text = re.sub(
            r"[¼-¾⅐-⅞]",
            lambda m: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")),
            text,
        )
        text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE_TABLE))
        text = text.translate(_UNICODE_TABLE)
    text = text.strip()
    if (bold := re.fullmatch(r"(\*\*|__|`)([^*`]+)\1", text)) is not None:
        text = bold[2]
    text = text.replace(r"\$", "\uff04")
    if text.count("$") % 2 == 0:
        text = text.replace("$", " ")  # math mode
    text = text.replace("\uff04", "$")
    text = re.sub(
        r"\\begin\{cases\}(.*?)\\end\{cases\}",
        lambda m: m[1].replace(r"\\", ", ").replace("&", " "),
        text,
        flags=re.S,
    )
    if r"\begin" in text:
        text = text.replace(r"\\", _ROW)
    else:  # doubled by somebody's escaping, or a line break
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text).replace(r"\\", " ")
    for pattern, replacement in _LATEX_REWRITES if "\\" in text else ():
        text = pattern.sub(replacement, text)
    for pattern, replacement in _PLAIN_REWRITES:
        text = pattern.sub(replacement, text)
    text = _strip_braces(text.strip())
    if (box := re.match(r"\\f?boxe?d?\s*(?=\{)", text)) and _closing(text, box.end()) == len(text) - 1:
        text = text[box.end() + 1 : -1].strip()
    text = re.sub(
        r"^(?:the )?(?:final )?answer(?: is\b|\s*:)\s*:?\s*|^\\approx|^\\therefore",
        "",
        text,
        flags=re.I,
    )
    text = re.sub(r"^=(?=.)", "", text.strip())
    text = re.sub(r"[.,;:\s]+\\?$|\\$", "", text).strip()
    if scientific := re.fullmatch(r"([+-]?\d*\.?\d+)[eE]([+-]?\d+)", text):
        return f"{scientific[1]} \\times 10^{{{int(scientific[2])}}}"
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return re.sub(r"[.,;:\s]+$", "", whole[1]).strip() if whole else text


def _strip_braces(text: str) -> str:
    """Without invisible outer braces; around a list they were meant as the braces of a set."""
    for _ in range(MAX_DEPTH):
        if text[:1] != "{" or _closing(text, 0) != len(text) - 1:
            break
        inner = text[1:-1].strip()
        if len(_split(inner, {","})[0]) > 1:
            return rf"\{{{inner}\}}"
        text = inner
    return text


_BRACKETS = re.compile(r"\\[{}]|\\[lr]angle|\\.|[(\[{}\])]")


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start` (of any kind), or -1."""
    depth = 0
    for token in _BRACKETS.finditer(text, start):
        symbol = token.group()
        if symbol in ("(", "[", "{", r"\{", r"\langle"):
            depth += 1
        elif symbol in (")", "]", "}", r"\}", r"\rangle"):
            depth -= 1
            if depth == 0:
                return token.end() - 1
    return -1


_SPLIT_TOKENS = re.compile(
    r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\[{}]|\\text\{\s*(?:and|or)\s*\}|\\[A-Za-z]+|\\.|[(\[{}\])]|"
    r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])|.",
    re.DOTALL,
)
_OPEN = {"(", "[", "{", r"\{", r"\langle"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle"}


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Pieces between separators that stand outside every bracket, and those separators."""
    if not any(separator in text for separator in separators):
        return [text], []
    pieces, found, depth, start = [], [], 0, 0
    for token in _SPLIT_TOKENS.finditer(text):
        symbol = token.group()
        if symbol in _OPEN or symbol.startswith(r"\begin"):
            depth += 1
            if depth > MAX_DEPTH:
                raise _TooBig("nested too deeply")
        elif symbol in _CLOSE or symbol.startswith(r"\end{"):
            depth -= 1
        elif depth == 0:
            word = re.sub(r"\\text\{\s*(\w+)\s*\}", r"\1", symbol)
            if word in separators:
                pieces.append(text[start : token.start()].strip())
                found.append(word)
                start = token.end()
    pieces.append(text[start:].strip())
    return pieces, found


# --------------------------------------------------------------------------- the calculator

_TOKENS = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|\\[{}|]|\S")
_GREEK = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma
    tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell
""".split()
_VARIABLE_COMMANDS = {"\\" + name for name in _GREEK}
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
_STOP = set(r") ] } | + - / = , * ^ ! % \cdot \times \div".split())


class _Point(dict):
    """Values of the variables at test point k: positive for 0, 1, negative for 2, mixed for 3."""

    def __init__(self, k: int):
        self.k = k

    def __missing__(self, name: str) -> Fraction:
        seed = zlib.crc32(f"{self.k}/{name}".encode())
        value = Fraction(seed % 9973 + 2, seed // 9973 % 997 + 100)
        self[name] = -value if self.k == 2 or (self.k == 3 and seed >> 20 & 1) else value
        return self[name]


class _Calculator:
    """Evaluate LaTeX or plain arithmetic at one point, without sympy and without eval.

    Values are exact `Fraction`s as long as they are rational, then complex numbers of the module
    `m` (cmath, or mpmath's context in a worker). Raises _Unreadable for text outside its grammar,
    _TooBig for numbers beyond MAX_BITS, ZeroDivisionError where the text divides by zero.
    """

    def __init__(self, text: str, point: dict, m=cmath):
        self.tokens, self.point, self.m = _TOKENS.findall(text), point, m
        self.i = self.depth = 0

    def run(self):
        value = self.sum()
        if self.i < len(self.tokens):
            raise _Unreadable(self.tokens[self.i])
        return value

    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise _Unreadable(token)
        self.i += 1
        return token

    def lift(self, value):
        """An exact value as an inexact one, for functions that leave the rationals."""
        if not isinstance(value, Fraction):
            return value
        if self.m is cmath:
            return complex(value)
        return self.m.mpc(self.m.mpf(value.numerator) / value.denominator)

    def both(self, a, b):
        """Two operands of one kind, exact if both are."""
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            return self.lift(a), self.lift(b)
        if max(a.numerator.bit_length(), a.denominator.bit_length()) > 4 * MAX_BITS:
            raise _TooBig("number")
        return a, b

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooBig("nested too deeply")
        value = self.term()
        while self.peek() in ("+", "-"):
            sign = self.take()
            a, b = self.both(value, self.term())
            value = a + b if sign == "+" else a - b
        self.depth -= 1
        return value

    def term(self):
        value = self.factor()
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                a, b = self.both(value, self.factor())
                value = a * b
            elif token in ("/", r"\div"):
                self.take()
                a, b = self.both(value, self.factor())
                value = a / b
            elif token and token not in _STOP:
                if token[0].isdigit() or token[0] == ".":
                    raise _Unreadable("two numbers side by side")
                a, b = self.both(value, self.power())
                value = a * b
            else:
                return value

    def factor(self):
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        value = self.power()
        return -value if sign < 0 else value

    def power(self):
        base = self.primary()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                if self.peek() == r"\circ":  # degrees inside an expression: only for functions
                    self.take()
                    a, b = self.both(base, self.lift(Fraction(1)) * self.m.pi / 180)
                    base = a * b
                    continue
                return self.raised(base, self.exponent())
            if token == "!":
                self.take()
                if not isinstance(base, Fraction) or base.denominator != 1 or base < 0:
                    raise _Unreadable("factorial")
                if base > 400:
                    raise _TooBig("factorial")
                product = 1
                for n in range(2, int(base) + 1):
                    product *= n
                base = Fraction(product)
            elif token == "%":
                self.take()
                a, b = self.both(base, Fraction(1, 100))
                base = a * b
            else:
                return base

    def exponent(self):
        if self.peek() == "{":
            return self.group("{", "}")
        sign = -1 if self.peek() == "-" and self.take() else 1
        return sign * self.power()

    def raised(self, base, exponent):
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
            if abs(exponent) * max(size - 1, 0) > MAX_BITS:
                raise _TooBig("exponent")
            if exponent.denominator == 1:
                if abs(base) == 1:  # any exponent, however large
                    return base if exponent % 2 else Fraction(1)
                return base ** int(exponent)
            if base >= 0 and (root := _exact_root(base, exponent.denominator)) is not None:
                return self.raised(root, Fraction(exponent.numerator))
        base, exponent = self.lift(base), self.lift(exponent)
        if not base:
            raise _Unreadable("power of zero")
        if abs(exponent) * abs(self.m.log(base)) > MAX_BITS:
            raise _TooBig("exponent")
        return base**exponent

    def root(self, value, degree):
        if isinstance(degree, Fraction) and degree.denominator == 1 and degree > 0:
            if isinstance(value, Fraction) and value < 0 and degree % 2:  # the real root
                return -self.root(-value, degree)
            return self.raised(value, 1 / degree)
        return self.raised(value, 1 / degree)

    def group(self, opening: str, closing: str):
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def argument(self):
        """The argument of \\frac or \\sqrt: a group, or, as in LaTeX, one single digit."""
        token = self.peek()
        if token == "{":
            return self.group("{", "}")
        if token.isdigit() and len(token) > 1:
            self.tokens[self.i : self.i + 1] = [token[0], token[1:]]
        return self.primary()

    def number(self, token: str) -> Fraction:
        if len(token) > MAX_BITS // 4:
            raise _TooBig("number")
        if (bar := self.tokens[self.i : self.i + 2]) and bar[0] in (r"\overline", r"\dot", r"\bar"):
            self.take()  # a repeating decimal, 0.1\overline{6}
            digits = "".join(self.tokens[self.i : self.i + 3]).strip("{}")
            self.i += 3 if self.peek() == "{" else 1
            if "." not in token or not digits.isdigit():
                raise _Unreadable("overline")
            shift = 10 ** len(token.partition(".")[2])
            return Fraction(token.rstrip(".")) + Fraction(int(digits), (10 ** len(digits) - 1) * shift)
        return Fraction(token.rstrip("."))

    def primary(self):
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            value = self.number(token)
            return value + self.mixed() if value.denominator == 1 else value
        if token in ("(", "[", "{"):
            self.i -= 1
            return self.group(token, {"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            value = self.sum()
            self.take("|")
            return abs(value) if isinstance(value, Fraction) else self.lift(Fraction(0)) + abs(value)
        if token == r"\frac":
            a, b = self.both(self.argument(), self.argument())
            return a / b
        if token == r"\sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else Fraction(2)
            return self.root(self.argument(), degree)
        if token in (r"\binom", r"\dbinom", r"\tbinom"):
            n, k = self.argument(), self.argument()
            if not (isinstance(n, Fraction) and isinstance(k, Fraction)) or n.denominator * k.denominator != 1:
                raise _Unreadable("binomial")
            if not 0 <= k <= n <= 1000:
                raise _TooBig("binomial")
            value = Fraction(1)
            for j in range(int(k)):
                value = value * (n - j) / (j + 1)
            return value
        if token == r"\pi":
            return self.lift(Fraction(1)) * self.m.pi
        if token[0] == "\\" and re.fullmatch(_FUNCTIONS, token[1:]):
            return self.function(token[1:])
        if token == "e" and self.peek() != "_":
            return self.lift(Fraction(1)) * self.m.e
        if token == "i" and self.peek() != "_":
            return self.lift(Fraction(1)) * 1j
        if token in _VARIABLE_COMMANDS or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self.variable(token)
        raise _Unreadable(token)

    def mixed(self) -> Fraction:
        """The proper fraction that follows an integer, as in 1\\frac{1}{2} or 1 1/2; else 0."""
        ahead = "".join(islice(self.tokens, self.i, self.i + 7))
        found = re.match(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", ahead)
        if found:
            top, bottom = int(found[1] or found[2]), int(found[3] or found[4])
            if 0 < top < bottom:
                return self.argument_of_frac()
        elif re.match(r"\d+/\d", ahead) and self.tokens[self.i].isdigit():
            top, bottom = int(self.tokens[self.i]), self.tokens[self.i + 2]
            if bottom.isdigit() and 0 < top < int(bottom):
                self.i += 3
                return Fraction(top, int(bottom))
        return Fraction(0)

    def argument_of_frac(self) -> Fraction:
        self.take(r"\frac")
        return self.argument() / self.argument()

    def variable(self, token: str):
        name = token
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                end = self.tokens.index("}", self.i) if "}" in self.tokens[self.i :] else self.i
                name += "_" + "".join(self.tokens[self.i + 1 : end])
                self.i = end + 1
            else:
                name += "_" + self.take()
        if self.peek() == "'" or (self.peek() == "(" and name in ("f", "g", "h", "F", "G", "P")):
            raise _Unreadable("a function by name")
        return self.point[name]

    def function(self, name: str):
        if name == "sqrt":
            return self.root(self.argument(), Fraction(2))
        if name in ("gcd", "lcm"):
            raise _Unreadable(name)
        power, base = None, None
        for _ in range(2):
            if self.peek() == "^":
                self.take()
                power = self.exponent()
            elif self.peek() == "_":
                self.take()
                base = self.argument()
        if self.peek() in ("(", "{", "[", "|"):
            x = self.primary()
        else:  # \sin 2x y: everything up to the next operator
            x = self.power()
            while (
                (token := self.peek())
                and token not in _STOP
                and not (token[0] == "\\" and token[1:2].isalpha() and re.fullmatch(_FUNCTIONS, token[1:]))
            ):
                a, b = self.both(x, self.power())
                x = a * b
        if name == "abs":
            value = abs(x)
        elif name in ("ln", "log", "lg"):
            value = self.logarithm(x, base, name)
        else:
            x, m = self.lift(x), self.m
            if power == -1 and name in _INVERSES:
                name, power = "arc" + name, None
            if name == "exp" and abs(x) > MAX_BITS:
                raise _TooBig("exponent")
            if name in ("sec", "csc", "cot"):
                value = 1 / {"sec": m.cos, "csc": m.sin, "cot": m.tan}[name](x)
            else:
                value = getattr(
                    m,
                    _INVERSES.get(name.removeprefix("arc"), name) if name.startswith("arc") else name,
                )(x)
        return value if power is None else self.raised(value, power)

    def logarithm(self, x, base, name: str):
        if not x:
            raise _Unreadable("log of zero")
        base = Fraction(10) if base is None else base
        value = self.m.log(self.lift(x))
        return value if name == "ln" else value / self.m.log(self.lift(base))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The exact `degree`-th root of a non-negative rational, or None if it is irrational."""
    roots = []
    for n in (value.numerator, value.denominator):
        if degree > 64 or n.bit_length() > 900:
            return None
        root = round(n ** (1 / degree))
        exact = next((r for r in (root - 1, root, root + 1) if r >= 0 and r**degree == n), None)
        if exact is None:
            return None
        roots.append(exact)
    return Fraction(*roots)


_CANNOT_EVALUATE = (_Unreadable, ZeroDivisionError, ValueError, OverflowError)


def _evaluate(text: str, m=cmath, points: int = 4) -> list:
    """Values of an expression at the test points; a single value if it has no variables."""
    values = []
    for k in range(points):
        point = _Point(k)
        values.append(_Calculator(text, point, m).run())
        if not point:
            break
    return values


def _same_values(a: list, b: list, m=cmath) -> bool | None:
    """Whether two lists of values agree: exactly if rational, else None (cmath) or to 40 digits."""
    if len(a) != len(b):
        a, b = a * (len(b) // len(a) or 1), b * (len(a) // len(b) or 1)
    certain = True
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            if x != y:
                return False
            continue
        if m is not cmath:
            x, y = m.mpmathify(_mp(x, m)), m.mpmathify(_mp(y, m))
            if abs(x - y) > m.mpf(10) ** -40 * max(abs(x), abs(y), m.mpf(10) ** -40):
                return False
            continue
        x, y = _to_complex(x), _to_complex(y)
        if not (cmath.isfinite(x) and cmath.isfinite(y)):
            return None if x == y or cmath.isnan(x) or cmath.isnan(y) else False
        if abs(x - y) > 1e-7 * max(abs(x), abs(y), 1e-7):
            return False
        certain = False
    return True if certain or m is not cmath else None


def _to_complex(value) -> complex:
    try:
        return complex(value)
    except OverflowError:  # an exact number beyond the floats
        return complex(float("inf"))


def _mp(value, m):
    return m.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


# --------------------------------------------------------------------------- the rules of equality
# Three-valued: True, False, or None for "a worker must look". In a worker nothing stays None.


def _all(verdicts) -> bool | None:
    result = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


_PLAIN_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d ])")


def _compare_scalars(pred: str, gold: str, m=cmath) -> bool | None:
    """Two expressions without lists, relations or units."""
    if "\\infty" in gold or "\\infty" in pred:
        return False if gold.replace(" ", "") != pred.replace(" ", "") and len(gold) < 9 else None
    try:
        b = _evaluate(gold, m)
    except _TooBig as error:
        raise _GoldTooBig(str(error)) from error
    except _CANNOT_EVALUATE:
        return None
    try:
        a = _evaluate(pred, m)
    except _CANNOT_EVALUATE:
        return None
    same = _same_values(a, b, m)
    if same is False and len(a) == len(b) == 1 and (decimal := _DECIMAL.fullmatch(gold)):
        return _rounds_to(a[0], b[0], decimal[1], gold, pred)
    return same


def _rounds_to(value, target: Fraction, decimals: str, gold: str, pred: str) -> bool:
    """Whether `value` rounds (half up) to a decimal gold, at the gold's own precision.

    Only for golds of two decimals or more; a prediction that is itself a decimal must meet one of
    three significant digits or more, for 0.254 is not 0.25.
    """
    places = len(decimals)
    digits = len(re.sub(r"\D", "", gold).lstrip("0"))
    if places < 2 or (digits < 3 and _DECIMAL.fullmatch(pred)):
        return False
    if not isinstance(value, Fraction):
        value = _to_complex(value)
        if abs(value.imag) > 1e-12 or abs(value.real) > 1e12:
            return False
        value = Fraction(value.real)
    half = Fraction(1, 2 * 10**places)
    return target - half <= value < target + half if target > 0 else target - half < value <= target + half


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[^\W\d_a-zA-Z]")
_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""".split()
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_EMPTY = {"none", "nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset"}


def _unwrap_text(text: str) -> str:
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split())


def _words(text: str) -> str:
    """A textual answer for comparison: case, punctuation, articles and spacing removed."""
    text = re.sub(r"[^\w+\-/^=<>\\]+", " ", _unwrap_text(text).casefold())
    return " ".join(w for w in text.split() if w not in ("the", "a", "an"))


# canonical: other spellings (a plural s is taken off before the look-up)
_UNIT_TABLE = """
    mm: millimeter millimetre; cm: centimeter centimetre; dm: decimeter; m: meter metre;
    km: kilometer kilometre; in: inch inches; ft: foot feet; yd: yard; mi: mile;
    mg: milligram; g: gram gm; kg: kilogram kgs; lb: lbs; oz: ounce; t: ton tonne;
    s: second sec secs; min: minute mins; h: hour hr hrs; day: days; wk: week; yr: year yrs;
    ml: milliliter millilitre mL; L: liter litre l; degree: deg degs; rad: radian;
    dollar: usd USD bucks; cent: cents; pound: gbp GBP; euro: EUR; yen: JPY;
    rupee: Rs Rs. INR; percent: percentage pct; J: joule; N: newton; W: watt; V: volt;
    Hz: hertz; Pa: pascal; mol: mole; celsius: centigrade; mi/h: mph; km/h: kph kmh;
    am: a.m. a.m; pm: p.m. p.m; kJ: kilojoule; kW: kilowatt; K: kelvin; acre: acres;
    gal: gallon; kb: kilobyte; mb: megabyte; gb: gigabyte; tb: terabyte; ohm: ohms
"""
_UNITS = {"unit": "", "units": ""}
for _entry in _UNIT_TABLE.split(";"):
    _canonical, _, _names = _entry.strip().partition(":")
    _UNITS |= dict.fromkeys([_canonical, *_names.split()], _canonical)
_NOT_UNITS = set(
    """
    and or not to than more less minus plus times over half is are was no yes if only of from
    between about approximately least most other else but wrong correct dozen squared cubed one
    two three four five six ten hundred thousand million billion trillion mod base halves thirds
    fourths quarters fifths sixths eighths tenths hundredths thousandths factorial choose
    inverse below above negative
    """.split()
)
_UNIT_POWERS = dict.fromkeys("square sq sq. squared".split(), "2") | dict.fromkeys("cubic cu cu. cubed".split(), "3")
_DIMENSIONS = {"old", "tall", "long", "wide", "high", "deep", "away", "apart", "total", "in total"}
_UNIT_TAIL = re.compile(
    r"(?:\\text\{\s*(?P<text>[^{}]*)\}|(?:(?<=[\d\s}])|(?<=\\pi))(?P<bare>[A-Za-z][A-Za-z./ ]*))"
    r"\s*(?:\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?$"
)


def _unit_name(text: str, power: str | None) -> str | None:
    """One canonical name for a unit ("square centimeters" -> cm^2); None if these are no units."""
    words = [w for w in text.replace("/", " / ").replace(" per ", " / ").split() if w not in _DIMENSIONS]
    names = []
    for word in words[:8]:
        if word.lower() in _UNIT_POWERS:
            power = _UNIT_POWERS[word.lower()]
        elif word.lower() in _NOT_UNITS or not re.fullmatch(r"[A-Za-z][A-Za-z.'-]*\d?|/", word):
            return None
        else:
            if word[-1].isdigit():
                word, power = word[:-1], word[-1]
            single = word.rstrip(".") if word not in _UNITS else word
            for candidate in (
                single,
                single.lower(),
                single.lower().removesuffix("s"),
                single.lower().removesuffix("es"),
            ):
                if candidate in _UNITS:
                    single = _UNITS[candidate]
                    break
            else:
                single = single.lower().removesuffix("s")
            names.append(single)
    if len(words) > 5 or (power and not names):
        return None
    name = " ".join(n for n in names if n)
    return f"{name}^{power}" if power and name and power != "1" else name


def _split_unit(text: str) -> tuple[str, str]:
    """(body, unit): "5.4 \\text{ cm}^2" -> ("5.4", "cm^2"); the unit is "" where there is none."""
    unit = ""
    for sign, name in _CURRENCY.items():
        if text.startswith((sign, "-" + sign)):
            text, unit = text.replace(sign, "", 1).strip(), name
        elif text.endswith(sign):
            text, unit = text[:-1].strip(), name
    degrees = re.search(r"\^\\circ\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?$", text)
    if degrees and degrees.start() and not re.search(rf"\\(?:{_FUNCTIONS})", text):
        return text[: degrees.start()].strip(), {"C": "celsius", "F": "fahrenheit"}.get(
            degrees[1] or degrees[2], "degree"
        )
    if (ohm := re.fullmatch(r"(.*[\d}])\s*\\Omega", text)) is not None:
        return ohm[1], "ohm"
    if text.endswith("%"):
        return text[:-1].strip(), "percent"
    text = re.sub(r"\}\s*(/)\s*\\text\{", r"\1", text)
    tail = _UNIT_TAIL.search(text)
    if not tail or tail.start() == 0:
        return text, unit
    body, name = (
        text[: tail.start()].strip(),
        tail["text"] if tail["text"] is not None else tail["bare"],
    )
    name = name.strip()
    if not body or body[-1] in "+-*/^=(_" or (re.search(r"\\[A-Za-z]+$", body) and not body.endswith(r"\pi")):
        return text, unit
    if tail["text"] is None:  # a bare word: only if it cannot be a product of variables
        spaced = text[tail.start() - 1] == " "
        for word in name.replace("/", " / ").split():
            known = (
                word in _UNITS
                or word.lower() in _UNIT_POWERS
                or word.lower() in _UNITS
                or word.lower().removesuffix("s") in _UNITS
            )
            alone = word == name or "/" in name
            if word != "/" and not (
                (known and (spaced and alone if len(word) == 1 else True)) or (spaced and len(word) > 2)
            ):
                return text, unit
    if (scale := name.split(" ")[0].lower()) in _SCALES and not tail["power"]:
        rest = " ".join(name.split(" ")[1:])
        more = _unit_name(rest, None) if rest else unit
        return (f"({body})*10^{_SCALES[scale]}", more) if more is not None else (text, unit)
    canonical = _unit_name(name, tail["power"])
    return (text, unit) if canonical is None else (body, unit or canonical)


def _same_quantity(pred: str, gold: str, scalar) -> bool | None:
    """Scalars with units: the prediction's unit must be the gold's, or one of them has none."""
    pred_body, pred_unit = _split_unit(pred)
    gold_body, gold_unit = _split_unit(gold)
    if pred_unit and gold_unit and pred_unit != gold_unit:
        return False
    pred_body, gold_body = (_plain_number(body) for body in (pred_body, gold_body))
    based = [re.fullmatch(r"\(?([0-9A-Fa-f]+)\)?_\{?(\d+)\}?", body) for body in (pred_body, gold_body)]
    if any(based):  # 1011_2: digits and base, the base may be left out
        digits = [b[1].upper() if b else body.upper() for b, body in zip(based, (pred_body, gold_body), strict=True)]
        bases = [b[2] if b else None for b in based]
        return digits[0] == digits[1] and (bases[0] == bases[1] or bases in ([None, bases[1]], ["10", None]))
    if _WORD.search(_unwrap_text(pred_body)) or _WORD.search(_unwrap_text(gold_body)):
        return _words(pred) == _words(gold)
    if pred_unit == "percent" or gold_unit == "percent":
        return _same_percent(pred_body, pred_unit, gold_body, gold_unit, scalar)
    return scalar(pred_body, gold_body)


def _same_percent(pred: str, pred_unit: str, gold: str, gold_unit: str, scalar) -> bool | None:
    """50% is 50 % and 1/2; a sign on one side only may be dropped from numbers that exceed 1."""
    same = scalar(pred, gold)
    if pred_unit == gold_unit:
        return same
    if same:
        try:
            value = _evaluate(gold)[0]
        except _CANNOT_EVALUATE:
            return False
        return isinstance(value, Fraction) and (abs(value) > 1 or not value)
    if pred_unit:
        return scalar(f"({pred})/100", gold)
    return scalar(pred, f"({gold})/100")


def _plain_number(text: str) -> str:
    """Thousands separators and number words away."""
    text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    words = _words(text)
    return str(_NUMBER_WORDS.index(words)) if words in _NUMBER_WORDS else text


_COMMAND_WORDS = re.compile(r"\\[A-Za-z]+")
_RELATIONS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx"}
_FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", "=": "=", r"\neq": r"\neq"}
_SYMBOL = re.compile(  # what may stand to the left of "= answer": a name, not an expression
    r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?'?|\\text\{[^{}]*\})(?:\^\{-1\})?(?:\([\w\s,\\]*\))?|"
    r"\|[^|]+\||m?\\angle [A-Z]+|\\frac\{d\w?\}\{d\w\}|\\overline\{[A-Z]+\}|"
    r"\(\\?\w+(?:\s*,\s*\\?\w+)+\s*\)|[A-Z]{2,4}|\\text\{[^{}]*\}_?\{?\w*\}?"
)  # fmt: skip


def _structure(text: str) -> tuple[str, list]:
    """What kind of answer this is, and its parts.

    ("list" | "set" | "union" | "()" | "[]" | "[)" | "(]", elements), ("relation", [parts, signs]),
    ("matrix", rows) or ("scalar", [text]).
    """
    text = _strip_braces(text.strip())
    several = any(separator in text for separator in (",", ";", "&", "and", "or"))
    if (
        several
        and not _THOUSANDS.fullmatch(re.sub(r"^[-+$€£]|[%$€£]$", "", text))
        and not _THOUSANDS.match(_split_unit(text)[0] + " ")
    ):
        parts, signs = _split(text, {",", ";", "&", "and", "or"})
        parts = [p for p in parts if p]
        if len(parts) > 1:
            if signs == ["and"] and (both := _intersection(*parts)):
                return both
            if len(parts) > MAX_ITEMS:
                raise _TooBig("too many elements")
            return "list", [q for p in parts for q in _plus_minus(p)]
    parts, signs = _split(text, _RELATIONS)
    if signs and all(parts):
        return "relation", [parts, signs]
    parts, _ = _split(text, {r"\cup"})
    if len(parts) > 1:
        return "union", parts
    matrix = re.fullmatch(r"\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", text)
    if matrix and matrix[1] not in ("vmatrix", "Vmatrix") and r"\begin" not in matrix[2]:
        rows = [[c.strip() for c in row.split("&")] for row in matrix[2].split(_ROW) if row.strip()]
        return "matrix", rows
    opening = text[:2] if text[:2] == r"\{" else r"\langle" if text.startswith(r"\langle") else text[:1]
    if opening in _OPEN and _closing(text, 0) == len(text) - 1:
        closing = text[-2:] if text.endswith(r"\}") else r"\rangle" if text.endswith(r"\rangle") else text[-1]
        inner = text[len(opening) : -len(closing)].strip()
        parts = [p for p in _split(inner, {",", ";"})[0] if p]
        if len(parts) > MAX_ITEMS:
            raise _TooBig("too many elements")
        if opening == r"\{" and closing == r"\}":
            builder = re.fullmatch(r"(\w+)\s*(?:\\in\s*\\mathbb\{R\})?\s*[|:](.*)", inner)
            if builder and len(parts) == 1:
                return _structure(builder[2])
            named = any(_structure(p)[0] == "relation" for p in parts)
            return "list" if named else "set", [q for p in parts for q in _plus_minus(p)]
        if opening == closing == "" or {opening, closing} <= {"(", ")", "[", "]"} or opening == r"\langle":
            if len(parts) == 1 and opening + closing in ("()", "[]"):
                return _structure(inner)
            square = opening + closing == "[]" and len(parts) > 2  # no interval
            kind = "()" if opening == r"\langle" or square else opening + closing
            return kind, parts
    expanded = _plus_minus(text)
    return ("list", expanded) if len(expanded) > 1 else ("scalar", [text])


def _intersection(first: str, second: str) -> tuple[str, list] | None:
    """The interval that `x > 2 and x < 5` leaves, as the relation 2 < x < 5."""
    bounds = [_pieces(*_structure(part)) for part in (first, second)]
    if not all(bounds) or bounds[0][0] is None or bounds[0][0] != bounds[1][0] or len(bounds[0][1] + bounds[1][1]) > 2:
        return None
    low, high = sorted((b[1][0] for b in bounds), key=lambda piece: piece.startswith(r"(-\infty"))
    if not low.endswith(r",\infty)") or not high.startswith(r"(-\infty,"):
        return None
    a, b = (r"\leq" if bracket in "[]" else "<" for bracket in (low[0], high[-1]))
    return "relation", [
        [low[1 : -len(r",\infty)")], bounds[0][0], high[len(r"(-\infty,") : -1]],
        [a, b],
    ]


_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-z])")


def _plus_minus(text: str) -> list[str]:
    """[text], or the two readings of its plus-minus signs."""
    if not _PLUS_MINUS.search(text):
        return [text]
    upper, lower = (
        _PLUS_MINUS.sub(lambda m, s=s: s[m[0]], text) for s in ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
    )
    return [re.sub(r"(^|[=(,])\s*\+", r"\1", upper), lower]


def _same(pred: str, gold: str, scalar) -> bool | None:
    """Equality of two cleaned answers; `scalar` decides what is left at the leaves."""
    if _squeeze(_unwrap_text(pred)) == _squeeze(_unwrap_text(gold)):
        return True
    if _DECIMAL.fullmatch(gold) and re.fullmatch(r"[+-]?\d+,(?:\d{1,2}|\d{4,})", pred):
        pred = pred.replace(",", ".")  # a decimal comma
    pred_kind, pred_parts = _structure(pred)
    gold_kind, gold_parts = _structure(gold)
    kinds = {pred_kind, gold_kind}
    pieces = [_pieces(k, p) for k, p in ((pred_kind, pred_parts), (gold_kind, gold_parts))]
    if (
        all(pieces)
        and kinds & {"relation", "union", "scalar"}
        and not (kinds <= {"relation"} and pieces[0][0] != pieces[1][0])
    ):
        return _unordered(pieces[0][1], pieces[1][1], scalar)
    if "list" in kinds and (
        assigned := [_assignments(k, p) for k, p in ((pred_kind, pred_parts), (gold_kind, gold_parts))]
    ) != [None, None]:
        return _same_assignments(assigned, (pred_kind, pred_parts), (gold_kind, gold_parts), scalar)
    if "relation" in kinds:
        return _same_relations(pred_kind, pred_parts, gold_kind, gold_parts, pred, gold, scalar)
    if (kinds <= {"list", "set"} and "list" in kinds) or kinds == {"set"}:
        if kinds == {"set"}:
            pred_parts, gold_parts = (list(dict.fromkeys(map(_squeeze, p))) for p in (pred_parts, gold_parts))
        return _unordered(pred_parts, gold_parts, scalar)
    if kinds == {"union"}:
        return _unordered(pred_parts, gold_parts, scalar)
    if kinds == {"matrix"}:
        if [len(r) for r in pred_parts] != [len(r) for r in gold_parts]:
            return False
        return _all(
            _same(p, g, scalar)
            for pr, gr in zip(pred_parts, gold_parts, strict=True)
            for p, g in zip(pr, gr, strict=True)
        )
    if kinds == {"matrix", "()"}:  # a column vector may be written as a tuple
        rows = pred_parts if pred_kind == "matrix" else gold_parts
        if any(len(r) != 1 for r in rows):
            return False
        flat = [r[0] for r in rows]
        return _ordered(*((flat, gold_parts) if pred_kind == "matrix" else (pred_parts, flat)), scalar)
    if (kinds <= {"()", "[]", "[)", "(]"} and len(kinds) == 1) or kinds == {"()", "list"}:
        return _ordered(pred_parts, gold_parts, scalar)
    if kinds == {"set", "scalar"}:
        single = pred_parts if pred_kind == "set" else gold_parts
        if not single:
            return _words(pred if pred_kind == "scalar" else gold).replace(" ", "").strip("\\") in _EMPTY
        return len(single) == 1 and _same(pred_parts[0], gold_parts[0], scalar)
    if kinds == {"scalar"}:
        return _same_text_or_quantity(pred_parts[0], gold_parts[0], scalar)
    return False


def _squeeze(text: str) -> str:
    """Without the spaces that carry no meaning (a space between digits does)."""
    text = re.sub(r"\{(\w)\}(?!\w)", r" \1", text)  # x^{2} is x^2
    return re.sub(r"(?<![\dA-Za-z]) | (?![\dA-Za-z])|(?<=[a-z]) (?=\d)", "", text)


def _ordered(pred: list[str], gold: list[str], scalar) -> bool | None:
    if len(pred) != len(gold):
        return False
    return _all(_same(p, g, scalar) for p, g in zip(pred, gold, strict=True))


def _unordered(pred: list[str], gold: list[str], scalar) -> bool | None:
    """Whether the elements pair up in some order (equality is transitive, so greedily)."""
    if len(pred) != len(gold):
        return False
    left, open_question = list(pred), False
    for g in gold:
        verdicts = [_same(p, g, scalar) for p in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            open_question = True
        else:
            return False
    return None if open_question else True


def _pieces(kind: str, parts: list) -> tuple[str | None, list[str]] | None:
    """An answer as (its variable, intervals) if it is made of intervals and simple inequalities."""
    if kind in ("list", "union"):
        inner = [_pieces(*_structure(p)) for p in parts]
        if not all(inner) or len({i[0] for i in inner}) != 1:
            return None
        return inner[0][0], [piece for i in inner for piece in i[1]]
    if kind in ("()", "[]", "[)", "(]") and len(parts) == 2:
        return None, [f"{kind[0]}{parts[0]},{parts[1]}{kind[1]}"]
    if kind == "scalar" and _squeeze(_unwrap_text(parts[0])) in (
        r"\mathbb R",
        r"\R",
        "all real numbers",
        "all reals",
    ):
        return None, [r"(-\infty,\infty)"]
    if kind != "relation":
        return None
    sides, signs = parts
    symbol = re.compile(r"\\?[A-Za-z]+(?:_\{?\w\}?)?")
    if signs == [r"\in"] and symbol.fullmatch(sides[0]):
        inner = _pieces(*_structure(sides[1]))
        return (sides[0], inner[1]) if inner else None
    if len(signs) == 1 and signs[0] in _FLIP and signs[0] != "=":
        left, right, sign = sides[0], sides[1], signs[0]
        if symbol.fullmatch(right) and right != r"\pi":
            left, right, sign = right, left, _FLIP[sign]
        if not symbol.fullmatch(left):
            return None
        if sign == r"\neq":
            return left, [rf"(-\infty,{right})", rf"({right},\infty)"]
        closed = sign in (r"\leq", r"\geq")
        if sign in ("<", r"\leq"):
            return left, [rf"(-\infty,{right}{']' if closed else ')'}"]
        return left, [rf"{'[' if closed else '('}{right},\infty)"]
    if len(signs) == 2 and symbol.fullmatch(sides[1]):
        if all(s in ("<", r"\leq") for s in signs):
            low, high, a, b = sides[0], sides[2], signs[0], signs[1]
        elif all(s in (">", r"\geq") for s in signs):
            low, high, a, b = sides[2], sides[0], signs[1], signs[0]
        else:
            return None
        return sides[1], [f"{'(' if a in '<>' else '['}{low},{high}{')' if b in '<>' else ']'}"]
    return None


def _assignments(kind: str, parts: list) -> list[tuple[str, str]] | None:
    """[(symbol, value), ...] of `x = 1, y = 2` or `x = 2, -3`; None if this is no such list."""
    if kind != "list":
        return None
    pairs, last = [], None
    for part in parts:
        inner, data = _structure(part)
        if inner == "relation" and data[1] == ["="] and _SYMBOL.fullmatch(data[0][0]):
            last = _squeeze(data[0][0])
            pairs.append((last, data[0][1]))
        elif inner != "relation" and last is not None:
            pairs.append((last, part))
        else:
            return None
    return pairs


def _same_assignments(assigned, pred, gold, scalar) -> bool | None:
    """Solutions of one unknown are an unordered list; of several, a map from name to value."""

    def values(pairs):
        return [v for _, v in pairs]

    def names(pairs):
        return [n for n, _ in pairs]

    a, b = assigned
    if a is not None and b is not None:
        if len(set(names(a))) == 1 and len(set(names(b))) == 1:
            return names(a)[0] == names(b)[0] and _unordered(values(a), values(b), scalar)
        return sorted(names(a)) == sorted(names(b)) and _unordered(
            [f"({n},{v})" for n, v in a], [f"({n},{v})" for n, v in b], scalar
        )
    pairs, (kind, parts) = (a, gold) if a is not None else (b, pred)
    if kind == "relation" and parts[1] in (["="], [r"\in"]):  # (x,y) = (1,2), or x \in \{1,2\}
        left = parts[0][0].strip("()").replace(" ", "").split(",")
        if left in (names(pairs), names(pairs)[:1]):
            kind, parts = _structure(parts[0][1])
    if len(set(names(pairs))) == 1:
        ok = kind in ("list", "set")
        both = (values(pairs), parts) if a is not None else (parts, values(pairs))
        return ok and _unordered(*both, scalar)
    by_name = values(sorted(pairs))
    both = (by_name, parts) if a is not None else (parts, by_name)
    return kind in ("()", "list") and _ordered(*both, scalar)


def _same_relations(pred_kind, pred_parts, gold_kind, gold_parts, pred, gold, scalar) -> bool | None:
    """Equations and inequalities; `x = 5` may answer for 5, `2x = 10` may not answer for 10."""
    if gold_kind == "relation" and pred_kind == "relation":
        (p, p_signs), (g, g_signs) = pred_parts, gold_parts
        if r"\approx" in g_signs + p_signs:
            return _same(
                p[0] if r"\approx" in p_signs else pred,
                g[0] if r"\approx" in g_signs else gold,
                scalar,
            )
        if g_signs == p_signs:
            verdict = _ordered(p, g, scalar)
            if verdict is True or len(g) > 2:
                return verdict
        if len(p) == 2 and [_FLIP.get(s) for s in p_signs] == g_signs and _ordered(p[::-1], g, scalar):
            return True
        if len(p) != 2 or len(g) != 2:
            if _SYMBOL.fullmatch(p[0]) and _SYMBOL.fullmatch(g[0]) and _squeeze(p[0]) != _squeeze(g[0]):
                return False
            p, g = _values_of(p, p_signs), _values_of(g, g_signs)
            return bool(p and g) and _all(_same(x, g[-1], scalar) for x in p)
        if p_signs != g_signs and p_signs != [_FLIP.get(s) for s in g_signs]:
            return False
        if any(_WORD.search(_unwrap_text(s)) for s in p + g):
            return _function_forms(p, g) and _same(p[1], g[1], scalar)
        if p_signs == g_signs == ["="] and _function_forms(p, g) and (same := _same(p[1], g[1], scalar)) is not False:
            return same
        return scalar(f"\0{p_signs[0]}\0{p[0]}\0{p[1]}", f"\0{g_signs[0]}\0{g[0]}\0{g[1]}")
    if gold_kind == "relation":
        options = _values_of(*gold_parts)
        return bool(options) and _any(_same(pred, g, scalar) for g in options)
    if r"\approx" in pred_parts[1]:  # the exact side is the answer, the rest is commentary
        at = pred_parts[1].index(r"\approx")
        sides = pred_parts[0][: at + 1]
        sides = sides if at or not _SYMBOL.fullmatch(sides[0]) else pred_parts[0][1:]
        return _same(sides[-1], gold, scalar)
    options = _values_of(*pred_parts)
    return bool(options) and _all(_same(p, gold, scalar) for p in options)


def _any(verdicts) -> bool | None:
    result = False
    for verdict in verdicts:
        if verdict is True:
            return True
        if verdict is None:
            result = None
    return result


def _values_of(sides: list[str], signs: list[str]) -> list[str]:
    """What a chain of equations says its value is: every side but the name; [] if it names none."""
    if set(signs) - {"=", r"\approx", r"\in"}:
        return []
    names = [bool(_SYMBOL.fullmatch(s)) and s != r"\pi" for s in sides]
    if names[0]:
        return sides[1:]
    if names[-1]:
        return sides[:-1]
    return sides if all(not re.search(r"[A-Za-z]", _COMMAND_WORDS.sub("", s)) for s in sides) else []


def _function_forms(p: list[str], g: list[str]) -> bool:
    """y = ... against f(x) = ..., or the same name on both sides."""
    left = [_squeeze(s[0]) for s in (p, g)]
    if left[0] == left[1]:
        return True
    return (
        all(_SYMBOL.fullmatch(s) for s in left)
        and any("(" in s for s in left)
        and any(s in ("y", "f(x)") for s in left)
    )


def _compare_leaves(pred: str, gold: str, m=cmath) -> bool | None:
    """The leaf rule of the fast path: expressions, and relations as \\0sign\\0left\\0right."""
    if not pred.startswith("\0"):
        return _compare_scalars(pred, gold, m)
    _, p_sign, *p = pred.split("\0")
    _, g_sign, *g = gold.split("\0")
    try:
        a = _evaluate(f"({p[0]})-({p[1]})", m)
        b = _evaluate(f"({g[0]})-({g[1]})", m)
    except _CANNOT_EVALUATE:
        return None
    if len(a) != len(b) or not all(a) or not all(b):
        return False
    if p_sign != g_sign:
        if _FLIP.get(p_sign) != g_sign:
            return False
        a = [-x for x in a]
    ratios = [x / y for x, y in zip(a, b, strict=True)]  # equivalent if a constant multiple
    if g_sign not in ("=", r"\neq") and (complex(ratios[0]).real <= 0):
        return False
    return _same_values(ratios, [ratios[0]] * len(ratios), m)


_CHOICE_GOLD = re.compile(r"\(?\s*([A-Z])\s*\)?[.:]?|\(\s*([A-Z])\s*\)\s*(\S.*)|([A-Z])\s*[.:)]\s*(\S.*)", re.DOTALL)
_CHOICE_PRED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\b)?\s*:?\s*)?"
    r"[(\[]?\s*([A-Z])\s*(?:[)\].:]+\s*(.*)|$)",
    re.DOTALL | re.IGNORECASE,
)


def _same_choice(pred: str, gold: str, scalar) -> bool | None:
    """Multiple choice; None here means that the gold is no choice letter."""
    pred, gold = (" ".join(_unwrap_text(t).split()) for t in (pred, gold))
    found = _CHOICE_GOLD.fullmatch(gold)
    if not found:
        if not all(re.fullmatch(r"[(\[{\\ ]*[A-H](?:(?:[(),&. ]|and)*[A-H])+[)\]}\\. ]*", t) for t in (gold, pred)):
            return None
        several = [re.findall("[A-H]", t) for t in (gold, pred)]  # ACD, or A, C and D
        return several[0] == several[1] or (pred != "".join(several[1]) and several[0] == sorted(several[1]))
    letter, content = found[1] or found[2] or found[4], found[3] or found[5]
    chosen = _CHOICE_PRED.fullmatch(pred)
    if chosen and (chosen[1].isupper() or not chosen[2]):
        rest = chosen[2] or ""
        if re.search(r"\([A-Z]\)|(?<![A-Za-z])[A-Z][.)]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])", rest):
            return False  # hedging over several options
        if content and rest:
            return chosen[1].upper() == letter and _same(rest, content, scalar)
        return chosen[1].upper() == letter
    return _same(pred, content, scalar) if content else False


_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")


def _same_text_or_quantity(pred: str, gold: str, scalar) -> bool | None:
    """Two scalars: words, ratios and times, or numbers and expressions with units."""
    plain_pred, plain_gold = (re.sub(r"\s*\\text\{\s*to\s*\}\s*|(?<=\d) to (?=\d)", ":", t) for t in (pred, gold))
    ratios = [_RATIO.match(t) for t in (plain_pred, plain_gold)]
    if all(ratios) and (ratios[0].end(), ratios[1].end()) != (0, 0):
        p, g = ([Fraction(n) for n in r[0].split(":")] for r in ratios)
        p_unit, g_unit = (
            _unit_name(_unwrap_text(t[r.end() :]), None) for t, r in zip((plain_pred, plain_gold), ratios, strict=True)
        )
        if len(p) != len(g) or p_unit is None or g_unit is None or (p_unit and g_unit and p_unit != g_unit):
            return False
        if p == g:
            return True
        lowest = Fraction(g[0], g[1]).numerator == g[0] if g[1] else False
        time_like = re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?", ratios[1][0]) and not lowest
        return not time_like and all(p[i] * g[0] == g[i] * p[0] for i in range(len(p)))
    if ratios[1] and ratios[1].end() == len(plain_gold) and plain_gold.count(":") == 1:
        return scalar(pred, re.sub(r"(.*):(.*)", r"(\1)/(\2)", plain_gold))
    if ratios[0] and ratios[0].end() == len(plain_pred) and plain_pred.count(":") == 1:
        return not gold.isdigit() and scalar(re.sub(r"(.*):(.*)", r"(\1)/(\2)", plain_pred), gold)
    formulas = [re.sub("[_{} ]", "", _unwrap_text(t)) for t in (pred, gold)]
    if formulas[0] == formulas[1] and re.fullmatch(r"[A-Z][A-Za-z0-9]*", formulas[1]):
        return True  # a chemical formula, H_2O
    words = [_words(t) for t in (pred, gold)]
    if words[0] and words[0] == words[1] and _symbols(pred) == _symbols(gold):
        return True
    if words[1] in ("yes", "no", "true", "false"):
        return words[0] == words[1]
    compact = [w.replace(" ", "").strip("\\") for w in words]
    if compact[1] in _EMPTY:
        return compact[0] in _EMPTY
    return _same_quantity(pred, gold, scalar)


def _symbols(text: str) -> str:
    """The characters that `_words` drops and that carry meaning in an expression."""
    return re.sub(r"[\w\s.,;:!?'\"(){}\[\]$]|\\text", "", text) if _WORD.search(_unwrap_text(text)) else text


def _usable(gold) -> bool:
    if isinstance(gold, bool):
        return False
    if isinstance(gold, (int, float)):
        return gold == gold and abs(gold) != float("inf")
    return isinstance(gold, str) and bool(gold.strip())


def _decide(pred: str | None, gold: str, scalar=_compare_leaves) -> Result:
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
        decimal = _DECIMAL.fullmatch(gold)
        return Result(a == b or bool(decimal and _rounds_to(a, b, decimal[1], gold, pred)), "numbers")
    if any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\t\n\r" for c in pred.translate(_ZERO_WIDTH)
    ):
        return Result(False, "control characters")
    try:
        p, g = _clean(pred), _clean(gold)
        if not g:
            return Result(None, "empty gold")
        if not p:
            return Result(False, "no answer")
        if p == g:
            return Result(True, "identical after normalisation")
        chosen = _same_choice(p, g, scalar)
        if chosen is not None:
            return Result(chosen, "multiple choice")
        verdict = _same(p, g, scalar)
    except _GoldTooBig as error:
        return Result(None, f"gold too big: {error}")
    except _TooBig as error:
        return Result(False, f"too big: {error}")
    except RecursionError:
        return Result(False, "nested too deeply")
    return Result(verdict, "open" if verdict is None else "rules")


# --------------------------------------------------------------------------- the worker

_TOWERS = re.compile(r"\^\s*[{(]*\s*\d+\s*[})]*\s*\^|\^\s*[{(]*\s*-?\d{4,}|\d{4,}\s*[})]*\s*!|!\s*[)}]*\s*!|\d{400}")
_VETTED = re.compile(r"[\w\s+\-*/^=<>()\[\]{}|\\.,:;!&%'~]*", re.ASCII)


def _deep_leaves(pred: str, gold: str) -> bool:
    """The leaf rule inside a worker: 60 digits first, then math-verify."""
    from mpmath import mp

    with mp.workdps(60):
        verdict = _compare_leaves(pred, gold, mp)
    return _math_verify(pred, gold) if verdict is None else verdict


def _math_verify(pred: str, gold: str) -> bool:
    """math-verify on two vetted LaTeX strings, by its LaTeX grammar alone (never parse_expr)."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from math_verify import verify
    from sympy import Basic, MatrixBase

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    parsed = []
    for text in (gold, pred):
        if text.startswith("\0"):
            _, sign, left, right = text.split("\0")
            text = f"{left} {sign} {right}"
        text = text.replace(_ROW, r"\\")
        if len(text) > MATH_VERIFY_CHARS or _TOWERS.search(text):
            raise _TooBig("for sympy") if parsed else _GoldTooBig("for sympy")
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


def _worker_main() -> None:
    """Read {pred, gold, limit} frames from stdin, write {verdict, reason} frames to stdout.

    An item that overruns its limit is interrupted by an exception, so that the worker, with all it
    has imported, stays; where a long C call keeps that from happening, the parent kills the worker.
    It ends by itself when stdin closes (a thread waits for that, also while sympy is busy) or,
    if its parent died during such a C call, one second of its own time after the limit.
    """
    import queue
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    items: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        while (frame := _read_frame(sys.stdin.buffer)) is not None:
            items.put(frame)
        os._exit(0)

    import math_verify  # noqa: F401  (here, so that no item pays for it)
    import mpmath  # noqa: F401

    logging.disable(logging.CRITICAL)
    _math_verify(r"\int_0^1 x^2 dx", r"\lfloor x \rfloor")  # sympy imports much of itself on first use
    try:
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    except (ValueError, OSError) as error:  # macOS has no such limit
        print(f"verify worker: no memory limit ({error})", file=sys.stderr)
    sys.setrecursionlimit(4000)
    threading.Thread(target=read, daemon=True).start()
    _write_frame(out, {"ready": os.getpid()})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def interrupt(*_) -> None:
        raise _Overrun

    signal.signal(signal.SIGALRM, interrupt)
    maxrss_unit = 1 if sys.platform == "darwin" else 1024  # bytes
    while True:
        item = items.get()
        signal.setitimer(signal.ITIMER_VIRTUAL, item["limit"] + 1.0)  # default action: the end
        try:
            signal.setitimer(signal.ITIMER_REAL, item["limit"])
            try:
                result = _decide(item["pred"], item["gold"], _deep_leaves)
            except MemoryError:
                result = Result(None, "memory limit")
            except RecursionError:
                result = Result(False, "nested too deeply")
            except Exception as error:  # sympy raises anything; the reason travels to the caller
                result = Result(False, f"sympy: {type(error).__name__}: {error}"[:200])
            signal.setitimer(signal.ITIMER_REAL, 0)
        except _Overrun:
            result = Result(None, "time limit")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _write_frame(out, {"verdict": result.verdict, "reason": result.reason})
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * maxrss_unit
        if used > WORKER_MEMORY // 2:  # a fresh one will take over
            os._exit(0)


def _read_frame(stream) -> dict | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    return json.loads(stream.read(size))


def _write_frame(stream, message: dict) -> None:
    body = json.dumps(message).encode()
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()


# --------------------------------------------------------------------------- the pool


class _Worker:
    """One worker process; `deadline` is set while it works on `item`."""

    def __init__(self):
        env = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env,
        )  # fmt: skip
        self.ready = False
        self.item = None
        self.deadline = time.monotonic() + 120  # to start
        self.buffer = b""

    def send(self, item: int, message: dict) -> None:
        self.item, self.deadline = item, time.monotonic() + message["limit"] + GRACE
        _write_frame(self.process.stdin, message)

    def receive(self) -> dict | None:
        """The next message, {} if it is still incomplete, None if the worker is gone."""
        data = os.read(self.process.stdout.fileno(), 65536)
        if not data:
            return None
        self.buffer += data
        if len(self.buffer) < 4 or len(self.buffer) < 4 + struct.unpack("<I", self.buffer[:4])[0]:
            return {}
        message, self.buffer = json.loads(self.buffer[4:]), b""
        return message

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class _Pool:
    """Worker processes, started when first needed and kept; one item in flight for each."""

    def __init__(self):
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()
        self.failed_starts = 0
        self.size = max(2, min(4, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def run(self, jobs: list[tuple[str, str]], limit: float) -> list[Result]:
        """Results of `jobs` in order; each is given `limit` seconds in its worker."""
        with self.lock:
            try:
                return self._run(jobs, limit)
            except BaseException:  # Ctrl-C in the middle of a frame: no worker can be trusted
                self.close()
                raise

    def _run(self, jobs: list[tuple[str, str]], limit: float) -> list[Result]:
        results: list[Result | None] = [None] * len(jobs)
        waiting = list(range(len(jobs)))[::-1]
        deaths = [0] * len(jobs)
        while any(r is None for r in results):
            while len(self.workers) < min(self.size, len(jobs)):
                self.workers.append(_Worker())
            for worker in [w for w in self.workers if w.ready and w.item is None]:
                if worker.process.poll() is not None:  # it ended between two items
                    self._discard(worker)
                elif waiting:
                    item = waiting.pop()
                    pred, gold = jobs[item]
                    try:
                        worker.send(item, {"pred": pred, "gold": gold, "limit": limit})
                    except BrokenPipeError:  # it was killed from outside between two batches
                        self._discard(worker)
                        waiting.append(item)
            for item in self._wait(results, limit):
                deaths[item] += 1
                if deaths[item] == 3:
                    results[item] = Result(None, "its worker died (memory or stack)")
                else:  # it was dead or dying before, killed from outside
                    waiting.append(item)
        return results

    def _wait(self, results: list[Result | None], limit: float = TIMEOUT) -> list[int]:
        """Wait for the next answer or deadline; returns the items whose worker died at once."""
        again: list[int] = []
        active = [w for w in self.workers if not w.ready or w.item is not None]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            timeout = min((w.deadline for w in active), default=0) - time.monotonic()
            events = selector.select(max(0.0, timeout))
        for key, _ in events:
            worker = key.data
            message = worker.receive()
            if message is None and not worker.ready:
                self._discard(worker)
                self.failed_starts += 1
                if self.failed_starts >= 3:
                    raise RuntimeError("verify: no worker starts (see stderr); is math-verify installed?")
            elif message is None:
                started = worker.deadline - GRACE - limit
                if time.monotonic() - started < EARLY:
                    again.append(worker.item)
                else:
                    results[worker.item] = Result(None, "its worker died (memory or stack)")
                self._discard(worker)
            elif "ready" in message:
                worker.ready, self.failed_starts = True, 0
            elif message:
                results[worker.item] = Result(message["verdict"], message["reason"])
                worker.item = None
        now = time.monotonic()
        for worker in [w for w in self.workers if now > w.deadline and (w.item is not None or not w.ready)]:
            if worker.item is not None:
                results[worker.item] = Result(None, "time limit")
            self._discard(worker)
            self.workers.append(_Worker())  # it starts while the others work
        return again

    def _discard(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.kill()

    def warm_up(self) -> None:
        with self.lock:
            while len(self.workers) < self.size or any(not w.ready for w in self.workers):
                self.workers += [_Worker() for _ in range(self.size - len(self.workers))]
                self._wait([])

    def close(self) -> None:
        for worker in self.workers[:]:
            self._discard(worker)


_pool = _Pool()
_cache: OrderedDict[tuple[str, str], tuple[Result, float]] = OrderedDict()
_cache_bytes = 0
_cache_lock = threading.Lock()


def _after_fork() -> None:
    """A forked child must not share pipes with its parent, nor keep the parent's workers alive."""
    global _pool, _cache_lock
    for worker in _pool.workers:
        worker.process.stdin.close()
        worker.process.stdout.close()
        worker.process.returncode = 0  # so that Popen does not wait for somebody else's child
    _pool, _cache_lock = _Pool(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _pool.close())


def _cache_get(key: tuple[str, str], limit: float) -> Result | None:
    with _cache_lock:
        if (found := _cache.get(key)) is None or (found[0].verdict is None and found[1] < limit):
            return None
        _cache.move_to_end(key)
        return found[0]


def _cache_put(key: tuple[str, str], result: Result, limit: float) -> None:
    global _cache_bytes
    with _cache_lock:
        if key not in _cache:
            _cache_bytes += 400 + len(key[0]) + len(key[1])
        _cache[key] = (result, limit)
        while _cache_bytes > CACHE_BYTES:
            old, _ = _cache.popitem(last=False)
            _cache_bytes -= 400 + len(old[0]) + len(old[1])


# --------------------------------------------------------------------------- the public comparison


def explain_many(pairs: Sequence[tuple], timeout: float = TIMEOUT) -> list[Result]:
    """`verify_many` with reasons: one Result(verdict, reason) for each pair, in order."""
    flat: dict[tuple[str, str], Result] = {}
    wanted: list[tuple[str | None, list[str]]] = []
    for pred, gold in pairs:
        golds = gold if isinstance(gold, (list, tuple)) else [gold]
        wanted.append((pred, [str(g) for g in golds if _usable(g)]))
    open_jobs = []
    for pred, golds in wanted:
        for gold in golds:
            key = (pred, gold)
            if key in flat:
                continue
            cacheable = pred is not None and len(pred) + len(gold) < 2 * MAX_CHARS
            result = _cache_get(key, timeout) if cacheable else None
            if result is None:
                result = _decide(pred, gold)
                if result.reason == "open":
                    open_jobs.append(key)
                elif cacheable:
                    _cache_put(key, result, timeout)
            flat[key] = result
    if open_jobs:
        for key, result in zip(open_jobs, _pool.run(open_jobs, timeout), strict=True):
            flat[key] = result
            _cache_put(key, result, timeout)
    return [_best([flat[pred, gold] for gold in golds]) for pred, golds in wanted]


def _best(results: list[Result]) -> Result:
    """Any acceptable gold will do; None wins over False, for the pair may yet be right."""
    if not results:
        return Result(None, "no usable gold")
    return max(results, key=lambda r: {True: 2, None: 1, False: 0}[r.verdict])


def verify_many(pairs: Sequence[tuple], timeout: float = TIMEOUT) -> list[bool | None]:
    """Whether each prediction equals its gold.

    Args:
        pairs: (pred, gold) each. `pred` is an extracted answer, None if there was no box; `gold` is
            a string (or a number), or a list of acceptable ones.
        timeout: seconds of wall time for one pair in a worker.

    Returns:
        In order: True, False, or None where the pair is unscorable: no usable gold, or the limit of
        time or memory was hit. `explain_many` gives the reasons.

    Raises:
        RuntimeError: a worker cannot start (math-verify is not installed).
    """
    return [result.verdict for result in explain_many(pairs, timeout)]


def warm_up() -> None:
    """Start the worker processes now (seconds), so that no training step waits for them."""
    _pool.warm_up()


def is_equal(pred: str | None, gold) -> bool | None:
    """`verify_many` for one pair."""
    return explain_many([(pred, gold)])[0].verdict


def explain(pred: str | None, gold) -> Result:
    """`is_equal` with its reason."""
    return explain_many([(pred, gold)])[0]


# --------------------------------------------------------------------------- rewards
# TRL's signature: f(prompts, completions, **columns) -> one float or None (excluded) per row.

_logged: set[str] = set()


def _texts(completions: Sequence) -> list[str]:
    """Completions as strings, from plain or conversational ones ([{"role", "content"}])."""
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]


def _log_unscorable(row: int, gold, reason: str) -> None:
    text = repr(gold)[:300]
    if text not in _logged and len(_logged) < 10_000:
        _logged.add(text)
        logger.warning("row %d is unscorable (%s), its gold is %s", row, reason, text)


def answer_reward(prompts, completions, solution, **columns) -> list[float | None]:
    """1.0 where the boxed answer equals `solution`, else 0.0; None where it is unscorable."""
    pairs = [(extract_boxed(t), s) for t, s in zip(_texts(completions), solution, strict=True)]
    rewards = []
    for row, (result, (_, gold)) in enumerate(zip(explain_many(pairs), pairs, strict=True)):
        if result.verdict is None:
            _log_unscorable(row, gold, result.reason)
        rewards.append(None if result.verdict is None else float(result.verdict))
    return rewards


def verdict_reward(prompts, completions, label, **columns) -> list[float | None]:
    """1.0 where the judge's verdict is `label` (Yes, No, A, B), else 0.0, also if unparsed.

    None where the label is none of the four.
    """
    rewards = []
    for row, (text, gold) in enumerate(zip(_texts(completions), label, strict=True)):
        if gold not in ("Yes", "No", "A", "B"):
            _log_unscorable(row, gold, "no such label")
            rewards.append(None)
        else:
            rewards.append(float(parse_verdict(text) == gold))
    return rewards


def spark_reward(prompts, completions, task=None, solution=None, label=None, **columns):
    """The reward of each row by its task: policy and reflection by answer, judges by verdict.

    Args:
        task: per row "policy", "reflection", "pointwise" or "pairwise"; no column: all policy.
        solution, label: per row, None where the row has none.

    Raises:
        ValueError: a task that does not exist.
    """
    n = len(completions)
    task, solution, label = task or ["policy"] * n, solution or [None] * n, label or [None] * n
    rewards: list[float | None] = [None] * n
    for tasks, reward, column, values in (
        (("policy", "reflection"), answer_reward, "solution", solution),
        (("pointwise", "pairwise"), verdict_reward, "label", label),
    ):
        rows = [i for i in range(n) if task[i] in tasks]
        scored = reward(None, [completions[i] for i in rows], **{column: [values[i] for i in rows]})
        for i, value in zip(rows, scored, strict=True):
            rewards[i] = value
    if unknown := set(task) - {"policy", "reflection", "pointwise", "pairwise"}:
        raise ValueError(
            f"unknown task {sorted(map(str, unknown))}, expected policy, reflection, pointwise or pairwise"
        )
    return rewards


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _worker_main()
    elif len(sys.argv) == 3:
        answer = explain(sys.argv[1], sys.argv[2])
        print(answer.verdict, "|", answer.reason)
    else:
        sys.exit("usage: python verify.py PREDICTION GOLD")
