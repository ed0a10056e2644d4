"""Results files of evaluate.py into accuracy tables: what was right, how surely, and what failed.

    python calculate_acc.py --result_path results.json [more.json ...] [--format table|json|markdown]

Answers are scored again with verify.py; rows whose is_correct disagrees are named. A failed request is not an answer:
it is left out of every rate and counted apart, and the most frequent errors are shown; so is an answer that can't be
scored (no usable gold). An answer without a box is an answer, and wrong. Rows of a verifier of your own (evaluate.py
--reward_funcs) keep the verdict that they have. Intervals are Wilson's at 95 %.

Results of evaluate.py --tts compare also give accuracy against the tokens generated, for each way of test-time scaling
and each number of answers, and its difference from a majority of about as many tokens; --figure draws it as a PNG.

With several files, rows are matched by dataset, problem, image and occurrence (by dataset, gold and occurrence where a
file holds no problem), and every file is compared with the first, in the same mode only: an answer is compared with an
answer, never with a verdict or with what test-time scaling made of it. Difference, its paired bootstrap interval
(10,000 resamples, seeded) and McNemar's exact test.

Files are read row by row (a JSON list with a row a line, as evaluate.py writes it, or JSON lines): a million rows take
a minute, and memory only for the pairing. Files that hold only dataset, ground_truth and extracted_answer, as the
release writes them, are read too.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from data.cli import Errors, Parser, printable, refuse, text_table
from data.rows import BadInput, BadRow
from data.table import batched, records

Row = dict[str, Any]
KINDS = ("answer", "tts", "pointwise", "pairwise", "best_of_n")
AMOUNTS = ("prompt_tokens", "completion_tokens", "first_completion_tokens", "round_num")
MOST_VALUES = 50  # of a category that is tabulated; one with more is a name for each row
PROBABILITIES = {"verdict": "verdict_probability", "verdict_swapped": "verdict_swapped_probability"}
WAYS = {"vote": "majority", "weighted_vote": "weighted", "best_of_n": "best of n", "reflect": "reflect"}
BINS = 10  # of a verdict's probability, for its calibration
EXAMPLES = 5  # of disagreement, kept of each file


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a JSON list or of JSON lines, one after the other. Raises BadInput."""
    for _, _, row in records(path):
        if isinstance(row, BadRow):
            raise BadInput(f"{path}: {row}")
        yield row


def checked(row: Row, path: str, index: int) -> Row:
    """The row, if it holds what can be counted. Raises BadInput."""
    if (wrong := fault(row, kind_of(row))) is not None:
        name, expected = wrong
        got = repr(row[name])[:60] if name in row else "nothing"
        raise BadInput(f"{path}: row {index}: field {name}: expected {expected}, got {got}")
    return row


def fault(row: Row, kind: str) -> tuple[str, str] | None:
    """The first field that can't be counted, and what is expected there."""
    if not isinstance(row.get("dataset"), str):
        return "dataset", "the benchmark's name"
    gold, plain = row.get("ground_truth", ...), (str, int, float, type(None))
    if not isinstance(gold, plain) and not (isinstance(gold, list) and all(isinstance(g, plain) for g in gold)):
        return "ground_truth", "the gold answer"
    for name in AMOUNTS:
        amount = row.get(name)
        if amount is not None and not (isinstance(amount, (int, float)) and 0 <= amount < math.inf):
            return name, "a number, or null"
    for name in ("is_correct", "first_is_correct") if row.get("verifier") else ():
        if not isinstance(row.get(name), (bool, type(None))):
            return name, "true, false or null"
    for variant in row.get("variants") or () if kind == "tts" else ():
        amounts = (variant.get("n"), variant.get("completion_tokens")) if isinstance(variant, dict) else (None,)
        known = set(WAYS) >= {variant.get("variant")} if isinstance(variant, dict) else False
        if not known or not all(isinstance(a, int) and a >= 0 for a in amounts):
            return "variants", f"objects with variant ({', '.join(WAYS)}), n, answer, completion_tokens"
        if not isinstance(variant.get("answer", ...), (str, int, float, type(None))):
            return "variants", "answers as text, or null"
    if not _are_categories(row.get("categories") or {}):
        return "categories", "an object of texts or lists of them"
    group = row.get("group") or ["", ""]
    if not isinstance(group, list) or len(group) != 2 or not all(isinstance(text, str) for text in group):
        return "group", "a question and which part of it this is, as text"
    for name in ("extracted_answer", "first_answer") if kind == "tts" else ("extracted_answer",):
        if not isinstance(row.get(name, ...), (str, int, float, type(None))):
            return name, "the final answer as text, or null"
    for name in PROBABILITIES.values():
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        if not all(p is None or (isinstance(p, (int, float)) and 0 <= p <= 1) for p in values):
            return name, "a probability, or null"
    for name in ("verdict", "verdict_swapped") if kind in ("pointwise", "pairwise", "best_of_n") else ():
        if kind != "best_of_n" and not isinstance(row.get(name, ...), (str, type(None))):
            return name, "a verdict, or null"
        if kind == "best_of_n" and not (isinstance(row.get(name), list) and row[name]):
            return name, "a list of verdicts"
    if kind == "best_of_n" and len(row["verdict_swapped"]) != len(row["verdict"]):
        return "verdict_swapped", "as many verdicts as in verdict"
    for verdict, name in PROBABILITIES.items() if kind == "best_of_n" else ():
        if row.get(name) is not None and (not isinstance(row[name], list) or len(row[name]) != len(row[verdict])):
            return name, "as many probabilities as verdicts"
    return None


