"""One web page about one run or several: what was learned, as curves, and what was written, as rollouts.

    python report.py RUN_DIR [RUN_DIR ...] --output report.html

A run is what train_spark.py leaves in its output_dir: trainer_state.json (of an interrupted run, the one in its newest
checkpoint) and completions/*.parquet. A metrics.json (demo.py's before/after table) is shown where there is one. What
a run has not logged is said to be absent.

The page is one file without scripts or links to anything, and REPORT_curves.png beside it holds the curves. Whatever
a model wrote is hostile until shown otherwise: text is escaped and its invisible characters are made visible, images
are decoded and encoded anew, and the page's own policy forbids scripts and requests.
"""

import argparse
import base64
import html
import io
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import verify
from data.rows import BadInput

Row = dict[str, Any]
STATES = ("trainer_state.json", "checkpoint-*/trainer_state.json")
LATE, EARLY = 4, 1  # cards of each task from the end of a run, and from its start
MAX_CHARS = 1500  # of one text on a card


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
    Panel("Judging one answer", "Balanced: right and wrong candidates count alike, so Yes to everything earns 0.5.", (
        ("judge/pointwise/balanced_accuracy", "balanced accuracy"), ("judge/pointwise/accuracy", "accuracy")), 0.5),
    Panel("Judging a pair", "Which of two answers is right? One of them is.", (
        ("judge/pairwise/accuracy", "accuracy"),), 0.5),
    Panel("Leaning of the judge", "Unbiased, it says right as often as it is so and picks the first half the time.", (
        ("judge/pointwise/positive_rate", "says right"), ("judge/pointwise/label_rate", "is right"),
        ("judge/pairwise/first_rate", "picks the first")), 0.5),
    Panel("Reflecting", "Wrong answers that came out right when the model was asked to look again.", (
        ("reflection/fix_rate", "fix rate"),)),
    Panel("Questions without contrast", "All G rollouts earned the same, so nothing can be learned from them.", (
        ("frac_reward_zero_std", "share"),)),
    Panel("Recycled prompts", "Prompts a step: used, kept for the next, out of date, and unusable.", (
        ("recycle/items", "used"), ("recycle/carried", "carried"), ("recycle/expired", "expired"),
        ("recycle/skipped", "skipped")), share=False),
    Panel("Unreadable output", "Answers without a box, judgements without a verdict.", (
        ("policy/unboxed", "no boxed answer"), ("judge/unparsed", "no verdict")), share=False),
    Panel("Entropy", "Nats a token; near 0 the policy no longer explores.", (("entropy", "entropy"),), share=False),
    Panel("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),), share=False),
    Panel("Length of answers", "Tokens a policy rollout.", (("completions/mean_length", "tokens"),), share=False),
    Panel("Seconds a step", "All of a step, and what rewriting rollouts into prompts takes of it.", (
        ("step_time", "step"), ("recycle/seconds", "rewriting")), share=False),
)  # fmt: skip
TILES = (  # what a run is summed up by
    ("policy/accuracy", "answers right"),
    ("judge/pointwise/balanced_accuracy", "one answer judged, balanced"),
    ("judge/pairwise/accuracy", "pairs judged"),
    ("reflection/fix_rate", "wrong answers fixed"),
)
TASKS = {
    "answer": "Answer",
    "pointwise": "Judge one answer",
    "pairwise": "Judge a pair",
    "reflection": "Look again",
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading runs


@dataclass
class Run:
    """What one run left behind. `series` is metric -> (steps, values), `tables` the rollouts by (kind, step)."""

    name: str
    state: Row = field(default_factory=dict)
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    tables: dict[str, list[Path]] = field(default_factory=dict)
    metrics: Row | None = None
    notes: list[str] = field(default_factory=list)


def read_runs(paths: list[str | Path]) -> list[Run]:
    """The runs in `paths`, with names that tell them apart. A folder that only holds runs (runs/demo) stands for them.

    Raises BadInput for a folder that is no run, or a log that is not JSON.
    """
    found: list[Path] = []
    outer: dict[Path, Row] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise BadInput(f"{path}: no such folder; expected a run's output_dir")
        inside = [path] if is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and is_run(p))
        if not inside and not (path / "metrics.json").exists():
            raise BadInput(f"{path}: not a run: expected trainer_state.json, checkpoint-*/ or completions/ in it")
        if inside and inside != [path] and (path / "metrics.json").exists():
            outer[inside[0]] = read_json(path / "metrics.json")
        found += inside or [path]
    parts = [path.resolve().parts for path in found]
    depth = next((n for n in range(1, 10) if len({p[-n:] for p in parts}) == len(parts)), 1)
    runs = [read_run(path, "/".join(p[-depth:])) for path, p in zip(found, parts, strict=True)]
    for path, run in zip(found, runs, strict=True):
        run.metrics = run.metrics or outer.get(path)
    return runs


