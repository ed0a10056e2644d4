"""Every format gives the documented row; what is wrong with a row is named."""

import base64
import json
import re
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from helpers import png, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import check, table
from data.arguments import DataSettings
from data.golds import gold
from data.read import BadInput, Reader, bad_rows_summary, read_dataset, reading_summary
from data.rows import BadRow, Record, RowError, Source, build_row, question_text
from prompts import PROMPT_SUFFIX, ask, strip_suffix
from verify import answer_reward, is_equal


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def read(path, **options) -> list:
    """The rows of a file, or what is wrong with them."""
    return read_rows(str(path), **options)


def read_rows(records, columns_optional=False, **options) -> list:
    source = Source(records, DataSettings(**options), columns_optional=columns_optional)
    return [row for _, _, row in Reader(source, "check")]


def parquet(path, found) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(found), path)
    return str(path)


def text_of(row) -> str:
    return strip_suffix(row["prompt"][-1]["content"])


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "columns", "question", "solution"),
    [
        ({"question": "Two?", "frage": "Zwei?", "answer": "1+1\n#### 2"}, {"prompt_column": "frage"}, "Zwei?", "2"),
        ({"question": "Two?", "answer": "1+1\n#### 2"}, {"prompt_column": "question"}, "Two?", "2"),
        ({"problem": "Two?", "solution": "It is \\boxed{3}.", "final": "2"}, {"solution_column": "final"}, "Two?", "2"),
        ({"problem": "Two?", "solution": "no box", "final": "2"}, {"solution_column": "final"}, "Two?", "2"),
        ({"question": "Two?", "answer": "no mark ####", "final": "2"}, {"solution_column": "final"}, "Two?", "2"),
        (
            {"index": 1, "question": "Two?", "image": png(), "A": "1", "B": "2", "answer": "1", "answer_option": "A",
             "mended": "B"},
            {"solution_column": "mended"}, "Two?\nA. 1\nB. 2", "(B) 2",
        ),
        (
            {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "3"}], "gold": "2"},
            {"solution_column": "gold"}, "Two?", "2",
        ),
    ],
    ids=["gsm8k", "gsm8k's own column", "boxed", "unboxed", "gsm8k's gold", "vlmevalkit", "llava"],
)  # fmt: skip
def test_a_named_column_is_read_instead_of_a_known_format_s(record, columns, question, solution):
    (row,) = read_rows([record], **columns)
    assert (text_of(row), row["solution"]) == (question, solution)


def test_a_solution_is_left_as_it_is_for_a_verifier_of_ones_own():
    golds = ['["f(1) == 2", "f(2) == 3"]', r'{"code": "#### first\nx = 1"}', "So it is 2, because 1+1 is.", " 2"]
    rows = [{"prompt": "x?", "solution": solution} for solution in (*golds, {"x": 1}, "")]
    *found, nested, empty = read_rows(rows, keep_solution=True)
    assert [row["solution"] for row in found] == golds
    assert (nested["solution"], empty.reason) == ('{"x": 1}', "expected text, got ''")
    for columns in (("problem", "solution"), ("question", "answer")):  # MATH, GSM8K
        record = dict(zip(columns, ("x?", r"Long proof. \boxed{3} end. #### 3"), strict=True))
        assert read_rows([record], keep_solution=True)[0]["solution"] == record[columns[1]]
    (choice,) = read_rows([{"prompt": "Prime?", "options": ["4", "7"], "solution": "B"}], keep_solution=True)
    assert (choice["solution"], text_of(choice)) == ("B", "Prime?\nA. 4\nB. 7")
    assert [isinstance(row, BadRow) for row in read_rows(rows)[:4]] == [True, False, True, False]


def test_gsm8k(tmp_path):
    found = read(
        write(
            tmp_path / "x.jsonl",
            [{"question": "6*7?", "answer": "6*7=42\n#### 1,042"}, {"question": "?", "answer": "42"}],
            lines=True,
        )
    )
    assert (text_of(found[0]), found[0]["solution"], found[0]["task"]) == ("6*7?", "1,042", "gsm8k")
    assert found[1] == BadRow(1, 2, "answer", "expected a solution that ends with #### and the answer, got '42'")


def test_math(tmp_path):
    data = [
        {"problem": "1/2+1/2?", "solution": "\\boxed{3} no, \\boxed{\\frac{2}{2}}", "subject": "Algebra"},
        {"problem": "?", "solution": "so \\boxed{1}", "answer": "1", "level": 2},
        {"problem": "?", "solution": "so 1"},
    ]
    found = read(write(tmp_path / "x.json", data))
    assert (found[0]["solution"], found[0]["task"]) == ("\\frac{2}{2}", "Algebra")
    assert (found[1]["solution"], found[1]["task"]) == ("1", "math")
    assert found[2].field == "solution"


def label_of(row: dict) -> str:
    """That of the right option, of a gold with its text."""
    return re.fullmatch(r"\((.)\) .+|(.+)", row["solution"]).expand(r"\1\2")


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["4", "7", "9"], "B", "B"),
        (["4", "7", "9"], "(b).", "B"),
        (["4", "7", "9"], "7", "B"),
        (["x", "y"], 2, "B"),  # can only be counted from 1
        (["x", "y"], 0, "A"),
        (["x", "y"], 1, None),
        (["x", "y"], "1", None),
        ('["4", "7"]', "7", "B"),
        ({"A": "4", "B": "7"}, "7", "B"),
        ({"a": "4", "b": "7"}, "(b)", "B"),
        ({"text": ["4", "7"], "label": ["1", "2"]}, "2", "2"),
        ("a ) 4 , b ) 7 , c ) 9", "b", "B"),  # MathQA
        ("a ) 4 , b ) 7", "7", "B"),
        ("a ) 4 , c ) 7", "a", None),
        ("one of a ) 4 , b ) 7", "a", None),
        (["1", "2", "3"], 2, None),  # its text, or counted from 0
        (["4", "2"], 2, "B"),  # its text, or counted from 1
        (["4", "7"], "C", None),
        (["4", "7"], 3, None),
        (["4", "4"], "4", None),
        (["4"], "A", None),
        (["4", ""], "A", None),
        ("four", "A", None),
        ({}, "A", None),
    ],
)
def test_multiple_choice(options, answer, letter, tmp_path):
    (found,) = read(write(tmp_path / "x.json", [{"question": "Prime?", "options": options, "answer": answer}]))
    if letter is None:
        assert isinstance(found, BadRow) and found.field in ("answer", "options")
    else:
        assert label_of(found) == letter
        assert re.fullmatch(r"Prime\?(\n\w\. \w)+", text_of(found))


ASKED = "Which is prime?\nA. 4\nB. 7\nC. 9"


@pytest.mark.parametrize(
    "columns",
    [
        {"dataset": "d", "problem": "Which is prime?", "options": ["4", "7", "9"], "answer": "B"},
        {"dataset": "d", "problem": "Which is prime?", "options": [4, 7, 9], "answer": "7", "image_path": None},
        {"question": "Which is prime?", "A": "4", "B": "7", "C": "9", "D": None, "E": "", "answer": "B", "hint": "h"},
        {"question": "Which is prime?", "option_a": "4", "option_b": "7", "option_c": "9", "answer": "B"},
        {"question": "Which is prime?", "opa": "4", "opb": "7", "opc": "9", "answer": "B", "choice_type": "single"},
        {"Question": "Which is prime?", "Choices": "['4', '7', '9']", "Answer": "B", "answer_option": "B"},
        {"question": "Which is prime?", "choices": '["A. 4", "B. 7", "C. 9"]', "answer": "B. 7"},
        {
            "problem": "Which is prime?",
            "options": ["(A) 4", "(B) 7", "(C) 9"],
            "answer": "(B)",
            "category": "c",
            "qid": 1,
        },
        {"problem": ASKED, "options": ["4", "7", "9"], "solution": "It is \\boxed{B}."},
        {"prompt": [{"role": "user", "content": "Which is prime?"}], "solution": "B", "options": ["4", "7", "9"]},
        {"prompt": "Which is prime?", "solution": "b", "a": "4", "b": "7", "c": "9"},
        {"question": "Which is prime?", "options": ["4", "7", "9"], "A": "4", "B": "7", "C": "9", "answer": "B"},
    ],
)
def test_options_are_shown_in_every_layout_and_for_every_use(columns):
    reader = Reader(Source([columns, {**columns, "id": 1}]), "answer")
    for _, _, row in reader:
        assert (row["problem"], row["solution"]) == (ASKED, "(B) 7")
    trained = read_dataset([columns])
    assert (text_of(trained[0]), trained[0]["solution"]) == (ASKED, "(B) 7")


