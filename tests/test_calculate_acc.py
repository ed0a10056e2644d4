"""calculate_acc.py against cases worked out by hand, and against files that are broken."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write

import calculate_acc as acc
from calculate_acc import BadInput, read_rows, render, summarise, tally
from data.table import list_text
from scoring.rates import mcnemar, of_questions, paired, paired_questions, wilson


def row(answer, gold="4", dataset="m", problem="2+2?", **more):
    counts = {"error": None, "prompt_tokens": 10, "completion_tokens": 20}
    question = {"dataset": dataset, "problem": problem, "image_path": None, "ground_truth": gold}
    return {**question, "extracted_answer": answer, **counts, **more}


def one(rows):
    """The only benchmark of these rows."""
    (benchmark,) = summarise([tally("f", rows=rows)])["files"][0]["benchmarks"]
    return benchmark


def command(*args):
    return subprocess.run(
        [sys.executable, acc.__file__, *map(str, args)], capture_output=True, text=True, timeout=60, check=False
    )


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_of_the_textbook(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing():
    assert wilson(0, 0) is None


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    exact = 2 * sum(math.comb(3001, i) for i in range(1401)) / 2**3001
    assert mcnemar(1601, 1400) == pytest.approx(exact, rel=1e-9)
    assert 0 <= mcnemar(200_000, 150_000) < 1e-300


def test_the_interval_of_a_difference_is_a_bootstrap_s_and_never_zero_wide():
    import numpy as np

    changes = np.repeat([1, -1, 0], [30, 10, 160])
    resampled = np.random.default_rng(1).choice(changes, (20_000, 200)).mean(axis=1)
    middle, variance = paired(30, 10, 200)
    assert middle == pytest.approx(0.1, abs=0.002)
    assert variance**0.5 == pytest.approx(resampled.std(), rel=0.03)
    assert acc.interval_of(*paired(0, 0, 5), -1, 1) == pytest.approx([-0.28, 0.28], abs=0.01)
    assert acc.interval_of(*paired(5, 0, 5), -1, 1)[1] == 1
    assert acc.interval_of(*paired(4, 0, 300), -1, 1)[0] < 0  # McNemar's p is 0.125


# ---- counting --------------------------------------------------------------------------------------------------------


def test_failed_rows_are_no_answers_and_unscorable_ones_neither():
    found = one(
        [row("4"), row("5"), row(None), row(""), row(None, error="HTTP 500"), row("4", gold=""), row("4", gold=None)]
    )
    assert (found["rows"], found["answered"], found["right"], found["failed"]) == (7, 4, 1, 1)
    assert (found["unscorable"], found["unboxed"], found["accuracy"]) == (2, 2, 0.25)
    assert found["tokens"] == 20


def test_failed_rows_stand_beside_the_others_of_their_file():
    failed = [row(None, error="time-out"), row(None, dataset="n", error="time-out")]
    found = summarise([tally("f", rows=[*failed, judged("pointwise", "Yes", "Yes")])])["files"][0]["benchmarks"]
    assert {(b["dataset"], b["kind"], b["answered"], b["failed"]) for b in found} == {
        ("m", "pointwise", 1, 1),
        ("n", "pointwise", 0, 1),
    }
    assert one(failed[:1])["kind"] == "answer"


def test_rescored_and_disagreement_is_said():
    rows = [
        row(r"\frac{8}{2}", is_correct=False),
        row("5", is_correct=False),
        row("7", is_correct=True),
        row("4", is_correct=None),
    ]
    found = summarise([tally("f.json", rows=rows)])
    (benchmark,) = found["files"][0]["benchmarks"]
    assert benchmark["right"] == 2
    assert found["files"][0]["disagreements"]["rows"] == 2
    assert [e["row"] for e in found["files"][0]["disagreements"]["examples"]] == [0, 2]
    assert "f.json disagrees with verify.py on 2 rows" in render(found, "table")


def test_a_row_of_another_verifier_without_its_verdict_is_unscorable():
    found = one([row("4", verifier="mine.py:f", is_correct=True), row("4", verifier="mine.py:f")])
    assert (found["right"], found["answered"], found["unscorable"]) == (1, 1, 1)


def test_gold_may_be_a_number_or_several():
    assert one([row("4", gold=4), row(4, gold="4"), row("5", gold=["4", "5"]), row("6", gold=["4", "5"])])["right"] == 3


def test_flips_of_test_time_scaling():
    flips = [("4", "4", 0), ("5", "4", 1), ("5", "4", 2), ("4", "5", 1), ("5", "5", 2), (None, "4", 1)]
    rows = [
        row(final, problem=f"Q{i}?", first_answer=first, rounds=[], round_num=n, completion_tokens=100 * (1 + n))
        for i, (first, final, n) in enumerate(flips)
    ]
    found = one([*rows, row(None, error="time-out")])
    assert found["kind"] == "tts"
    assert found["first_interval"] == wilson(2, 6)
    assert (found["answered"], found["failed"]) == (6, 1)
    assert (found["first_accuracy"], found["accuracy"]) == (2 / 6, 4 / 6)
    assert (found["right_to_wrong"], found["wrong_to_right"]) == (1, 3)
    assert found["flip_p"] == pytest.approx(2 * (1 + 4) / 16)
    assert found["reflections"] == 7 / 6
    assert found["tokens"] == pytest.approx(1300 / 6)


def test_the_first_and_the_final_answer_have_a_mean_of_benchmarks_each():
    def tts(first, final, dataset):
        return row(final, dataset=dataset, first_answer=first, rounds=[], round_num=0)

    found = summarise(
        [tally("f", rows=[tts("5", "4", "m"), tts("5", "5", "m"), tts("4", "4", "n"), tts("4", "4", "n")])]
    )
    (file,) = found["files"]
    assert (file["first_mean"], file["means"]["tts"]) == (0.5, 0.75)
    assert render(found, "table").splitlines()[-1].split() == ["mean", "of", "benchmarks", "50.0", "75.0"]


def judged(task, label, verdict, swapped=None, **more):
    return row(None, gold=None, task=task, label=label, verdict=verdict, verdict_swapped=swapped, **more)


def test_pointwise_is_balanced_over_the_labels():
    yes = [judged("pointwise", "Yes", v) for v in ("Yes", "Yes", "Yes", "Yes", "Yes", "No", "Yes", None)]
    no = [judged("pointwise", "No", v) for v in ("No", "Yes")]
    found = one([*yes, *no, judged("pointwise", None, "Yes")])
    assert found["accuracy"] == 7 / 10
    assert found["balanced_accuracy"] == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert found["verdict_rate"] == 9 / 10
    assert (found["says_yes"], found["is_yes"]) == (7 / 9, 8 / 10)
    assert found["unscorable"] == 1
    assert one(yes)["balanced_accuracy"] is None


def test_pairs_in_both_orders():
    found = one([
        judged("pairwise", "A", "A", "B", is_correct=True),  # right twice
        judged("pairwise", "A", "A", "A"),  # always the first
        judged("pairwise", "A", "A", "A"),
        judged("pairwise", "A", "B", "A"),  # consistent, and wrong
        judged("pairwise", "A", None, "B"),
    ])  # fmt: skip
    assert found["accuracy"] == 1 / 5
    assert (found["accuracy_chosen_first"], found["accuracy_chosen_second"]) == (3 / 5, 2 / 5)
    assert found["accuracy_both_orders_mean"] == 0.5
    assert found["consistency"] == 2 / 4
    assert found["position_bias"] == pytest.approx(6 / 9 - 0.5)
    assert found["verdict_rate"] == 9 / 10


def test_best_of_n_must_beat_every_other():
    found = one([
        judged("best_of_n", "A", ["A", "A"], ["B", "B"]),
        judged("best_of_n", "A", ["A", "A"], ["B", "A"]),
        judged("best_of_n", "A", ["A", "B"], ["B", "A"]),
    ])  # fmt: skip
    assert found["accuracy"] == 1 / 3
    assert (found["accuracy_chosen_first"], found["accuracy_chosen_second"]) == (2 / 3, 1 / 3)
    assert found["consistency"] == 5 / 6


def test_evaluate_s_own_rows_are_understood():
    """The rows are made by evaluate.py's solvers, so that the two can't drift apart."""
    from engines import BatchEngine, Output
    from evaluate import Settings, evaluate_records

    class Engine(BatchEngine):
        def batch(self, requests, sampling):
            texts = [str(r.messages) for r in requests]
            said = ["A" if "response_b" in t else "No" if "response" in t else "4" for t in texts]
            return [Output(f"\\boxed{{{text}}}", 3, 2) for text in said]

    question = {"dataset": "m", "problem": "2+2?", "answer": "4", "image_path": None}
    tts = evaluate_records([question], Engine(), Settings("x", "tts", ("f",), max_rounds=0))
    assert one(json.loads(json.dumps(tts)))["first_accuracy"] == 1.0
    judge = [{**question, "chosen": "4", "rejected": "5"}, {**question, "response": "5", "label": False},
             {**question, "chosen": "4", "rejected": ["5", "6"]}]  # fmt: skip
    rows = json.loads(json.dumps(evaluate_records(judge, Engine(), Settings("x", "judge", ("f",)))))
    found = summarise([tally("f", rows=rows)])["files"][0]["benchmarks"]
    assert {b["kind"]: b["accuracy"] for b in found} == {"pairwise": 0.0, "pointwise": 1.0, "best_of_n": 0.0}
    assert found[1]["position_bias"] == 0.5


# ---- several files ---------------------------------------------------------------------------------------------------


def test_pairs_by_question_and_occurrence_not_by_order():
    base = [
        row("4", problem="p"),
        row("5", problem="p"),
        row("4", problem="q"),
        row("4", dataset="n"),
        row("4", problem="x"),
    ]
    other = [row("5", problem="q"), row("4", dataset="n"), row("4", problem="p"), row("4", problem="p"), 
             row("4", problem="y"), row(None, problem="x", error="HTTP 500")]  # fmt: skip
    found = summarise([tally("a", pair=True, rows=base), tally("b", pair=True, rows=other)])
    by_name = {r["dataset"]: r for r in found["paired"]}
    assert (by_name["m"]["rows"], by_name["m"]["gained"], by_name["m"]["lost"]) == (3, 1, 1)
    assert (by_name["n"]["rows"], by_name["n"]["difference"]) == (1, 0.0)
    assert by_name["all rows"]["rows"] == 4
    assert by_name["mean of benchmarks"]["base_accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_interval_and_test_of_a_difference():
    base = [row("4" if i < 50 else "5", problem=str(i)) for i in range(100)]
    other = [row("4" if i < 45 or i >= 75 else "5", problem=str(i)) for i in range(100)]
    (found,) = summarise([tally("a", pair=True, rows=base), tally("b", pair=True, rows=other)])["paired"]
    assert (found["gained"], found["lost"], found["difference"]) == (25, 5, 0.2)
    assert found["p"] == pytest.approx(2 * sum(math.comb(30, i) for i in range(6)) / 2**30)
    spread = 1.96 * math.sqrt((30 / 100 - 0.2**2) / 100)
    assert found["interval"] == pytest.approx([0.2 - spread, 0.2 + spread], abs=0.015)


def test_seed_files_pair_without_problems(tmp_path):
    def seed(*answers):
        return [{"dataset": "m", "ground_truth": str(i % 3), "extracted_answer": a} for i, a in enumerate(answers)]

    first, second = (
        write(tmp_path / "a.json", seed("0", "1", "9", "0")),
        write(tmp_path / "b.json", seed("0", "1", "2", "9")),
    )
    found = json.loads(command("--result_path", first, second, "--format", "json").stdout)
    assert [f["benchmarks"][0]["right"] for f in found["files"]] == [3, 3]
    assert (found["paired"][0]["gained"], found["paired"][0]["lost"], found["paired"][0]["rows"]) == (1, 1, 4)


def test_nothing_in_common_is_no_error():
    tallies = [tally(name, pair=True, rows=[row("4", problem=name)]) for name in "ab"]
    assert summarise(tallies)["paired"] == []
    assert "b against a, on the 0 rows both answered, of 1 and 1\n" in render(summarise(tallies), "table")


def test_only_results_of_one_mode_are_compared():
    """Of the same questions: an answer, what test-time scaling made of it, and verdicts on it."""

    def tts(first, final, problem):
        return row(final, problem=problem, first_answer=first, rounds=[], round_num=0)

    kinds = {
        "answer": [row("4", problem=str(i)) for i in range(8)],
        "tts": [tts("4", "5", str(i)) for i in range(8)],
        "pointwise": [judged("pointwise", "Yes", "No", problem=str(i)) for i in range(8)],
        "pairwise": [judged("pairwise", "A", "A", "A", problem=str(i)) for i in range(8)],
    }
    for name, rows in kinds.items():
        for other, others in kinds.items():
            found = summarise([tally("a", pair=True, rows=rows), tally("b", pair=True, rows=others)])
            text = render(found, "table")
            assert [r["rows"] for r in found["paired"]] == ([8] if name == other else [])
            refused = f"NOT COMPARED: b holds results of {other}, a of {name}; only results of one mode are compared"
            assert (refused in text) is (name != other)
            assert ("rows both answered" in text) is (name == other)


def test_a_mixed_file_is_compared_kind_by_kind():
    """A failed row says nothing of its kind, and keeps its place among the rows of its question."""
    failed = row(None, gold=None, error="HTTP 500")
    pair, single = judged("pairwise", "A", "A", "B"), judged("pointwise", "Yes", "Yes")
    base, other = [failed, pair, single], [pair, pair, row("4", gold=None)]
    found = summarise([tally("a", pair=True, rows=base), tally("b", pair=True, rows=other)])
    assert [(r["rows"], r["gained"], r["lost"]) for r in found["paired"]] == [(1, 0, 0)]


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "indented", "lines"])
def test_streaming_gives_what_json_gives(tmp_path, form):
    rows = [{"a": 'x"]},{[\\', "n": [1.5, -2e9, None, True, False]}, {"π\u2028😀": "\ud83d", "deep": {"b": {}}}, {}]
    path = tmp_path / "f.json"
    text = json.dumps(rows, indent=2 if form == "indented" else None)
    path.write_text(
        "\ufeff \n" + ("\n\n".join(map(json.dumps, rows)) + "\n" if form == "lines" else text), encoding="utf-8"
    )
    assert list(read_rows(str(path))) == rows


def test_empty_list_and_larger_than_a_batch(tmp_path):
    assert "files" in summarise([tally(write(tmp_path / "e.json", []))])
    rows = [row(str(i % 5), problem=str(i)) for i in range(5000)]
    found = tally(write(tmp_path / "f.json", rows), pair=True)
    assert found.counts["m", "answer"]["right"] == 1000
    assert [right for *_, right in found.outcomes] == [i % 5 == 4 for i in range(5000)]


def test_memory_does_not_grow_with_the_file(tmp_path):
    import tracemalloc

    path = tmp_path / "f.json"
    path.write_text(list_text(json.dumps({"x": "y" * 10_000}) for _ in range(1000)), encoding="utf-8")  # 10 MB
    tracemalloc.start()
    assert sum(1 for _ in read_rows(str(path))) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a JSON list"),
        ("hello", "expected a JSON list"),
        ('{"a": 1', "line 1: expected a JSON object a line, or a list of them"),
        ("[1]", "row 0: field row: expected a JSON object, got 1"),
        ('[\n{"a": 1},\n1\n]', "row 1: field row: expected a JSON object, got 1"),
        ('[{"a": 1}', "Expecting ',' delimiter: line 1 column 10"),
        ('[{"a": 1},]', "Expecting value: line 1 column 11"),
        ('[{"a": 1} {"a": 2}]', "Expecting ',' delimiter: line 1 column 11"),
        ('[{"a": 1}] x', "Extra data: line 1 column 12"),
        ('[{"a": "unterminated', "Unterminated string"),
        ('[\n{"a": 1},\n{"a": 2}', "Expecting ',' delimiter: line 3"),
        ('[\n{"a": 1},\n{"a": 2}\n]\nx', "Extra data: line 5"),
        ('[\n{"a": 1},\n{"a": \n]', "line 4"),
        ('{"a": 1}\n{"a": ', "row 1: field row: expected a JSON object"),
        ('[{"a": ' + "9" * 5000 + "}]", "Exceeds the limit"),
        ('[{"a": ' + "[" * 100_000, "maximum recursion"),
    ],
)
def test_broken_json_is_one_line_that_says_where(tmp_path, text, said):
    path = tmp_path / "f.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        list(read_rows(str(path)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": None}, "field dataset: expected the benchmark's name, got None"),
        ({"ground_truth": {}}, "field ground_truth: expected the gold answer, got {}"),
        ({"ground_truth": ["4", {}]}, "field ground_truth: expected the gold answer, got ['4', {}]"),
        ({"completion_tokens": "12"}, "field completion_tokens: expected a number, or null, got '12'"),
        ({"prompt_tokens": math.nan}, "field prompt_tokens: expected a number, or null, got nan"),
        ({"round_num": [1]}, "field round_num: expected a number, or null, got [1]"),
        ({"extracted_answer": ["4"]}, "field extracted_answer: expected the final answer as text, or null, got ['4']"),
        ({"task": "pairwise", "verdict": 3}, "field verdict: expected a verdict, or null, got 3"),
        ({"task": "best_of_n", "verdict": ["A"], "verdict_swapped": []}, "field verdict_swapped: expected a list"),
        ({"first_answer": {}}, "field first_answer: expected the final answer as text, or null, got {}"),
    ],
)
def test_bad_rows_name_file_row_and_field(change, said):
    with pytest.raises(BadInput) as caught:
        tally("f.json", rows=[row("4"), row("4") | change])
    assert str(caught.value).startswith(f"f.json: row 1: {said}")
    assert "\n" not in str(caught.value)


def test_missing_fields_and_missing_file(tmp_path):
    for name in ("dataset", "ground_truth", "extracted_answer"):
        broken = {k: v for k, v in row("4").items() if k != name}
        with pytest.raises(BadInput, match=f"row 0: field {name}: expected .* got nothing"):
            tally("f", rows=[broken])
    done = command("--result_path", tmp_path / "none.json")
    assert (done.returncode, done.stderr) == (
        2,
        f"calculate_acc.py: {tmp_path / 'none.json'}: no such file\n",
    )


# ---- showing ---------------------------------------------------------------------------------------------------------


def test_the_command_shows_failures_and_exits_0(tmp_path):
    path = write(tmp_path / "f.json", [row("4"), row("4", dataset="n"), row(None, error="HTTP 500")])
    done = command("--result_path", path)
    assert done.returncode == 0
    assert done.stdout.startswith("FAILED: 1 of 3 rows")
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ["m", "n", "mean"]


def test_an_empty_file_and_a_bad_flag_are_said_in_one_line(tmp_path):
    done = command("--result_path", write(tmp_path / "e.json", []))
    assert (done.returncode, done.stdout) == (0, f"empty: {tmp_path / 'e.json'} holds no row\n")
    done = command("--result_path", tmp_path / "e.json", "--format", "xml")
    assert done.returncode == 2
    assert re.fullmatch("calculate_acc.py: argument --format: invalid choice: 'xml' .*\n", done.stderr)


def test_text_of_a_file_stays_in_its_cell():
    hostile = "m|\x1b[2J\n| x |\u202e\ud800"
    text = render(summarise([tally("f", rows=[row("4", dataset=hostile)])]), "markdown")
    line = next(line for line in text.splitlines() if "x1b" in line)
    assert line.startswith(r"| m\|\x1b[2J\n\| x \|\u202e\ud800 |")
    assert "\x1b" not in text
    text.encode("utf-8")


def test_nothing_heavy_for_help():
    code = "import sys, calculate_acc; print([m for m in ('torch', 'numpy', 'pandas', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(acc.__file__).parent, timeout=60, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"


# ---- how far a judge can be believed ---------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Four verdicts of 0.95 of which three are right, and two of 0.55 of which one is."""
    verdicts = [(0.95, "Yes")] * 3 + [(0.95, "No"), (0.55, "Yes"), (0.55, "No")]
    rows = [judged("pointwise", "Yes", v, verdict_probability=p, problem=str(i)) for i, (p, v) in enumerate(verdicts)]
    found = one([*rows, judged("pointwise", "Yes", None, verdict_probability=None)])["calibration"]
    assert found["verdicts"] == 6
    assert found["brier"] == pytest.approx((3 * 0.05**2 + 0.95**2 + 0.45**2 + 0.55**2) / 6)
    assert found["calibration_error"] == pytest.approx((4 * 0.20 + 2 * 0.05) / 6)
    assert [(b["from"], b["verdicts"], b["accuracy"]) for b in found["bins"]] == [(0.5, 2, 0.5), (0.9, 4, 0.75)]
    assert found["bins"][1]["interval"] == pytest.approx(wilson(3, 4))
    assert one([judged("pairwise", "A", "A", "B", verdict_probability=0.9, verdict_swapped_probability=0.6)])[
        "calibration"
    ]["brier"] == pytest.approx((0.1**2 + 0.4**2) / 2)
    best = judged("best_of_n", "A", ["A", "B"], ["B", "B"], verdict_probability=[1.0, 0.5],
                  verdict_swapped_probability=[1.0, None])  # fmt: skip
    assert one([best])["calibration"]["verdicts"] == 3
    assert "calibration" not in one([judged("pairwise", "A", "A", "B")])


