"""What the commands share: flags from dataclasses, one-line errors, text that can't disturb a terminal, tables, and
files written whole."""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin


class Parser(argparse.ArgumentParser):
    """Shows a module's docstring as it is, and says what is wrong in one line, without the usage."""

    def __init__(self, description: str | None, **kwargs):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def add_fields(self, settings: type, **defaults: Any) -> None:
        """A flag for each field of a dataclass, as transformers' HfArgumentParser makes them, without importing it;
        `defaults` are this command's own."""
        for each in fields(settings):
            default = defaults.get(each.name, each.default)
            options = {name: value for name, value in each.metadata.items() if name != "least"}
            kind = next(kind for kind in get_args(each.type) or (each.type,) if kind not in (NoneType, ...))
            if kind is bool:
                options["action"] = "store_true"
            else:
                options["type"] = kind
            if get_origin(each.type) is tuple:
                options["nargs"] = "+"
            if default is MISSING:
                options["required"] = True
            else:
                options["default"] = default
                if kind is not bool and default not in (None, ()) and str(default).isprintable():
                    options["help"] = f"{options.get('help', '')} [{default}]".strip()
            self.add_argument(f"--{each.name}", **options)

    def values(self, args: argparse.Namespace, settings: type) -> Any:
        """The dataclass that `args` describe. A number below the field's `least` is an error."""
        values = {each.name: getattr(args, each.name) for each in fields(settings)}
        for each in fields(settings):
            least, value = each.metadata.get("least"), values[each.name]
            if least is not None and value is not None and not least <= value < math.inf:
                self.error(f"--{each.name}: expected a number from {least} on, got {value}")
        return settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def flag(default: Any = MISSING, help: str | None = None, **options: Any):
    """A dataclass field that is a flag; `least` is the lowest number that makes sense."""
    return field(default=default, metadata={**({"help": help} if help else {}), **options})


def refuse(program: str, error: Exception) -> int:
    """Print bad input as one line; returns its exit status."""
    print(f"{program}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


class Errors:
    """Counts error messages; those that differ in their numbers alone are one."""

    def __init__(self):
        self._counts: dict[str, list] = {}  # message without numbers -> [how often, the first of them]

    def add(self, message: str) -> None:
        self._counts.setdefault(re.sub(r"\d+", "#", message)[:200], [0, message])[0] += 1

    def lines(self) -> list[str]:
        """The three most frequent ones, each with its count and its first message."""
        ordered = sorted(self._counts.values(), key=lambda entry: -entry[0])
        lines = [f"  {n:,} x {message[:300]}" for n, message in ordered[:3]]
        return lines + ([f"  and {len(ordered) - 3:,} other errors"] if len(ordered) > 3 else [])


def progress_bar(total: int | None, initial: int, description: str, **options: Any):
    """tqdm on a terminal; where stderr is a file or a pipe, a line every half minute and at the end."""
    from tqdm.auto import tqdm

    class Lines:
        def write(self, text: str) -> None:
            if text.strip():
                sys.stderr.write(text.strip("\r\n ") + "\n")

        def flush(self) -> None:
            sys.stderr.flush()

    every = {} if sys.stderr.isatty() else {"file": Lines(), "mininterval": 30, "maxinterval": 60, "ascii": True}
    return tqdm(total=total, initial=initial, desc=description, **every, **options)


def printable(text: str) -> str:
    """`text` with what could move a cursor or hide other text written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def text_table(rows: Iterable[Sequence[str]], markdown: bool = False) -> list[str]:
    """Lines of a table whose first row is its head; the first column stands left, the others right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    if not markdown:
        return ["  ".join(row).rstrip() for row in padded]
    rule = ["---", *["---:"] * (len(widths) - 1)]
    return [f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:])]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, also after a crash."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