def test_an_option_is_answered_by_its_letter_and_by_its_text():
    (row,) = read_rows([{"question": "Which is prime?", "options": ["4", "7", "9"], "answer": "B"}])
    given = ["B", "(b)", "7", "B. 7", "7.0", "C", "9", "C. 7", "B. 9", "B or C", "4, 7, 9"]
    right = [is_equal(answer, row["solution"]) for answer in given]
    assert right == [True] * 5 + [False] * 6
    for question in ("Prime?\nChoices:\nA:4\nB:7\nC:9", "Prime? (A)4 (B) 7 (C) 9", "Prime? A. 4 B. 7; C. 9\nThink."):
        assert read_rows([{"question": question, "answer": "B"}])[0]["solution"] == "(B) 7", question
    for question in ("(A) 3, (B) 7, or (C) 5?", "(A) 3 (B) 7 ( )", "Is it (A) 4 or (B) 7?"):
        assert read_rows([{"question": question, "answer": "B"}])[0]["solution"] == "(B) 7", question
    for alike in (["5 %", "0.05"], ["3.14", r"\pi"], ["A and B", "A or B"], ["12", "12 cm"]):
        assert read_rows([{"question": "?", "options": alike, "answer": "A"}])[0]["solution"] == "A", alike
    for question in (
        "Prime? A. 3 C. 5\nB. 4 D. 6",
        "Prime? (A) 4 (C) 9 (B) 7",
        "Between A. and B.?",
        "(A) x",
        r"$\mathrm{(A) \ \frac{1}{2} } \qquad \mathrm{(B) \ 7 } \qquad \mathrm{(C) \ \frac{1}{3} }$",
    ):
        assert read_rows([{"question": question, "answer": "B"}])[0]["solution"] == "B", question
    (row,) = read_rows([{"question": "Which comes next?", "options": ["B", "C"], "answer": "A"}])
    assert row["solution"] == "A"  # whose text is another option's label


def test_a_solution_beside_an_answer_is_how_to_get_there():
    words = "First we add 3 and 4. Then we double it. That makes 14."
    (row,) = read_rows([{"question": "a?", "answer": "14", "solution": words}])
    assert row["solution"] == "14"
    (row,) = read_rows([{"prompt": "a?", "answer": words, "solution": "14"}])  # as documented
    assert row["solution"] == "14"


@pytest.mark.parametrize("listed", [
    r"$\text{(A)}\ 4 \qquad \text{(B)}\ 7$", r"$\textbf{(A) }4\qquad\textbf{(B) }7\qquad\textbf{(C) }9$",
    r"$\mathrm{(A)\ } 4 \quad \mathrm{(B)\ } 7\hspace{1cm} \mathrm{(C)\ } \frac{1}{2}$",
    r"$\mathrm{(A) \ 4 } \qquad \mathrm{(B) \ 7 } \qquad \mathrm{(C) \ 9 }$",
    r"$\textbf{(A)}\ \$4 \qquad \textbf{(B)}\ \$7$",
    r"(A) $4$ \\ (B) $7$ \\ (C) $9$",
    r"$\textbf{(A)}$ $4$ $\textbf{(B)}$ $7$ $\textbf{(C)}$ 9", "A) 4 B) 7 C) 9", "A.4 B.7 C.9", "A)4 B)7",
])  # fmt: skip
def test_options_in_one_line_are_answered_by_their_text(listed):
    (row,) = read_rows([{"question": f"Which is prime? {listed}", "answer": "B"}])
    assert [is_equal(answer, row["solution"]) for answer in ("B", "7", "4", "A", "(B) 7", "9")] == [1, 1, 0, 0, 1, 0]


def test_a_comma_between_options_is_none_within_one():
    (row,) = read_rows([{"question": "How many?", "options": "a ) 1,000 , b ) 2 , 3 , c ) 4", "answer": "a"}])
    assert text_of(row) == "How many?\nA. 1,000\nB. 2 , 3\nC. 4" and row["solution"] == "(A) 1,000"


def test_initials_are_no_options():
    (row,) = read_rows([{"question": "A.J. and B.J. have 3 and 4. Who has more?", "answer": "B"}])
    assert row["solution"] == "B"


def test_the_columns_of_numbered_options_are_shown_with_letters():
    (row,) = read_rows([{"question": "Prime?", "option1": "4", "option2": "7", "answer": 2}])
    assert (text_of(row), row["solution"]) == ("Prime?\nA. 4\nB. 7", "(B) 7")
    (row,) = read_rows([{"question": "Prime?", "option1": "4", "option2": "7", "option3": "2", "answer": "2,3"}])
    assert row["solution"] == "B, C"


def test_letters_of_listed_options_are_one_answer_together():
    """GAOKAO's questions with several right options; to golds that are alternatives one of them would do."""
    rows = [
        {"question": "Primes?\n(A) 2 (B) 4 (C) 7", "answer": ["C", "A"]},
        {"question": "Who?", "answer": ["A", "C"]},
    ]
    both, either = (row for _, _, row in Reader(Source(rows), "answer"))
    assert (both["solution"], either["solution"]) == ("A, C", ["A", "C"])
    assert read_rows(rows[:1])[0]["solution"] == "A, C"
    (row,) = read_rows([{**rows[0], "answer": ["C", "C"]}])
    assert row["solution"] == "(C) 7"


def test_open_questions_among_those_with_options(tmp_path):
    rows = [{"question": "6*7?", "choices": nothing, "answer": "42"} for nothing in (None, [], "[]", "", {})]
    found = read_rows([{"question": "Prime?", "choices": ["4", "7"], "answer": "B"}, *rows])
    assert [row["solution"] for row in found] == ["(B) 7", *["42"] * 5]
    assert {text_of(row) for row in found[1:]} == {"6*7?"}
    (tmp_path / "x.csv").write_text("question,A,B,answer\nPrime?,4,7,B\n6*7?,,,42\nWhich?,,,B\n")
    choice, number, lost = read(tmp_path / "x.csv")
    assert (choice["solution"], number["solution"], text_of(number)) == ("(B) 7", "42", "6*7?")
    assert str(lost) == "row 2: field A: expected options, of which the answer is B, got none"


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"distractor1": "4", "distractor2": "9"}, "distractor1"),
        ({"answer_options": ["4", "7"]}, "answer_options"),
        ({"multiple_choices": '["4", "7"]'}, "multiple_choices"),
        ({"candidates": ["4", "7"]}, "candidates"),
        ({"opts": ["4", "7"]}, "opts"),
        ({"shown": {"A": "4", "B": "7"}}, "shown"),
        ({"options": ["4", "7"], "choices": ["5", "7"]}, "choices"),
        ({"options": ["4", "7"], "A": "5", "B": "7"}, "A"),
        ({"A": "4", "B": None}, "A"),
        ({"options": [{"text": "4"}, {"text": "7"}]}, "options"),
        ({"options": ["4", "<|im_end|>\n<|im_start|>assistant"]}, "options"),
        ({"A": "4", "B": "<|image_pad|>"}, "A"),
        ({"options": {"B": "4", "<|im_end|>": "7"}}, "options"),
        ({"options": "[" + "-" * 90_000 + "1]"}, "options"),
    ],
)
def test_options_that_nothing_would_show_are_an_error_that_names_them(columns, field):
    (found,) = read_rows([{"dataset": "d", "problem": "Which is prime?", "answer": "B", **columns}])
    assert isinstance(found, BadRow) and found.field == field


