"""The embedded task, the shipped model, and the readers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write
from PIL import Image

from data.arguments import DataArguments, DataSettings
from data.digits import IMAGE_KINDS, TEXT_KINDS, _digits, digit_rows, solve
from data.read import BadInput, read_dataset
from models.make_digits import COMPARISONS, OUTPUT, Noise, example
from models.warm_start import encode
from prompts import PROMPT_SUFFIX

# ---- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_deterministic_and_cover_every_kind():
    first, again, other = digit_rows("train", 400, 3), digit_rows("train", 400, 3), digit_rows("train", 400, 4)
    plain = [(r["prompt"], r["solution"]) for r in first]
    assert plain == [(r["prompt"], r["solution"]) for r in again]
    assert plain != [(r["prompt"], r["solution"]) for r in other]
    for a, b in zip(first, again, strict=True):
        assert [i.tobytes() for i in a["images"]] == [i.tobytes() for i in b["images"]]
    assert {r["dataset"] for r in first} == {f"digits-{k}" for k in (*IMAGE_KINDS, *TEXT_KINDS)}
    share = sum(not r["images"] for r in first) / len(first)
    assert 0.15 < share < 0.35
    widths = {r["images"][0].width for r in first if r["images"]}
    assert widths == {56, 84}  # two or three digits


def test_train_and_test_share_no_image():
    train, test = (np.concatenate([_digits(s)[v] for v in range(10)]) for s in ("train", "test"))
    assert len(train) + len(test) == 1797
    assert not {i.tobytes() for i in train} & {i.tobytes() for i in test}


def test_the_split_of_the_embedded_digits_is_the_one_asked_for(monkeypatch):
    monkeypatch.setattr("data.read.EMBEDDED_ROWS", 20)
    for split in ("train", "test"):
        expected = [row["solution"] for row in digit_rows(split, 20)]
        assert read_dataset("digits", DataSettings(dataset_split=split))["solution"][:] == expected
    assert digit_rows("train", 20)[0]["prompt"] != digit_rows("test", 20)[0]["prompt"]


@pytest.mark.parametrize(
    ("kind", "values", "gold"),
    [("sum", (3, 9), 12), ("difference", (3, 9), 6), ("largest", (3, 9, 4), 9), ("smallest", (3, 9, 4), 3),
     ("plus", (7, 5), 12), ("factor", (7, 35), 5)],
)  # fmt: skip
def test_golds(kind, values, gold):
    assert solve(kind, values) == gold


# ---- the shipped model ----------------------------------------------------------------------------------------------


def test_warm_start_trains_on_completions_alone(processor):
    """What the labels keep is the completion and its end, whatever else is in the row. A wrong mask looks like a model
    that can't learn."""
    import random

    rng = random.Random(0)
    examples = [example(rng, Noise()) for _ in range(40)]
    inputs, compared = encode(examples, processor, COMPARISONS)
    words = inputs["labels"][compared]
    assert {processor.tokenizer.decode(word).strip() for word in words} == {"same", "differs"}
    assert len(words) == sum(text.count(" same") + text.count(" differs") for *_, text in examples)
    for (user, images, completion), ids, labels in zip(examples, inputs["input_ids"], inputs["labels"], strict=True):
        kept = labels[labels != -100]
        assert processor.tokenizer.decode(kept) == completion + "<|im_end|>"
        assert user in processor.tokenizer.decode(ids)
        assert (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == sum(
            i.width // 28 for i in images
        )


def test_numbers_are_single_tokens_and_checkpoint_is_small(processor):
    for n in range(100):
        assert len(processor.tokenizer.encode(str(n))) == 1
    files = list(OUTPUT.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 4e6


def test_shipped_model_is_able_but_noisy():
    """The start of the demo's table, on held-out digits: able to answer and to judge, with room to learn."""
    from demo import START, held_out, measure

    found = {k: v["mean"] for k, v in measure(str(START), held_out(120), samples=2)["measures"].items()}
    assert 0.40 <= found["policy accuracy"] <= 0.65
    assert 0.53 <= found["pointwise balanced accuracy"] <= 0.73
    assert 0.53 <= found["pairwise accuracy, both orders"] <= 0.73


# ---- readers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (56, 28), "white").save(path)
    return path


def test_spark_data(tmp_path, picture):
    def message(*turns):
        return json.dumps([{"role": role, "content": content} for role, content in turns])

    image = {"type": "image", "image": f"file://{picture}", "max_pixels": 1048576}
    rows = [
        {"message": message(("user", [image, {"type": "text", "text": "Area?" + PROMPT_SUFFIX}])), "answer": "12"},
        {"message": message(("system", "Be brief."), ("user", [{"type": "text", "text": "1+1?"}])), "answer": "2"},
    ]
    data = read_dataset(write(tmp_path / "train.json", rows))
    assert data[0]["prompt"] == [{"role": "user", "content": "Area?" + PROMPT_SUFFIX}]  # the suffix once
    assert data[0]["images"][0].size == (56, 28)
    assert data[1]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert data[1]["prompt"][1]["content"] == "1+1?" + PROMPT_SUFFIX
    assert data[1]["images"] == []
    assert data["solution"][:] == ["12", "2"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_tables(suffix, tmp_path):
    import pandas as pd

    rows = [{"question": "How many?", "answer": "work work\n#### 42"}, {"question": "And?", "answer": "so \\boxed{7}"}]
    path = tmp_path / f"train{suffix}"
    if suffix in (".json", ".jsonl"):
        write(path, rows, lines=suffix == ".jsonl")
    else:
        getattr(pd.DataFrame(rows), {".csv": "to_csv", ".parquet": "to_parquet"}[suffix])(path, index=False)
    data = read_dataset(str(path), DataSettings(prompt_column="question", solution_column="answer"))
    assert data["solution"][:] == ["42", "7"]
    assert [p[0]["content"] for p in data["prompt"]] == ["How many?" + PROMPT_SUFFIX, "And?" + PROMPT_SUFFIX]


def test_images_placed_in_a_conversation_keep_their_place(tmp_path, picture):
    text, image = ({"type": "text", "text": t} for t in ("Compare", "with")), {"type": "image", "image": "a.png"}
    first, second = text
    rows = [{"prompt": [{"role": "user", "content": [first, image, second, image]}], "solution": "1"}]
    data = read_dataset(write(tmp_path / "train.json", rows))
    assert [p["type"] for p in data[0]["prompt"][0]["content"]] == [
        *("text", "image", "text", "image"),
        "text",  # how to answer: after the last image, or it would stand in the middle of the question
    ]
    assert [data[0]["prompt"][0]["content"][place]["text"] for place in (2, 4)] == ["with", PROMPT_SUFFIX]
    assert len(data[0]["images"]) == 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "solution": None}, "row 1: field solution"),
        ({"prompt": "", "solution": "1"}, "row 1: field prompt"),
        ({"prompt": [{"role": "user"}], "solution": "1"}, "row 1: field prompt"),
        ({"prompt": "a", "solution": "1", "image": "no.png"}, "row 1: field image: no such file"),
        ({"prompt": "a", "solution": "1", "image": "broken.png"}, "can't be read as an image"),
    ],
)
def test_bad_rows_are_named(row, expected, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    good = {"prompt": "a", "solution": "1", "image": None}
    with pytest.raises(BadInput, match=expected) as raised:
        read_dataset(write(tmp_path / "train.json", [good, row]))
    assert "\n" not in str(raised.value)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "cut.json").write_text('[{"prompt": ')
    for source, expected in (
        ("cut.json", "expected a JSON list"),
        ("none.json", "no such file"),
        ("gone.csv", "no such"),
    ):
        with pytest.raises(BadInput, match=expected):
            read_dataset(str(tmp_path / source))
    with pytest.raises(BadInput, match="no column 'gold'"):
        read_dataset(
            write(tmp_path / "a.json", [{"prompt": "a", "solution": "1"}]), DataSettings(solution_column="gold")
        )


def test_the_evaluation_set_is_its_own_split_and_counts_the_templates_tokens(monkeypatch):
    seen = []

    def read_one(self, source, split, *_, **__):
        seen.append((source, split))
        return [0] * 9

    monkeypatch.setattr(DataArguments, "read_one", read_one)
    monkeypatch.setattr("data.lengths.too_long", lambda *_, **template: seen.append(template))
    args = SimpleNamespace(
        eval_strategy="steps",
        eval_on_start=False,
        chat_template_kwargs={"enable_thinking": False},
        generation_batch_size=4,
        num_generations=4,
    )
    DataArguments(dataset="a", eval_dataset="b").read(args, None, 9, "max_prompt_length")
    assert seen == [{"enable_thinking": False}, ("a", "train"), ("b", "test")]
