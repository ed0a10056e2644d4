"""Turn results files of evaluate.py into accuracy tables: what was right, how surely, and what failed.

    python calculate_acc.py --result_path results.json [more.json ...] [--format table|json|markdown]

Answers are scored again with verify.py; rows whose is_correct disagrees are named. A failed request is not an answer:
it is left out of every rate and counted separately, as is an answer that can't be scored (no usable gold); the most
frequent errors are shown. An answer without a box is an answer, and wrong. Rows scored by your own verifier
(evaluate.py --reward_funcs) keep their verdicts. Intervals are Wilson's at 95 %; several rows of one question count as
fewer, where they are right or wrong together, and as one in a comparison's p.

Results of evaluate.py --tts compare also give accuracy against the tokens generated, for each way of test-time scaling
and each number of answers, and its difference from a majority of about as many tokens; --figure draws it as a PNG.

With several files, rows are matched by dataset, problem, image and occurrence (by dataset, gold and occurrence where a
file holds no problem), and every file is compared with the first, in the same mode only: an answer is compared with an
answer, never with a verdict or with what test-time scaling made of it. Each comparison gives the difference, its paired
interval (Agresti and Min's) and McNemar's exact test.

Files are read row by row (a JSON list with a row a line, as evaluate.py writes it, or JSON lines): a million rows take
a minute, and memory for a count of each question and category. Files that hold only dataset, ground_truth and
extracted_answer, as the release writes them, are read too.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from data.cli import Errors, Parser, printable, refuse, text_table
from data.rows import BadInput
from data.table import batched
from scoring.rates import (
    by_category,
    by_pass_rate,
    count_probability,
    figure,
    group_scores,
    interval_of,
    paired_questions,
    price_table,
    rate,
    rates,
)
from scoring.rows import KINDS, PROBABILITIES, checked, kind_of, read_rows

Row = dict[str, Any]
MOST_VALUES = 50  # of a category that is tabulated; one with more is a name for each row
EXAMPLES = 5  # of disagreement, kept of each file


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@dataclass
class Tally:
    """What is counted of one file. `outcomes` are for the pairing: (key, dataset, kind, right or wrong or None)."""

    path: str
    counts: dict[tuple[str, str], Counter] = field(default_factory=lambda: defaultdict(Counter))  # (dataset, kind)
    # (dataset, kind) -> question -> its rows, how many are right, and how many were before judging and reflecting
    rows: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(lambda: (0, 0, 0))))
    failed: Counter = field(default_factory=Counter)  # by dataset
    errors: Errors = field(default_factory=Errors)
    verifiers: set[str] = field(default_factory=set)  # that scored rows, other than verify.py
    datasets: dict[str, None] = field(default_factory=dict)  # in order of appearance
    disagreements: int = 0
    examples: list[Row] = field(default_factory=list)
    outcomes: list[tuple[int, str, str, bool | None]] = field(default_factory=list)
    # (dataset, kind) -> field -> value -> question -> its rows, and how many are right
    categories: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(dict))))
    questions: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))  # dataset -> question
    scaling: dict = field(default_factory=lambda: defaultdict(list))  # dataset -> (question, way -> (right, tokens))
    groups: dict = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))  # (...) -> question -> part
    parts: dict = field(default_factory=lambda: defaultdict(dict))  # dataset -> question -> how many parts it has
    incomplete: dict = field(default_factory=lambda: defaultdict(set))  # dataset -> questions with a part without score


def tally(path: str, pair: bool = False, rows: Iterable[Row] | None = None) -> Tally:
    """Count the rows of `path`, or `rows`; with `pair`, remember each row's outcome."""
    total = Tally(path)
    for index, row in enumerate(rescored(checked(read_rows(path) if rows is None else rows, path))):
        dataset, kind, right = row["dataset"], kind_of(row), None
        total.datasets[dataset] = None
        if row.get("error") is not None:
            total.failed[dataset] += 1
            total.errors.add(str(row["error"]))
        else:
            if row.get("verifier"):
                total.verifiers.add(str(row["verifier"]))
            right = count_row(total.counts[dataset, kind], row)
        if right is not None:
            question = match_key(row) if "problem" in row else -1 - index
            rows, hits, first = total.rows[dataset, kind][question]
            first += bool(row.get("first_is_correct"))
            total.rows[dataset, kind][question] = rows + 1, hits + right, first
            if row["stored"] is not None and bool(row["stored"]) != right:
                total.disagreements += 1
                if len(total.examples) < EXAMPLES:
                    fields = {name: row[name] for name in ("dataset", "extracted_answer", "ground_truth")}
                    total.examples.append({"row": index, **fields, "stored": bool(row["stored"]), "rescored": right})
            if kind == "pointwise":
                n, label = total.questions[dataset][match_key(row)], row["label"]
                n.update({f"label_{label}": 1, f"right_{label}": right, "says_yes": row["verdict"] == "Yes"})
            for name, values in (row.get("categories") or {}).items():
                for value in [values] if isinstance(values, str) else values:
                    questions = total.categories[dataset, kind][name][value]
                    rows, hits = questions.get(question, (0, 0))
                    questions[question] = rows + 1, hits + right
            outcomes = {(v["variant"], v["n"]): (v.get("is_correct"), v["completion_tokens"]) for v in row["variants"]}
            if outcomes and all(variant_right is not None for variant_right, _ in outcomes.values()):
                total.scaling[dataset].append((question, outcomes))
            if row.get("group"):
                question, part, *size = row["group"]
                total.groups[dataset, kind][question][part] = right
                total.parts[dataset][question] = int(size[0]) if size else 0
        elif row.get("group"):
            total.incomplete[dataset].add(row["group"][0])
        if pair:
            total.outcomes.append((match_key(row), dataset, kind, right))
    for dataset, failed in total.failed.items():  # a failed row counts with the others of its dataset, or of its file
        kinds = [kind for name, kind in total.counts if name == dataset] or [kind for _, kind in total.counts]
        total.counts[dataset, kinds[0] if kinds else "answer"]["failed"] += failed
    return total