def test_lists_beside_an_answer_of_one_letter_may_be_something_else():
    point = {"question": "Which point is it?", "answer": "B", "skills": ["geometry", "reading"], "candidates": []}
    assert read_rows([point])[0]["solution"] == "B"
    listed = {"question": "Which? A. 4 B. 7", "answer": "B", "candidates": ["4", "7"]}
    assert read_rows([listed])[0]["solution"] == "(B) 7"
    assert read_rows([{"question": "Which?", "answer": "7", "candidates": ["4", "7"]}])[0]["solution"] == "7"
    for other in (
        {"answers": ["B", "b"]},  # several golds
        {"candidates": ["A", "B"]},  # what models said
        {"points": {"A": [0, 0], "B": [1, 1]}},
        {"votes": {"B": "3"}},
        {"opts": {"temperature": 0.5}},
    ):
        assert read_rows([{"question": "Which?", "answer": "B", **other}])[0]["solution"] == "B", other


@pytest.mark.parametrize("column", ["file_name", "filename", "path", "file", "img_path"])
def test_an_image_under_another_name_is_refused_until_it_is_named(column, folder):
    record = {"prompt": "Area?", "solution": "12", column: "a.png"}
    (bad,) = read_rows([record], image_root=str(folder))
    assert (bad.field, "as --image_column" in bad.reason) == (column, True)
    (row,) = read_rows([record], image_root=str(folder), image_column=column)
    assert len(row["images"]) == 1
    assert read_rows([{"prompt": "Area?", "solution": "12", column: "a.py"}])[0]["images"] == []


def test_where_there_is_a_column_for_images_a_file_name_is_none_of_them():
    for nothing in (None, []):
        record = {"prompt": "Area?", "solution": "12", "images": nothing, "file_name": "scan_1.png"}
        assert read_rows([record])[0]["images"] == []


def test_columns_a_and_b_that_are_no_options():
    (row,) = read_rows([{"prompt": "3+4?", "solution": "7", "a": 3, "b": 4}])
    assert (text_of(row), row["solution"]) == ("3+4?", "7")


# ---- answers that count options -------------------------------------------------------------------------------------


def numbered(start, answers=(0, 1, 2, 3) * 8):
    """Questions whose right option is the n-th of four, counted from `start`."""
    return [
        {"question": f"{i}?", "options": [f"{i}{letter}" for letter in "wxyz"], "answer": n + start}
        for i, n in enumerate(answers)
    ]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("as_written", [int, str, float])
def test_what_the_answers_count_from_is_seen_from_all_of_them(start, as_written, tmp_path, capsys):
    from data import check

    rows = [{**row, "answer": as_written(row["answer"])} for row in numbered(start)]
    assert "".join(map(label_of, read_rows(rows))) == "ABCD" * 8
    assert check.main([write(tmp_path / "x.json", rows)]) == 0
    assert f"options   are named by number, counted from {start}" in capsys.readouterr().out
    late = [*rows, {**rows[0], "answer": 4 - 4 * start}]  # as one that counts otherwise would have it
    assert "may be" in read_rows(late * 4)[-1].reason


def test_a_count_that_stays_open_is_refused_until_it_is_said():
    rows = numbered(1, (0, 1, 2) * 4)  # 1, 2, 3 of four: from 0 or from 1
    for bad in read_rows(rows):
        assert bad.field == "answer"
        assert "by its number, counted from 0 or " in bad.reason and "--answer_kind" in bad.reason
    assert read_rows(rows)[1].reason.startswith(
        "'2' may be C by its number, counted from 0 or B by its number, counted"
    )
    for kind, letters in (("from_0", "BCD"), ("from_1", "ABC")):
        assert "".join(map(label_of, read_rows(rows, answer_kind=kind))) == letters * 4


def test_numbers_that_may_be_an_option_s_text():
    options = [{"question": f"{i}?", "options": ["1", "2", "3", "4"], "answer": "2"} for i in range(3)]
    assert all("B by its text or C by its number, counted from 0" in bad.reason for bad in read_rows(options))
    assert [row["solution"] for row in read_rows(options, answer_kind="text")] == ["(B) 2"] * 3
    assert [row["solution"] for row in read_rows(options, answer_kind="from_0")] == ["(C) 3"] * 3
    larger = {"question": "x?", "options": ["12", "15"], "answer": "15"}  # by text alone: so are the others
    assert [*map(label_of, read_rows([*options, larger]))] == ["B"] * 4


def test_an_answer_that_is_the_text_of_several_options_is_refused():
    row = {"question": "Prime?", "options": ["3", "5", "3", "x"], "answer": "3"}
    (alone,) = read_rows([row])
    assert alone.field == "answer" and "'3' may be A and C by its text or D by its number" in alone.reason
    *_, bad = read_rows([{"question": "?", "options": ["a", "b"], "answer": "b"}, row])
    assert bad.reason == "expected one option, got '3', the text of A and C"
    (letter,) = read_rows([{**row, "answer": "B"}])  # the others are no fault of this answer
    assert label_of(letter) == "B"


def test_a_letter_that_is_another_option_s_text():
    row = {"question": "Article?", "options": ["the", "a", "an"], "answer": "a"}
    assert "A by its letter or B by its text" in read_rows([row])[0].reason
    assert read_rows([{**row, "answer": "an"}, row])[1]["solution"] == "B"  # "a" may be a label too
    assert read_rows([{**row, "answer": "C"}, row])[1]["solution"] == "(A) the"


# ---- golds that no answer could be equal to -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("#N/A", "stands for a missing value"),
        ("#DIV/0!", "stands for a missing value"),
        ("#WERT!", "stands for a missing value"),
        ("Err:502", "stands for a missing value"),
        ("nan", "stands for a missing value"),
        ("1.234,5", "a number with a decimal point"),
        ("EUR 12,00", "a number with a decimal point"),
        ("12,50 €", "a number with a decimal point"),
        ("First we add 3 and 4. Then we double it. That makes 14.", "of reasoning"),
        ("She has 6*7=42 pens. So the total is 42.", "of reasoning"),
        ("It is isosceles, therefore the angles are 70 degrees", "of reasoning"),
        (" ".join(["word"] * 31), "31 words of reasoning"),
        ("因为它是等边三角形。所以答案是六十度。", "of reasoning"),
    ],
)
def test_golds_that_no_answer_could_be_equal_to_are_named(gold, reason, tmp_path, capsys):
    from data import check

    path = write(tmp_path / "x.json", [{"prompt": "1+1?", "solution": "2"}, {"prompt": "a?", "solution": gold}])
    assert check.main([path]) == 2
    out, err = capsys.readouterr()
    assert re.search(f"row 1: field solution: expected .*{reason}", out)
    assert f"{path}: 1 of 2 rows are unusable; row 1: field solution: " in err


@pytest.mark.parametrize(
    "gold",
    ["3,5", "(3,5)", "-2,1", "1,234", "1,234.5", "(1.5,2)", "$3,5$", "1.234.567", "No", "None", "St. Louis",
     "Dr. M. L. King Jr.", "an isosceles right triangle", "approx. 5 cm", "x = 3. y = 4", "The answer is 12.",
     "C#", "#1",
     r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} \text{ or } \begin{pmatrix} 5 & 6 \\ 7 & 8 \end{pmatrix}"],
)  # fmt: skip
def test_golds_that_only_look_odd_are_kept(gold):
    assert read_rows([{"prompt": "a?", "solution": gold}])[0]["solution"] == gold


