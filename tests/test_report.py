"""report.py on runs made for the purpose, among them rollouts that attack the page; looked at by a real browser."""

import base64
import html
import io
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from browser import CHROMIUM, browser
from helpers import png
from PIL import Image

import report
from recycle import pairwise_instruction, pointwise_instruction, reflection_instruction
from report import BadInput, write_report
from reporting import curves
from reporting.curves import co_evolution, smooth
from reporting.hostile import image
from reporting.runs import TASK_TITLES, Run, by_seed, draw_rollouts, read_runs, read_table

HOSTILE = (
    "<script>document.title='PWNED'</script></style></title></div><img src=x onerror=\"document.title='PWNED'\">"
    "\" onmouseover='alert(1)' &lt;b&gt; \u202eevil\u202c \x00 \x1b[2J javascript:alert(1) \\boxed{Yes}"
)


def rollouts(step, per_task=3, group=4, text=None, image=None):
    """A step's table as train_spark.py writes it: images with the first rollout of an item only."""
    rows = []
    for task in ("pointwise", "pairwise", "reflection"):
        for i in range(per_task):
            made = {
                "pointwise": lambda i: pointwise_instruction(f"shown {i}", i % 9),
                "pairwise": lambda i: pairwise_instruction(f"one {i}", f"other {i}", i % 9),
                "reflection": lambda i: reflection_instruction(f"wrong {i}", "cot", i % 9),
            }[task](i)
            for g in range(group):
                rows.append({
                    "step": step, "task": task, "prompt": f"What is\n\nquestion {i}?\n\n{made}",
                    "completion": text or f"{task} {step} {i} so \\boxed{{Yes}}",
                    "label": {"pointwise": "Yes", "pairwise": "A"}.get(task), "reward": float(g == 0), "advantage": 0.5,
                    "shown_correct": {"pointwise": [True], "pairwise": [True, False]}.get(task, [False]),
                    "images": [image or png()] if g == 0 else [],
                })  # fmt: skip
    return pd.DataFrame(rows)


def history(steps, spark=True):
    log = []
    for step in range(1, steps + 1):
        entry = {
            "step": step,
            "policy/accuracy": 0.5 if step < 10 else 0.7,
            "entropy": 1.0,
            "step_time": 2.0,
            "num_tokens": step * 10.0,
        }
        if spark:
            entry |= {"judge/pointwise/balanced_accuracy": 0.6, "recycle/items": 8.0, "grad_norm": float("nan")}
        log.append(entry)
    return [*log, {"step": steps, "train_runtime": 90.0, "train_loss": 0.1}]


def make_run(path, steps=20, spark=True, tables=(1, 20), **more):
    (path / "completions").mkdir(parents=True)
    state = {"global_step": steps, "max_steps": steps, "log_history": history(steps, spark)}
    (path / "trainer_state.json").write_text(json.dumps(state))
    for step in tables:
        if spark:
            rollouts(step, **more).to_parquet(path / "completions" / f"recycled_{step:05d}.parquet")
        policy = [{
            "step": step, "prompt": [{"role": "user", "content": [{"type": "text", "text": f"Policy question {i}"}]}],
            "completion": [{"role": "assistant", "content": f"\\boxed{{{i}}}"}], "answer_reward": 1.0, "advantage": 0.0,
        } for i in range(6)]  # fmt: skip
        pd.DataFrame(policy).to_parquet(path / "completions" / f"completions_{step:05d}.parquet")
    return path


METRICS = {
    "table": [
        {"measure": "policy accuracy", "start": {"mean": 0.5, "n": 300, "interval": [0.45, 0.55]}, "random": None,
         "note": None,
         "after": {"mean": 0.84, "n": 300, "interval": [0.8, 0.88]}, "grpo": {"mean": 0.8, "n": 300, "interval": None}},
        {"measure": "minus <first>", "start": {"mean": -0.02, "n": 300, "interval": [-0.04, 0.0]}, "random": -0.1,
         "after": None, "note": "a note"},
        {"measure": "never measured", "start": {"mean": None, "n": 0, "interval": None}, "after": None, "random": 0.5},
    ],
    "settings": {"questions": 300},
}  # fmt: skip


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attributes]

    def handle_data(self, data):
        self.words.append(data)


PANELS = curves.PANELS