def test_a_judge_that_only_knows_the_question_is_seen():
    """It says of each response what most responses of its question are."""
    labels = {"easy": "Yes Yes Yes", "mixed": "Yes Yes No", "hard": "No No"}
    said = {"easy": "Yes", "mixed": "Yes", "hard": "No"}
    rows = [judged("pointwise", label, said[q], problem=q) for q, given in labels.items() for label in given.split()]
    found = {row["pass_rate"]: row for row in one(rows)["by_pass_rate"]}
    assert one(rows)["accuracy"] == 7 / 8
    assert (found["over 1/2"]["accuracy"], found["over 1/2"]["question_only"]) == (2 / 3, 2 / 3)
    assert (found["over 1/2"]["balanced_accuracy"], found["over 1/2"]["says_yes"]) == (0.5, 1.0)
    assert (found["0"]["accuracy"], found["1"]["questions"], found["0"]["answered"]) == (1.0, 1, 2)
    text = render(summarise([tally("f", rows=rows)]), "table")
    assert "by the share of right responses to its question" in text
    assert one([judged("pointwise", "Yes", "Yes", problem=str(i)) for i in range(9)])["by_pass_rate"] == []
    embedded = [judged("pointwise", y, y, problem="x?", image_digest=d) for y, d in (("Yes", "a"), ("No", "b")) * 3]
    assert [row["questions"] for row in one(embedded)["by_pass_rate"]] == [1, 1]


