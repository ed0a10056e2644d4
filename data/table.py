"""Records of JSON, JSON lines, CSV, TSV and Parquet files, one at a time, so that a file may be larger than memory.
Only a JSON list whose rows do not each have a line of their own is read whole.

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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.rows import BadInput, BadRow, NotLoaded, RowError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
MAX_FIELD = 64 << 20  # characters of a CSV field
_SEPARATOR_LINE = re.compile(r"\"?sep=(.)\"?\s*$", re.IGNORECASE)  # Excel's, before the header
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # the rows of a JSON list

# (row from 0, line from 1 or None, the record or its JSON text, or what is wrong with it)
Entry = tuple[int, int | None, dict[str, Any] | str | BadRow]


def records(path: str, decode_first: float = math.inf) -> Iterator[Entry]:
    """The records of a file; of JSON, those after the first `decode_first` as their text, for `decode`.

    Raises BadInput where it can't be read on.
    """
    file = Path(path)
    if not file.is_file():
        raise NotLoaded(f"{path}: no such file")
    try:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(path)
        elif suffix == ".json" and _starts_with_list(path):
            yield from _json_list(path, decode_first)
        else:
            yield from _json_lines(path, decode_first)
    except UnicodeDecodeError as error:
        hint = " (save a spreadsheet as CSV UTF-8)" if file.suffix.lower() in (".csv", ".tsv") else ""
        raise BadInput(f"{path}: expected text in UTF-8{hint}, got {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def delimiter(path: Any) -> str | None:
    """What stands between the fields of a CSV file, by its header; spreadsheets write any of these. None for others."""
    if not isinstance(path, str) or Path(path).suffix.lower() not in (".csv", ".tsv") or not Path(path).is_file():
        return None
    with open(path, encoding=_encoding(path), newline="") as file:
        header = file.readline()
    return said[1] if (said := _SEPARATOR_LINE.match(header)) else max(",;\t|", key=header.count)


def _encoding(path: str) -> str:
    """UTF-16 where the file begins with its mark, as of Excel's "Unicode text"; else UTF-8."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _starts_with_list(path: str) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        while block := file.read(1 << 12):  # not a line: a list may be one, of any size
            if text := block.lstrip():
                return text[0] != "{"
    return True


def batched(iterable: Iterable, size: int) -> Iterator[list]:
    """Lists of `size`; the last one may be shorter."""
    iterator = iter(iterable)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def list_text(rows: Iterable[str]) -> str:
    """Rows, each as JSON, as a JSON list that can be read line by line."""
    return "[\n" + ",\n".join(rows) + "\n]\n"


def _json_list(path: str, decode_first: float) -> Iterator[Entry]:
    """Row by row where `list_text` wrote them; any other layout is read whole."""
    row = 0
    with open(path, encoding="utf-8-sig") as file:
        by_line = file.readline().strip() == "["
        while by_line:
            text = file.readline().strip()
            last = not text.endswith(",")
            if last and file.read().split() != ["]"]:
                break
            text = text.removesuffix(",")
            later = row >= decode_first and text[:1] + text[-1:] == "{}"
            try:
                record = text if later else _object(row, row + 2, json.loads(text))
            except (ValueError, RecursionError):
                break
            yield row, row + 2, record
            row += 1
            if last:
                return
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: expected a JSON list of rows: {str(error)[:120]}") from None
    if not isinstance(whole, list):
        raise BadInput(f"{path}: expected a JSON list of rows, got {reprlib.repr(whole)}")
    decode, line, end = json.JSONDecoder().raw_decode, 1, text.index("[") + 1
    line += text.count("\n", 0, end)
    for number, record in enumerate(whole):  # already checked: decoded again for its place in the text
        start = _BETWEEN.match(text, end).end()
        line += text.count("\n", end, start)
        if number >= row:
            yield number, line, _object(number, line, record)
        _, end = decode(text, start)
        line += text.count("\n", start, end)


def _json_lines(path: str, decode_first: float) -> Iterator[Entry]:
    row = 0
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if text.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    record = text.decode("utf-8-sig" if line == 1 else "utf-8")
                    record = record if row >= decode_first else _object(row, line, json.loads(record))
                except (ValueError, RecursionError) as error:
                    if row == 0:
                        raise BadInput(
                            f"{path}: line {line}: expected a JSON object a line, or a list of them: {error}"
                        ) from None
                    record = _object(row, line, error)
                yield row, line, record
                row += 1


def decode(text: str) -> dict[str, Any]:
    """A record of its JSON text. Raises RowError."""
    try:
        record = _object(0, None, json.loads(text))
    except (ValueError, RecursionError) as error:
        record = _object(0, None, error)
    if isinstance(record, BadRow):
        raise RowError(record.field, record.reason)
    return record


def _object(row: int, line: int | None, value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    got = value if isinstance(value, Exception) else reprlib.repr(value)
    return BadRow(row, line, "row", f"expected a JSON object, got {got}")


def _csv(path: str) -> Iterator[Entry]:
    """Columns without a name (an index, a spreadsheet's empty ones) are left out. A quotation mark that is not closed
    would swallow the rows after it: refused."""
    csv.field_size_limit(MAX_FIELD)
    with open(path, encoding=_encoding(path), newline="") as file:
        skipped = bool(_SEPARATOR_LINE.match(file.readline()))
        if not skipped:
            file.seek(0)
        reader = csv.reader(file, delimiter=delimiter(path), strict=True)
        names: list[str] = []
        row, line = 0, 1
        try:
            for fields in reader:
                if fields and not names:
                    names = [name.strip() for name in fields]
                    if any("\0" in name for name in names):
                        raise BadInput(
                            f"{path}: expected text in UTF-8, got another encoding (UTF-16 without its mark?)"
                        )
                    _unique(path, [name for name in names if name])
                elif any(fields):  # a spreadsheet's empty rows have commas
                    record = {name: value or None for name, value in itertools.zip_longest(names, fields) if name}
                    if any(fields[len(names) :]):
                        record = BadRow(row, line, "row", f"expected {len(names)} fields, as in the header, got more")
                    yield row, line, record
                    row += 1
                line = reader.line_num + 1 + skipped
        except csv.Error as error:
            raise BadInput(f"{path}: line {line}: expected delimited text: {error}") from None


def short_floats(schema) -> dict[str, Any]:
    """The columns of an Arrow schema with numbers of 32 or 16 bits in them: name -> type."""
    return {field.name: field.type for field in schema if re.search(r"\b(?:half)?float\b", str(field.type))}


def as_written(value: Any, of: Any) -> Any:
    """A value of this type with such numbers as they were written: 0.1, where the same in 64 bits is 0.10000000149."""
    import numpy as np
    import pyarrow.types as types

    if isinstance(value, list) and (types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of)):
        return [as_written(part, of.value_type) for part in value]
    if isinstance(value, dict) and types.is_struct(of):
        return {name: as_written(part, of.field(name).type) for name, part in value.items()}
    if not isinstance(value, float) or not (types.is_float32(of) or types.is_float16(of)):
        return value
    return float(str((np.float32 if types.is_float32(of) else np.float16)(value)))


def _unique(path: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise BadInput(f"{path}: expected a name of its own for each column, got {', '.join(names)}")


def _parquet(path: str) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _unique(path, file.schema_arrow.names)
            short = short_floats(file.schema_arrow)
            row = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield row, None, record | {name: as_written(record[name], of) for name, of in short.items()}
                    row += 1
    except BadInput:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise BadInput(f"{path}: expected Parquet: {str(error)[:120]}") from None
