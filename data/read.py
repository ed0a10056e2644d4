"""Data in the formats people have, all read into the same row (data/rows.py), for training, checking and evaluation.

    read_dataset("train.json", image_root="images")      Spark-Data: message (a JSON string), answer
    read_dataset("gsm8k.jsonl")                          known layouts (data/formats/), and columns by their names
    read_dataset("mine.csv", "task", "result")           any columns of JSON, JSONL, CSV, TSV, Parquet
    read_dataset("photos")                               a folder or a hub name
    read_dataset("digits")                               the embedded task (data/digits.py); `arithmetic` for text
    Reader(Source("test.json"), "answer")                the rows of a benchmark, as evaluate.py reads them

For training, rows are written to a temporary file as they are read and mapped from there, so that a million of them
take no memory; images are opened when a row is used. What is wrong with a row is known before any model is loaded; only
of more than CHECKED rows, the others are kept as they are, and made and checked when they are used (`Used`).
"""

import argparse
import atexit
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data import hub, table
from data.formats import columns, gsm8k, math_boxed, spark_data
from data.golds import extracted, gold
from data.images import BadImage, NotFetched, pixels
from data.options import KINDS, check_letter, common_kinds, options_of, right_label
from data.rows import BadInput, BadRow, Options, Record, RowError, Rules, build_row, question_of, unicode_text
from prompts import PROMPT_SUFFIX

EMBEDDED_ROWS = 8000
CHECKED = 50_000  # rows made and checked before training: seconds. A million would take a minute
HEADERS = 20_000  # images whose header is read before training; of the rest, only that the file is there
DRAWS = 100  # rows tried in place of one that can't be used
_PEEK = 100  # records whose columns decide the layout
_FORMATS = (spark_data, gsm8k, math_boxed)

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
    own_columns: bool = False
    answer_kind: str | None = None

    def __str__(self):
        return self.name if isinstance(self.name, str) else "rows"

    def row(self, number: int) -> str:
        """What a row of it is called."""
        return f"{self}: row {number}"

    @property
    def benchmark(self) -> str:
        """What its rows are of, where they do not say so."""
        return Path(self.name).stem if isinstance(self.name, str) else "unnamed"


def add_source_flags(parser: argparse.ArgumentParser, split: str = "train") -> None:
    """The flags that say how data are read, as train_spark.py has them."""
    parser.add_argument("--prompt_column", default="prompt", help="the question: text or messages")
    parser.add_argument("--solution_column", default="solution", help="the gold answer")
    parser.add_argument("--image_column", help="the image or images")
    parser.add_argument("--answer_kind", choices=KINDS, help="what the answer to a question with options is")
    parser.add_argument("--image_root", help="folder that image paths are relative to, and may not leave")
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--dataset_split", default=split, help=f"of a hub dataset or a folder ({split})")
    parser.add_argument("--allow_remote_images", action="store_true", help="fetch http(s) images")
    parser.add_argument("--min_pixels", type=int, help="smaller images are enlarged to so many pixels")
    parser.add_argument("--max_pixels", type=int, help="larger images are reduced to so many pixels")