def rescored(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with verify.py's verdicts on their answers; `stored` is what is_correct was."""
    from verify import verify_many

    for batch in batched(rows, 2048):
        batch = [
            {**row, "stored": row.get("is_correct"), "variants": [dict(v) for v in row.get("variants") or ()]}
            for row in batch
        ]
        found, pairs = [], []  # (where a verdict belongs, its name), (answer, gold)
        for row in batch:
            if row.get("error") is None and not row.get("verifier"):
                answers = [(row, "is_correct", row["extracted_answer"])]
                answers += [(variant, "is_correct", variant["answer"]) for variant in row["variants"]]
                if "first_answer" in row:
                    answers.append((row, "first_is_correct", row["first_answer"]))
                found += [(place, name) for place, name, _ in answers]
                pairs += [("" if a is None else str(a), row["ground_truth"]) for _, _, a in answers]
        for (place, name), verdict in zip(found, verify_many(pairs), strict=True):
            place[name] = verdict
        yield from batch


def match_key(row: Row) -> int:
    """The same number for the same question in another file."""
    question = row["problem"] if "problem" in row else ("gold", row["ground_truth"])
    parts = repr((row["dataset"], question, row.get("image_path") or row.get("image_digest")))
    return int.from_bytes(blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def count_row(n: Counter, row: Row) -> bool | None:
    """Add one answered row to the counts of its benchmark. Returns whether it is right; None if that can't be said."""
    kind = kind_of(row)
    if "completion_tokens" in row:
        n["tokens"] += row["completion_tokens"] or 0
        n["prompt_tokens"] += row.get("prompt_tokens") or 0
        n["with_tokens"] += 1
        n["first_tokens"] += row.get("first_completion_tokens") or 0
    if kind in ("answer", "tts"):
        outcome = row.get("is_correct")
        n["unboxed"] += row["extracted_answer"] in (None, "")
        n["cut_off"] += bool(row.get("cut_off"))
    else:
        outcome = count_verdicts(n, kind, row)
    if outcome is None:
        n["unscorable"] += 1
        return None
    n["answered"] += 1
    n["right"] += outcome
    if kind == "tts":
        first = bool(row.get("first_is_correct"))
        n["first_right"] += first
        n["right_to_wrong"] += first and not outcome
        n["wrong_to_right"] += outcome and not first
        n["reflections"] += row.get("round_num") or 0
    return outcome


def count_verdicts(n: Counter, kind: str, row: Row) -> bool | None:
    """Add a judge's verdicts. A verdict that can't be read is wrong, and tells nothing about which side it leans to."""
    if kind == "pointwise":
        verdict, label = row["verdict"], row.get("label")
        if label not in ("Yes", "No"):
            return None
        n["verdicts"] += 1
        n["parsed"] += verdict in ("Yes", "No")
        n["says_yes"] += verdict == "Yes"
        n[f"label_{label}"] += 1
        n[f"right_{label}"] += verdict == label
        count_probability(n, row.get("verdict_probability"), verdict == label)
        return verdict == label

    def listed(name: str) -> list:  # best_of_n has a list of them
        return row[name] if isinstance(row.get(name), list) else [row.get(name)]

    first, swapped = listed("verdict"), listed("verdict_swapped")
    for (name, probability), right in zip(PROBABILITIES.items(), ("A", "B"), strict=True):
        for verdict, p in zip(listed(name), listed(probability), strict=False):
            count_probability(n, p, verdict == right)
    for orders in zip(first, swapped, strict=True):  # the chosen one is A in the first order, B in the swapped one
        parsed = [verdict for verdict in orders if verdict in ("A", "B")]
        n["verdicts"] += 2
        n["parsed"] += len(parsed)
        n["picks_first"] += parsed.count("A")
        n["both_parsed"] += len(parsed) == 2
        n["consistent"] += sorted(parsed) == ["A", "B"]
    chosen_first, chosen_second = all(v == "A" for v in first), all(v == "B" for v in swapped)
    n["chosen_first_right"] += chosen_first
    n["chosen_second_right"] += chosen_second
    return chosen_first and chosen_second


# ---------------------------------------------------------------------------------------------------------------------
# Two files on the same questions


def compare(base: Tally, other: Tally) -> list[Row]:
    """Differences on the rows that both files answered in the same mode: of each benchmark, of their mean, of all."""
    import pandas as pd

    tables = []
    for total in (base, other):
        table = pd.DataFrame(total.outcomes, columns=["key", "dataset", "kind", "right"])
        table["occurrence"] = table.groupby("key").cumcount()  # the same question may stand there several times
        tables.append(table[table["right"].notna()])
    pairs = tables[0].merge(tables[1], on=["key", "occurrence", "kind"], suffixes=("", "_after"))

    def questions(rows: pd.DataFrame) -> list[tuple[int, int]]:
        changes = (rows["right_after"].astype(int) - rows["right"].astype(int)).groupby([rows["key"], rows["kind"]])
        return list(zip(changes.size(), changes.sum(), strict=True))

    def difference(name: str, rows: pd.DataFrame) -> Row:
        before, after = rows["right"].astype(int), rows["right_after"].astype(int)
        n, gained, lost = len(rows), int((after > before).sum()), int((after < before).sum())
        *_, p = estimate = paired_questions(questions(rows))
        return {"dataset": name, "rows": n, "base_accuracy": float(before.mean()), "accuracy": float(after.mean()),
                "difference": (gained - lost) / n, "interval": interval_of(*estimate[:2], -1.0, 1.0),
                "gained": gained, "lost": lost, "p": p}  # fmt: skip

    groups = {name: pairs[pairs["dataset"] == name] for name in base.datasets}
    rows = [difference(name, group) for name, group in groups.items() if len(group)]
    if len(rows) > 1:
        k = len(rows)
        means = {name: sum(r[name] for r in rows) / k for name in ("base_accuracy", "accuracy", "difference")}
        # Around the difference itself: what keeps one interval from being zero wide would add up over benchmarks.
        variance = sum(paired_questions(questions(groups[r["dataset"]]))[1] for r in rows) / k**2
        total = {"rows": len(pairs), "interval": interval_of(means["difference"], variance, -1.0, 1.0)}
        rows = [*rows, {"dataset": "mean of benchmarks", **means, **total, "gained": None, "lost": None, "p": None}]
        rows.append(difference("all rows", pairs))
    return [{"base": base.path, "path": other.path, **row} for row in rows]


def summarise(tallies: list[Tally]) -> Row:
    """Everything as one JSON-able record: `files`, and `paired` differences from the first of them."""
    files = []
    for total in tallies:
        keys = sorted(total.counts, key=lambda key: (KINDS.index(key[1]), list(total.datasets).index(key[0])))
        benchmarks = [rates(*key, total.counts[key], list(total.rows[key].values())) for key in keys]
        for key, benchmark in zip(keys, benchmarks, strict=True):
            split = {name: values for name, values in total.categories[key].items() if 2 <= len(values) <= MOST_VALUES}
            benchmark["categories"] = {
                name: by_category({value: list(questions.values()) for value, questions in values.items()})
                for name, values in split.items()
            }
            if key[1] == "pointwise":
                benchmark["by_pass_rate"] = by_pass_rate(total.questions[key[0]])
            if key[1] == "tts" and total.scaling[key[0]]:
                benchmark["price"] = price_table(total.scaling[key[0]])
            missing, sizes = total.incomplete[key[0]], total.parts[key[0]]
            whole = {q: p for q, p in total.groups[key].items() if q not in missing and len(p) >= sizes[q]}
            benchmark["scores"] = group_scores(whole) if whole else {}
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


def columns(text: str) -> dict[str, str]:
    """Head -> field of `head=field, ...`; where they are the same, one is enough."""
    parts = (column.partition("=") for column in text.split(", "))
    return {head: field or head for head, _, field in parts}


PAIRS = (
    "both orders=accuracy, 95 %=interval, chosen 1st=accuracy_chosen_first, chosen 2nd=accuracy_chosen_second, "
    "mean=accuracy_both_orders_mean, consistent=consistency, 1st place bias=position_bias, verdicts=verdict_rate, "
    "tokens"
)
RATES = {  # kind -> title, columns
    "answer": ("Answers", "accuracy, 95 %=interval, unboxed, cut off=cut_off, tokens"),
    "tts": (
        "Test-time scaling: first answer, and final one after judging and reflecting",
        "first=first_accuracy, final=accuracy, 95 %=interval, right>wrong=right_to_wrong, wrong>right=wrong_to_right, "
        "p=flip_p, reflections, unboxed, cut off=cut_off, first tokens=first_tokens, tokens",
    ),
    "pointwise": (
        "Judging one response",
        "accuracy, 95 %=interval, balanced=balanced_accuracy, says Yes=says_yes, is Yes=is_yes, verdicts=verdict_rate, "
        "tokens",
    ),
    "pairwise": ("Judging pairs, in both orders", PAIRS),
    "best_of_n": ("Judging the best of n: the chosen one against each other, in both orders", PAIRS),
}
BREAKDOWNS = {
    "price": (
        "Test-time scaling at its price, against a majority of as many tokens",
        "way, n, answered, tokens, accuracy, 95 %=interval, majority of=majority_n, its tokens=majority_tokens, "
        "difference, 95 % of it=difference_interval, better=winner",
    ),
    "scores": ("The benchmarks' own scores", "kind, score=name, questions, value=score, 95 %=interval"),
    "categories": ("By category", "kind, category, value, answered, accuracy, 95 %=interval"),
    "by_pass_rate": (
        "Judging one response, by the share of right responses to its question",
        "kind, pass rate=pass_rate, questions, answered, accuracy, 95 %=interval, balanced=balanced_accuracy, "
        "says Yes=says_yes, question only=question_only",
    ),
    "calibration": ("Calibration of verdicts", "kind, verdicts, Brier=brier, expected error=calibration_error"),
    "bins": (
        "Reliability of verdicts",
        "kind, probability=place, verdicts, mean=probability, right=accuracy, 95 %=interval",
    ),
}
PAIRED = "paired rows=rows, base=base_accuracy, this=accuracy, difference, 95 %=interval, gained, lost, McNemar p=p"
COUNTS = (
    "questions n majority_n verdicts unboxed cut_off right_to_wrong wrong_to_right rows answered unscorable failed "
    "gained lost"
)
FORMATS = {
    **dict.fromkeys(COUNTS.split(), ","),
    **dict.fromkeys(("tokens", "first_tokens", "majority_tokens"), ",.1f"),
    "reflections": ".2f",
    "brier": ".3f",
}


def cell(name: str, value) -> str:
    """A field as text; a rate in percent."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name in FORMATS:
        return format(value, FORMATS[name])
    if "interval" in name:
        return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"
    if name in ("p", "flip_p"):
        return f"{value:.2g}" if value else "<1e-300"
    return f"{100 * value:+.1f}" if name in ("difference", "position_bias") else f"{100 * value:.1f}"


def tables(summary: Row) -> Iterator[tuple[str, dict[str, str], list[Row]]]:
    """(title, columns, rows) of what a reader should see, in that order."""
    files = summary["files"]
    for kind, (title, middle) in RATES.items():
        heads = columns(f"benchmark=dataset, file=path, answered, {middle}, unscorable, failed")
        rows = [{"path": file["path"], **b} for file in files for b in file["benchmarks"] if b["kind"] == kind]
        order = list(dict.fromkeys(row["dataset"] for row in rows))
        rows.sort(key=lambda row: order.index(row["dataset"]))  # stable: the files of a benchmark stand together
        for file in files if len(order) > 1 else []:
            if kind in file["means"]:
                means = {"accuracy": file["means"][kind], "first_accuracy": file["first_mean"]}
                blank = dict.fromkeys(heads.values(), "")
                rows.append({**blank, "dataset": "mean of benchmarks", "path": file["path"], **means})
        if rows:
            yield title, heads, rows
    for name, rows in breakdowns(files).items():
        title, others = BREAKDOWNS[name]
        yield title, columns(f"benchmark=dataset, file=path, {others}"), rows
    for file in (f for f in files[1:] if not other_mode(f, files[0])):
        rows = [row for row in summary["paired"] if row["path"] == file["path"]]
        both = rows[-1]["rows"] if rows else 0
        answered = [sum(b["answered"] for b in f["benchmarks"]) for f in (file, files[0])]
        title = f"{file['path']} against {files[0]['path']}, on the {both:,} rows both answered"
        yield f"{title}, of {answered[0]:,} and {answered[1]:,}", columns(f"benchmark=dataset, {PAIRED}"), rows


def breakdowns(files: list[Row]) -> dict[str, list[Row]]:
    """The rows of the BREAKDOWNS that have any."""
    found: dict[str, list[Row]] = {}

    def add(name: str, place: Row, rows: list[Row]) -> None:
        if rows:
            found.setdefault(name, []).extend(place | row for row in rows)

    for file in files:
        priced = [b["dataset"] for b in file["benchmarks"] if b.get("price")]
        add("price", {"dataset": priced[0] if len(priced) == 1 else "all rows", "path": file["path"]}, file["price"])
        for b in file["benchmarks"]:
            place = {"dataset": b["dataset"], "path": file["path"], "kind": b["kind"]}
            add("scores", place, [{"name": name, **row} for name, row in b["scores"].items()])
            for category, rows in b["categories"].items():
                mean = {"accuracy": rows["mean"], "interval": rows["interval"]}
                values = [*rows["values"].items(), ("mean", mean)]
                add("categories", place | {"category": category}, [{"value": value, **row} for value, row in values])
            add("by_pass_rate", place, b.get("by_pass_rate", []))
            if judged := b.get("calibration"):
                add("calibration", place, [judged])
                bins = [{"place": f"{row['from']:.1f} to {row['to']:.1f}", **row} for row in judged["bins"]]
                add("bins", place, bins)
    return found


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
    for title, fields, rows in tables(summary):
        if len(summary["files"]) == 1:
            fields.pop("file", None)
        table = text_table(
            [fields, *([cell(name, row.get(name)) for name in fields.values()] for row in rows)], markdown
        )
        title = f"**{printable(title)}**" if markdown else printable(title)
        lines += ["", title, "" if markdown else "-" * max(map(len, table)), *table]
    return "\n".join(lines).strip("\n")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--result_path", required=True, nargs="+", help="results files; several are compared")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")
    parser.add_argument("--figure", metavar="PNG", help="draw accuracy against tokens, for --tts compare")
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
