"""Three steps on images with each logger; what it was given is read back from its own files."""

import json
import sqlite3

import pytest
from helpers import config, digits

from train_spark import SparkConfig, SparkTrainer
from training.callbacks import shown_table


@pytest.fixture
def trained(tmp_path, processor, vision_model):
    """Trains three steps with a logger; returns what was logged last."""

    def train(logger):
        changes = {"report_to": [logger], "log_completions": True, "num_completions_to_print": 0, "project": "tests"}
        changes |= {"run_name": "three-steps", "trackio_static_space_id": False, "per_device_train_batch_size": 32}
        args = config(SparkConfig, tmp_path / "run", **changes)
        data = digits(32, ("sum", "difference"))
        trainer = SparkTrainer(vision_model, args=args, train_dataset=data, processing_class=processor)
        trainer.train()
        return [logs for logs in trainer.state.log_history if "loss" in logs]

    return train


def test_tensorboard_has_the_metrics_of_every_step(trained, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    logs = trained("tensorboard")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name in ("policy/accuracy", "judge/unparsed", "recycle/items", "reflection/fix_rate"):
        written = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert written == pytest.approx({entry["step"]: entry[name] for entry in logs if name in entry})
    assert len(board.Scalars("train/policy/accuracy")) == 3


def test_trackio_has_the_metrics_and_tables_of_recycled_rollouts(trained):
    logs = trained("trackio")
    import trackio

    (database,) = trackio.TRACKIO_DIR.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("select metrics from metrics order by id")]
    assert [row["train/policy/accuracy"] for row in rows if "train/policy/accuracy" in row] == pytest.approx(
        [entry["policy/accuracy"] for entry in logs]
    )
    tables = [row["recycled"]["_value"] for row in rows if "recycled" in row]
    assert len(tables) == 3
    first = tables[0][0]
    assert first["task"] in ("pointwise", "pairwise", "reflection") and first["step"] == 1
    assert {"shown", "completion", "label", "verdict", "reward", "image"} <= set(first)
    assert any(row["image"] for row in tables[0])


def test_a_table_has_the_verdict_that_was_read():
    class Logger:
        Image = str

        @staticmethod
        def Table(columns, data):
            return [dict(zip(columns, row, strict=True)) for row in data]

    row = {"prompt": "Is it?", "completion": "\\boxed{yes}", "label": "No", "reward": 0.0, "images": []}
    judged, reflected = shown_table(
        Logger, 3, [{**row, "task": "pointwise"}, {**row, "task": "reflection", "label": None}]
    )
    assert judged == {"step": 3, "task": "pointwise", "shown": "Is it?", "completion": "\\boxed{yes}", "label": "No",
                      "verdict": "Yes", "reward": 0.0, "image": None}  # fmt: skip
    assert reflected["verdict"] is None


def test_wandbs_tables_of_policy_rollouts_hold_texts(tmp_path, processor, vision_model):
    """Messages with and without images made wandb 0.31 raise TypeError in the first step."""
    args = config(SparkConfig, tmp_path, log_completions=True)
    trainer = SparkTrainer(vision_model, args=args, train_dataset=digits(16), processing_class=processor)
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    prompts = [[{"role": "user", "content": content}] for content in (parts, "How many?")]
    texts = [[{"role": "user", "content": content}] for content in ("Which?", "How many?")]
    for report_to, expected in (([], prompts), (["wandb"], texts)):
        trainer.args.report_to = report_to
        trainer._logs["prompt"].clear()
        trainer._logs["prompt"].extend(prompts)
        trainer._log_images([])
        assert list(trainer._logs["prompt"]) == expected
