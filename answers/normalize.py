r"""One spelling for what is written in several ways, and texts split outside their brackets.

    clean("½")                      # \frac{1}{2}, and so for \dfrac{1}{2} and $\tfrac{1}{2}$.
    split("(1,2),3", {","})         # (["(1,2)", "3"], [","])

Unicode becomes LaTeX, synonyms become one command, decoration is removed.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from answers.calculator import FUNCTIONS, MAX_DEPTH, TooBig

_UNICODE = r"""
    −–—‐‑‒﹣－ -  ⋅·∙• \cdot  ×✕ \times  ⁄∕÷ /  √ \sqrt  ∞ \infty  ± \pm  ∓ \mp  ≤⩽ \leq  ≥⩾ \geq
    ≠ \neq  ≈ \approx  ∪ \cup  ∩ \cap  ∈ \in  ∅ \emptyset  °º ^\circ  ∠ \angle  ∆ \Delta  ℝ \mathbb{R}
    ⟨ \langle  ⟩ \rangle  “”„‟ "  ‘’′ '  ″ ''  ，、 ,  。 .  ∶ :  ∣ |  ％ %  ￥ ¥  ￡ £
    ⊆ \subseteq  ⊂ \subset  ∥ \parallel  ⊥ \perp  △ \triangle  ≅≌ \cong  ∼ \sim  ∖ \setminus  → \to  ∀ \forall
    ℤ \mathbb{Z}  ℕ \mathbb{N}  或 \text{or}  和 \text{and}