@pytest.fixture(autouse=True)
def few_panels(monkeypatch):
    """Drawing takes most of a page's time; all of it is drawn where `whole` is asked for."""
    monkeypatch.setattr(curves, "PANELS", curves.PANELS[:1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run's page with every part it can have."""
    folder = tmp_path_factory.mktemp("whole")
    run = make_run(folder / "mine", per_task=6)
    (run / "settings.json").write_text(json.dumps({"model": "models/digits", "learning_rate": 1e-4}))
    return write_report([run], folder / "out" / "report.html", metrics=METRICS)


def cards(path):
    return re.findall(r"<article class=\"card.*?</article>", path.read_text(encoding="utf-8"), re.DOTALL)


def test_a_rollout_that_could_not_be_scored_is_shown_as_such(tmp_path):
    """Parquet has null for no opinion of the verifier, whatever other rewards there are."""
    run = make_run(tmp_path / "mine", tables=())
    table = rollouts(1)
    table.loc[table["task"] == "reflection", "reward"] = float("nan")
    table.to_parquet(run / "completions" / "recycled_00001.parquet")
    rows = [
        {"step": 1, "prompt": f"Policy question {i}", "completion": "7", "answer_reward": reward, "length_reward": 1.0}
        for i, reward in enumerate((1.0, None))
    ]
    pd.DataFrame(rows).assign(advantage=0.0).to_parquet(run / "completions" / "completions_00001.parquet")
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "could not be read" not in page and "Policy question 1" in page
    cards = re.findall(r'<article class="card (\w+) (right|wrong|unscored)', page)
    assert {outcome for kind, outcome in cards if kind == "reflection"} == {"unscored"}
    others = {outcome for kind, outcome in cards if kind not in ("pointwise", "pairwise", "reflection")}
    assert others == {"right", "unscored"}


def test_one_file_with_everything_in_it(whole):
    page = Page(whole)
    for words in ("mine", "20 steps", "12 policy rollouts kept", "144 recycled ones kept",
                  "200 tokens", "1.5 minutes", "0.50 → 0.70", "questions 300", "learning_rate 0.0001"):  # fmt: skip
        assert words in page.text
    addresses = [(value[:11]) for _, name, value in page.attributes if name in ("src", "srcset", "href")]
    assert set(addresses) == {"data:image/"}
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    policy = next(v for t, n, v in page.attributes if n == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    images = [a for a in page.attributes if a[:2] == ("img", "alt")]
    assert len(images) == page.tags.count("img")
    assert all(alt for _, _, alt in images)
    with Image.open(whole.with_name("report_curves.png")) as curves:
        assert curves.width > 1000


def test_alt_text_says_where_a_curve_started_and_ended(whole):
    page = Page(whole)
    assert ("img", "alt", "Answering: mine accuracy from 0.50 to 0.70") in page.attributes
    assert "Judging a pair" in page.text  # nothing logged of it: said, not left out
    assert page.text.count("not logged") == 7


def test_before_and_after_shows_every_column(whole):
    page = Page(whole)
    for words in (
        "start",
        "after",
        "grpo",
        "0.840 +0.340",
        "0.800 to 0.880, n = 300",
        "minus <first>",
        "a note",
        "-0.020",
    ):
        assert words in page.text
    strips = re.findall(r"<div class=strip.*?</div>", whole.read_text(encoding="utf-8"), re.DOTALL)
    assert len(strips) == 2  # a difference has no place between 0 and 1
    assert "left:84.00%" in strips[0]


def test_cards_are_spread_over_tasks_late_and_early(whole):
    found = cards(whole)
    late, early = ([card for card in found if f' {when}">' in card] for when in ("late", "early"))
    assert len(late) + len(early) == len(found)
    assert all("step 20" in card or "step 1<" in card for card in late)
    assert all("step 1<" in card or "step 20" in card for card in early)
    for kind, task in TASK_TITLES.items():
        for cards_then, count in ((late, report.LATE), (early, report.EARLY)):
            there = [card for card in cards_then if f"<b>{task}</b>" in card]
            assert len(there) == min(count, 6) and all(f'class="card {kind} ' in card for card in there)


def test_a_card_shows_what_the_model_saw(whole):
    found = cards(whole)
    pair = html.unescape(re.sub(r"<[^>]*>", " ", next(card for card in found if "Judge a pair" in card)))
    words = " ".join(pair.split())
    i = re.search(r"one (\d)", words)[1]
    for part in (f"Question What is question {i}?", f"A: Shown ✓ is right one {i}", f"B: Shown ✗ is wrong other {i}",
                 "answered Yes , should be A", "1 of 4 tries right ●○○○"):  # fmt: skip
        assert part in words
    assert "<response" not in words
    assert re.search("✓ right|✗ wrong", words)


def test_images_go_to_every_rollout_of_their_item_and_to_no_other(tmp_path):
    table = rollouts(1, per_task=2, group=3)
    colours = iter(["red", "green", "blue", "white", "black", "yellow"])
    table["images"] = [[png(next(colours))] if images else [] for images in table["images"]]
    table.loc[table.index[:6], "prompt"] = "the same words about two images"
    text_only = table.iloc[:3].assign(prompt="no image", images=[[], [], []])
    path = tmp_path / "t.parquet"
    pd.concat([table, text_only]).to_parquet(path)
    rows = read_table(path, None, [])
    assert [row["images"] == [] for row in rows] == [False] * 18 + [True] * 3
    for start in range(0, 18, 3):
        assert len({row["images"][0] for row in rows[start : start + 3]}) == 1
    assert len({row["images"][0] for row in rows[:18]}) == 6
    assert rows[0]["group"] == [1.0, 0.0, 0.0]


def test_rollouts_are_drawn_not_selected(tmp_path):
    run = read_runs([make_run(tmp_path / "mine", per_task=30, group=2)])[0]
    rewards = [row["reward"] for row in draw_rollouts(run, True, 30) if row["task"] != "answer"]
    assert 25 < sum(rewards) < 65  # half of the 90 were right
    again = [[row["completion"] for row in draw_rollouts(run, True, 4)] for _ in range(2)]
    assert again[0] == again[1]


def test_a_task_that_the_newest_file_lacks_is_shown_from_the_others(tmp_path):
    folder = make_run(tmp_path / "mine", per_task=12)
    newest = max((folder / "completions").glob("recycled_*.parquet"))
    table = pd.read_parquet(newest)
    table[table["task"] == "pairwise"].to_parquet(newest)
    tasks = {row["task"] for row in draw_rollouts(read_runs([folder])[0], True, 3)}
    assert tasks == {"answer", "pointwise", "pairwise", "reflection"}


def test_several_runs_and_a_run_without_recycling(tmp_path):
    runs = [
        make_run(tmp_path / "a" / "run"),
        make_run(tmp_path / "b" / "run", spark=False),
        make_run(tmp_path / "$x_$", 5, tables=()),
    ]
    page = Page(write_report(runs, tmp_path / "r.html"))
    for words in ("a/run", "b/run", "$x_$", "no recycling: plain GRPO", "Policy question", "No rollouts were kept"):
        assert words in page.text
    alt = next(v for t, n, v in page.attributes if n == "alt" and v.startswith("Answering"))
    assert "a/run accuracy" in alt
    assert "b/run accuracy" in alt


def test_interrupted_run_takes_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "mine", tables=())
    (run / "trainer_state.json").unlink()
    for steps in (5, 9, 10):
        (run / f"checkpoint-{steps}").mkdir()
        state = {"global_step": steps, "max_steps": 40, "log_history": history(steps)[:-1]}
        (run / f"checkpoint-{steps}" / "trainer_state.json").write_text(json.dumps(state))
    page = Page(write_report([run], tmp_path / "r.html"))
    assert "10 of 40 steps so far" in page.text


def test_a_run_that_goes_on_or_was_killed_is_shown_as_far_as_its_log(tmp_path):
    """Before the first checkpoint there is metrics.jsonl alone; a killed run may have a checkpoint that is cut off."""
    run = tmp_path / "mine"
    run.mkdir()
    lines = [json.dumps({**entry, "recycle/rows": 64.0}) for entry in history(7)[:-1]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "settings.json").write_text(json.dumps({"max_steps": 40}))
    page = Page(write_report([run], tmp_path / "r.html"))
    assert "7 of 40 steps so far" in page.text and "448 recycled rollouts" in page.text
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5, "max')
    page = Page(write_report([run], tmp_path / "r.html"))
    assert "7 of 40 steps so far" in page.text and "checkpoint-5" in page.text


def test_a_folder_of_runs_stands_for_them(tmp_path):
    make_run(tmp_path / "demo" / "spark")
    (tmp_path / "demo" / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "demo" / "other").mkdir()
    page = Page(write_report([tmp_path / "demo"], tmp_path / "r.html"))
    assert "0.840 +0.340" in page.text
    assert "72 recycled ones kept" in page.text


def test_broken_tables_and_images_are_notes(tmp_path):
    run = make_run(tmp_path / "mine", tables=(20,), image=b"\x89PNG\r\n\x1a\nno more")
    (run / "completions" / "recycled_00021.parquet").write_bytes(b"PAR1 cut off")
    page = Page(write_report([run], tmp_path / "r.html"))
    assert "recycled_00021.parquet could not be read" in page.text
    assert "image can't be shown" in page.text
    assert "Judge a pair" in page.text


def test_images_are_encoded_anew():
    hidden = png() + b"<script>alert(1)</script>"
    kind, content = image(hidden)["source"].split(",")
    assert kind == "data:image/png;base64" and b"script" not in base64.b64decode(content)
    gif = io.BytesIO()
    Image.new("RGB", (2, 2)).save(gif, "GIF")
    assert image(gif.getvalue()) == {"error": "UnidentifiedImageError"}
    assert image(None) == {"error": "TypeError"}


def test_smoothing_keeps_a_constant_and_the_ends():
    assert smooth([0.3] * 50) == pytest.approx([0.3] * 50)
    assert smooth([1.0]) == [1.0]
    assert smooth([0.0, 1.0])[0] < 0.5 < smooth([0.0, 1.0])[1]
    line = smooth(list(range(100)))
    assert line[50] == pytest.approx(50)
    assert len(line) == 100


def test_not_a_run_is_one_line_and_status_2(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "trainer_state.json").write_text("{")
    for name, reason in (("empty", "not a run"), ("none", "no such folder"), ("bad", "expected JSON")):
        with pytest.raises(BadInput, match=reason):
            write_report([tmp_path / name], tmp_path / "r.html")
    done = subprocess.run([sys.executable, report.__file__, tmp_path / "empty", "--output", tmp_path / "r.html"],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"report.py: {tmp_path / 'empty'}: not a run: expected metrics.jsonl")
    assert not (tmp_path / "r.html").exists()


def hostile_run(tmp_path):
    path = make_run(tmp_path / "x<img src=x onerror=alert(1)>", text=HOSTILE)
    table = rollouts(30, text=HOSTILE)
    table["task"] = table["task"].replace("reflection", HOSTILE)
    table["prompt"] = [HOSTILE + f"{p}{i // 4}" for i, p in enumerate(table["prompt"])]
    table["label"] = HOSTILE
    table.to_parquet(path / "completions" / "recycled_00030.parquet")
    measured = {"mean": 0.5, "n": HOSTILE, "interval": [0.4, 0.6]}
    table = [{"measure": HOSTILE + "\ud800", "note": HOSTILE, HOSTILE: measured, "random": 0.5}]
    metrics = {"table": table, "settings": {HOSTILE: HOSTILE}}
    return write_report([path], tmp_path / "r.html", metrics=metrics)


def test_hostile_text_stays_text(tmp_path):
    path = hostile_run(tmp_path)
    page = Page(path)
    assert "script" not in page.tags
    assert page.tags.count("style") == page.tags.count("title") == 1
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert page.text.count("<script>document.title='PWNED'</script></style>") > 10
    assert "[U+202E]evil[U+202C] [U+0000]" in page.text
    assert "[U+D800]" in page.text
    assert not re.search(r"[\u202e\x00\x1b]", path.read_text(encoding="utf-8"))


def test_policy_rollouts_with_images_are_shown_too(tmp_path):
    """TRL's table of prompts with parts, as a run on images writes it."""
    run = make_run(tmp_path / "mine", tables=())
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Which digit?"}]
    row = {"step": 1, "prompt": [{"role": "user", "content": content}], "completion": "7", "r": 0.0, "advantage": 0.0}
    pd.DataFrame([row]).to_parquet(run / "completions" / "completions_00001.parquet")
    page = Page(write_report([run], tmp_path / "r.html"))
    assert "Which digit?" in page.text and "could not be read" not in page.text


def test_metrics_jsonl_has_the_steps_that_were_not_logged(tmp_path):
    run = make_run(tmp_path / "mine", tables=())
    lines = [json.dumps({"step": step, "policy/accuracy": step / 40}) for step in range(1, 31)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "pol')
    (read,) = read_runs([run])
    assert read.series["policy/accuracy"] == (list(range(1, 31)), [step / 40 for step in range(1, 31)])
    for line in ("no JSON\n", "3\n"):
        (run / "metrics.jsonl").write_text(line)
        with pytest.raises(BadInput, match=r"metrics.jsonl: expected a JSON object a line"):
            read_runs([run])


def test_runs_that_differ_in_seeds_alone_are_a_band(tmp_path):
    for name, seed, rate in (("a", 1, 0.1), ("b", 2, 0.1), ("c", 1, 0.2)):
        run = make_run(tmp_path / name, tables=())
        accuracy = [{"step": step, "policy/accuracy": rate * seed} for step in range(1, 6 + seed)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in accuracy))
        (run / "settings.json").write_text(json.dumps({"seed": seed, "output_dir": name, "learning_rate": rate}))
    runs = read_runs([tmp_path / name for name in "abc"])
    both, other = by_seed(runs)
    assert (both.name, other.name) == ("a and 1 more seed", "c")
    steps, values = both.series["policy/accuracy"]
    assert steps == [1, 2, 3, 4, 5, 6] and values == pytest.approx([0.15] * 6)
    assert both.spread["policy/accuracy"] == ([0.1] * 6, [0.2] * 6)
    page = Page(write_report([tmp_path / name for name in "abc"], tmp_path / "r.html"))
    assert "What the runs differ in setting a b c learning_rate 0.1 0.1 0.2 seed 1 2 1" in page.text
    alt = next(v for t, n, v in page.attributes if n == "alt" and v.startswith("Answering"))
    assert "a and 1 more seed accuracy from 0.15 to 0.15" in alt


def test_co_evolution_goes_through_the_steps_that_both_have():
    run = Run("x")
    run.series = {"policy/accuracy": ([1, 2, 3], [0.5] * 3), "j": ([2, 3, 4], [0.7] * 3)}
    assert co_evolution(run, "j") == [pytest.approx((0.5, 0.7))] * 2
    assert co_evolution(run, "not logged") == []


def test_what_a_judge_could_get_by_the_question_alone_is_drawn_beside_its_accuracy():
    (panel,) = (panel for panel in PANELS if panel.title == "Judging one answer")
    metrics = ["judge/pointwise/balanced_accuracy", "judge/pointwise/question_only"]
    run = Run("x", series={name: ([1, 2], [0.5, 0.75 + i / 4]) for i, name in enumerate(metrics)})
    _, (ax,) = curves.grid_of_axes(1, 0, "light")
    curves.draw_panel(ax, panel, [run], "light")
    drawn = [list(line.get_ydata()) for line in ax.get_lines()]
    assert [0.5, 0.75] in drawn and [0.5, 1.0] in drawn


def test_steps_are_whole_numbers_on_the_axis_of_a_short_run(tmp_path):
    figure, (ax,) = curves.grid_of_axes(1, 0, "light")
    run = Run("x", series={"policy/accuracy": ([1, 2, 3], [0.1, 0.2, 0.3])})
    curves.draw_panel(ax, curves.PANELS[0], [run], "light")
    figure.canvas.draw()
    assert [tick for tick in ax.get_xticks() if tick % 1] == []


def test_results_show_calibration_and_what_accuracy_costs(tmp_path):
    row = {"dataset": "d", "problem": "p", "image_path": None, "error": None, "extracted_answer": "Yes",
           "vlm_output": "", "ground_truth": None, "prompt_tokens": 5, "completion_tokens": 3}  # fmt: skip
    judged = {**row, "task": "pointwise", "label": "Yes", "verdict_swapped": None}
    rows = [{**judged, "verdict": v, "is_correct": v == "Yes", "verdict_probability": p}
            for v, p in (("Yes", 0.9), ("Yes", 0.8), ("No", 0.6), ("Yes", 0.55))]  # fmt: skip
    (tmp_path / "judged.json").write_text(json.dumps(rows))
    shown = curves.results_pictures([tmp_path / "judged.json"])
    assert [picture["title"] for picture in shown] == ["Calibration of the judge"]
    assert "judged: d: Brier score 0.15" in shown[0]["words"] and "4 verdicts" in shown[0]["words"]
    page = Page(
        write_report([make_run(tmp_path / "r", tables=())], tmp_path / "r.html", None, [tmp_path / "judged.json"])
    )
    assert "Evaluation Calibration of the judge" in page.text
    (tmp_path / "other.json").write_text(json.dumps([{**row, "ground_truth": "1", "is_correct": False}]))
    with pytest.raises(BadInput, match="expected results of --mode judge"):
        curves.results_pictures([tmp_path / "other.json"])


def test_accuracy_against_tokens_is_drawn_from_a_price_table(monkeypatch):
    price = [{"way": way, "n": n, "tokens": 10.0 * n, "accuracy": 0.5, "interval": (0.4, 0.6)}
             for way, n in (("first answer", 1), ("majority", 2), ("knock-out", 2))]  # fmt: skip
    file = {"path": "x.json", "benchmarks": [{"dataset": "d", "price": price}]}
    monkeypatch.setattr("calculate_acc.tally", lambda path: None)
    monkeypatch.setattr("calculate_acc.summarise", lambda tallies: {"files": [file]})
    (picture,) = curves.results_pictures(["x.json"])
    assert (
        picture["title"] == "Accuracy against tokens" and "x: d, knock-out, n = 2: 0.50, 20 tokens" in picture["words"]
    )
    assert picture["light"].startswith("data:image/svg")


def test_a_long_run_makes_a_page_of_bounded_size(tmp_path):
    """2,000 steps; of the tables of all steps it reads a few."""
    run = make_run(tmp_path / "long", 2000, tables=(), per_task=12)
    for step in (*range(1, 30), *range(1980, 2001)):
        rollouts(step, 4, 4, image=png()).to_parquet(run / "completions" / f"recycled_{step:05d}.parquet")
    start = time.monotonic()
    path = write_report([run], tmp_path / "r.html")
    assert time.monotonic() - start < 60
    assert path.stat().st_size < 1_000_000


# ---- in a browser ----------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on PATH (apt-get install chromium)")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@needs_chromium
def test_a_browser_runs_nothing_and_shows_the_text(opened, tmp_path):
    opened.open(hostile_run(tmp_path).as_uri())
    (tmp_path / "dom.html").write_text(opened.js("document.documentElement.outerHTML"), encoding="utf-8")
    dom = Page(tmp_path / "dom.html")
    assert opened.js("document.title") != "PWNED"
    assert "script" not in dom.tags
    assert not [a for a in dom.attributes if a[1].startswith("on")]
    for words in ("Before and after", "Curves", "Rollouts", "late in training",
                  "<script>document.title='PWNED'</script>",
                  "The model wrote", "Answering", "✗ wrong"):  # fmt: skip
        assert words in dom.text
    assert dom.text.endswith("tries right ●○○○")
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)


@needs_chromium
def test_rollouts_are_filtered_by_mouse_and_by_keyboard(opened, whole):
    opened.look(1280)
    opened.open(whole.as_uri())
    shown = "[...document.querySelectorAll('.card')].filter(e => e.offsetParent).map(e => e.className)"
    everything = opened.js(shown)
    assert len(everything) == len(cards(whole)) > 30
    opened.click("label", "Judge a pair")
    assert set(opened.js(shown)) < {name for name in everything if " pairwise " in name} | {None}
    opened.click("label", "wrong")
    assert opened.js(shown) == [name for name in everything if " pairwise wrong " in name]
    opened.js("document.querySelector('input[value=all]').focus()")
    for key, code, kind in (
        ("ArrowRight", 39, "answer"),
        ("ArrowRight", 39, "pairwise"),
        ("ArrowRight", 39, "pointwise"),
    ):
        opened.press(key, code)
        assert opened.js(shown) == [name for name in everything if f" {kind} wrong " in name]
    assert opened.js("getComputedStyle(document.activeElement).outlineStyle") != "none"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_has_no_serious_axe_findings(opened, whole, width, dark):
    from axe_core_python import sync_playwright

    opened.look(width, 900, dark)
    opened.open(whole.as_uri())
    assert opened.js("document.documentElement.scrollWidth") <= width
    opened.js(Path(sync_playwright.__file__).with_name("axe.min.js").read_text() + "; 1")
    found = opened.js("axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact))"
                      ".map(v => v.id + ' ' + v.nodes[0].html))")  # fmt: skip
    assert found == []
