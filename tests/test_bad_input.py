"""What is given wrongly ends in one line on stderr, status 2 and nothing written: settings first, then every command of
the two READMEs with each of its inputs replaced."""

import importlib
import json
import re
from pathlib import Path

import pytest

from data.tiny_model import OUTPUT

ROOT = Path(__file__).parent.parent
MAINS = {"train_spark.py": "train_spark", "evaluate.py": "evaluate", "calculate_acc.py": "calculate_acc",
         "report.py": "report", "merge.py": "merge", "-m data.check": "data.check", "-m data.filter": "data.filter",
         "-m data.judge_sets": "data.judge_sets"}  # fmt: skip


def run(command: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, list[str]]:
    """(exit status, lines on stderr) of a command, in this process."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [command.removeprefix("-m "), *arguments])
    main = importlib.import_module(MAINS[command]).main
    try:
        status = main() or 0
    except SystemExit as ended:
        status = ended.code or 0
    return status, capsys.readouterr().err.splitlines()


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--load_in_4bit true --use_peft true",
            "load_in_4bit: bitsandbytes is not installed; requirements.txt has its",
        ),
        ("--report_to wandb", "report_to: wandb is not installed; pip install wandb, or set report_to to none"),
        ("--report_to paper", "report_to: expected none or some of .*tensorboard.*, got paper"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size: expected 1 or more, got 0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps: expected 1 or more, got 0"),
        ("--num_generations 0", "num_generations: expected 1 or more, got 0"),
        ("--max_steps many", "argument --max_steps.*: invalid int value: 'many'"),
        ("--answer_kind number", "argument --answer_kind.*: invalid choice: 'number'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(flags, expected, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    absent = ("bitsandbytes", "wandb")
    monkeypatch.setattr("training.settings.find_spec", lambda name: None if name in absent else find_spec(name))
    monkeypatch.setattr("training.settings.get_available_reporting_integrations", list)
    recipe = ["--config", str(ROOT / "recipes/demo.yaml"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.chdir(ROOT)
    status, lines = run("train_spark.py", [*recipe, *flags.split()], monkeypatch, capsys)
    assert status == 2 and len(lines) == 1
    assert re.match(f"train_spark.py: {expected}", lines[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["dataset: digits\n  bad: [1\n", "dataset: digits\nmodel_na", "- a\n", "hello", ""])
def test_a_recipe_that_is_none_is_named(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    status, lines = run("train_spark.py", ["--config", str(tmp_path / "recipe.yaml")], monkeypatch, capsys)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"train_spark.py: --config {tmp_path / 'recipe.yaml'}: expected a recipe in YAML")


def test_a_recipe_with_a_list_for_a_number_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("dataset: digits\noutput_dir: x\nlearning_rate: [1, 2]\n")
    status, lines = run("train_spark.py", ["--config", str(tmp_path / "recipe.yaml")], monkeypatch, capsys)
    assert (status, len(lines)) == (2, 1)


@pytest.mark.parametrize("missing", ["prompt", "solution"])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_from_python_a_data_set_without_its_columns_is_named(name, missing, processor, tmp_path):
    from datasets import Dataset

    from train_spark import SparkConfig, SparkTrainer

    rows = {"prompt": ["1+1?"] * 8, "solution": ["2"] * 8}
    broken = {column: values for column, values in rows.items() if column != missing}
    data = {"train_dataset": Dataset.from_dict(rows), name: Dataset.from_dict(broken)}
    args = SparkConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=f"^{name}: expected a column {missing}, got {next(iter(broken))}$"):
        SparkTrainer(str(OUTPUT), args=args, processing_class=processor, **data)


def test_from_python_another_reward_may_do_without_a_solution(processor, tmp_path):
    from datasets import Dataset

    from train_spark import SparkConfig, SparkTrainer

    def length(prompts, completions, **columns):
        return [0.0] * len(completions)

    args = SparkConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", recycle_ratio=0)
    data = Dataset.from_dict({"prompt": ["1+1?"] * 8})
    assert SparkTrainer(str(OUTPUT), length, args, data, processing_class=processor)


def test_an_adapter_is_no_model_to_evaluate(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    (tmp_path / "bench.json").write_text(json.dumps([{"problem": "1+1?", "answer": "2"}]))
    monkeypatch.chdir(tmp_path)
    files = ["--model", "run", "--benchmark", "bench.json", "--output", "r.json"]
    status, lines = run("evaluate.py", files, monkeypatch, capsys)
    expected = (
        "--model run: expected a model, got an adapter (LoRA); python merge.py run makes a model of it, in run/merged"
    )
    assert (status, lines) == (2, [f"evaluate.py: {expected}"])
