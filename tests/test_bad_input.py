"""What is given wrongly ends in one line on stderr, status 2 and nothing written: settings first, then every command of
the two READMEs with each of its inputs replaced."""

import importlib
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from models.make_digits import OUTPUT

ROOT = Path(__file__).parent.parent
MAINS = {
    "train_spark.py": "train_spark",
    "evaluate.py": "evaluate",
    "calculate_acc.py": "calculate_acc",
    "report.py": "report",
    "-m training.merge": "training.merge",
    "-m data.check": "data.check",
    "-m data.filter": "data.filter",
}


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
        "--model run: expected a model, got an adapter (LoRA); python -m training.merge run makes a model of it, in "
    )
    expected += "run/merged"
    assert (status, lines) == (2, [f"evaluate.py: {expected}"])


# ---- every command, with each of its inputs replaced -----------------------------------------------------------------

# command -> its arguments here, in which {name} is an input that is right
COMMANDS = {
    "train_spark.py": "--config {recipe} --dataset {train} --eval_dataset {train} --eval_strategy epoch "
    "--image_root {images} --model_name_or_path {model} --output_dir out",
    "train_spark.py --plan": "--config {recipe} --dataset digits --plan {launch} --output_dir out",
    "train_spark.py --resume": "--config {recipe} --resume_from_checkpoint {checkpoint} --output_dir out",
    "evaluate.py": "--model {model} --benchmark {benchmark} --image_root {images} --output out/r.json",
    "evaluate.py --mode judge": "--mode judge --model {model} --benchmark {judged} --output out/r.json",
    "calculate_acc.py": "--result_path {results} {results}",
    "report.py": "{run} --output out/report.html",
    "-m training.merge": "{adapter} --output out",
    "-m data.check": "{train} --image_root {images} --against {benchmark} --model {model} --workers 1",
    "-m data.filter": "--model {model} --dataset {train} --image_root {images} --output out/hard.parquet",
}
# What of another command is no mistake.
ALSO_RIGHT = {
    "train": {"benchmark"},
    "benchmark": {"train"},
    "run": {"checkpoint"},
    "-m data.check": {"train", "benchmark", "judged"},
}


