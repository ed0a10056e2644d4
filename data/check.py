"""Is this data usable? Answered in seconds, before a model is loaded.

    python -m data.check train.json --image_root images
    python -m data.check train.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --against test.json --json

Reads a file as training or evaluation would (rows for judging and lists of golds, which only evaluation takes, count as
usable), looks into every image, and reports: rows and columns, answers by kind with the verifier's opinion, repeated
questions, questions shared with another file, and with --model the lengths of prompts in tokens. Unusable rows are
named with line and reason, the first ten of them here and all of them in the report as JSON; the exit status is 2 if
there are any.
"""

import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from data.arguments import DataSettings
from data.cli import Parser, progress_bar, refuse
from data.images import BadImage, check_image, content_digest
from data.read import Reader, Row
from data.rows import BadInput, BadRow, Source, question_text
from data.table import batched

EXPRESSIONS = 1000  # distinct golds that are no number or letter, for the verifier: it takes milliseconds for each
LISTED = 10  # unusable rows, in the report as text
PROBE = "7919.25"  # an answer that no gold is equal to: the verifier must be able to say so

_INTEGER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)")
_LETTER = re.compile(r"\(?[A-Za-z]\)?\.?|\([A-Z]\) .+")  # (B) 12 cm: an option with its text
_SYMBOL = re.compile(r"[\d\\^=<>+*/(){}\[\]$%]")

Entry = tuple[int, int | None, Row | BadRow]  # (row, line, ...)
Examined = tuple[int, Row | BadRow, bytes]  # (row, ..., digest of its question)


def kind_of(gold: str) -> str:
    """integer, letter, expression (anything with a digit or a symbol of mathematics), or text."""
    if _INTEGER.fullmatch(gold):
        return "integer"
    if _LETTER.fullmatch(gold):
        return "letter"
    return "expression" if _SYMBOL.search(gold) else "text"


# ---------------------------------------------------------------------------------------------------------------------
# Rows and their images


def examine(batch: list[Entry], suffix: str, allow_remote: bool) -> list[Examined]:
    """Each row with the sizes of its images filled in, or what is wrong with one of them, and the digest of its
    question: words and contents of images, wherever those are stored. Runs in worker processes."""
    examined = []
    for number, line, row in batch:
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(row, dict):
            digest.update(question_text(row["prompt"], suffix).encode())
            try:
                for ref in row["images"]:
                    ref["width"], ref["height"] = check_image(ref, allow_remote)
                    digest.update(content_digest(ref))
                    ref["bytes"] = None  # large, and of no more use
            except BadImage as error:
                row = BadRow(number, line, "image", " ".join(str(error).split()))
        examined.append((number, row, digest.digest()))
    return examined


def examined_rows(reader: Reader, workers: int) -> Iterator[Examined]:
    """`examine` of every row in order, images in `workers` processes, with a progress bar. Raises BadInput."""
    source = reader.source
    arguments = (source.suffix, source.settings.allow_remote_images)
    with (
        ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn")) as pool,
        progress_bar(None, 0, str(source), unit=" rows", delay=1) as bar,
    ):
        waiting: deque[Callable[[], list[Examined]]] = deque()
        for batch in batched(reader, 64):
            bar.update(len(batch))
            has_images = any(isinstance(row, dict) and row["images"] for _, _, row in batch)
            job = partial(examine, batch, *arguments)
            waiting.append(pool.submit(job).result if has_images else job)
            if len(waiting) > 4 * workers:
                yield from waiting.popleft()()
        while waiting:
            yield from waiting.popleft()()


# ---------------------------------------------------------------------------------------------------------------------
# The report


def check(source: Source, against: Source | None = None, model: str | None = None, workers: int = 2) -> dict[str, Any]:
    """What there is to know about `source`, as plain data; `bad` lists every unusable row.

    Args:
        against: other data, whose questions should not be in `source`.
        model: a folder or hub name, whose processor counts tokens.

    Raises BadInput.
    """
    processor = None
    if model is not None:
        from transformers import AutoProcessor

        from data.lengths import image_tokens, prompt_tokens

        try:
            processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise BadInput(f"model: {error}") from None
    seen: dict[bytes, tuple[int, str]] = {}  # question -> (first row, its gold)
    bad, repeated, tasks, golds, images = [], [], Counter(), Counter(), Counter()
    conflicts = total = 0
    lengths: dict[str, list[int]] = {"prompt": [], "image": []}
    reader = Reader(source, "check", look=False)
    for batch in batched(examined_rows(reader, workers), 256):
        good = [(number, row, key) for number, row, key in batch if isinstance(row, dict)]
        bad += [row for _, row, _ in batch if isinstance(row, BadRow)]
        total += len(batch)
        for number, row, key in good:
            tasks[row["task"]] += 1
            golds.update([row["solution"]] if isinstance(row["solution"], str) else row["solution"])
            images[len(row["images"])] += 1
            first, gold = seen.setdefault(key, (number, row["solution"]))
            if first != number:
                repeated.append([number, first])
                conflicts += gold != row["solution"]
        if processor is not None and good:
            lengths["prompt"] += prompt_tokens([row for _, row, _ in good], processor)
            lengths["image"] += [image_tokens(row, processor) for _, row, _ in good if row["images"]]
    report = {
        "file": str(source),
        "rows": total,
        "usable": total - len(bad),
        "columns": list(reader.columns),
        "images": {"rows": total - len(bad) - images[0], "images": sum(n * rows for n, rows in images.items())},
        "tasks": dict(tasks.most_common()),
        "answers": answers(golds),
        "options_counted_from": reader.layout.counted_from if reader.layout else None,
        "repeated": {"rows": len(repeated), "with_another_answer": conflicts, "row_and_first": repeated},
    }
    if against is not None:
        shared, unusable, compared = [], 0, 0
        for number, row, key in examined_rows(Reader(against, "check", look=False), workers):
            compared += 1
            if isinstance(row, BadRow):
                unusable += 1
            elif key in seen:
                shared.append([seen[key][0], number])
        if unusable == compared:
            raise BadInput(f"{against}: expected at least one usable row to compare with, found none")
        report["overlap"] = {"file": str(against), "rows": len(shared), "unusable": unusable, "row_and_its_row": shared}
    if processor is not None:
        report["tokens"] = {name: quantiles(values) for name, values in lengths.items() if values}
    return {**report, "bad": [asdict(row) for row in bad]}


