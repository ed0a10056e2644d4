r"""Boxed answers, verdicts, answer equality and rewards: every label rests on this file.

    from verify import extract_boxed, parse_verdict, is_equal, verify_many, spark_reward
    is_equal(r"\dfrac12", "0.5")                        # True
    python verify.py '1\frac{1}{2}' '3/2'               # True, and the rule that decided

Read from top to bottom: extraction, verdicts, normalisation, a small calculator, quantities with
units, the rules of equality, the worker, the pool, the rewards. Departures from plain math-verify
(https://github.com/huggingface/Math-Verify), which is the last resort here and not the first:

1. Lists, tuples, sets, intervals, relations, units and words are taken apart in this file, so
   (1,2) is not {1,2}, [1,2) is not (1,2], 2x = 10 is not 10, and `listen` is not `silent`.
2. Numbers are exact fractions. A decimal stands for an exact value only where the gold itself is a
   decimal, and then at the gold's own precision: pi equals a gold 3.14, 3.14 never equals pi.
3. Expressions are evaluated at fixed random points, exactly or with 60 digits, in microseconds.
   Only what the calculator cannot read (integrals, floors, ...) goes to math-verify in a worker.
4. Workers are killed when they overrun. No text of a model is ever evaluated as code: sympy's
   `parse_expr` (which calls eval) is never reached, only the LaTeX grammar of latex2sympy2.
"""

import atexit
import json
import logging
import operator
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

logger = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds of wall time for one comparison in a worker
MAX_CHARS = 2000  # longer answers are equal only if identical
MATH_VERIFY_CHARS = 400  # its grammar takes a millisecond for a few characters
MAX_DEPTH = 50  # nested groups
MAX_ITEMS = 64  # elements of a list, set, tuple or matrix
MAX_BITS = 8192  # size of an exact number (2500 digits)
WORKER_MEMORY = 2 << 30  # bytes of address space
START = 300.0  # seconds in which a worker must have imported sympy
GRACE = 0.5  # seconds beyond the limit after which the parent kills the worker
CACHE_BYTES = 16 << 20

_FILE = os.path.abspath(__file__)  # now: the working directory may change
_IN_WORKER = __name__ == "__main__" and sys.argv[1:2] == ["--worker"]


@dataclass(frozen=True)
class Result:
    """A verdict and why: True, False, or None where the pair is unscorable or hit a limit."""

    verdict: bool | None
    reason: str


class _Unreadable(Exception):
    """The calculator has no rule for this text: somebody else must decide."""


class _TooBig(Exception):
    """The text asks for a number or a structure beyond the limits."""


class _GoldTooBig(_TooBig):
    """It is the gold that does: the pair is unscorable unless identical."""


class _Overrun(BaseException):
    """Raised by the alarm in a worker; no `except Exception` of sympy's may stop it."""


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

_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|md|up)?|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox)"
_VERDICT = re.compile(
    r"(?:(?:final\s+)?(?:answer|verdict|option|choice|response|solution)\s*(?:is\b|:)?\s*)?"
    r"[(\[]?\s*(yes|no|a|b)\s*[)\]]?",
    re.IGNORECASE,
)


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

_UNICODE = r"""
    −–—‐‑‒﹣－ -  ⋅·∙• \cdot  ×✕ \times  ⁄∕÷ /  √ \sqrt  ∞ \infty  ± \pm  ∓ \mp  ≤⩽ \leq  ≥⩾ \geq
    ≠ \neq  ≈ \approx  ∪ \cup  ∩ \cap  ∈ \in  ∅ \emptyset  °º ^\circ  ∠ \angle  ∆ \Delta  ℝ \mathbb{R}
    ⟨ \langle  ⟩ \rangle  “”„‟ "  ‘’′ '  ，、 ,  。 .  ∶ :  ∣ |  ％ %  ￥ ¥  ￡ £
""".split()
_UNICODE_TABLE = {
    ord(c): latex + " " * ("\\" in latex)
    for characters, latex in zip(_UNICODE[::2], _UNICODE[1::2], strict=True)
    for c in characters
}
for _c in "αβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΦΨΩ":
    _name = unicodedata.name(_c).split()[-1].lower().replace("lamda", "lambda")
    _UNICODE_TABLE[ord(_c)] = f"\\{_name if _c.islower() else _name.capitalize()} "
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"))
_ROW = "\u240a"  # stands for the \\ between the rows of a matrix

_SPELLINGS = {  # one command for its synonyms, or what a command of layout leaves
    r"\frac": r"\dfrac \tfrac \cfrac",
    r"\binom": r"\dbinom \tbinom",
    r"\text": r"""\textbf \textit \textrm \textsf \texttt \textsc \textnormal \textmd \textup \mathrm \mathbf
        \mathit \mathsf \mathtt \mbox \hbox \operatorname \operatorname*""",
    r"\leq ": r"\le \leq \leqslant \leqq",
    r"\geq ": r"\ge \geq \geqslant \geqq",
    r"\neq ": r"\ne \neq",
    r"\emptyset ": r"\varnothing \O",
    r"\ldots ": r"\cdots \dots",
    r"^\circ ": r"\degree",
    r"\{": r"\lbrace \lcurly",
    r"\}": r"\rbrace \rcurly",
    "|": r"\lvert \rvert \vert \mid",
    "[": r"\lbrack",
    "]": r"\rbrack",
    "<": r"\lt",
    ">": r"\gt",
    ":": r"\colon",
    "%": r"\%",
    "#": r"\#",
    " ": r"\ \, \; \: \> \( \) \[ \] \quad \qquad \thinspace \rm \bf \it \cal \underline",
    "": r"""\! \left \right \displaystyle \textstyle \limits \big \Big \bigg \Bigg \bigl \Bigl \biggl \Biggl \bigr
        \Bigr \biggr \Biggr \bigm \Bigm""",
}
_COMMANDS = {name: latex for latex, names in _SPELLINGS.items() for name in names.split()}
_COMMAND = re.compile(r"\\(?:[A-Za-z]+\*?(?:\s+(?=\{))?|.)", re.DOTALL)
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|ln|lg|log|exp|sqrt|abs"