""".split()
_UNICODE_TABLE = {
    ord(c): latex + " " * ("\\" in latex)
    for characters, latex in zip(_UNICODE[::2], _UNICODE[1::2], strict=True)
    for c in characters
}
for _c in "αβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΦΨΩ":
    _name = unicodedata.name(_c).split()[-1].lower().replace("lamda", "lambda")
    _UNICODE_TABLE[ord(_c)] = f"\\{_name if _c.islower() else _name.capitalize()} "
ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"))
ROW = "\u240a"  # stands for the \\ between the rows of a matrix

TEXT_COMMANDS = r"""\textbf \textit \textrm \textsf \texttt \textsc \textnormal \textmd \textup \mathrm \mathbf \mathit
    \mathsf \mathtt \mbox \hbox"""
_SPELLINGS = {  # one command for its synonyms, or what a command of layout leaves
    r"\frac": r"\dfrac \tfrac \cfrac",
    r"\binom": r"\dbinom \tbinom",
    r"\text": TEXT_COMMANDS + r" \operatorname \operatorname*",
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
    "": r"""\! \left \right \middle \displaystyle \textstyle \limits \large \Large \big \Big \bigg \Bigg \bigl \Bigl
        \biggl \Biggl \bigr \Bigr \biggr \Biggr \bigm \Bigm \number \num""",
}
_COMMANDS = {name: latex for latex, names in _SPELLINGS.items() for name in names.split()}
_COMMAND = re.compile(r"\\(?:[A-Za-z]+\*?(?:\s+(?=\{))?|.)", re.DOTALL)


def _rewrites(*rules: tuple[str, str | Callable[[re.Match], str]]) -> list[tuple[re.Pattern, Any]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_QUANTITY = r"^((?:\(?[A-Z][).:]\s*)?[+-]?\d[\d.,]*(?:\s*\\times\s*10\s*\^\s*\{?-?\d+\}?)?)\s*"  # 5, (B) 5 \times 10^3
_ONE_SPACE = (r"\s+", " ")  # first of all: a rule with several \s* takes hours on a run of spaces
_BEFORE_COMMANDS = _rewrites(  # bold and arrows around a single symbol
    _ONE_SPACE,
    (r"\\(?:mathbf|boldsymbol|bm|vec|overrightarrow)\s*\{\s*(\\?[a-zA-Z]+|\d)\s*\}(?<![a-z]{2}\})", r"\1 "),
    (r"\\(?:text)?color\s*\{\w+\}", " "),
    (r"(?<=\d)(?<!\d{4}),\s*(?:\\!\s*)+(?=\d{3}(?!\d))", ""),  # 11,\! 111 is one number
    (r"(?<![\\A-Za-z}])\{\s*\}(?=\s*\^)", ""),  # 30{}^\circ
    (r"\\(?:quantity|qty|SI)\s*\{([^{}]*)\}\s*\{([A-Za-z][^{}\\]*)\}", r"\1\\text{ \2}"),
)
_AFTER_COMMANDS = _rewrites(
    _ONE_SPACE,
    (  # x = 2k + 1, k \in \mathbb{Z}
        r"(?<=.)[,;]?\s*\(?\s*(?:\\text\{\s*(?:where|for|with)\s*\})?\s*[a-zA-Z]\s*\\in\s*"
        r"(?:\\(?:mathbb|text)\s*\{?[ZN]\}?|[ZN](?![a-z]))(?:[+*^_]|\{[+*]\})*\s*\)?[\s.]*$",
        "",
    ),
    (  # for all x, \forall x \in \mathbb{R}
        r"(?<=\S),?\s*(?:\\text\{\s*for (?:all|any|every)\b[^{}]*\}|\\forall)\s*"
        r"(?:[a-zA-Z](?:\s*\\in\s*(?:\\(?:mathbb|text)\s*\{?[A-Z]\}?|[A-Z]))?(?:[+*^_]|\{[+*]\})*)?[\s.]*$",
        "",
    ),
    (r"\\text\{\s*(" + FUNCTIONS + r")\s*\}", r"\\\1 "),
    (r"\\text\{\s*([:;,.%$])?\s*\}", r"\1"),
    (r"\\frac\s*\{\\text\{([^{}]*)\}\}\s*\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}"),
    (r"\}\s*/\s*\\text\{", "/"),
    (r"\\overline\s*\{([A-Z]{2,})\}|\\(?:hat|widehat)\s*\{?\s*\\?([a-z])(?:math)?\s*\}?", r"\1\2 "),
    (r"\^\s*(?:\{\s*\^?\\circ(?![a-z])\s*\}|\^?\\circ(?![a-z]))", r"^\\circ "),
    (r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![a-z]))", lambda match: "'" * match[0].count("prime")),
    (r"\\text\{([^{}^]*[A-Za-z])\s*\^\s*(?:\{\s*(-?\d)\s*\}|(-?\d))\s*\}", r"\\text{\1}^{\2\3}"),
    (r"(?<=\d)\s*(?:\^\s*\{\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}|\^?\s*\\text\{\s*-?(?:st|nd|rd|th)\s*\})", ""),
    (r"\\text\{\s*,\s*(and|or)\s*\}", r"\\text{\1}"),
    (r"\\text\{\s*\^\\circ\s*([CF]?)\s*\}", r"^\\circ \1"),
    (_QUANTITY + r"(?:\\text\{\s*([kM])\s*\}\s*|([kM])\s*)\\Omega$", r"\1\\text{ \2\3ohm}"),
    (_QUANTITY + r"\\text\{\s*([kM]?)\s*\\Omega\s*\}$", r"\1\\text{ \2ohm}"),
    (_QUANTITY + r"(?:\\mu\s*\\text\{\s*([A-Za-z])\s*\}|\\text\{\s*\\mu\s*([A-Za-z])\s*\})$", r"\1\\text{ micro\2\3}"),
    (r"(?<=[\d}])\s*\\Omega$", r"\\text{ohm}"),
    (r"\\text\{([^{}]*)\\cdot\s*([^{}]*)\}", r"\\text{\1 \2}"),
    (r"\\frac ?(\d) (\d)(?!\d)", r"\\frac{\1}{\2}"),
)
_PLAIN = _rewrites(
    (r"~|\s", " "),
    (r"\{,\}", ","),
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\neq "),
    (r"\.\.\.|…", r"\\ldots "),
    (r"\*\*", "^"),
    (r"(?<![A-Za-z\\])(" + FUNCTIONS + r"|pi|infty|theta|alpha|beta)(?![A-Za-z])", r"\\\1 "),
    (r"(?i)(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\\sqrt\s+(?=[\d({\[])", r"\\sqrt"),
    (r"(?<=[\d ])([cdkm]?m|ft)([23])$", r"\1^\2"),
    (r"(?<=\d)(?:\^\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th))$", ""),
    (r"^([+-]?\d[\d.,]*) \(([A-Za-z]{3}[A-Za-z ]*)\)$", r"\1 \2"),  # 9 (apples)
    (r"(?<=\d)\s*\^\s*(?:\{o\}|o(?![a-z])|\{\\text\{o\}\}|\\text\{o\})", r"^\\circ "),
    _ONE_SPACE,
)
_ANSWER_IS = re.compile(
    r"(?:\\text\{\s*)?(?:the )?(?:final )?(?:correct )?answer(?: is\b|\s*:)\s*:?\s*\}?|\\approx|\\therefore|"
    r"(?:\\text\{\s*)?(?:\\sim|(?:about|around|roughly|approximately|approx\.?)(?![a-z])|大?约为?)\s*\}?\s*"
    r"(?=[-+]?[\d.]|\\frac|\\?\$)",
    re.I,
)


_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.\\/^{])(\d*\.\d+(?=[eE][+-]?\d)|\d+(?=[eE]\+?\d))[eE]([+-]?\d{1,3})(?![\w.])")
_APART = re.compile(r"(?<=[\d}])(?:[ \t]*\n|[ \t]*\${1,2}\s+\${1,2})\s*+(?=\d)")


@lru_cache(maxsize=4096)  # a gold comes once for each of its rollouts
def clean(text: str) -> str:
    """The one spelling of an answer."""
    text = text.translate(ZERO_WIDTH)
    text = (text if text.isascii() else _from_unicode(text)).strip()
    if bold := re.fullmatch(r"(\*\*|__|`)([^*`]+)\1", text):
        text = bold[2]
    if r"\begin" not in text:  # values in lines or formulas of their own
        text = _APART.sub(", ", text)
    text = text.replace(r"\$", "\uff04")
    if text.count("$") % 2 == 0:
        text = text.replace("$", " ")  # math mode
    text = text.replace("\uff04", "$")
    if r"\begin{cases}" in text:  # a system of equations is a list of them
        text = text.replace(r"\begin{cases}", "").replace(r"\end{cases}", "").replace(r"\\", ", ").replace("&", " ")
    if r"\begin" in text:
        text = text.replace(r"\\", ROW)
    elif "\\" in text:  # doubled by escaping, or a line break
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text).replace(r"\\", " ")
    if "\\" in text:
        text = _apply(_BEFORE_COMMANDS, text)
        text = _COMMAND.sub(lambda match: _COMMANDS.get(command := match[0].strip(), command), text)
        text = _apply(_AFTER_COMMANDS, text)
    text = strip_braces(_apply(_PLAIN, text).strip())
    if (box := re.match(r"\\f?boxe?d?\s*(?=\{)", text)) and is_enclosed(text, box.end()):
        text = text[box.end() + 1 : -1].strip()
    text = _unwrapped(text)
    text = _ANSWER_IS.sub("", text, count=1) if _ANSWER_IS.match(text) else text
    text = re.sub(r"^=(?=.)", "", text.strip())
    text = re.sub(r"[.,;:\s]+\\?$|\\$", "", text).strip()
    if scientific := re.fullmatch(r"([+-]?\d*\.?\d+)[eE]([+-]?\d+)", text):
        return _power_of_ten(scientific)
    return _unwrapped(text)


def _unwrapped(text: str) -> str:
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return re.sub(r"[.,;:\s]+$", "", whole[1]).strip() if whole else text


def _power_of_ten(number: re.Match) -> str:
    return f"{number[1]} \\times 10^{{{int(number[2])}}}"


def with_powers_of_ten(text: str) -> str:
    """5.4e-3 and 3e8 within a longer answer as powers of ten: another way to read a multiple of Euler's number."""
    return _SCIENTIFIC.sub(_power_of_ten, text)


