"""What a run writes and says, by hand-made histories; the console of a real run is in test_stop.py."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from data.arguments import DataArguments
from recycle import RecycleConfig
from training.callbacks import WINDOW, MetricsFile, Progress, Watch, changed_settings, diagnose

ROOT = Path(__file__).parent.parent

FINE = {
    "reward": 0.5,
    "frac_reward_zero_std": 0.5,
    "policy/unboxed": 0.1,
    "judge/pointwise/positive_rate": 0.5,
    "judge/pairwise/first_rate": 0.5,
}


def history(**changes):
    rows = [dict(FINE, reward=0.5 + 0.01 * i) for i in range(WINDOW)]
    return [row | {name.replace("__", "/"): value for name, value in changes.items()} for row in rows]


def test_a_healthy_run_says_nothing():
    assert diagnose(history()) == {}
    assert diagnose([{"reward": 0.1}, {"reward": 0.2}]) == {}  # plain GRPO with other rewards


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"judge/unparsed": 0.75}, "unparsed", "75% of the verdicts can't be read"),
        ({"reward": 0.0}, "constant reward", "has been 0 in all of the last 20 logs"),
        ({"reward": None, "judge__pairwise__first_rate": None}, "nothing scorable", "no rollout could be scored"),
        ({"frac_reward_zero_std": 1.0}, "no mixed group", "no question had right and wrong rollouts"),
        ({"policy__unboxed": 0.6}, "unboxed", "60% of the rollouts"),
        ({"judge__pointwise__positive_rate": 0.97}, "pointwise", "says correct in 97%"),
        ({"judge__pointwise__positive_rate": 0.02}, "pointwise", "says incorrect in 98%"),
        ({"judge__pairwise__first_rate": 0.01}, "pairwise", "says B in 99%"),
    ],
)
def test_each_trouble_has_its_line(changes, name, says):
    found = diagnose(history(**changes))
    assert list(found) == [name]
    assert says in found[name]


def test_a_log_with_nothing_scorable_in_between_changes_nothing():
    rows = history()
    rows[3] = dict.fromkeys(rows[3])
    assert diagnose(rows) == {}


def test_a_trouble_is_told_once_and_again_when_it_comes_back(capsys):
    watch, state = Watch(), SimpleNamespace(is_world_process_zero=True, global_step=0)
    bad, good = history(policy__unboxed=0.9), history()
    for rows, told in ((bad[:-1], 0), (bad[-1:], 1), (bad, 0), (good, 0), (bad, 1)):
        for row in rows:
            watch.on_log(None, state, None, logs=row)
        assert capsys.readouterr().err.count("policy/unboxed") == told
    watch.on_log(None, state, None, logs={"train_runtime": 1.0})


def step_of(callback, state, control, logs=None):
    """A step of transformers' loop, logged or not."""
    state.global_step += 1
    control.should_log = logs is not None
    callback.on_step_end(None, state, control)
    if logs is not None:
        callback.on_log(None, state, control, logs=logs)


