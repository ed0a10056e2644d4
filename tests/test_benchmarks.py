"""The benchmark scripts, small and on the CPU: they run, can be cut, and keep every row."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest

from benchmarks import gpu, gpu_smollm2, intervals, learning, noisy, pages
from data.countdown import countdown_reward
from training.rewards import load_rewards


def run(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_smollm2", *map(str, flags)])
    return gpu_smollm2.main()


def test_gpu_smollm2_is_cut_and_goes_on(tmp_path, processor, text_model, monkeypatch, capsys):
    text_model.save_pretrained(tmp_path / "model")
    processor.tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--steps", 2, "--batch", 8, "--completion", 8]
    flags += ["--runs", tmp_path / "runs", "--output", tmp_path / "result.json"]
    for _ in range(2):  # GRPO's first step, then its second and SPARK's first
        assert run(monkeypatch, *flags, "--minutes", 0) == gpu_smollm2.UNFINISHED
        assert not (tmp_path / "result.json").exists()
    assert run(monkeypatch, *flags, "--minutes", 5) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    for name, rows in result["runs"].items():
        assert [row["step"] for row in rows] == [1, 2], name
        for row in rows:
            seconds = row["seconds"]
            assert all(seconds[part] > 0 for part in ("policy generation", "verification", "forward", "backward"))
            assert all(value >= 0 for value in seconds.values())
            assert sum(seconds.values()) == pytest.approx(row["whole"])
            assert 0 < row["tokens"] < 3 * rows[0]["tokens"]  # of this step alone, after a cut as well
    grpo, spark = ([row["rollouts"] for row in result["runs"][name]] for name in ("grpo", "spark"))
    assert grpo == [40, 40] and all(32 < rollouts <= 48 for rollouts in spark)
    recycled = [row["metrics"]["recycle/rows"] for row in result["runs"]["spark"]]
    assert all(0 < rows <= 16 for rows in recycled)
    assert "recycle/rows" not in result["runs"]["grpo"][0]["metrics"]
    assert result["table"]["spark"]["tokens_per_second"] > 0


def test_gpu_smollm2_says_what_is_missing(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--model", tmp_path / "none") == 2
    assert "python -m models.smollm2" in capsys.readouterr().err


def test_a_noisy_verifier_errs_as_often_as_it_says_and_the_same_way_again():
    right = [f"so \\boxed{{{i}}}" for i in range(1000)]
    golds = list(map(str, range(1000)))
    prompts = [[{"role": "user", "content": f"What is {i}?"}] for i in range(1000)]
    rewards = noisy.digits_10(prompts, right, solution=golds)
    assert 0.07 < rewards.count(0.0) / 1000 < 0.13
    longer = [f"thinking aloud, {text}" for text in right]
    assert noisy.digits_10(prompts, longer, solution=golds) == rewards  # as the same answer
    wrong = noisy.digits_10(prompts, right, solution=["x"] * 1000)
    assert [1 - reward for reward in wrong] == rewards
    assert noisy.countdown_20.equal is countdown_reward.equal
    images = [[PIL.Image.new("L", (8, 8), i % 256)] for i in range(200)]  # the same words about another image
    asked = noisy.digits_20(prompts[:1] * 200, right[:1] * 200, solution=golds[:1] * 200, images=images)
    assert 0.1 < asked.count(0.0) / 200 < 0.3


def test_where_only_the_labels_err_rewards_come_to_the_true_ones():
    prompts = [[{"role": "user", "content": f"Use {i}, 2 and 3, each exactly once, with + - * to make {i + 5}."}]
               for i in range(200)]  # fmt: skip
    answers = [f"\\boxed{{{i}+2+3}}" if i % 2 else f"\\boxed{{{i}+2*3}}" for i in range(200)]
    tasks = [f"{i + 5} from {i}, 2, 3" for i in range(200)]
    rows = {"prompts": prompts, "completions": answers, "solution": tasks}
    true, said, rest = (f(**rows) for f in (countdown_reward, noisy.countdown_20, noisy.countdown_20_undone))
    assert [a + b for a, b in zip(said, rest, strict=True)] == true == [float(i % 2) for i in range(200)]
    assert 0.1 < sum(a != b for a, b in zip(said, true, strict=True)) / 200 < 0.3
    for task in ("digits", "countdown"):  # what the variant's commands name
        (command,) = learning.commands_of(task, "ratio_0.25_label_noise_20", 0, Path("x"), 1)
        first = command.index("--reward_funcs") + 1
        assert len(load_rewards(command[first : first + 2])) == 2


def test_a_case_for_the_gpu_runs_in_miniature():
    run = gpu.slim(small=True, side=512, recycle_ratio=1)
    assert len(run["steps"]) == 3 and run["steps"][-1]["rollouts"] > 32
    assert set(run["planned_peaks"]) == {"generating", "training"}
    assert run["planned_seconds"]["forward, backward"] > 0
    assert {"prompt", "completion"} == set(run["samples"][0])


def test_cases_are_cut_kept_and_a_failure_is_one(tmp_path, monkeypatch, capsys):
    def called(command, **kwargs):
        case = command[command.index("--worker") + 1]
        failed = case == "smoke/engine"
        return subprocess.CompletedProcess(command, int(failed), f'noise\n{{"steps": ["{case}"]}}', "x\nno engine\n")

    monkeypatch.setattr(gpu.record, "commit", lambda: "0" * 40)
    monkeypatch.setattr(gpu.subprocess, "run", called)
    flags = [
        "--runs",
        str(tmp_path),
        "--output",
        str(tmp_path / "gpu.json"),
        "--cases",
        "smoke/engine",
        "slim/512_ratio_0",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags, "--minutes", "1"])
    assert gpu.main() == gpu.UNFINISHED  # a case may take longer
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    assert gpu.main() == 1
    assert " s, failed: no engine" in capsys.readouterr().out
    failed, kept = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert failed["error"] == "x\nno engine\n" and kept["steps"] == ["slim/512_ratio_0"]
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: pytest.fail("ran again"))
    assert gpu.main() == 1


def of_seed(variant, seed, first):
    measures = {"first answer": {"mean": first}, "judge, own answers": {"mean": None}}
    done = {"measures": measures, "price": {"first answer": 20.0}}
    return {"variant": variant, "seed": seed, "sampled": done, "greedy": {"measures": {}, "price": {}}}


def test_all_variants_tell_how_runs_of_one_differ():
    runs = [of_seed("grpo", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    runs += [of_seed("spark", seed, value) for seed, value in ((1, 0.61), (2, 0.93))]
    runs += [of_seed("start", 0, 0.1), of_seed("every_2", 7, 0.8)]
    cells = {variant: row["first answer"] for variant, row in learning.table(runs).items()}
    sd = ((0.01 + 0.01 + 2 * 0.16**2) / 3) ** 0.5  # 2 and 1 degrees of freedom
    assert cells["spark"]["mean"] == pytest.approx(0.77)
    assert cells["spark"]["half"] == pytest.approx(3.1824 * sd / 2**0.5, rel=1e-3)
    assert cells["spark"]["over"]["mean"] == pytest.approx(0.17)
    assert cells["spark"]["over"]["half"] == pytest.approx(3.1824 * sd * (1 / 2 + 1 / 3) ** 0.5, rel=1e-3)
    assert cells["every_2"]["half"] == pytest.approx(3.1824 * sd, rel=1e-3)  # one run is enough
    assert cells["start"]["half"] is None  # the same model for every seed
    assert "judge, own answers" not in learning.table(runs)["spark"]


def test_a_table_keeps_what_was_recorded_elsewhere(tmp_path, monkeypatch, capsys):
    """On a fresh checkout there are no runs, and the committed rows are all that there is."""
    monkeypatch.setattr(learning.record, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "RUNS", tmp_path / "runs")
    path = tmp_path / "learning_digits_dev.json"
    runs = [of_seed(variant, seed, 0.5 + seed / 10) for variant in ("grpo", "spark") for seed in (0, 1)]
    path.write_text(json.dumps({"runs": runs}))
    before = path.read_bytes()
    monkeypatch.setattr("sys.argv", "learning.py --task digits --table --variants grpo --minus spark".split())
    learning.main()
    assert path.read_bytes() == before
    assert "| first answer | +0.000 ± 0.304 |" in capsys.readouterr().out
    folder = tmp_path / "runs" / "digits" / "spark_1"
    folder.mkdir(parents=True)
    sampled = of_seed("spark", 1, 0.9)
    (folder / "dev.json").write_text(json.dumps({how: {**sampled[how], "rows": {}} for how in ("greedy", "sampled")}))
    learning.main()
    recorded = {(run["variant"], run["seed"]): run for run in json.loads(path.read_text())["runs"]}
    assert len(recorded) == 4 and recorded["spark", 1]["sampled"]["measures"]["first answer"]["mean"] == 0.9


def test_a_way_is_compared_with_a_majority_of_as_many_tokens():
    def cells(majorities, ways):
        named = {**dict(zip(learning.MAJORITIES, majorities, strict=True)), **dict.fromkeys(learning.WAYS, ways)}
        tokens = {f"tokens: {name}": {"seeds": {0: t}} for name, (t, _) in named.items()}
        return tokens | {name: {"seeds": {0: right}} for name, (_, right) in named.items()}

    majorities = [(10, 0.5), (40, 0.6), (160, 0.8)]
    runs = {"grpo": cells(majorities, (90, 0.65)), "spark": cells(majorities, (80, 0.75))}
    over = learning.at_equal_tokens(runs, "spark", "best of 4 by pairs")  # one of 40 is less than as many
    assert over["GRPO's majority"]["mean"] == pytest.approx(0.75 - 0.8)
    runs["spark"] |= {"tokens: best of 4 by pairs": {"seeds": {0: 42}}}  # too few for GRPO's own judge
    assert learning.at_equal_tokens(runs, "spark", "best of 4 by pairs")["GRPO's best"]["mean"] == pytest.approx(0.15)
    runs["grpo"] = cells(majorities, (43, 0.65))  # one of a token more is no other price
    assert learning.at_equal_tokens(runs, "spark", "best of 4 by pairs")["GRPO's best"]["mean"] == pytest.approx(0.1)
    runs["spark"] |= {"tokens: best of 4 by pairs": {"seeds": {0: 900}}}  # there is none of so many
    assert learning.at_equal_tokens(runs, "spark", "best of 4 by pairs")["GRPO's majority"]["mean"] == pytest.approx(
        -0.05
    )


def test_judging_first_is_two_runs_the_second_from_where_the_first_ended(tmp_path):
    first, then = learning.commands_of("digits", "judge_first", 3, tmp_path, 42)
    assert first[first.index("--max_steps") + 1] == "14" and then[then.index("--max_steps") + 1] == "28"
    assert then[then.index("--model_name_or_path") + 1] == first[first.index("--output_dir") + 1]
    assert then[then.index("--recycle_ratio") + 1] == "0"
    (with_vllm,) = learning.commands_of("smollm2", "ratio_0.25_no_pairwise", 0, tmp_path, 20, vllm=True)
    assert with_vllm[with_vllm.index("--use_vllm") + 1] == "True" and "--use_vllm" not in first
    assert with_vllm[with_vllm.index("--recycle_tasks") + 1 :][:2] == ["pointwise", "reflection"]
    (noisy_run,) = learning.commands_of("countdown", "grpo_noise_20", 0, tmp_path, 60)
    assert noisy_run[noisy_run.index("--reward_funcs") + 1] == "benchmarks/noisy.py:countdown_20"
    (labels,) = learning.commands_of("countdown", "ratio_0.25_label_noise_20", 0, tmp_path, 60)
    first = labels.index("--reward_funcs") + 1
    assert labels[first : first + 2] == [f"benchmarks/noisy.py:countdown_20{end}" for end in ("", "_undone")]
    (two_updates,) = learning.commands_of("digits", "apart_0.25", 0, tmp_path, 42)
    assert two_updates[two_updates.index("--max_steps") + 1] == "84"
    for smaller in learning.commands_of("smollm2", "judge_first", 0, tmp_path, 36):
        assert smaller[smaller.index("--per_device_train_batch_size") + 1] in ("8", "40")


def test_seconds_of_a_run_that_was_resumed_are_not_those_of_its_last_piece(tmp_path, monkeypatch):
    def call(command, **options):  # train_spark.py, then benchmarks.measures
        if "--output_dir" in command:
            folder = Path(command[command.index("--output_dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            log = [{"loss": 0.1, "num_tokens": 7, "recycle/rows": 8}]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        else:
            Path(command[command.index("--output") + 1]).write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(learning, "RUNS", tmp_path)
    monkeypatch.setattr(learning.subprocess, "run", call)
    monkeypatch.setattr(learning.record, "commit", lambda: "c0ffee")
    (tmp_path / "digits" / "spark_1" / "model" / "checkpoint-20").mkdir(parents=True)
    args = Namespace(jobs=2, steps=None, split="dev", questions=4, vllm=False)
    whole, resumed = (learning.one_run("digits", "spark", seed, args) for seed in (0, 1))
    assert whole["seconds"] >= 0 and resumed["seconds"] is None
    assert (resumed["tokens"], resumed["rollouts"]) == (7, 8)
    assert learning.one_run("digits", "spark", 0, args) == whole
    learning.one_run("smollm2", "spark", 0, args)
    (tmp_path / "smollm2" / "spark_0" / "model" / "trainer_state.json").unlink()
    learning.one_run("equations", "spark", 0, args)  # measured, not trained again
    outcomes = {path.name for path in (tmp_path / "smollm2" / "spark_0").glob("*dev.json")}
    assert outcomes == {"dev.json", "equations_dev.json"}
    assert [run["variant"] for run in learning.finished_runs("equations", "dev")] == ["spark"]
    with pytest.raises(learning.Failed, match="was trained for another number of steps"):  # a trial's is no result
        learning.one_run("digits", "spark", 0, Namespace(jobs=2, steps=3, split="dev", questions=4, vllm=False))


def test_the_pages_say_what_the_rows_do():
    """Each table of README.md, RESULTS.md and docs/ablations.md with a comment that names its columns."""
    tables = 0
    for page in pages.PAGES:
        text = (pages.ROOT / page).read_text(encoding="utf-8")
        assert pages.filled(text) == text, f"{page}: python -m benchmarks.pages writes its tables anew"
        tables += text.count("<!-- ")
    assert tables >= 15
    stale = text.replace("| first answer | 0.6", "| first answer | 0.7")
    assert stale != text and pages.filled(stale) == text


def test_measures_are_what_their_rows_come_to_and_questions_count():
    """Of every run with rows; a question on which two models differ makes their difference less sure."""
    runs = pages.runs_of("countdown_test")
    for run in runs:
        for how, prefix in (("sampled", ""), ("greedy", "greedy: ")):
            for name, measure in run[how]["measures"].items():
                ratios = intervals.by_question(run, prefix + name)
                if ratios is not None:
                    assert sum(n.sum() / d.sum() for n, d in ratios) / len(ratios) == pytest.approx(measure["mean"])
    assert intervals.by_question(runs[0], "vote of 8") is None
    rows = {"right": [[1, 1], [0, 0], [1, 0]], "judged": [[1, 1]] * 3, "reflected": [[1, 1]] * 3}
    one = {"sampled": {"rows": rows}}
    other = {"sampled": {"rows": {**rows, "right": [[0, 0], [0, 0], [1, 0]]}}}
    assert intervals.question_variance([one], [one, one], "first answer") == 0
    left_out = [0, 1 / 2, 1 / 2]  # the difference without each question
    expected = 2 / 3 * sum((d - 1 / 3) ** 2 for d in left_out)
    assert intervals.question_variance([one], [other], "first answer") == pytest.approx(expected)