def _rewrites(*rules: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_BEFORE_COMMANDS = _rewrites(  # bold and arrows around a single symbol
    (r"\\(?:mathbf|boldsymbol|bm|vec|overrightarrow)\s*\{\s*(\\?[a-zA-Z]+|\d)\s*\}(?<![a-z]{2}\})", r"\1 "),
    (r"\\(?:text)?color\s*\{\w+\}", " "),
)
_AFTER_COMMANDS = _rewrites(
    (  # x = 2k + 1, k \in \mathbb{Z}
        r"(?<=.)[,;]?\s*\(?\s*(?:\\text\{\s*(?:where|for|with)\s*\})?\s*[a-zA-Z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?"
        r"[+*^]*\s*\)?$",
        "",
    ),
    (r"\\text\{\s*(" + _FUNCTIONS + r")\s*\}", r"\\\1 "),
    (r"\\text\{\s*([:;,.%$])?\s*\}", r"\1"),
    (r"\\frac\s*\{\\text\{([^{}]*)\}\}\s*\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}"),
    (r"\}\s*/\s*\\text\{", "/"),
    (r"\\overline\s*\{([A-Z]{2,})\}|\\(?:hat|widehat)\s*\{?\s*\\?([a-z])(?:math)?\s*\}?", r"\1\2 "),
    (r"\^\s*\{?\s*(?:\\circ|\^\\circ)(?![a-z])\s*\}?", r"^\\circ "),
    (r"(?<=[\d}])\s*\\Omega$", r"\\text{ohm}"),
)
_PLAIN = _rewrites(
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
    (r"(?<=[\d ])([cdkm]?m|ft)([23])$", r"\1^\2"),
    (r"\s+", " "),
)
_ANSWER_IS = re.compile(
    r"(?:\\text\{\s*)?(?:the )?(?:final )?(?:correct )?answer(?: is\b|\s*:)\s*:?\s*\}?|\\approx|\\therefore", re.I
)


@lru_cache(maxsize=4096)  # a gold comes once for each of its rollouts
def _clean(text: str) -> str:
    """One spelling for one thing: Unicode to LaTeX, synonyms to one command, decoration away."""
    text = text.translate(_ZERO_WIDTH)
    if not text.isascii():
        text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", r"^{\g<0>}", text)
        text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", r"_{\g<0>}", text)
        text = re.sub(
            r"[¼-¾⅐-⅞]", lambda m: rf"\frac{{{unicodedata.normalize('NFKC', m[0])}}}".replace("⁄", "}{"), text
        )
        text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE_TABLE)).translate(_UNICODE_TABLE)
    text = text.strip()
    if (bold := re.fullmatch(r"(\*\*|__|`)([^*`]+)\1", text)) is not None:
        text = bold[2]
    text = text.replace(r"\$", "\uff04")
    if text.count("$") % 2 == 0:
        text = text.replace("$", " ")  # math mode
    text = text.replace("\uff04", "$")
    if r"\begin{cases}" in text:  # a system of equations is a list of them
        text = text.replace(r"\begin{cases}", "").replace(r"\end{cases}", "").replace(r"\\", ", ").replace("&", " ")
    if r"\begin" in text:
        text = text.replace(r"\\", _ROW)
    elif "\\" in text:  # doubled by somebody's escaping, or a line break
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text).replace(r"\\", " ")
    if "\\" in text:
        text = _apply(_BEFORE_COMMANDS, text)
        text = _COMMAND.sub(lambda m: _COMMANDS.get(m[0].strip(), m[0].strip() if len(m[0]) > 2 else m[0]), text)
        text = _apply(_AFTER_COMMANDS, text)
    text = _strip_braces(_apply(_PLAIN, text).strip())
    if (box := re.match(r"\\f?boxe?d?\s*(?=\{)", text)) and _closing(text, box.end()) == len(text) - 1:
        text = text[box.end() + 1 : -1].strip()
    text = _ANSWER_IS.sub("", text, count=1) if _ANSWER_IS.match(text) else text
    text = re.sub(r"^=(?=.)", "", text.strip())
    text = re.sub(r"[.,;:\s]+\\?$|\\$", "", text).strip()
    if scientific := re.fullmatch(r"([+-]?\d*\.?\d+)[eE]([+-]?\d+)", text):
        return f"{scientific[1]} \\times 10^{{{int(scientific[2])}}}"
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return re.sub(r"[.,;:\s]+$", "", whole[1]).strip() if whole else text


