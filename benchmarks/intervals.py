"""How sure the measures of learning's runs are: over seeds, and over questions as well.

Runs of one variant differ; by how much is estimated from all variants of a task and split together, since two or three
runs do not tell. Differences are between means and not between runs of one seed: what two runs have in common by
having the same one is 0 to 3 % of the variance of most measures on the digits, and nothing that could be seen on
Countdown.
"""

import math
from collections import defaultdict
from typing import Any

Run = dict[str, Any]
Values = dict[str, dict[str, dict[int, float]]]  # variant -> measure -> seed -> value


def values_of(runs: list[Run]) -> Values:
    """All that a run measures or costs; greedy measures by that name."""
    values: Values = {}
    for run in runs:
        row = values.setdefault(run["variant"], {})
        found = {f"greedy: {name}": measure["mean"] for name, measure in run["greedy"]["measures"].items()}
        found |= {name: measure["mean"] for name, measure in run["sampled"]["measures"].items()}
        found |= {f"tokens: {name}": tokens for name, tokens in run["sampled"]["price"].items()}
        found |= {name: run.get(name) for name in ("seconds", "tokens", "trained_rows")}
        found["recycled rollouts"] = run.get("rollouts")
        for name, value in found.items():
            if value is not None:
                row.setdefault(name, {})[run["seed"]] = value
    return values


def spread(values: Values) -> dict[str, tuple[float, int]]:
    """measure -> (standard deviation between runs of a variant, its degrees of freedom), the variants' together.

    The start is one model, measured once. A measure that no variant has twice has no spread.
    """
    squares: dict[str, float] = defaultdict(float)
    freedom: dict[str, int] = defaultdict(int)
    for row in (row for variant, row in values.items() if variant != "start"):
        for name, seeds in row.items():
            mean = sum(seeds.values()) / len(seeds)
            squares[name] += sum((value - mean) ** 2 for value in seeds.values())
            freedom[name] += len(seeds) - 1
    return {name: ((squares[name] / n) ** 0.5, n) for name, n in freedom.items() if n}


def half_width(deviation: tuple[float, int] | None, *counts: int, more: float = 0.0) -> float | None:
    """Of the 95 % interval (t) of a mean over so many seeds, or of the difference of two such means; `more` is a
    variance that comes to that of the seeds. None without a spread."""
    from scipy.stats import t

    if deviation is None:
        return None
    sd, freedom = deviation
    return float(t.ppf(0.975, freedom)) * math.sqrt(sd**2 * sum(1 / n for n in counts) + more)


def by_question(run: Run, measure: str) -> list[tuple[Any, Any]] | None:
    """A measure as the mean of ratios of sums: of each ratio its numerators and denominators, arrays (questions,). None
    for a measure whose outcomes are not kept."""
    import numpy as np

    rows = run["greedy" if measure.startswith("greedy: ") else "sampled"]["rows"]
    measure = measure.removeprefix("greedy: ")
    every = np.array(rows["right"], dtype=float)  # (questions, 8)
    right = every[:, : len(rows["judged"][0])] == 1  # (questions, 4): of those that are judged
    reflected = np.array(rows["reflected"]) == 1
    ones = np.ones(len(every))

    def says(name: str, verdict: int):
        return np.array([[said == verdict for said in group] for group in rows[name]])  # None is neither

    def balanced(yes, no, positive, negative) -> list[tuple[Any, Any]]:
        return [((yes & positive).sum(1), positive.sum(1)), ((no & negative).sum(1), negative.sum(1))]

    if measure == "first answer":
        return [(every.sum(1), ones * every.shape[1])]
    if measure in (f"one of {every.shape[1]}", f"one of {right.shape[1]}"):
        return [((every if measure.endswith(str(every.shape[1])) else right).any(1), ones)]
    if measure.endswith(("judge, own answers", "judge, own boxed answers")):
        name = "judged_greedily" if measure.startswith("greedy") else "judged"
        among = np.array(rows["boxed"]) == 1 if "boxed" in measure else np.ones_like(right)
        return balanced(says(name, 1), says(name, 0), right & among, ~right & among)
    if measure == "judge, independent answers":  # a right and a wrong one in turn
        points = np.array([[said == 1, said == 0] for said in rows["points"]])
        return [(points[::2, 0], np.ones(len(points) // 2)), (points[1::2, 1], np.ones(len(points) // 2))]
    if measure == "pairwise, both orders":
        hits = np.array([(a == 0, b == 1) for a, b in rows["pairs"]])
        return [(hits.sum(1), 2 * np.ones(len(hits)))]
    if measure == "reflection fixes a wrong answer":
        return [((reflected & ~right).sum(1), (~right).sum(1))]
    if measure == "reflection harms a right answer":
        return [((~reflected & right).sum(1), right.sum(1))]
    if measure == "final answer, reflecting on a No":
        return [(np.where(says("judged", 0), reflected, right).sum(1), right.shape[1] * ones)]
    kept = {
        "vote of 4": "vote",
        "vote of 4 weighed by verdicts": "by_verdict",
        "vote of 4 weighed by their probability": "by_probability",
        "vote of 4 weighed by greedy verdicts": "by_greedy",
        "best of 4 by pairs": "by_pairs",
    }
    return [(np.array(rows[kept[measure]])[:, 0] == 1, ones)] if measure in kept else None


def question_variance(runs: list[Run], others: list[Run], measure: str) -> float | None:
    """Of the difference of two means over runs, by drawing other questions: a jackknife that leaves out one question
    after the other, of all runs at once."""
    import numpy as np

    means = []  # of each side, (questions,): without that question
    for side in (runs, others):
        without = []
        for run in side:
            ratios = by_question(run, measure)
            if ratios is None:
                return None
            left = [(n.sum() - n) / (d.sum() - d) for n, d in ratios]
            without.append(sum(left) / len(left))
        means.append(np.mean(without, axis=0))
    difference = means[0] - means[1]
    n = len(difference)
    return float((n - 1) / n * ((difference - difference.mean()) ** 2).sum())
