"""One web page about one run or several: what was learned, as curves, and what was written, as rollouts.

    python report.py RUN_DIR [RUN_DIR ...] [--results results.json ...] --output report.html

A run is what train_spark.py leaves in its output_dir: metrics.jsonl or trainer_state.json (of an interrupted run, the
one in its newest checkpoint), settings.json and completions/*.parquet. A metrics.json (demo.py's before/after table) is
shown where there is one, and from evaluate.py's results how far verdicts can be believed and what accuracy costs. Runs
that differ in nothing but their seeds are one curve, with a band from the lowest to the highest. What a run has not
logged is marked as such.

The page (reporting/page.html.jinja) is one file without scripts or links to anything; REPORT_curves.png holds its
curves. Whatever a model wrote is hostile: text is escaped and its invisible characters are made visible, images are
decoded and encoded anew, and the page's own policy forbids scripts and requests.
"""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import verify
from data.cli import Parser, refuse
from data.rows import BadInput
from reporting.curves import draw, number, pictures, results_pictures, start_and_end
from reporting.hostile import image, shorten, visible
from reporting.runs import TASK_TITLES, Row, Run, by_seed, differences, draw_rollouts, read_runs

LATE, EARLY = 12, 4  # cards of each task from the end of a run, and from its start
TILES = (  # what a run is summed up by
    ("policy/accuracy", "answers right"),
    ("judge/pointwise/balanced_accuracy", "one answer judged, balanced"),
    ("judge/pairwise/accuracy", "pairs judged"),
    ("reflection/fix_rate", "wrong answers fixed"),
)
_QUOTED = re.compile(r"<(response(?:_[ab])?)>\n(.*?)\n</\1>", re.DOTALL)


def card(row: Row) -> Row:
    """One rollout: the question, what the model was shown, what it wrote, and whether that was right."""
    prompt = row["prompt"]
    quotes = list(_QUOTED.finditer(prompt))
    question, instruction = prompt, ""
    if quotes:
        question, _, before = prompt[: quotes[0].start()].rpartition("\n\n")
        instruction = " … ".join(part for part in (before.strip(), prompt[quotes[-1].end() :].strip()) if part)
    truth = row.get("shown_correct")
    truth = [bool(right) for right in truth] if truth is not None else []
    scored = [reward for reward in row["group"] if not math.isnan(reward)]
    label = row.get("label")
    return {
        "kind": row["task"] if row["task"] in TASK_TITLES else "other",
        "task": TASK_TITLES.get(row["task"], row["task"]),
        "step": row.get("step", "?"),
        "right": None if math.isnan(row["reward"]) else row["reward"] >= 1,
        "images": list(map(image, row["images"])),
        "question": question.strip(),
        "quotes": [
            {
                "letter": quote[1].removeprefix("response").strip("_").upper(),
                "text": quote[2].strip(),
                "right": truth[i] if i < len(truth) else None,
            }
            for i, quote in enumerate(quotes)
        ],
        "instruction": instruction,
        "completion": row["completion"].strip(),
        "answer": verify.extract_boxed(row["completion"]),
        "label": label if isinstance(label, str) else None,
        "tries": len(scored),
        "tries_right": sum(reward >= 1 for reward in scored),
    }