def source_of(name: str, args: argparse.Namespace, **changes: Any) -> Source:
    """The source that `add_source_flags` describe."""
    rules = Rules(PROMPT_SUFFIX, ".", args.image_root, args.allow_remote_images, args.min_pixels, args.max_pixels)
    names = (args.prompt_column, args.solution_column, args.image_column)
    found = Source(name, *names, args.dataset_config, args.dataset_split, rules, answer_kind=args.answer_kind)
    return replace(found, **changes)


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
    own_columns: bool = False,
    answer_kind: str | None = None,
    fits: Callable[[Row], str | None] | None = None,
    bad_rows: list[BadRow] | None = None,
    checked: float = CHECKED,
):
    """Read `source` into a datasets.Dataset of the row of data/rows.py; a set without any image has no column for them.

    Without `bad_rows`, the first row that can't be used is an error, here or when it is used. With it, those found here
    are left out; for one found when it is used, an image that breaks included, another row stands in. A column alone is
    one of used rows, with their images opened: `with_format(None)` has it as it is stored.

    Args:
        source: a file, a folder, a hub name, `digits`, a datasets.Dataset, or an iterable of dicts.
        image_root: what image paths are relative to (default: the data file's folder), and may not leave.
        suffix: put at the end of each question, once.
        allow_remote_images: take http(s) images, fetched when used.
        min_pixels, max_pixels: bounds for each image's pixels; a row's own narrower ones win.
        image_factor: pixels a side of a visual token (data/images.py), for the Qwen-VL family.
        config, split: of a hub dataset or a folder.
        own_columns: the names are those of other data, which this stands beside; where they are not there, and the
            layout is known, that is no error.
        answer_kind: what the answer to a question with options is (data/options.py: KINDS), where that is not clear.
        fits: says why a row is not to be used (a prompt that is too long), or None.
        bad_rows: if given, rows that are left out are appended to it.
        checked: with `bad_rows`, rows that are made here; the others are when they are used.

    Raises BadInput.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Json, List, Value

    from data.row_image import RowImage

    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    rules = Rules(suffix, ".", image_root, allow_remote_images, min_pixels, max_pixels)
    names = (prompt_column, solution_column, image_column)
    where = Source(source, *names, config, split, rules, own_columns, answer_kind)
    image = RowImage(factor=image_factor, allow_remote=allow_remote_images)
    features = Features(
        {
            "prompt": Json(),
            "images": List(image),
            "solution": Value("string"),
            "task": Value("string"),
            "source": Value("string"),
        }
    )
    encode = json.JSONEncoder(ensure_ascii=False).encode
    reader = Reader(where, checked=math.inf if bad_rows is None else checked)
    counts = Counter()

    def kept(i: int, line: int | None, found: Row | BadRow | str) -> Row | None:
        if isinstance(found, str):  # without a prompt: the record, as text, is where the solution will be
            counts["later"] += 1
            return {"solution": found, "source": where.row(i)}
        if not isinstance(found, BadRow) and fits is not None and (reason := fits(found)):
            found = BadRow(i, line, "prompt", reason)
        if isinstance(found, BadRow):
            if bad_rows is None:
                raise BadInput(f"{where}: {found}")
            bad_rows.append(found)
            return None
        counts["rows"] += 1
        counts["images"] += len(found["images"])
        return {**found, "prompt": encode(found["prompt"])}

    folder = tempfile.mkdtemp(prefix="spark-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "rows.arrow")
    schema = features.arrow_schema
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        stream = iter(reader)
        while batch := list(itertools.islice(stream, 512)):
            used = [row for found in batch if (row := kept(*found)) is not None]
            writer.write_batch(pa.RecordBatch.from_pylist(used, schema=schema))
    if not counts["rows"]:
        raise BadInput(f"{where}: expected at least one usable row, found none{f'; {bad_rows[0]}' if bad_rows else ''}")
    dataset = Dataset.from_file(path)
    if not counts["images"]:
        dataset = dataset.remove_columns("images")
    if not counts["images"] and not counts["later"]:
        return dataset
    return dataset.with_transform(Used(dataset, reader, fits, image, strict=bad_rows is None))


class Used:
    """Makes rows what they are when they are used: the transform of a dataset.

    A record that was kept for later becomes its row. For a row that can't be used another one stands in, drawn by the
    row's name from the whole source: on every process the same, since all of them must see a question alike. Each is
    reported on stderr, once. With `strict` it is a BadInput instead, and so is, always, an image that can't be fetched:
    that may pass on one process and not on another.
    """

    def __init__(self, dataset, reader: "Reader", fits: Callable[[Row], str | None] | None, image, strict: bool):
        self.dataset, self.reader, self.fits, self.image, self.strict = dataset, reader, fits, image, strict
        self.unusable: set[str] = set()

    def __deepcopy__(self, memo):
        return self  # datasets copies what it holds, for every column that is taken out

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rows = [self._usable(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in batch}

    def _usable(self, row: Row) -> Row:
        drawn, candidate = random.Random(row["source"]), row
        for _ in range(DRAWS):
            try:
                return {**row, **self._made(candidate)}
            except RowError as error:
                self._report(candidate["source"], error)
            candidate = self.dataset[drawn.randrange(len(self.dataset))]
        raise BadInput(f"{row['source']}: expected it, or one of {DRAWS} rows drawn instead, to be usable")

    def _made(self, row: Row) -> Row:
        later, refs = row["prompt"] is None, []
        if later:
            row = self.reader.build(table.decode(row["solution"]), row["source"], look=False)
            refs = row["images"]
            if refs and "images" not in self.dataset.column_names:
                raise RowError("images", f"expected none, as in the first {self.reader.checked:,} rows")
            row = {**row, "images": [self.image.decode_example(ref) for ref in refs]}
        for image in row.get("images", ()):
            if isinstance(image, NotFetched):
                raise BadInput(f"{row['source']}: field image: {image}")
            if isinstance(image, BadImage):
                raise RowError("image", str(image))
        if later and self.fits is not None:
            sized = [{**ref, "width": i.width, "height": i.height} for ref, i in zip(refs, row["images"], strict=True)]
            if reason := self.fits({**row, "images": sized}):
                raise RowError("prompt", reason)
        return row

    def _report(self, source: str, error: RowError) -> None:
        from tqdm.auto import tqdm

        line = f"{source}: field {error.field}: {error.reason}"
        if self.strict:
            raise BadInput(line) from None
        if source not in self.unusable:
            self.unusable.add(source)
            tqdm.write(f"{line}; another row stands in for it ({len(self.unusable):,} so far)", file=sys.stderr)


def report(source: str, rows: int, bad_rows: list[BadRow] | None) -> str:
    """What training says before it starts: how many rows it uses, and why others were left out."""
    lines = [f"{rows:,} rows used of {source}"]
    if bad_rows is not None and rows + len(bad_rows) > CHECKED:
        lines[0] += (
            f"; the first {CHECKED:,} are checked, the others at the latest when they are used (all before, with "
            "--strict or by python -m data.check)"
        )
    return "\n".join(lines + ([summary(bad_rows)] if bad_rows else []))


def summary(bad_rows: list[BadRow], examples: int = 3) -> str:
    """Why rows were left out, counted, with the first few of them."""
    counts = Counter(bad.field for bad in bad_rows)
    reasons = ", ".join(f"{n:,} by {name}" for name, n in counts.most_common())
    shown = "; ".join(str(bad) for bad in bad_rows[:examples])
    return f"{len(bad_rows):,} rows left out ({reasons}): {shown}{'; ...' if len(bad_rows) > examples else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Records to rows


class Reader:
    """(row, line, the row or what is wrong with it) of everything in `source`, in order; nothing is left out.

    Args:
        use: what the rows are for.
            train     a gold for each
            answer    a gold for each, or a list of them; the rows also have `dataset`, `problem` and `image_path`
            judge     chosen and rejected, or response and label, and these three
            check     any of these
        look: read the headers of the first HEADERS images.
        checked: records after so many come as their JSON text, to be built later; those that JSON can't hold (embedded
            images, for one) don't.

    Raises BadInput.
    """

    def __init__(self, source: Source, use: str = "train", look: bool = True, checked: float = math.inf):
        self.source, self.use, self.look, self.checked = source, use, look, checked
        rules = source.rules
        for name in ("min_pixels", "max_pixels"):
            try:
                pixels(getattr(rules, name), name)
            except BadImage as error:
                raise BadInput(f"{name}: {error}") from None
        if rules.image_root is not None and not os.path.isdir(rules.image_root):
            raise BadInput(f"image_root: expected a folder, got {rules.image_root}")
        self.rules = replace(rules, folder=os.path.abspath(rules.image_root or folder_of(source.name)))
        records = iter(raw_records(source, max(checked, _PEEK)))
        head = list(itertools.islice(records, _PEEK))
        found = [record for _, _, record in head if isinstance(record, dict)]
        if head and not found:
            raise BadInput(f"{source}: {head[0][2]}")
        self.columns: dict[str, None] = {}  # in order, of the rows read so far
        self.layout = Layout(source, found, use) if found else None  # None: there is no row at all
        self.decimal_comma = table.delimiter(source.name) == ";"  # as spreadsheets write where 3,5 is a number
        self.records = itertools.chain(head, records)

    def __iter__(self) -> Iterator[tuple[int, int | None, Row | BadRow | str]]:
        looked = 0
        for i, line, record in self.records:
            if isinstance(record, dict):
                self.columns |= dict.fromkeys(record)
                record = (_as_json(record) if i >= self.checked else None) or record
            if isinstance(record, dict):
                try:
                    record = self.build(record, self.source.row(i), self.look and looked < HEADERS)
                    looked += len(record["images"])
                except RowError as error:
                    record = BadRow(i, line, error.field, error.reason)
            yield i, line, record

    def build(self, record: dict[str, Any], source: str, look: bool = True) -> Row:
        """The row of a record. Raises RowError, which names the record's own column."""
        try:
            return self._build(record, source, look)
        except RowError as error:
            raise RowError(self.layout.column_of(error.field, record), error.reason) from None

    def _build(self, raw: dict[str, Any], source: str, look: bool) -> Row:
        record = self.layout.record(raw)
        judged: dict[str, Any] = {}
        without_gold = record.solution is None and record.judged is not None
        if self.use == "judge" or (self.use == "check" and without_gold):
            judged, record.solution = columns.for_judge(record.judged or {})
        elif without_gold:
            raise RowError("solution", "expected a gold answer, got a row for judging")
        elif record.options:
            record.solution = self.layout.right_option(record)
        elif isinstance(record.solution, list) and len(record.solution) > 1 and self._several_golds(raw):
            record.solution = [gold(value, self.decimal_comma) for value in record.solution]
        else:
            record.solution = gold(record.solution, self.decimal_comma)
            check_letter(record.solution, raw, record.prompt)
        row = build_row(record, self.rules, source, look)
        if self.use in ("answer", "judge"):
            row |= {"dataset": self._benchmark(raw), "problem": question_of(row["prompt"], self.rules.suffix), **judged}
            row["image_path"] = _path_of(record.images)
        return row

    def _several_golds(self, raw: dict[str, Any]) -> bool:
        """Whether any of several golds will do, as in a benchmark; training knows one."""
        return self.use == "answer" or (self.use == "check" and "dataset" in raw)

    def _benchmark(self, raw: dict[str, Any]) -> str:
        if "dataset" not in self.layout.columns:
            return self.source.benchmark
        name = raw.get("dataset")
        if not isinstance(name, str) or not name.strip():
            raise RowError("dataset", f"expected the benchmark's name, got {'nothing' if name is None else repr(name)}")
        return unicode_text(name, "dataset")