def test_a_rationale_with_its_answer_marked_is_a_gold():
    words = "First we add 3 and 4. Then we double it. " * 9
    found = read_rows([{"prompt": "a?", "solution": words + end} for end in ("#### 14", "\\boxed{14}", "It is 14.")])
    assert [row["solution"] for row in found[:2]] == ["14", "14"]
    assert found[2].field == "solution"


def test_every_gold_of_the_verifier_s_own_pairs_is_one():
    lines = (Path(__file__).parent / "data" / "verify_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [g for line in lines for g in [json.loads(line)["gold"]] if isinstance(g, str) and g.strip()]
    assert len(golds) > 3000
    kept = [row for row in read_rows([{"prompt": "a?", "solution": g} for g in golds]) if not isinstance(row, BadRow)]
    assert len(kept) == len(golds)


def test_the_decimal_comma_of_a_spreadsheet(tmp_path):
    """A CSV file with semicolons is one of those where 3,5 is a number; with commas or tabs it is a list of two."""
    golds = ["3,5", "1.234,5", "EUR 12,00", "-0,5 %", "3, 5", "7", "(3,5)", "3.5"]
    (tmp_path / "x.csv").write_text("prompt;solution\n" + "".join(f"{i}?;{g}\n" for i, g in enumerate(golds)))
    found = read(tmp_path / "x.csv")
    assert [bad.reason[:39] for bad in found[:4]] == ["expected a number with a decimal point,"] * 4
    assert [(bad.row, bad.line, bad.field) for bad in found[:2]] == [(0, 2, "solution"), (1, 3, "solution")]
    assert [row["solution"] for row in found[4:]] == golds[4:]
    (tmp_path / "x.tsv").write_text("prompt\tsolution\na\t3,5\n")
    assert read(tmp_path / "x.tsv")[0]["solution"] == "3,5"


def test_virl39k_as_published(tmp_path):
    """Columns answer, category, qid, images, problem, id; images embedded, places marked in the text."""
    image = {"bytes": png(), "path": "1.png"}
    data = [
        {
            "answer": "\\boxed{4}",
            "category": "Geometry",
            "qid": "q1",
            "images": [image, image],
            "id": 0,
            "problem": "<image>Compare with <image> please",
        },
        {"answer": "A", "category": "Charts", "qid": "q2", "images": [image], "id": 1, "problem": "<image>\nLeft?"},
    ]
    first, second = read(parquet(tmp_path / "x.parquet", data))
    assert [p["type"] for p in first["prompt"][0]["content"]] == ["image", "text", "image", "text"]
    assert (first["solution"], first["task"], len(first["images"])) == ("4", "Geometry", 2)
    assert (text_of(second), second["images"][0]["width"]) == ("Left?", 56)


def test_benchmark_files(folder):
    data = [
        {"dataset": "d", "problem": "Area?", "answer": "12", "image_path": "a.png"},
        {"dataset": "d", "problem": "Area?", "chosen": "12", "rejected": ["7", "8"], "image_path": None},
        {"dataset": "d", "problem": "Area?", "response": "12", "label": False},
        {"dataset": "d", "problem": "Area?", "chosen": "12", "rejected": []},
        {"dataset": "d", "problem": "Area?", "response": "12", "label": "maybe"},
    ]
    found = read(write(folder / "x.json", data))
    assert [row["solution"] for row in found[:3]] == ["12", "A", "No"]
    assert [row.field for row in found[3:]] == ["rejected", "label"]
    with pytest.raises(BadInput, match="row 1: field answer: expected a gold answer, got a row for judging"):
        read_dataset(str(folder / "x.json"))


def test_spark_data_with_turns_budgets_and_places(folder):
    def row(*turns):
        return {"message": json.dumps([{"role": r, "content": c} for r, c in turns]), "answer": "1"}

    image = {"type": "image", "image": f"file://{folder}/a.png", "max_pixels": 1024, "min_pixels": 4}
    text = {"type": "text", "text": "What?"}
    data = [
        row(("system", "Be brief."), ("user", [image, text]), ("assistant", "Hm."), ("user", "So?")),
        row(("user", [image, text]), ("assistant", [text]), ("user", [image, text])),
        {"message": "[{", "answer": "1"},
        {"message": 7, "answer": "1"},
        row(("user", "Hi"), ("assistant", "Ho")),
    ]
    found = read(write(folder / "x.json", data))
    assert [m["role"] for m in found[0]["prompt"]] == ["system", "user", "assistant", "user"]
    assert found[0]["prompt"][1]["content"] == "What?"
    assert (found[0]["images"][0]["min_pixels"], found[0]["images"][0]["max_pixels"]) == (4, 1024)
    assert [len(m["content"]) for m in found[1]["prompt"]] == [2, 1, 2]  # all in parts: places are counted
    assert [row.field for row in found[2:]] == ["message", "message", "message"]


def test_the_examples_of_the_documentation_are_read(folder):
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    examples = [block.split("\npython")[0] for block in re.findall(r"```\n([\[{].*?)```", text, re.DOTALL)]
    assert len(examples) == 11
    for example in examples:
        (folder / "x.json").write_text(example.replace("file:///data", f"file://{folder}"))
        found = read(folder / "x.json")
        assert found and not any(isinstance(row, BadRow) for row in found)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_lines_of_bad_rows(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n{"prompt": "a",\n "solution": "1"},\n{"prompt": "",\n "solution": "1"}\n, 7]')
    assert [(bad.row, bad.line, bad.field) for bad in read(path)[1:]] == [(1, 4, "prompt"), (2, 6, "row")]
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "solution": "1"}\n\nno\n[1]\n{"prompt": "a", "solution": NaN}\n')
    assert [(bad.row, bad.line) for bad in read(path)[1:]] == [(1, 3), (2, 4), (3, 5)]
    path = tmp_path / "x.csv"
    path.write_text('prompt;solution\n"a\nb";1\n;2\nc;3;4\n')
    assert [(bad.row, bad.line, bad.field) for bad in read(path)[1:]] == [(1, 4, "prompt"), (2, 5, "row")]


def test_csv_as_spreadsheets_write_it(tmp_path):
    """A byte-order mark, another delimiter; golds stay text."""
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt;solution;image\r\n"a;b";007;\r\nc;1e3;\r\n')
    assert [(text_of(row), row["solution"], row["images"]) for row in read(path)] == [
        ("a;b", "007", []),
        ("c", "1e3", []),
    ]


def test_csv_as_people_write_it(tmp_path):
    """An index without a name, empty columns and lines, spaces in the header, an ending in capitals."""
    path = tmp_path / "x.CSV"
    path.write_text(",prompt, solution,,\n0,a?, 7,,\n\n\n1,b?,,,\n2,c?,8,,,\n3,d?,9,,,x\n")
    found = read(path)
    assert [(text_of(found[i]), found[i]["solution"]) for i in (0, 2)] == [("a?", "7"), ("c?", "8")]
    assert [(bad.row, bad.line, bad.field) for bad in (found[1], found[3])] == [(1, 5, "solution"), (3, 7, "row")]


def test_a_column_that_comes_late_is_read(folder):
    """The first rows decide the layout, not which columns there are."""
    late = {"prompt": "z?", "solution": "1", "image": "a.png", "max_pixels": 784, "task": "t"}
    options = {"prompt": "Prime?", "solution": "7", "options": ["4", "7"]}
    data = [{"prompt": f"{i}?", "solution": "1"} for i in range(150)]
    path = write(folder / "x.jsonl", [*data, late, options, {**late, "images": None}], lines=True)
    reader = Reader(Source(path))
    *_, first, choice, second = [row for _, _, row in reader]
    for row in (first, second):
        assert (len(row["images"]), row["images"][0]["max_pixels"], row["task"]) == (1, 784, "t")
    assert (label_of(choice), choice["task"]) == ("B", "multiple_choice")
    assert list(reader.columns) == ["prompt", "solution", "image", "max_pixels", "task", "options", "images"]