def test_metrics_jsonl_has_a_line_for_every_step_also_between_logs(tmp_path):
    lists = {"num_tokens": [0.0], "reward": []}
    callback, state, control = MetricsFile(lists), SimpleNamespace(), SimpleNamespace()
    callback.more = changed_settings(DataArguments(dataset="train.json", reward_funcs=["mine.py:f"]))
    state.is_world_process_zero, state.global_step, state.epoch = True, 2, 0.5
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "reward": 0.5}\n{"step": 3, "reward": 0.9}\n{"step": 4, "rew')  # killed in step 4
    args = TrainingArguments(str(tmp_path), learning_rate=0.5, hub_token="hf_secret", use_cpu=True)
    callback.on_train_begin(args, state, control, model=SimpleNamespace(config=SimpleNamespace(name_or_path="m")))
    lists["reward"] += [0.0, 1.0]
    lists["num_tokens"] = [10.0]
    step_of(callback, state, control)
    lists["reward"] += [float("nan")]
    step_of(callback, state, control, {"loss": 0.25, "reward": 0.5})  # the log's mean is over both steps
    lists.clear()
    callback.on_log(None, state, control, logs={"eval_reward": 0.75})
    lists["reward"] = [0.25]
    step_of(callback, state, control)
    callback.on_log(None, state, control, logs={"train_runtime": 1.0, "reward": 0.25})
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [
        {"step": 2, "reward": 0.5},
        {"step": 3, "epoch": 0.5, "num_tokens": 10.0, "reward": 0.5},
        {"step": 4, "epoch": 0.5, "loss": 0.25, "num_tokens": 10.0, "reward": None},
        {"step": 4, "epoch": 0.5, "eval_reward": 0.75},
        {"step": 5, "epoch": 0.5, "reward": 0.25},
    ]
    # An epoch's log follows the line of its last step: what it adds, and no means over the epoch under that step.
    callback.on_log(None, state, control, logs={"loss": 0.5, "reward": 0.75})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 5, "epoch": 0.5, "loss": 0.5}
    settings = json.loads((tmp_path / "settings.json").read_text())
    expected = {"model": "m", "output_dir": str(tmp_path), "learning_rate": 0.5, "hub_token": "<HUB_TOKEN>"}
    expected |= {"dataset": "train.json", "reward_funcs": ["mine.py:f"]}
    assert {name: settings[name] for name in expected} == expected and len(settings) < 14  # not the defaults


def test_lists_are_settings_too():
    """Or runs with other recycle_tasks would be seeds of one."""
    assert changed_settings(RecycleConfig()) == {}
    assert changed_settings(RecycleConfig(recycle_tasks=["pairwise"])) == {"recycle_tasks": ["pairwise"]}


def test_where_there_is_no_terminal_progress_is_a_line_every_so_many_steps(capsys):
    callback, control = Progress(), SimpleNamespace()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1000)
    names = ("generation_batch_size", "num_generations", "gradient_accumulation_steps", "steps_per_generation",
             "num_iterations", "recycle_ratio", "recycle_every")  # fmt: skip
    values = dict(zip(names, (64, 8, 2, 4, 1, 0.5, 2), strict=True))
    values |= {"recycle_matched": True, "recycle_tasks": ["pointwise"], "world_size": 1}
    args = SimpleNamespace(**values, output_dir="out", log_completions=False, report_to=["tensorboard"])
    callback.on_train_begin(args, state, control)
    for i in range(1000):
        # Several logs to a generation: only the first has figures.
        step_of(callback, state, control, {"loss": 0.1} | ({"policy/accuracy": 0.625} if i % 40 == 9 else {}))
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "1,000 steps: 32,000 rollouts (8 prompts x 8 each time), at most 8,000 recycled ones (4 x 8)",
        "logs: out/metrics.jsonl; also logs to tensorboard",
    ]
    lines = printed.err.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, *range(20, 1001, 20)]
    assert "  policy 0.62  " in lines[-1] and "0 min left" in lines[-1]


def test_help_shows_the_projects_settings_first_and_imports_nothing_heavy():
    code = (
        "import runpy, sys\nsys.argv = ['train_spark.py', '--help']\n"
        "try: runpy.run_path('train_spark.py', run_name='__main__')\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]", done.stdout[-200:]
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags[:2] == ["--config", "--dataset"]
    assert {"--recycle_ratio", "--recycle_apart", "--use_vllm", "--prompt_suffix", "--plan"} <= set(flags)
    assert "--adam_beta1" not in flags and "--help_all" in lines[-2]
    assert all(len(line) <= 120 for line in lines)


def test_help_names_every_setting_that_is_not_trls():
    from trl import GRPOConfig

    from data.arguments import DataArguments
    from train_spark import SparkConfig
    from training.console import help_lines

    names = {name for kind in (DataArguments, SparkConfig) for name in kind.__dataclass_fields__}
    names -= set(GRPOConfig.__dataclass_fields__) - {"use_vllm"}
    flags = {line.split()[0] for line in help_lines(ROOT / "train_spark.py") if line.startswith("  --")}
    assert flags == {f"--{name}" for name in names} | {"--config"}


def test_without_arguments_three_lines_say_what_to_do():
    done = subprocess.run([sys.executable, "train_spark.py"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 3)
    assert "--config recipes/demo.yaml" in done.stderr and "--help" in done.stderr
