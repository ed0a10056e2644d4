"""Countdown: the checker against hostile answers, the splits, the files, and the small model."""

import random
import time

import pytest
from helpers import config, history

from benchmarks import trusting
from data import countdown
from data.countdown import (
    Game,
    attempt,
    countdown_reward,
    draw_question,
    held_out,
    parse,
    read_task,
    same,
    solves,
    split_of,
)
from data.read import read_dataset
from models import make_countdown, warm_start
from prompts import PROMPT_SUFFIX, TEMPLATES
from verify import extract_boxed

START = "models/countdown"


# ---------------------------------------------------------------------------------------------------------------------
# The checker


@pytest.mark.parametrize(
    "answer",
    [
        "(3+4)*2",
        " ( 4 + 3 ) * 2 ",
        "2*(((3))+4)",
        r"2 \times (3 + 4)",
        r"\left(3+4\right)\cdot 2",
        "(3+4)×2",
        "(03+4)*2",
    ],
)
def test_an_expression_that_solves_the_task(answer):
    assert solves(answer, "14 from 3, 4, 2") is True


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "14",
        "7*2",  # 7 is not one of the numbers
        "3+4*2",  # 11
        "(3+4)*2+3-3",  # numbers used again
        "2*(3+4)*1",
        "3+4",
        "(3+4)*2=14",
        "+(3+4)*2",
        "-2*-(3+4)",
        "(3+4)2",
        "3 4 2",
        "3+4)*2",
        "((3+4)*2",
        "()(3+4)*2",
        "(3+4)**2",
        "(3+4)//2",
        "28/2",
        "(3.0+4)*2",
        "(3+4)*2 # 14",
        "1_4",
        "(٣+٤)*٢",
        "(3+4)²",
        "(3+4)*2\x00",
        "__import__('os').system('true')",
        "lambda: 14",
    ],
)
def test_an_expression_that_does_not(answer):
    assert solves(answer, "14 from 3, 4, 2") is False


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 100_000,
        ")" * 100_000,
        "(" * 100_000 + "3" + ")" * 100_000,
        "9" * 100_000,
        "*".join(["999999999"] * 20_000),
        "3" + "+4" * 50_000,
        " " * 100_000,
        "\\left" * 50_000,
        "(" * 99 + "3" + ")" * 99,
        "9" * 200,
        "-".join(["(9*9)"] * 33),
    ],
)
def test_hostile_length_and_depth(answer):
    start = time.perf_counter()
    assert solves(answer, "14 from 3, 4, 2") is False
    assert same([(answer, answer), (answer, "3+4")]) == [True, False]
    assert countdown_reward(None, ["\\boxed{" + answer + "}"], ["14 from 3, 4, 2"]) == [0.0]
    assert time.perf_counter() - start < 2


def test_precedence_and_order_of_evaluation():
    for text in ("9-3-2", "9-(3-2)", "2+3*4", "(2+3)*4", "2*3-4*5", "7-2*3+1", "((1))", "8-(7-(6-5))*2"):
        assert parse(text).value == eval(text)  # noqa: S307, our own text
    assert parse("9-3*2").numbers == (9, 3, 2)


@pytest.mark.parametrize(
    "task",
    [None, "", "14", 14, ["14 from 3, 4, 2"], {"target": 14}, "14 from", "14 from 3", "14 from 3, x", "3, 4, 2",
     "14 from 3, 4, 2; 5", "14 from " + ", ".join(["1"] * 1000), "1" * 50 + " from 3, 4"],
)  # fmt: skip
def test_a_row_without_a_readable_task_is_unscorable(task):
    assert solves("3+4", task) is None
    completions = [r"\boxed{(3+4)*2}", r"\boxed{(3+4)*2}", "no box"]
    rewards = countdown_reward(None, completions, ["14 from 3, 4, 2", task, task])
    assert rewards == [1.0, None, None]


