"""Data in the formats people have, all read into the same row (data/rows.py), for training, checking and evaluation.

    read_dataset("gsm8k.jsonl")              known layouts (data/formats/), and columns by their usual names
    read_dataset("mine.csv", DataSettings(prompt_column="task", solution_column="result"))
                                             any columns of JSON, JSONL, CSV, TSV, Parquet
    read_dataset("train.json", DataSettings(image_root="images"))
                                             Spark-Data: message (a JSON string), answer
    read_dataset("photos")                   a folder or a hub name
    read_dataset("digits")                   the embedded task (data/digits.py); `arithmetic` for text
    Reader(Source("test.json"), "answer")    the rows of a benchmark, as evaluate.py reads them

For training, rows are written to a temporary file as they are read and mapped from there, so that a million of them
take no memory; images are opened when a row is used. What is wrong with a row is known before any model is loaded; only
rows beyond the first CHECKED are kept as they are, and made and checked when they are used (`UsedRows`).
"""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import hub, table
from data.arguments import DataSettings
from data.formats import FORMATS, GOLD_ALONE, JUDGED, columns, vlmevalkit
from data.golds import extracted, gold, kept, refuse_another_gold, several
from data.images import BadImage, NotFetched, is_embedded, pixels
from data.options import (
    check_letter,
    common_kinds,
    gold_of,
    letter_of,
    listed_in,
    options_of,
    right_label,
    with_letters,
)
from data.rows import (
    BadInput,
    BadRow,
    Record,
    RowError,
    Source,
    build_row,
    image_list,
    may_be_messages,
    question_of,
    shows_images,
    unicode_text,
)
from prompts import PROMPT_SUFFIX

EMBEDDED_ROWS = 8000
CHECKED = 50_000  # rows made and checked before training: seconds. A million would take a minute
HEADERS = 20_000  # images whose header is read before training; of the rest, only that the file is there
DRAWS = 100  # rows tried in place of one that can't be used
_PEEK = 100  # records whose columns decide the layout

Row = dict[str, Any]


