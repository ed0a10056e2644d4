"""Files as other people lay them out: what they hold is used, or refused by name."""

import base64
import io
import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import png
from PIL import Image

from data import table
from data.arguments import DataSettings
from data.golds import gold
from data.read import Reader, read_dataset
from data.rows import BadInput, BadRow, Source
from verify import is_equal

SUFFIX = ""


def read(rows, **settings):
    """Each row, or what is wrong with it."""
    return [row for _, _, row in Reader(Source(rows, DataSettings(**settings), SUFFIX))]


def golds(rows, **settings):
    return [str(row) if isinstance(row, BadRow) else row["solution"] for row in read(rows, **settings)]


def asked(row, **settings):
    (found,) = read([row], **settings)
    assert not isinstance(found, BadRow), found
    return [(message["role"], message["content"]) for message in found["prompt"]]


def refused(row, **settings):
    (found,) = read([row], **settings)
    assert isinstance(found, BadRow), found
    return f"{found.field}: {found.reason}"


def encoded(kind):
    with io.BytesIO() as file:
        Image.new("RGB", (40, 40)).save(file, kind)
        return file.getvalue()


BASE64 = "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAIAAAD9b0jDAAAAI0lEQVR4nO3MMQEAAAgDoK1/Zs3g4QcFaCaXKVAoFAqFQqFQ+A=="


@pytest.mark.parametrize("column, value", [
    ("image_bytes", png()), ("jpg", encoded("JPEG")), ("x", encoded("WEBP")), ("photo", BASE64),
    ("y", base64.b64encode(encoded("WEBP")).decode()), ("image_base64", BASE64),
    ("image_url", "https://cdn/i?id=3"), ("img_url", "https://cdn/a.png?w=3"), ("image_urls", ["https://cdn/i"]),
    ("figure", {"bytes": None, "path": "/x/a.png"}), ("picture", [{"path": "a.png"}]),
    ("multi_modal_data", {"image": ["a.png"]}),
])  # fmt: skip
@pytest.mark.parametrize("question", ["Area?", [{"role": "user", "content": "Area?"}]])
def test_images_under_another_name_are_not_left_out(column, value, question):
    row = {"prompt": question, "answer": "4", column: value}
    assert refused(row).startswith(f"{column}: holds an image and is not used")


def test_a_link_to_a_page_is_no_image():
    row = {"question": "Q?", "answer": "4", "url": "https://x/a", "source_url": "https://x/b", "note": "/9j/ is short"}
    assert golds([{**row, "sound": b"RIFF\0\0\0\0WAVEfmt "}]) == ["4"]