def _are_categories(value: Any) -> bool:
    def is_texts(texts) -> bool:
        return isinstance(texts, str) or (isinstance(texts, list) and all(isinstance(text, str) for text in texts))

    return isinstance(value, dict) and all(map(is_texts, value.values()))


def kind_of(row: Row) -> str:
    """The kind of a row; a failed one holds too little to tell, and is "answer" at first."""
    if row.get("error") is not None:
        return "answer"
    task = row.get("task")
    return task if task in KINDS[2:] else "tts" if "first_answer" in row else "answer"


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@dataclass
class Tally:
    """What is counted of one file. `outcomes` are for the pairing: (key, dataset, kind, right or wrong or None)."""

    path: str
    counts: dict[tuple[str, str], Counter] = field(default_factory=lambda: defaultdict(Counter))  # (dataset, kind)
    failed: Counter = field(default_factory=Counter)  # by dataset
    errors: Errors = field(default_factory=Errors)
    verifiers: set[str] = field(default_factory=set)  # that scored rows, other than verify.py
    datasets: dict[str, None] = field(default_factory=dict)  # in order of appearance
    disagreements: int = 0
    examples: list[Row] = field(default_factory=list)
    outcomes: list[tuple[int, str, str, bool | None]] = field(default_factory=list)
    # (dataset, kind) -> field -> value -> how many were answered, and right
    categories: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(Counter))))
    questions: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))  # dataset -> question
    scaling: dict = field(default_factory=lambda: defaultdict(list))  # dataset -> of each row: way -> (right, tokens)
    groups: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))  # (...) -> question -> part


def tally(path: str, pair: bool = False, rows: Iterable[Row] | None = None) -> Tally:
    """Count the rows of `path`, or `rows`; with `pair`, remember each row's outcome."""
    total = Tally(path)
    stream = enumerate(read_rows(path) if rows is None else rows)
    for batch in batched(((index, checked(row, path, index)) for index, row in stream), 2048):
        verdicts = score([row for _, row in batch])
        for index, row in batch:
            dataset, kind, right = row["dataset"], kind_of(row), None
            total.datasets[dataset] = None
            if row.get("error") is not None:
                total.failed[dataset] += 1
                total.errors.add(str(row["error"]))
            else:
                if row.get("verifier"):
                    total.verifiers.add(str(row["verifier"]))
                right = count_row(total.counts[dataset, kind], row, verdicts)
                stored = row.get("is_correct")
                if right is not None and stored is not None and bool(stored) != right:
                    total.disagreements += 1
                    if len(total.examples) < EXAMPLES:
                        fields = {name: row[name] for name in ("dataset", "extracted_answer", "ground_truth")}
                        total.examples.append({"row": index, **fields, "stored": bool(stored), "rescored": right})
            if right is not None:
                if kind == "pointwise":
                    n, label = total.questions[dataset][match_key(row)], row["label"]
                    n.update({f"label_{label}": 1, f"right_{label}": right, "says_yes": row["verdict"] == "Yes"})
                for name, values in (row.get("categories") or {}).items():
                    for value in [values] if isinstance(values, str) else values:
                        total.categories[dataset, kind][name][value].update(answered=1, right=right)
                outcomes = {(v["variant"], v["n"]): (variant_is_right(row, v, verdicts), v["completion_tokens"])
                            for v in row.get("variants") or ()}  # fmt: skip
                if outcomes and all(variant_right is not None for variant_right, _ in outcomes.values()):
                    total.scaling[dataset].append(outcomes)
                if row.get("group"):
                    question, part = row["group"]
                    total.groups[dataset, kind][question][part] = right
            if pair:
                total.outcomes.append((match_key(row), dataset, kind, right))
    for dataset, failed in total.failed.items():  # a failed row counts with the others of its dataset, or of its file
        kinds = [kind for name, kind in total.counts if name == dataset] or [kind for _, kind in total.counts]
        total.counts[dataset, kinds[0] if kinds else "answer"]["failed"] += failed
    return total