def _apply(rules: list[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


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


_OPEN = {"(", "[", "{", r"\{", r"\langle"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle"}
_BRACKETS = re.compile(r"\\[{}]|\\[lr]angle|\\.|[(\[{}\])]")
_SPLIT_TOKENS = re.compile(
    r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\[{}]|\\text\{\s*(?:and|or)\s*\}|\\[A-Za-z]+|\\.|[(\[{}\])]|"
    r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])|.",
    re.DOTALL,
)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start` (of any kind), or -1."""
    depth = 0
    for token in _BRACKETS.finditer(text, start):
        depth += (token.group() in _OPEN) - (token.group() in _CLOSE)
        if depth == 0 and token.group() in _CLOSE:
            return token.end() - 1
    return -1


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
            word = symbol[6:-1].strip() if symbol.startswith(r"\text{") else symbol
            if word in separators:
                pieces.append(text[start : token.start()].strip())
                found.append(word)
                start = token.end()
    pieces.append(text[start:].strip())
    return pieces, found


# --------------------------------------------------------------------------- the calculator

_TOKENS = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|\\[{}|]|\S")
_GREEK = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi
    varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell
""".split()
_NAMED_FUNCTIONS = {"\\" + name for name in _FUNCTIONS.split("|")} - {r"\sqrt"}
_STOP = set(r") ] } | + - / = , * ^ ! % \cdot \times \div".split())
_CONSTANTS = {r"\pi": "pi", "e": "e", "i": "j"}


@cache
def _mp():
    """mpmath with 60 digits, imported at the first irrational number (a tenth of a second)."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = 60
    return context


def _inexact(value):
    """A value as a complex number of 60 digits, for what leaves the rationals."""
    return _mp().mpc(_mp().mpf(value.numerator) / value.denominator) if isinstance(value, Fraction) else value


def _combine(operation, a, b):
    """`operation` on two values, exact if both are."""
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return operation(_inexact(a), _inexact(b))
    if max(a.numerator.bit_length(), a.denominator.bit_length()) > 4 * MAX_BITS:
        raise _TooBig("number")
    return operation(a, b)


class _Calculator:
    """Evaluate LaTeX or plain arithmetic at test point k, without sympy and without eval.

    Values are exact `Fraction`s as long as they are rational, then mpmath's complex numbers. Raises
    _Unreadable for text outside its grammar, _TooBig for numbers beyond the limits,
    ZeroDivisionError where the text divides by zero.
    """

    def __init__(self, text: str, k: int):
        self.tokens, self.k = _TOKENS.findall(text), k
        self.i = self.depth = 0
        self.constant = True

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

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooBig("nested too deeply")
        value = self.term()
        while self.peek() in ("+", "-"):
            operation = operator.add if self.take() == "+" else operator.sub
            value = _combine(operation, value, self.term())
        self.depth -= 1
        return value

    def term(self):
        value = self.factor()
        while token := self.peek():
            if token in ("*", r"\cdot", r"\times", "/", r"\div"):
                self.take()
                operation = operator.truediv if token in ("/", r"\div") else operator.mul
                value = _combine(operation, value, self.factor())
            elif token in _STOP:
                break
            elif token[0].isdigit() or token[0] == ".":
                raise _Unreadable("two numbers side by side")
            else:
                value = _combine(operator.mul, value, self.power())
        return value

    def factor(self):
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.power()

    def power(self):
        base = self.primary()
        while self.peek() == "^":
            self.take()
            if self.peek() != r"\circ":
                return self.raised(base, self.exponent())
            self.take()  # degrees inside an expression
            base = _combine(operator.mul, base, _mp().mpc(_mp().pi) / 180)
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
        if not base:
            raise _Unreadable("power of zero")
        base, exponent = _inexact(base), _inexact(exponent)
        if abs(exponent) * abs(_mp().ln(base)) > MAX_BITS:
            raise _TooBig("exponent")
        return base**exponent

    def root(self, value, degree):
        if isinstance(value, Fraction) and isinstance(degree, Fraction) and value < 0 and degree % 2 == 1:
            return -self.raised(-value, 1 / degree)  # the real root
        return self.raised(value, 1 / degree)

    def group(self, opening: str, closing: str):
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def argument(self):
        """The argument of \\frac or \\sqrt: a group, or, as in LaTeX, one single digit."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.i : self.i + 1] = [token[0], token[1:]]
        return self.primary()

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
            return abs(value) if isinstance(value, Fraction) else _mp().mpc(abs(value))
        if token == r"\frac":
            return _combine(operator.truediv, self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else Fraction(2)
            return self.root(self.argument(), degree)
        if token in _CONSTANTS and self.peek() != "_":
            return _mp().mpc(getattr(_mp(), _CONSTANTS[token]))
        if token in _NAMED_FUNCTIONS:
            return self.function(token[1:])
        if token.removeprefix("\\") in _GREEK or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self.variable(token)
        raise _Unreadable(token)

    def number(self, token: str) -> Fraction:
        if len(token) > MAX_BITS // 4:
            raise _TooBig("number")
        value = Fraction(token.rstrip("."))
        if self.peek() not in (r"\overline", r"\dot", r"\bar"):
            return value
        self.take()  # a repeating decimal, 0.1\overline{6}
        digits = "".join(self.tokens[self.i : self.i + 3]).strip("{}")
        self.i += 3 if self.peek() == "{" else 1
        if "." not in token or not digits.isdecimal():
            raise _Unreadable("overline")
        return value + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(token.partition(".")[2]))

    def mixed(self) -> Fraction:
        """The proper fraction that follows an integer, as in 1\\frac{1}{2} or 1 1/2; else 0."""
        ahead = " ".join(self.tokens[self.i : self.i + 7])
        found = re.match(r"\\frac (?:\{ (\d+) \}|(\d)) ?(?:\{ (\d+) \}|(\d))|(\d+) / (\d+)(?!\S)", ahead)
        if not found:
            return Fraction(0)
        top, bottom = (int(n) for n in found.groups() if n)
        if not 0 < top < bottom:
            return Fraction(0)
        if found[5]:
            self.i += 3
            return Fraction(top, bottom)
        return self.primary()

    def variable(self, name: str) -> Fraction:
        if self.peek() == "_":
            self.take()
            end = self.i
            if self.peek() == "{":
                end = next((j for j in range(self.i, len(self.tokens)) if self.tokens[j] == "}"), end)
            name += "_" + "".join(self.tokens[self.i : end + 1]).strip("{}")
            self.i = end + 1
        if self.peek() == "'" or (self.peek() == "(" and name in ("f", "g", "h", "F", "G", "P")):
            raise _Unreadable("a function by name")
        self.constant = False  # its values are positive at the points 0 and 1, negative at 2, mixed at 3
        seed = zlib.crc32(f"{self.k}/{name}".encode())
        value = Fraction(seed % 9973 + 2, seed // 9973 % 997 + 100)
        return -value if self.k == 2 or (self.k == 3 and seed >> 20 & 1) else value

    def function(self, name: str):
        power, base = None, Fraction(10)
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
            while (token := self.peek()) and token not in _STOP and token not in _NAMED_FUNCTIONS:
                x = _combine(operator.mul, x, self.power())
        if power == -1 and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        value = self.analytic(name, _inexact(x), base)
        return value if power is None else self.raised(value, power)

    def analytic(self, name: str, x, base):
        if name == "abs":
            return _mp().mpc(abs(x))
        if name in ("ln", "log", "lg"):
            return _mp().ln(x) if name == "ln" else _mp().ln(x) / _mp().ln(_inexact(base))
        if abs(x) > 10**6:
            raise _TooBig("argument of a function")
        if name in ("sec", "csc", "cot"):
            return 1 / self.analytic({"sec": "cos", "csc": "sin", "cot": "tan"}[name], x, base)
        return getattr(_mp(), name.replace("arc", "a"))(x)


_CANNOT_EVALUATE = (_Unreadable, ZeroDivisionError, ValueError, OverflowError)


@lru_cache(maxsize=4096)
def _evaluate(text: str) -> tuple:
    """Values of an expression at the test points; a single value if it has no variables."""
    values = []
    for k in range(4):
        calculator = _Calculator(text, k)
        values.append(calculator.run())
        if calculator.constant:
            break
    return tuple(values)


def _same_values(a: Sequence, b: Sequence) -> bool:
    """Whether two lists of values agree: exactly if rational, else to 40 digits."""
    if len(a) != len(b):
        a, b = a * (len(b) // len(a)) or a, b * (len(a) // len(b)) or b
    return all(map(_close, a, b))


def _close(x, y) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = _inexact(x), _inexact(y)
    tiny = _mp().mpf(10) ** -40
    return abs(x - y) <= tiny * max(abs(x), abs(y), tiny)  # False for what is not a number


# --------------------------------------------------------------------------- words, numbers, units

_PLAIN_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d ])")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[^\W\d_a-zA-Z]")
_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""".split()
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_EMPTY = {"none", "nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset"}

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
    approximately least most other else but wrong correct dozen squared cubed one two three four five six ten
    hundred thousand million billion trillion mod base halves thirds fourths quarters fifths sixths eighths tenths
    hundredths thousandths factorial choose inverse below above negative
    """.split()
)
_UNIT_POWERS = dict.fromkeys("square sq sq. squared".split(), "2") | dict.fromkeys("cubic cu cu. cubed".split(), "3")
_DIMENSIONS = {"old", "tall", "long", "wide", "high", "deep", "away", "apart", "total", "in total"}
_UNIT_TAIL = re.compile(
    r"(?:\\text\{\s*(?P<text>[^{}]*)\}|(?:(?<=[\d\s}])|(?<=\\pi))(?P<bare>[A-Za-z][A-Za-z./ ]*))"
    r"\s*(?:\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?$"
)


@lru_cache(maxsize=4096)
def _unwrap_text(text: str) -> str:
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split())


@lru_cache(maxsize=4096)
def _words(text: str) -> str:
    """A textual answer for comparison: case, punctuation, articles and spacing removed."""
    text = re.sub(r"[^\w+\-/^=<>\\]+", " ", _unwrap_text(text).casefold())
    return " ".join(w for w in text.split() if w not in ("the", "a", "an"))


def _known_unit(word: str) -> str | None:
    lower = word.rstrip(".").lower()
    for name in (word, word.rstrip("."), lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in _UNITS:
            return _UNITS[name]
    return None


def _unit_name(text: str, power: str | None = None) -> str | None:
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
def _split_unit(text: str) -> tuple[str, str]:
    """(body, unit): "5.4 \\text{ cm}^2" -> ("5.4", "cm^2"); the unit is "" where there is none."""
    unit = ""
    for sign, name in _CURRENCY.items():
        if text.startswith((sign, "-" + sign)):
            text, unit = text.replace(sign, "", 1).strip(), name
        elif text.endswith(sign):
            text, unit = text[:-1].strip(), name
    degrees = re.search(r"(?<=.)\^\\circ\s*(?:\\text\{\s*([CF])\s*\}|([CF]))?$", text)
    if degrees and not re.search(rf"\\(?:{_FUNCTIONS})", text):
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
        more = _unit_name(rest) if rest else unit
        return (text, unit) if more is None else (f"({body})*10^{_SCALES[first.lower()]}", more)
    canonical = _unit_name(name, tail["power"])
    return (text, unit) if canonical is None else (body, unit or canonical)


@lru_cache(maxsize=4096)
def _plain_number(text: str) -> str:
    """Thousands separators and number words away."""
    text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    words = _words(text)
    return str(_NUMBER_WORDS.index(words)) if words in _NUMBER_WORDS else text


# --------------------------------------------------------------------------- the rules of equality
# Three-valued: True, False, or None for "a worker must look". In a worker nothing stays None.


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    result = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = result and verdict
    return result


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    opposite = _all(None if v is None else not v for v in verdicts)
    return None if opposite is None else not opposite


def _same_expression(pred: str, gold: str) -> bool | None:
    """Two expressions without lists, relations or units."""
    if "\\infty" in gold or "\\infty" in pred:
        return gold.replace(" ", "") == pred.replace(" ", "")
    try:
        b = _evaluate(gold)
    except _TooBig as error:
        raise _GoldTooBig(str(error)) from error
    except _CANNOT_EVALUATE:
        return _last_resort(pred, gold)
    try:
        a = _evaluate(pred)
    except _CANNOT_EVALUATE:
        return _last_resort(pred, gold)
    decimal = _DECIMAL.fullmatch(gold)
    return _same_values(a, b) or bool(decimal and len(a) == 1 and _rounds_to(a[0], b[0], decimal[1], gold, pred))


def _rounds_to(value, target: Fraction, decimals: str, gold: str, pred: str) -> bool:
    """Whether `value` rounds (half up) to a decimal gold, at the gold's own precision.

    Only for golds of two decimals or more; a prediction that is itself a decimal must meet one of
    three significant digits or more, for 0.254 is not 0.25.
    """
    digits = len(re.sub(r"\D", "", gold).lstrip("0"))
    if len(decimals) < 2 or (digits < 3 and _DECIMAL.fullmatch(pred)):
        return False
    if not isinstance(value, Fraction):
        if abs(value.imag) > 1e-12 or not abs(value.real) < 1e12:
            return False
        value = Fraction(str(value.real))
    sign = -1 if target < 0 else 1
    return -1 <= (value - target) * sign * 2 * 10 ** len(decimals) < 1


def _same_equation(p_sign: str, pred: list[str], g_sign: str, gold: list[str]) -> bool | None:
    """`left sign right` on both sides: equivalent if left - right differ by a constant factor."""
    try:
        a, b = (_evaluate(f"({left})-({right})") for left, right in (pred, gold))
    except _CANNOT_EVALUATE:
        return _last_resort(f"{pred[0]} {p_sign} {pred[1]}", f"{gold[0]} {g_sign} {gold[1]}")
    if len(a) != len(b) or not all(a) or not all(b):
        return False
    ratios = [_combine(operator.truediv, x, y) for x, y in zip(a, b, strict=True)]
    direction = 1 if p_sign == g_sign else -1
    if g_sign not in ("=", r"\neq") and _inexact(ratios[0]).real * direction <= 0:
        return False
    return _same_values(ratios, [ratios[0]] * len(ratios))


def _same_quantity(pred: str, gold: str) -> bool | None:
    """Numbers and expressions with units: the same unit, or one of them has none."""
    (p, p_unit), (g, g_unit) = _split_unit(pred), _split_unit(gold)
    if p_unit and g_unit and p_unit != g_unit:
        return False
    p, g = _plain_number(p), _plain_number(g)
    based = [re.fullmatch(r"\(?([0-9A-Fa-f]+)\)?_\{?(?:\\text\{)?(\w+?)\}*", body) for body in (p, g)]
    if any(based):  # 1011_2: digits and base, the base may be left out
        digits = [b[1].upper() if b else body.upper() for b, body in zip(based, (p, g), strict=True)]
        p_base, g_base = (b and _plain_number(b[2]) for b in based)
        return digits[0] == digits[1] and (p_base in (None, g_base) or (p_base, g_base) == ("10", None))
    if _WORD.search(_unwrap_text(p)) or _WORD.search(_unwrap_text(g)):
        return _words(pred) == _words(gold)
    units = {p_unit, g_unit}
    same = _same_expression(p, g)
    if units != {"", "percent"}:
        return same
    if same:  # the sign may be dropped from a number that exceeds 1
        try:
            value = _evaluate(g)[0]
        except _CANNOT_EVALUATE:
            return False
        return isinstance(value, Fraction) and (abs(value) > 1 or not value)
    return _same_expression(*(f"({body})/100" if unit else body for body, unit in ((p, p_unit), (g, g_unit))))


_CHOICE_GOLD = re.compile(r"\(?\s*([A-Z])\s*\)?[.:]?|\(\s*([A-Z])\s*\)\s*(\S.*)|([A-Z])\s*[.:)]\s*(\S.*)", re.DOTALL)
_CHOICE_PRED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\b)?\s*:?\s*)?"
    r"[(\[]?\s*([A-Z])\s*(?:[)\].:]+\s*(.*)|$)",
    re.DOTALL | re.IGNORECASE,
)
_SEVERAL_CHOICES = re.compile(r"[(\[{\\ ]*[A-H](?:(?:[(),&. ]|and)*[A-H])+[)\]}\\. ]*")
_OTHER_OPTION = re.compile(r"\([A-Z]\)|(?<![A-Za-z])[A-Z][.)]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")


def _same_choice(pred: str, gold: str) -> bool | None:
    """Multiple choice; None here means that the gold is no choice letter."""
    pred, gold = (" ".join(_unwrap_text(t).split()) for t in (pred, gold))
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


def _same_scalar(pred: str, gold: str) -> bool | None:
    """Two scalars: words, ratios and times, or quantities."""
    plain = [re.sub(r"\s*\\text\{\s*to\s*\}\s*|(?<=\d) to (?=\d)", ":", t) for t in (pred, gold)]
    p_ratio, g_ratio = (_RATIO.fullmatch(t) for t in plain)
    if p_ratio and g_ratio:
        return _same_ratio(*p_ratio.groups(), *g_ratio.groups())
    if g_ratio and not g_ratio[2] and plain[1].count(":") == 1:
        return _same_expression(pred, re.sub(r"(.*):(.*)", r"(\1)/(\2)", plain[1]))
    if p_ratio and not p_ratio[2] and plain[0].count(":") == 1:
        return not gold.isdigit() and _same_expression(re.sub(r"(.*):(.*)", r"(\1)/(\2)", plain[0]), gold)
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
    return _same_quantity(pred, gold)


def _same_ratio(pred: str, p_tail: str, gold: str, g_tail: str) -> bool:
    """3:4 is 6:8, unless the gold may be a time of day or a ratio that was to be kept."""
    p, g = ([Fraction(n) for n in text.split(":")] for text in (pred, gold))
    units = {_unit_name(_unwrap_text(tail)) for tail in (p_tail, g_tail)}
    if len(p) != len(g) or None in units or len(units - {""}) > 1:
        return False
    lowest = bool(g[1]) and Fraction(g[0], g[1]).numerator == g[0]
    if re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?", gold) and not lowest:
        return p == g
    return all(p[i] * g[0] == g[i] * p[0] for i in range(len(p)))


def _symbols(text: str) -> str:
    """The characters that `_words` drops and that carry meaning in an expression."""
    return re.sub(r"[\w\s.,;:!?'\"(){}\[\]$]|\\text", "", text) if _WORD.search(_unwrap_text(text)) else text


_RELATIONS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx"}
_FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", "=": "=", r"\neq": r"\neq"}
_VARIABLE = re.compile(r"(?!\\pi$)\\?[A-Za-z]+(?:_\{?\w\}?)?")
_NAME = re.compile(  # what may stand to the left of "= answer": a name, not an expression
    r"(?!\\pi$)(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?'?|\\text\{[^{}]*\}(?:_\{?\w*\}?)?)(?:\^\{-1\})?(?:\([\w\s,\\]*\))?|"
    r"\|[^|]+\||m?\\angle [A-Z]+|\\frac\{d\w?\}\{d\w\}|\\overline\{[A-Z]+\}|\(\\?\w+(?:\s*,\s*\\?\w+)+\s*\)"
    r"|[a-w](?:\s*[+]\s*[a-w])+"  # m + n = 277
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)
_LIST_SIGNS = {",", ";", "&", "and", "or"}
_BOUNDED = ("()", "[]", "[)", "(]")
_REALS = (r"\mathbb R", r"\R", "all real numbers", "all reals")


def _structure(text: str) -> tuple[str, list]:
    """What kind of answer this is, and its parts.

    ("list" | "set" | "union" | "()" | "[]" | "[)" | "(]", elements), ("relation", [parts, signs]),
    ("matrix", rows) or ("scalar", [text]).
    """
    text = _strip_braces(text.strip())
    if any(sign in text for sign in _LIST_SIGNS) and not _is_one_number(text):
        parts, signs = _split(text, _LIST_SIGNS)
        if len(parts := [p for p in parts if p]) > 1:
            both = _intersection(*parts) if signs == ["and"] else None
            return both or _elements("list", parts)
    parts, signs = _split(text, _RELATIONS)
    if signs and all(parts):
        return "relation", [parts, signs]
    parts, _ = _split(text, {r"\cup"})
    if len(parts) > 1:
        return "union", parts
    if matrix := _MATRIX.fullmatch(text):
        return "matrix", [[c.strip() for c in row.split("&")] for row in matrix[2].split(_ROW) if row.strip()]
    bracketed = re.fullmatch(r"(\\\{|\\langle|[(\[])(.*?)(\\\}|\\rangle|[)\]])", text, re.DOTALL)
    if bracketed and _closing(text, 0) == len(text) - 1:
        opening, inner, closing = bracketed[1], bracketed[2].strip(), bracketed[3]
        parts = [p for p in _split(inner, {",", ";"})[0] if p]
        if opening == r"\{":
            builder = re.fullmatch(r"(\w+)\s*(?:\\in\s*\\mathbb\{R\})?\s*[|:](.*)", inner)
            if builder and len(parts) == 1:
                return _structure(builder[2])
            return _elements("list" if any(_structure(p)[0] == "relation" for p in parts) else "set", parts)
        if len(parts) == 1 and opening + closing in ("()", "[]"):
            return _structure(inner)
        vector = opening == r"\langle" or (opening + closing == "[]" and len(parts) > 2)  # no interval
        return _elements("()" if vector else opening + closing, parts)
    expanded = _plus_minus(text)
    return ("list", expanded) if len(expanded) > 1 else ("scalar", [text])


def _is_one_number(text: str) -> bool:
    """Whether the commas of a text are all between thousands."""
    body = _split_unit(text.lstrip("-+"))[0]
    number = _THOUSANDS.match(body)
    return number is not None and not any(sign in body[number.end() :] for sign in _LIST_SIGNS)


def _elements(kind: str, parts: list[str]) -> tuple[str, list]:
    if len(parts) > MAX_ITEMS:
        raise _TooBig("too many elements")
    return kind, [q for p in parts for q in _plus_minus(p)] if kind in ("list", "set") else parts


def _plus_minus(text: str) -> list[str]:
    """[text], or the two readings of its plus-minus signs."""
    if r"\pm" not in text and r"\mp" not in text:
        return [text]
    upper = re.sub(r"(^|[=(,])\s*\+", r"\1", text.replace(r"\pm", "+").replace(r"\mp", "-"))
    return [upper, text.replace(r"\pm", "-").replace(r"\mp", "+")]


def _intersection(first: str, second: str) -> tuple[str, list] | None:
    """The relation 2 < x < 5 that `x > 2 and x < 5` means."""
    bounds = [_intervals(*_structure(part)) for part in (first, second)]
    if not all(bounds) or bounds[0][0] is None or bounds[0][0] != bounds[1][0]:
        return None
    lower_first = sorted(bounds[0][1] + bounds[1][1], key=lambda piece: piece.startswith(r"(-\infty"))
    low, middle, high = "".join(lower_first).partition(r",\infty)(-\infty,")
    signs = [r"\leq" if bracket in "[]" else "<" for bracket in (low[0], high[-1:])]
    return ("relation", [[low[1:], bounds[0][0], high[:-1]], signs]) if middle else None


def _intervals(kind: str, parts: list) -> tuple[str | None, list[str]] | None:
    """An answer as (its variable, intervals) if it is made of intervals and simple inequalities."""
    if kind in ("list", "union"):
        inner = [_intervals(*_structure(p)) for p in parts]
        if not all(inner) or len({name for name, _ in inner}) != 1:
            return None
        return inner[0][0], [piece for _, pieces in inner for piece in pieces]
    if kind in _BOUNDED and len(parts) == 2:
        return None, [f"{kind[0]}{parts[0]},{parts[1]}{kind[1]}"]
    if kind == "scalar" and _squeeze(_unwrap_text(parts[0])) in _REALS:
        return None, [r"(-\infty,\infty)"]
    if kind != "relation":
        return None
    sides, signs = parts
    if signs == [r"\in"] and _VARIABLE.fullmatch(sides[0]):
        inner = _intervals(*_structure(sides[1]))
        return (sides[0], inner[1]) if inner else None
    if signs == [r"\neq"] and _VARIABLE.fullmatch(sides[0]):
        return sides[0], [rf"(-\infty,{sides[1]})", rf"({sides[1]},\infty)"]
    if set(signs) <= {">", r"\geq"}:
        sides, signs = sides[::-1], [_FLIP[s] for s in signs[::-1]]
    at = next((i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side)), None)
    if not set(signs) <= {"<", r"\leq"} or at is None or len(sides) > 3 or (len(sides) == 3 and at != 1):
        return None
    low = f"{'(' if signs[at - 1] == '<' else '['}{sides[at - 1]}" if at else r"(-\infty"
    high = f"{sides[at + 1]}{')' if signs[at] == '<' else ']'}" if at < len(signs) else r"\infty)"
    return sides[at], [f"{low},{high}"]


@lru_cache(maxsize=4096)
def _squeeze(text: str) -> str:
    """Without the spaces that carry no meaning (a space between digits does)."""
    text = re.sub(r"\{(\w)\}(?!\w)", r" \1", text)  # x^{2} is x^2
    return re.sub(r"(?<![\dA-Za-z]) | (?![\dA-Za-z])|(?<=[a-z]) (?=\d)", "", text)


def _same(pred: str, gold: str) -> bool | None:
    """Equality of two cleaned answers, by what they are made of."""
    if _squeeze(_unwrap_text(pred)) == _squeeze(_unwrap_text(gold)):
        return True
    if _DECIMAL.fullmatch(gold) and re.fullmatch(r"[+-]?\d+,(?:\d{1,2}|\d{4,})", pred):
        pred = pred.replace(",", ".")  # a decimal comma
    p = p_kind, p_parts = _structure(pred)
    g = g_kind, g_parts = _structure(gold)
    kinds = {p_kind, g_kind}
    p_set, g_set = _intervals(*p), _intervals(*g)
    if p_set and g_set and kinds & {"relation", "union", "scalar"} and (kinds != {"relation"} or p_set[0] == g_set[0]):
        return _unordered(p_set[1], g_set[1])
    if kinds == {"scalar"}:
        return _same_scalar(p_parts[0], g_parts[0])
    if "list" in kinds and (_assignments(*p) or _assignments(*g)):
        return _same_assignments(p, g)
    if "relation" in kinds:
        return _same_relations(p_parts, g_parts) if len(kinds) == 1 else _same_value(p, g, pred, gold)
    if kinds == {"set"}:
        p_parts, g_parts = (list(dict.fromkeys(map(_squeeze, parts))) for parts in (p_parts, g_parts))
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
            return _words(gold if g_parts else pred).replace(" ", "").strip("\\") in _EMPTY
        return len(p_parts) == len(g_parts) == 1 and _same(p_parts[0], g_parts[0])
    return False


def _ordered(pred: list[str], gold: list[str]) -> bool | None:
    return len(pred) == len(gold) and _all(map(_same, pred, gold))


def _unordered(pred: list[str], gold: list[str]) -> bool | None:
    """Whether the elements pair up in some order (equality is transitive, so greedily)."""
    if len(pred) != len(gold):
        return False
    left, open_question = list(pred), False
    for g in gold:
        verdicts = [_same(p, g) for p in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            open_question = True
        else:
            return False
    return None if open_question else True


def _assignments(kind: str, parts: list) -> list[tuple[str, str]] | None:
    """[(name, value), ...] of `x = 1, y = 2` or `x = 2, -3`; None if this is no such list."""
    if kind != "list":
        return None
    pairs = []
    for part in parts:
        inner, data = _structure(part)
        if inner == "relation" and data[1] == ["="] and _NAME.fullmatch(data[0][0]):
            pairs.append((_squeeze(data[0][0]), data[0][1]))
        elif inner != "relation" and pairs:
            pairs.append((pairs[-1][0], part))
        else:
            return None
    return pairs


def _same_assignments(pred: tuple[str, list], gold: tuple[str, list]) -> bool | None:
    """Solutions of one unknown are an unordered list; of several, a map from name to value."""
    a, b = _assignments(*pred), _assignments(*gold)
    if a and b:
        if sorted(name for name, _ in a) != sorted(name for name, _ in b):
            return False
        return _unordered([f"({n},{v})" for n, v in a], [f"({n},{v})" for n, v in b])
    pairs, (kind, parts) = (a, gold) if a else (b, pred)
    names = [name for name, _ in pairs]
    if kind == "relation" and parts[1] in (["="], [r"\in"]):  # (x,y) = (1,2), or x \in \{1,2\}
        left = parts[0][0].strip("()").replace(" ", "").split(",")
        if left in (names, names[:1]):
            kind, parts = _structure(parts[0][1])
    one_unknown = len(set(names)) == 1
    if kind not in (("list", "set") if one_unknown else ("()", "list")):
        return False
    values = [value for _, value in (pairs if one_unknown else sorted(pairs))]
    return (_unordered if one_unknown else _ordered)(*((values, parts) if a else (parts, values)))


def _same_relations(pred: list, gold: list) -> bool | None:
    """Two equations or inequalities."""
    (p, p_signs), (g, g_signs) = pred, gold
    if p_signs == g_signs and ((same := _ordered(p, g)) or len(g) > 2):
        return same
    if len(p) != 2 or len(g) != 2:  # a chain of equations says one value, of one name
        if _NAME.fullmatch(p[0]) and _NAME.fullmatch(g[0]) and _squeeze(p[0]) != _squeeze(g[0]):
            return False
        p, g = _values_of(p, p_signs), _values_of(g, g_signs)
        return bool(p and g) and _all(_same(x, g[-1]) for x in p)
    if g_signs[0] not in (p_signs[0], _FLIP.get(p_signs[0])):
        return False
    names = [_squeeze(side[0]) for side in (p, g)]  # y = ... may answer for f(x) = ...
    functions = all(_NAME.fullmatch(n) for n in names) and "(" in names[0] + names[1] and {"y", "f(x)"} & set(names)
    if (names[0] == names[1] or functions) and g_signs == p_signs == ["="]:
        same = _same(p[1], g[1])
        if same is not False or any(_WORD.search(_unwrap_text(s)) for s in p + g):
            return same
    elif any(_WORD.search(_unwrap_text(s)) for s in p + g):
        return False
    return _same_equation(p_signs[0], p, g_signs[0], g)


def _same_value(p: tuple[str, list], g: tuple[str, list], pred: str, gold: str) -> bool | None:
    """A relation and something else: `x = 5` may answer for 5, `2x = 10` may not answer for 10."""
    if g[0] == "relation":
        return _any(_same(pred, value) for value in _values_of(*g[1]))
    sides, signs = p[1]
    if r"\approx" in signs:  # the exact side is the answer, the rest is commentary
        at = signs.index(r"\approx")
        return _same(sides[1 if at == 0 and _NAME.fullmatch(sides[0]) else at], gold)
    values = _values_of(sides, signs)
    return bool(values) and _all(_same(value, gold) for value in values)


def _values_of(sides: list[str], signs: list[str]) -> list[str]:
    """What a chain of equations says its value is: every side but the name; [] if it names none."""
    if set(signs) - {"=", r"\approx", r"\in"}:
        return []
    if _NAME.fullmatch(sides[0]):
        return sides[1:]
    if _NAME.fullmatch(sides[-1]):
        return sides[:-1]
    return [] if any(re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side)) for side in sides) else sides


def _usable(gold) -> bool:
    if isinstance(gold, str):
        return bool(gold.strip())
    return isinstance(gold, (int, float)) and not isinstance(gold, bool) and abs(gold) < float("inf")


def _decide(pred: str | None, gold: str) -> Result:
    """Compare one pair; `verdict` None with reason "open" means that a worker must look."""
    pred = pred or ""
    if pred.strip() == gold.strip():
        return Result(True, "identical")
    if len(gold) > MAX_CHARS:
        return Result(None, "gold too long")
    if len(pred) > MAX_CHARS:
        return Result(False, "too long")
    if _PLAIN_NUMBER.fullmatch(pred) and _PLAIN_NUMBER.fullmatch(gold):
        a, b, decimal = Fraction(pred), Fraction(gold), _DECIMAL.fullmatch(gold)
        return Result(a == b or bool(decimal and _rounds_to(a, b, decimal[1], gold, pred)), "numbers")
    if not pred.isprintable() and any(
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
        chosen = _same_choice(p, g)
        if chosen is not None:
            return Result(chosen, "multiple choice")
        verdict = _same(p, g)
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


def _last_resort(pred: str, gold: str) -> bool | None:
    """What the calculator cannot read: None for "a worker must look", and there math-verify."""
    return _math_verify(pred, gold) if _IN_WORKER else None


def _math_verify(pred: str, gold: str) -> bool:
    """math-verify on two vetted LaTeX strings, by its LaTeX grammar alone (never parse_expr)."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from math_verify import verify
    from sympy import Basic, MatrixBase

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    parsed = []
    for text in (gold, pred):
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


def _worker_main(search_path: list[str]) -> None:
    """Read {pred, gold, limit} lines of JSON from stdin, write {verdict, reason} lines to stdout.

    An item that overruns its limit is interrupted by an exception, so that the worker, with all it
    has imported, stays; where a long C call keeps that from happening, the parent kills the worker.
    It ends by itself when stdin closes (a thread waits for that, also while sympy is busy) or,
    if its parent died during such a C call, one second of its own time after the limit.
    """
    import queue
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    items: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            items.put(json.loads(line))
        os._exit(0)

    def answer(**message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    sys.path += [path for path in search_path if path not in sys.path]
    logging.disable(logging.CRITICAL)
    _math_verify(r"\int_0^1 x^2 dx", r"\lfloor x \rfloor")  # sympy imports much of itself on first use
    try:
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    except (ValueError, OSError) as error:  # macOS has no such limit
        print(f"verify worker: no memory limit ({error})", file=sys.stderr)
    sys.setrecursionlimit(4000)
    threading.Thread(target=read, daemon=True).start()
    answer(ready=True)
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
                result = _decide(item["pred"], item["gold"])
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
        answer(verdict=result.verdict, reason=result.reason)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * maxrss_unit > WORKER_MEMORY // 2:
            os._exit(0)  # a fresh one will take over


# --------------------------------------------------------------------------- the pool


class _Worker:
    """One worker process, asked for one item at a time."""

    def __init__(self):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        command = [sys.executable, _FILE, "--worker", json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)
        self.started = False

    def start(self) -> None:
        if not self.started:
            self.receive(START)
            self.started = True

    def ask(self, pred: str, gold: str, limit: float) -> Result:
        self.process.stdin.write((json.dumps({"pred": pred, "gold": gold, "limit": limit}) + "\n").encode())
        return Result(**self.receive(limit + GRACE))

    def receive(self, limit: float) -> dict:
        """Its next message; TimeoutError if it is late, EOFError if it is dead."""
        deadline, line = time.monotonic() + limit, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                if not (data := os.read(self.process.stdout.fileno(), 65536)):
                    raise EOFError
                line += data
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class _Pool:
    """Worker processes, started when first needed and kept; a thread serves each during a batch."""

    def __init__(self):
        self.size = max(2, min(4, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()

    def run(self, jobs: list[tuple[str, str]], limit: float) -> list[Result]:
        """Results of `jobs` in order; each takes at most `limit` seconds, killing its worker included."""
        results: list[Result | None] = [None] * len(jobs)
        waiting = deque(enumerate(jobs))
        with self.lock:
            threads = [
                threading.Thread(target=self._serve, args=(slot, waiting, results, limit), daemon=True)
                for slot in range(self._grow(len(jobs)))
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except BaseException:  # Ctrl-C: nobody waits for the answers any more
                waiting.clear()
                self.close()
                raise
        if None in results:
            raise RuntimeError("verify: no worker starts (see stderr); is math-verify installed?")
        return results

    def _grow(self, wanted: int) -> int:
        self.workers += [_Worker() for _ in range(min(self.size, wanted) - len(self.workers))]
        return min(self.size, wanted)

    def _serve(self, slot: int, waiting: deque, results: list, limit: float) -> None:
        """Give the worker of one slot an item after the other; replace it when it is late or dead."""
        item, deaths = None, 0
        while (item or waiting) and deaths < 3:
            try:
                self.workers[slot].start()
                item = item or waiting.popleft()
                results[item[0]] = self.workers[slot].ask(*item[1], 0.9 * limit)  # the rest is for killing it
                item, deaths = None, 0
                continue
            except IndexError:  # another thread took the last item, or the pool was closed
                return
            except TimeoutError:
                deaths += item is None
                reason = "time limit"
            except (EOFError, OSError, ValueError):
                deaths += 1
                reason = "its worker died (memory or stack)" if deaths == 2 else None
            if item and reason:  # the first death may be a kill from outside: the item is tried again
                results[item[0]], item, deaths = Result(None, reason), None, 0
            if slot < len(self.workers):
                self.workers[slot].kill()
                self.workers[slot] = _Worker()  # it starts while the others work

    def warm_up(self) -> None:
        with self.lock:
            self._grow(self.size)
            for worker in self.workers:
                worker.start()

    def close(self) -> None:
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.kill()


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
    for key in dict.fromkeys((pred, gold) for pred, golds in wanted for gold in golds):
        cacheable = key[0] is not None and len(key[0]) + len(key[1]) < 2 * MAX_CHARS
        result = _cache_get(key, timeout) if cacheable else None
        if result is None:
            result = _decide(*key)
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
    _mp()
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
    if _IN_WORKER:
        _worker_main(json.loads(sys.argv[2]))
    elif len(sys.argv) == 3:
        answer = explain(sys.argv[1], sys.argv[2])
        print(answer.verdict, "|", answer.reason)
    else:
        sys.exit("usage: python verify.py PREDICTION GOLD")