def test_two_columns_of_images_that_differ_are_refused(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    row = {"question": "Q?", "answer": "4", "image": "c.png", "images": ["b.png", "a.png"]}
    assert refused(row, image_root=str(tmp_path)).endswith(
        "expected the images once, got others in images; name one as --image_column"
    )
    for image, images, n in (
        ("a.png", [], 1),
        ("a.png", None, 1),
        ("./a.png", ["b.png", "a.png"], 2),
    ):
        (found,) = read([{**row, "image": image, "images": images}], image_root=str(tmp_path))
        assert len(found["images"]) == n


def test_numbered_options_count_as_the_answers_do():
    options = {f"option{i + 1}": letter for i, letter in enumerate("wxyz")}
    rows = [{"question": "Q?", **options, "answer": i} for i in (1, 0, 3)]
    assert golds(rows) == golds(rows, answer_kind="from_0") == ["B", "A", "D"]
    rows = [{"question": "Q?", **options, "answer": str(i)} for i in (1, 4)]
    assert golds(rows) == ["A", "D"]
    assert golds([{"question": "Q?", **options, "answer": i} for i in (1, "(2)")]) == ["A", "B"]
    assert golds([{"question": "Q?", **options, "answer": i} for i in (0, 4)])[0].startswith("row 0: field answer")
    arc = {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"}
    assert golds([arc]) == ["1"]  # these labels are the data's own


@pytest.mark.parametrize("row, settings", [
    ({"question": "Q?", "answerA": "p", "answerB": "q", "answerC": "r", "label": "3"}, {}),
    ({"goal": "Q?", "sol1": "p", "sol2": "q", "label": 0}, {"prompt_column": "goal", "solution_column": "label"}),
    ({"ctx": "Q?", "ending0": "p", "ending1": "q", "label": "0"},
     {"prompt_column": "ctx", "solution_column": "label"}),
])  # fmt: skip
def test_options_of_other_names_are_asked(row, settings):
    ((_, content),) = asked(row, **settings)
    assert content.splitlines()[1].partition(". ")[2] == "p"


def test_columns_of_several_golds_are_no_options():
    row = {"question": "How many?", "answer1": "two", "answer2": "2", "answer3": "four", "answer": "2"}
    assert asked(row) == [("user", "How many?")] and golds([row]) == ["2"]


@pytest.mark.parametrize("options", [["A, B", "B, C", "C, D"], {"A": "A - B", "B": "B - C"}, ["1, 2", "2, 3"]])
def test_options_that_are_lists_of_labels_stay_whole(options):
    texts = list(options.values()) if isinstance(options, dict) else options
    ((_, content),) = asked({"question": "Q?", "options": options, "answer": texts[1]})
    assert [line.partition(". ")[2] for line in content.splitlines()[1:]] == texts


@pytest.mark.parametrize("options", [
    ["A．4", "B．7"], ["A、4", "B、7"], ["（A）4", "（B）7"], ["Ａ．4", "Ｂ．7"], ["A - 4", "B - 7"], ["A.4", "B.7"],
])  # fmt: skip
@pytest.mark.parametrize("answer", ["B", "7", "B．7", "B、7", "Ｂ"])
def test_chinese_labels_of_options(options, answer):
    assert golds([{"question": "质数?", "options": options, "answer": answer}]) == ["(B) 7"]


@pytest.mark.parametrize("answer, expected", [
    ("AC", "A, C"), ("A;C", "A, C"), ("C,A", "A, C"), (["A", "C"], "A, C"), (["red", "blue"], "A, C"),
    ("B) green", "(B) green"), ("$green$", "(B) green"), (r"\text{B}", "(B) green"),
    ("The answer is B.", "(B) green"), ("Option B", "(B) green"),
    ("ABBA", "expected A to C"), ("AD", "expected A to C"),
])  # fmt: skip
def test_ways_to_say_which_options_are_right(answer, expected):
    assert expected in golds([{"question": "Q?", "options": ["red", "green", "blue"], "answer": answer}])[0]


@pytest.mark.parametrize("options", [
    {"A": "4", "B": "7", "C": None}, [("A", "4"), ("B", "7")], [{"key": "A", "value": "4"}, {"key": "B", "value": "7"}],
    [{"label": "A", "text": "4"}, {"label": "B", "text": "7"}],
])  # fmt: skip
def test_options_as_structures_maps_and_objects(options):
    row = {"question": "Q?", "options": options, "answer": "B"}
    assert golds([row]) == ["(B) 7"] and asked(row) == [("user", "Q?\nA. 4\nB. 7")]


def test_what_belongs_to_the_question_is_asked():
    named = {"prompt_column": "instruction", "solution_column": "output"}
    row = {"instruction": "Add the numbers", "input": "3, 4", "output": "7", "system": "Be brief."}
    assert asked(row, **named) == [("system", "Be brief."), ("user", "Add the numbers\n3, 4")]
    row = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "11"}], "system": "Base 3."}
    assert asked(row) == [("system", "Base 3."), ("user", "2+2?")]
    messages = [{"role": "system", "content": "Base 3."}, {"role": "user", "content": "2+2?"}]
    assert asked({"prompt": messages, "answer": "11", "system": "Base 3."})[1:] == [("user", "2+2?")]
    as_text = {"prompt": json.dumps(messages[1:]), "answer": "11", "system": "Base 3."}
    assert asked(as_text) == [("system", "Base 3."), ("user", "2+2?")]
    assert "another than that" in refused({"prompt": messages, "answer": "11", "system": "Base 4."})
    parts = [{"role": "system", "content": [{"type": "text", "text": "Base 3.\n"}]}, messages[1]]
    assert golds([{"prompt": parts, "answer": "11", "system": "Base 3."}]) == ["11"]