def score(rows: list[Row]) -> dict[tuple, bool | None]:
    """The verdict on each (answer, gold) of these rows."""
    from verify import verify_many

    names = {"answer": ("extracted_answer",), "tts": ("extracted_answer", "first_answer")}
    answered = [row for row in rows if row.get("error") is None and not row.get("verifier")]
    pairs = dict.fromkeys(as_pair(row, name) for row in answered for name in names.get(kind_of(row), ()))
    pairs |= dict.fromkeys(as_pair({**row, **v}, "answer") for row in answered for v in row.get("variants") or ())
    pairs = list(pairs)
    return dict(zip(pairs, verify_many(pairs), strict=True))


def as_pair(row: Row, name: str) -> tuple:
    answer, gold = row[name], row["ground_truth"]
    return None if answer in (None, "") else str(answer), tuple(gold) if isinstance(gold, list) else gold


def variant_is_right(row: Row, variant: Row, verdicts: dict[tuple, bool | None]) -> bool | None:
    return variant["is_correct"] if row.get("verifier") else verdicts[as_pair({**row, **variant}, "answer")]


def match_key(row: Row) -> int:
    """The same number for the same question in another file."""
    question = row["problem"] if "problem" in row else ("gold", row["ground_truth"])
    parts = repr((row["dataset"], question, row.get("image_path")))
    return int.from_bytes(blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def count_row(n: Counter, row: Row, verdicts: dict[tuple, bool | None]) -> bool | None:
    """Add one answered row to the counts of its benchmark. Returns whether it is right; None if that can't be said."""
    kind = kind_of(row)
    if "completion_tokens" in row:
        n["tokens"] += row["completion_tokens"] or 0
        n["prompt_tokens"] += row.get("prompt_tokens") or 0
        n["with_tokens"] += 1
        n["first_tokens"] += row.get("first_completion_tokens") or 0
    if kind in ("answer", "tts"):
        outcome = row["is_correct"] if row.get("verifier") else verdicts[as_pair(row, "extracted_answer")]
        n["unboxed"] += row["extracted_answer"] in (None, "")
    else:
        outcome = count_verdicts(n, kind, row)
    if outcome is None:
        n["unscorable"] += 1
        return None
    n["answered"] += 1
    n["right"] += outcome
    if kind == "tts":
        first = bool(row.get("first_is_correct") if row.get("verifier") else verdicts[as_pair(row, "first_answer")])
        n["first_right"] += first
        n["right_to_wrong"] += first and not outcome
        n["wrong_to_right"] += outcome and not first
        n["reflections"] += row.get("round_num") or 0
    return outcome


def count_verdicts(n: Counter, kind: str, row: Row) -> bool | None:
    """Add a judge's verdicts. A verdict that can't be read is wrong, and tells nothing about which side it leans to."""
    if kind == "pointwise":
        if row.get("label") not in ("Yes", "No"):
            return None
        verdict = row["verdict"]
        right = verdict == row["label"]
        n["verdicts"] += 1
        n["parsed"] += verdict in ("Yes", "No")
        n["says_yes"] += verdict == "Yes"
        n[f"label_{row['label']}"] += 1
        n[f"right_{row['label']}"] += right
        count_probability(n, row.get("verdict_probability"), right)
        return right
    several = kind == "best_of_n"
    orders = list(zip(*((row[k] if several else [row[k]]) for k in ("verdict", "verdict_swapped")), strict=True))
    for (name, probability), right in zip(PROBABILITIES.items(), ("A", "B"), strict=True):
        verdicts, values = (v if isinstance(v, list) else [v] for v in (row[name], row.get(probability)))
        for verdict, p in zip(verdicts, values, strict=False):
            count_probability(n, p, verdict == right)
    for first, swapped in orders:  # the chosen one is A in the first order, B in the swapped one
        parsed = [v for v in (first, swapped) if v in ("A", "B")]
        n["verdicts"] += 2
        n["parsed"] += len(parsed)
        n["picks_first"] += parsed.count("A")
        n["both_parsed"] += len(parsed) == 2
        n["consistent"] += len(parsed) == 2 and first != swapped
    chosen_first, chosen_second = all(f == "A" for f, _ in orders), all(s == "B" for _, s in orders)
    n["chosen_first_right"] += chosen_first
    n["chosen_second_right"] += chosen_second
    return chosen_first and chosen_second


def count_probability(n: Counter, probability: float | None, right: bool) -> None:
    """Add a verdict's probability to what its calibration is made of."""
    if probability is not None:
        place = min(int(probability * BINS), BINS - 1)
        n.update({f"bin {place}": 1, f"bin {place} sum": probability, f"bin {place} right": int(right),
                  "brier": (probability - right) ** 2, "with_probability": 1})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rates


def wilson(right: int, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def rates(dataset: str, kind: str, n: Counter) -> Row:
    """One benchmark's counts as rates. A rate over nothing is None."""
    total = n["answered"]
    common = {
        "dataset": dataset,
        "kind": kind,
        "rows": total + n["unscorable"] + n["failed"],
        "answered": total,
        "right": n["right"],
        "accuracy": rate(n["right"], total),
        "interval": wilson(n["right"], total),
        "unscorable": n["unscorable"],
        "failed": n["failed"],
        "tokens": rate(n["tokens"], n["with_tokens"]),
        "prompt_tokens": rate(n["prompt_tokens"], n["with_tokens"]),
        "first_tokens": rate(n["first_tokens"], n["with_tokens"]) if n["first_tokens"] else None,
    }
    if kind in ("answer", "tts"):
        common["unboxed"] = n["unboxed"]
    if kind == "tts":
        return common | {
            "first_accuracy": rate(n["first_right"], total),
            "first_interval": wilson(n["first_right"], total),
            "right_to_wrong": n["right_to_wrong"],
            "wrong_to_right": n["wrong_to_right"],
            "flip_p": mcnemar(n["wrong_to_right"], n["right_to_wrong"]),
            "reflections": rate(n["reflections"], total),
        }
    if n["with_probability"]:
        common["calibration"] = calibration(n)
    if kind == "pointwise":
        sides = [rate(n[f"right_{label}"], n[f"label_{label}"]) for label in ("Yes", "No")]
        return common | {
            "balanced_accuracy": None if None in sides else sum(sides) / 2,
            "says_yes": rate(n["says_yes"], n["parsed"]),
            "is_yes": rate(n["label_Yes"], total),
            "verdict_rate": rate(n["parsed"], n["verdicts"]),
        }
    if kind in ("pairwise", "best_of_n"):
        orders = [rate(n[f"chosen_{place}_right"], total) for place in ("first", "second")]
        return common | {
            "accuracy_chosen_first": orders[0],
            "accuracy_chosen_second": orders[1],
            "accuracy_both_orders_mean": None if None in orders else sum(orders) / 2,
            "consistency": rate(n["consistent"], n["both_parsed"]),
            "position_bias": None if not n["parsed"] else n["picks_first"] / n["parsed"] - 0.5,
            "verdict_rate": rate(n["parsed"], n["verdicts"]),
        }
    return common


def calibration(n: Counter) -> Row:
    """Whether verdicts are as often right as they are probable: Brier score, expected calibration error over the bins,
    and the bins themselves (a reliability diagram in numbers)."""
    bins = []
    for place in range(BINS):
        if count := n[f"bin {place}"]:
            right = n[f"bin {place} right"]
            bins.append({"from": place / BINS, "to": (place + 1) / BINS, "verdicts": count, "accuracy": right / count,
                         "probability": n[f"bin {place} sum"] / count, "interval": wilson(right, count)})  # fmt: skip
    total = n["with_probability"]
    calibration_error = sum(b["verdicts"] * abs(b["probability"] - b["accuracy"]) for b in bins)
    return {
        "verdicts": total,
        "brier": n["brier"] / total,
        "calibration_error": calibration_error / total,
        "bins": bins,
    }


def by_pass_rate(questions: dict[int, Counter]) -> list[Row]:
    """How a judge of single responses does by the share of the question's responses that are right.

    Where all of them are right, or none is, whoever knows the question knows the label; in between only the response
    tells, and `question_only`, always the question's more frequent label, is what to beat.
    """
    bands: dict[str, Counter] = {}
    for n in questions.values():
        share = n["label_Yes"] / (n["label_Yes"] + n["label_No"])
        band = {0.0: "0", 1.0: "1"}.get(share) or ("up to 1/2" if share <= 0.5 else "over 1/2")
        bands[band] = bands.get(band, Counter()) + n + Counter(questions=1, majority=max(n["label_Yes"], n["label_No"]))
    rows = []
    for band in ("0", "up to 1/2", "over 1/2", "1"):
        if n := bands.get(band):
            answered, right = n["label_Yes"] + n["label_No"], n["right_Yes"] + n["right_No"]
            sides = [rate(n[f"right_{label}"], n[f"label_{label}"]) for label in ("Yes", "No")]
            rows.append({"pass_rate": band, "questions": n["questions"], "answered": answered,
                         "accuracy": right / answered, "interval": wilson(right, answered),
                         "balanced_accuracy": None if None in sides else sum(sides) / 2,
                         "says_yes": n["says_yes"] / answered, "question_only": n["majority"] / answered})  # fmt: skip
    return rows if any(n["questions"] < n["label_Yes"] + n["label_No"] for n in bands.values()) else []


def price_table(rows: list[dict[tuple[str, int], tuple[bool, int]]]) -> list[Row]:
    """Accuracy against the tokens generated, of each way and number of answers, and its paired difference from the
    majority whose tokens are closest to that. Of the majority, only one, two, four, ... answers have a line."""
    import numpy as np

    if not rows:
        return []
    rng, table = np.random.default_rng(0), []
    ways = [way for way in rows[0] if all(way in row for row in rows)]
    tokens = {way: sum(row[way][1] for row in rows) / len(rows) for way in ways}
    for way, n in ways:
        if way == "vote" and n & (n - 1):
            continue
        majority = min((w for w in ways if w[0] == "vote"), key=lambda w: abs(tokens[w] - tokens[way, n]))
        right = sum(row[way, n][0] for row in rows)
        gained = sum(row[way, n][0] and not row[majority][0] for row in rows)
        lost = sum(row[majority][0] and not row[way, n][0] for row in rows)
        interval = np.quantile(resampled(gained, lost, len(rows), rng), (0.025, 0.975)).tolist()
        winner = "majority" if interval[1] < 0 else WAYS[way] if interval[0] > 0 else "neither"
        price = tokens[way, n] / (tokens[majority] or 1)
        if winner == WAYS[way] and price > 1.1:  # there is no majority of so many tokens
            winner += f", at {price:.1f} x"
        line = {"way": "first answer" if (way, n) == ("vote", 1) else WAYS[way], "n": n, "tokens": tokens[way, n],
                "answered": len(rows), "accuracy": right / len(rows), "interval": wilson(right, len(rows))}  # fmt: skip
        if way != "vote":
            line |= {"majority_n": majority[1], "majority_tokens": tokens[majority], "winner": winner,
                     "difference": (gained - lost) / len(rows), "difference_interval": interval}  # fmt: skip
        table.append(line)
    return table


def figure(files: list[Row], path: str) -> None:
    """Draw the price tables: accuracy against tokens, a panel for each file. Raises BadInput where there is none."""
    panels = [file for file in files if file["price"]]
    if not panels:
        raise BadInput("--figure: expected results of evaluate.py --mode tts --tts compare")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, file in zip(axes[0], panels, strict=True):
        for way in WAYS.values():
            ways = (way, "first answer") if way == "majority" else (way,)
            rows = [row for row in file["price"] if row["way"] in ways]
            bars = [[abs(row["interval"][i] - row["accuracy"]) for row in rows] for i in (0, 1)]
            axis.errorbar([row["tokens"] for row in rows], [row["accuracy"] for row in rows], bars, label=way,
                          marker="o", capsize=2, linewidth=1)  # fmt: skip
        axis.set(xscale="log", xlabel="tokens generated a question", ylabel="accuracy", title=file["path"])
        axis.legend()
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)


def by_category(values: dict[str, Counter]) -> Row:
    """Accuracy for each value of a category, and their mean: RewardBench 2's score is the one over its subsets."""
    rows = {value: {"answered": n["answered"], "accuracy": n["right"] / n["answered"],
                    "interval": wilson(n["right"], n["answered"])} for value, n in sorted(values.items())}  # fmt: skip
    shares = [row["accuracy"] for row in rows.values()]
    mean = sum(shares) / len(shares)
    variance = sum(row["accuracy"] * (1 - row["accuracy"]) / row["answered"] for row in rows.values())
    half = 1.96 * math.sqrt(variance) / len(shares)
    return {"values": rows, "mean": mean, "interval": (max(0.0, mean - half), min(1.0, mean + half))}


def group_scores(groups: dict[str, dict[str, bool]]) -> dict[str, Row]:
    """The scores of sets in which several rows are one question.

    We-Math (parts 2steps_1, 2steps_2, 2steps_multi, ...): a problem counts 1 if it and its steps are right, 1/2 if the
    steps alone are; loose, 1 also if it and one step are right. Problems of which a part is missing are left out.
    DynaMath (variants): a question counts 1 if all its variants are right.
    """
    problems = {name: parts for name, parts in groups.items() if any("steps_" in part for part in parts)}
    if not problems:
        return {"worst case over variants": _mean([float(all(parts.values())) for parts in groups.values()])}
    scores: dict[str, list[float]] = {"We-Math, strict": [], "We-Math, loose": []}
    for parts in problems.values():
        steps = [right for part, right in parts.items() if not part.endswith("_multi")]
        whole = next((right for part, right in parts.items() if part.endswith("_multi")), None)
        if whole is None or f"{len(steps)}steps_multi" not in parts:
            continue
        scores["We-Math, strict"].append(float(all(steps)) if whole else 0.5 * all(steps))
        scores["We-Math, loose"].append(float(any(steps)) if whole else 0.5 * all(steps))
    return {name: _mean(values) for name, values in scores.items() if values}


def _mean(values: list[float]) -> Row:
    n, mean = len(values), sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values)) / n
    interval = wilson(int(sum(values)), n) if set(values) <= {0.0, 1.0} else (max(0, mean - half), min(1, mean + half))
    return {"questions": n, "score": mean, "interval": interval}


