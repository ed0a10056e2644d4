"""What is drawn of runs and results."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.rows import BadInput
from reporting.hostile import data_uri, visible
from reporting.runs import Row, Run

MAX_POINTS = 400  # of one curve


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
JUDGED = (("judge/pointwise/balanced_accuracy", "one answer, balanced"), ("judge/pairwise/accuracy", "pairs"))

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


def draw(runs: list[Run], file) -> None:
    """All panels as one PNG."""
    figure, axes = grid_of_axes(len(PANELS), legend_entries(PANELS, runs), "light")
    for ax, panel in zip(axes, PANELS, strict=False):
        draw_panel(ax, panel, runs, "light")
        ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    for ax in axes[len(PANELS) :]:
        ax.axis("off")
    figure.savefig(file, format="png", dpi=150)


def start_and_end(run: Run, metric: str) -> tuple[float, float] | None:
    """The means of a metric's first and last tenth."""
    _, values = run.series.get(metric, ((), ()))
    if not values:
        return None
    n = max(len(values) // 10, 1)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


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
