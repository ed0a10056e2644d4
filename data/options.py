"""Multiple choice: a question, its options, and which one is right. Options become lettered lines.

    {"question": "Which is prime?", "options": ["4", "7", "9"], "answer": "B"}       gold: (B) 7
    {"question": "Which is prime?", "A": "4", "B": "7", "answer": "7"}

Options are a column `options` or `choices` (a list, also as text in JSON or Python; a dict of letters; ARC's {"text":
[...], "label": [...]}), or columns A, B, ... or option_a, option_b, ... or option1, option2, .... What looks like
options and is none of these is an error that names it: a question without its options has an answer all the same.

The answer is a letter, an option's text, or a number that counts options from 0 or from 1: which of these, the first
rows of a set decide together. A row that they leave open, so that it could be another option, is refused.
"""

import itertools
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from answers.rules import decide
from data.formats.columns import ANSWERS, is_none, usual
from data.rows import Options, RowError, literal, plain_text

KINDS = {
    "letter": "its letter",
    "text": "its text",
    "from_0": "its number, counted from 0",
    "from_1": "its number, counted from 1",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LABEL_NAMES, _TEXT_NAMES = ("label", "key", "letter"), ("text", "value", "content")  # of one option in a list of them
_LIST_NAME = re.compile(r"options?|choices?", re.IGNORECASE)
_MEMBER_NAME = re.compile(
    r"(?:(?:options?|choices?|op|sol|ending)[ _.-]?)?(?P<label>[a-z]|\d{1,2})|ans(?:wer)?[ _.-]?(?P<letter>[a-h]|\d)",
    re.IGNORECASE,
)
_NUMBERED_ANSWER = re.compile(r"ans(?:wer)?[ _.-]?\d", re.IGNORECASE)  # BBQ, Cosmos QA
_MAYBE = re.compile(r"[a-z]|(?:ans|sol|ending).*", re.IGNORECASE)  # options if the answer is one of their labels
_LOOKS_LIKE_OPTIONS = re.compile(r"(?!.*(?:correct|gold|adopt)).*(?:option|choice|distractor).*", re.IGNORECASE)
_MAY_BE_OPTIONS = re.compile(
    r"opts|candidates?|candidate_answers|alternatives|answers|possible_answers|variants", re.IGNORECASE
)
_LETTERED = re.compile(r"(?:^|[;\n])\s*(?=\(?[A-Z][.):])")
_LETTERED_IN_LINE = re.compile(r"(?:^|,)\s*([A-Za-z]) ?\)\s*")
_MARKS = [  # of options that a question lists itself: in lines of their own, (A) ... (B) ..., A. ... B. ...
    re.compile(r"^[ \t]*[(（]?([A-Z])[.):．：、）][)）]?", re.MULTILINE),
    re.compile(r"[(（]([A-Z])[)）]"),
    re.compile(r"(?:^|(?<=\s))([A-Z])(?:[.:)](?=\s)|[．：、])"),
    re.compile(r"(?:^|(?<=\s))([A-Z])[.)]"),
    re.compile(r"^[ \t]*[(（]?([a-z])[.):．：、）][)）]?", re.MULTILINE),
    re.compile(r"[(（]([a-z])[)）]"),
]
_LATEX_MARK = re.compile(  # $\textbf{(A)}\ 1 \qquad \mathrm{(B)\ 2}$, as the AMC's are set
    r"\\(?:textbf|textrm|text|mathrm|mathbf|mathsf|bf|rm)\s*\{\s*\(([A-Z])\)([^{}]*)\}"
)
_LATEX_SPACE = r"(?:\\(?:q?quad|enspace|hspace\*?\{[^{}]*\}|[ ,;:!\\])|[\s~&;,])*"
_LABEL = re.compile(r"(?<!\w)(?:\([A-H]\)|[A-H][.):])(?!\w)")
_TRAILING = re.compile(r"(?:,? (?:or|and)| ?\( ?\)| ?\?)+$")  # (A) 1 or (B) 2?
_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # to ASCII
LONGEST = 300  # characters of an option that may be answered by its text
_INTEGER = re.compile(r"(\d{1,2})(?:\.0)?")  # 2.0 is what is left of an integer in a column with gaps


# ---------------------------------------------------------------------------------------------------------------------
# Which columns are options


@lru_cache(maxsize=1024)
def _columns(names: tuple[str, ...]) -> tuple[list[str], dict[str, str], list[str]]:
    """(columns that hold all options, label -> column that holds one, columns that only look like options)."""
    lists = [name for name in names if _LIST_NAME.fullmatch(name)]
    families: dict[str, dict[str, str]] = {}  # option_ -> {"a": "option_a", "b": "option_b"}
    counted = bool(usual(("label",), names)) and not usual(ANSWERS, names)  # answer0 is no answer then, but an option
    for name in names:
        if (match := _MEMBER_NAME.fullmatch(name)) and (counted or not _NUMBERED_ANSWER.fullmatch(name)):
            label = match["label"] or match["letter"]
            families.setdefault(name.removesuffix(label), {})[label] = name
    members: dict[str, str] = {}
    for stem, family in families.items():
        labels = sorted(family, key=lambda label: (len(label), label))
        lettered = LETTERS.startswith("".join(labels).upper())
        numbered = stem and labels[:2] in (["0", "1"], ["1", "2"])
        if len(labels) > max(1, len(members)) and (lettered or numbered):
            members = {label: family[label] for label in labels}
    used = {*lists, *members.values()}
    suspects = [name for name in names if _LOOKS_LIKE_OPTIONS.fullmatch(name) and name not in used]
    if counted:  # as of ReClor's answers, HellaSwag's endings
        suspects += [name for name in names if name.lower() in ("answers", "endings")]
    return lists, members, suspects


def options_of(raw: dict[str, Any], answer: str = "") -> Options | None:
    """The options of a record; None for an open question. Raises RowError.

    Columns a, b, c may be anything, and so may sol1, sol2: they are options where `answer` is one of their labels, or
    counts them, or is one of them.
    """
    lists, members, suspects = _columns(tuple(name for name in raw if isinstance(name, str)))
    for name in suspects:
        value = literal(raw[name])
        if value and (isinstance(value, (list, tuple, dict)) or "distractor" in name.lower()):
            raise RowError(
                name, "looks like options and is not used; expected a column options or choices, or columns A, B, ..."
            )
    if members and not _are_options(members, _bare(answer)) and answer not in map(raw.get, members.values()):
        members = {}
    nothing = (None, "", [], {}, ())
    sources = [(name, _listed(name, raw[name])) for name in lists if literal(raw[name]) not in nothing]
    if cells := {label.upper(): raw[name] for label, name in members.items() if not is_none(raw[name])}:
        name = next(iter(members.values()))
        numbered = name[-1].isdigit()  # the columns are; answers may count otherwise
        sources.append((name, Options(_texts(name, cells), not numbered)))
    others = [name for name, options in sources if [*options.texts.values()] != [*sources[0][1].texts.values()]]
    if others:
        raise RowError(others[0], f"expected the options once, got others in {sources[0][0]}")
    return sources[0][1] if sources else None


def _are_options(members: dict[str, str], answer: str) -> bool:
    """Whether columns, by their labels, are options: by their names, or by what the answer is."""
    names = [name for name in members.values() if not name.isupper()]  # A, B, ... are
    if not names or not all(map(_MAYBE.fullmatch, names)):
        return True
    if {len(name) for name in names} == {1}:
        return answer in members
    return answer.upper() in map(str.upper, members) or bool(answer.isdecimal() and int(answer) <= len(members))


def may_have_options(names: Iterable[str]) -> bool:
    """Whether columns of these names hold options."""
    return any(_columns(tuple(names))[:2])


def check_letter(answer: str, raw: dict[str, Any], question: Any) -> None:
    """Raises RowError for a letter whose options are in none of the columns that there are for them, and in no list in
    the question. An empty list says that there are none, as of an open question of MMMU's."""
    if not (len(answer) == 1 and "A" <= answer <= "Z"):
        return
    names = tuple(name for name in raw if isinstance(name, str))
    lists, members, _ = _columns(names)
    if any(literal(raw[name]) == [] for name in lists) or re.search(rf"(?<!\w)\(?{answer}\)?[.):]", str(question)):
        return
    if lists or members:
        name = lists[0] if lists else next(iter(members.values()))
        raise RowError(name, f"expected options, of which the answer is {answer}, got none")
    for name in names:
        value = literal(raw[name])
        listed = _MAY_BE_OPTIONS.fullmatch(name) and isinstance(value, (list, tuple)) and answer not in value
        lettered = isinstance(value, dict) and answer in value and set(value) <= set(LETTERS)
        texts = list(value.values()) if lettered else value if listed else ()
        if len(texts) > 1 and all(isinstance(text, str) for text in texts):
            raise RowError(
                name,
                f"looks like the options of the answer {answer} and is not used; expected them in options or choices",
            )


def _listed(name: str, value: Any) -> Options:
    value, labels = literal(value), None
    if isinstance(value, str):
        value = _lettered(value) or value
    value = _labelled(value)
    if isinstance(value, dict):
        arc = {"label", "text"} <= value.keys()
        labels, value = (value["label"], value["text"]) if arc else (list(value), list(value.values()))
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise RowError(name, f"expected a list of 2 to {len(LETTERS)} options, got {value!r:.60}")
    names = LETTERS[: len(value)] if labels is None else labels
    if not isinstance(names, (str, list, tuple)) or len({str(label) for label in names}) != len(value):
        raise RowError(name, f"expected a label of its own for each option, got {names!r:.60}")
    if "".join(map(str, names)) == LETTERS[: len(value)].lower():
        names = LETTERS[: len(value)]
    return Options(_texts(name, dict(zip(map(str, names), value, strict=True))), labels is not None)


def _labelled(value: Any) -> Any:
    """label -> text of what other files have as pairs (a Parquet map) or objects with a label and a text; without the
    letters that are left open, as in a Parquet column of objects some must be."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, tuple) and len(each) == 2 for each in value):
        value = dict(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, dict) for each in value):
        names = [(usual(_LABEL_NAMES, each), usual(_TEXT_NAMES, each)) for each in value]
        if None not in itertools.chain(*names):
            value = {str(each[label]): each[text] for each, (label, text) in zip(value, names, strict=True)}
    if isinstance(value, dict) and sum(text is not None for text in value.values()) > 1:
        value = {label: text for label, text in value.items() if text is not None}
    return value


def _lettered(text: str) -> list[str] | None:
    """The options of "A. 3; B. 4", as We-Math has them, or of "a ) 1,000 , b ) 2", as MathQA; None for other text."""
    parts = [part.strip(" ;\n") for part in _LETTERED.split(text) if part.strip()]
    if all(re.match(rf"\(?{letter}[.):]", part) for letter, part in zip(LETTERS, parts, strict=False)):
        return parts
    before, *parts = _LETTERED_IN_LINE.split(text)
    letters, texts = "".join(parts[::2]).upper(), [part.strip() for part in parts[1::2]]
    return texts if not before.strip() and LETTERS.startswith(letters) else None


def _texts(name: str, options: dict[str, Any]) -> dict[str, str]:
    """Options as text, without the label that each may begin with."""
    if any(not isinstance(o, (str, int, float)) or not str(o).strip() for o in options.values()) or len(options) < 2:
        raise RowError(name, f"expected two or more options as text, got {list(options.values())!r:.60}")
    texts = {plain_text(label, name): plain_text(" ".join(str(o).split()), name) for label, o in options.items()}
    bare = {label: _without_label(text, label) for label, text in texts.items()}
    return bare if all(bare[label] and bare[label] != text for label, text in texts.items()) else texts


def _without_label(text: str, label: str) -> str:
    """The text of `B. 7`, `(B) 7`, `B - 7`, also where letters and punctuation are wide, as in Chinese."""
    mark = r"[.:、。,](?!\d)" if label.isdigit() else "[.:、。,]"
    begins = rf"\(?{re.escape(label)}(?:\)|{mark}|\s+[-–]\s)\)?\s*"
    found = re.match(begins, text.translate(_WIDE), re.IGNORECASE)
    if not found:
        return text
    rest = text[found.end() :]
    more = r"(?:\W*\b\d{1,2}\b)+\W*" if label.isdigit() else r"(?:\W*\b[A-Za-z]\b)+\W*"
    listed = found[0].strip()[-1:] in ",-–" and re.fullmatch(more, rest)  # as A, B names two of them
    return text if listed else rest


# ---------------------------------------------------------------------------------------------------------------------
# Which one is right


def _readings(answer: str, options: Options) -> dict[str, list[str]]:
    """What an answer may be: kind -> the labels that it would then name."""
    labels = list(options.texts)
    bare = _bare(answer)
    labels_by_kind = {
        "letter": [label for label in labels if label == bare] or [x for x in labels if x.upper() == bare.upper()],
        "text": [label for label, text in options.texts.items() if _same(answer, text, label)],
    }
    if number := _INTEGER.fullmatch(bare):
        n = int(number[1])
        labels_by_kind |= {"from_0": labels[n : n + 1], "from_1": labels[n - 1 : n] if n else []}
    if options.has_labels and labels_by_kind["letter"]:
        return {"letter": labels_by_kind["letter"]}
    if labels[0].isdigit() and not options.has_labels:
        del labels_by_kind["letter"]
    return {kind: named for kind, named in labels_by_kind.items() if named}


def letter_of(answer: str) -> str | None:
    """The letter that is all an answer says, in whatever words, as a capital."""
    bare = _bare(answer)
    return bare.upper() if re.fullmatch("[A-Za-z]", bare) else None


def _bare(answer: str) -> str:
    """The letter of `(B)`, `B.`, `\\text{B}`, `Option B`, `The answer is B`; another answer is left nearly as it is."""
    answer = answer.translate(_WIDE).strip("()[].。$ ")
    answer = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([A-Za-z])\}", r"\1", answer)
    said = re.fullmatch(
        r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?|(?:正确)?(?:答案|选项)[是为]?)[:：]? ?"
        r"\(?([A-Z])\)?",
        answer,
        re.IGNORECASE,
    )
    return said[1] if said else answer


def _same(answer: str, text: str, label: str) -> bool:
    """Whether this is the option's text, with its label or without."""

    def plain(words: str) -> str:
        return " ".join(words.split()).strip("$").casefold()

    return plain(text) in (plain(answer), plain(_without_label(" ".join(answer.split()), label)))


def listed_in(question: str) -> Options | None:
    """The options that a question lists itself, if their labels are A, B, ... (or a, b, ...) in this order."""
    question = _LATEX_MARK.sub(r"(\1)\2", question)
    for mark in _MARKS:
        _, *parts = mark.split(question)
        labels, texts = parts[::2], [text.strip() for text in parts[1::2]]
        labels = [label.upper() for label in labels] if "".join(labels).islower() else labels
        if len(labels) > 1 and "".join(labels) == LETTERS[: len(labels)]:
            texts[-1] = texts[-1].partition("\n")[0]
            texts = [_TRAILING.sub("", _unspaced(" ".join(text.split()))).strip(" ;,") for text in texts]
            if all(text and _balanced(text) and not _LABEL.search(text) for text in texts):
                return Options(dict(zip(labels, texts, strict=True)), True)
    return None


def _balanced(text: str) -> bool:
    """Whether a text is no piece cut out of a LaTeX group, or out of two."""
    return text.count("{") == text.count("}") and not re.match(r"[^{]*\}", text)


def _unspaced(text: str) -> str:
    """An option's text without the space around it and without the end of a formula that began before it, or goes on
    after it."""
    text = re.sub(rf"^{_LATEX_SPACE}|{_LATEX_SPACE}$", "", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2:  # \$ is money
        text = re.sub(r"(?<!\\)\$$", "", text) if re.search(r"(?<!\\)\$$", text) else text.removeprefix("$")
        text = re.sub(rf"^{_LATEX_SPACE}|{_LATEX_SPACE}$", "", text)
    return text


def with_letters(options: Options, right: str) -> tuple[Options, str]:
    """(the options, the right one's label or labels) with letters, where the columns are numbered (`option1`): beside
    numbers, an answer that is the text 7 could not be told from a label."""
    if options.has_labels or not all(map(str.isdigit, options.texts)):
        return options, right
    letters = dict(zip(options.texts, LETTERS, strict=False))
    texts = {letters[label]: text for label, text in options.texts.items()}
    return Options(texts, False), ", ".join(letters[label] for label in right.split(", "))


def gold_of(label: str, options: Options) -> str:
    """The right option as a gold: `(B) 12 cm` is answered by B and by 12 cm. The label alone where its text is made of
    letters that might be labels themselves or is another option's to the verifier, and for labels that are no letters.
    """
    text = options.texts.get(label, "")
    told_apart = re.fullmatch("[A-Z]", label) and text and not re.fullmatch(r"(?:\W*\b[A-Za-z]\b)+\W*", text)
    if not told_apart or len(text) > LONGEST:
        return label
    others = [other for name, other in options.texts.items() if name != label]
    equal = any((result := decide(other, text)) is None or result.verdict for other in others)
    return label if equal else f"({label}) {text}"


def common_kinds(rows: Iterable[tuple[str, Options]]) -> frozenset[str]:
    """The kinds that the answers of all these rows may be."""
    kinds_of_rows = [set(kinds) for answer, options in rows if (kinds := _readings(answer, options))]
    return frozenset(set.intersection(*kinds_of_rows)) if kinds_of_rows else frozenset()


def right_label(answer: str, options: Options, letter: Any, kind: str | None, common: frozenset[str]) -> str:
    """The label of the right option; the labels, where the answer names several by their letters. Raises RowError where
    it is none, or more than one could be meant.

    Args:
        letter: the right label, where the data say it apart from the answer.
        kind: what answers are, where that was said; else `common` is what the set's first ones may all be.
    """
    possible = _readings(answer, options)
    several = list(answer) if re.fullmatch("[A-Z]+", answer) else re.split(r"\s*[,;、]\s*", answer)  # AC, or A, C
    if not possible and len(several) == len(set(several)) > 1 and options.texts.keys() >= set(several):
        return ", ".join(sorted(several))
    if letter not in (None, ""):
        letter = str(letter).strip()
        if letter not in options.texts or (answer and not any(letter in named for named in possible.values())):
            raise RowError("answer_option", f"expected the letter of the option {answer!r:.60}, got {letter!r:.60}")
        return letter
    fitting = {k: named for k, named in possible.items() if k == kind or (kind is None and k in common)}
    if kind is None and not fitting and {"letter", "text"} & possible.keys():
        fitting = possible  # said in another way than the first rows, but not as a number that might count otherwise
    named = {label for labels in fitting.values() for label in labels}
    if len(named) == 1:
        return named.pop()
    if {"from_0", "from_1"} <= fitting.keys() and not options.has_labels and _bare(answer) in options.texts:
        return _bare(answer)  # option2 is 2, as long as the set has no 0
    if len(fitting) == 1:
        raise RowError("answer", f"expected one option, got {answer!r:.60}, the text of {' and '.join(sorted(named))}")
    labels = list(options.texts)
    if kind is not None or not possible:
        expected = KINDS[kind] if kind else f"{labels[0]} to {labels[-1]}, or an option's text"
        raise RowError("answer", f"expected {expected}, got {answer!r:.60}")
    ways = " or ".join(f"{' and '.join(named)} by {KINDS[k]}" for k, named in (fitting or possible).items())
    if not fitting:
        first = " or ".join(KINDS[k] for k in KINDS if k in common)
        ways += f", and the first rows give {first or 'now this, now that'}"
    raise RowError("answer", f"{answer!r:.60} may be {ways}; say which with --answer_kind")