def cut(path: Path) -> None:
    """Half of a file, within a line; of a folder, of each of its files."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        half = content[: len(content) // 2]
        file.write_bytes(half[: half.rindex(b"\n") + 4] if path.suffix == ".yaml" else half)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Every input that a command has, as it should be."""
    folder = tmp_path_factory.mktemp("inputs")
    found = {name: folder / file for name, file in (
        ("recipe", "recipe.yaml"), ("launch", "launch.yaml"), ("train", "train.json"), ("benchmark", "bench.json"),
        ("judged", "judged.json"), ("results", "results.json"), ("images", "images"),
        ("model", "model"), ("run", "run"), ("checkpoint", "run/checkpoint-1"), ("adapter", "adapter"),
    )}  # fmt: skip
    for name in ("images", "run/checkpoint-1", "adapter"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(OUTPUT, found["model"])
    Image.effect_noise((56, 56), 50).save(found["images"] / "a.png")
    recipe = (ROOT / "recipes" / "demo.yaml").read_text().replace("models/digits", str(OUTPUT))
    found["recipe"].write_text(recipe.replace("report_to", "#") + "report_to: none\n")
    shutil.copy(ROOT / "recipes" / "accelerate" / "ddp.yaml", found["launch"])
    row = {"dataset": "d", "problem": "Area?", "image_path": "a.png"}
    rows = {
        "train": [{"prompt": f"{i}+1?", "solution": str(i + 1), "image": "a.png"} for i in range(40)],
        "benchmark": [{**row, "answer": "12"}] * 3,
        "judged": [{**row, "image_path": None, "chosen": "12", "rejected": "7"}] * 3,
        "results": [{**row, "ground_truth": "12", "extracted_answer": "12", "error": None}] * 3,
    }
    for name, records in rows.items():
        found[name].write_text(json.dumps(records, indent=1))
    state = {"global_step": 1, "max_steps": 2, "log_history": [{"step": 1, "loss": 0.5, "policy/accuracy": 0.5}]}
    for place in (found["run"], found["checkpoint"]):
        (place / "trainer_state.json").write_text(json.dumps(state))
    config = {"peft_type": "LORA", "base_model_name_or_path": str(OUTPUT), "r": 4, "target_modules": ["q_proj"]}
    (found["adapter"] / "adapter_config.json").write_text(json.dumps(config))
    (found["adapter"] / "adapter_model.safetensors").write_bytes(b"half of it")
    return found


def replacements(command: str, name: str, inputs: dict[str, Path], folder: Path) -> dict[str, Path | str]:
    """What may stand where an input should."""
    right, noise = inputs[name], random.Random(0).randbytes(3000)
    file = f"x{right.suffix or '.json'}"
    for kind in ("folder", "binary", "empty", "half"):
        (folder / kind).mkdir()
    (folder / "folder" / "notes.txt").write_text("nothing of use")
    (folder / "binary" / file).write_bytes(noise)
    (folder / "empty" / file).touch()
    half = folder / "half" / right.name
    (shutil.copytree if right.is_dir() else shutil.copy)(right, half)
    cut(half)
    found = {
        "no name": "",
        "nothing": folder / "none" / file,
        "a folder": folder / "folder",
        "a binary file": folder / "binary" / file,
        "an empty file": folder / "empty" / file,
        "half of it": half,
    }
    if name == "model" and not command.startswith(("-m data.check", "-m data.filter")):  # those read no weights here
        weights = folder / "half its weights"
        shutil.copytree(right, weights)
        cut(weights / "model.safetensors")
        found["half its weights"] = weights
    if name == "images":
        found.pop("half of it")
        found.pop("a folder")
        found["a folder without them"] = folder / "folder"
    allowed = {name} | ALSO_RIGHT.get(name, set()) | ALSO_RIGHT.get(command, set())
    return found | {f"{other} of another command": path for other, path in inputs.items() if other not in allowed}


def documented() -> set[tuple[str, str]]:
    """(script, flag) of each command in the two READMEs; the flag is "" for the command itself."""
    found = set()
    for readme in (ROOT / "README.md", ROOT / "data" / "README.md"):
        text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:^|`)\s*((?:accelerate launch|python) [^`\n]+)", text, re.MULTILINE):
            named = re.search(r"-m [\w.]+|\w+\.py", line)
            script = named[0] if named else "train_spark.py"  # accelerate launch ...
            flags = re.findall(r"--\w+", line[named.end() if named else 0 :])
            found |= {(script, flag) for flag in ("", *flags)}
    return found


def test_every_documented_command_and_input_is_walked():
    """Of the scripts with inputs; the others make things out of nothing."""
    walked = {
        (next(s for s in MAINS if c.startswith(s)), part) for c, t in COMMANDS.items() for part in ["", *t.split()]
    }
    inputs = {"--config", "--dataset", "--image_root", "--model", "--benchmark", "--result_path", "--against",
              "--model_name_or_path", "--eval_dataset", "--resume_from_checkpoint", "--plan"}  # fmt: skip
    without_inputs = ("-m models.make_digits", "-m models.make_countdown", "-m models.smollm2", "-m benchmarks.")
    commands = {(script, flag) for script, flag in documented() if not script.startswith(without_inputs)}
    assert len({script for script, _ in commands}) == len(MAINS)
    assert {(script, flag) for script, flag in commands if flag in inputs or not flag} <= walked


CASES = [(command, name) for command, text in COMMANDS.items() for name in dict.fromkeys(re.findall(r"{(\w+)}", text))]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_an_input_that_is_none_is_one_line(command, name, inputs, tmp_path, monkeypatch, capsys):
    """Status 2, one line that names it, no traceback, nothing written."""
    work, given = tmp_path / "work", tmp_path / "given"
    work.mkdir()
    given.mkdir()
    monkeypatch.chdir(work)
    wrong = []
    script = next(script for script in MAINS if command.startswith(script))
    for kind, path in replacements(command, name, inputs, given).items():
        arguments = COMMANDS[command].replace(f"{{{name}}}", shlex.quote(str(path)), 1).format(**inputs)
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        try:
            status, lines = run(script, shlex.split(arguments), monkeypatch, capsys)
        except BaseException as error:
            status, lines = 1, [f"{type(error).__name__}: {error}"]
        after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        if (status, len(lines)) != (2, 1) or before != after:
            wrong.append((kind, status, lines, [str(f) for f in after if f not in before]))
    assert not wrong, "\n".join(map(str, wrong))