def read_dataset(
    source: Any,
    settings: DataSettings | None = None,
    *,
    suffix: str = PROMPT_SUFFIX,
    image_factor: int | None = None,
    columns_optional: bool = False,
    reject: Callable[[Row], str | None] | None = None,
    bad_rows: list[BadRow] | None = None,
    checked: float = CHECKED,
):
    """Read `source` into a datasets.Dataset of the row of data/rows.py; a set without any image has no column for them.

    Without `bad_rows`, the first row that can't be used is an error, here or when it is used. With it, those found here
    are left out; for one found when it is used, an image that breaks included, another row stands in. A column alone is
    one of used rows, with their images opened: `with_format(None)` has it as it is stored.

    Args:
        source, suffix, columns_optional: see data.rows.Source.
        settings: names of columns, image root, pixel budget, ... (default: all of them as they are).
        image_factor: pixels a side of a visual token (data/images.py), for the Qwen-VL family.
        reject: a function of a row: why it is not to be used (a prompt that is too long), or None.
        bad_rows: if given, rows that are left out are appended to it.
        checked: with `bad_rows`, rows that are made here; the others are when they are used.

    Raises BadInput.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Json, List, Value

    from data.row_image import RowImage

    settings = settings or DataSettings()
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    source = Source(name, settings, suffix, columns_optional)
    image = RowImage(factor=image_factor, allow_remote=settings.allow_remote_images)
    text = dict.fromkeys(("solution", "task", "source"), Value("string"))
    features = Features({"prompt": Json(), "images": List(image), **text})
    encode = json.JSONEncoder(ensure_ascii=False).encode
    reader = Reader(source, checked=math.inf if bad_rows is None else checked)
    counts = Counter()

    def stored(i: int, line: int | None, row: Row | BadRow | str) -> Row | None:
        if isinstance(row, str):  # to be made later: its record, as text, is where the solution will be
            counts["later"] += 1
            return {"solution": row, "source": source.row(i)}
        if not isinstance(row, BadRow) and reject is not None and (reason := reject(row)):
            row = BadRow(i, line, "prompt", reason)
        if isinstance(row, BadRow):
            if bad_rows is None:
                raise BadInput(f"{source}: {row}")
            bad_rows.append(row)
            return None
        counts["rows"] += 1
        counts["images"] += len(row["images"])
        return {**row, "prompt": encode(row["prompt"])}

    folder = tempfile.mkdtemp(prefix="spark-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "rows.arrow")
    schema = features.arrow_schema
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in table.batched(reader, 512):
            rows = [row for entry in batch if (row := stored(*entry)) is not None]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    if not counts["rows"]:
        first = f"; {bad_rows[0]}" if bad_rows else ""
        raise BadInput(f"{source}: expected at least one usable row, found none{first}")
    dataset = Dataset.from_file(path)
    if not counts["images"]:
        dataset = dataset.remove_columns("images")
    if not counts["images"] and not counts["later"]:
        return dataset
    return dataset.with_transform(UsedRows(dataset, reader, reject, image, strict=bad_rows is None))


class UsedRows:
    """The transform of a dataset: makes, checks and replaces rows at the moment they are used.

    A record that was stored as text becomes its row. For a row that can't be used another one stands in, drawn by the
    row's name from the whole source: on every process the same, since all of them must see a question alike. Each is
    reported on stderr, once. With `strict` it is a BadInput instead, and so is, always, an image that can't be fetched:
    that may pass on one process and not on another.
    """

    def __init__(self, dataset, reader: "Reader", reject: Callable[[Row], str | None] | None, image, strict: bool):
        self.dataset, self.reader, self.reject, self.image, self.strict = dataset, reader, reject, image, strict
        self.unusable: set[str] = set()

    def __deepcopy__(self, memo):
        return self  # datasets copies what it holds, for every column that is taken out

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rows = [self._usable(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in batch}

    def _usable(self, row: Row) -> Row:
        rng, candidate = random.Random(row["source"]), row
        for _ in range(DRAWS):
            try:
                return {**row, **self._made(candidate)}
            except RowError as error:
                self._warn(candidate["source"], error)
            candidate = self.dataset[rng.randrange(len(self.dataset))]
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
        if later and self.reject is not None:
            sized = [{**ref, "width": i.width, "height": i.height} for ref, i in zip(refs, row["images"], strict=True)]
            if reason := self.reject({**row, "images": sized}):
                raise RowError("prompt", reason)
        return row

    def _warn(self, source: str, error: RowError) -> None:
        from tqdm.auto import tqdm

        line = f"{source}: field {error.field}: {error.reason}"
        if self.strict:
            raise BadInput(line) from None
        if source not in self.unusable:
            self.unusable.add(source)
            tqdm.write(f"{line}; another row stands in for it ({len(self.unusable):,} so far)", file=sys.stderr)


def reading_summary(source: str, rows: int, bad_rows: list[BadRow] | None) -> str:
    """How many rows are used, and why others were left out."""
    lines = [f"{rows:,} rows used of {source}"]
    if bad_rows is not None and rows + len(bad_rows) > CHECKED:
        lines[0] += (
            f"; the first {CHECKED:,} are checked, the others at the latest when they are used (all before, with "
            "--strict or by python -m data.check)"
        )
    return "\n".join(lines + ([bad_rows_summary(bad_rows)] if bad_rows else []))


def bad_rows_summary(bad_rows: list[BadRow], examples: int = 3) -> str:
    """Why rows were left out, counted, with the first few of them."""
    counts = Counter(bad.field for bad in bad_rows)
    reasons = ", ".join(f"{n:,} by {name}" for name, n in counts.most_common())
    first = "; ".join(str(bad) for bad in bad_rows[:examples])
    return f"{len(bad_rows):,} rows left out ({reasons}): {first}{'; ...' if len(bad_rows) > examples else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Records to rows


class Reader:
    """(row, line, the row or what is wrong with it) of everything in `source`, in order; nothing is left out.

    Args:
        use: what the rows are for.
            train     a gold for each
            answer    a gold for each, or a list of them; the rows also have `dataset`, `problem`, `image_path`,
                      `categories` and, where several rows are one question, `group`
            judge     chosen and rejected, or response and label, and these
            check     any of these
        look: read the headers of the first HEADERS images.
        checked: records after so many come as their JSON text, to be built later; those that JSON can't hold (embedded
            images, for one) don't.

    Raises BadInput.
    """

    def __init__(self, source: Source, use: str = "train", look: bool = True, checked: float = math.inf):
        self.source, self.use, self.look, self.checked = source, use, look, checked
        settings = source.settings
        for name in ("min_pixels", "max_pixels"):
            try:
                pixels(getattr(settings, name), name)
            except BadImage as error:
                raise BadInput(f"{name}: {error}") from None
        if settings.image_root is not None and not os.path.isdir(settings.image_root):
            raise BadInput(f"image_root: expected a folder, got {settings.image_root}")
        records = iter(raw_records(source, max(checked, _PEEK)))
        head = list(itertools.islice(records, _PEEK))
        first = [record for _, _, record in head if isinstance(record, dict)]
        if head and not first:
            raise BadInput(f"{source}: {head[0][2]}")
        self.columns: dict[str, None] = {}  # in order, of the rows read so far
        self.layout = Layout(source, first, use) if first else None  # None: there is no row at all
        files = [source.name]
        if isinstance(source.name, str) and Path(source.name).is_dir():
            files = hub.text_files(source.name, settings.dataset_config, settings.dataset_split)
        self.decimal_comma = ";" in map(table.delimiter, files)  # as spreadsheets write where 3,5 is a number
        self.records = itertools.chain(head, records)

    def __iter__(self) -> Iterator[tuple[int, int | None, Row | BadRow | str]]:
        looked = 0
        for i, line, record in self.records:
            if isinstance(record, dict):
                self.columns |= dict.fromkeys(record)
                record = _as_json(record) if i >= self.checked else record
            if isinstance(record, dict):
                try:
                    record = self.build(record, self.source.row(i), self.look and looked < HEADERS)
                    looked += len(record["images"])
                except RowError as error:
                    record = BadRow(i, line, error.field, error.reason)
            yield i, line, record

    def build(self, raw: dict[str, Any], name: str, look: bool = True) -> Row:
        """The row of a record. Raises RowError, which names the column as the data call it."""
        try:
            return self._build(raw, name, look)
        except RowError as error:
            raise RowError(self.layout.column_of(error.field, raw), error.reason) from None

    def _build(self, raw: dict[str, Any], name: str, look: bool) -> Row:
        record = self.layout.record(raw)
        judged: dict[str, Any] = {}
        without_gold = record.solution is None and record.judged is not None
        # Any of several golds will do in a benchmark; training knows one.
        several_golds = self.use == "answer" or (self.use == "check" and "dataset" in raw)
        if self.use == "judge" or (self.use == "check" and without_gold):
            judged, record.solution = columns.for_judge(record.judged or {})
        elif without_gold:
            for_judge = any(record.judged.get(name) is not None for name in ("chosen", "label"))
            got = "a row for judging" if for_judge else "a response without one; --solution_column says where it is"
            raise RowError("solution", f"expected a gold answer, got {got}")
        elif self.source.settings.keep_solution:
            record.solution = kept(record.solution)
        elif record.options:
            kind, common = self.source.settings.answer_kind, self.layout.common
            answers = [extracted(answer) for answer in several(record.solution) or [record.solution]]
            labels = {right_label(answer, record.options, record.letter, kind, common) for answer in answers}
            record.options, right = with_letters(record.options, ", ".join(sorted(labels)))
            record.solution = gold_of(right, record.options)
        elif letters := _letters_listed(record):
            record.solution = letters
        elif several_golds and (golds := several(record.solution)):
            record.solution = [gold(value, self.decimal_comma) for value in golds]
        else:
            record.solution = gold(record.solution, self.decimal_comma)
            check_letter(record.solution, raw, record.prompt)
        row = build_row(record, self.source, name, look)
        letter = letter_of(row["solution"]) if isinstance(row["solution"], str) else None
        if letter and not self.source.settings.keep_solution:
            listed = listed_in(question_of(row["prompt"], self.source.suffix))
            if listed and letter in listed.texts:
                row["solution"] = gold_of(letter, listed)
        if self.use in ("answer", "judge"):
            row |= {
                "dataset": self._benchmark(raw),
                "problem": question_of(row["prompt"], self.source.suffix),
                **judged,
                "image_path": _path_of(record.images),
                "categories": columns.categories(raw),
                "group": columns.group_of(raw, rotated=bool(record.options)),
            }
        return row

    def _benchmark(self, raw: dict[str, Any]) -> str:
        if "dataset" not in self.layout.columns:
            return self.source.benchmark
        name = raw.get("dataset")
        if not isinstance(name, str) or not name.strip():
            raise RowError("dataset", f"expected the benchmark's name, got {'nothing' if name is None else repr(name)}")
        return unicode_text(name, "dataset")


def _letters_listed(record: Record) -> str | None:
    """The labels of a list of answers that are all options of the question's own list: all of them are the answer, and
    none is another way to say it."""
    listed = listed_in(record.prompt) if isinstance(record.prompt, str) else None
    letters = [letter_of(answer) if isinstance(answer, str) else None for answer in several(record.solution) or []]
    return ", ".join(sorted(set(letters))) if listed and letters and set(letters) <= listed.texts.keys() else None


def _path_of(images: Any) -> str | list[str] | None:
    """Where the images of a record come from, as far as it says so."""
    if isinstance(images, (list, tuple)):
        paths = [_path_of(image) for image in images]
        return None if None in paths or not paths else paths[0] if len(paths) == 1 else paths
    if isinstance(images, dict):
        images = images.get("path")
    path = os.fspath(images) if isinstance(images, (str, os.PathLike)) else None
    return path if path and len(path) < 1000 and not is_embedded(path) else None


def _as_json(record: dict[str, Any]) -> str | dict[str, Any]:
    """The record as text, if JSON can hold it."""
    try:
        return json.dumps(record)
    except (TypeError, ValueError, RecursionError):
        return record


def raw_records(source: Source, decode_first: float = math.inf) -> Iterable[table.Entry]:
    """The records as they are; see `table.records` for `decode_first`."""
    name, settings = source.name, source.settings
    suffix = Path(name).suffix.lower() if isinstance(name, str) and not Path(name).is_dir() else ""
    if suffix in (".csv", ".tsv"):
        return vlmevalkit.with_images(lambda: table.records(name))
    if suffix in table.SUFFIXES:
        return table.records(name, decode_first)
    if name in ("digits", "arithmetic") and settings.dataset_split not in ("train", "test"):
        raise BadInput(f"{name}: no split {settings.dataset_split!r}; expected train or test")
    if name == "digits":
        from data.digits import digit_rows

        found = digit_rows(settings.dataset_split, EMBEDDED_ROWS, suffix="")
    elif name == "arithmetic":
        from data.arithmetic import arithmetic_rows

        found = arithmetic_rows(settings.dataset_split)
    elif not isinstance(name, str):
        found = hub.as_stored(name)
    elif not name.strip():
        raise BadInput("data: expected a file, a folder or a hub name, got nothing")
    elif Path(name).is_file():
        raise BadInput(f"{name}: expected one of {' '.join(table.SUFFIXES)}; a spreadsheet can be exported as CSV")
    else:
        found = hub.records(name, settings.dataset_config, settings.dataset_split)
    return (
        (i, None, replace(record, row=i) if isinstance(record, BadRow) else record) for i, record in enumerate(found)
    )


class Layout:
    """What makes a Record of each record: a known format, or the columns by their names.

    Raises BadInput, naming the columns there are: for a name that was given and is not there, or where nothing says
    which column holds the question or its answer.
    """

    def __init__(self, source: Source, head: list[dict[str, Any]], use: str):
        self.source, settings = source, source.settings
        self.columns = set().union(*head)
        if {"ground_truth", "extracted_answer"} <= self.columns:
            raise BadInput(f"{source}: expected questions, got results of evaluate.py")
        names = {"prompt": settings.prompt_column, "solution": settings.solution_column, "image": settings.image_column}
        missing = [what for what, name in names.items() if name is not None and name not in self.columns]
        named = [what for what in missing if what == "image" or names[what] != what]  # other than the default
        if named and not source.columns_optional:
            raise self._unknown(named[0], names[named[0]])
        self.image_column = None if "image" in missing else settings.image_column
        self.format = self.question = None
        given = {what: names[what] for what in ("prompt", "solution") if what not in missing and names[what] != what}

        self.chosen = bool(given)  # somebody has looked at the columns

        def replaced(module) -> bool:
            """Whether a known format's gold is not what is wanted."""
            return settings.keep_solution or given.get("solution", module.COLUMNS[1]) != module.COLUMNS[1]

        if {"prompt", "solution"} & set(missing):
            matching = [m for m in FORMATS if m.matches(self.columns, head) and not (m in GOLD_ALONE and replaced(m))]
            self.format = next(iter(matching), None)
            judged = [module.NAME for module in matching if module in JUDGED]
            if judged and set(columns.PAIR) <= self.columns:
                judged.append("chosen and rejected")
            if len(judged) > 1:
                raise BadInput(f"{source}: expected one layout, got the columns of {' and of '.join(judged)}")
        self.overridden: dict[str, str] = {}  # field of a known format -> the column that was named for it instead
        if self.format:
            self.question, self.answer = self.format.COLUMNS
            self.overridden = {what: name for what, name in given.items() if name not in self.format.COLUMNS}
            self.question = self.overridden.get("prompt", self.question)
            self.answer = self.overridden.get("solution", self.answer)
        else:
            mathvista = {"query", "precision", "unit"} <= self.columns  # `query` also says how to write the answer
            questions = ("query",) if mathvista else columns.QUESTIONS
            self.question = self._column("prompt", settings.prompt_column, questions, needed=True)
            answers = columns.ANSWERS if "response" in self.columns else (*columns.ANSWERS, "label")
            needed = use != "judge" and not any(map(columns.judged_fields, head))
            self.answer = self._column("solution", settings.solution_column, answers, needed)
        self.common = common_kinds(self._with_options(head))

    def _column(self, what: str, name: str, usual: tuple[str, ...], needed: bool) -> str | None:
        documented = name != what or self.question == "prompt"  # else `solution` beside an `answer` is how to get there
        column = name if name in self.columns and documented else columns.usual(usual, self.columns)
        if column is None and needed:
            raise self._unknown(what, name)
        return column

    def _unknown(self, what: str, name: str) -> BadInput:
        flags = {"prompt": "the question", "solution": "the answer", "image": "images"}
        others = ", ".join(f"{words} with --{flag}_column" for flag, words in flags.items() if flag != what)
        there = ", ".join(sorted(map(str, self.columns)))
        return BadInput(
            f"{self.source}: no column {name!r} for {flags[what]}; name it with --{what}_column ({others}), one of: "
            f"{there[:500]}{' ...' * (len(there) > 500)}"
        )

    def _with_options(self, head: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
        for raw in head:
            try:
                record = self.record(raw)
                answer = extracted(record.solution)
            except RowError:  # it will be named when it is read
                continue
            if record.options:
                yield answer, record.options

    def record(self, raw: dict[str, Any]) -> Record:
        """Raises RowError."""
        try:
            return self._record(raw)
        except RecursionError:  # where json could just read it
            raise RowError("row", "expected values that are not nested hundreds of levels deep") from None

    def _record(self, raw: dict[str, Any]) -> Record:
        """A column may be there in some rows only, and not in the first ones."""
        if self.format:
            record = self.format.record(raw)
            for field, column in self.overridden.items():
                setattr(record, field, raw.get(column))
            record.letter = None if "solution" in self.overridden else record.letter  # that of the format's answer
        else:
            question = raw.get(self.question)  # which MathVerse leaves to the image in some rows
            record = Record(question or raw.get("query_cot") or question, raw.get(self.answer))
        plain, shown = isinstance(record.prompt, str) and not may_be_messages(record.prompt), record.prompt
        columns.refuse_unused(raw, record.prompt if plain and not self.chosen else None)
        if plain:
            if not self.chosen and not self.format and not {"prompt", "solution"} <= raw.keys():
                columns.refuse_another(raw, self.question, record.prompt)
            if self.question == "instruction":
                record.prompt = columns.with_input(record.prompt, raw)
            record.prompt = columns.with_passage(record.prompt, raw)
        answer = str(record.solution) if isinstance(record.solution, (str, int)) else ""
        record.options = record.options or options_of(raw, answer)
        if not (self.chosen or self.format or record.options):
            refuse_another_gold(raw, self.answer)
        # ScienceQA's hint is part of the question; that of an open one may be about its solution.
        if record.options and plain and not self.format:
            record.prompt = columns.with_hint(record.prompt, raw.get("hint"))
        record.prompt = columns.with_system(record.prompt, raw)
        record.judged = record.judged or columns.judged_fields(raw)
        if self.image_column or not record.images:
            strict = plain or not shows_images(shown)
            images = raw.get(self.image_column) if self.image_column else columns.image_of(raw, strict)[1]
            record.images = image_list(images)
        kind = self.format.NAME if self.format else "multiple_choice" if record.options else "question"
        record.task = record.task or next((raw[name] for name in columns.TASK_COLUMNS if raw.get(name)), kind)
        for name in ("min_pixels", "max_pixels"):
            if getattr(record, name) is None:
                setattr(record, name, _number(raw, name))
        return record

    @property
    def counted_from(self) -> int | None:
        """What the answers to questions with options count from, if they are numbers."""
        kind = self.source.settings.answer_kind
        kinds = {kind} if kind else self.common
        return 0 if kinds == {"from_0"} else 1 if kinds == {"from_1"} else None

    def column_of(self, field: str, raw: dict[str, Any]) -> str:
        """What the data call a field of the row."""
        if field in ("image", "images"):
            return self.image_column or columns.image_of(raw, strict=False)[0] or field
        name = {"prompt": self.question, "solution": self.answer, "answer": self.answer}.get(field)
        return name if name in self.columns else field


def _number(raw: dict[str, Any], name: str) -> int | None:
    try:
        return pixels(raw.get(name), name)
    except BadImage as error:
        raise RowError(name, str(error)) from None