@pytest.mark.parametrize("column, value", [
    ("history", [["2+2?", "4"]]), ("table", "a | b"), ("premise", "It rained."),
    ("paragraphs", [{"title": "a", "paragraph_text": "b"}]), ("evidence", "It is 4."), ("tools", '[{"name": "f"}]'),
    ("videos", ["a.mp4"]), ("audio", "a.wav"),
])  # fmt: skip
def test_what_belongs_to_the_question_and_cannot_be_asked_is_refused(column, value):
    row = {"question": "And doubled?", "answer": "8"}
    assert refused({**row, column: value}).startswith(f"{column}: holds a part of the question")
    for nothing in (None, [], {}, [None], {"path": None}, "null", "{}", False):
        assert golds([{**row, column: nothing}]) == ["8"]


def test_what_is_refused_can_be_left_out_where_a_flag_says_so():
    row = {"question": "And doubled?", "answer": "8", "evidence": "It is 4."}
    assert "name --prompt_column or --solution_column" in refused(row)
    assert asked(row, prompt_column="question") == [("user", "And doubled?")]
    ours = {"prompt": "And doubled?", "solution": "8", "evidence": "It is 4."}  # which no flag names
    assert refused(ours).endswith("expected it in the prompt, or nothing")


def test_a_part_of_the_question_that_it_has_already_is_no_loss():
    row = {"question": "a | b\nHow many?", "answer": "8", "table": "a | b", "task": "And doubled?"}
    assert asked(row) == [("user", "a | b\nHow many?")]
    assert asked({**row, "table": "c | d"}, prompt_column="task") == [("user", "And doubled?")]


@pytest.mark.parametrize("column", ["tools", "choices", "figure", "messages"])
@pytest.mark.parametrize("depth", [400, 900])
def test_deep_nesting_ends_no_run(column, depth, tmp_path):
    nested = "[" * depth + '"x"' + "]" * depth
    if column == "figure":
        nested = '{"path":' * depth + '"x"' + "}" * depth
    deep = f'{{"question": "1+1?", "answer": "2", "{column}": {nested}}}\n'
    (tmp_path / "x.jsonl").write_text('{"question": "1+2?", "answer": "3"}\n' + deep, encoding="utf-8")
    rows = read(str(tmp_path / "x.jsonl"))
    assert len(rows) == 2 and rows[0]["solution"] == "3"


@pytest.mark.parametrize("content", [["x"], 5, None, [{"type": "image"}]])
def test_a_system_turn_that_is_no_text_is_refused_beside_a_system_column(content):
    prompt = [{"role": "system", "content": content}, {"role": "user", "content": "2+2?"}]
    assert "another than that" in refused({"prompt": prompt, "answer": "4", "system": "Be brief."})


def test_two_questions_are_refused_unless_one_is_named():
    row = {"prompt": "Answer the question.", "question": "What is 6*7?", "answer": "42"}
    assert refused(row).startswith("question: expected one question")
    assert asked(row, prompt_column="question") == [("user", "What is 6*7?")]
    assert asked({**row, "result": "42"}, solution_column="result") == [("user", row["prompt"])]
    assert asked({"prompt": "Find x.", "question": "Find $x$. ", "answer": "42"}) == [("user", "Find x.")]
    assert asked({"prompt": "Find x.", "query": "q_123", "answer": "42"}) == [("user", "Find x.")]
    assert asked({**row, "solution": "42"}) == [("user", row["prompt"])]  # the house's own columns
    assert asked({**row, "prompt": "Answer: what is 6*7?"}) == [("user", "Answer: what is 6*7?")]


