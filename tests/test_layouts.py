"""Benchmarks as they are published: a made-up file of each layout, with its quirks, through every use."""

import base64
import csv
import json

import pytest
from helpers import config, png
from PIL import Image

import evaluate
from calculate_acc import render, summarise, tally
from data import check
from data.arguments import DataSettings
from data.read import Reader, read_dataset
from data.rows import BadInput, BadRow, Source
from engines import BatchEngine, Output
from prompts import strip_suffix

RED, BLUE = png("red"), png("blue")
RED_64, BLUE_64 = (base64.b64encode(content).decode() for content in (RED, BLUE))
STORED = {"bytes": RED, "path": "images/1.png"}

# name -> (file, ten rows or fewer that are repeated until there are ten)
ANSWERED = {
    "MathVista.tsv": [
        {"index": "1", "image": RED_64, "question": "Longer?", "answer": "BC", "answer_option": "B",
         "choices": "['AB', 'BC']", "question_type": "multi_choice", "task": "geometry", "skills": "['sight', 'sums']"},
        {"index": "2", "image": "1", "question": "Area?", "answer": "2", "choices": "['1', '2', '3']",
         "answer_option": "B", "question_type": "multi_choice", "task": "geometry", "skills": "['sums']"},
        {"index": "3", "image": BLUE_64, "question": "Sum?", "answer": "7", "choices": "[]", "answer_option": "",
         "question_type": "free_form", "task": "text", "skills": ""},
        {"index": "4", "image": "3", "question": "Sum?", "answer": "1.2", "choices": "", "answer_option": "",
         "question_type": "free_form", "task": "text", "skills": "[]"},
    ],
    "MathVision.tsv": [
        {"index": "1", "image": f"['{RED_64}', '{BLUE_64}']", "image_path": "['a.png', 'b.png']", "answer": "C",
         "question": "Like <image1> or <image2>?", "choices": "['A', 'B', 'C']", "category": "counting"},
        {"index": "2", "image": RED_64, "image_path": "c.png", "question": "Count <image1>", "answer": "12",
         "choices": "[]", "category": "algebra"},
    ],
    "WeMath.tsv": [
        {"index": str(10 * i + n), "image": RED_64, "question": "Area?", "A": "1", "B": "2", "C": "", "answer": "B",
         "hint": "Look at the red one.", "requirement": "Answer with a letter.", "ID": str(i), "key": key}
        for i in (1, 2, 3) for n, key in enumerate(("2steps_1", "2steps_2", "2steps_multi"))
    ],
    "LogicVista.tsv": [
        {"index": "1", "image": RED_64, "question": "Which two?\nA. x\nB. y\nC. z", "answer": "A, C", "skill": "logic"},
        {"index": "2", "image": RED_64, "question": "Which?\nA. x\nB. y", "answer": "B", "skill": "numbers"},
    ],
    "DynaMath.tsv": [
        {"index": str(i), "image": RED_64, "question": f"{i}?", "answer": str(i), "answer_type": "float",
         "qid": str(i % 2), "varid": str(i // 2), "subject": "algebra"} for i in range(10)
    ],
    "mathvista.parquet": [
        {"pid": "1", "question": "Longer?", "image": "images/1.png", "decoded_image": STORED, "choices": ["AB", "BC"],
         "answer": "BC", "question_type": "multi_choice", "metadata": {"category": "vqa", "skills": ["sight"]}},
        {"pid": "2", "question": "Sum?", "image": "images/1.png", "decoded_image": STORED, "choices": None,
         "answer": "7", "question_type": "free_form", "metadata": {"category": "math", "skills": ["sums"]}},
    ],
    "mathvision.parquet": [
        {"id": "1", "question": "Count <image1>", "options": [], "image": "images/1.png", "decoded_image": STORED,
         "answer": "12", "solution": None, "level": 3, "subject": "counting"},
        {"id": "2", "question": "Which <image1>", "options": ["A", "B"], "image": "images/1.png",
         "decoded_image": STORED, "answer": "B", "solution": "It is red.", "level": 1, "subject": "algebra"},
    ],
    "mathverse.json": [
        {"sample_index": "1", "problem_version": "Text Dominant", "image": RED_64, "answer": "A",
         "question": "Angle?\nChoices:\nA: 20\nB: 30", "query_cot": "Reason.\nAngle?\nChoices:\nA: 20\nB: 30"},
        {"sample_index": "2", "problem_version": "Vision Only", "image": RED_64, "answer": "B", "question": "",
         "query_cot": "Answer the question in the image."},
    ],
    "wemath.json": [
        {"ID": "1", "key": "2steps_1", "question": "Area?", "option": "A. 1; B. 2; C. No answer", "answer": "B",
         "image_path": "a.png", "knowledge concept": "area"},
    ],
    "verl.parquet": [
        {"data_source": "geo3k", "prompt": [{"role": "user", "content": "<image>Area?"}], "images": [STORED],
         "ability": "math", "reward_model": {"style": "rule", "ground_truth": "12"}},
    ],
    "llava.json": [
        {"id": "1", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nArea?"}, {"from": "gpt", "value": "12"}]},
        {"id": "2", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nSide?"}, {"from": "gpt", "value": "3"},
            {"from": "human", "value": "Area?"}, {"from": "gpt", "value": "The area is \\boxed{9}."}]},
    ],
}  # fmt: skip
JUDGED = {
    "VL-RewardBench.parquet": [
        {"id": "1", "query": "What is it?", "response": ["A cat.", "A dog."], "image": STORED,
         "human_ranking": ranking, "query_source": source}
        for ranking, source in (([0, 1], "povid"), ([1, 0], "wildvision"))
    ],
    "VL-RewardBench.tsv": [
        {"index": "1", "image": RED_64, "question": "What is it?", "response": "['A cat.', \"A dog's.\"]",
         "answer": "[0, 1]", "category": "hallucination"},
        {"index": "2", "image": f"['{RED_64}', '{BLUE_64}']", "question": "Alike?", "response": "['Yes.', 'No.']",
         "answer": "[1, 0]", "category": "general"},
    ],
    "reward-bench-2.parquet": [
        {"id": "1", "prompt": "2+2?", "chosen": ["4"], "rejected": ["3", "5", "22"], "subset": "Math"},
        {"id": "2", "prompt": "A colour?", "chosen": ["red", "blue"], "rejected": ["seven"], "subset": "Ties"},
    ],
    "judgebench.json": [
        {"pair_id": "1", "question": "1+1?", "response_A": "It is 2.", "response_B": "It is 3.", "label": "A>B",
         "source": "livebench-math"},
        {"pair_id": "2", "question": "1+2?", "response_A": "It is 2.", "response_B": "It is 3.", "label": "B>A",
         "source": "mmlu-pro-law"},
    ],
    "processbench.json": [
        {"id": "1", "generator": "m", "problem": "1+1?", "steps": ["One and one.", "That is 2."],
         "final_answer_correct": True, "label": -1},
        {"id": "2", "generator": "m", "problem": "1+1?", "steps": ["One and one.", "That is 3."],
         "final_answer_correct": False, "label": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of each layout, with ten rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("layouts")
    (folder / "a.png").write_bytes(RED)
    for name, rows in {**ANSWERED, **JUDGED}.items():
        write(folder / name, [{**rows[i % len(rows)]} for i in range(10)], (pa, pq))
    return folder


def write(path, rows, arrow=None):
    if path.suffix == ".tsv":
        rows = [{**row, "index": row["index"] if i < len({r["index"] for r in rows}) else f"x{i}"}
                for i, row in enumerate(rows)]  # fmt: skip
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        arrow[1].write_table(arrow[0].Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    return str(path)


class Scripted(BatchEngine):
    """Answers B, or the first of a pair, or Yes; counts the images of each request."""

    def __init__(self):
        super().__init__()
        self.images = []

    def batch(self, requests, sampling):
        self.images += [len(request.images) for request in requests]
        texts = [str(request.messages[-1]["content"]) for request in requests]
        said = ["A" if "<response_b>" in t else "Yes" if "Is it correct?" in t else "B" for t in texts]
        return [Output(f"\\boxed{{{text}}}", 3, 2) for text in said]


def rows_of(path, use="answer", **settings):
    return [row for _, _, row in Reader(Source(str(path), DataSettings(**settings)), use)]


@pytest.mark.parametrize("name", [*ANSWERED, *JUDGED])
def test_a_published_file_goes_through_check_evaluation_and_tables(name, folder, capsys):
    assert check.main([str(folder / name), "--workers", "1"]) == 0, capsys.readouterr().out
    assert "10 rows, 10 usable" in capsys.readouterr().out
    for mode in ("judge",) if name in JUDGED else ("answer", "tts"):
        how = evaluate.Settings("x", mode, (), max_rounds=1)
        rows = evaluate.read_benchmark(Source(str(folder / name)), mode)
        assert {row["dataset"] for row in rows} == {name.split(".")[0]}
        engine, results = Scripted(), [None] * len(rows)
        for finished in evaluate.run(enumerate(rows), engine, how):
            for index, result in finished:
                results[index] = result
        assert all(result["error"] is None for result in results)
        images = "reward-bench" not in name and name not in ("judgebench.json", "processbench.json")
        assert (set(engine.images) >= {1}) is images
        assert (2 in engine.images) is (name in ("MathVision.tsv", "VL-RewardBench.tsv"))
        text = render(summarise([tally(name, rows=json.loads(json.dumps(results)))]), "table")
        assert name.split(".")[0] in text


def test_published_files_can_be_trained_on(folder, processor, vision_model, tmp_path):
    """Two steps over rows of every layout, with recycling."""
    import copy

    from datasets import concatenate_datasets

    from train_spark import SparkConfig, SparkTrainer

    parts = [read_dataset(str(folder / name)) for name in ANSWERED]
    rows = [{k: part[i][k] for k in ("prompt", "images", "solution")} for part in parts for i in (0, 1)]
    columns = [part.with_format(None).select_columns(["prompt", "images", "solution"]) for part in parts]
    features = columns[0].features
    data = concatenate_datasets([part.select(range(2)).cast(features) for part in columns])
    assert len(data) == len(rows) == 2 * len(ANSWERED)
    arguments = config(SparkConfig, tmp_path, max_steps=2, max_completion_length=8)
    trainer = SparkTrainer(copy.deepcopy(vision_model), args=arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    assert trainer.state.global_step == 2


def test_options_hints_and_golds_of_each_layout(folder):
    first = {name: rows_of(folder / name)[:2] for name in ANSWERED}
    asked = {name: [(row["problem"], row["solution"]) for row in rows] for name, rows in first.items()}
    assert asked["MathVista.tsv"] == [("Longer?\nA. AB\nB. BC", "(B) BC"), ("Area?\nA. 1\nB. 2\nC. 3", "(B) 2")]
    assert asked["MathVision.tsv"][0] == ("Like    or   ?\nA. A\nB. B\nC. C", "C")
    assert asked["WeMath.tsv"][0] == ("Hint: Look at the red one.\nArea?\nA. 1\nB. 2", "(B) 2")
    assert asked["LogicVista.tsv"][0][1] == "A, C"
    assert asked["mathvista.parquet"] == [("Longer?\nA. AB\nB. BC", "(B) BC"), ("Sum?", "7")]
    assert asked["mathvision.parquet"] == [("Count  ", "12"), ("Which   \nA. A\nB. B", "B")]
    assert [question for question, _ in asked["mathverse.json"]][1] == "Answer the question in the image."
    assert asked["wemath.json"][0] == ("Area?\nA. 1\nB. 2\nC. No answer", "(B) 2")
    assert [gold for _, gold in asked["llava.json"]] == ["12", "9"]
    assert asked["verl.parquet"][0] == ("Area?", "12")
    assert [len(row["images"]) for row in first["MathVision.tsv"]] == [2, 1]
    assert (
        strip_suffix(read_dataset(str(folder / "WeMath.tsv"))[0]["prompt"][0]["content"]) == asked["WeMath.tsv"][0][0]
    )


def test_an_index_in_place_of_an_image_is_that_row_s_image(folder, tmp_path):
    assert [row["images"][0]["bytes"] for row in rows_of(folder / "MathVista.tsv")[:4]] == [RED, RED, BLUE, BLUE]
    rows = [
        {"index": "a-1", "image": "later", "question": "x?", "answer": "1"},  # forwards as well
        {"index": "2", "image": "99", "question": "x?", "answer": "1"},
        {"index": "3", "image": "a-1", "question": "x?", "answer": "1"},  # to a row that has none of its own
        {"index": "later", "image": BLUE_64, "question": "x?", "answer": "1"},
    ]
    good, nowhere, again, _ = rows_of(write(tmp_path / "x.tsv", rows))
    assert good["images"][0]["bytes"] == BLUE
    assert str(nowhere) == "row 1: field image: expected an image or the index of a row with one, got '99'"
    assert (again.row, again.line, again.field) == (2, 4, "image")


def test_bad_rows_of_a_published_file_are_all_named(tmp_path, capsys):
    row = {
        "index": "1",
        "image": RED_64,
        "question": "x?",
        "answer": "b",
        "choices": "['a', 'b']",
        "answer_option": "B",
    }
    changes = [
        {},
        {"image": RED_64[:70] + "!" + RED_64[70:]},
        {"image": "17"},
        {"choices": "['a', 'b'"},
        {"choices": "__import__('os').getcwd()"},
        {"answer": "c", "answer_option": ""},
        {"answer_option": "A"},
        {"answer": ""},
    ]
    path = write(tmp_path / "x.tsv", [{**row, **change, "index": str(i)} for i, change in enumerate(changes)])
    assert check.main([path, "--workers", "1", "--json"]) == 2
    bad = json.loads(capsys.readouterr().out)["bad"]
    fields = ["image", "image", "choices", "choices", "answer", "answer_option"]
    assert [(b["row"], b["line"], b["field"]) for b in bad] == [(i + 1, i + 3, f) for i, f in enumerate(fields)]
    assert bad[-1]["reason"] == "expected the letter of the option 'b', got 'A'"


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("VL-RewardBench.tsv", {"response": "['A cat.'"}, "response"),
        ("VL-RewardBench.tsv", {"answer": "[1, 1]"}, "answer"),
        ("judgebench.json", {"label": "A=B"}, "label"),
        ("judgebench.json", {"response_B": ""}, "rejected"),
        ("processbench.json", {"steps": []}, "steps"),
        ("processbench.json", {"final_answer_correct": None}, "label"),
        ("reward-bench-2.parquet", {"chosen": []}, "chosen"),
        ("verl.parquet", {"reward_model": {"style": "rule"}}, "reward_model"),
        ("llava.json", {"conversations": [{"from": "human", "value": "Area?"}]}, "conversations"),
        (
            "llava.json",
            {"conversations": [{"from": "a", "value": "b"}, {"from": "gpt", "value": "c"}]},
            "conversations",
        ),
    ],
)
def test_a_bad_row_of_a_layout_names_its_field(name, change, field, folder):
    rows = {**ANSWERED, **JUDGED}[name]
    source = Source([rows[0], {**rows[0], **change}], DataSettings(image_root=str(folder)))
    _, bad = [row for _, _, row in Reader(source, "check")]
    assert isinstance(bad, BadRow) and bad.field == field


def test_the_columns_of_two_layouts_at_once_are_refused():
    mixed = {**JUDGED["judgebench.json"][0], "chosen": "a", "rejected": "b"}
    with pytest.raises(BadInput, match="expected one layout, got the columns of judgebench and of chosen and rejected"):
        Reader(Source([mixed]), "judge")
    both = {"problem": "a?", "chosen": "a", "rejected": "b", "response": "c", "label": "Yes"}
    (row,) = [row for _, _, row in Reader(Source([both]), "judge")]
    assert (row.field, row.reason.endswith("got both")) == ("response", True)


@pytest.mark.parametrize(
    ("label", "verdict"), [("yes", "Yes"), ("True", "Yes"), (False, "No"), (" NO ", "No"), (1, "Yes")]
)
def test_labels_in_any_case_are_labels(label, verdict):
    ((_, _, row),) = Reader(Source([{"problem": "a?", "response": "b", "label": label}]), "judge")
    assert row["label"] == verdict


def test_the_splits_of_one_file_are_told_apart():
    rows = [{"problem": "2?", "answer": "2", "split": split} for split in ("dev", "validation")]
    kept = evaluate.read_benchmark(Source(rows), "answer")
    assert [row["categories"] for row in kept] == [{"split": "dev"}, {"split": "validation"}]


def test_categories_and_groups_are_kept_with_the_results(folder):
    kept = {name: (row["categories"], row["group"]) for name in ANSWERED for row in rows_of(folder / name)[:1]}
    assert kept["MathVista.tsv"] == (
        {"question_type": "multi_choice", "task": "geometry", "skills": ["sight", "sums"]}, ["1", "rotation 0"],
    )  # fmt: skip
    assert kept["mathvista.parquet"][0] == {"category": "vqa", "question_type": "multi_choice", "skills": ["sight"]}
    assert kept["WeMath.tsv"] == ({}, ["1", "2steps_1"])
    assert kept["DynaMath.tsv"] == ({"subject": "algebra", "answer_type": "float"}, ["0", "0"])
    whole = evaluate.read_benchmark(Source(str(folder / "MathVista.tsv")), "answer")
    assert {row["group"] for row in whole} == {None}  # none of its questions has a second row
    rows = evaluate.read_benchmark(Source(str(folder / "judgebench.json")), "judge")
    how = evaluate.Settings("x", "judge", ())
    ((_, result), *_) = next(evaluate.run(enumerate(rows), Scripted(), how))
    assert result["categories"] == {"source": "livebench-math"}
    assert "group" not in result


def test_columns_that_only_look_like_a_group_or_a_list_are_left_alone():
    """An ID with a key that names no step; a response that is a list in text."""
    record = {"question": "x?", "answer": "1", "ID": "7", "key": "abc", "qid": "8"}
    ((_, _, row),) = Reader(Source([record]), "answer")
    assert row["group"] is None
    pair = {"problem": "Two primes?", "chosen": "[2, 3]", "rejected": "['2', '4']"}
    ((_, _, row),) = Reader(Source([pair]), "judge")
    assert (row["chosen"], row["rejected"]) == ("[2, 3]", ["['2', '4']"])
    options = {"question": "Which?", "options": ["A, B", "C"], "answer": "A, B"}
    assert [row["solution"] for _, _, row in Reader(Source([options]))] == ["A"]


def test_several_right_responses_are_each_compared_with_each_wrong_one(folder):
    rows = evaluate.read_benchmark(Source(str(folder / "reward-bench-2.parquet")), "judge")[:2]
    results = [result for done in evaluate.run(enumerate(rows), Scripted(), evaluate.Settings("x", "judge", ()))
               for _, result in sorted(done, key=lambda pair: pair[0])]  # fmt: skip
    assert [(r["task"], len(r["verdict"])) for r in results] == [("best_of_n", 3), ("best_of_n", 2)]


# ---- files as people have them ---------------------------------------------------------------------------------------


def test_a_semicolon_file_with_excel_s_first_line(tmp_path):
    (tmp_path / "x.csv").write_text("sep=;\r\nquestion;answer\r\nWhat, then?;7\r\n;8\r\n", encoding="utf-8-sig")
    good, bad = rows_of(tmp_path / "x.csv")
    assert (good["problem"], good["solution"]) == ("What, then?", "7")
    assert (bad.row, bad.line) == (1, 4)


def test_utf_16_is_read_and_other_encodings_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "x.tsv").write_text("question\tanswer\nCafé?\t7\n", encoding="utf-16")
    assert rows_of(tmp_path / "x.tsv")[0]["problem"] == "Café?"
    (tmp_path / "y.csv").write_text("question;answer\nCafé?;7\n", encoding="cp1252")
    with pytest.raises(BadInput, match="save a spreadsheet as CSV UTF-8"):
        rows_of(tmp_path / "y.csv")


def test_paths_of_another_disk_are_found_under_the_image_root(tmp_path):
    root = tmp_path / "images"
    (root / "set").mkdir(parents=True)
    (root / "set" / "a.png").write_bytes(BLUE)
    (root / "a.png").write_bytes(RED)
    paths = ["file:///mnt/data/set/a.png", "/mnt/data/set/a.png", "file:///mnt/other/a.png", "/mnt/set/none.png",
             "/mnt/../secret.png"]  # fmt: skip
    (tmp_path / "secret.png").write_bytes(RED)
    *found, missing, outside = rows_of_records(paths, image_root=str(root))
    assert [Image.open(row["images"][0]["path"]).getpixel((0, 0)) for row in found] == [(0, 0, 255)] * 2 + [(255, 0, 0)]
    assert missing.field == "image" and "no such file" in missing.reason
    assert outside.field == "image" and "outside the image root" in outside.reason
    message = json.dumps([{"role": "user", "content": [
        {"type": "image", "image": paths[0], "max_pixels": 784}, {"type": "text", "text": "Area?"}]}])  # fmt: skip
    source = Source([{"message": message, "answer": "12"}], DataSettings(image_root=str(root)))
    ((_, _, row),) = Reader(source)
    assert row["images"][0]["path"] == str(root / "set" / "a.png")


def rows_of_records(images, **settings):
    records = [{"question": "x?", "answer": "1", "image": image} for image in images]
    return [row for _, _, row in Reader(Source(records, DataSettings(**settings)), "answer")]


# ---- tables ----------------------------------------------------------------------------------------------------------


def scored(right, dataset="d", **more):
    counts = {"error": None, "prompt_tokens": 1, "completion_tokens": 1}
    return {"dataset": dataset, "problem": str(more), "image_path": None, "ground_truth": "1",
            "extracted_answer": "1" if right else "2", **counts, **more}  # fmt: skip


def summary_of(rows):
    return summarise([tally("f", rows=rows)])["files"][0]["benchmarks"][0]


def test_we_math_strict_and_loose_by_hand():
    """Mastered; all steps right alone; one step right and the problem; no step right and the problem; nothing; cut."""
    problems = {"a": (1, 1, 1), "b": (1, 1, 0), "c": (1, 0, 1), "d": (0, 0, 1), "e": (0, 1, 0), "f": (1, 1)}
    keys = ("2steps_1", "2steps_2", "2steps_multi")
    rows = [
        scored(right, group=[name, key])
        for name, parts in problems.items()
        for key, right in zip(keys, parts, strict=False)
    ]
    scores = summary_of([*rows, {**scored(1), "error": "HTTP 500", "group": ["f", "2steps_multi"]}])["scores"]
    assert {name: (s["questions"], s["score"]) for name, s in scores.items()} == {
        "We-Math, strict": (5, (1 + 0.5) / 5),
        "We-Math, loose": (5, (1 + 0.5 + 1) / 5),
    }


def test_dynamath_s_worst_case_by_hand():
    variants = {"a": (1, 1, 1), "b": (1, 0, 1), "c": (0, 0, 0)}
    rows = [scored(right, group=[name, str(i)]) for name, parts in variants.items() for i, right in enumerate(parts)]
    found = summary_of(rows)
    assert found["accuracy"] == 5 / 9
    assert found["scores"]["worst case over variants"]["score"] == pytest.approx(1 / 3)
    failed = summary_of([*rows, {**scored(1), "error": "HTTP 500", "group": ["a", "3"]}])["scores"]
    assert failed["worst case over variants"] | {"interval": ()} == {"questions": 2, "score": 0.0, "interval": ()}


GPQA = {"Question": "Which energy?", "Correct Answer": "1 eV", "Explanation": "...", "Pre-Revision Correct Answer": "1",
        **{f"Incorrect Answer {n}": f"{n + 1} eV" for n in (1, 2, 3)}}  # fmt: skip


def test_gpqa_s_options_are_in_an_order_of_their_own_and_the_gold_is_one_of_them():
    orders = set()
    for i in range(20):
        raw = {**GPQA, "Question": f"Which energy, {i}?"}
        for named in ({}, {"solution_column": "Correct Answer"}):
            ((_, _, row),) = Reader(Source([raw], DataSettings(**named)), "answer")
            question, *lines = row["problem"].split("\n")
            letter = row["solution"][1]
            assert (question, row["solution"]) == (raw["Question"], f"({letter}) 1 eV") and f"{letter}. 1 eV" in lines
            orders.add(tuple(lines))
    assert len(orders) > 8
    ((_, _, bad),) = Reader(Source([{**GPQA, "Incorrect Answer 2": None}]), "answer")
    assert bad.field == "Incorrect Answer 2"


def test_mathvista_is_asked_how_to_write_its_answer_and_scienceqa_with_its_hint():
    query = "Hint: Please give a number with one decimal place.\nQuestion: How far? (Unit: m)"
    raw = {"question": "How far?", "query": query, "precision": 1.0, "unit": "m", "answer": "1.2", "choices": None}
    ((_, _, row),) = Reader(Source([raw]), "answer")
    assert row["problem"] == query
    science = {"question": "Which way?", "choices": ["left", "right"], "answer": 1, "hint": "A puck is hit."}
    rows = [row for _, _, row in Reader(Source([science, {**science, "answer": 0}]), "answer")]
    assert rows[0]["problem"] == "Hint: A puck is hit.\nWhich way?\nA. left\nB. right"
    ((_, _, row),) = Reader(Source([{"question": "6*7?", "answer": "42", "hint": "Add 7 six times."}]), "answer")
    assert row["problem"] == "6*7?"


def test_what_a_layout_finds_is_kept(monkeypatch):
    """Images, options and budgets under names that nobody else has."""
    from data import formats, read
    from data.rows import Options, Record

    class Mine:
        NAME, COLUMNS = "mine", ("q", "gold")
        matches = staticmethod(lambda columns, head: {"q", "gold"} <= columns)

        @staticmethod
        def record(raw):
            texts = Options({"A": raw["first"], "B": raw["second"]}, True)
            return Record(raw["q"], raw["gold"], images=[raw["scan"]], options=texts, max_pixels=9000)

    monkeypatch.setattr(read, "FORMATS", (*formats.FORMATS, Mine))
    raw = {"q": "Which?", "gold": "B", "first": "cats", "second": "dogs", "scan": {"bytes": RED, "path": None}}
    ((_, _, row),) = Reader(Source([raw]), "answer")
    assert (row["problem"], row["solution"]) == ("Which?\nA. cats\nB. dogs", "(B) dogs")
    assert [(image["bytes"], image["max_pixels"]) for image in row["images"]] == [(RED, 9000)]


def test_how_to_answer_and_what_to_judge_stand_after_the_last_image():
    from prompts import PROMPT_SUFFIX, ask

    raw = {"question": "Which is it? <image 1>", "options": ["<image 2>", "<image 3>"], "answer": "B"}
    raw |= {f"image_{n}": {"bytes": RED, "path": None} for n in (1, 2, 3)}
    ((_, _, row),) = Reader(Source([raw]), "answer")
    *shown, last = row["prompt"][-1]["content"]
    assert last == {"type": "text", "text": PROMPT_SUFFIX}
    assert [part.get("text", "an image") for part in shown] == [
        "Which is it? ", "an image", "\nA. ", "an image", "\nB. ", "an image",
    ]  # fmt: skip
    by_hand = [{"type": "text", "text": "What is this?" + PROMPT_SUFFIX}, {"type": "image"}]
    question = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    for content, kept in ((row["prompt"][-1]["content"], shown), (by_hand, question)):
        (asked,) = ask([{"role": "user", "content": content}], "Is it right?")
        *before, instruction = asked["content"]
        assert before == kept and instruction["text"].strip() == "Is it right?"
    raw = {"question": f"What is this?{PROMPT_SUFFIX}\n<image>", "answer": "1", "image": {"bytes": RED, "path": None}}
    ((_, _, row),) = Reader(Source([raw]), "answer")
    assert row["prompt"][-1]["content"] == [*question, {"type": "text", "text": PROMPT_SUFFIX}]  # once


def test_circular_evaluation_by_hand(tmp_path):
    """MMBench: the options of a question rotated, in rows of their own whose index is a million or more higher."""
    right = {"241": "ABCD", "252": "AA"}  # a model that always says A
    options = {"A": "w", "B": "x", "C": "y", "D": "z"}
    rows = [
        {"index": str(int(index) + 1_000_000 * turn), "image": index if turn else RED_64, "question": f"Of {index}?",
         "answer": letter, **options}
        for index, letters in right.items()
        for turn, letter in enumerate(letters)
    ]  # fmt: skip
    path = tmp_path / "MMBench.tsv"
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    read = evaluate.read_benchmark(Source(str(path)), "answer")
    assert [row["group"] for row in read][3:5] == [["241", "rotation 3", "4"], ["252", "rotation 0", "2"]]
    done = [
        scored(letter == "A", group=row["group"]) for row, letter in zip(read, "".join(right.values()), strict=True)
    ]
    scores = {name: (s["questions"], s["score"]) for name, s in summary_of(done)["scores"].items()}
    assert scores == {"circular": (2, 1 / 2), "without rotations": (2, 1.0)}
    cut = {name: s["questions"] for name, s in summary_of(done[:5])["scores"].items()}  # --limit 5
    assert cut == {"circular": 1, "without rotations": 1}


def test_parts_of_a_question_are_those_of_its_benchmark():
    """One file may hold several, and an index of a million is not always a rotation."""
    rows = [{"dataset": name, "problem": f"{name}?", "answer": "1", "qid": "7", "varid": v} for name in ("en", "cn")
            for v in ("1", "2")]  # fmt: skip
    read = evaluate.read_benchmark(Source([*rows, {**rows[0], "qid": "8"}]), "answer")
    assert [row["group"][2] for row in read] == ["2", "2", "2", "2", "1"]
    options = {"question": "Which?", "answer": "A", "A": "x", "B": "y"}
    for indices in ((7, 3_000_007, 5), (1_000_005, 2_000_005), (5,)):
        read = evaluate.read_benchmark(Source([{**options, "index": index} for index in indices]), "answer")
        assert {str(row["group"]) for row in read} == {"None"}


def test_accuracies_by_category_and_their_mean_by_hand():
    rows = [scored(right, categories={"subset": subset, "skills": skills}) for subset, right, skills in (
        ("Math", 1, ["x", "y"]), ("Math", 1, ["x"]), ("Math", 0, []), ("Ties", 0, ["y"]))]  # fmt: skip
    found = summary_of(rows)["categories"]
    assert {v: (r["answered"], r["accuracy"]) for v, r in found["subset"]["values"].items()} == {
        "Math": (3, 2 / 3), "Ties": (1, 0.0),
    }  # fmt: skip
    assert found["subset"]["mean"] == pytest.approx(1 / 3)
    low, high = found["subset"]["interval"]
    assert 0 < low < 1 / 3 < high < 1
    wrong = summary_of([scored(0, categories={"subset": subset}) for subset in ("x", "y")])["categories"]["subset"]
    assert wrong["interval"][0] == 0 and wrong["interval"][1] > 0.5  # one wrong answer each is no certainty
    assert {v: r["accuracy"] for v, r in found["skills"]["values"].items()} == {"x": 1.0, "y": 0.5}
    table = render(summarise([tally("f", rows=rows)]), "table")
    assert "By category" in table and "Ties" in table
    names = [scored(1, categories={"source": str(i)}) for i in range(60)]
    assert summary_of(names)["categories"] == {}  # a name for each row is no category


@pytest.mark.parametrize("change", [{"categories": ["a"]}, {"categories": {"a": 1}}, {"group": ["a"]}, {"group": 3}])
def test_categories_and_groups_that_are_none_are_refused(change):
    with pytest.raises(BadInput, match=f"f: row 0: field {next(iter(change))}: expected"):
        tally("f", rows=[scored(1, **change)])


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("VL-RewardBench.parquet", [("A cat.", ["A dog."]), ("A dog.", ["A cat."])]),
        ("VL-RewardBench.tsv", [("A cat.", ["A dog's."]), ("No.", ["Yes."])]),
        ("judgebench.json", [("It is 2.", ["It is 3."]), ("It is 3.", ["It is 2."])]),
    ],
)
def test_the_better_response_is_the_chosen_one(name, pairs, folder):
    rows = evaluate.read_benchmark(Source(str(folder / name)), "judge")[:2]
    assert [(row["chosen"], row["rejected"]) for row in rows] == pairs