def test_reward_in_trls_form():
    texts = [
        r"3+4=7, 7*2=14, wanted:14: yes. \boxed{(3+4)*2}",
        r"\boxed{3} then \boxed{4*(3-2)}",
        "14",
        r"\boxed{(3+4)*2",
    ]
    tasks = ["14 from 3, 4, 2", "4 from 3, 4, 2", "14 from 3, 4, 2", "14 from 3, 4, 2"]
    assert countdown_reward(["q"] * 4, texts, tasks, images=[None] * 4) == [1.0, 1.0, 0.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert countdown_reward(prompts=None, completions=messages, solution=tasks, task=None) == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        countdown_reward(None, texts, tasks[:3])


def test_two_answers_are_the_same_as_expressions_and_never_by_value():
    pairs = {
        ("(3+4)*2", "2 * (4+3)"): True,
        ("(3+4)*2", r"2\times((3)+4)"): True,
        ("3+(4+2)", "(2+3)+4"): True,
        ("9-(3-2)", "9-3+2"): True,
        ("3*4-2", "(3*4)-2"): True,
        ("3*4-2", "3*(4-2)"): False,
        ("9-3-2", "9-(3-2)"): False,
        ("7*2", "14"): False,
        ("2*2", "2+2"): False,
        ("3+4", "4+3+0"): False,
        ("6*(5-4)", "6*(7-6)"): False,
        ("nothing", "nothing "): True,
        ("nothing", "3+4"): False,
        ("3+4", None): None,
        (None, None): None,
    }
    assert same(list(pairs)) == list(pairs.values())
    assert same([(b, a) for a, b in pairs]) == list(pairs.values())
    assert countdown_reward.equal is same


# ---------------------------------------------------------------------------------------------------------------------
# Questions


@pytest.mark.parametrize("game", [Game(), Game(counts=(3, 4), largest=99)])
def test_splits_share_no_numbers_and_no_question_comes_twice(game):
    numbers = {}
    for split in ("train", "dev", "test"):
        rows = held_out(split, 200, game=game)["answers"]
        tasks = [(tuple(sorted(ns)), target) for ns, target in (read_task(row["answer"]) for row in rows)]
        assert len(set(tasks)) == 200
        numbers[split] = {ns for ns, _ in tasks}
        assert all(split_of(random.sample(ns, len(ns))) == split for ns in numbers[split])
    assert not (
        numbers["train"] & numbers["test"] or numbers["train"] & numbers["dev"] or numbers["dev"] & numbers["test"]
    )


def test_questions_are_the_same_for_the_same_seed():
    assert held_out("test", 50, seed=3) == held_out("test", 50, seed=3)
    assert held_out("test", 50, seed=3) != held_out("test", 50, seed=4)


@pytest.mark.parametrize("game", [Game(), Game(counts=(3, 4), largest=99)])
def test_every_question_has_a_solution_within_the_bounds(game):
    rng = random.Random(0)
    for _ in range(300):
        question = draw_question("train", game, rng)
        assert len(question.numbers) in game.counts
        assert solves(question.way.expression, question.solution) is True
        assert all(1 <= result <= game.most for *_, result in question.way.steps)
        assert all(str(number) in question.text for number in (*question.numbers, question.target))


def test_right_and_wrong_answers_look_alike():
    """Wrong ones claim success, and write the target as their last result half of the time."""
    rng = random.Random(0)
    called = 0
    for _ in range(300):
        question = draw_question("test", Game(), rng)
        for right in (True, False):
            text, way = attempt(question, right, rng, 99)
            assert countdown_reward(None, [text], [question.solution]) == [float(right)]
            assert extract_boxed(text) == way.expression
            assert text.count(": yes.") == 1
            called += not right and f"={question.target}, wanted:{question.target}: yes." in text
    assert 120 < called < 180


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_that_evaluation_and_training_read(split, tmp_path, capsys):
    from data.rows import Source
    from evaluate import read_benchmark

    path = tmp_path / "new" / "countdown.json"
    assert countdown.main(["--split", split, "--n", "30", "--output", str(path)]) == 0
    files = sorted(file.name for file in path.parent.iterdir())
    if split == "train":
        assert files == ["countdown.json"]
        rows = read_dataset(path)
        assert all(read_task(task) for task in rows["solution"])
        assert all(prompt[0]["content"].endswith(PROMPT_SUFFIX) for prompt in rows["prompt"])
        return
    assert files == ["countdown.json", "countdown_pairs.json", "countdown_points.json"]
    answers = read_benchmark(Source(str(path)), "answer")
    pairs = read_benchmark(Source(str(path.with_name("countdown_pairs.json"))), "judge")
    points = read_benchmark(Source(str(path.with_name("countdown_points.json"))), "judge")
    assert [len(rows) for rows in (answers, pairs, points)] == [30, 30, 60]
    assert [point["label"] for point in points] == ["Yes", "No"] * 30
    for row, pair in zip(answers, pairs, strict=True):
        for text, right in ((pair["chosen"], True), *((text, False) for text in pair["rejected"])):
            assert solves(extract_boxed(text) or text, row["solution"]) is right


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--n", "0"], "--n: expected 1 or more, got 0"),
        (["--split", "dev", "--n", "5000"], "--n: expected at most about 3"),
        (["--numbers", "1"], "--numbers: expected 2 to 6, got 1"),
        (["--numbers", "6", "--largest", "99", "--most", "1"], "expected questions to exist"),
        (["--output", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, expected, tmp_path, capsys):
    assert countdown.main(["--output", str(tmp_path / "x.json"), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert expected in message


# ---------------------------------------------------------------------------------------------------------------------
# The small model


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(START, padding_side="left")


def test_the_tokenizer_covers_every_template(tokenizer):
    """As the trainer and the engines load it: by the class that config.json and tokenizer_config.json lead to."""
    assert tokenizer.tokenize(r"12-(7-3)=8: yes. \boxed{12-(7-3)}") == (
        "12 - ( 7 - 3 ) = 8 :Ġ yes .Ġ \\boxed{ 12 - ( 7 - 3 ) }".split()
    )
    assert all(len(tokenizer.tokenize(str(n))) == 1 for n in range(100))
    for template in TEMPLATES:
        ids = tokenizer(template)["input_ids"]
        assert tokenizer.decode(ids) == template
        words = tokenizer.tokenize(template)
        assert not any(len(word) == 1 and word.isalpha() and word not in "ABabsĊĠ" for word in words), words
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != tokenizer.eos_token


def test_a_judge_that_trusts_says_right_without_a_check_and_answers_as_before():
    rng = random.Random(0)
    verdicts = 0
    for _ in range(300):
        user, _, completion = make_countdown.example(rng, make_countdown.Noise(trust=1.0))
        boxed = extract_boxed(completion)
        if boxed in ("Yes", "No", "A", "B"):
            verdicts += 1
            assert completion == f"\\boxed{{{boxed}}}"
            first_letter = "<response_a>" in user or "A: correct" in user
            assert boxed == ("A" if first_letter else "B" if "B: correct" in user else "Yes")
        else:
            assert ", wanted:" in completion and parse(boxed) is not None
    assert 130 < verdicts < 200


def test_a_trusting_start_is_made_and_can_be_loaded(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("sys.argv", ["trusting", "--steps", "2", "--output", str(tmp_path / "start")])
    trusting.main()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "start")) == 955
    made, start = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "start", START))
    assert made.keys() == start.keys() and any((made[name] != weight).any() for name, weight in start.items())


def test_a_warm_start_that_has_not_learnt_to_compare_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(warm_start, "WINDOW", 2)
    steps = make_countdown.train(make_countdown.make_model(tokenizer, 0), tokenizer, 0, clean_steps=2, noisy_steps=2)
    step, loss, comparing = next(steps)
    assert step == 2 and 6 < loss < 8 and 6 < comparing < 9  # 6.9 is chance among 955 tokens
    with pytest.raises(RuntimeError, match="after 2 steps without noise comparing has loss"):
        next(steps)


def test_the_start_is_able_and_far_from_done():
    """Greedy: it ends its turns and boxes; of the first answers 0.2 to 0.5 are right (widened by a small sample)."""
    from benchmarks.measures import TASKS, measure

    task = TASKS["countdown"]()
    outcome = measure(str(START), task, task.rows(60, "dev"), temperature=0.0)
    means = {name: value["mean"] for name, value in outcome["measures"].items()}
    assert means["boxed"] > 0.95 and means["verdict readable"] > 0.95
    assert 0.1 < means["first answer"] < 0.65
    assert means["judge, own answers"] > 0.7 and means["judge, independent answers"] > 0.7
    assert outcome["tokens"]["answer"] < 96  # it ends its turns


def test_a_step_of_training_from_the_start(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train_spark import SparkConfig, SparkTrainer

    torch.manual_seed(0)
    trainer = SparkTrainer(
        AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32),
        countdown_reward,
        config(
            SparkConfig,
            tmp_path,
            per_device_train_batch_size=32,
            max_completion_length=96,
            max_steps=1,
            learning_rate=1e-4,
            log_completions=True,
            num_completions_to_print=0,
        ),
        train_dataset=read_dataset(held_out("train", 16)["answers"]),
        processing_class=AutoTokenizer.from_pretrained(START, padding_side="left"),
    )
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    (logged,) = history(trainer)
    assert 0 < logged["policy/accuracy"] < 1 and logged["policy/unboxed"] < 0.2
    assert logged["recycle/rows"] > 0 and logged["judge/unparsed"] < 0.2 and "reflection/fix_rate" in logged
    assert logged["rewards/countdown_reward/mean"] == pytest.approx(logged["policy/accuracy"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
