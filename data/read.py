"""Training data in the formats people have, all read into the same row (data/rows.py).

    read_dataset("train.json", image_root="images")      Spark-Data: message (a JSON string), answer
    read_dataset("gsm8k.jsonl")                          known layouts: GSM8K, MATH, ViRL39K, options, ...
    read_dataset("mine.csv", "question", "answer")       any columns of JSON, JSONL, CSV, TSV, Parquet
    read_dataset("photos")                               a folder or a hub name
    read_dataset("digits")                               the embedded task (data/digits.py); `arithmetic` for text

Rows are written to a temporary file as they are read and mapped from there, so that a million of them take no memory;
images are opened when a row is used. What is wrong with a row is known before any model is loaded.
"""

import atexit
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data import benchmark, gsm8k, hub, math_boxed, multiple_choice, spark_json, table, virl39k
from data.images import BadImage, pixels
from data.rows import BadInput, BadRow, Record, RowError, Rules, build_row
from recycle import PROMPT_SUFFIX

EMBEDDED_ROWS = 8000
HEADERS = 20_000  # images whose header is read before training; of the rest, only that the file is there
_PEEK = 100  # records whose columns decide the layout
_LAYOUTS = (spark_json, virl39k, gsm8k, benchmark, math_boxed, multiple_choice)
IMAGES = ("images", "image", "image_path")
TASKS = ("task", "category", "subject", "dataset")

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where data comes from and what its columns are called; see `read_dataset`."""

    name: Any
    prompt_column: str = "prompt"
    solution_column: str = "solution"
    image_column: str | None = None
    config: str | None = None
    split: str = "train"
    rules: Rules = field(default_factory=Rules)

    def __str__(self):
        return self.name if isinstance(self.name, str) else "rows"


def read_dataset(
    source: Any,
    prompt_column: str = "prompt",
    solution_column: str = "solution",
    image_column: str | None = None,
    *,
    image_root: str | None = None,
    suffix: str = PROMPT_SUFFIX,
    allow_remote_images: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    image_factor: int | None = None,
    config: str | None = None,
    split: str = "train",
    fits: Callable[[Row], str | None] | None = None,
    bad_rows: list[BadRow] | None = None,
):
    """Read `source` into a datasets.Dataset of the row of data/rows.py; a set without any image has no column for them.

    Args:
        source: a file, a folder, a hub name, `digits`, a datasets.Dataset, or an iterable of dicts.
        image_root: what image paths are relative to (default: the data file's folder), and may not leave.
        suffix: put at the end of each question, once.
        allow_remote_images: take http(s) images, fetched when used.
        min_pixels, max_pixels: bounds for each image's pixels; a row's own narrower ones win.
        image_factor: pixels a side of a visual token (data/images.py), for the Qwen-VL family.
        config, split: of a hub dataset or a folder.
        fits: says why a row is not to be used (a prompt that is too long), or None.
        bad_rows: if given, rows that can't be used are left out and appended to it.

    Raises BadInput for what can't be read, and, without `bad_rows`, for the first row that can't be used.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Json, List, Value

    from data.row_image import RowImage

    rules = Rules(suffix, ".", image_root, allow_remote_images, min_pixels, max_pixels)
    where = Source(source, prompt_column, solution_column, image_column, config, split, rules)
    features = Features(
        {
            "prompt": Json(),
            "images": List(RowImage(factor=image_factor, allow_remote=allow_remote_images)),
            "solution": Value("string"),
            "task": Value("string"),
            "source": Value("string"),
        }
    )
    encode = json.JSONEncoder(ensure_ascii=False).encode
    usable = images = 0
    first_bad = None

    def kept() -> Iterator[Row]:
        nonlocal usable, images, first_bad
        for _, line, found in rows(where):
            if not isinstance(found, BadRow) and fits is not None and (reason := fits(found)):
                found = BadRow(int(found["source"].rsplit(" ", 1)[1]), line, "prompt", reason)
            if isinstance(found, BadRow):
                if bad_rows is None:
                    raise BadInput(f"{where}: {found}")
                bad_rows.append(found)
                first_bad = first_bad or found
                continue
            usable, images = usable + 1, images + len(found["images"])
            yield {**found, "prompt": encode(found["prompt"])}

    folder = tempfile.mkdtemp(prefix="spark-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "rows.arrow")
    schema = features.arrow_schema
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        stream = kept()
        while batch := list(itertools.islice(stream, 512)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    if not usable:
        raise BadInput(f"{where}: expected at least one usable row, found none{f'; {first_bad}' if first_bad else ''}")
    dataset = Dataset.from_file(path)
    return dataset if images else dataset.remove_columns("images")


def summary(bad_rows: list[BadRow], examples: int = 3) -> str:
    """Why rows were left out, counted, with the first few of them."""
    counts = Counter(bad.field for bad in bad_rows)
    reasons = ", ".join(f"{n:,} by {name}" for name, n in counts.most_common())
    shown = "; ".join(str(bad) for bad in bad_rows[:examples])
    return f"{len(bad_rows):,} rows left out ({reasons}): {shown}{'; ...' if len(bad_rows) > examples else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Records to rows


def rows(source: Source, judge: bool = False, look: bool = True) -> Iterator[tuple[int, int | None, Row | BadRow]]:
    """(row, line, the row or what is wrong with it) of everything in `source`, in order; nothing is left out.

    Args:
        judge: rows for judging may be there; otherwise they are refused.
        look: read the headers of the first HEADERS images.

    Raises BadInput.
    """
    records = iter(raw_records(source))
    head = list(itertools.islice(records, _PEEK))
    found = [record for _, _, record in head if isinstance(record, dict)]
    if head and not found:
        raise BadInput(f"{source}: {head[0][2]}")
    make = layout(source, found) if found else None  # None: there is no row at all
    records = itertools.chain(head, records)
    rules = replace(source.rules, folder=os.path.abspath(source.rules.image_root or _folder_of(source.name)))
    looked = 0
    for i, line, record in records:
        if isinstance(record, dict):
            try:
                made = make(record)
                if made.judge and not judge:
                    raise BadInput(
                        f"{source}: a benchmark file for judging; expected data with a gold for each question"
                    )
                record = build_row(made, rules, f"{source}: row {i}", look and looked < HEADERS)
                looked += len(record["images"])
            except RowError as error:
                record = BadRow(i, line, error.field, error.reason)
        yield i, line, record


def _folder_of(name: Any) -> str:
    if not isinstance(name, str):
        return "."
    return name if Path(name).is_dir() else str(Path(name).parent)


def raw_records(source: Source) -> Iterable[table.Found]:
    name = source.name
    if name == "digits":
        from data.digits import digit_rows

        return ((i, None, row) for i, row in enumerate(digit_rows("train", EMBEDDED_ROWS)))
    if name == "arithmetic":
        from data.arithmetic import arithmetic_rows

        return ((i, None, row) for i, row in enumerate(arithmetic_rows()))
    if not isinstance(name, str):
        if hasattr(name, "features"):
            return hub.of(name)
        return ((i, None, record) for i, record in enumerate(name))
    if Path(name).suffix in table.SUFFIXES and not Path(name).is_dir():
        return table.records(name)
    if Path(name).is_file():
        raise BadInput(f"{name}: expected one of {' '.join(table.SUFFIXES)}; a spreadsheet can be exported as CSV")
    return hub.records(name, source.config, source.split)


def layout(source: Source, head: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Record]:
    """What makes a Record of each record: the named columns where they are there, else a known layout.

    Raises BadInput, naming the columns there are.
    """
    columns = set().union(*head)
    names = {"prompt": source.prompt_column, "solution": source.solution_column, "image": source.image_column}
    missing = [what for what, name in names.items() if name is not None and name not in columns]
    images = source.image_column or next((name for name in IMAGES if name in columns), None)

    def named(raw: dict[str, Any]) -> Record:
        if any(raw.get(name) for name in multiple_choice.OPTIONS):  # a set may hold open questions as well
            return multiple_choice.record(raw, source.prompt_column, source.solution_column)
        return Record(raw.get(source.prompt_column), raw.get(source.solution_column))

    options = any(name in columns for name in multiple_choice.OPTIONS)
    known = next((module for module in _LAYOUTS if module.matches(columns, head)), None)
    if "prompt" not in missing and "solution" not in missing:
        known = None
    if "image" in missing or (missing and known is None):
        what = "image" if "image" in missing else missing[0]
        raise BadInput(
            f"{source}: no column {names[what]!r}; name the column of the {what} with --{what}_column, "
            f"one of: {', '.join(sorted(map(str, columns)))}"
        )
    record = known.record if known else named
    tasks = [name for name in TASKS if name in columns]
    budgets = bool({"min_pixels", "max_pixels"} & columns)
    kind = known.NAME if known else multiple_choice.NAME if options else "question"

    def make(raw: dict[str, Any]) -> Record:
        found = record(raw)
        if found.images is None and images:
            found.images = raw.get(images)
        found.task = found.task or next((raw[name] for name in tasks if raw.get(name)), kind)
        if budgets:
            found.min_pixels, found.max_pixels = _number(raw, "min_pixels"), _number(raw, "max_pixels")
        return found

    return make


def _number(raw: dict[str, Any], name: str) -> int | None:
    try:
        return pixels(raw.get(name), name)
    except BadImage as error:
        raise RowError(name, str(error)) from None