def quantiles(values: list[int]) -> dict[str, int]:
    values, quantile = sorted(values), {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: values[round(q * (len(values) - 1))] for name, q in quantile.items()}


def answers(golds: Counter) -> dict[str, Any]:
    """Rows by kind of gold. `unparseable` are those that the verifier can't score, of the `asked` golds among the
    `different` ones; numbers and letters it always can."""
    import verify

    kinds = Counter()
    for gold, n in golds.items():
        kinds[kind_of(gold)] += n
    hard = [gold for gold in golds if kind_of(gold) in ("expression", "text")]
    sample = hard[:: max(1, -(-len(hard) // EXPRESSIONS))]
    results = verify.explain_many([(PROBE, gold) for gold in sample])
    unparseable = {gold: result.reason for gold, result in zip(sample, results, strict=True) if result.verdict is None}
    for gold in unparseable:
        kinds[kind_of(gold)] -= golds[gold]
        kinds["unparseable"] += golds[gold]
    return {
        **{kind: kinds[kind] for kind in ("integer", "letter", "expression", "text", "unparseable")},
        "asked": len(sample),
        "different": len(hard),
        "reasons": dict(Counter(unparseable.values())),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""

    def counts(numbers: dict[str, int], most: int = 8) -> str:
        more = f", {len(numbers) - most} more" if len(numbers) > most else ""
        return ", ".join(f"{name} {n:,}" for name, n in list(numbers.items())[:most]) + more

    def examples(pairs: list[list[int]]) -> str:
        first = ", row ".join(f"{a} = {b}" for a, b in pairs[:5])
        return f" (row {first}{', ...' if len(pairs) > 5 else ''})" if pairs else ""

    kinds = {k: n for k, n in report["answers"].items() if isinstance(n, int) and k not in ("asked", "different")}
    repeated, counted = report["repeated"], report["options_counted_from"]
    lines = [
        f"{report['file']}: {report['rows']:,} rows, {report['usable']:,} usable, {len(report['bad']):,} unusable",
        f"columns   {', '.join(map(str, report['columns']))}",
        f"images    {report['images']['images']:,} in {report['images']['rows']:,} rows",
        f"tasks     {counts(report['tasks'])}",
        f"answers   {counts(kinds)}; the verifier was asked about {report['answers']['asked']:,} of "
        f"{report['answers']['different']:,} that are neither number nor letter",
        *([f"options   are named by number, counted from {counted}"] if counted is not None else []),
        f"repeated  {repeated['rows']:,} rows, {repeated['with_another_answer']:,} of them with another answer"
        + examples(repeated["row_and_first"]),
    ]
    if "overlap" in report:
        overlap = report["overlap"]
        lines.append(
            f"overlap   {overlap['rows']:,} rows of {overlap['file']}{examples(overlap['row_and_its_row'])}"
            + (f"; {overlap['unusable']:,} of its rows are unusable" if overlap["unusable"] else "")
        )
    lines += [f"{name} tokens: {counts(numbers)}" for name, numbers in report.get("tokens", {}).items()]
    for row in report["bad"][:LISTED]:
        where = f"line {row['line']}, row {row['row']}" if row["line"] is not None else f"row {row['row']}"
        lines.append(f"{where}: field {row['field']}: {row['reason']}")
    if len(report["bad"]) > LISTED:
        fields = counts(dict(Counter(row["field"] for row in report["bad"]).most_common()))
        lines.append(f"and {len(report['bad']) - LISTED:,} more; by field: {fields}; --json has all of them")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__, prog="data.check")
    parser.add_argument("file", help="a training or benchmark file, a folder, a hub name")
    parser.add_fields(DataSettings)
    parser.add_argument("--against", metavar="FILE", help="data that should share no question with it")
    parser.add_argument("--model", help="count prompt and image tokens with this model's processor")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that look into images")
    args = parser.parse_args(arguments)

    source = Source(args.file, parser.values(args, DataSettings))
    against = replace(source, name=args.against, columns_optional=True) if args.against is not None else None
    try:
        report = check(source, against, args.model, args.workers)
    except BadInput as error:
        return refuse("data.check", error)
    print(json.dumps(report, ensure_ascii=False, indent=1) if args.json else render(report))
    if report["bad"]:
        first = BadRow(**report["bad"][0])
        n = len(report["bad"])
        print(f"data.check: {args.file}: {n:,} of {report['rows']:,} rows are unusable; {first}", file=sys.stderr)
    if not report["rows"]:
        print(f"data.check: {args.file}: expected at least one row, found none", file=sys.stderr)
    return 2 if report["bad"] or not report["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
