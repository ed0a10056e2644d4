"""Ends that nobody planned: signals, kill -9, a full disk, a NaN. By the command, as a user meets them."""

import copy
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ForkedTraining, coin, config, save_text_model, sums
from safetensors.torch import load_file
from trl import GRPOTrainer

import train_spark
from data.digits import digit_rows
from data.rows import BadInput
from train_spark import SparkConfig, SparkTrainer
from training.callbacks import StopOnSignal
from training.checkpoint import (
    SafeCheckpoints,
    batches_in,
    copy_result,
    finished,
    last_checkpoint,
    load_batches,
    save_batches,
    where_to_start,
)
from training.settings import check_weights

COMMAND = [sys.executable, "train_spark.py", "--config", "recipes/demo.yaml", "--resume_from_checkpoint", "latest"]
SMALL = "--per_device_train_batch_size 16 --num_generations 4 --max_steps 6 --save_steps 1 --save_total_limit 3"
SMALL += " --recycle_ratio 1.5 --max_completion_length 24"


def command(data: Path, folder: Path) -> list[str]:
    return [*COMMAND, *SMALL.split(), "--dataset", str(data), "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 rows with and without images (the embedded 8,000 take seconds)."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i, row in enumerate(digit_rows("train", 64)):
        for image in row["images"]:
            image.save(folder / f"{i}.png")
        rows.append(
            {"prompt": row["prompt"], "image": f"{i}.png" if row["images"] else None, "solution": row["solution"]}
        )
    (folder / "rows.json").write_text(json.dumps(rows))

    return folder / "rows.json"


@pytest.fixture(scope="module")
def start(data):
    """Starts the command in a folder."""

    def start(folder: Path, *flags: str, **kwargs) -> subprocess.Popen:
        kwargs = {"stdout": subprocess.DEVNULL, **kwargs}
        return subprocess.Popen([*command(data, folder), *flags], stderr=subprocess.PIPE, text=True, **kwargs)

    return start


@pytest.fixture
def fork(data, tmp_path):
    """Starts it as `start` does, without the seconds that its imports take."""

    def fork(*flags: str, **kwargs) -> ForkedTraining:
        return ForkedTraining([*command(data, tmp_path)[2:], *flags], tmp_path / "errors.txt", **kwargs)

    return fork


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until this step, or a later one, has been saved."""
    while not any(int(p.parent.name[11:]) >= step for p in folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, start):
    """(folder, stdout, stderr) of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, stdout=subprocess.PIPE)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder, printed, errors


@pytest.fixture(scope="module")
def undisturbed(whole_run):
    """Its final weights."""
    return load_file(whole_run[0] / "model.safetensors")


