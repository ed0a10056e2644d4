"""Counts into rates: accuracies with their intervals, calibration, scores of sets, and accuracy against tokens."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from data.rows import BadInput
from scoring.rows import WAYS, Row

BINS = 10  # of a verdict's probability, for its calibration


def wilson(right: int, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


Questions = Sequence[tuple[int, int]]  # of each, how many rows it has, and how many of them are right


def effective(questions: Questions) -> float:
    """How many rows of questions of their own would tell as much as these rows do (a ratio estimator's variance), no
    more than there are; where all rows are right or none is, one for each question."""
    n, right, k = sum(rows for rows, _ in questions), sum(right for _, right in questions), len(questions)
    if n == k or right in (0, n):
        return k
    mean = right / n
    variance = sum((hits - mean * rows) ** 2 for rows, hits in questions) * k / max(k - 1, 1) / n**2
    return min(n, mean * (1 - mean) / variance) if variance else n


def of_questions(questions: Questions) -> tuple[float, float] | None:
    """Wilson's 95 % interval of the share of right rows, of which a question may have several."""
    n, right = sum(rows for rows, _ in questions), sum(right for _, right in questions)
    if n == len(questions):
        return wilson(right, n)
    mean, size = right / n, effective(questions)
    shrunk = 1 + 1.96**2 / size
    middle = (mean + 1.96**2 / size / 2) / shrunk
    half = 1.96 * math.sqrt(mean * (1 - mean) / size + 1.96**2 / size**2 / 4) / shrunk
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(part: float, whole: float) -> float | None:
    """None for a share of nothing."""
    return part / whole if whole else None


def answered(questions: Questions) -> Row:
    """A count of rows above 0, their accuracy and its 95 % interval, as the tables have them."""
    n = sum(rows for rows, _ in questions)
    return {"answered": n, "accuracy": sum(right for _, right in questions) / n, "interval": of_questions(questions)}


def balanced_accuracy(n: Counter) -> float | None:
    """The mean of the accuracies on Yes and on No."""
    sides = [rate(n[f"right_{label}"], n[f"label_{label}"]) for label in ("Yes", "No")]
    return None if None in sides else sum(sides) / 2


def rates(dataset: str, kind: str, n: Counter, outcomes: Sequence[tuple[int, int, int]]) -> Row:
    """One benchmark's counts as rates. A rate over nothing is None.

    Args:
        outcomes: of each question, its rows, how many are right, and how many were before judging and reflecting.
    """
    total = n["answered"]
    common = {
        "dataset": dataset,
        "kind": kind,
        "rows": total + n["unscorable"] + n["failed"],
        "answered": total,
        "right": n["right"],
        "accuracy": rate(n["right"], total),
        "interval": of_questions([(rows, right) for rows, right, _ in outcomes]),
        "unscorable": n["unscorable"],
        "failed": n["failed"],
        "tokens": rate(n["tokens"], n["with_tokens"]),
        "prompt_tokens": rate(n["prompt_tokens"], n["with_tokens"]),
        "first_tokens": rate(n["first_tokens"], n["with_tokens"]) if n["first_tokens"] else None,
    }
    if kind in ("answer", "tts"):
        common |= {name: n[name] for name in ("unboxed", "cut_off")}
    if kind == "tts":
        return common | {
            "first_accuracy": rate(n["first_right"], total),
            "first_interval": of_questions([(rows, first) for rows, _, first in outcomes]),
            "right_to_wrong": n["right_to_wrong"],
            "wrong_to_right": n["wrong_to_right"],
            "flip_p": paired_questions([(rows, right - first) for rows, right, first in outcomes])[2],
            "reflections": rate(n["reflections"], total),
        }
    if n["with_probability"]:
        common["calibration"] = calibration(n)
    if kind == "pointwise":
        return common | {
            "balanced_accuracy": balanced_accuracy(n),
            "says_yes": rate(n["says_yes"], n["parsed"]),
            "is_yes": rate(n["label_Yes"], total),
            "verdict_rate": rate(n["parsed"], n["verdicts"]),
        }
    if kind in ("pairwise", "best_of_n"):
        return common | {
            "accuracy_chosen_first": rate(n["chosen_first_right"], total),
            "accuracy_chosen_second": rate(n["chosen_second_right"], total),
            "accuracy_both_orders_mean": rate(n["chosen_first_right"] + n["chosen_second_right"], 2 * total),
            "consistency": rate(n["consistent"], n["both_parsed"]),
            "position_bias": n["picks_first"] / n["parsed"] - 0.5 if n["parsed"] else None,
            "verdict_rate": rate(n["parsed"], n["verdicts"]),
        }
    return common


def count_probability(n: Counter, probability: float | None, right: bool) -> None:
    """Add a verdict's probability to what its calibration is made of."""
    if probability is not None:
        place = min(int(probability * BINS), BINS - 1)
        n.update({f"bin {place}": 1, f"bin {place} sum": probability, f"bin {place} right": int(right),
                  "brier": (probability - right) ** 2, "with_probability": 1})  # fmt: skip


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
    error = sum(b["verdicts"] * abs(b["probability"] - b["accuracy"]) for b in bins) / total
    return {"verdicts": total, "brier": n["brier"] / total, "calibration_error": error, "bins": bins}


def by_pass_rate(questions: dict[int, Counter]) -> list[Row]:
    """How a judge of single responses does by the share of the question's responses that are right.

    Where all of them are right, or none is, whoever knows the question knows the label; in between only the response
    tells, and `question_only`, always the question's more frequent label, is what to beat.
    """
    bands: dict[str, Counter] = defaultdict(Counter)
    outcomes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for n in questions.values():
        share = n["label_Yes"] / (n["label_Yes"] + n["label_No"])
        band = {0.0: "0", 1.0: "1"}.get(share) or ("up to 1/2" if share <= 0.5 else "over 1/2")
        bands[band] += n + Counter(questions=1, majority=max(n["label_Yes"], n["label_No"]))
        outcomes[band].append((n["label_Yes"] + n["label_No"], n["right_Yes"] + n["right_No"]))
    rows = []
    for band in ("0", "up to 1/2", "over 1/2", "1"):
        if n := bands.get(band):
            labelled = n["label_Yes"] + n["label_No"]
            rows.append({"pass_rate": band, "questions": n["questions"], **answered(outcomes[band]),
                         "balanced_accuracy": balanced_accuracy(n), "says_yes": n["says_yes"] / labelled,
                         "question_only": n["majority"] / labelled})  # fmt: skip
    return rows if any(row["questions"] < row["answered"] for row in rows) else []


def price_table(rows: list[tuple[int, dict[tuple[str, int], tuple[bool, int]]]]) -> list[Row]:
    """Accuracy against the tokens generated, of each way and number of answers, and its paired difference from the
    majority whose tokens are closest to that. Of the majority, only one, two, four, ... answers have a line.

    Args:
        rows: the question of each, and (way, number of answers) -> (right, tokens); one of the ways is `vote`.
    """
    table = []
    ways = [way for way in rows[0][1] if all(way in row for _, row in rows)] if rows else []
    sizes = Counter(question for question, _ in rows)
    right = {way: Counter(question for question, row in rows if row[way][0]) for way in ways}
    tokens = {way: sum(row[way][1] for _, row in rows) / len(rows) for way in ways}
    for way, n in ways:
        if way == "vote" and n & (n - 1):
            continue
        majority = min((w for w in ways if w[0] == "vote"), key=lambda w: abs(tokens[w] - tokens[way, n]))
        changes = [(size, right[way, n][question] - right[majority][question]) for question, size in sizes.items()]
        interval = interval_of(*paired_questions(changes)[:2], -1.0, 1.0)
        winner = "majority" if interval[1] < 0 else WAYS[way] if interval[0] > 0 else "neither"
        price = tokens[way, n] / (tokens[majority] or 1)
        if winner == WAYS[way] and price > 1.1:  # there is no majority of so many tokens
            winner += f", at {price:.1f} x"
        name = "first answer" if (way, n) == ("vote", 1) else WAYS[way]
        outcomes = [(size, right[way, n][question]) for question, size in sizes.items()]
        line = {"way": name, "n": n, "tokens": tokens[way, n], **answered(outcomes)}
        if way != "vote":
            line |= {"majority_n": majority[1], "majority_tokens": tokens[majority], "winner": winner,
                     "difference": sum(change for _, change in changes) / len(rows),
                     "difference_interval": interval}  # fmt: skip
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


def by_category(values: dict[str, Questions]) -> Row:
    """Accuracy for each value of a category, and their mean, whose interval counts two right and two wrong answers more
    for each value (Agresti and Coull): by its own share, a value with none right would be certain."""
    rows = {value: answered(questions) for value, questions in sorted(values.items())}
    mean = sum(row["accuracy"] for row in rows.values()) / len(rows)
    sizes = {value: effective(questions) for value, questions in values.items()}
    shares = {value: (rows[value]["accuracy"] * size + 2) / (size + 4) for value, size in sizes.items()}
    variance = sum(share * (1 - share) / (sizes[value] + 4) for value, share in shares.items())
    low, high = interval_of(sum(shares.values()) / len(rows), variance / len(rows) ** 2, 0.0, 1.0)
    return {"values": rows, "mean": mean, "interval": (min(mean, low), max(mean, high))}


def group_scores(groups: dict[str, dict[str, bool]]) -> dict[str, Row]:
    """The scores of sets in which several rows are one question, of the questions whose rows have all been scored.

    We-Math (parts 2steps_1, 2steps_2, 2steps_multi, ...): a problem counts 1 if it and its steps are right, 1/2 if the
    steps alone are; loose, 1 also if it and one step are right. Problems of which a part is missing are left out.
    DynaMath (variants): a question counts 1 if all its variants are right.
    MMBench (rotations): the same, as "circular"; beside it the questions as they stand, without the rotated ones.
    """
    if all(part.startswith("rotation ") for parts in groups.values() for part in parts):
        circular = [float(all(parts.values())) for parts in groups.values()]
        plain = [float(parts["rotation 0"]) for parts in groups.values() if "rotation 0" in parts]
        return {"circular": _mean(circular), **({"without rotations": _mean(plain)} if plain else {})}
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
    """The mean score of questions, with an interval that counts two scores of 0 and two of 1 more: where all are alike
    it would be zero wide."""
    n, mean = len(values), sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return {"questions": n, "score": mean, "interval": wilson(int(sum(values)), n)}
    more = [*values, 0.0, 0.0, 1.0, 1.0]
    middle = sum(more) / len(more)
    low, high = interval_of(middle, sum((value - middle) ** 2 for value in more) / len(more) ** 2, 0.0, 1.0)
    return {"questions": n, "score": mean, "interval": (min(mean, low), max(mean, high))}


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: the chance that a fair coin splits the changed rows at least as unevenly."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired(gained: int, lost: int, n: int) -> tuple[float, float]:
    """(middle, variance) of an interval for the difference of two accuracies on the same `n` rows, of which `gained`
    turned right and `lost` wrong; with half a row more in each cell of their table (Agresti and Min, 2005), so that it
    is not zero wide where no row changed."""
    total, change = n + 2, gained - lost
    return change / total, (gained + lost + 1 - change**2 / total) / total**2


def paired_questions(changes: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """(middle, variance, p): as `paired` and `mcnemar` where a question may have several rows, which are no independent
    ones: (its rows, how many more of them turned right than wrong). p is of the questions that changed either way."""
    n, k = sum(rows for rows, _ in changes), len(changes)
    gained, lost = (sum(sign * change > 0 for _, change in changes) for sign in (1, -1))
    if n == k:
        return *paired(gained, lost, n), mcnemar(gained, lost)
    mean = sum(change for _, change in changes) / n
    variance = sum((change - mean * rows) ** 2 for rows, change in changes) * k / max(k - 1, 1) / n**2
    return mean, variance + 1 / (k + 2) ** 2, mcnemar(gained, lost)  # the last: as `paired`, not zero wide


def interval_of(middle: float, variance: float, least: float, most: float) -> list[float]:
    """95 %, from `least` to `most` at the widest."""
    half = 1.96 * math.sqrt(variance)
    return [max(least, middle - half), min(most, middle + half)]