_CHINESE_UNITS = dict(
    pair.split(":")
    for pair in """
    毫米:mm 厘米:cm 分米:dm 千米:km 公里:km 米:m 毫升:mL 升:L 毫克:mg 千克:kg 公斤:kg 克:g 吨:t
    小时:h 时:h 分钟:min 秒:s 天:day 年:year 度:degree 元:yuan
    个: 人: 只: 本: 条: 张: 次: 辆: 棵: 件: 名: 种: 块: 支:
    """.split()
)
_CHINESE_UNIT = re.compile(rf"(?<=[\d)}}\s])(平方|立方)?({'|'.join(_CHINESE_UNITS)})(?=$|[\s,，、。或和$])")

_CHINESE_TEXT = re.compile(
    rf"\\(?:text|mathrm)\s*\{{\s*((?:平方|立方)?(?:{'|'.join(_CHINESE_UNITS)}))\s*\}}(?=$|[\s,，、。])"
)


def _chinese_unit(match: re.Match) -> str:
    unit, power = _CHINESE_UNITS[match[2]], {"平方": "^2", "立方": "^3", None: ""}[match[1]]
    return rf"\text{{ {unit}}}{power}" if unit else ""


_MICRO = re.compile(_QUANTITY + "(?<=\\s)[µμ]([A-Za-z])$")  # 10 μF; but 2μg, of friction, has no space


