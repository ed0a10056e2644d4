r"""Exact arithmetic on LaTeX: what an expression is worth, without sympy and without eval.

    evaluate(r"1\frac{1}{2}")       # (Fraction(3, 2),)
    evaluate("(x+1)^2")             # its values at four fixed random points

Values are exact fractions as long as they are rational, then mpmath's numbers of 60 digits. Two expressions are the
same if they agree at every point: that takes microseconds, where a computer algebra system simplifies for milliseconds.
"""

import operator
import re
import zlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache

MAX_DEPTH = 50  # nested groups
MAX_BITS = 8192  # size of an exact number (2500 digits)
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|ln|lg|log|exp|sqrt|abs"
_TOKENS = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|\\[{}|]|\S")
_GREEK = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi
    varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell
""".split()
_NAMED_FUNCTIONS = {"\\" + name for name in FUNCTIONS.split("|")} - {r"\sqrt"}
_STOP = set(r") ] } | + - / = , * ^ ! % \cdot \times \div".split())
_CONSTANTS = {r"\pi": "pi", "e": "e", "i": "j"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}


class Unreadable(Exception):
    """The calculator has no rule for this text: it says nothing about it."""


class TooBig(Exception):
    """The text asks for a number or a structure beyond the limits."""


CANNOT_EVALUATE = (Unreadable, ZeroDivisionError, ValueError, OverflowError)


@cache
def mp():
    """mpmath with 60 digits, imported at the first irrational number (a tenth of a second)."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = 60
    return context


def _combine(operation, a, b):
    """`operation` on two values, exact if both are."""
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return operation(mp().convert(a), mp().convert(b))
    if max(a.numerator.bit_length(), a.denominator.bit_length()) > 4 * MAX_BITS:
        raise TooBig("number")
    return operation(a, b)


class _Calculator:
    """A parser by recursive descent that evaluates LaTeX or plain arithmetic at test point k."""

    def __init__(self, text: str, k: int):
        self.tokens, self.k = _TOKENS.findall(text), k
        self.i = self.depth = 0
        self.constant = True

    def run(self):
        value = self.sum()
        if self.i < len(self.tokens):
            raise Unreadable(self.tokens[self.i])
        return value

    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or expected not in ("", token):
            raise Unreadable(token)
        self.i += 1
        return token

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig("nested too deeply")
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
                raise Unreadable("two numbers side by side")
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
            base = _combine(operator.mul, base, mp().pi / 180)
        return base

    def exponent(self):
        if self.peek() == "{":
            return self.primary()
        sign = -1 if self.peek() == "-" and self.take() else 1
        return sign * self.power()

    def raised(self, base, exponent):
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
            if abs(exponent) * max(size - 1, 0) > MAX_BITS:
                raise TooBig("exponent")
            if exponent.denominator == 1:
                return base ** int(exponent)
        if not base:
            raise Unreadable("power of zero")
        base, exponent = mp().convert(base), mp().convert(exponent)
        if abs(exponent) * abs(mp().ln(base)) > MAX_BITS:
            raise TooBig("exponent")
        return base**exponent

    def root(self, value, degree):
        if isinstance(value, Fraction) and isinstance(degree, Fraction) and value < 0 and degree % 2 == 1:
            return -self.raised(-value, 1 / degree)  # the real root
        return self.raised(value, 1 / degree)

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
        if token in _CLOSING:
            value = self.sum()
            self.take(_CLOSING[token])
            return abs(value) if token == "|" else value
        if token == r"\frac":
            return _combine(operator.truediv, self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.primary() if self.peek() == "[" else Fraction(2)
            return self.root(self.argument(), degree)
        if token in _CONSTANTS and self.peek() != "_":
            return +getattr(mp(), _CONSTANTS[token])
        if token in _NAMED_FUNCTIONS:
            return self.function(token[1:])
        if token.removeprefix("\\") in _GREEK or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self.variable(token)
        raise Unreadable(token)

    def number(self, token: str) -> Fraction:
        if len(token) > MAX_BITS // 4:
            raise TooBig("number")
        value = Fraction(token.rstrip("."))
        if self.peek() not in (r"\overline", r"\dot", r"\bar"):
            return value
        self.take()  # a repeating decimal, 0.1\overline{6}
        digits = "".join(self.tokens[self.i : self.i + 3]).strip("{}")
        self.i += 3 if self.peek() == "{" else 1
        if "." not in token or not digits.isdecimal():
            raise Unreadable("overline")
        return value + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(token.partition(".")[2]))

    def mixed(self) -> Fraction:
        """The proper fraction that follows an integer, as in 1\\frac{1}{2} or 1 1/2; else 0."""
        ahead = " ".join(self.tokens[self.i : self.i + 7])
        match = re.match(r"\\frac (?:\{ (\d+) \}|(\d)) ?(?:\{ (\d+) \}|(\d))|(\d+) / (\d+)(?!\S)", ahead)
        if not match:
            return Fraction(0)
        top, bottom = (int(n) for n in match.groups() if n)
        if not 0 < top < bottom:
            return Fraction(0)
        if match[5]:
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
            raise Unreadable("a function by name")
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
        if self.peek() in _CLOSING:
            x = self.primary()
        else:  # \sin 2x y: everything up to the next operator
            x = self.power()
            while (token := self.peek()) and token not in _STOP and token not in _NAMED_FUNCTIONS:
                x = _combine(operator.mul, x, self.power())
        if power == -1 and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        if name == "abs":
            value = abs(x)
        elif name == "ln":
            value = mp().ln(x)
        elif name in ("log", "lg"):
            value = mp().log(x, base)
        elif abs(x) > 10**6:
            raise TooBig("argument of a function")
        else:
            value = getattr(mp(), name.replace("arc", "a"))(x)
        if not isinstance(value, Fraction) and mp().isinf(value):  # ln 0, which 1/ln 0 would make a 0
            raise TooBig("infinite")
        return value if power is None else self.raised(value, power)


@lru_cache(maxsize=4096)
def evaluate(text: str) -> tuple:
    """Values of an expression at the test points; a single value if it has no variables.

    Raises:
        TooBig: a number beyond the limits.
        CANNOT_EVALUATE: text outside the grammar, a division by zero, a function outside its domain.
    """
    values = []
    for k in range(4):
        calculator = _Calculator(text, k)
        values.append(calculator.run())
        if calculator.constant:
            break
    return tuple(values)


def same_values(a: Sequence, b: Sequence) -> bool:
    """Whether two lists of values agree: exactly if rational, else to 40 digits."""
    points = max(len(a), len(b))
    return all(map(_close, a * (points // len(a)), b * (points // len(b))))


def common_factor(a: Sequence, b: Sequence):
    """The one number by which every value of `b` gives that of `a`; None if there is none, or it is 0."""
    if len(a) != len(b) or not all(a) or not all(b):
        return None
    ratios = [_combine(operator.truediv, x, y) for x, y in zip(a, b, strict=True)]
    return ratios[0] if same_values(ratios, ratios[:1]) else None


def _close(x, y) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    # 40 digits; False where one is infinite, as ln 0 is, or no number
    return mp().almosteq(mp().convert(x), mp().convert(y), rel_eps=1e-40, abs_eps=1e-80)