@pytest.mark.parametrize("dtype, expected", [(pa.float32(), ["0.1", "3.14"]), (pa.float16(), ["0.1", "3.14"])])
def test_short_floats_are_as_they_were_written(tmp_path, dtype, expected):
    numbers = np.array([0.1, 3.14], np.float32 if dtype == pa.float32() else np.float16)
    beside = pa.array([{"gold": 3.14159265358979}] * 2, pa.struct([("gold", pa.float64()), ("w", dtype)]))
    columns = {"question": ["a?", "b?"], "answer": pa.array(numbers), "beside": beside}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert next(table.records(str(tmp_path / "x.parquet")))[2]["beside"]["gold"] == 3.14159265358979
    assert golds(str(tmp_path / "x.parquet")) == expected
    assert golds([{"question": "a?", "answer": numbers[0]}]) == expected[:1]
    from datasets import Dataset, Features, Value

    features = Features({"question": Value("string"), "answer": Value(str(numbers.dtype))})
    assert golds(Dataset.from_dict({"question": ["a?", "b?"], "answer": numbers.tolist()}, features)) == expected


def test_yes_answers_a_gold_that_is_true():
    (right,) = golds([{"question": "Is 7 prime?", "answer": True}])
    assert is_equal("Yes", right) and is_equal("true", right) and not is_equal("No", right) and not is_equal("1", right)
    assert not is_equal("false", "no")  # a gold in words is answered in these


def test_classes_are_their_names():
    from datasets import ClassLabel, Dataset, Features, List, Value

    def of(names):
        features = Features({"question": Value("string"), "answer": ClassLabel(names=names)})
        return golds(Dataset.from_dict({"question": ["a?", "b?"], "answer": [0, 1]}, features))

    assert of(["no", "yes"]) == ["no", "yes"]
    options = {"question": Value("string"), "choices": List(Value("string")), "answer": ClassLabel(names=["x", "y"])}
    rows = {"question": ["a?", "b?"], "choices": [["p", "q"]] * 2, "answer": [0, 1]}
    assert golds(Dataset.from_dict(rows, Features(options))) == ["A", "B"]


@pytest.mark.parametrize("name, text, expected", [
    ("train.csv", "question,solution\na?,0.50\nb?,0101\nc?,12345678901234567890\nd?,NA\n",
     ["0.50", "0101", "12345678901234567890", "NA"]),
    ("train.jsonl", '{"question": "a?", "solution": "2023-01-02"}\n', ["2023-01-02"]),
    ("data/train-0.jsonl", '{"question": "a?", "solution": "0.50"}\n', ["0.50"]),
])  # fmt: skip
def test_a_folders_files_keep_what_is_written(tmp_path, name, text, expected):
    file = tmp_path / "set" / name
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    assert golds(str(tmp_path / "set")) == expected
    with pytest.raises(BadInput, match="no split 'dev'"):
        golds(str(tmp_path / "set"), dataset_split="dev")


def test_a_folder_that_says_how_to_read_its_files_is_read_so(tmp_path):
    (tmp_path / "train.csv").write_text("a?~1\nb?~2\n", encoding="utf-8")
    configs = '---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: "~"\n'
    (tmp_path / "README.md").write_text(configs + "  names: [question, answer]\n---\n", encoding="utf-8")
    assert golds(str(tmp_path)) == ["1", "2"]


def test_a_folders_decimal_commas_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("question;answer\nHow much?;3,5\n", encoding="utf-8")
    assert "with a comma" in golds(str(tmp_path))[0]


def test_a_folders_broken_line_is_one_row(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a?", "solution": "1"}\n5\n', encoding="utf-8")
    assert golds(str(tmp_path)) == ["1", "row 1: field row: expected a JSON object, got 5"]


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "6*7?"}], "solution": "42"},
    {"messages": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42"}]},
    {"messages": json.dumps([{"role": "user", "content": "6*7?"}]), "answer": "42"},
    {"conversations": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42"}]},
])  # fmt: skip
def test_chat_messages(row):
    assert asked(row) == [("user", "6*7?")] and golds([row]) == ["42"]