# ---------------------------------------------------------------------------------------------------------------------
# Two files on the same questions


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: the chance that a fair coin splits the changed rows at least as unevenly."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def resampled(gained: int, lost: int, n: int, rng, resamples: int = 10_000):
    """Differences of a paired bootstrap. Drawing rows again is drawing how many gained, lost and stayed."""
    draws = rng.multinomial(n, [gained / n, lost / n, max(n - gained - lost, 0) / n], resamples)
    return (draws[:, 0] - draws[:, 1]) / n


def compare(base: Tally, other: Tally) -> list[Row]:
    """Differences on the rows that both files answered in the same mode: of each benchmark, of their mean, of all."""
    import numpy as np
    import pandas as pd

    tables = []
    for total in (base, other):
        table = pd.DataFrame(total.outcomes, columns=["key", "dataset", "kind", "right"])
        table["occurrence"] = table.groupby("key").cumcount()  # the same question may stand there several times
        tables.append(table[table["right"].notna()])
    pairs = tables[0].merge(tables[1], on=["key", "occurrence", "kind"], suffixes=("", "_after"))
    rng = np.random.default_rng(0)

    def difference(name: str, rows: pd.DataFrame) -> tuple[Row, Any]:
        before, after = rows["right"].astype(int), rows["right_after"].astype(int)
        n, gained, lost = len(rows), int((after > before).sum()), int((after < before).sum())
        draws = resampled(gained, lost, n, rng)
        row = {"dataset": name, "rows": n, "base_accuracy": float(before.mean()), "accuracy": float(after.mean()),
               "difference": (gained - lost) / n, "interval": np.quantile(draws, (0.025, 0.975)).tolist(),
               "gained": gained, "lost": lost, "p": mcnemar(gained, lost)}  # fmt: skip
        return row, draws

    groups = {name: pairs[pairs["dataset"] == name] for name in base.datasets}
    differences = [difference(name, group) for name, group in groups.items() if len(group)]
    rows = [row for row, _ in differences]
    if len(rows) > 1:
        draws = np.mean([draws for _, draws in differences], axis=0)
        means = {k: sum(r[k] for r in rows) / len(rows) for k in ("base_accuracy", "accuracy", "difference")}
        total = {"rows": len(pairs), "interval": np.quantile(draws, (0.025, 0.975)).tolist()}
        rows = [*rows, {"dataset": "mean of benchmarks", **means, **total, "gained": None, "lost": None, "p": None}]
        rows.append(difference("all rows", pairs)[0])
    return [{"base": base.path, "path": other.path, **row} for row in rows]