@pytest.mark.parametrize("wrong", [2, -0.1, "0.5", [0.5, 3]])
def test_a_probability_that_is_none_is_refused(wrong):
    with pytest.raises(BadInput, match="f: row 0: field verdict_probability: expected a probability, or null"):
        tally("f", rows=[judged("pointwise", "Yes", "Yes", verdict_probability=wrong)])


# ---- test-time scaling at its price ----------------------------------------------------------------------------------


def compared(right, problem):
    """A row of --tts compare: `right` has for each way and number whether it is right, and its tokens."""
    variants = [
        {"variant": way, "n": n, "answer": "4" if ok else "5", "is_correct": ok, "completion_tokens": tokens}
        for (way, n), (ok, tokens) in right.items()
    ]
    return row("4", problem=problem, first_answer="5", rounds=[], round_num=0, variants=variants)


def test_the_price_of_test_time_scaling_by_hand(tmp_path):
    """100 questions: a majority of 3 costs what weighing 1 does and is right 10 times more often."""
    rows = [
        compared({("vote", 1): (i < 50, 10), ("vote", 2): (i < 50, 20), ("vote", 3): (i < 60, 30), ("vote", 4):
                  (i < 62, 40), ("weighted_vote", 1): (i < 50, 28), ("best_of_n", 4): (i >= 20, 90)}, str(i))
        for i in range(100)
    ]  # fmt: skip
    found = {(r["way"], r["n"]): r for r in one(rows)["price"]}
    assert list(found) == [
        ("first answer", 1), ("majority", 2), ("majority", 4), ("weighted", 1), ("best of n", 4),
    ]  # fmt: skip
    weighted, best = found["weighted", 1], found["best of n", 4]
    assert (weighted["accuracy"], weighted["tokens"], weighted["majority_n"]) == (0.5, 28, 3)
    assert (weighted["difference"], weighted["winner"]) == (-0.1, "majority")
    assert weighted["difference_interval"] == pytest.approx([-0.16, -0.05], abs=0.015)
    assert (best["majority_n"], best["majority_tokens"]) == (4, 40)  # there is none of 90
    assert (best["difference"], best["winner"]) == (pytest.approx(0.18), "best of n, at 2.2 x")
    assert "winner" not in found["first answer", 1]
    path = write(tmp_path / "f.json", rows)
    done = command("--result_path", path, "--figure", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    assert "Test-time scaling at its price" in done.stdout
    from PIL import Image

    assert Image.open(tmp_path / "f.png").width > 400
    plain = write(tmp_path / "g.json", [row("4")])
    done = command("--result_path", plain, "--figure", tmp_path / "g.png")
    assert (done.returncode, done.stderr) == (
        2, "calculate_acc.py: --figure: expected results of evaluate.py --mode tts --tts compare\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    "variant", [3, {}, {"variant": "luck", "n": 1, "answer": "4", "completion_tokens": 1},
                {"variant": ["vote"], "n": 1, "answer": "4", "completion_tokens": 1},
                {"variant": "best_of_n", "n": 2, "answer": "4", "completion_tokens": 1},
                {"variant": "vote", "n": 1, "completion_tokens": 1}],
)  # fmt: skip
def test_variants_that_are_none_are_refused(variant):
    with pytest.raises(BadInput, match="f: row 0: field variants: expected"):
        tally("f", rows=[row("4", first_answer="4", variants=[variant])])


