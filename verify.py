r"""Boxed answers, verdicts, answer equality and rewards: every training label rests on this file.

    from verify import extract_boxed, parse_verdict, is_equal, verify_many, answer_reward
    is_equal(r"\dfrac12", "0.5")                        # True
    python verify.py '1\frac{1}{2}' '3/2'               # True, and the rule that decided

answers/ holds the rules. Departures from plain math-verify (https://github.com/huggingface/Math-Verify), which is the
last resort here and not the first:

1. Lists, tuples, sets, intervals, relations, units and words are taken apart before any algebra, so (1,2) is not {1,2},
   [1,2) is not (1,2], 2x = 10 is not 10, and `listen` is not `silent`.
2. Numbers are exact fractions. A decimal gold is compared at its own precision: pi equals a gold 3.14. A decimal equals
   an exact gold only if it is that gold rounded to six significant digits or more (five inside a list, tuple or
   interval): 3.14159 equals a gold pi, 3.14 does not.
3. Expressions are evaluated at fixed random points, exactly or with 60 digits, in microseconds. Only what the
   calculator can't read (integrals, floors, ...) goes to math-verify in a worker.
4. Workers that exceed their limit are killed. No model output is ever evaluated as code: sympy's `parse_expr` (which
   calls eval) is never reached, only the LaTeX grammar of latex2sympy2.
"""

import logging
import re
import sys
from collections.abc import Sequence

from answers import calculator, workers
from answers.calculator import TooBig
from answers.normalize import TEXT_COMMANDS, clean
from answers.rules import Result, decide
from answers.units import plain_number, split_unit

logger = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds of wall time for one comparison in a worker


# --------------------------------------------------------------------------- extraction

# Alternatives that each begin with a literal: re then skips all other characters, three times as fast as with [{}].
_BRACE_TOKENS = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*\{?|\\.|\{|\}", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*([^\s{}$\\]+)")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`), stripped.

    None where there is no box, or the last one is empty. One pass over a text of any length.
    """
    start, content = -1, ""
    open_braces = []  # where the content of a box starts; None for any other brace
    for token in _BRACE_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "{":
            open_braces.append(None)
        elif symbol == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and opened > start:
                start, content = opened, text[opened : token.start()]
        elif len(symbol) > 2 and symbol.endswith("{"):
            open_braces.append(token.end())
        elif len(symbol) > 2 and (bare := _BARE_BOX.match(text, token.start())):
            start, content = bare.start(1), bare.group(1).rstrip(".,;:")
    return content.strip() or None


# --------------------------------------------------------------------------- verdicts

_TEXT = re.compile(r"(?:\\text|" + "|".join(map(re.escape, TEXT_COMMANDS.split())) + r")\s*(?=\{)")
_DECORATION = re.compile(r"\\[,;!]|\\[()\[\]]|[{}$*_`\"'.!\u200b]")
_VERDICT = re.compile(
    r"(?:(?:final\s+)?(?:answer|verdict|option|choice|response|solution)\s*(?:is\b|:)?\s*)?"
    r"[(\[]?\s*(yes|no|a|b)\s*[)\]]?",
    re.IGNORECASE,
)


def parse_verdict(text: str) -> str | None:
    r"""A judge's verdict: "Yes", "No", "A", "B", or None for anything else.

    `text` is a completion, whose last box counts, or the bare verdict itself. Case and the usual decoration are
    accepted (`\text{Yes}`, `Yes.`, `**No**`, `(A)`, `Answer: B`); a sentence, both verdicts or an unclosed box are not.
    """
    if "\\boxed" in text or "\\fbox" in text:
        text = extract_boxed(text) or ""
    if len(text) > 200:
        return None
    match = _VERDICT.fullmatch(_DECORATION.sub(" ", _TEXT.sub("", text)).strip())
    return match.group(1).capitalize() if match else None


# --------------------------------------------------------------------------- equality

_RANK = (False, None, True)  # the best verdict over the golds counts; None beats False, for the pair may be right


def explain_many(pairs: Sequence[tuple], timeout: float = TIMEOUT) -> list[Result]:
    """`verify_many` with reasons: one Result(verdict, reason) for each pair, in order."""
    answers = []  # (pred, its acceptable golds)
    for pred, gold in pairs:
        answers.append((pred, _usable_golds(gold)))
    results = {key: decide(*key) for key in dict.fromkeys((pred, gold) for pred, golds in answers for gold in golds)}
    undecided = [key for key, result in results.items() if result is None]
    results.update(zip(undecided, workers.pool.run(undecided, timeout), strict=True))
    no_gold = Result(None, "no usable gold")
    return [
        max((results[pred, gold] for gold in golds), key=lambda result: _RANK.index(result.verdict), default=no_gold)
        for pred, golds in answers
    ]


