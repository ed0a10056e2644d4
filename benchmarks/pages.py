"""The tables of README.md, RESULTS.md and docs/ablations.md, written from the rows in results/.

    python -m benchmarks.pages [--check]

Above each table a comment says what its columns hold: the results file (without `learning_`), then a variant for its
mean over seeds, or `one-other` for a difference. A difference with `~` counts other questions as well as other seeds
(benchmarks/intervals.py). Of a file that benchmarks.measures wrote, a column is `greedy` or `sampled`.
The names of the rows are LABELS; an unknown one is a KeyError. `--check` changes nothing, and its exit status is 1 if a
table does not say what the rows do.

    <!-- digits_unseen: start grpo ratio_0.25 ratio_0.25-grpo~ -->
"""

import json
import re
import statistics
import sys
from functools import cache
from pathlib import Path

from benchmarks import record
from benchmarks.intervals import half_width, question_variance, spread, values_of
from benchmarks.learning import recorded_runs, written
from data.cli import Parser

PAGES = ("README.md", "RESULTS.md", "docs/ablations.md")
ROOT = Path(__file__).parent.parent
LABELS = {
    "greedy first answer": "greedy: first answer",
    "first answer": "first answer",
    "one of eight": "one of 8",
    "judge, own answers, balanced": "judge, own answers",
    "judge, own answers": "judge, own answers",
    "the same, of those with a box": "judge, own boxed answers",
    "the same, verdicts at temperature 0": "greedy judge, own answers",
    "judge, independent answers": "judge, independent answers",
    "pairs, mean of both orders": "pairwise, both orders",
    "pairs, A chosen": "pairwise, A chosen",
    "Brier score of verdicts": "Brier score of verdicts",
    "says correct to its own answers": "verdict says correct",
    "a verdict that can be read": "verdict readable",
    "reflection fixes a wrong answer": "reflection fixes a wrong answer",
    "reflection harms a right one": "reflection harms a right answer",
    "final answer, reflecting on a No": "final answer, reflecting on a No",
    "majority of four": "vote of 4",
    "majority of eight": "vote of 8",
    "four, weighed by verdicts": "vote of 4 weighed by verdicts",
    "four, weighed by their probability": "vote of 4 weighed by their probability",
    "four, weighed by verdicts at temperature 0": "vote of 4 weighed by greedy verdicts",
    "best of four by pairs": "best of 4 by pairs",
}
OTHERS = ("questions x 8 rollouts a step, recycled prompts x 8", "rollouts a step")  # rows that are written by hand
_COLUMNS = re.compile(r"<!-- (\w+): (.+) -->\n")


@cache
def runs_of(file: str) -> list[dict]:
    return recorded_runs(record.RESULTS / f"learning_{file}.json")


@cache
def values(file: str):
    """(what the file's runs measured, how runs of one variant differ)."""
    found = values_of(runs_of(file))
    return found, spread(found)


def cell(file: str, column: str, measure: str) -> str:
    """What a table says: a mean or a difference, and its half width. Raises KeyError for what no run has."""
    file, _, column = column.rpartition(":") if ":" in column else (file, "", column)
    if (path := record.RESULTS / f"{file}.json").exists():  # one model's, with intervals over questions
        measured = json.loads(path.read_text(encoding="utf-8"))[column]["measures"][measure]
        return written({"mean": measured["mean"], "half": measured["interval"][1] - measured["mean"]}, "mean")
    found, deviations = values(file)
    variant, _, than = column.removesuffix("~").partition("-")
    seeds, deviation = found[variant].get(measure, {}), deviations.get(measure)
    if not seeds:
        return ""
    mean = statistics.fmean(seeds.values())
    if not than:
        half = None if variant == "start" else half_width(deviation, len(seeds))
        return written({"mean": mean, "half": half}, "mean")
    others, more = found[than][measure], 0.0
    if column.endswith("~"):
        sides = [[run for run in runs_of(file) if run["variant"] == name] for name in (variant, than)]
        more = question_variance(*sides, measure)
        if more is None:  # its outcomes were not kept
            return ""
    half = half_width(deviation, len(seeds), len(others), more=more)
    return written({"over": {"mean": mean - statistics.fmean(others.values()), "half": half}}, "over")


def filled(text: str) -> str:
    """A page with each of its tables as the rows have it."""
    lines, columns, header = [], None, 0
    for line in text.splitlines(keepends=True):
        if found := _COLUMNS.fullmatch(line):
            file, columns, header = found[1], found[2].split(), 2
        elif columns and line.startswith("|"):
            if header:  # names and alignment
                header -= 1
            else:
                label, *old = (part.strip() for part in line.strip("|\n").split("|"))
                if label not in OTHERS:
                    new = [cell(file, column, LABELS[label]) for column in columns]
                    bold = [f"**{value}**" if "**" in was else value for value, was in zip(new, old, strict=True)]
                    line = f"| {' | '.join([label, *bold])} |\n"
        else:
            columns = None
        lines.append(line)
    return "".join(lines)


def main() -> None:
    parser = Parser(__doc__, prog="benchmarks.pages")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (now := filled(text)) != text:
            stale.append(page)
            if not args.check:
                path.write_text(now, encoding="utf-8")
    print(*(f"{page}: {'not what the rows say' if args.check else 'written'}" for page in stale), sep="\n")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    main()
