"""The demo's measures by hand, and the demo itself in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FORKS, print_into

import demo
from demo import balanced, held_out, mean, random_judge


def test_means_and_intervals():
    value = mean([[True, False], [True, True], [False, False], []])
    assert value["mean"] == pytest.approx(0.5)
    assert value["n"] == 3
    # a ratio estimator: residual sums 0, 1, -1; 1.96 * sqrt(2 * 3 / 2) / 6
    assert value["interval"][1] - value["mean"] == pytest.approx(1.96 * 3**0.5 / 6)
    both = balanced([[True], [True]], [[False], [True]])
    assert both["mean"] == pytest.approx(0.75)
    assert mean([[]])["mean"] is None


def test_a_random_judge():
    measures = {"policy accuracy": 0.6, "reflection fixes a wrong answer": 0.5, "reflection harms a right answer": 0.2}
    chance = random_judge({"measures": {name: {"mean": value} for name, value in measures.items()}})
    first = 0.6 + 0.5 * (0.4 * 0.5 - 0.6 * 0.2)
    assert chance["test-time scaling, final answer"] == pytest.approx(first + 0.25 * ((1 - first) * 0.5 - first * 0.2))


def test_held_out_benchmark_is_balanced_and_deterministic():
    one, two = held_out(40), held_out(40)
    assert [r["problem"] for r in one["answers"]] == [r["problem"] for r in two["answers"]]
    assert [r["response"] for r in one["points"]] == [r["response"] for r in two["points"]]
    assert [r["label"] for r in one["points"]] == ["Yes", "No"] * 40
    for pair, answer in zip(one["pairs"], one["answers"], strict=True):
        assert pair["chosen"] == answer["answer"] or f"boxed{{{answer['answer']}}}" in pair["chosen"]
        assert pair["rejected"] != answer["answer"]
        assert f"boxed{{{answer['answer']}}}" not in pair["rejected"]


def test_demo_from_end_to_end(tmp_path):
    """Two steps, a few questions: all files are there, and a second run has nothing left to do."""
    command = ["demo.py", "--output", str(tmp_path), "--steps", "2", "--questions", "12"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "policy accuracy" in done.stdout
    assert done.stdout.rstrip().endswith("report.html")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    by_name = {row["measure"]: row for row in metrics["table"]}
    assert by_name["pointwise balanced accuracy"]["random"] == 0.5
    assert all(row[column]["n"] <= 24 for row in metrics["table"] for column in ("start", "after"))
    page = (tmp_path / "report.html").read_text()
    assert "pairwise" in page
    assert "data:image/png;base64," in page
    state = json.loads((tmp_path / "spark" / "trainer_state.json").read_text())
    assert state["global_step"] == 2

    assert forked(command, tmp_path / "again.txt").count(": already ") == 3  # start, training and after are there
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics

    command[command.index("--steps") + 1] = "3"
    assert forked(command, tmp_path / "more.txt").count(": already ") == 1
    assert json.loads((tmp_path / "spark" / "trainer_state.json").read_text())["global_step"] == 3


def forked(command: list[str], log: Path) -> str:
    """What the demo prints, in a process that need not import everything again."""
    process = FORKS.Process(target=run_demo, args=(command, log))
    process.start()
    process.join(600)
    process.kill()  # where it has not ended
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == 0, said[-2000:]
    return said


def run_demo(command: list[str], log: Path) -> None:
    print_into(log)
    sys.argv = command
    demo.main()
