"""Records of JSON, JSON lines, CSV, TSV and Parquet files, one at a time, so that a file may be larger than memory.

[{"prompt": "1+1?", "solution": "2"}]                        .json: a list, or an object a line
{"prompt": "1+1?", "solution": "2"}                          .jsonl
prompt,solution                                              .csv, .tsv; commas, semicolons, tabs or bars
"""

import codecs
import csv
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.rows import BadInput, BadRow, RowError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
MAX_ROW = 64 << 20  # characters of one row
_BLANK = re.compile(r"[ \t\r\n]*")

# (row from 0, line from 1 or None, the record or its JSON text, or what is wrong with it)
Found = tuple[int, int | None, dict[str, Any] | str | BadRow]


def records(path: str, decoded: float = math.inf) -> Iterator[Found]:
    """The records of a file; of JSON, those after the first `decoded` as their text, for `decode`.

    Raises BadInput where it can't be read on.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(path)
        elif suffix == ".json" and _starts_with_list(path):
            yield from _json_list(path, decoded)
        else:
            yield from _json_lines(path, decoded)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: expected text in UTF-8, got {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def delimiter(path: Any) -> str | None:
    """What stands between the fields of a CSV file, by its header; spreadsheets write any of these. None for others."""
    if not isinstance(path, str) or Path(path).suffix.lower() not in (".csv", ".tsv") or not Path(path).is_file():
        return None
    with open(path, encoding="utf-8-sig", newline="") as file:
        return max(",;\t|", key=file.readline().count)


def _starts_with_list(path: str) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        while block := file.read(1 << 12):
            if text := block.lstrip():
                return text[0] != "{"
    return True


def _json_list(path: str, decoded: float = math.inf) -> Iterator[Found]:
    """Rows of a JSON list, each decoded as soon as the text read so far holds all of it."""
    raw_decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text, at, line = "", 0, 1

        def more() -> bool:
            nonlocal text, at
            block = file.read(max(1 << 20, len(text) - at))  # twice as much each time: a long row stays linear
            text, at = text[at:] + block, 0
            return bool(block)

        def symbol() -> str:
            """The next character that is not blank, "" at the end."""
            nonlocal at, line
            while True:
                end = _BLANK.match(text, at).end()
                line, at = line + text.count("\n", at, end), end
                if at < len(text):
                    return text[at]
                if not more():
                    return ""

        def bad(what: str) -> BadInput:
            return BadInput(f"{path}: line {line}: expected a JSON list of rows; {what}, got {text[at : at + 20]!r}")

        if symbol() != "[":
            raise bad("it starts with [")
        at += 1
        empty = symbol() == "]"
        for row in itertools.count():
            if empty:
                break
            while True:
                try:
                    found, end = raw_decode(text, at)
                    break
                except json.JSONDecodeError as error:
                    if len(text) - at > MAX_ROW or not more():
                        raise bad(f"row {row}: {error.msg}") from None
                except (ValueError, RecursionError) as error:
                    raise bad(f"row {row}: {str(error)[:60]}") from None
            yield row, line, _object(row, line, found) if row < decoded else text[at:end]
            line, at = line + text.count("\n", at, end), end
            if symbol() == "]":
                break
            if symbol() != ",":
                raise bad(f"row {row}: a comma or a ] after it")
            at += 1
            symbol()
        at += 1
        if symbol():
            raise bad("nothing after it")


def _json_lines(path: str, decoded: float) -> Iterator[Found]:
    row = 0
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if text.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    found = text.decode("utf-8-sig" if line == 1 else "utf-8")
                    found = found if row >= decoded else _object(row, line, json.loads(found))
                except (ValueError, RecursionError) as error:
                    if row == 0:
                        raise BadInput(
                            f"{path}: line {line}: expected a JSON object a line, or a list of them: {error}"
                        ) from None
                    found = _object(row, line, error)
                yield row, line, found
                row += 1


def decode(text: str) -> dict[str, Any]:
    """A record of its JSON text. Raises RowError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = error
    found = _object(0, None, found)
    if isinstance(found, BadRow):
        raise RowError(found.field, found.reason)
    return found


def _object(row: int, line: int, found: Any) -> dict[str, Any] | BadRow:
    if isinstance(found, dict):
        return found
    got = found if isinstance(found, Exception) else reprlib.repr(found)
    return BadRow(row, line, "row", f"expected a JSON object, got {got}")


def _csv(path: str) -> Iterator[Found]:
    """Columns without a name (an index, a spreadsheet's empty ones) are left out. A quotation mark that is not closed
    would swallow the rows after it: refused."""
    csv.field_size_limit(MAX_ROW)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter(path), strict=True)
        names: list[str] = []
        row, line = 0, 1
        try:
            for fields in reader:
                if fields and not names:
                    names = [name.strip() for name in fields]
                    _unique(path, [name for name in names if name])
                elif fields:
                    found = {name: value or None for name, value in itertools.zip_longest(names, fields) if name}
                    if any(fields[len(names) :]):
                        found = BadRow(row, line, "row", f"expected {len(names)} fields, as in the header, got more")
                    yield row, line, found
                    row += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise BadInput(f"{path}: line {line}: expected delimited text: {error}") from None


def _unique(path: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise BadInput(f"{path}: expected a name of its own for each column, got {', '.join(names)}")


def _parquet(path: str) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _unique(path, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=256):
                for found in batch.to_pylist():
                    yield row, None, found
                    row += 1
    except BadInput:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise BadInput(f"{path}: expected Parquet: {str(error)[:120]}") from None