def test_images_without_a_path_are_told_apart_by_their_content():
    a, b = row("4", image_digest="a"), row("5", image_digest="b")
    (found,) = summarise([tally("x", pair=True, rows=[a, b]), tally("y", pair=True, rows=[b, a])])["paired"]
    assert (found["rows"], found["gained"], found["lost"]) == (2, 0, 0)


def test_several_rows_of_a_question_count_as_fewer():
    alone = [
        {"dataset": "d", "problem": f"q{i}", "ground_truth": "1", "extracted_answer": str(i % 2)} for i in range(40)
    ]
    (benchmark,) = summarise([tally("x", rows=alone)])["files"][0]["benchmarks"]
    assert benchmark["interval"] == pytest.approx(wilson(20, 40))
    again = [row for row in alone for _ in range(5)]  # which tells nothing more
    (benchmark,) = summarise([tally("x", rows=again)])["files"][0]["benchmarks"]
    assert (benchmark["answered"], benchmark["accuracy"]) == (200, 0.5)
    assert benchmark["interval"] == pytest.approx(wilson(20, 40), abs=0.003)
    apart = [{**row, "extracted_answer": str(i % 2)} for i, row in enumerate(again)]  # right and wrong by turns
    (benchmark,) = summarise([tally("x", rows=apart)])["files"][0]["benchmarks"]
    assert benchmark["interval"] == pytest.approx(wilson(100, 200), abs=1e-4)  # no more than there are
    unnamed = [{name: value for name, value in row.items() if name != "problem"} for row in again]
    (benchmark,) = summarise([tally("x", rows=unnamed)])["files"][0]["benchmarks"]
    assert benchmark["interval"] == pytest.approx(wilson(100, 200))  # nothing tells which rows belong together
    assert of_questions([(3, 3)] * 10) == pytest.approx(wilson(10, 10), abs=1e-4)
    assert of_questions([]) is None


