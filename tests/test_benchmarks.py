"""The benchmark scripts that want a GPU, small and on the CPU: they run, can be cut, and keep every row."""

import json
import sys

import pytest

from benchmarks import gpu_smollm2


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
            seconds = dict(row["seconds"])
            whole = seconds.pop("step")
            assert {"generate", "score", "loss", "train", "other"} <= seconds.keys()
            assert all(value >= 0 for value in seconds.values())
            assert sum(seconds.values()) == pytest.approx(whole)
    recycled = [row["metrics"]["recycle/rows"] for row in result["runs"]["spark"]]
    assert all(0 < rows <= 16 for rows in recycled)
    assert "recycle/rows" not in result["runs"]["grpo"][0]["metrics"]
    assert result["table"]["spark"]["tokens_per_second"] > 0


def test_gpu_smollm2_says_what_is_missing(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--model", tmp_path / "none") == 2
    assert "python -m models.smollm2" in capsys.readouterr().err
