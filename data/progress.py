"""Results that survive being cut off: a file that grows by a line per row, and says what made it."""

import json
import os
import time
from pathlib import Path
from typing import Any

from data.cli import write_atomically
from data.rows import BadInput

Row = dict[str, Any]


class PartFile:
    """The results known so far, by the number of their row.

    The first line says what makes them, each other one holds a row's number and result. Nothing is written before the
    first `add`.

    Args:
        header: whatever decides a result, as plain data.
        fields: what every result has.

    Raises BadInput where the file is of something else, or was made under another header.
    """

    def __init__(self, path: Path, header: Row, fields: tuple[str, ...]):
        self.path, self.header = path, json.loads(json.dumps(header))
        self.done: dict[int, Row] = {}
        self._file = None
        self._synced = 0.0
        if not path.exists():
            return
        try:
            lines = path.read_bytes().split(b"\n")[:-1]  # the last one may be cut off, even within a letter
            made, *entries = map(json.loads, lines)
            changed = [name for name in self.header if made.get(name) != self.header[name]]
            self.done = {entry["index"]: entry["result"] for entry in entries}
            complete = all(result.keys() >= set(fields) for result in self.done.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            complete = False
        if not complete:
            raise BadInput(f"{path}: not a file of results; give another --output or remove it")
        if changed:
            raise BadInput(f"{path}: made with another {', '.join(changed)}; give another --output or remove it")

    def add(self, results: dict[int, Row]) -> None:
        """Append results; they are on the disk within a second."""
        if self._file is None:
            lines = [json.dumps(self.header), *(self._line(*item) for item in self.done.items())]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, "\n".join(lines) + "\n")
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (until `close`)
        self.done |= results
        self._file.writelines(self._line(*item) + "\n" for item in results.items())
        self._file.flush()
        if time.monotonic() - self._synced > 1.0:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _line(index: int, result: Row) -> str:
        return json.dumps({"index": index, "result": result}, ensure_ascii=False)