def steps_written(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_a_run_says_what_it_will_do_and_what_came_out(whole_run):
    """And nothing else: no bars, no carriage returns, nothing that other libraries say."""
    folder, printed, errors = whole_run
    before, after = printed.splitlines()[:3], printed.splitlines()[3:]
    assert before[0].startswith("64 rows used of ")
    assert before[1] == "6 steps: 96 rollouts (4 prompts x 4 each time), at most 144 recycled ones (6 x 4)"
    assert before[2] == f"logs: {folder}/metrics.jsonl, completions/"
    assert after[0].startswith("6 steps, ") and "answers right 0." in after[0]
    assert after[1].startswith("judging and reflecting are scored on the step's own answers")
    assert after[2] == f"{folder}: the model, README.md, metrics.jsonl"
    assert after[3].startswith(f"next: python evaluate.py --model {folder} ")
    lines = errors.splitlines()
    assert [line.split()[1] for line in lines] == [f"{i}/6" for i in range(1, 7)], errors
    assert all("  policy 0." in line for line in lines)
    assert "\r" not in printed + errors
    assert steps_written(folder) == [1, 2, 3, 4, 5, 6]


def test_signals_save_and_the_run_goes_on_as_if_nothing_happened(tmp_path, start, fork, undisturbed):
    for begin, step, number in ((lambda: start(tmp_path), 1, signal.SIGINT), (fork, 3, signal.SIGTERM)):
        process = begin()
        wait_for_step(tmp_path, step, process)
        process.send_signal(number)
        assert process.wait() == 128 + number
        errors = process.stderr.read()
        assert f"{number.name}: stopping after this step" in errors
        assert "Traceback" not in errors
        saved = last_checkpoint(tmp_path)
        assert f"stopped; saved in {saved}" in errors
        assert int(Path(saved).name[11:]) < 6
        assert not (tmp_path / "model.safetensors").exists()  # or the demo would take it for finished
    again = fork()
    assert again.wait() == 0, again.stderr.read()
    assert_same(tmp_path, undisturbed)
    assert steps_written(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_kill_9_at_random_moments_loses_nothing_saved(tmp_path, fork, undisturbed):
    rng = random.Random(0)
    for step in (1, 2, 4):  # some of these fall into the saving of a checkpoint, others into a rollout
        process = fork()
        wait_for_step(tmp_path, step, process)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
        reached = int(Path(last_checkpoint(tmp_path)).name[11:])
        assert reached >= step
        if reached >= 5:
            break
    final = fork()
    assert final.wait() == 0, final.stderr.read()
    assert_same(tmp_path, undisturbed)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, fork, whole_run):
    """The limit on a file's size fails in the same writes as a full disk, and needs no disk to be filled."""
    shutil.copytree(whole_run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    full = fork(file_limit=1_000_000)  # the weights have 4.7 MB
    assert full.wait() == 1
    errors = full.stderr.read()
    assert "Traceback" not in errors
    assert "the checkpoint of step 5 could not be saved" in errors
    assert f"The last complete one is {tmp_path / 'checkpoint-4'}" in errors
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-5").exists()  # half a checkpoint is room that somebody needs
    again = fork("--max_steps", "5")
    assert again.wait() == 0, again.stderr.read()


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_nan_stops_with_its_batch_saved(where, tmp_path, processor, text_model, monkeypatch):
    trainer = SparkTrainer(
        text_model, coin, config(SparkConfig, tmp_path), train_dataset=sums(8), processing_class=processor.tokenizer
    )
    weight = trainer.model.lm_head.weight
    if where == "loss":
        calls = iter([False] * 2 + [True] * 9)
        inherited = GRPOTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            return inherited(self, *args, **kwargs) * (float("nan") if next(calls) else 1.0)

        monkeypatch.setattr(GRPOTrainer, "compute_loss", compute_loss)
    else:
        weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weight.detach().clone()
    with pytest.raises(FloatingPointError, match=f"the {where} is nan") as error:
        trainer.train()
    step = trainer.state.global_step
    assert f"step {step}:" in str(error.value)
    if where != "loss":
        assert torch.equal(trainer.model.lm_head.weight, before)
    (texts,), (tensors,) = tmp_path.glob("nonfinite/*.jsonl"), tmp_path.glob("nonfinite/*.safetensors")
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    saved = list(batches_in(load_batches(tensors, torch.device("cpu"))))
    assert len(rows) == sum(len(batch["advantages"]) for batch in saved) > 8
    assert any("What is" in row["prompt"] for row in rows)


def test_a_finished_run_that_is_resumed_has_nothing_to_do(
    tmp_path, data, fork, whole_run, undisturbed, monkeypatch, capsys
):
    """As by a job that is queued again: no further step, the same weights, status 0."""
    shutil.copytree(whole_run[0], tmp_path, dirs_exist_ok=True)
    for present in (True, False):  # the second time as if it had been killed before its result was saved
        if not present:
            (tmp_path / "model.safetensors").unlink()
        (tmp_path / "trainer_state.json").unlink()
        monkeypatch.setattr("sys.argv", command(data, tmp_path)[1:])
        train_spark.main()
        assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 6
        assert f"{tmp_path}: finished before" in capsys.readouterr().out
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
        assert_same(tmp_path, undisturbed)
    further = fork("--max_steps", "7")
    assert further.wait() == 0, further.stderr.read()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")


@pytest.mark.parametrize("trace", ["checkpoint-8/trainer_state.json", "completions/completions_00003.parquet"])
def test_a_new_run_is_not_mixed_with_an_earlier_one(trace, tmp_path, monkeypatch, capsys):
    path = tmp_path / trace
    path.parent.mkdir()
    path.write_text("{}")
    monkeypatch.setattr("sys.argv", ["train_spark.py", "--config", "recipes/demo.yaml", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        train_spark.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert f"output_dir: {tmp_path} has an earlier run's {trace.split('/')[trace.startswith('completions')]}" in error
    assert "--resume_from_checkpoint latest" in error and "\n" not in error


def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """Of save_strategy no, or of save_total_limit and a model that was moved."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["train_spark.py", *COMMAND[2:], "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        train_spark.main()
    assert ended.value.code == 2
    assert f"output_dir: {tmp_path} has a model and no checkpoint to go on from" in capsys.readouterr().err


@pytest.mark.parametrize("launched", [True, False])
def test_who_launched_it_is_told_how_long_the_launcher_waits(launched, monkeypatch, capsys):
    """accelerate launch and torchrun kill what takes longer than that."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopOnSignal(SimpleNamespace(is_main_process=True))
    stop._hear(signal.SIGTERM, None)
    stop.on_train_end(None, None, None)
    assert ("launcher waits 30 seconds" in capsys.readouterr().err) == launched
    assert stop.received == signal.SIGTERM


def test_a_signal_that_another_process_hears_stops_this_one():
    gathered = torch.tensor([0, int(signal.SIGTERM)])
    stop = StopOnSignal(SimpleNamespace(is_main_process=True, device="cpu", gather=lambda heard: gathered))
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_step_end(None, None, control)
    stop.on_train_end(None, None, None)
    assert control.should_save and control.should_training_stop and stop.received == signal.SIGTERM


def test_another_number_of_processes_draws_the_generation_anew(tmp_path, processor, text_model, capsys):
    def trainer(folder):
        half = {"steps_per_generation": 2, "per_device_train_batch_size": 8}
        arguments = config(SparkConfig, folder, max_steps=4, save_strategy="steps", save_steps=3, **half)
        model, tokenizer = copy.deepcopy(text_model), processor.tokenizer
        return SparkTrainer(model, coin, arguments, train_dataset=sums(16), processing_class=tokenizer)

    trainer(tmp_path / "whole").train()
    saved = tmp_path / "whole" / "checkpoint-3"
    (saved / "spark_state.json").write_text('{"step": 3, "processes": 2}')
    (saved / "generation" / "rank_0.safetensors").unlink()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 4 and "drawn anew" in capsys.readouterr().err


@pytest.mark.parametrize("saved_by", [1, 2])
@pytest.mark.parametrize("epochs", [0, 1])
def test_other_accumulation_keeps_optimizer_steps_within_a_generation(
    saved_by, epochs, tmp_path, processor, text_model, capsys
):
    """Half the batch, twice the accumulation, as on half as many GPUs; saved in the middle of a generation."""
    slots = []

    class Seen(SparkTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            slots.append((self._step % self.args.steps_per_generation, self.accelerator.sync_gradients))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def trainer(folder, steps, **settings):
        arguments = config(SparkConfig, folder, max_steps=steps, save_strategy="steps", save_steps=1, **settings)
        model, tokenizer = copy.deepcopy(text_model), processor.tokenizer
        return Seen(model, coin, arguments, train_dataset=sums(8), processing_class=tokenizer)

    steps = 2 * epochs + 1  # an epoch is one generation, of two optimizer steps
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer(tmp_path / "whole", steps, **whole).train()
    saved = tmp_path / "whole" / f"checkpoint-{steps}"
    state = json.loads((saved / "spark_state.json").read_text())
    assert state["step"] == 2 * steps and state["processes"] == 1
    (saved / "spark_state.json").write_text(json.dumps({**state, "processes": saved_by}))
    slots.clear()
    halved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    trainer(tmp_path / "resumed", steps + 3, **halved).train(resume_from_checkpoint=str(saved))
    assert [slot for slot, _ in slots] == [4, 5, 6, 7, *range(8)]
    assert [slot for slot, ends in slots if ends] == [7, 3, 7]  # an optimizer step never has rows of two generations
    assert "gradient_accumulation_steps 2, now 4" in capsys.readouterr().err


def test_a_checkpoint_without_its_layout_is_of_this_one(tmp_path, processor, text_model):
    """As they were saved before it was written down."""
    settings = {"max_steps": 2, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}

    def trainer(folder):
        arguments = config(SparkConfig, folder, per_device_train_batch_size=8, **settings)
        model, tokenizer = copy.deepcopy(text_model), processor.tokenizer
        return SparkTrainer(model, coin, arguments, train_dataset=sums(8), processing_class=tokenizer)

    whole = trainer(tmp_path / "whole")
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-1"
    (saved / "spark_state.json").write_text('{"step": 1, "processes": 1}')
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(saved))
    for before, after in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_loss_that_is_not_finite_in_an_evaluation_does_not_end_training(tmp_path, processor, text_model, monkeypatch):
    inherited = GRPOTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        return inherited(self, *args, **kwargs) * (1.0 if self.model.training else float("nan"))

    monkeypatch.setattr(GRPOTrainer, "compute_loss", compute_loss)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 4}
    arguments, tokenizer = config(SparkConfig, tmp_path, max_steps=1, **evaluation), processor.tokenizer
    data = sums(4)
    trainer = SparkTrainer(
        text_model, coin, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    assert math.isnan([logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs][-1])
    assert not (tmp_path / "nonfinite").exists()


def test_a_reference_model_that_moves_is_resumed(tmp_path, processor, text_model, capsys):
    settings = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.9}
    settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    save_text_model(text_model, processor.tokenizer, tmp_path / "start")

    def trained(folder, checkpoint=None):
        arguments = config(SparkConfig, folder, **settings)
        model, tokenizer = str(tmp_path / "start"), processor.tokenizer
        trainer = SparkTrainer(model, coin, arguments, train_dataset=sums(16), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [*trainer.model.parameters(), *trainer.ref_model.parameters()]

    whole, saved = trained(tmp_path / "whole"), tmp_path / "whole" / "checkpoint-2"
    for before, after in zip(whole, trained(tmp_path / "resumed", str(saved)), strict=True):
        assert torch.equal(before, after)
    assert "has no reference model" not in capsys.readouterr().err
    shutil.rmtree(saved / "reference")
    trained(tmp_path / "without", str(saved))
    assert "has no reference model" in capsys.readouterr().err


def test_deepspeeds_state_is_resumed_with_as_many_processes(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "global_step3").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    (checkpoint / "spark_state.json").write_text('{"step": 3, "processes": 2}')
    args = SimpleNamespace(resume_from_checkpoint=str(checkpoint), output_dir=str(tmp_path), world_size=2)
    assert where_to_start(args) == str(checkpoint)
    args.world_size = 1
    with pytest.raises(BadInput, match=r"expected 2 processes, with which DeepSpeed saved .*, got 1; a new run"):
        where_to_start(args)


def test_each_process_keeps_its_own_rest():
    rank = SimpleNamespace(accelerator=SimpleNamespace(process_index=1))
    assert SafeCheckpoints._rest_of_generation.fget(rank) == "generation/rank_1.safetensors"


@pytest.mark.parametrize(("had", "asked", "done"), [(2, 2, True), (2, 3, False), (0.5, 1.0, False), (1.5, 1.5, True)])
def test_a_run_is_finished_for_as_many_epochs_as_it_had(had, asked, done, tmp_path):
    state = {"global_step": 8, "max_steps": 8, "num_train_epochs": math.ceil(had), "epoch": had}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert finished(str(tmp_path), -1, asked) is done


def test_with_fp16_an_overflow_is_skipped_and_not_the_end(tmp_path, processor, text_model, monkeypatch):
    arguments = config(SparkConfig, tmp_path)
    trainer = SparkTrainer(text_model, coin, arguments, train_dataset=sums(4), processing_class=processor.tokenizer)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    assert trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(math.inf)) == math.inf


def test_a_result_is_copied_without_the_optimizer_s_state(tmp_path):
    saved, result = tmp_path / "checkpoint-1", tmp_path / "result"
    saved.mkdir()
    result.mkdir()
    for name in ("optimizer.bin", "pytorch_model_fsdp.bin", "model.safetensors", "pytorch_model-00001.bin"):
        (saved / name).write_text("")
    copy_result(str(saved), result)
    assert {path.name for path in result.iterdir()} == {"model.safetensors", "pytorch_model-00001.bin"}


def test_kept_batches_are_no_weights(tmp_path):
    """A run that met a NaN, went on and was killed before it saved its model has none yet."""
    saved, result = tmp_path / "checkpoint-1", tmp_path / "result"
    for folder in (saved / "generation", result / "nonfinite"):
        save_batches([{"advantages": torch.zeros(2)}], folder / "rank_0.safetensors")
    with pytest.raises(ValueError, match="has no weights"):
        check_weights(str(saved))
    (saved / "model.safetensors").write_text("")
    copy_result(str(saved), result)
    assert (result / "model.safetensors").exists() and not (result / "generation").exists()


def test_the_newest_checkpoint_has_the_highest_number(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.is_whole", lambda path: True)
    for step in (900, 1000, 99):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1000")
