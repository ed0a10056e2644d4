"""data.check and data.filter, as commands."""

import copy
import json
from dataclasses import replace

import pytest
from helpers import write
from PIL import Image

from data import check, filter
from data.arguments import DataSettings
from data.filter import SamplingSettings, kept_rows, measure, rates_file
from data.read import BadInput, read_dataset
from data.rows import Source
from models.make_digits import OUTPUT


def save(path, colour="white", size=(56, 28)):
    Image.new("RGB", size, colour).save(path)
    return path.name


# ---- check ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """train.json with every fault, test.json which shares one question with it, by the content of its image."""
    save(tmp_path / "a.png", "red"), save(tmp_path / "b.png", "blue"), save(tmp_path / "copy.png", "red")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    train = [
        {"prompt": "Area?", "solution": "12", "image": "a.png"},
        {"prompt": "Area?", "solution": "13", "image": "b.png"},
        {"prompt": " area? ", "solution": "14", "image": "a.png"},
        {"prompt": "Area?", "solution": "B", "image": "cut.png"},
        {"prompt": "Area?", "solution": "B", "image": "none.png"},
        {"prompt": "x?", "solution": ""},
        {"prompt": "y?", "solution": "\\frac{1}{2}"},
        {"prompt": "z?", "solution": "10^{10^{10}}"},
        {"prompt": "w?", "solution": "isosceles"},
        {"prompt": "v?", "solution": "(C)"},
    ]
    test = [{"dataset": "t", "problem": "Area?", "answer": "12", "image_path": "copy.png"}]
    return write(tmp_path / "train.json", train), write(tmp_path / "test.json", test)