def _path_of(images: Any) -> str | list[str] | None:
    """Where the images of a record come from, as far as it says so."""
    if isinstance(images, (list, tuple)):
        paths = [_path_of(image) for image in images]
        return None if None in paths or not paths else paths[0] if len(paths) == 1 else paths
    if isinstance(images, dict):
        images = images.get("path")
    path = os.fspath(images) if isinstance(images, (str, os.PathLike)) else None
    return path if path and len(path) < 1000 and not path.startswith("data:") else None


def _as_json(record: dict[str, Any]) -> str | None:
    try:
        return json.dumps(record)
    except (TypeError, ValueError, RecursionError):
        return None


def folder_of(name: Any) -> str:
    """What the relative paths in a source are relative to."""
    if not isinstance(name, str):
        return "."
    return name if Path(name).is_dir() else str(Path(name).parent)


def raw_records(source: Source, decoded: float = math.inf) -> Iterable[table.Found]:
    """The records as they are; see `table.records` for `decoded`."""
    name = source.name
    if name == "digits":
        from data.digits import digit_rows

        split = "test" if source.split == "test" else "train"
        return ((i, None, row) for i, row in enumerate(digit_rows(split, EMBEDDED_ROWS)))
    if name == "arithmetic":
        from data.arithmetic import arithmetic_rows

        return ((i, None, row) for i, row in enumerate(arithmetic_rows()))
    if not isinstance(name, str):
        from datasets import Dataset, IterableDataset

        if isinstance(name, (Dataset, IterableDataset)):
            return hub.of(name)
        return ((i, None, record) for i, record in enumerate(name))
    if not name.strip():
        raise BadInput("data: expected a file, a folder or a hub name, got nothing")
    if Path(name).suffix.lower() in table.SUFFIXES and not Path(name).is_dir():
        return table.records(name, decoded)
    if Path(name).is_file():
        raise BadInput(f"{name}: expected one of {' '.join(table.SUFFIXES)}; a spreadsheet can be exported as CSV")
    return hub.records(name, source.config, source.split)