def _usable_golds(gold) -> list[str]:
    """The acceptable answers among what a row has as its gold."""
    return [str(each) for each in (gold if isinstance(gold, (list, tuple)) else [gold]) if _usable(each)]


def _usable(gold) -> bool:
    if isinstance(gold, str):
        return bool(gold.strip())
    return isinstance(gold, (int, float)) and not isinstance(gold, bool) and abs(gold) < float("inf")


def verify_many(pairs: Sequence[tuple], timeout: float = TIMEOUT) -> list[bool | None]:
    """Whether each prediction equals its gold.

    Args:
        pairs: (pred, gold) each. `pred` is an extracted answer, None if there was no box; `gold` is a string (or a
            number), or a list of acceptable ones.
        timeout: seconds of wall time for one pair in a worker.

    Returns:
        In order: True, False, or None where the pair is unscorable: no usable gold, or the limit of time or memory was
        hit. `explain_many` gives the reasons.

    Raises:
        RuntimeError: a worker cannot start (math-verify is not installed).
    """
    return [result.verdict for result in explain_many(pairs, timeout)]


def is_equal(pred: str | None, gold) -> bool | None:
    """`verify_many` for one pair."""
    return verify_many([(pred, gold)])[0]


def warm_up() -> None:
    """Start the worker processes now (seconds), so that no training step waits for them."""
    calculator.mp()
    workers.pool.warm_up()


# --------------------------------------------------------------------------- rewards

_logged: set[str] = set()


def last_text(messages: str | Sequence) -> str:
    """The text of a completion's or a prompt's last message; "" where it has none, as in a tool call. A plain string is
    returned as it is."""
    if isinstance(messages, str):
        return messages
    content = messages[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def log_unscorable(row: int, gold, reason: str) -> None:
    """Warn of a gold that no completion can be scored against; once for each gold."""
    text = repr(gold)[:300]
    if text not in _logged and len(_logged) < 10_000:
        _logged.add(text)
        logger.warning("row %d is unscorable (%s), its gold is %s", row, reason, text)


_SUM = re.compile(r"(?:[\d.()\s+*-]|\\times|\\cdot|\\div)+")
_OPERATION = re.compile(r"[\d)]\s*(?:[+*-]|\\times|\\cdot|\\div|(?<=\))\()")
_LABEL = re.compile(r"\s*(?:\([A-Z]\)|[A-Z][.:])\s*(?=\S)")  # of an option


def is_unfinished(pred: str, gold: str) -> bool:
    """Whether `pred` is arithmetic still to be done, and the gold a number: 7 + 5 for 12."""
    if not _OPERATION.search(pred):
        return False
    try:
        p, g = (clean(text[label.end() :] if (label := _LABEL.match(text)) else text) for text in (pred, gold))
        p, g = split_unit(p.rpartition("=")[2].strip())[0], plain_number(split_unit(g)[0])
    except (TooBig, ValueError):
        return False
    return bool(re.fullmatch(r"-?\d+(?:\.\d+)?", g) and _SUM.fullmatch(p) and _OPERATION.search(p))


def answer_reward(prompts, completions, solution, **columns) -> list[float | None]:
    """1.0 where the boxed answer equals `solution`, else 0.0; None, which TRL leaves out, where it is unscorable.

    An answer that is equal, but a sum that is left to do, earns nothing: a policy that is paid for 7 + 5 soon answers
    every sum with the sum itself.

    Args:
        prompts: not read. columns: nor are they.
        completions: (b,) texts, or lists of messages, whose last one counts.
        solution: (b,) golds, each as `verify_many` takes it.
    """
    pairs = [(extract_boxed(t), s) for t, s in zip(map(last_text, completions), solution, strict=True)]
    rewards = []
    for row, (result, (pred, gold)) in enumerate(zip(explain_many(pairs), pairs, strict=True)):
        if result.verdict is None:
            log_unscorable(row, gold, result.reason)
        unfinished = result.verdict and all(is_unfinished(pred, each) for each in _usable_golds(gold))
        rewards.append(None if result.verdict is None else float(result.verdict and not unfinished))
    return rewards


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python verify.py PREDICTION GOLD", file=sys.stderr)
        sys.exit(2)
    answer = explain_many([(sys.argv[1], sys.argv[2])])[0]
    print(answer.verdict, "|", answer.reason)