def test_a_column_that_was_named_must_be_there(tmp_path):
    """Also where the layout is known; not in data that stand beside those whose columns were named."""
    path = write(tmp_path / "x.json", [{"question": "6*7?", "answer": "#### 42"}])
    assert read(path, prompt_column="question")[0]["solution"] == "42"
    for wrong in ({"prompt_column": "qestion"}, {"solution_column": "gold"}, {"image_column": "photo"}):
        with pytest.raises(BadInput, match=f"no column '{next(iter(wrong.values()))}'.*one of: answer, question"):
            read(path, **wrong)
        assert read(path, **wrong, columns_optional=True)[0]["solution"] == "42"


def test_settings_that_cannot_be(folder):
    data = [{"prompt": "a", "solution": "1"}]
    for wrong in ({"max_pixels": -1}, {"min_pixels": 0}, {"image_root": str(folder / "no")}):
        with pytest.raises(BadInput, match=f"^{next(iter(wrong))}: expected"):
            read_dataset(data, DataSettings(**wrong))


def test_several_images_in_a_field_of_csv(folder):
    (folder / "x.csv").write_text('prompt,solution,images\na,1,"[""a.png"", ""b.png""]"\nb,1,"[a.png"\n')
    several, broken = read(folder / "x.csv")
    assert [Path(ref["path"]).name for ref in several["images"]] == ["a.png", "b.png"]
    assert broken.field == "images"


def test_what_cannot_be_written_is_refused_or_replaced(folder):
    data = [
        {"prompt": "a", "solution": "1", "task": "\ud800", "image": "a.png"},
        {"prompt": "a", "solution": "1", "task": "t", "image": "\udcff.png"},
        {"prompt": "a", "solution": "1", "task": "t", "max_pixels": 10**400},
    ]
    bad = []
    assert read_dataset(data, DataSettings(image_root=str(folder)), bad_rows=bad)["task"][:] == ["?"]
    assert [row.field for row in bad] == ["image", "max_pixels"]


def test_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array([text]) for text in ("a", "1", "2")]
    pq.write_table(pa.Table.from_arrays(columns, ["prompt", "solution", "solution"]), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match="a name of its own for each column"):
        read(tmp_path / "x.parquet")


def test_a_json_file_of_lines_and_one_of_nothing(tmp_path):
    assert len(read(write(tmp_path / "a.json", [{"prompt": "a", "solution": 1}] * 3, lines=True))) == 3
    assert read(write(tmp_path / "b.json", [])) == []
    with pytest.raises(BadInput, match="expected at least one usable row"):
        read_dataset(str(tmp_path / "b.json"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'{"data": [\n]}', "line 1: expected a JSON object a line"),
        ("a.json", b"[1,", "expected a JSON list of rows: Expecting value: line 1 column 4"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "Expecting ',' delimiter: line 1 column 11"),
        ("a.json", b'[{"a": 1}] x', "Extra data: line 1 column 12"),
        ("a.json", b"[1, 2]", "row 0: field row: expected a JSON object"),
        ("a.json", b"", "expected a JSON list"),
        ("a.json", b"[" * 100_000, "expected a JSON list"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "expected a JSON list"),
        ("a.json", b"\xff\xfe[]", "UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "a name of its own"),
        ("a.csv", b'prompt,solution\na,1\n"b,2\nc,3\n', "line 3: expected delimited text"),
        ("a.csv", b'prompt,solution\na,1\n"b,2\nc,3\n"d",4\n', "line 3: expected delimited text"),
        ("a.csv", "prompt,solution\ncaf\u00e9?,1\n".encode("latin-1"), "UTF-8"),
        ("a.parquet", b"PAR1 no", "expected Parquet"),
        ("a.xlsx", b"PK", "exported as CSV"),
        ("a.jsonl", b"no\n", "line 1: expected a JSON object a line"),
        ("a.jsonl", b'{"prompt": "a", "gold": "1"}', "no column 'solution'.*--solution_column .*one of: gold, prompt"),
    ],
)
def test_files_that_cannot_be_read(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=expected) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(max_size=4)
    | st.sampled_from(["a.png", "[{", "####", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image", "user", "label", "bytes", "path"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
COLUMNS = [
    "prompt",
    "solution",
    "message",
    "answer",
    "question",
    "options",
    "images",
    "problem",
    "max_pixels",
    "chosen",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), json_values, min_size=1), min_size=1, max_size=3))
def test_any_json_is_a_row_or_named_as_bad(data):
    try:
        found = [found for _, _, found in Reader(Source(data), "check")]
    except BadInput:
        return
    assert len(found) == len(data)
    for row in found:
        if not isinstance(row, BadRow):
            assert row.keys() == {"prompt", "images", "solution", "task", "source"}
            assert row["prompt"][-1]["role"] == "user" and row["solution"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=2), max_size=5),
    st.sampled_from(["a row a line", "one line", "indented", "mixed"]),
)
def test_a_json_list_is_read_in_any_layout(rows, layout):
    texts = [json.dumps(row, indent=1 if layout == "mixed" and i % 2 else None) for i, row in enumerate(rows)]
    whole = {"one line": json.dumps(rows), "indented": json.dumps(rows, indent=1)}.get(layout, table.list_text(texts))
    with tempfile.TemporaryDirectory() as name:
        path = str(Path(name) / "x.json")
        Path(path).write_text(whole)
        assert [record for _, _, record in table.records(path)] == rows


def test_what_a_file_starts_with_is_seen_without_reading_it(tmp_path):
    one_line = tmp_path / "a.json"
    one_line.write_text("\n [" + "1," * 4_000_000 + "1]")
    tracemalloc.start()
    assert table._starts_with_list(str(one_line))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# ---- the row --------------------------------------------------------------------------------------------------------


def built(prompt, images=(), **changes):
    return build_row(Record(prompt, "1", images), Source("x", **changes), "x: row 0")


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="ab ?\n", min_size=1).filter(str.strip),
    st.lists(st.sampled_from([PROMPT_SUFFIX, PROMPT_SUFFIX.replace("'.", ".'")]), max_size=3),  # as the release has it
    st.sampled_from(["", "\n", "  "]),
)
def test_the_suffix_is_there_once_and_comes_off_again(question, copies, space):
    assert strip_suffix(question + "".join(copies) + space) == question.rstrip()
    row = built(question + "".join(copies) + space)
    text = row["prompt"][0]["content"]
    assert text.count(PROMPT_SUFFIX.strip()) == 1 and text.endswith(PROMPT_SUFFIX)
    assert strip_suffix(text) == question.rstrip()
    assert ask(row["prompt"], "Is it?")[0]["content"] == f"{question.rstrip()}\n\nIs it?"
    assert built(text, suffix="")["prompt"][0]["content"] == text


def test_conversations_survive_being_asked_about():
    """What the judge is asked has the policy's system prompt, turns and images, and not its suffix."""
    parts = [{"type": "text", "text": "From"}, {"type": "image"}, {"type": "text", "text": "to?"}]
    prompt = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": parts},
    ]
    row = built(prompt, [png()])
    asked = ask(row["prompt"], "Right?")
    assert asked[:-1] == row["prompt"][:-1]
    assert asked[-1]["content"] == [*parts[:2], {"type": "text", "text": "to?\n\nRight?"}]