def summarise(tallies: list[Tally]) -> Row:
    """Everything as one JSON-able record: `files`, and `paired` differences from the first of them."""
    files = []
    for total in tallies:
        keys = sorted(total.counts, key=lambda key: (KINDS.index(key[1]), list(total.datasets).index(key[0])))
        benchmarks = [rates(*key, total.counts[key]) for key in keys]
        for key, benchmark in zip(keys, benchmarks, strict=True):
            split = {name: values for name, values in total.categories[key].items() if 2 <= len(values) <= MOST_VALUES}
            benchmark["categories"] = {name: by_category(values) for name, values in split.items()}
            if key[1] == "pointwise":
                benchmark["by_pass_rate"] = by_pass_rate(total.questions[key[0]])
            if key[1] == "tts" and total.scaling[key[0]]:
                benchmark["price"] = price_table(total.scaling[key[0]])
            benchmark["scores"] = group_scores(total.groups[key]) if total.groups[key] else {}
        scored = {k: [b["accuracy"] for b in benchmarks if b["kind"] == k and b["answered"]] for k in KINDS}
        firsts = [b["first_accuracy"] for b in benchmarks if b["kind"] == "tts" and b["answered"]]
        files.append({
            "path": total.path,
            "rows": sum(b["rows"] for b in benchmarks),
            "failed": sum(b["failed"] for b in benchmarks),
            "price": price_table([row for rows in total.scaling.values() for row in rows]),
            "errors": total.errors.lines(),
            "verifiers": sorted(total.verifiers),
            "unscorable": sum(b["unscorable"] for b in benchmarks),
            "benchmarks": benchmarks,
            "means": {kind: sum(values) / len(values) for kind, values in scored.items() if values},
            "first_mean": rate(sum(firsts), len(firsts)),
            "disagreements": {"rows": total.disagreements, "examples": total.examples},
        })  # fmt: skip
    return {"files": files, "paired": [row for other in tallies[1:] for row in compare(tallies[0], other)]}