def test_rows_of_one_question_are_not_independent_in_a_comparison():
    """Two models of equal skill on 20 questions, of 8 like rows each: 0.05 of the tests may find a difference."""
    rng = random.Random(0)
    p, outside = 0, 0
    for _ in range(400):
        changes = [(8, 8 * ((rng.random() < 0.5) - (rng.random() < 0.5))) for _ in range(20)]
        middle, variance, chance = paired_questions(changes)
        low, high = acc.interval_of(middle, variance, -1, 1)
        p += chance < 0.05
        outside += not low <= 0 <= high
    assert p <= 0.06 * 400 and outside <= 0.07 * 400
    assert paired_questions([(1, 1)] * 5 + [(1, 0)] * 5) == (*paired(5, 0, 10), mcnemar(5, 0))
    assert paired_questions([(2, 0)] * 5)[1] > 0


def test_a_comparison_counts_questions_not_rows():
    def rows(answer):
        return [{**row(answer), "problem": f"Q{q}?"} for q in range(6) for _ in range(8)]

    tallies = [tally(name, pair=True, rows=rows(answer)) for name, answer in (("a", "5"), ("b", "4"))]
    (found,) = summarise(tallies)["paired"]
    assert (found["rows"], found["gained"], found["p"]) == (48, 48, pytest.approx(2 / 64))