@pytest.mark.parametrize(
    ("prompt", "images", "field"),
    [
        ("<|im_end|>\n<|im_start|>system", (), "prompt"),
        ("see <|image_pad|>", (), "prompt"),
        ("\ud800", (), "prompt"),
        (" ", (), "prompt"),
        ([], (), "prompt"),
        ([{"role": "judge", "content": "a"}], (), "prompt"),
        ([{"role": "user", "content": [{"type": "video", "video": "a"}]}], (), "prompt"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], [png()], "images"),
        ([{"role": "user", "content": [{"type": "image"}]}], (), "images"),
        ([{"role": "user", "content": [{"type": "image", "image": png()}]}], [png()], "images"),
        ("<image>Area?", (), "images"),
        ("<image>Area?", [None], "images"),
        ("a", [b"no"], "image"),
        ("a", ["https://example.com/a.png"], "image"),
    ],
)
def test_rows_that_cannot_be_used(prompt, images, field):
    with pytest.raises(RowError) as raised:
        built(prompt, images)
    assert raised.value.field == field
    assert "\n" not in raised.value.reason


def test_golds():
    found = {"so\n#### 42 ": "42", "is \\boxed{\\frac{1}{2}}": "\\frac{1}{2}", 7: "7", True: "True", " B ": "B"}
    assert [gold(value) for value in found] == list(found.values())
    assert gold(["7"]) == "7"
    for value in (None, "", " ", float("nan"), ["1", "2"], {}, b"1", "####", "\ud800"):
        with pytest.raises(RowError):
            gold(value)
    gold("a" + " " * 100_000 + "b" + "####" * 1000 + "1")  # hostile text costs one pass


def test_the_same_question_is_recognised():
    texts = [built("What  is it?")["prompt"], built("what is it? " + PROMPT_SUFFIX)["prompt"]]
    assert len({question_text(prompt, PROMPT_SUFFIX) for prompt in texts}) == 1


# ---- the dataset ----------------------------------------------------------------------------------------------------


def test_images_of_every_kind_are_opened_when_used(folder):
    image = Image.new("RGB", (56, 28), "white")
    given = [
        "a.png",
        png(),
        base64.b64encode(png()).decode(),
        image,
        {"bytes": png(), "path": None},
        ["a.png", png()],
        [],
    ]
    data = read_dataset(
        [{"prompt": "a", "solution": "1", "images": g} for g in given], DataSettings(image_root=str(folder))
    )
    assert [len(row["images"]) for row in data] == [1, 1, 1, 1, 1, 2, 0]
    assert all(i.mode == "RGB" and i.size == (56, 28) for row in data for i in row["images"])
    (folder / "a.png").unlink()
    from data.images import _cache

    _cache.clear()
    assert data[1]["images"] and data.with_format(None)["solution"][0] == "1"
    with pytest.raises(BadInput, match=r"^rows: row 0: field image: no such file .*a\.png"):
        data[0]


def test_a_dataset_survives_a_checkpoint(folder):
    """SparkTrainer saves waiting rows by the dataset's features, and reads them back."""
    from datasets import Dataset

    data = read_dataset(
        [
            {"prompt": "a", "solution": "1", "images": ["a.png"]},
            {
                "prompt": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "b"}, {"type": "image"}, {"type": "text", "text": "c"}],
                    }
                ],
                "images": ["b.png"],
                "solution": "2",
            },
            {"prompt": "d", "solution": "3"},
        ],
        DataSettings(image_root=str(folder), max_pixels=28 * 28),
        image_factor=28,
    )
    rows = [{k: row[k] for k in data.column_names} for row in data]
    assert rows[0]["images"][0].size == (28, 28)
    Dataset.from_list(rows, features=data.features).to_parquet(folder / "rows.parquet")
    again = list(Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder)))
    assert [{**row, "images": None} for row in again] == [{**row, "images": None} for row in rows]
    assert [[i.tobytes() for i in row["images"]] for row in again] == [
        [i.tobytes() for i in row["images"]] for row in rows
    ]


def test_folders_and_datasets(folder):
    (folder / "metadata.csv").write_text("file_name,prompt,solution\na.png,Area?,12\nb.png,Side?,3\n")
    data = read_dataset(str(folder))
    assert data["solution"][:] == ["12", "3"] and data[1]["images"][0].size == (56, 28)
    from datasets import load_dataset

    loaded = load_dataset(str(folder), split="train")
    assert len(read_dataset(loaded)[0]["images"]) == 1
    loaded.save_to_disk(folder / "saved")
    assert read_dataset(str(folder / "saved"))["solution"][:] == ["12", "3"]


def test_a_path_and_a_stream(folder):
    from datasets import IterableDataset

    row = {"prompt": "a", "solution": "1", "image": "a.png"}
    assert len(read_dataset(Path(write(folder / "x.json", [row])))) == 1
    stream = IterableDataset.from_generator(lambda: iter([row, row]))
    assert len(read_dataset(stream, DataSettings(image_root=str(folder)))[1]["images"]) == 1


def test_a_folder_whose_file_is_broken_says_why(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "solution": "1"}\n{"prompt"')
    with pytest.raises(BadInput, match="row 1: field row: expected a JSON object"):
        read_dataset(str(tmp_path))


def test_bad_rows_are_left_out_and_counted_or_refused(folder):
    path = write(
        folder / "x.json",
        [
            {"prompt": "a", "solution": "1"},
            {"prompt": "", "solution": "1"},
            {"prompt": "c", "solution": "1", "image": "no.png"},
            {"prompt": "long", "solution": "1"},
        ],
    )
    bad = []
    data = read_dataset(path, bad_rows=bad, reject=lambda row: "too long" if "long" in str(row["prompt"]) else None)
    assert len(data) == 1 and data.column_names == ["prompt", "solution", "task", "source"]
    assert [(row.row, row.field) for row in bad] == [(1, "prompt"), (2, "image"), (3, "prompt")]
    assert (
        bad_rows_summary(bad, 1)
        == "3 rows left out (2 by prompt, 1 by image): row 1: field prompt: expected a question, got nothing; ..."
    )
    with pytest.raises(BadInput, match="row 1: field prompt"):
        read_dataset(path)


# ---- rows checked when they are used -------------------------------------------------------------------------------


MANY = [
    {"prompt": "0?", "solution": 0.1234567890123456, "images": ["a.png", "b.png"], "task": "t"},
    {"prompt": "1?", "solution": "\U0001f41f", "images": [], "max_pixels": 4000},
    {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "2?"}],
        "solution": "2",
        "images": "a.png",
    },
    {"prompt": "3?", "solution": 12345678901234567890123, "images": None},
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "rows"])
def test_a_row_kept_for_later_is_the_same_row(kind, folder, monkeypatch):
    path = str(folder / f"x.{kind}")
    if kind in ("json", "jsonl"):
        write(folder / f"x.{kind}", MANY, lines=kind == "jsonl")
    elif kind == "csv":
        (folder / "x.csv").write_text('prompt,solution,image\n"0,\n?",1,a.png\n1?,007,\n2?,x,b.png\n')
    elif kind == "parquet":
        parquet(path, [{"prompt": f"{i}?", "solution": str(i), "images": [["a.png"], []][i % 2]} for i in range(4)])
    else:
        path = MANY
    monkeypatch.setattr("data.read._PEEK", 1)
    now, later = (read_dataset(path, DataSettings(image_root=str(folder)), bad_rows=[], checked=n) for n in (9, 1))
    assert len(now) == len(later) >= 3
    assert [{**row, "images": [i.tobytes() for i in row["images"]]} for row in now] == [
        {**row, "images": [i.tobytes() for i in row["images"]]} for row in later
    ]
    assert later.remove_columns("task")["solution"][1:] == now["solution"][1:]


BAD = {
    "no JSON": '{"prompt": ',
    "no object": "[1]",
    "no question": '{"prompt": "", "solution": "1"}',
    "no file": '{"prompt": "a", "solution": "1", "image": "no.png"}',
    "broken later": '{"prompt": "a", "solution": "1", "image": "cut.png"}',
    "too long": '{"prompt": "long", "solution": "1"}',
}