# ---------------------------------------------------------------------------------------------------------------------
# Showing

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows

COLUMNS = {  # head -> field, for each kind
    "answer": {"accuracy": "accuracy", "95 %": "interval", "unboxed": "unboxed", "tokens": "tokens"},
    "tts": {
        "first": "first_accuracy", "final": "accuracy", "95 %": "interval", "right>wrong": "right_to_wrong",
        "wrong>right": "wrong_to_right", "p": "flip_p", "reflections": "reflections", "unboxed": "unboxed",
        "first tokens": "first_tokens", "tokens": "tokens",
    },
    "pointwise": {
        "accuracy": "accuracy", "95 %": "interval", "balanced": "balanced_accuracy", "says Yes": "says_yes",
        "is Yes": "is_yes", "verdicts": "verdict_rate", "tokens": "tokens",
    },
    "pairwise": {
        "both orders": "accuracy", "95 %": "interval", "chosen 1st": "accuracy_chosen_first",
        "chosen 2nd": "accuracy_chosen_second", "mean": "accuracy_both_orders_mean", "consistent": "consistency",
        "1st place bias": "position_bias", "verdicts": "verdict_rate", "tokens": "tokens",
    },
}  # fmt: skip
COLUMNS["best_of_n"] = COLUMNS["pairwise"]
TITLES = {
    "answer": "Answers",
    "tts": "Test-time scaling: first answer, and final one after judging and reflecting",
    "pointwise": "Judging one response",
    "pairwise": "Judging pairs, in both orders",
    "best_of_n": "Judging the best of n: the chosen one against each other, in both orders",
}
COUNTS = frozenset(
    "questions n majority_n verdicts unboxed right_to_wrong wrong_to_right rows answered unscorable failed gained lost"
    .split()
)  # fmt: skip