def _from_unicode(text: str) -> str:
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", r"^{\g<0>}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", r"_{\g<0>}", text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda m: rf"\frac{{{unicodedata.normalize('NFKC', m[0])}}}".replace("⁄", "}{"), text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = _MICRO.sub(r"\1\\text{ micro\2}", text)
    text = re.sub("[①-⑨]", lambda m: f"({ord(m[0]) - ord('①') + 1})", text)
    text = _CHINESE_UNIT.sub(_chinese_unit, _CHINESE_TEXT.sub(r" \1", text))
    return unicodedata.normalize("NFKC", text.translate(_UNICODE_TABLE)).translate(_UNICODE_TABLE)


def _apply(rules: list[tuple[re.Pattern, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def strip_braces(text: str) -> str:
    """Without invisible outer braces; around a list they were meant as the braces of a set."""
    for _ in range(MAX_DEPTH):
        if text[:1] != "{" or not is_enclosed(text):
            break
        inner = text[1:-1].strip()
        if len(split(inner, {","})[0]) > 1:
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


def is_enclosed(text: str, start: int = 0) -> bool:
    """Whether the bracket at `start` is closed (by one of any kind) at the end of the text."""
    depth = 0
    for token in _BRACKETS.finditer(text, start):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth == 0:
            return token.end() == len(text)
    return False


def split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Pieces between separators that stand outside every bracket, and those separators."""
    if not any(separator in text for separator in separators):
        return [text], []
    pieces, signs, depth, start = [], [], 0, 0
    for token in _SPLIT_TOKENS.finditer(text):
        symbol = token.group()
        if symbol in _OPEN or symbol.startswith(r"\begin"):
            depth += 1
            if depth > MAX_DEPTH:
                raise TooBig("nested too deeply")
        elif symbol in _CLOSE or symbol.startswith(r"\end{"):
            depth -= 1
        elif depth == 0:
            word = symbol[6:-1].strip() if symbol.startswith(r"\text{") else symbol
            if word in separators:
                pieces.append(text[start : token.start()].strip())
                signs.append(word)
                start = token.end()
    pieces.append(text[start:].strip())
    return pieces, signs


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[^\W\d_a-zA-Z]")


@lru_cache(maxsize=4096)
def unwrap_text(text: str) -> str:
    r"""Without the commands around words: 5 \text{ cm} -> 5 cm."""
    return " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).split())


def has_words(text: str) -> bool:
    return _WORD.search(unwrap_text(text)) is not None


@lru_cache(maxsize=4096)
def as_words(text: str) -> str:
    """A textual answer for comparison: case, punctuation, articles and spacing removed."""
    words = re.sub(r"[^\w+\-/^=<>\\]+", " ", unwrap_text(text)).split()
    last = len(words) - 1
    articles = {
        i for i, w in enumerate(words) if w.casefold() in ("the", "a", "an") and i < last and (w != "A" or not i)
    }
    return " ".join(w for i, w in enumerate(words) if i not in articles).casefold()  # vitamin A is not vitamin


@lru_cache(maxsize=4096)
def squeeze(text: str) -> str:
    """Without the spaces that carry no meaning (a space between digits does)."""
    text = re.sub(r"\{(\w)\}(?!\w)", r" \1", text)  # x^{2} is x^2
    return re.sub(r"(?<![\dA-Za-z]) | (?![\dA-Za-z])|(?<=[a-z]) (?=\d)", "", text)