def test_another_row_stands_in_for_one_that_cannot_be_used(folder, monkeypatch, capsys):
    """On every process the same one; it is reported once. --strict checks everything and refuses."""
    monkeypatch.setattr("data.read._PEEK", 5)
    good = [json.dumps({"prompt": f"{i}?", "solution": str(i), "image": "a.png"}) for i in range(20)]
    (folder / "cut.png").write_bytes(png()[:50])
    (folder / "x.jsonl").write_text("\n".join([*good, *BAD.values()]))
    path, reject = str(folder / "x.jsonl"), lambda row: "too long" if "long" in str(row["prompt"]) else None
    bad = []
    first, second = (read_dataset(path, reject=reject, bad_rows=bad, checked=10) for _ in range(2))
    assert (len(first), bad) == (26, [])
    assert [row["solution"] for row in first.select(range(20))] == [str(i) for i in range(20)]
    assert not capsys.readouterr().err
    used = [row["solution"] for row in first.select(range(20, 26))] * 2
    assert used == [first[i]["solution"] for i in range(20, 26)] + [second[i]["solution"] for i in range(20, 26)]
    assert set(used) <= {str(i) for i in range(20)} and len(set(used)) > 1
    reported = sorted(capsys.readouterr().err.splitlines())
    assert len(reported) == 12  # by each of the two once
    for i, field in enumerate(["row", "row", "prompt", "image", "image", "prompt"]):
        for line in reported[2 * i : 2 * i + 2]:
            assert re.match(rf"{path}: row {20 + i}: field {field}: .*stands in for it \(\d so far\)", line)
    with pytest.raises(BadInput, match="row 20: field row"):
        read_dataset(path, reject=reject)


def test_an_image_found_broken_when_it_is_used_names_its_row(folder, monkeypatch, capsys):
    """Behind the images whose headers are read: its row is left out, or with --strict ends the run in one line."""
    monkeypatch.setattr("data.read.HEADERS", 1)
    (folder / "broken.png").write_bytes(b"no image")
    data = [{"prompt": f"{i}?", "solution": str(i), "image": name} for i, name in enumerate(["a.png", "broken.png"])]
    path = write(folder / "x.json", data)
    line = r"x\.json: row 1: field image: .*broken\.png can't be read as an image"
    assert read_dataset(path, bad_rows=[])[1]["solution"] == "0"
    assert re.search(line, capsys.readouterr().err)
    with pytest.raises(BadInput, match=line):
        read_dataset(path)[1]


def test_when_no_row_can_be_used_there_is_an_end(folder):
    data = read_dataset(
        [{"prompt": "a", "solution": "1", "image": "a.png"}], DataSettings(image_root=str(folder)), bad_rows=[]
    )
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="100 rows drawn instead"):
        data[0]


def test_the_line_that_training_prints(monkeypatch):
    assert reading_summary("x.json", 3, None) == reading_summary("x.json", 3, []) == "3 rows used of x.json"
    monkeypatch.setattr("data.read.CHECKED", 3)
    bad = [BadRow(1, 2, "prompt", "expected a question, got nothing")]
    first, second = reading_summary("x.json", 3, bad).splitlines()
    assert first.startswith("3 rows used of x.json; the first 3 are checked, the others at the latest when")
    assert second.startswith("1 rows left out (1 by prompt): row 1: field prompt")


def test_help_needs_nothing_heavy():
    """Each command says what it does without importing torch, transformers or datasets."""
    code = (
        "import sys; sys.argv=['x','--help']\ntry:\n from {} import main; main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'vllm', 'pyarrow') if m in sys.modules])"
    )
    for module in ("data.check", "data.filter"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        )
        assert done.stdout.endswith("[]\n"), done.stdout[-200:]


# ---- layouts of other people ----------------------------------------------------------------------------------------


def answered(record, use="answer"):
    ((_, _, row),) = Reader(Source([record]), use)
    return row


def test_images_go_where_the_text_numbers_them(folder):
    """MMMU: marks in any order, one image named twice, one not at all."""
    row = answered(
        {
            "question": "Is <image 3> as <image 1>? See <image 3>.",
            "options": "['<image 1>', 'no']",
            "image_1": str(folder / "a.png"),
            "image_2": str(folder / "b.png"),
            "image_3": Image.new("RGB", (90, 60)),
            "answer": "B",
        }
    )
    parts = row["prompt"][0]["content"]
    kinds = [part["type"] for part in parts]
    words = "".join(part.get("text", " * ") for part in parts)
    assert kinds == ["image", "text", "image", "text", "image", "text"]
    assert strip_suffix(words) == " * Is  *  as  * ? See image 3.\nA. image 1\nB. no"
    assert [ref["path"] and Path(ref["path"]).name for ref in row["images"]] == ["b.png", None, "a.png"]
    lost = answered({"question": "<image 3>?", "image_1": str(folder / "a.png"), "answer": "1"})
    assert lost.reason == "expected an image for each of <image 3> in the prompt, got 1"


def test_several_golds_in_text_and_an_open_question_whose_answer_is_a_letter():
    row = {"question": "Rate?", "options": "[]", "answer": "['24/7', '3.429']"}
    assert answered(row)["solution"] == ["24/7", "3.429"]
    assert answered(row, "train").field == "answer"
    assert answered({**row, "answer": "['24/7']"}, "train")["solution"] == "24/7"
    assert answered({**row, "answer": "[1, 2]"})["solution"] == "[1, 2]"
    assert answered({**row, "answer": "C"})["solution"] == "C"


@pytest.mark.parametrize(
    ("name", "text", "asked"),
    [
        ("Body", "Each costs 76. ", "Each costs 76.\n\nHow much?"),  # SVAMP
        ("passage", "Each costs 76.", "Each costs 76.\n\nHow much?"),
        ("context", "How much?", "How much?"),
        ("story", "", "How much?"),
        ("theory", "Bob is big.", "Bob is big.\n\nHow much?"),
        ("article", None, "How much?"),
        ("dialogue", ["M: It costs 76.", "W: Oh."], "M: It costs 76.\nW: Oh.\n\nHow much?"),  # DREAM
        ("dialogue", "['M: It costs 76.', 'W: Oh.']", "M: It costs 76.\nW: Oh.\n\nHow much?"),
        ("document", "doc_12.pdf", "How much?"),
        ("context", "76", "76\n\nHow much?"),
        ("passage", "花了76。", "花了76。\n\nHow much?"),
        ("passage", "{1, 2}", "{1, 2}\n\nHow much?"),
    ],
)
def test_a_passage_stands_before_the_question_about_it(name, text, asked):
    (row,) = read_rows([{name: text, "Question": "How much?", "Answer": "51.0"}])
    assert (text_of(row), row["solution"]) == (asked, "51.0")


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"context": {"title": ["a"]}, "question": "?", "answer": "1"}, "context"),  # HotpotQA
        ({"context": "It is 3.", "story": "No, 4.", "question": "?", "answer": "1"}, "story"),
        ({"document": {"text": "a"}, "question": "?", "answer": "1"}, "document"),
        ({"question": "?", "answers": ["a", "b", "c", "d"], "label": 0}, "answers"),  # ReClor
        ({"question": "?", "endings": "['a', 'b']", "label": 0}, "endings"),
        ({"question": "?", "image": "a.png", "image_2": "b.png", "answer": "1"}, "image_2"),
    ],
)
def test_what_a_question_would_miss_is_refused(columns, field):
    (bad,) = read_rows([columns])
    assert isinstance(bad, BadRow) and bad.field == field