def cell(name: str, value) -> str:
    if value is None:
        return "-"
    if name in COUNTS:
        return f"{value:,}"
    if "interval" in name:
        return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"
    if name == "winner":
        return value
    if name in ("tokens", "first_tokens", "majority_tokens"):
        return f"{value:,.1f}"
    if name == "reflections":
        return f"{value:.2f}"
    if name == "brier":
        return f"{value:.3f}"
    if name in ("p", "flip_p"):
        return f"{value:.2g}" if value else "<1e-300"
    return f"{100 * value:+.1f}" if name in ("difference", "position_bias") else f"{100 * value:.1f}"


def tables(summary: Row) -> list[Table]:
    """What a reader should see, in that order. Rates are in percent."""
    files, result = summary["files"], []
    several = len(files) > 1
    for kind in KINDS:
        rows = []
        for file in files:
            for b in (b for b in file["benchmarks"] if b["kind"] == kind):
                middle = [cell(name, b[name]) for name in COLUMNS[kind].values()]
                ends = [cell(name, b[name]) for name in ("unscorable", "failed")]
                rows.append([b["dataset"], file["path"], cell("answered", b["answered"]), *middle, *ends])
        order = list(dict.fromkeys(row[0] for row in rows))
        rows.sort(key=lambda row: order.index(row[0]))  # stable: the files of a benchmark stand together
        for file in files if len(order) > 1 else []:
            if kind in file["means"]:
                means = {"accuracy": file["means"][kind], "first_accuracy": file["first_mean"]}
                cells = [cell(f, means[f]) if f in means else "" for f in COLUMNS[kind].values()]
                rows.append(["mean of benchmarks", file["path"], "", *cells, "", ""])
        if rows:
            head = ["benchmark", "file", "answered", *COLUMNS[kind], "unscorable", "failed"]
            keep = [i for i in range(len(head)) if several or i != 1]
            result.append((TITLES[kind], [head[i] for i in keep], [[row[i] for i in keep] for row in rows]))
    result += breakdowns(files)
    for file in (f for f in files[1:] if not other_mode(f, files[0])):
        fields = ("rows", "base_accuracy", "accuracy", "difference", "interval", "gained", "lost", "p")
        paired = [row for row in summary["paired"] if row["path"] == file["path"]]
        rows = [[row["dataset"], *(cell(name, row[name]) for name in fields)] for row in paired]
        head = ["benchmark", "paired rows", "base", "this", "difference", "95 %", "gained", "lost", "McNemar p"]
        both = rows[-1][1] if rows else "0"
        answered = [cell("answered", sum(b["answered"] for b in f["benchmarks"])) for f in (file, files[0])]
        title = f"{file['path']} against {files[0]['path']}, on the {both} rows both answered"
        result.append((f"{title}, of {' and '.join(answered)}", head, rows))
    return result


