r"""Boxed answers, verdicts, answer equality and rewards: every label rests on this file.

    from verify import extract_boxed, parse_verdict, is_equal, verify_many, spark_reward
    is_equal(r"\dfrac12", "0.5")                        # True
    python verify.py '1\frac{1}{2}' '3/2'               # True, and the rule that decided

Import from here. Which answers are the same is decided in equality.py, with normalisation.py,
structure.py and calculator.py below it; workers.py runs what may hang. Departures from plain
math-verify (https://github.com/huggingface/Math-Verify), which is the last resort here and not the first:

1. Lists, tuples, sets, intervals, relations, units and words are taken apart before any algebra, so
   (1,2) is not {1,2}, [1,2) is not (1,2], 2x = 10 is not 10, and `listen` is not `silent`.
2. Numbers are exact fractions. A decimal stands for an exact value only where the gold itself is a
   decimal, and then at the gold's own precision: pi equals a gold 3.14, 3.14 never equals pi.
3. Expressions are evaluated at fixed random points, exactly or with 60 digits, in microseconds.
   Only what the calculator cannot read (integrals, floors, ...) goes to math-verify in a worker.
4. Workers are killed when they overrun. No text of a model is ever evaluated as code: sympy's
   `parse_expr` (which calls eval) is never reached, only the LaTeX grammar of latex2sympy2.
"""

import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence

import calculator
import workers
from equality import MAX_CHARS, Result, decide
from normalisation import TEXT_COMMANDS

logger = logging.getLogger(__name__)

TIMEOUT = 2.0  # seconds of wall time for one comparison in a worker
CACHE_BYTES = 16 << 20


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

_TEXT = re.compile(r"(?:\\text|" + "|".join(map(re.escape, TEXT_COMMANDS.split())) + r")\s*(?=\{)")
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
    text = _TEXT.sub("", text)
    text = re.sub(r"\\[,;!]|\\[()\[\]]|[{}$*_`\"'.!\u200b]", " ", text).strip()
    found = _VERDICT.fullmatch(text)
    return found.group(1).capitalize() if found else None


# --------------------------------------------------------------------------- the public comparison


class _Cache:
    """The latest results, within CACHE_BYTES. One that hit its limit does not hold for a longer limit."""

    def __init__(self):
        self.results: OrderedDict[tuple[str, str], tuple[Result, float]] = OrderedDict()  # the latest last
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[str, str], limit: float) -> Result | None:
        with self.lock:
            if (found := self.results.get(key)) is None or (found[0].verdict is None and found[1] < limit):
                return None
            self.results.move_to_end(key)
            return found[0]

    def put(self, key: tuple[str, str], result: Result, limit: float) -> None:
        with self.lock:
            if key not in self.results:
                self.bytes += self.size(key)
            self.results[key] = (result, limit)
            while self.bytes > CACHE_BYTES:
                old, _ = self.results.popitem(last=False)
                self.bytes -= self.size(old)

    @staticmethod
    def size(key: tuple[str, str]) -> int:
        return 400 + len(key[0]) + len(key[1])

    def unlock(self) -> None:
        """For a forked child: another thread of the parent may have held the lock."""
        self.lock = threading.Lock()


_cache = _Cache()
os.register_at_fork(after_in_child=_cache.unlock)


def _usable(gold) -> bool:
    if isinstance(gold, str):
        return bool(gold.strip())
    return isinstance(gold, (int, float)) and not isinstance(gold, bool) and abs(gold) < float("inf")


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
        result = _cache.get(key, timeout) if cacheable else None
        if result is None:
            result = decide(*key)
            if result.reason == "open":
                open_jobs.append(key)
            elif cacheable:
                _cache.put(key, result, timeout)
        flat[key] = result
    if open_jobs:
        for key, result in zip(open_jobs, workers.pool.run(open_jobs, timeout), strict=True):
            flat[key] = result
            _cache.put(key, result, timeout)
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
    calculator.mp()
    workers.pool.warm_up()


def explain(pred: str | None, gold) -> Result:
    """`explain_many` for one pair."""
    return explain_many([(pred, gold)])[0]


def is_equal(pred: str | None, gold) -> bool | None:
    """`verify_many` for one pair."""
    return explain(pred, gold).verdict


# --------------------------------------------------------------------------- rewards
# TRL's signature: f(prompts, completions, **columns) -> one float or None (excluded) per row.

_logged: set[str] = set()


def last_text(messages: str | Sequence) -> str:
    """The text of a completion's or a prompt's last message ([{"role", "content"}]); "" where it has none, as a tool
    call. A plain string is its own text."""
    if isinstance(messages, str):
        return messages
    content = messages[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _log_unscorable(row: int, gold, reason: str) -> None:
    text = repr(gold)[:300]
    if text not in _logged and len(_logged) < 10_000:
        _logged.add(text)
        logger.warning("row %d is unscorable (%s), its gold is %s", row, reason, text)


def answer_reward(prompts, completions, solution, **columns) -> list[float | None]:
    """1.0 where the boxed answer equals `solution`, else 0.0; None where it is unscorable."""
    pairs = [(extract_boxed(t), s) for t, s in zip(map(last_text, completions), solution, strict=True)]
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
    for row, (text, gold) in enumerate(zip(map(last_text, completions), label, strict=True)):
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
    if len(sys.argv) != 3:
        sys.exit("usage: python verify.py PREDICTION GOLD")
    answer = explain(*sys.argv[1:])
    print(answer.verdict, "|", answer.reason)