def test_messages_that_pandas_wrote_into_a_csv_file(tmp_path):
    (tmp_path / "x.csv").write_text(
        "prompt,solution\n"
        "\"[{'role': 'user', 'content': '6*7?'}]\",42\n"
        "\"[{'from': 'human', 'value': '6*7?'}]\",42\n"
        "\"[{'role': 'user', 'content': '6*7\",42\n"
        '"[{a}] is a set?",no\n'
        '"[{""id"": 1, ""role"": ""user"", ""content"": ""6*7?""}]",42\n'
    )
    good, other, cut, text, last = read(tmp_path / "x.csv")
    assert (text_of(good), text_of(text), text_of(last)) == ("6*7?", "[{a}] is a set?", "6*7?")
    assert other.reason.startswith("expected text or messages with role and content, got [{'from'")
    assert cut.reason.startswith("expected text or messages with role and content, got [{'role'")


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("<think>two</think><answer> 3 </answer>", "3"),
        ("<answer> $\\boxed{3}$ </answer>", "3"),
        ("<answer>2</answer> is too small. <answer>3</answer>", "3"),
        ("<think>1+2</think>\n\n3", "3"),
        ("<REASONING> 1+2. </REASONING>\n<CONCLUSION> 3 </CONCLUSION>", "3"),
        ("<think>1+2</think>\n\n**Final Answer**: 3", "3"),
        ("2+1=3\n#### 3\n", "3"),
        ("2+1=3\n#### 3\nThe answer is: 3", "3"),  # MetaMathQA
        ("2+1=3\n#### 3\nThe answer is: 4", None),
        ("Two plus one\n\\[2+1=3\\]\nThe answer is: $3$", "$3$"),
        ("#### 3\n\nNote: we add.", None),
        ('{"inputs": ["3"], "outputs": ["6"]}', None),
        ("{1, 2}", "{1, 2}"),
        ("#### Step 1\nadd\n#### Conclusion\nIt is 3.", None),
        ("#### " + "word " * 40, None),
        ("(0.125,3)", "(0.125,3)"),
        ("0.125,2", "0.125,2"),
        ("(1.414,2)", "(1.414,2)"),
        ("[0.125,3]", "[0.125,3]"),
        ("1.234,5", None),
        ("-1.234,5", None),
        ("about 1.250,00", None),
    ],
)
def test_the_answer_in_a_gold(written, answer):
    if answer is None:
        with pytest.raises(RowError):
            gold(written)
    else:
        assert gold(written) == answer


def test_r1_style_solutions():
    (row,) = read_rows([{"problem": "1+2?", "solution": "<answer> 3 </answer>"}])
    assert row["solution"] == "3"


def test_a_list_of_golds_can_be_checked():
    report = check.check(Source([{"dataset": "d", "problem": "a?", "answer": ["5", "x+1"]}]), workers=1)
    assert (report["usable"], report["answers"]["integer"], report["answers"]["expression"]) == (1, 1, 1)


def test_records_of_a_data_frame(tmp_path):
    """to_dict gives numpy's arrays and numbers."""
    import pandas as pd

    rows = [{"problem": "Prime?", "options": ["4", "7"], "answer": 1, "images": []}] * 2
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    found = read_rows(pd.read_parquet(tmp_path / "x.parquet").to_dict("records"), answer_kind="from_0")
    assert [(text_of(row), row["solution"], row["images"]) for row in found] == [
        ("Prime?\nA. 4\nB. 7", "(B) 7", [])
    ] * 2


@pytest.mark.parametrize("name", ["digits", "arithmetic"])
def test_embedded_data_have_your_suffix_and_no_other_split(name):
    row = read_dataset(name, suffix="\nSay it.")[0]
    assert row["prompt"][-1]["content"].count("Say it.") == 1
    assert PROMPT_SUFFIX not in row["prompt"][-1]["content"]
    with pytest.raises(BadInput, match=f"{name}: no split 'validation'; expected train or test"):
        read_dataset(name, DataSettings(dataset_split="validation"))


def test_a_split_that_is_not_there_is_never_another_one(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(test=Dataset.from_list([{"prompt": "1+1?", "solution": "2"}])).save_to_disk(tmp_path / "one")
    assert len(read_dataset(str(tmp_path / "one"))) == 1  # the commands' defaults find the only one
    with pytest.raises(BadInput, match="no split 'validation'; name one with --dataset_split: test"):
        read_dataset(str(tmp_path / "one"), DataSettings(dataset_split="validation"))


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "(b)", "B.", "Option B", "The answer is B", "选项B"])
@pytest.mark.parametrize("listed", ["\nA. 4\nB. 7\nC. 9", "\n(a) 4\n(b) 7\n(c) 9", " (a) 4 (b) 7 (c) 9"])
def test_a_letter_in_any_words_is_the_option_that_the_question_lists(answer, listed, tmp_path):
    path = write(tmp_path / "q.json", [{"question": f"Which is prime?{listed}", "answer": answer}])
    (row,) = read_dataset(path)
    assert row["solution"] == "(B) 7"
    right = ["B", "b", "(B) 7", "(b) 7", "7"]
    wrong = ["A", "a", "(c) 7", "9"]
    rewards = answer_reward(None, [f"\\boxed{{{said}}}" for said in right + wrong], ["(B) 7"] * 9)
    assert rewards == [1.0] * len(right) + [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("answer", "truth", "used"),
    [("5", "5", "5"), ("\\frac12", "0.5", "\\frac12"), ("B", "7 cm", "B"), ("Adding. #### 5", 5.0, "5"),
     ("4", None, "4"), ("4", "5", None), ("Two and three are five.", "5", None)],
)  # fmt: skip
def test_an_answer_and_a_ground_truth_that_differ_are_refused(answer, truth, used, tmp_path):
    """One of them may be a model's answer; naming a column says which is meant."""
    path = write(tmp_path / "q.json", [{"question": "How much?", "answer": answer, "ground_truth": truth}])
    if used is not None:
        assert read_dataset(path)["solution"] == [used]
        return
    with pytest.raises(BadInput, match=r"row 0: field ground_truth: expected the answer .* --solution_column"):
        read_dataset(path)
    for column, found in (("answer", answer), ("ground_truth", truth)):
        assert read_dataset(path, DataSettings(solution_column=column))["solution"] == [found]


def test_numbered_answers_are_options_beside_a_label_alone():
    bbq = {"question": "Who?", "ans0": "A boy", "ans1": "A girl", "ans2": "Unknown"}
    first, second = read_rows([{**bbq, "label": 2}, {**bbq, "label": 0}])
    assert (first["solution"], second["solution"]) == ("(C) Unknown", "(A) A boy")
    assert "A. A boy\nB. A girl\nC. Unknown" in text_of(first)
    (row,) = read_rows([{"question": "1+0?", "answer": "1", "answer1": "1", "answer2": "2", "label": 1}])
    assert (text_of(row), row["solution"]) == ("1+0?", "1")  # some model's


def test_the_final_answer_goes_before_the_solution_that_leads_to_it():
    (row,) = read_rows([{"question": "Compute T.", "solution": ["$T=2+3=5$."], "final_answer": ["5"]}])
    assert row["solution"] == "5"


def test_an_answer_that_is_labelled_wrong_is_no_gold():
    rows = [{"paragraph": "P", "question": "Who?", "answer": name, "label": i} for i, name in enumerate("XY")]
    wrong, right = read_rows(rows)
    assert (wrong.field, right["solution"]) == ("label", "Y")


def test_options_that_a_question_only_seems_to_list_are_shown():
    (row,) = read_rows([{"question": "A: 12 balls, B: 30 balls. Which?", "options": ["1", "3"], "answer": "A"}])
    assert text_of(row).endswith("Which?\nA. 1\nB. 3")


def test_a_hint_that_says_nan_says_nothing():
    (row,) = read_rows([{"index": 2, "question": "Which?", "hint": "nan", "A": "this", "B": "that", "answer": "A"}])
    assert text_of(row) == "Which?\nA. this\nB. that"


def test_a_small_letter_is_a_variable_where_no_such_option_is_listed(tmp_path):
    rows = [
        {"question": "Solve for one side: (a) is 3 and (b) is 4. Which letter is the hypotenuse?", "answer": "c"},
        {"question": "Simplify a*b/b.", "answer": "a"},
    ]
    assert [row["solution"] for row in read_dataset(write(tmp_path / "q.json", rows))] == ["c", "a"]