def test_chat_messages_with_images_and_another_answer(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {"messages": [{"role": "user", "content": "<image>Area?"}], "images": [{"image": "a.png"}], "result": "4"}
    (found,) = read([row], image_root=str(tmp_path), solution_column="result")
    assert (found["solution"], len(found["images"])) == ("4", 1)
    assert "expected a gold answer" in refused({"messages": row["messages"]})
    assert golds([{"prompt": "6*7?", "completion": [{"role": "assistant", "content": "42"}]}],
                 solution_column="completion") == ["42"]  # fmt: skip


@pytest.mark.parametrize("text", [
    json.dumps([{"role": "user", "content": "6*7?"}], indent=2), '[ {"role": "user", "content": "6*7?"}]',
])  # fmt: skip
def test_messages_as_json_however_it_is_laid_out(text):
    assert asked({"prompt": text, "solution": "42"}) == [("user", "6*7?")]


@pytest.mark.parametrize("text", [
    '{"messages": [{"role": "user", "content": "6*7?"}]}', '[{"id": 1, "from": "human", "value": "6*7?"}]',
])  # fmt: skip
def test_turns_that_are_no_messages_are_no_question(text):
    assert "expected text or messages" in refused({"prompt": text, "solution": "42"})


def test_marks_of_images_in_other_spellings(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for mark in ("<image_1>", "<|image_1|>", "<image 1>"):
        row = {"question": f"Look: {mark} Area?", "answer": "4", "images": ["a.png"]}
        ((_, content),) = asked(row, image_root=str(tmp_path))
        assert [part["type"] for part in content] == ["text", "image", "text"]


@pytest.mark.parametrize("value, expected", [
    ("Since OA=OB, it is 50°.\nAnswer:B", "B"), ("Step 1: 3+4\n### Answer: 7", "7"), ("Ans: 7", "7"), ("答案:B", "B"),
    ("Work it out\n**Answer:** 7", "7"), ("So it is.\n**Answer: 7**", "7"), ("$\\boxed{7}$.\nAnswer: see above", "7"),
    ("<think>x</think>\n<answer>Final\nAnswer: 7</answer>", "7"), ("因为它是质数，故选B。", "B"),
    (datetime(2023, 1, 2), "2023-01-02"),
    (datetime(2023, 1, 2, 5), "2023-01-02 05:00:00"),
])  # fmt: skip
def test_what_the_answer_is(value, expected):
    assert gold(value) == expected


@pytest.mark.parametrize("answer", ["proof", "notfound"])
def test_numinamaths_words_for_no_answer(answer):
    assert "stands for none" in refused({"problem": "Prove it.", "solution": r"\boxed{1}", "answer": answer})
    assert golds([{"problem": "1?", "solution": r"\boxed{1}", "answer": float("nan")}]) == ["1"]


@pytest.mark.parametrize("token", [
    "<|eot_id|>", "<|start_header_id|>", "<start_of_turn>", "<IMG_CONTEXT>", "<image_soft_token>", "<|endoftext|>",
])  # fmt: skip
def test_control_tokens_of_every_supported_family_are_no_text(token):
    assert f"control token {token}" in refused({"prompt": f"x {token} y?", "solution": "1"})


def test_a_spreadsheets_empty_rows_and_windows_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png())
    (tmp_path / "x.csv").write_text(
        "question,answer,image\nArea?,4,sub\\a.png\nArea?,5,C:\\data\\sub\\a.png\n,,\n", encoding="utf-8"
    )
    rows = read(str(tmp_path / "x.csv"), image_root=str(tmp_path))
    assert [row["images"][0]["path"] for row in rows] == [str(tmp_path / "sub" / "a.png")] * 2
    (tmp_path / "y.csv").write_bytes("question,answer\na,b\n".encode("utf-16-le"))
    with pytest.raises(BadInput, match="another encoding"):
        read(str(tmp_path / "y.csv"))


def test_an_error_does_not_list_a_thousand_columns():
    with pytest.raises(BadInput, match=r"no column 'prompt'") as caught:
        read_dataset([{f"id{i}": 1 for i in range(3000)}])
    assert len(str(caught.value)) < 900
