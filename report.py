"""One web page about one run or several: what was learned, as curves, and what was written, as rollouts.

    python report.py RUN_DIR [RUN_DIR ...] [--results results.json ...] --output report.html

A run is what train_spark.py leaves in its output_dir: metrics.jsonl or trainer_state.json (of an interrupted run, the
one in its newest checkpoint), settings.json and completions/*.parquet. A metrics.json (demo.py's before/after table) is
shown where there is one, and from evaluate.py's results how far verdicts can be believed and what accuracy costs. Runs
that differ in nothing but their seeds are one curve, with a band from the lowest to the highest. What a run has not
logged is marked as such.

The page (report.html.jinja) is one file without scripts or links to anything; REPORT_curves.png holds its curves.
Whatever a model wrote is hostile: text is escaped and its invisible characters are made visible, images are decoded and
encoded anew, and the page's own policy forbids scripts and requests.
"""

import base64
import io
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import verify
from data.cli import Parser, refuse
from data.rows import BadInput

Row = dict[str, Any]
STATES = ("trainer_state.json", "checkpoint-*/trainer_state.json")
LATE, EARLY = 12, 4  # cards of each task from the end of a run, and from its start
MAX_CHARS = 1500  # of one text on a card
MAX_POINTS = 400  # of one curve
# Settings in which repetitions of a run differ.
SEEDS = {"seed", "data_seed", "recycle_seed", "output_dir", "run_name", "logging_dir", "hub_model_id"}


@dataclass(frozen=True)
class Panel:
    """One small plot: (metric, what the legend calls it) each, and where a coin would end up."""

    title: str
    about: str
    lines: tuple[tuple[str, str], ...]
    chance: float | None = None
    share: bool = True  # 0 to 1