class Layout:
    """What makes a Record of each record: a known format, or the columns by their names.

    Raises BadInput, naming the columns there are: for a name that was given and is not there, or where nothing says
    which column holds the question or its answer.
    """

    def __init__(self, source: Source, head: list[dict[str, Any]], use: str):
        self.source = source
        self.columns = set().union(*head)
        names = {"prompt": source.prompt_column, "solution": source.solution_column, "image": source.image_column}
        missing = [what for what, name in names.items() if name is not None and name not in self.columns]
        given = [what for what in missing if what == "image" or names[what] != what]  # other than the default
        if given and not source.own_columns:
            raise self._unknown(given[0], names[given[0]])
        self.image_column = None if "image" in missing else source.image_column
        self.format = self.question = None
        if {"prompt", "solution"} & set(missing):
            self.format = next((module for module in _FORMATS if module.matches(self.columns, head)), None)
        if self.format:
            self.question, self.answer = self.format.COLUMNS
        else:
            self.question = self._column("prompt", source.prompt_column, columns.QUESTIONS, needed=True)
            answers = columns.ANSWERS if "response" in self.columns else (*columns.ANSWERS, "label")
            needed = use != "judge" and not any(map(columns.judged_fields, head))
            self.answer = self._column("solution", source.solution_column, answers, needed)
        self.common = common_kinds(self._with_options(head))

    def _column(self, what: str, name: str, usual: tuple[str, ...], needed: bool) -> str | None:
        documented = name != what or self.question == "prompt"  # else `solution` beside an `answer` is how to get there
        found = name if name in self.columns and documented else columns.usual(usual, self.columns)
        if found is None and needed:
            raise self._unknown(what, name)
        return found

    def _unknown(self, what: str, name: str) -> BadInput:
        flags = {"prompt": "the question", "solution": "the answer", "image": "images"}
        others = ", ".join(f"{words} with --{flag}_column" for flag, words in flags.items() if flag != what)
        return BadInput(
            f"{self.source}: no column {name!r} for {flags[what]}; name it with --{what}_column ({others}), one of: "
            f"{', '.join(sorted(map(str, self.columns)))}"
        )

    def _with_options(self, head: list[dict[str, Any]]) -> Iterator[tuple[str, Options]]:
        for raw in head:
            try:
                record = self.record(raw)
                answer, _ = extracted(record.solution)
            except RowError:  # it will be named when it is read
                continue
            if record.options:
                yield answer, record.options

    def record(self, raw: dict[str, Any]) -> Record:
        """Raises RowError. A column may be there in some rows only, and not in the first ones."""
        record = self.format.record(raw) if self.format else Record(raw.get(self.question), raw.get(self.answer))
        record.options = options_of(raw, record.solution if isinstance(record.solution, str) else "")
        record.judged = record.judged or columns.judged_fields(raw)
        if record.images is None:
            plain = isinstance(record.prompt, str) and not record.prompt.startswith("[{")
            record.images = raw.get(self.image_column) if self.image_column else columns.image_of(raw, plain)[1]
        kind = self.format.NAME if self.format else "multiple_choice" if record.options else "question"
        record.task = record.task or next((raw[name] for name in columns.TASKS if raw.get(name)), kind)
        record.min_pixels, record.max_pixels = _number(raw, "min_pixels"), _number(raw, "max_pixels")
        return record

    def right_option(self, record: Record) -> str:
        """The letter of the right option. Raises RowError."""
        answer, _ = extracted(record.solution)
        return right_label(answer, record.options, self.source.answer_kind, self.common)

    @property
    def counted_from(self) -> int | None:
        """What the answers to questions with options count from, if they are numbers."""
        kinds = {self.source.answer_kind} if self.source.answer_kind else set(self.common)
        return {"from_0": 0, "from_1": 1}[kinds.pop()] if kinds in ({"from_0"}, {"from_1"}) else None

    def column_of(self, field: str, raw: dict[str, Any]) -> str:
        """What the data call a field of the row."""
        if field in ("image", "images"):
            return self.image_column or columns.image_of(raw, strict=False)[0] or field
        return {"prompt": self.question, "solution": self.answer, "answer": self.answer}.get(field) or field


def _number(raw: dict[str, Any], name: str) -> int | None:
    try:
        return pixels(raw.get(name), name)
    except BadImage as error:
        raise RowError(name, str(error)) from None