def breakdowns(files: list[Row]) -> list[Table]:
    """The benchmarks' own scores, accuracies by category, and how far a judge's verdicts can be believed."""
    tables: dict[str, Table] = {}

    def add(title: str, first: list[str], names: list[str], row: Row, fields: dict[str, str]) -> None:
        third = "kind" if "price" not in title else "way"
        table = tables.setdefault(title, (title, ["benchmark", "file", third, *first, *fields], []))
        table[2].append([*names, *(cell(field, row.get(field)) for field in fields.values())])

    interval = {"95 %": "interval"}
    for file in files:
        for row in file["price"]:
            names = [b["dataset"] for b in file["benchmarks"] if b.get("price")]
            fields = {"n": "n", "answered": "answered", "tokens": "tokens", "accuracy": "accuracy", **interval,
                      "majority of": "majority_n", "its tokens": "majority_tokens", "difference": "difference",
                      "95 % of it": "difference_interval", "better": "winner"}  # fmt: skip
            title = "Test-time scaling at its price, against a majority of as many tokens"
            name = [names[0] if len(names) == 1 else "all rows", file["path"], row["way"]]
            add(title, [], name, row, fields)
        for b in file["benchmarks"]:
            name = [b["dataset"], file["path"], b["kind"]]
            for score, row in b["scores"].items():
                fields = {"questions": "questions", "value": "score", **interval}
                add("The benchmarks' own scores", ["score"], [*name, score], row, fields)
            for category, rows in b["categories"].items():
                mean = {"accuracy": rows["mean"], "interval": rows["interval"]}
                for value, row in [*rows["values"].items(), ("mean", mean)]:
                    fields = {"answered": "answered", "accuracy": "accuracy", **interval}
                    add("By category", ["category", "value"], [*name, category, value], row, fields)
            for row in b.get("by_pass_rate", ()):
                fields = {"questions": "questions", "answered": "answered", "accuracy": "accuracy", **interval,
                          "balanced": "balanced_accuracy", "says Yes": "says_yes",
                          "question only": "question_only"}  # fmt: skip
                title = "Judging one response, by the share of right responses to its question"
                add(title, ["pass rate"], [*name, row["pass_rate"]], row, fields)
            if judged := b.get("calibration"):
                fields = {"verdicts": "verdicts", "Brier": "brier", "expected error": "calibration_error"}
                add("Calibration of verdicts", [], name, judged, fields)
                for row in judged["bins"]:
                    fields = {"verdicts": "verdicts", "mean": "probability", "right": "accuracy", **interval}
                    place = f"{row['from']:.1f} to {row['to']:.1f}"
                    add("Reliability of verdicts", ["probability"], [*name, place], row, fields)
    keep = [0, 2] if len(files) == 1 else [0, 1, 2]
    return [(title, [head[i] for i in keep] + head[3:], [[row[i] for i in keep] + row[3:] for row in rows])
            for title, head, rows in tables.values()]  # fmt: skip


def other_mode(file: Row, base: Row) -> tuple[str, str] | None:
    """What either file holds, where nothing that one of them holds is held by the other."""
    kinds = [{b["kind"] for b in f["benchmarks"] if b["answered"]} for f in (file, base)]
    if not all(kinds) or kinds[0] & kinds[1]:
        return None
    return tuple(" and ".join(kind for kind in KINDS if kind in held) for held in kinds)


def notices(summary: Row) -> list[str]:
    """What must not be overlooked."""
    lines = []
    base = summary["files"][0]
    for file in summary["files"][1:]:
        if held := other_mode(file, base):
            lines.append(
                f"NOT COMPARED: {file['path']} holds results of {held[0]}, {base['path']} of {held[1]}; only results "
                "of one mode are compared"
            )
    for file in summary["files"]:
        if not file["rows"]:
            lines.append(f"empty: {file['path']} holds no row")
        if file["failed"]:
            share = f"{file['failed']:,} of {file['rows']:,} rows"
            lines.append(f"FAILED: {share} of {file['path']} are no answers and left out; run evaluate.py again")
            lines += file["errors"]
        for name in file["verifiers"]:
            lines.append(f"scored by {name}: rows of {file['path']} keep its verdicts")
        if file["unscorable"]:
            lines.append(f"unscorable: {file['unscorable']:,} rows of {file['path']} have no usable gold; left out")
        wrong = file["disagreements"]
        if wrong["rows"]:
            lines.append(
                f"is_correct in {file['path']} disagrees with verify.py on {wrong['rows']:,} rows, among them:"
            )
        for e in wrong["examples"]:
            texts = (f"{name} {str(e[name])[:60]!r}" for name in ("extracted_answer", "ground_truth"))
            lines.append(f"  row {e['row']}: {', '.join(texts)}, stored {e['stored']}, rescored {e['rescored']}")
    return lines


def render(summary: Row, form: str) -> str:
    """The summary as `table`, `markdown` or `json`. Text from a file can't move the cursor or break a cell."""
    if form == "json":
        return json.dumps(summary, indent=1)
    markdown = form == "markdown"
    lines = [printable(line) + ("\n" if markdown else "") for line in notices(summary)]
    for title, head, rows in tables(summary):
        table = text_table([head, *rows], markdown)
        title = f"**{printable(title)}**" if markdown else printable(title)
        lines += ["", title, "" if markdown else "-" * max(map(len, table)), *table]
    return "\n".join(lines).strip("\n")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--result_path", required=True, nargs="+", help="results files; several are compared")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")
    parser.add_argument("--figure", metavar="PNG", help="draw accuracy against tokens, of --tts compare")
    args = parser.parse_args()
    try:
        tallies = [tally(path, pair=len(args.result_path) > 1) for path in args.result_path]
        summary = summarise(tallies)
        if args.figure:
            figure(summary["files"], args.figure)
    except (BadInput, OSError) as error:
        return refuse("calculate_acc.py", error)
    print(render(summary, args.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