PANELS = (
    Panel("Answering", "Rollouts the verifier calls right; questions with at least one right among G.", (
        ("policy/accuracy", "accuracy"), ("policy/pass_at_g", "pass@G"))),
    Panel("Judging one answer", "Balanced, Yes to everything earns 0.5. By the question alone: the answer unread. "
        "Only questions answered both right and wrong are asked, harder ones as the policy learns.", (
        ("judge/pointwise/balanced_accuracy", "balanced accuracy"), ("judge/pointwise/accuracy", "accuracy"),
        ("judge/pointwise/question_only", "by the question alone")), 0.5),
    Panel("Judging a pair", "Which of two answers is right? One of them is.", (
        ("judge/pairwise/accuracy", "accuracy"),), 0.5),
    Panel("Bias of the judge", "Unbiased, it says right as often as that is so and picks the first in half the pairs.",
        ( ("judge/pointwise/positive_rate", "says right"), ("judge/pointwise/label_rate", "is right"),
        ("judge/pairwise/first_rate", "picks the first")), 0.5),
    Panel("Reflecting", "Wrong answers that came out right when the model was asked to look again.", (
        ("reflection/fix_rate", "fix rate"),)),
    Panel("Questions without contrast", "All G rollouts earned the same, so nothing can be learned from them.", (
        ("frac_reward_zero_std", "share"),)),
    Panel("Recycled prompts", "Prompts a step: used, beyond the ratio, and unusable.", (
        ("recycle/items", "used"), ("recycle/unused", "unused"), ("recycle/skipped", "skipped")), share=False),
    Panel("Unreadable output", "Answers without a box, judgements without a verdict.", (
        ("policy/unboxed", "no boxed answer"), ("judge/unparsed", "no verdict")), share=False),
    Panel("Entropy", "Nats per token; near 0 the policy no longer explores.", (("entropy", "entropy"),), share=False),
    Panel("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),), share=False),
    Panel("Length of answers", "Tokens per policy rollout.", (("completions/mean_length", "tokens"),), share=False),
    Panel("Seconds a step", "The whole step, and the part spent rewriting rollouts into prompts.", (
        ("step_time", "step"), ("recycle/seconds", "rewriting")), share=False),
)  # fmt: skip
TILES = (  # what a run is summed up by
    ("policy/accuracy", "answers right"),
    ("judge/pointwise/balanced_accuracy", "one answer judged, balanced"),
    ("judge/pairwise/accuracy", "pairs judged"),
    ("reflection/fix_rate", "wrong answers fixed"),
)
JUDGED = (("judge/pointwise/balanced_accuracy", "one answer, balanced"), ("judge/pairwise/accuracy", "pairs"))
TASK_TITLES = {
    "answer": "Answer",
    "pointwise": "Judge one answer",
    "pairwise": "Judge a pair",
    "reflection": "Look again",
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading runs


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


# ---------------------------------------------------------------------------------------------------------------------
# Curves

# Okabe and Ito's colours, told apart with every kind of colour vision; lighter ones on a dark page.
COLOURS = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#b0559a", "#8a6d00", "#3a9bd9"],
    "dark": ["#5bb8f0", "#ff9248", "#2fcf9f", "#eb9fcb", "#f0e442", "#9bb4ff"],
}
INK = {"light": ("#ffffff", "#1f2328", "#d6dbe1"), "dark": ("#171c23", "#e6e9ee", "#37404b")}  # paper, ink, grid
DASHES = ["-", (0, (5, 2)), (0, (1.2, 1.5)), (0, (6, 2, 1, 2))]
DOTTED = {"linewidth": 0.9, "linestyle": (0, (2, 3)), "alpha": 0.7}
MARKERS = ["o", "s", "^", "D", "v", "P"]
SHARE = (-0.03, 1.03)  # an axis from 0 to 1


def marked(i: int, theme: str) -> dict[str, str]:
    """Colour and marker of the i-th of several runs or files."""
    return {"color": COLOURS[theme][i % len(COLOURS[theme])], "marker": MARKERS[i % len(MARKERS)]}


def smooth(values: list[float]) -> list[float]:
    """Each point's neighbourhood mean (a Gaussian over about a tenth of the run), which does not lag behind."""
    from scipy.ndimage import gaussian_filter1d

    width = max(len(values) / 25, 0.5)
    ones = [1.0] * len(values)
    total, weight = (gaussian_filter1d(y, width, mode="constant", radius=int(4 * width) + 1) for y in (values, ones))
    return (total / weight).tolist()


def draw_panel(ax, panel: Panel, runs: list[Run], theme: str) -> None:
    """Raw points faint, a smoothed line over them. Several runs: a colour and a marker each, a dash for each metric."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    (_, ink, _), several = INK[theme], len(runs) > 1
    legend = {}
    for m, (metric, label) in enumerate(panel.lines):
        line = {"linestyle": DASHES[m % len(DASHES)], "linewidth": 1.9}
        for r, run in enumerate(runs):
            if metric not in run.series:
                continue
            steps, values = run.series[metric]
            thin = slice(None, None, math.ceil(len(steps) / MAX_POINTS))
            look = marked(r if several else m, theme)
            colour, every = look["color"], max(len(steps[thin]) // 4, 1)
            look |= {"markersize": 4.5, "markevery": (every * r // len(runs), every)} if several else {"marker": None}
            if metric in run.spread:
                low, high = (smooth(edge)[thin] for edge in run.spread[metric])
                ax.fill_between(steps[thin], low, high, color=colour, alpha=0.18, linewidth=0)
            else:
                ax.plot(steps[thin], values[thin], ".", color=colour, alpha=0.28, markersize=3.5, rasterized=True)
            ax.plot(steps[thin], smooth(values)[thin], **line, **look)
            if len(panel.lines) > 1:
                legend[label] = Line2D([], [], color=ink if several else colour, **line)
    for r, run in enumerate(runs if several and ax.lines else []):
        legend[" " + visible(run.name)[-28:]] = Line2D([], [], linewidth=1.9, **marked(r, theme))
    if not ax.lines:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color=ink)
    if panel.chance is not None:
        ax.axhline(panel.chance, color=ink, **DOTTED)
        ax.annotate("chance", (1, panel.chance), (-2, 2), ("axes fraction", "data"), "offset points",
                    ha="right", va="bottom", fontsize=8, color=ink)  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylim(*(SHARE if panel.share else (min(0, ax.get_ylim()[0]), None)))
    finish(ax, theme, "step", legend)


def finish(ax, theme: str, label: str, legend: dict[str, Any]) -> None:
    """The looks that all plots share."""
    paper, ink, grid = INK[theme]
    ax.set_facecolor(paper)
    ax.set_xlabel(label, fontsize=8, color=ink, loc="right", labelpad=1)
    ax.tick_params(labelsize=8, colors=ink, length=0)
    ax.grid(color=grid, linewidth=0.7)
    ax.spines[:].set_visible(False)
    if legend:
        box = ax.legend(legend.values(), legend, loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=2, fontsize=8,
                        frameon=False, labelcolor=ink, handlelength=2.4, borderaxespad=0)  # fmt: skip
        for text in box.get_texts():
            text.set_parse_math(False)  # a run may be called $x$


def draw_coevolution(ax, runs: list[Run], theme: str) -> None:
    """Judging against answering: each run a path from its start (hollow) to its end (full)."""
    legend = {}
    for r, run in enumerate(runs):
        for m, (metric, name) in enumerate(JUDGED):
            path = co_evolution(run, metric)
            if not path:
                continue
            colour, marker = marked(r if len(runs) > 1 else m, theme)["color"], MARKERS[r % len(MARKERS)]
            (line,) = ax.plot(*zip(*path, strict=True), color=colour, linestyle=DASHES[m], linewidth=1.6)
            ax.plot(*path[0], marker, color=colour, markerfacecolor=INK[theme][0], markersize=6)
            ax.plot(*path[-1], marker, color=colour, markersize=7)
            legend[name if len(runs) == 1 else f" {visible(run.name)[-28:]}, {name}"] = line
    ax.plot([0, 1], [0.5, 0.5], color=INK[theme][1], **DOTTED)
    ax.set(xlim=SHARE, ylim=SHARE)
    ax.set_ylabel("judging", fontsize=8, color=INK[theme][1])
    finish(ax, theme, "answering: policy accuracy", legend)


def co_evolution(run: Run, metric: str) -> list[tuple[float, float]]:
    """(policy accuracy, judge's accuracy) along a run, both smoothed, where both are logged."""
    if not {"policy/accuracy", metric} <= run.series.keys():
        return []
    policy, judge = (
        dict(zip(steps, smooth(values), strict=True))
        for steps, values in (run.series["policy/accuracy"], run.series[metric])
    )
    shared = sorted(policy.keys() & judge.keys())
    return [(policy[step], judge[step]) for step in shared[:: max(math.ceil(len(shared) / MAX_POINTS), 1)]]


def draw_reliability(ax, rows: list[Row], theme: str) -> None:
    """How often verdicts are right, by their probability."""
    legend = {}
    for r, row in enumerate(rows):
        look = {**marked(r, theme), "linewidth": 1.4}
        legend[visible(row["name"])[-40:]] = draw_accuracy(ax, row["calibration"]["bins"], "probability", **look)
    ax.plot([0, 1], [0, 1], color=INK[theme][1], **DOTTED)
    ax.set(xlim=SHARE, ylim=SHARE)
    finish(ax, theme, "probability of the verdict", legend)


def draw_price(ax, rows: list[Row], theme: str) -> None:
    """Accuracy against the tokens generated, a curve for each way of test-time scaling."""
    legend: dict[str, Any] = {}
    for r, row in enumerate(rows):
        for w, way in enumerate(dict.fromkeys(each["way"] for each in row["price"])):
            ways = {way, "first answer"} if way == "majority" else {way}
            points = [each for each in row["price"] if each["way"] in ways]
            look = {**marked(w, theme), "markersize": 4.5, "linestyle": DASHES[r % len(DASHES)]}
            name = way if len(rows) == 1 else f"{visible(row['name'])[-28:]}, {way}"
            legend[name] = draw_accuracy(ax, points, "tokens", **look)
    ax.set_xscale("log")
    finish(ax, theme, "tokens generated a question", legend)


def draw_accuracy(ax, points: list[Row], against: str, **look):
    """A curve of accuracies with their intervals."""
    bars = [[abs(point["interval"][i] - point["accuracy"]) for point in points] for i in (0, 1)]
    x, y = ([point[name] for point in points] for name in (against, "accuracy"))
    return ax.errorbar(x, y, bars, capsize=2, **look)


def grid_of_axes(count: int, entries: int, theme: str):
    """(figure, axes) in up to three columns, all axes of one size, whatever the room below them for legends."""
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = math.ceil(count / columns)
    title, legend = 0.3 * (count > 1) + 0.08, 0.4 + 0.17 * math.ceil(entries / 2) + 0.1 * (entries > 0)  # inches
    wide, high, gap = 4.2 * columns, rows * (2.2 + title + legend), 0.5
    figure = Figure(figsize=(wide, high), facecolor=INK[theme][0])
    axes = figure.subplots(rows, columns, squeeze=False)
    inner = (wide - 0.1 - gap * columns) / columns
    figure.subplots_adjust(
        gap / wide, legend / high, 1 - 0.1 / wide, 1 - title / high, gap / inner, (title + legend) / 2.2
    )
    return figure, list(axes.flat)


def legend_entries(panels: Sequence[Panel], runs: list[Run]) -> int:
    names = max(len(panel.lines) for panel in panels)
    return names * (names > 1) + len(runs) * (len(runs) > 1)


def draw(panels: Sequence[Panel], runs: list[Run], file) -> None:
    """All panels as one PNG."""
    figure, axes = grid_of_axes(len(panels), legend_entries(panels, runs), "light")
    for ax, panel in zip(axes, panels, strict=False):
        draw_panel(ax, panel, runs, "light")
        ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    for ax in axes[len(panels) :]:
        ax.axis("off")
    figure.savefig(file, format="png", dpi=150)


def start_and_end(run: Run, metric: str) -> tuple[float, float] | None:
    """The means of a metric's first and last tenth."""
    _, values = run.series.get(metric, ((), ()))
    if not values:
        return None
    n = max(len(values) // 10, 1)
    return sum(values[:n]) / n, sum(values[-n:]) / n


# ---------------------------------------------------------------------------------------------------------------------
# Text and images that a model, or a dataset, wrote

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\uffff"
    r"\ud800-\udfff\U000e0000-\U000e0fff]"
)
_QUOTED = re.compile(r"<(response(?:_[ab])?)>\n(.*?)\n</\1>", re.DOTALL)


def visible(text) -> str:
    """`text` with every control, direction and zero-width character written out as [U+XXXX]."""
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(text))


def shorten(text: str) -> str:
    """The beginning and the end, for the verdict comes last."""
    left_out = len(text) - MAX_CHARS
    if left_out <= 0:
        return text
    return f"{text[: MAX_CHARS * 2 // 3]}\n[... {left_out:,} characters left out ...]\n{text[-MAX_CHARS // 3 :]}"


def image(data) -> dict[str, str]:
    """PNG bytes as the `source` of an image tag, encoded anew from their pixels; an `error` where they are no image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(bytes(data)), formats=["PNG"]) as opened:
            if max(opened.size) > 4096:
                raise ValueError(f"{opened.size} is too large for a thumbnail")
            pixels = opened.convert("RGB")
        pixels.thumbnail((320, 320))
        with io.BytesIO() as file:
            pixels.save(file, format="PNG", optimize=True)
            if file.tell() < 20_000:
                return {"source": data_uri(file.getvalue(), "png")}
        with io.BytesIO() as file:  # a photograph
            pixels.save(file, format="WEBP", quality=75)
            return {"source": data_uri(file.getvalue(), "webp")}
    except Exception as error:  # whatever a decoder may raise on bytes made to break it
        return {"error": type(error).__name__}


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


# ---------------------------------------------------------------------------------------------------------------------
# What the page (report.html.jinja) shows


def pictures(runs: list[Run]) -> list[Row]:
    """The panels for light and for dark pages, and what they show in words; neither where nothing was logged."""
    shown = []
    paths = [(run, name, path) for run in runs for metric, name in JUDGED if (path := co_evolution(run, metric))]
    if paths:
        words = (
            f"{run.name} {name} from {number(path[0][1])} at {number(path[0][0])} to {number(path[-1][1])} at "
            f"{number(path[-1][0])}"
            for run, name, path in paths
        )
        about = "Judging against answering over the steps, from the hollow mark to the solid one. Dotted: a coin."
        drawing = partial(draw_coevolution, runs=runs)
        shown.append(picture("Co-evolution", about, words, len(paths), drawing))
    for panel in PANELS:
        words = [
            f"{run.name} {label} from {number(ends[0])} to {number(ends[1])}"
            for run in runs
            for metric, label in panel.lines
            if (ends := start_and_end(run, metric))
        ]
        drawing = partial(draw_panel, panel=panel, runs=runs) if words else None
        shown.append(picture(panel.title, panel.about, words, legend_entries([panel], runs), drawing))
    return shown


def picture(title: str, about: str, words: Iterable[str], entries: int, drawing: Callable | None) -> Row:
    """What `drawing(ax, theme=...)` draws, for light and for dark pages; `entries` of its legend need room."""
    shown = {"title": title, "about": about, "words": "; ".join(words)}
    for theme in ("light", "dark") if drawing else ():
        figure, (ax,) = grid_of_axes(1, entries, theme)
        drawing(ax, theme=theme)
        with io.BytesIO() as file:
            figure.savefig(file, format="svg", dpi=150)
            shown[theme] = data_uri(file.getvalue(), "svg+xml")
    return shown


def results_pictures(files: Sequence[str | Path]) -> list[Row]:
    """How far verdicts can be believed, and what accuracy costs, of evaluate.py's results. Raises BadInput."""
    from calculate_acc import summarise, tally

    benchmarks = [
        {"name": f"{Path(file['path']).stem}: {benchmark['dataset']}", **benchmark}
        for file in summarise([tally(str(path)) for path in files])["files"]
        for benchmark in file["benchmarks"]
    ]
    judged = [row for row in benchmarks if row.get("calibration")]
    priced = [row for row in benchmarks if row.get("price")]
    shown = []
    if judged:
        words = (
            f"{row['name']}: Brier score {number(row['calibration']['brier'])}, expected calibration error "
            f"{number(row['calibration']['calibration_error'])}, {row['calibration']['verdicts']:,} verdicts"
            for row in judged
        )
        about = "How often verdicts are right, by their probability, with 95 % intervals. Dotted: calibrated."
        drawing = partial(draw_reliability, rows=judged)
        shown.append(picture("Calibration of the judge", about, words, len(judged), drawing))
    if priced:
        words = (
            f"{row['name']}, {each['way']}, n = {each['n']}: {number(each['accuracy'])}, {each['tokens']:,.0f} tokens"
            for row in priced
            for each in row["price"]
        )
        entries = sum(len({each["way"] for each in row["price"]}) for row in priced)
        about = "Each way of test-time scaling with 1, 2, 4, ... answers, with 95 % intervals."
        shown.append(picture("Accuracy against tokens", about, words, entries, partial(draw_price, rows=priced)))
    if not shown:
        names = ", ".join(map(str, files))
        raise BadInput(f"{names}: expected results of --mode judge, or of --mode tts --tts compare")
    return shown


def card(row: Row) -> Row:
    """One rollout: the question, what the model was shown, what it wrote, and whether that was right."""
    prompt = row["prompt"]
    quotes = list(_QUOTED.finditer(prompt))
    question, instruction = prompt, ""
    if quotes:
        question, _, before = prompt[: quotes[0].start()].rpartition("\n\n")
        instruction = " … ".join(part for part in (before.strip(), prompt[quotes[-1].end() :].strip()) if part)
    truth = row.get("shown_correct")
    truth = [bool(right) for right in truth] if truth is not None else []
    scored = [reward for reward in row["group"] if not math.isnan(reward)]
    label = row.get("label")
    return {
        "kind": row["task"] if row["task"] in TASK_TITLES else "other",
        "task": TASK_TITLES.get(row["task"], row["task"]),
        "step": row.get("step", "?"),
        "right": None if math.isnan(row["reward"]) else row["reward"] >= 1,
        "images": list(map(image, row["images"])),
        "question": question.strip(),
        "quotes": [
            {
                "letter": quote[1].removeprefix("response").strip("_").upper(),
                "text": quote[2].strip(),
                "right": truth[i] if i < len(truth) else None,
            }
            for i, quote in enumerate(quotes)
        ],
        "instruction": instruction,
        "completion": row["completion"].strip(),
        "answer": verify.extract_boxed(row["completion"]),
        "label": label if isinstance(label, str) else None,
        "tries": len(scored),
        "tries_right": sum(reward >= 1 for reward in scored),
    }


def facts(run: Run) -> list[str]:
    """How far a run went, and what it cost."""
    import pyarrow.parquet as pq

    logged = [steps[-1] for steps, _ in run.series.values() if steps]  # beyond the last checkpoint of a killed run
    done = max([run.state.get("global_step") or 0, *logged])
    planned = run.state.get("max_steps") or run.settings.get("max_steps")
    words = []
    if done:
        words.append(f"{done:,} steps" if done == planned or not planned else f"{done:,} of {planned:,} steps so far")
    recycled = sum(run.series.get("recycle/rows", ((), ()))[1])
    words += [f"{recycled:,.0f} recycled rollouts"] if recycled else []
    for kind, name in (("completions", "policy rollouts kept"), ("recycled", "recycled ones kept")):
        if kind == "recycled" and recycled:
            continue
        rows = 0
        for path in run.tables[kind]:
            try:
                rows += pq.ParquetFile(path).metadata.num_rows
            except (OSError, ValueError):
                continue  # draw_rollouts says so
        words += [f"{rows:,} {name}"] if rows else []
    if "num_tokens" in run.series:
        words.append(f"{run.series['num_tokens'][1][-1]:,.0f} tokens")
    seconds = sum(run.series.get("train_runtime", ((), ()))[1][-1:]) or sum(run.series.get("step_time", ((), ()))[1])
    if seconds:
        words.append(f"{seconds / 60:,.1f} minutes")
    if not run.series:
        words.append("no training log")
    elif not any(metric.startswith("recycle/") for metric in run.series):
        words.append("no recycling: plain GRPO")
    return words


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(name, start, end) of a run's main numbers."""
    ends = {label: start_and_end(run, metric) for metric, label in TILES}
    return [(label, number(pair[0]), number(pair[1])) for label, pair in ends.items() if pair]


def rollouts(run: Run, several: bool) -> list[Row]:
    """Cards of the last steps and of the first ones; half as many where there are several runs."""
    return [
        {"when": when, **card(row)}
        for when, count in (("late", LATE), ("early", EARLY))
        for row in draw_rollouts(run, when == "late", count // 2 if several else count)
    ]


def before_after(metrics: Row) -> Row:
    """metrics.json as a table; every column whose values are {mean, n, interval} is shown."""
    table = [row for row in metrics.get("table", []) if isinstance(row, dict)]
    columns = list(dict.fromkeys(k for row in table for k, v in row.items() if isinstance(v, dict) and "mean" in v))
    rows = []
    for row in table:
        cells = [row[column] if isinstance(row.get(column), dict) else {} for column in columns]
        shares = [share for share in (row.get("random"), *(cell.get("mean") for cell in cells)) if share is not None]
        rows.append({**row, "cells": cells, "drawn": all(0 <= share <= 1 for share in shares)})
    settings = ", ".join(f"{name} {value}" for name, value in (metrics.get("settings") or {}).items())
    return {"columns": columns, "rows": rows, "settings": settings}


def page(runs: list[Run], tables: list[tuple[str, Row]], results: list[Row]) -> str:
    """The page. Whatever goes into the template has its invisible characters written out and is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),  # Markup: a macro's output
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shorten"] = shorten
    sections = [
        {"name": run.name, "facts": facts(run), "tiles": tiles(run), "rollouts": rollouts(run, len(runs) > 1),
         "settings": sorted(run.settings.items())} for run in runs
    ]  # fmt: skip
    curves = by_seed(runs)
    return environment.get_template("report.html.jinja").render(
        runs=sections,
        tasks=TASK_TITLES,
        differences=differences(runs),
        tables=[{"name": name, **before_after(metrics)} for name, metrics in tables],
        pictures=pictures(curves) if any(run.series for run in curves) else [],
        results=results,
        notes=[f"{run.name}: {note}" for run in runs for note in dict.fromkeys(run.notes)],
    )


def write_report(
    run_dirs: Sequence[str | Path], output: str | Path, metrics: Row | None = None, results: Sequence[str | Path] = ()
) -> Path:
    """Write `output` and OUTPUT_curves.png for the runs.

    Args:
        metrics: a before/after table instead of the runs' own.
        results: files of evaluate.py.

    Raises BadInput for a folder that is no run, and a file that has no such results.
    """
    runs, output = read_runs(list(run_dirs)), Path(output)
    tables = [("", metrics)] if metrics else [(f": {r.name}" * (len(runs) > 1), r.metrics) for r in runs if r.metrics]
    written = page(runs, tables, results_pictures(results) if results else [])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(written, encoding="utf-8")
    if any(run.series for run in runs):
        draw(PANELS, by_seed(runs), output.with_name(f"{output.stem}_curves.png"))
    return output


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a train_spark.py output_dir")
    parser.add_argument("--results", nargs="+", default=(), metavar="FILE", help="results of evaluate.py")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    args = parser.parse_args()
    try:
        print(write_report(args.run_dirs, args.output, results=args.results))
    except (BadInput, OSError) as error:
        return refuse("report.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