def test_what_is_said_again_tells_nothing_more():
    """No interval and no p, in whatever table, is surer because every row stands there five times."""
    rng = random.Random(0)

    def right(share):
        return rng.random() < share

    rows = []
    for i in range(60):
        ways = {("vote", 1): (right(0.4), 10), ("vote", 2): (right(0.5), 20), ("weighted_vote", 2): (right(0.7), 25)}
        scaled = compared(ways, str(i)) | {"first_answer": "54"[right(0.3)], "categories": {"topic": "xyz"[i % 3]}}
        rows += [{**scaled, "extracted_answer": "54"[right(0.6)]}]
        verdicts = [(label, "Yes" if right(0.4) else "No") for label in ("Yes", "No")]
        rows += [judged("pointwise", *verdict) | {"problem": str(i)} for verdict in verdicts]

    def said(rows):
        found = {}

        def walk(place, value):
            if isinstance(value, dict):
                for name, inner in value.items():
                    walk((*place, name), inner)
            elif "interval" in str(place[-1]):
                found[place] = value[1] - value[0]
            elif isinstance(value, list):
                for i, inner in enumerate(value):
                    walk((*place, i), inner)
            elif place[-1] == "flip_p":
                found[place] = value

        walk(("file",), summarise([tally("f", rows=rows)])["files"][0])
        return found

    once, again = said(rows), said([copy for copy in rows for _ in range(5)])
    names = {name for place in once for name in place if isinstance(name, str)}
    assert {"first_interval", "difference_interval", "flip_p", "categories", "by_pass_rate", "price"} <= names
    assert once.keys() == again.keys()
    assert [place for place in once if not 0.9 * once[place] <= again[place] <= 1.1 * once[place]] == []


def test_one_question_about_several_images_is_as_many_questions():
    a, b = row("4", image_path="a.png"), row("5", image_path="b.png")
    (found,) = summarise([tally("x", pair=True, rows=[a, b]), tally("y", pair=True, rows=[b, a])])["paired"]
    assert (found["gained"], found["lost"]) == (0, 0)


def test_the_interval_of_a_mean_of_benchmarks_is_narrower_than_that_of_one():
    def rows(right):
        return [row("4" if i < right else "5", problem=str(i), dataset=name) for name in "mn" for i in range(100)]

    *_, mean, _ = summarise([tally(name, pair=True, rows=rows(n)) for name, n in (("a", 50), ("b", 60))])["paired"]
    low, high = mean["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * (paired(10, 0, 100)[1] / 2) ** 0.5)
