"""What training runs left behind: logs, settings, rollouts."""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import verify
from data.rows import BadInput

Row = dict[str, Any]
STATES = ("trainer_state.json", "checkpoint-*/trainer_state.json")
# Settings in which repetitions of a run differ.
SEEDS = {"seed", "data_seed", "recycle_seed", "output_dir", "run_name", "logging_dir", "hub_model_id"}
TASK_TITLES = {
    "answer": "Answer",
    "pointwise": "Judge one answer",
    "pairwise": "Judge a pair",
    "reflection": "Look again",
}


@dataclass
class Run:
    """What one run left behind. `series` is metric -> (steps, values), `tables` the files of rollouts by their kind.

    Of several seeds, `series` holds means, and `spread` metric -> (lowest, highest) values.
    """

    name: str
    state: Row = field(default_factory=dict)
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    spread: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    settings: Row = field(default_factory=dict)
    tables: dict[str, list[Path]] = field(default_factory=dict)
    metrics: Row = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_runs(paths: list[str | Path]) -> list[Run]:
    """The runs in `paths`, with names that tell them apart. A folder that only holds runs (runs/demo) stands for them.

    Raises BadInput for a folder that is no run, or a log that is not JSON.
    """
    folders: list[Path] = []
    runs: list[Run] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise BadInput(f"{path}: no such folder; expected a run's output_dir")
        metrics = read_json(path / "metrics.json")
        inside = [path] if is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and is_run(p))
        if not inside and not metrics:
            raise BadInput(f"{path}: not a run: expected metrics.jsonl, trainer_state.json or completions/ in it")
        found = [read_run(folder) for folder in inside or [path]]
        found[0].metrics = found[0].metrics or metrics
        folders += inside or [path]
        runs += found
    parts = [path.resolve().parts for path in folders]
    depth = next((n for n in range(1, 10) if len({p[-n:] for p in parts}) == len(parts)), 1)
    for run, names in zip(runs, parts, strict=True):
        run.name = "/".join(names[-depth:])
    return runs


def is_run(path: Path) -> bool:
    return any(any(path.glob(glob)) for glob in (*STATES, "metrics.jsonl", "completions/*.parquet"))


def read_run(path: Path) -> Run:
    states, notes = [read_json(p) for p in path.glob(STATES[0])], []
    for checkpoint in path.glob(STATES[1]):
        try:
            states.append(read_json(checkpoint))
        except BadInput as error:  # the run was killed while it wrote
            notes.append(str(error))
    state = max(states, key=lambda state: state.get("global_step", 0), default={})
    settings, metrics = (read_json(path / name) for name in ("settings.json", "metrics.json"))
    run = Run(path.name, state, settings=settings, metrics=metrics, notes=notes)
    for entry in read_log(path) or run.state.get("log_history", []):
        for key, value in entry.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = run.series.setdefault(key, ([], []))
                steps.append(entry.get("step", 0))
                values.append(float(value))
    for kind in ("recycled", "completions"):
        run.tables[kind] = sorted((path / "completions").glob(f"{kind}_*.parquet"))
    return run


def read_log(path: Path) -> list[Row]:
    """The lines of metrics.jsonl, which has every step; none without it. A line that a crash cut off is left out."""
    file = path / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise BadInput(f"{file}: expected a JSON object a line: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{file}: expected a JSON object a line")
    return rows


def by_seed(runs: list[Run]) -> list[Run]:
    """Runs whose settings differ in their seeds alone as one, which has their means and their spread."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {name: value for name, value in run.settings.items() if name not in SEEDS}
        groups.setdefault(json.dumps(same, sort_keys=True) if run.settings else run.name, []).append(run)
    return [seeds[0] if len(seeds) == 1 else together(seeds) for seeds in groups.values()]


def together(seeds: list[Run]) -> Run:
    """Means and spread at the steps that all seeds have logged."""
    merged = Run(f"{seeds[0].name} and {len(seeds) - 1} more seed{'s' * (len(seeds) > 2)}", settings=seeds[0].settings)
    for metric in seeds[0].series:
        logged = [dict(zip(*run.series.get(metric, ((), ())), strict=True)) for run in seeds]
        steps = sorted(set.intersection(*map(set, logged)))
        columns = [[values[step] for values in logged] for step in steps]
        if steps:
            merged.series[metric] = steps, [sum(column) / len(column) for column in columns]
            merged.spread[metric] = list(map(min, columns)), list(map(max, columns))
    return merged


def differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """(setting, its value in each run), of the settings that differ."""
    names = sorted({name for run in runs for name in run.settings} - {"output_dir", "logging_dir"})
    values = [(name, [run.settings.get(name, "default") for run in runs]) for name in names if len(runs) > 1]
    return [(name, each) for name, each in values if any(value != each[0] for value in each)]


def read_json(path: Path) -> Row:
    """The object in a file; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: expected JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return content


def read_table(path: Path, task: str | None, notes: list[str]) -> list[Row]:
    """The rollouts of one step as rows, each with its item's images and the rewards of the item's other rollouts."""
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        item, images, group = None, [], []
        for row in rows:
            row["task"] = str(row.get("task") or task)
            row["prompt"], row["completion"] = verify.last_text(row["prompt"]), verify.last_text(row["completion"])
            if row.get("images") or (row["task"], row["prompt"]) != item:  # only an item's first rollout has them
                item, images, group = (row["task"], row["prompt"]), list(row.get("images") or []), []
            if "reward" not in row:  # TRL's table has a column for each reward function, the verifier's first
                columns = list(row)
                row["reward"] = row[columns[columns.index("completion") + 1]]
            if row["reward"] is None:  # no opinion of the verifier
                row["reward"] = math.nan
            group.append(row["reward"])
            row["images"], row["group"] = images, group
    except Exception as error:  # a file cut off by a crash must not cost the report
        notes.append(f"{path.name} could not be read ({type(error).__name__})")
        return []
    return rows


def draw_rollouts(run: Run, late: bool, count: int) -> list[Row]:
    """`count` rollouts of each task, each of another item: a random draw, always the same one, not a selection."""
    rows: dict[str, list[Row]] = {}
    for kind, files in run.tables.items():
        if not late and len(files) < 2:
            continue
        task = "answer" if kind == "completions" else None
        for path in (files[::-1] if late else files)[:4]:
            table = read_table(path, task, run.notes)
            random.Random(path.name).shuffle(table)
            for row in table:
                drawn = rows.setdefault(row["task"], [])
                if len(drawn) < count and all(row["prompt"] != other["prompt"] for other in drawn):
                    drawn.append(row)
    return [row for task in sorted(rows, key=lambda t: [*TASK_TITLES, t].index(t)) for row in rows[task]]