def is_run(path: Path) -> bool:
    return any(any(path.glob(glob)) for glob in (*STATES, "completions/*.parquet"))


def read_run(path: Path, name: str) -> Run:
    states = [read_json(p) for glob in STATES for p in path.glob(glob)]
    run = Run(name, max(states, key=lambda state: state.get("global_step", 0), default={}))
    for entry in run.state.get("log_history", []):
        for key, value in entry.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = run.series.setdefault(key, ([], []))
                steps.append(entry.get("step", 0))
                values.append(float(value))
    for kind in ("recycled", "completions"):
        run.tables[kind] = sorted((path / "completions").glob(f"{kind}_*.parquet"))
    if (path / "metrics.json").exists():
        run.metrics = read_json(path / "metrics.json")
    return run


def read_json(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: expected JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return content


def read_table(path: Path, task: str | None, notes: list[str]) -> list[Row]:
    """The rollouts of one step as rows, each with its item's images and the rewards of the item's other rollouts."""
    import pandas as pd

    try:
        rows = pd.read_parquet(path).to_dict("records")
        items: list[list[Row]] = []
        for row in rows:
            images = list(row.get("images") if row.get("images") is not None else [])
            row["task"] = str(row.get("task") or task)
            row["prompt"], row["completion"] = last_text(row["prompt"]), last_text(row["completion"])
            same = items and (row["task"], row["prompt"]) == (items[-1][0]["task"], items[-1][0]["prompt"])
            if images or not same:  # images come with the first rollout of an item only
                items.append([])
            if "reward" not in row:  # TRL's table has a column for each reward function, by its name
                row["reward"] = next(v for k, v in row.items() if isinstance(v, float) and k != "advantage")
            row["images"] = images if images or not items[-1] else items[-1][0]["images"]
            items[-1].append(row)
    except Exception as error:  # a file cut off by a crash must not cost the report
        notes.append(f"{path.name} could not be read ({type(error).__name__})")
        return []
    for item in items:
        for row in item:
            row["group"] = [other["reward"] for other in item]
    return [row for item in items for row in item]


def last_text(prompt) -> str:
    """The text of a prompt or completion: a string, or the last of its messages."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def draw_rollouts(run: Run, late: bool, count: int) -> list[Row]:
    """`count` rollouts of each task, each of another item: a random draw, always the same one, not a selection."""
    kind = "recycled" if run.tables["recycled"] else "completions"
    files = run.tables[kind]
    if not late and len(files) < 2:
        return []
    rows: dict[str, list[Row]] = {}
    for path in (files[::-1] if late else files)[:4]:
        table = read_table(path, "answer" if kind == "completions" else None, run.notes)
        random.Random(path.name).shuffle(table)
        for row in table:
            drawn = rows.setdefault(row["task"], [])
            if len(drawn) < count and all(row["prompt"] != other["prompt"] for other in drawn):
                drawn.append(row)
        if rows and all(len(drawn) == count for drawn in rows.values()):
            break
    return [row for task in sorted(rows, key=lambda t: [*TASKS, t].index(t)) for row in rows[task]]


# ---------------------------------------------------------------------------------------------------------------------
# Curves

# Okabe and Ito's colours, told apart with every kind of colour vision; lighter ones on a dark page.
COLOURS = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#b0559a", "#8a6d00", "#3a9bd9"],
    "dark": ["#5bb8f0", "#ff9248", "#2fcf9f", "#eb9fcb", "#f0e442", "#9bb4ff"],
}
INK = {"light": ("#ffffff", "#1f2328", "#d6dbe1"), "dark": ("#171c23", "#e6e9ee", "#37404b")}  # paper, ink, grid
DASHES = ["-", (0, (5, 2)), (0, (1.2, 1.5)), (0, (6, 2, 1, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P"]


def smooth(values: list[float]) -> list[float]:
    """Each point's neighbourhood mean (a Gaussian over about a tenth of the run), which does not lag behind."""
    import numpy as np

    y = np.asarray(values)
    width = max(len(y) / 25, 0.5)
    reach = min(int(4 * width) + 1, len(y) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(y, kernel)[reach : reach + len(y)]
    return (total / np.convolve(np.ones_like(y), kernel)[reach : reach + len(y)]).tolist()


def draw_panel(ax, panel: Panel, runs: list[Run], theme: str) -> None:
    """Raw points faint, a smoothed line over them. Several runs: a colour and a marker each, a dash for each metric."""
    from matplotlib.lines import Line2D

    (paper, ink, grid), colours, several = INK[theme], COLOURS[theme], len(runs) > 1
    legend = {}
    for m, (metric, label) in enumerate(panel.lines):
        dash = DASHES[m % len(DASHES)]
        for r, run in enumerate(runs):
            if metric not in run.series:
                continue
            steps, values = run.series[metric]
            look = {"color": colours[(r if several else m) % len(colours)], "linestyle": dash, "linewidth": 1.9}
            if several:
                every = max(len(steps) // 4, 1)
                look |= {
                    "marker": MARKERS[r % len(MARKERS)],
                    "markersize": 4.5,
                    "markevery": (every * r // len(runs), every),
                }
            ax.plot(steps, values, ".", color=look["color"], alpha=0.28, markersize=3.5, rasterized=True)
            ax.plot(steps, smooth(values), **look)
            if len(panel.lines) > 1:
                legend[label] = Line2D([], [], color=ink if several else look["color"], linestyle=dash, linewidth=1.9)
    for r, run in enumerate(runs if several and ax.lines else []):
        look = {"color": colours[r % len(colours)], "marker": MARKERS[r % len(MARKERS)], "linewidth": 1.9}
        legend[" " + visible(run.name)[-28:]] = Line2D([], [], **look)
    if not ax.lines:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color=ink)
    if panel.chance is not None:
        ax.axhline(panel.chance, color=ink, linewidth=0.9, linestyle=(0, (2, 3)), alpha=0.7)
        ax.annotate("chance", (1, panel.chance), (-2, 2), ("axes fraction", "data"), "offset points",
                    ha="right", va="bottom", fontsize=8, color=ink)  # fmt: skip
    ax.set_ylim(*((-0.03, 1.03) if panel.share else (min(0, ax.get_ylim()[0]), None)))
    ax.set_facecolor(paper)
    ax.set_xlabel("step", fontsize=8, color=ink, loc="right", labelpad=1)
    ax.tick_params(labelsize=8, colors=ink, length=0)
    ax.grid(color=grid, linewidth=0.7)
    ax.spines[:].set_visible(False)
    if legend:
        box = ax.legend(legend.values(), legend, loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=2, fontsize=8,
                        frameon=False, labelcolor=ink, handlelength=2.4, borderaxespad=0)  # fmt: skip
        for text in box.get_texts():
            text.set_parse_math(False)  # a run may be called $x$


def draw(panels: Sequence[Panel], runs: list[Run], theme: str, file, kind: str) -> None:
    """`panels` in up to three columns, written to `file`; one panel alone has its title in the page."""
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    # In inches, so that all axes are of one size, whatever the room below them for legends.
    names = max(len(panel.lines) for panel in panels)
    entries = names * (names > 1) + len(runs) * (len(runs) > 1)
    title, legend = 0.3 * (len(panels) > 1) + 0.08, 0.4 + 0.17 * math.ceil(entries / 2) + 0.1 * (entries > 0)
    wide, high, gap = 4.2 * columns, rows * (2.2 + title + legend), 0.5
    fig = Figure(figsize=(wide, high), facecolor=INK[theme][0])
    axes = fig.subplots(rows, columns, squeeze=False)
    inner = (wide - 0.1 - gap * columns) / columns
    fig.subplots_adjust(
        gap / wide, legend / high, 1 - 0.1 / wide, 1 - title / high, gap / inner, (title + legend) / 2.2
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        draw_panel(ax, panel, runs, theme)
        if len(panels) > 1:
            ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    fig.savefig(file, format=kind, dpi=150)


def picture(panel: Panel, runs: list[Run]) -> str:
    """A panel for light and for dark pages, with what it shows in words."""
    head = f"<h3>{esc(panel.title)}</h3>"
    if not any(metric in run.series for run in runs for metric, _ in panel.lines):
        return f"<figure class=panel>{head}<p class=absent>not logged</p></figure>"
    sources = {}
    for theme in ("light", "dark"):
        with io.BytesIO() as file:
            draw([panel], runs, theme, file, "svg")
            sources[theme] = data_uri(file.getvalue(), "svg+xml")
    said = [
        f"{run.name} {label} from {number(ends[0])} to {number(ends[1])}"
        for run in runs
        for metric, label in panel.lines
        if (ends := start_and_end(run, metric))
    ]
    return (
        f'<figure class=panel>{head}<picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{esc(panel.title)}: {esc("; ".join(said))}"></picture>'
        f"<figcaption>{esc(panel.about)}</figcaption></figure>"
    )


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


def esc(text) -> str:
    """Fit for an element or a quoted attribute."""
    return html.escape(visible(text), quote=True)


def shorten(text: str) -> str:
    """The beginning and the end, for the verdict comes last."""
    left_out = len(text) - MAX_CHARS
    if left_out <= 0:
        return text
    return f"{text[: MAX_CHARS * 2 // 3]}\n[... {left_out:,} characters left out ...]\n{text[-MAX_CHARS // 3 :]}"


def block(text: str, kind: str) -> str:
    return f'<div class="text {kind}" dir="auto">{esc(shorten(text.strip()))}</div>'


def image(data) -> str:
    """PNG bytes as an image tag, encoded anew from their pixels; a note where they are no image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(bytes(data)), formats=["PNG"]) as opened:
            if max(opened.size) > 4096:
                raise ValueError(f"{opened.size} is too large for a thumbnail")
            pixels = opened.convert("RGB")
        pixels.thumbnail((320, 320))
        with io.BytesIO() as file:
            pixels.save(file, format="PNG", optimize=True)
            return f'<img src="{data_uri(file.getvalue(), "png")}" alt="The image the question is about">'
    except Exception as error:  # whatever a decoder may raise on bytes made to break it
        return f"<p class=absent>image can't be shown ({esc(type(error).__name__)})</p>"


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the page


def badge(reward: float) -> str:
    if math.isnan(reward):
        return '<span class="badge none">– not scored</span>'
    return '<span class="badge right">✓ right</span>' if reward >= 1 else '<span class="badge wrong">✗ wrong</span>'


def card(row: Row) -> str:
    """One rollout: the image, the question, what the model was shown, what it wrote, and whether that was right."""
    prompt = row["prompt"]
    quoted = list(_QUOTED.finditer(prompt))
    question, _, before = prompt[: quoted[0].start()].rpartition("\n\n") if quoted else (prompt, "", "")
    asked = " … ".join(part for part in (before.strip(), prompt[quoted[-1].end() :].strip()) if part) if quoted else ""
    truth = [bool(t) for t in row["shown_correct"]] if row.get("shown_correct") is not None else []
    shown = ""
    for i, found in enumerate(quoted):
        letter = f"{found[1][-1].upper()}: " if found[1] != "response" else ""
        mark = "" if i >= len(truth) else " ✓ is right" if truth[i] else " ✗ is wrong"
        shown += f"<h4>{letter}Shown<span class=truth>{mark}</span></h4>" + block(found[2], "shown")
    label = row.get("label")
    answered = verify.extract_boxed(row["completion"])
    said = f"answered <b>{esc(shorten(answered))}</b>" if answered is not None else "<b>no boxed answer</b>"
    if isinstance(label, str):
        said += f", should be <b>{esc(shorten(label))}</b>"
    group = [reward for reward in row["group"] if not math.isnan(reward)]
    if len(group) > 1:
        right = sum(reward >= 1 for reward in group)
        said += f" · {right} of {len(group)} tries right"
        if len(group) <= 16:
            said += f" <span class=dots aria-hidden=true>{'●' * right}{'○' * (len(group) - right)}</span>"
    return (
        f"<article class=card><header><b>{esc(TASKS.get(row['task'], row['task']))}</b>"
        f"<span class=step>step {esc(row.get('step', '?'))}</span>{badge(row['reward'])}</header>"
        f"<div class=cols>{''.join(map(image, row['images']))}<div class=question><h4>Question</h4>"
        f"{block(question, 'asked')}</div></div>{shown}"
        + (f"<p class=instruction dir=auto>{esc(shorten(asked))}</p>" if asked else "")
        + f"<h4>The model wrote</h4>{block(row['completion'], 'wrote')}<footer>{said}</footer></article>"
    )


def cards(run: Run, late: int) -> str:
    parts = []
    for title, is_late, count in (("Late in training", True, late), ("At the start, for contrast", False, EARLY)):
        rows = draw_rollouts(run, is_late, count)
        if rows:
            parts.append(f"<h4 class=when>{title}</h4><div class=cards>{''.join(map(card, rows))}</div>")
    body = "".join(parts) or "<p class=absent>No rollouts were kept (log_completions was off).</p>"
    return f"<h3>{esc(run.name)}</h3>{body}"


def facts(run: Run) -> str:
    """A run in one box: how far it went, what it cost, and where its main numbers started and ended."""
    import pyarrow.parquet as pq

    done, planned = run.state.get("global_step"), run.state.get("max_steps")
    words = []
    if done is not None:
        words.append(f"{done:,} steps" if done == planned or not planned else f"{done:,} of {planned:,} steps so far")
    for kind, name in (("completions", "policy rollouts"), ("recycled", "recycled rollouts")):
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
    tiles = "".join(
        f"<div class=tile><span>{label}</span><b>{number(ends[0])} → {number(ends[1])}</b></div>"
        for metric, label in TILES
        if (ends := start_and_end(run, metric))
    )
    if not run.series:
        words.append("no training log")
    elif not any(metric.startswith("recycle/") for metric in run.series):
        words.append("no recycling: plain GRPO")
    about = f"<h3>{esc(run.name)}</h3><p>{esc(' · '.join(words))}</p>"
    return f"<section class=run>{about}<div class=tiles>{tiles}</div></section>"


def before_after(metrics: Row) -> str:
    """metrics.json as a table; every column whose values are {mean, n, interval} is shown."""
    table = [row for row in metrics.get("table", []) if isinstance(row, dict)]
    columns = list(dict.fromkeys(k for row in table for k, v in row.items() if isinstance(v, dict) and "mean" in v))
    head = "".join(f'<th scope="col"><i class="key k{i % 4}"></i>{esc(c)}</th>' for i, c in enumerate(columns))
    body = ""
    for row in table:
        values = [row.get(c) if isinstance(row.get(c), dict) else {} for c in columns]
        chance = row.get("random")
        cells = "".join(
            f'<td data-column="{esc(c)}">{measured(v, values[0] if i else {})}</td>'
            for i, (c, v) in enumerate(zip(columns, values, strict=True))
        )
        note = f"<small>{esc(row['note'])}</small>" if row.get("note") else ""
        body += (
            f'<tr><th scope="row">{esc(row.get("measure", ""))}{note}</th><td class=plot>{strip(values, chance)}</td>'
            f'{cells}<td data-column="random judge">{"–" if chance is None else f"{chance:.3f}"}</td></tr>'
        )
    settings = ", ".join(f"{k} {v}" for k, v in (metrics.get("settings") or {}).items())
    return (
        f'<div class=wide><table><thead><tr><th scope="col">measure</th><th scope="col" class=plot>0 to 1, with 95 % '
        f'interval</th>{head}<th scope="col"><i class="key tick"></i>random judge</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div><p class=small>{esc(settings)}</p>"
    )


def measured(value: Row, first: Row) -> str:
    if value.get("mean") is None:
        return "–"
    change = value["mean"] - first["mean"] if first.get("mean") is not None else None
    low, high = value.get("interval") or (None, None)
    return (
        f"<b>{value['mean']:.3f}</b>"
        + (f" <span class=change>{change:+.3f}</span>" if change is not None else "")
        + (f"<small>{low:.3f} to {high:.3f}, n = {esc(value.get('n', '?'))}</small>" if low is not None else "")
    )


def strip(values: list[Row], chance: float | None) -> str:
    """The columns' means and intervals on one line from 0 to 1. Beside the figures it says nothing new to a reader."""
    shares = [share for share in (chance, *(v.get("mean") for v in values)) if share is not None]
    if not all(0 <= share <= 1 for share in shares):
        return ""
    marks = f'<i class=tick style="left:{chance * 100:.2f}%"></i>' if chance is not None else ""
    for i, value in enumerate(values):
        if value.get("mean") is None:
            continue
        low, high = (min(max(x, 0), 1) * 100 for x in value.get("interval") or (value["mean"], value["mean"]))
        top = (i + 1) / (len(values) + 1) * 100  # a lane each, so that none hides another
        marks += f'<i class="bar k{i % 4}" style="left:{low:.2f}%;width:{high - low:.2f}%;top:{top:.0f}%"></i>'
        marks += f'<i class="dot k{i % 4}" style="left:{value["mean"] * 100:.2f}%;top:{top:.0f}%"></i>'
    return f"<div class=strip aria-hidden=true>{marks}</div>"


# ---------------------------------------------------------------------------------------------------------------------
# The page

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1f2328; --soft: #57606a; --line: #d6dbe1;
  --right: #116b3a; --right-bg: #dcf5e5; --wrong: #a3241b; --wrong-bg: #fde4e1; --none-bg: #e7eaee; --quote: #f1f4f8;
  --k0: #57606a; --k1: #0072b2; --k2: #b34e00; --k3: #8a3d7a }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --card: #171c23; --ink: #e6e9ee; --soft: #a5b0bd;
  --line: #37404b; --right: #7ee2a8; --right-bg: #12361f; --wrong: #ffa198; --wrong-bg: #4a1512; --none-bg: #2b333d;
  --quote: #1f2630; --k0: #a5b0bd; --k1: #5bb8f0; --k2: #ff9248; --k3: #eb9fcb } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 } h2 { margin: 2.8rem 0 .6rem; font-size: 1.35rem }
h3 { margin: .2rem 0 } h4 { margin: .7rem 0 .2rem; font-size: .78rem; color: var(--soft); font-weight: 600 }
.lead, .about { max-width: 46rem; color: var(--soft) } .small, small { font-size: .8rem; color: var(--soft) }
small { display: block; font-weight: 400 } .absent { color: var(--soft); font-style: italic }
.runs, .tiles, .grid, .cards { display: grid; gap: 1rem }
.runs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.run, .panel, .card, .wide { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 1rem }
.run p { margin: .1rem 0 .8rem; color: var(--soft); font-size: .9rem }
.tiles { grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .6rem }
.tile { background: var(--quote); border-radius: 8px; padding: .5rem .7rem } .tile span { display: block;
  font-size: .78rem; color: var(--soft) } .tile b { font-size: 1.3rem; font-variant-numeric: tabular-nums }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.panel { margin: 0; padding: .6rem } .panel h3 { font-size: 1rem; padding: 0 .4rem }
.panel img { width: 100%; height: auto; display: block }
figcaption { font-size: .8rem; color: var(--soft); padding: 0 .4rem .3rem }
.wide { overflow-x: auto; padding: .3rem 1rem } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .5rem .6rem; border-top: 1px solid var(--line); vertical-align: middle;
  font-variant-numeric: tabular-nums } thead th { border: 0; font-size: .8rem; color: var(--soft) }
td small { white-space: nowrap } .change { font-size: .85rem; color: var(--soft) } td.plot { min-width: 13rem }
.strip { position: relative; height: 2.6rem;
  background: linear-gradient(var(--line), var(--line)) center/100% 1px no-repeat }
.strip i { position: absolute; top: 50%; transform: translate(-50%, -50%) }
.strip .bar { height: .45rem; opacity: .35; transform: translateY(-50%); background: currentColor; border-radius: 3px }
.dot, .key { width: .8rem; height: .8rem; border-radius: 50%; border: 2.5px solid currentColor;
  background: currentColor }
.dot { box-shadow: 0 0 0 1.5px var(--card) }
.key { display: inline-block; margin-right: .4rem; vertical-align: -1px } .k0 { color: var(--k0) }
.k1 { color: var(--k1) } .k2 { color: var(--k2) } .k3 { color: var(--k3) } .dot.k0, .key.k0 { background: var(--card) }
.dot.k2, .key.k2 { border-radius: 0 } .dot.k3, .key.k3 { border-radius: 0 100% 0 100% }
.strip .tick { height: 100% } .tick { width: 2px; height: .9rem; background: var(--ink); border: 0; border-radius: 0 }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.when { font-size: 1rem; color: var(--ink); margin: 1.2rem 0 .5rem } .card { padding: .8rem 1rem; min-width: 0 }
.card header { display: flex; gap: .6rem; align-items: baseline; margin-bottom: .6rem } .step { color: var(--soft);
  font-size: .8rem; white-space: nowrap } .card header b { flex: 1; font-size: .9rem }
.badge { white-space: nowrap; border-radius: 99px; padding: .1rem .6rem; font-size: .8rem; font-weight: 700 }
.badge.right { color: var(--right); background: var(--right-bg) } .badge.none { background: var(--none-bg) }
.badge.wrong { color: var(--wrong); background: var(--wrong-bg) }
.cols { display: flex; gap: .8rem; flex-wrap: wrap } .cols h4 { margin-top: 0 } .question { flex: 1 1 6rem }
.cols img { width: 7rem; height: auto; max-height: 12rem; object-fit: contain; border-radius: 6px; align-self: start;
  border: 1px solid var(--line); image-rendering: pixelated }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 16rem; overflow-y: auto }
.shown, .wrote { font: .85rem/1.5 ui-monospace, monospace; padding: .45rem .7rem; border-radius: 6px;
  background: var(--quote) }
.shown { border-left: 3px solid var(--soft) } .wrote { border-left: 3px solid var(--k1) } .truth { font-weight: 400 }
.instruction { font-size: .85rem; color: var(--soft); margin: .5rem 0 0 } .card footer { margin-top: .7rem;
  font-size: .85rem } .dots { letter-spacing: .1em; color: var(--soft); display: block }
@media (max-width: 46rem) { table, tbody, tr, tbody th, td { display: block }
  thead tr { display: flex; flex-wrap: wrap }
  thead th.plot, thead th:first-child { display: none } tbody th, td { border: 0; padding: .15rem 0 }
  tbody tr { padding: .6rem 0; border-top: 1px solid var(--line) } td[data-column]::before { content: attr(data-column);
    display: inline-block; min-width: 7rem; color: var(--soft); font-size: .8rem }
  td small { margin-left: 7rem; white-space: normal } }
"""


def page(runs: list[Run], tables: list[tuple[str, Row]]) -> str:
    names = ", ".join(run.name for run in runs)
    parts = [
        "<h1>SPARK run report</h1><p class=lead>One model learns three things from the same verifiable rewards: to "
        "answer a question, to judge answers, and to look again at a wrong one. Its own scored rollouts become the "
        "judge and reflection prompts of the same step. Arrows go from the first tenth of a run to its last.</p>"
        f"<div class=runs>{''.join(map(facts, runs))}</div>"
    ]
    for name, metrics in tables:
        parts.append(f"<h2>Before and after{esc(name)}</h2>{before_after(metrics)}")
    about = "Points are steps, lines their smoothed course. Rates are over the training rollouts of a step."
    parts.append(f"<h2>Curves</h2><p class=about>{about}</p>")
    if any(run.series for run in runs):
        parts.append(f"<div class=grid>{''.join(picture(panel, runs) for panel in PANELS)}</div>")
    else:
        parts.append("<p class=absent>No training log was found.</p>")
    about = (
        "A random draw from the first and the last steps, not a selection. Whether a shown answer is right is the "
        "verifier's word; the model was not told."
    )
    parts.append(f"<h2>Rollouts</h2><p class=about>{about}</p>")
    parts += [cards(run, LATE if len(runs) == 1 else max(LATE // 2, 1)) for run in runs]
    notes = [f"{run.name}: {note}" for run in runs for note in dict.fromkeys(run.notes)]
    parts.append("".join(f"<p class=absent>{esc(note)}</p>" for note in notes))
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name=viewport content="width=device-width, initial-scale=1"><title>'
        f"{esc(names)} · SPARK run report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def write_report(run_dirs: list[str | Path], output: str | Path, metrics: Row | None = None) -> Path:
    """Write `output` and OUTPUT_curves.png for the runs; `metrics` is a before/after table instead of the runs' own.

    Raises BadInput for a folder that is no run.
    """
    runs, output = read_runs(list(run_dirs)), Path(output)
    tables = [("", metrics)] if metrics else [(f": {r.name}" * (len(runs) > 1), r.metrics) for r in runs if r.metrics]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs, tables), encoding="utf-8")
    if any(run.series for run in runs):
        draw(PANELS, runs, "light", output.with_name(f"{output.stem}_curves.png"), "png")
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a train_spark.py output_dir")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    args = parser.parse_args()
    try:
        print(write_report(args.run_dirs, args.output))
    except (BadInput, OSError) as error:
        print(f"report.py: {' '.join(visible(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