def test_check_names_every_bad_row(files, capsys):
    train, test = files
    assert check.main([train, "--against", test, "--json", "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["rows"], report["usable"]) == (10, 7)
    assert report["columns"] == ["prompt", "solution", "image"]
    assert [(bad["row"], bad["line"], bad["field"]) for bad in report["bad"]] == [
        (3, 1, "image"),
        (4, 1, "image"),
        (5, 1, "solution"),
    ]
    kinds = ("integer", "letter", "expression", "text", "unparseable")
    assert [report["answers"][kind] for kind in kinds] == [3, 1, 1, 1, 1]
    assert report["repeated"] == {"rows": 1, "with_another_answer": 1, "row_and_first": [[2, 0]]}
    assert report["overlap"]["row_and_its_row"] == [[0, 0]]
    assert report["images"] == {"rows": 3, "images": 3}
    assert err.splitlines()[-1].startswith(f"data.check: {train}: 3 of 10 rows are unusable; row 3: field image: ")


def test_check_prints_ten_bad_rows_and_a_count(tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "solution": "1", "image": f"{i}.png"} for i in range(40)]
    path = write(tmp_path / "x.json", [*rows, {"prompt": "", "solution": "1"}])
    assert check.main([path]) == 2
    out = capsys.readouterr().out.splitlines()
    assert sum("field image: no such file" in line for line in out) == 10
    assert out[-1] == "and 31 more; by field: image 40, prompt 1; --json has all of them"


def test_check_of_good_and_of_unreadable_files(files, capsys):
    assert check.main([files[1]]) == 0
    assert "1 rows, 1 usable, 0 unusable" in capsys.readouterr().out
    assert check.main([files[1] + "x"]) == 2
    assert check.main([files[0], "--image_column", "photo"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no column 'photo'" in error and "prompt, solution" in error


@pytest.mark.parametrize(
    ("name", "content", "flags", "expected"),
    [
        ("x.csv", "prompt,solution\n", [], "x.csv: expected at least one row, found none"),
        ("x.jsonl", '{"prompt": "a", "solution": ""}', [], "row 0: field solution: expected a gold answer"),
        ("x.jsonl", '{"prompt": "a", "solution": "1"}', ["--max_pixels", "-1"], "max_pixels: expected max_pixels as a"),
        ("x.jsonl", '{"prompt": "a", "solution": "1"}', ["--image_root", "no"], "image_root: expected a folder"),
        ("x.jsonl", '{"prompt": "a", "solution": "1"}', ["--model", "{folder}"], "model: "),
    ],
)
def test_check_refuses_in_one_line(name, content, flags, expected, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert check.main([str(tmp_path / name), *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.check: ") and expected in line


def test_check_counts_what_it_could_not_compare(files, tmp_path, capsys):
    """Columns of the file may not be those of the other one, and a broken row of that one is no row without overlap."""
    other = [{"dataset": "t", "problem": "Area?", "answer": gold, "image_path": "copy.png"} for gold in ("12", None)]
    mine = write(tmp_path / "mine.json", [{"q": "Area?", "gold": "12", "photo": "a.png"}])
    columns = ["--prompt_column", "q", "--solution_column", "gold", "--image_column", "photo"]
    assert check.main([mine, *columns, "--against", write(tmp_path / "other.json", other), "--workers", "1"]) == 0
    assert "1 rows of" in (out := capsys.readouterr().out) and "(row 0 = 0); 1 of its rows are unusable" in out


def test_tokens_are_what_the_processor_makes_of_them(processor, tmp_path):
    """Counted from sizes alone; the same as of the real inputs."""
    from trl.data_utils import prepare_multimodal_messages

    from data.lengths import image_factor, image_tokens, prompt_tokens, too_long
    from data.read import Reader

    save(tmp_path / "a.png", size=(300, 200))
    data = [{"prompt": "How many?", "solution": "1", "images": ["a.png", {"path": "a.png", "max_pixels": 9000}]},
            {"prompt": "Why?", "solution": "1"}]  # fmt: skip
    path = write(tmp_path / "x.json", data)
    counted = [row for _, _, row in Reader(Source(path))]
    used = read_dataset(path, image_factor=image_factor(processor))
    for n, row in zip(prompt_tokens(counted, processor), used, strict=True):
        prompt = prepare_multimodal_messages(row["prompt"], images=row["images"])
        inputs = processor.apply_chat_template([prompt], tokenize=True, return_dict=True, add_generation_prompt=True)
        assert n == len(inputs["input_ids"][0])
    assert image_tokens(counted[1], processor) == 0
    longest = prompt_tokens(counted[:1], processor)[0]
    assert too_long(longest, processor)(counted[0]) is None
    assert (
        too_long(longest - 1, processor)(counted[0])
        == f"{longest} tokens, expected at most {longest - 1} (max_prompt_length)"
    )


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no system prompt') }}"])
def test_a_template_that_cannot_write_a_prompt_is_one_line(template, processor, tmp_path, capsys):
    other = copy.deepcopy(processor)
    other.chat_template = other.tokenizer.chat_template = template
    other.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    data = write(tmp_path / "x.json", [{"prompt": "a", "solution": "1"}])
    assert check.main([data, "--model", str(tmp_path / "model")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.check: chat template of ")


def test_a_system_prompt_that_the_template_refuses_is_found_before_training(processor):
    from data.lengths import too_long

    other = copy.deepcopy(processor.tokenizer)
    other.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    reason = too_long(1000, other)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert reason({"prompt": turns[1:], "images": []}) is None
    with pytest.raises(BadInput, match=r"chat template of .*: no system role"):
        reason({"prompt": turns, "images": []})


def test_what_the_template_is_told_counts(processor):
    from data.lengths import prompt_tokens, too_long

    other = copy.deepcopy(processor.tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'think not ' * (thinking is false) }}"
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "images": []}
    (n,), (more,) = prompt_tokens([row], other), prompt_tokens([row], other, thinking=False)
    assert more > n and too_long(n, other)(row) is None
    assert too_long(n, other, thinking=False)(row).startswith(f"{more} tokens")


def test_a_short_text_of_many_tokens_is_not_taken_for_short(processor):
    """Byte-level tokens: a Chinese character or an emoji may be three or four of them, and many images frame a lot."""
    from data.lengths import prompt_tokens, too_long

    small = {"bytes": None, "path": "x", "min_pixels": None, "max_pixels": None, "width": 28, "height": 28}
    for text, images in (("为什么" * 60, []), ("\U0001f9ee\U0001f41f" * 90, []), ("Same?", [small] * 40)):
        row = {"prompt": [{"role": "user", "content": text}], "images": images}
        (n,) = prompt_tokens([row], processor)
        assert n > len(text)
        for limit in (len(text), len(text) + 64, n - 1):
            assert too_long(limit, processor)(row).startswith(f"{n} tokens")
        assert too_long(n, processor)(row) is None


# ---- filter ---------------------------------------------------------------------------------------------------------

SETTINGS = SamplingSettings(str(OUTPUT), "x", n=4, max_tokens=16)


class Fake:
    """Answers row i right i times of 4; counts what it is asked."""

    def __init__(self):
        self.asked = []

    def answers(self, rows):
        self.asked += [row["solution"] for row in rows]
        return [
            [f"\\boxed{{{row['solution'] if k < int(row['solution']) else 'no'}}}" for k in range(4)] for row in rows
        ]


def test_filter_goes_on_where_it_stopped(tmp_path):
    data = read_dataset([{"prompt": f"{i}?", "solution": i} for i in range(5)])
    path = tmp_path / "rates.jsonl"

    def known(settings=SETTINGS, dataset=data):
        return rates_file(path, settings, dataset, DataSettings())

    known(replace(SETTINGS, model="a typo"))  # without a rate nothing is written, and nothing is in the way

    class Stops(Fake):
        def answers(self, rows):
            if len(self.asked) >= 4:
                raise KeyboardInterrupt
            return super().answers(rows)

    with pytest.raises(KeyboardInterrupt):
        measure(data, known(), Stops(), chunk=2)
    with open(path, "a") as file:
        file.write('{"row": 4, "rig')  # cut off while being written
    rates, fake = known(), Fake()
    assert sorted(rates.done) == [0, 1, 2, 3]
    measure(data, rates, fake, chunk=2)
    assert fake.asked == ["4"]
    assert kept_rows(known().done, 0.25, 0.75) == ([1, 2, 3], [0, 4], [])
    changed = read_dataset([{"prompt": f"{i}?", "solution": i + (i == 4)} for i in range(5)])
    with pytest.raises(BadInput, match="another n;"):
        known(replace(SETTINGS, n=8))
    with pytest.raises(BadInput, match="another dataset contents"):
        known(dataset=changed)
    with pytest.raises(BadInput, match="another max_pixels"):
        rates_file(path, SETTINGS, data, DataSettings(max_pixels=50_176))
    assert kept_rows({0: {"right": 0, "scored": 0}}, 0, 1) == ([], [], [0])


def test_an_answer_that_cant_be_scored_is_no_wrong_one_in_a_pass_rate(tmp_path, monkeypatch):
    import verify

    monkeypatch.setattr(verify, "answer_reward", lambda *columns: [1.0, None, 0.0, None])
    data = read_dataset([{"prompt": "1?", "solution": "1"}])
    rates = rates_file(tmp_path / "rates.jsonl", SETTINGS, data, DataSettings())
    measure(data, rates, Fake())
    assert rates.done == {0: {"right": 1, "scored": 2}}
    assert kept_rows(rates.done, 0.5, 0.5) == ([0], [], [])


def test_filter_gives_no_row_the_rate_of_another(tmp_path):
    """One whose image breaks when it is used, so that another one stands in for it."""
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:50])
    rows = [{"prompt": f"{i}?", "solution": "4", "image": f"{name}.png"} for i, name in enumerate("aba")]
    data = read_dataset(rows, DataSettings(image_root=str(tmp_path)), bad_rows=[])
    rates = rates_file(tmp_path / "rates.jsonl", SETTINGS, data, DataSettings())
    measure(data, rates, Fake())
    assert kept_rows(rates.done, 0, 1) == ([0, 2], [], [1])


def test_filter_refuses_before_the_engine_starts(tmp_path, monkeypatch, capsys):
    """A folder that is no model in one line; a prompt that the engine has no room for is left out and counted."""
    path = write(tmp_path / "x.json", [{"prompt": f"{word}?", "solution": "1"} for word in ("a", "b " * 99)])
    output = tmp_path / "kept.parquet"
    command = ["--dataset", path, "--output", str(output), "--max_model_len", "100"]
    assert filter.main([*command, "--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.filter: model: ")
    with pytest.raises(SystemExit):
        filter.main([*command, "--model", str(OUTPUT), "--keep_solution"])
    assert "--keep_solution: expected none" in capsys.readouterr().err
    monkeypatch.setattr(filter, "Sampler", lambda *args, **kwargs: Fake())
    assert filter.main([*command, "--model", str(OUTPUT), "--n", "4"]) == 0
    assert "1 rows left out (1 by prompt): row 1: field prompt" in (out := capsys.readouterr().out)
    assert "expected at most 99 (max_model_len)" in out
    assert read_dataset(str(output))["solution"][:] == ["1"]
    own = ["--output", str(tmp_path / "own.parquet"), "--prompt_suffix", "\nIn <answer></answer>."]
    assert filter.main([*command, *own, "--model", str(OUTPUT), "--n", "4"]) == 0
    (row,) = read_dataset(str(tmp_path / "own.parquet"), suffix="\nIn <answer></answer>.")
    assert row["prompt"][-1]["content"] == "a?\nIn <answer></answer>."  # once, and no other


def test_filter_with_the_real_engine(tmp_path, monkeypatch, capfd):
    """The shipped model on its own digits: pass rates between 0 and 1, and a dataset that can be read again."""
    from data.digits import digit_rows

    for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0")):
        monkeypatch.setenv(name, value)
    rows = []
    for i, row in enumerate(digit_rows("train", 12, seed=3)):
        names = [save_as(image, tmp_path / f"{i}.png") for image in row["images"]]
        rows.append({"prompt": row["prompt"][0]["content"], "solution": row["solution"], "images": names})
    path = write(tmp_path / "train.json", rows)
    output = tmp_path / "kept.parquet"
    command = ["--model", str(OUTPUT), "--dataset", path, "--output", str(output), "--n", "4", "--max_tokens", "48"]
    command += ["--max_model_len", "512", "--enforce_eager"]
    assert filter.main([*command, "--low", "0", "--high", "1"]) == 0
    assert "12 rows kept" in capfd.readouterr().out
    known = [json.loads(line) for line in output.with_name("kept.parquet.rates.jsonl").read_text().splitlines()[1:]]
    known = [entry["result"] | {"row": entry["index"]} for entry in known]
    assert 0 < sum(rate["right"] for rate in known) < 48
    monkeypatch.setattr(filter, "Sampler", None)  # other bounds need no engine
    assert filter.main([*command, "--low", "0.5"]) == 0
    kept = read_dataset(str(output))
    expected = [rate["row"] for rate in known if 0.5 <= rate["right"] / 4 < 1]
    assert kept["solution"][:] == [rows[i]["solution"] for i in expected]
    assert [len(row["images"]) for row in kept] == [len(rows[i]["images"]) for i in expected]


def save_as(image, path) -> str:
    image.save(path)
    return path.name