def facts(run: Run) -> list[str]:
    """How far a run went, and what it cost."""
    import pyarrow.parquet as pq

    logged = [steps[-1] for steps, _ in run.series.values() if steps]  # beyond the last checkpoint of a killed run
    done = max([run.state.get("global_step") or 0, *logged])
    planned = run.state.get("max_steps") or run.settings.get("max_steps")
    words = []
    if done:
        words.append(f"{done:,} steps" if done == planned or not planned else f"{done:,} of {planned:,} steps so far")
    recycled = sum(run.series.get("recycle/rows", ((), ()))[1])
    words += [f"{recycled:,.0f} recycled rollouts"] if recycled else []
    for kind, name in (("completions", "policy rollouts kept"), ("recycled", "recycled ones kept")):
        if kind == "recycled" and recycled:
            continue
        rows = 0
        for path in run.tables[kind]:
            try:
                rows += pq.ParquetFile(path).metadata.num_rows
            except (OSError, ValueError):
                continue  # draw_rollouts says so
        words += [f"{rows:,} {name}"] if rows else []
    if "num_tokens" in run.series:
        words.append(f"{run.series['num_tokens'][1][-1]:,.0f} tokens")
    seconds = sum(run.series.get("train_runtime", ((), ()))[1][-1:]) or sum(run.series.get("step_time", ((), ()))[1])
    if seconds:
        words.append(f"{seconds / 60:,.1f} minutes")
    if not run.series:
        words.append("no training log")
    elif not any(metric.startswith("recycle/") for metric in run.series):
        words.append("no recycling: plain GRPO")
    return words


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(name, start, end) of a run's main numbers."""
    ends = {label: start_and_end(run, metric) for metric, label in TILES}
    return [(label, number(pair[0]), number(pair[1])) for label, pair in ends.items() if pair]


def rollouts(run: Run, several: bool) -> list[Row]:
    """Cards of the last steps and of the first ones; half as many where there are several runs."""
    return [
        {"when": when, **card(row)}
        for when, count in (("late", LATE), ("early", EARLY))
        for row in draw_rollouts(run, when == "late", count // 2 if several else count)
    ]


def before_after(metrics: Row) -> Row:
    """metrics.json as a table; every column whose values are {mean, n, interval} is shown."""
    table = [row for row in metrics.get("table", []) if isinstance(row, dict)]
    columns = list(dict.fromkeys(k for row in table for k, v in row.items() if isinstance(v, dict) and "mean" in v))
    rows = []
    for row in table:
        cells = [row[column] if isinstance(row.get(column), dict) else {} for column in columns]
        shares = [share for share in (row.get("random"), *(cell.get("mean") for cell in cells)) if share is not None]
        rows.append({**row, "cells": cells, "drawn": all(0 <= share <= 1 for share in shares)})
    settings = ", ".join(f"{name} {value}" for name, value in (metrics.get("settings") or {}).items())
    return {"columns": columns, "rows": rows, "settings": settings}


def page(runs: list[Run], tables: list[tuple[str, Row]], results: list[Row]) -> str:
    """The page. Whatever goes into the template has its invisible characters written out and is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),  # Markup: a macro's output
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shorten"] = shorten
    sections = [
        {"name": run.name, "facts": facts(run), "tiles": tiles(run), "rollouts": rollouts(run, len(runs) > 1),
         "settings": sorted(run.settings.items())} for run in runs
    ]  # fmt: skip
    curves = by_seed(runs)
    return environment.get_template("page.html.jinja").render(
        runs=sections,
        tasks=TASK_TITLES,
        differences=differences(runs),
        tables=[{"name": name, **before_after(metrics)} for name, metrics in tables],
        pictures=pictures(curves) if any(run.series for run in curves) else [],
        results=results,
        notes=[f"{run.name}: {note}" for run in runs for note in dict.fromkeys(run.notes)],
    )


def write_report(
    run_dirs: Sequence[str | Path], output: str | Path, metrics: Row | None = None, results: Sequence[str | Path] = ()
) -> Path:
    """Write `output` and OUTPUT_curves.png for the runs.

    Args:
        metrics: a before/after table instead of the runs' own.
        results: files of evaluate.py.

    Raises BadInput for a folder that is no run, and a file that has no such results.
    """
    runs, output = read_runs(list(run_dirs)), Path(output)
    tables = [("", metrics)] if metrics else [(f": {r.name}" * (len(runs) > 1), r.metrics) for r in runs if r.metrics]
    written = page(runs, tables, results_pictures(results) if results else [])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(written, encoding="utf-8")
    if any(run.series for run in runs):
        draw(by_seed(runs), output.with_name(f"{output.stem}_curves.png"))
    return output


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a train_spark.py output_dir")
    parser.add_argument("--results", nargs="+", default=(), metavar="FILE", help="results of evaluate.py")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    args = parser.parse_args()
    try:
        print(write_report(args.run_dirs, args.output, results=args.results))
    except (BadInput, OSError) as error:
        return refuse("report.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
