"""app.py: what its tabs say, by scripted models, a real one and a server; then in Chromium, as a person uses it."""

import html
import json
import math
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pandas as pd
import pytest
from browser import CHROMIUM, browser
from PIL import Image

import app
import verify
from app import Local, Page, Remote, by_question, family, inert
from data.rows import BadInput
from engines import Output, Request, Sampling
from evaluation.solvers import verdict_probability
from models.make_digits import OUTPUT
from prompts import PROMPT_SUFFIX, pointwise_instruction

HOSTILE = (
    "</div><script>document.title='PWNED'</script><img src=x onerror=\"document.title='PWNED'\"><svg onload=alert(1)> "
    "[link](javascript:alert(1)) ![pixel](http://127.0.0.1:9/pixel) $\\href{javascript:alert(1)}{x}<b>$ ${alert(1)} "
    "**bold** `code` \u202e # no heading \\boxed{<i>Yes}"
)
PICTURE = Path(__file__).parent.parent / "docs" / "app.webp"


class Scripted:
    """A model that says these things, one after the other."""

    def __init__(self, *texts):
        self.texts = list(texts)
        self.requests: list[Request] = []

    def stream(self, request, sampling):
        self.requests.append(request)
        text = self.texts.pop(0)
        yield text[: len(text) // 2]
        logprobs = tuple((part, math.log(0.75 if part in ("Yes", "No") else 1)) for part in re.split("(Yes|No)", text))
        yield Output(text, 7, len(text), logprobs=logprobs if request.with_logprobs else None)

    def write(self, requests, sampling):
        self.requests += requests
        return [Output(self.texts.pop(0), 7, 3) for _ in requests]


def said(backend, question="1+1?", picture=None, gold="2", rounds=2, temperature=1.0, length=64):
    return list(Page(backend, PROMPT_SUFFIX).talk(question, picture, gold, rounds, temperature, length))


def test_rounds_come_as_they_are_written():
    states = said(Scripted("so \\boxed{3}", "\\boxed{No}", "no: \\boxed{2}", "\\boxed{Yes}"))
    assert states[0] == "### Answer …\n\nso &#92;bo"  # half of it
    headings = re.findall("^### (.*)", states[-1], re.M)
    assert headings == [
        "Answer (wrong)",
        "Verdict: ✗ not correct, probability 0.75",
        "Reflection (right)",
        "Verdict: ✓ correct, probability 0.75",
        "Final answer: 2",
    ]
    assert "<small>12 tokens, 0.0 s</small>" in states[-1]


def test_it_is_asked_as_in_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    backend, path = Scripted("\\boxed{2}", "\\boxed{Yes}"), str(tmp_path / "a.png")
    Image.new("RGB", (28, 28)).save(path)
    said(backend, picture={"path": path})
    answer, judge = backend.requests
    assert answer.images == judge.images and path in str(answer.images)
    assert verify.last_text(answer.messages) == "1+1?" + PROMPT_SUFFIX
    assert verify.last_text(judge.messages) == "1+1?\n\n" + pointwise_instruction("\\boxed{2}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"question": " "}, "expected a question"),
        ({"question": None}, "expected a question"),
        ({"question": "x" * 20_001}, "expected a question"),
        ({"temperature": 9}, "temperature&#58; expected 0 to 2&#44; got 9"),
        ({"length": 10**9}, "expected 16 to 4096"),
        ({"rounds": math.nan}, "expected 0 to 5"),
        ({"length": "many"}, "not supported"),
    ],
)
def test_what_cannot_be_asked_is_a_line(changes, line, capsys):
    (only,) = said(Scripted(), **changes)
    assert only.startswith("**Not answered:** ") and line.replace("_", "&#95;") in only.replace("_", "&#95;")
    assert capsys.readouterr().err.startswith("app.py: ")


def test_votes_and_knock_out():
    texts = ["\\boxed{1/2}", "\\boxed{3}", "\\boxed{0.5}", "none", "\\boxed{A}", "\\boxed{B}"]
    states = list(Page(Scripted(*texts), PROMPT_SUFFIX).vote("1-0.5?", None, "0.5", 4, 1.0, 64))
    assert states[0].startswith("4 answers") and states[1].startswith("1 pairs")
    end = states[-1]
    assert end.startswith("### Chosen: 1&#47;2 (right)\n### Votes\n- **1&#47;2**: 2 of 4 ●●\n")
    assert "- **3**: 1 of 4 ●" in end and "- **no box**: 1 of 4 ●" in end
    assert "- 1&#47;2 against 3: **1&#47;2** (both orders agree)" in end
    (line,) = Page(Scripted(), PROMPT_SUFFIX).vote("1-0.5?", None, "0.5", 4, 0, 64)
    assert "or all answers are the same" in line


def decoded(text):
    """As the browser has it; maths in « »."""
    return html.unescape(text).translate({0xE000: "«", 0xE001: "»", 0xE002: "«", 0xE003: "»"})


def test_text_is_inert_but_for_its_maths():
    assert inert("a_b *c* <b>\n$5") == "a&#95;b &#42;c&#42; &#60;b&#62;<br>&#36;5"
    for text, shown in {
        "costs $5 and $6": "costs $5 and $6",
        "$x<1$ and \\[y_1\\]": "«x<1» and «y_1»",
        "so \\boxed{\\frac{1}{2}}, \\boxed{Yes}": "so «\\boxed{\\frac{1}{2}}», «\\boxed{\\text{Yes}}»",
        "\ue002\\href{x}\ue003": "\ufffd\\href{x}\ufffd",
    }.items():
        assert decoded(inert(text)) == shown
    assert not set("<>*_`[$#!") & set(inert(HOSTILE).replace("&#", ""))
    assert "[U+202E]" in decoded(inert(HOSTILE))


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local():
    return Local(str(OUTPUT))


def test_what_is_streamed_ends_in_the_engines_own_output(local, monkeypatch):
    monkeypatch.setattr(app, "REFRESH", 0)
    request = Request([{"role": "user", "content": "3 plus 4?\n\n" + pointwise_instruction("\\boxed{7}")}])
    *texts, output = local.stream(request._replace(with_logprobs=True), Sampling(64, 0.0))
    assert output[:3] == local.write([request], Sampling(64, 0.0))[0][:3]
    assert len(texts) == output.completion_tokens
    assert all(output.text.startswith(text) for text in texts) and len(set(texts)) > 10
    assert 0 < verdict_probability(output, verify.parse_verdict(output.text)) <= 1


def test_two_users_at_once_get_what_each_would_get_alone(local):
    page = Page(local, PROMPT_SUFFIX)
    questions = [f"What is {i} plus {i + 1}?" for i in range(4)]
    alone = [drop_times([*page.talk(q, None, "", 2, 0, 64)][-1]) for q in questions]
    assert len(set(alone)) == 4
    together: dict[str, str] = {}

    def ask(question):
        together[question] = drop_times([*page.talk(question, None, "", 2, 0, 64)][-1])

    threads = [threading.Thread(target=ask, args=[question]) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[question] for question in questions] == alone


def drop_times(text):
    return re.sub(r"[\d.]+ s<", "s<", text)


def test_a_user_who_leaves_ends_the_writing(local):
    request = Request([{"role": "user", "content": "What is 3 plus 4?"}])
    writing = local.stream(request, Sampling(4096, 2.0))
    next(writing)
    writing.close()
    assert not local.lock.locked()
    assert local.write([request], Sampling(8, 0.0))[0].text  # and the next one is served


def test_an_image_that_is_none_is_a_line(local, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "x.png").write_text("<svg onload=alert(1)>")
    state = said(local, picture={"path": str(tmp_path / "x.png")})[-1]
    assert state.startswith("**Not answered:** ") and "as an image" in state


# ---- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """Answers with the lines in `server.lines`; what it was asked is in `server.bodies`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "m"}]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.bodies.append(body)
            refused = served.refused in body
            self.send_response(400 if refused else served.status)
            self.end_headers()
            if refused:
                answer = f'{{"error": "Unsupported parameter: {served.refused}"}}'
            elif "stream" in body:
                answer = "".join(f"data: {line}\n\n" for line in served.lines)
            else:
                answer = json.dumps({"choices": [{"message": {"content": "\\boxed{2}"}, "finish_reason": "stop"}]})
            self.wfile.write(answer.encode())

        def log_message(self, *args):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.bodies, served.status, served.lines, served.refused = [], 200, [], None
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def event(text, probability=1.0):
    logprobs = {"content": [{"token": text, "logprob": math.log(probability)}]}
    return json.dumps({"choices": [{"delta": {"content": text}, "logprobs": logprobs}]})


def test_a_server_streams_with_the_probability_of_its_verdict(server):
    backend = Remote(f"http://127.0.0.1:{server.server_port}", "m")
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 3}})
    server.lines = [event("\\boxed{"), event("Yes", 0.9), event("}"), usage, "[DONE]"]
    request = Request([{"role": "user", "content": "Is it?"}], with_logprobs=True)
    *_, output = backend.stream(request, Sampling())
    assert output[:4] == ("\\boxed{Yes}", 11, 3, None)
    assert verdict_probability(output, "Yes") == pytest.approx(0.9)
    assert server.bodies[0]["stream"] and server.bodies[0]["logprobs"]
    list(backend.stream(request._replace(with_logprobs=False), Sampling()))
    assert "logprobs" not in server.bodies[1]


def test_a_field_that_a_server_does_not_know_is_left_out(server):
    backend = Remote(f"http://127.0.0.1:{server.server_port}", "m")
    server.refused = "max_tokens"
    *_, output = backend.stream(Request([{"role": "user", "content": "1+1?"}]), Sampling())
    assert (output.text, output.error) == ("\\boxed{2}", None)
    assert [sorted({"max_tokens", "max_completion_tokens"} & body.keys()) for body in server.bodies] == [
        ["max_tokens"],
        ["max_tokens"],
        ["max_completion_tokens"],
    ]


def test_a_server_that_refuses_or_dies_is_a_line(server):
    backend = Remote(f"http://127.0.0.1:{server.server_port}", "m")
    server.status, server.lines = 500, ["<b>no"]
    assert "answered 500" in said(backend)[-1] and "<b>" not in said(backend)[-1]
    server.status, server.lines = 200, ['{"error": {"message": "too long"}}']
    assert "too long" in said(backend)[-1]
    server.shutdown()
    server.server_close()
    assert said(backend)[-1].startswith("**Not answered:** ")
    assert [*Page(backend, "").vote("1?", None, "", 2, 1.0, 64)][-1].startswith("**Not answered:** ")
    with pytest.raises(BadInput, match="no server answers there"):
        Remote(f"http://127.0.0.1:{server.server_port}", "m")


def delta(text=None, reason=None, **more):
    return json.dumps({"choices": [{"delta": {"content": text, **more}, "finish_reason": reason}]})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([delta("\\boxed{5}")], "broke off"),  # the connection was closed
        ([delta("5"), delta(reason="abort")], "broke off"),
        ([delta("5", error=None), '{"error": "out of memory", "choices": []}'], "out of memory"),
        ([delta("5"), delta(reason="content_filter"), "[DONE]"], "content filter"),
        ([delta(reasoning="so 5"), delta(reason="stop")], "whole answer into reasoning"),
        ([delta(tool_calls=[{"id": "1"}]), delta(reason="tool_calls")], "whole answer into tool"),
        (["null"], "Not answered"),
    ],
)
def test_what_a_server_breaks_off_is_no_answer(lines, expected, server):
    server.lines = lines
    shown = said(Remote(f"http://127.0.0.1:{server.server_port}", "m"))[-1]
    assert expected in shown and "Final answer" not in shown


def test_what_servers_leave_out_of_a_stream_is_no_failure(server):
    backend = Remote(f"http://127.0.0.1:{server.server_port}", "m")
    server.lines = ['{"choices": [{"delta": null}], "error": null}', '{"choices": [{}]}', delta("\\boxed"),
                    delta([{"type": "text", "text": "{2}"}]),
                    '{"choices": null, "usage": {"prompt_tokens": null}}', " [DONE] "]  # fmt: skip
    *_, output = backend.stream(Request([{"role": "user", "content": "1+1?"}]), Sampling())
    assert output == Output("\\boxed{2}")
    server.lines = [delta("so"), delta(reason="length")]
    *_, output = backend.stream(Request([{"role": "user", "content": "1+1?"}]), Sampling())
    assert output.cut_off
    assert "cut off at 64 tokens" in said(backend, rounds=0)[-1]


# ---- a training run --------------------------------------------------------------------------------------------------


def make_run(folder: Path, hostile: str = "") -> Path:
    """Two questions of the same words with two rollouts each, one of which was judged."""
    rows = [{
        "step": 3, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Sum?" +
            PROMPT_SUFFIX}]}], "completion": [{"role": "assistant", "content": f"\\boxed{{{i}}}{hostile}"}],
        "answer_reward": float(i % 2), "advantage": 0.0,
    } for i in range(4)]  # fmt: skip
    rows.append({**rows[0], "prompt": [{"role": "user", "content": [{"type": "text", "text": "Other?"}]}]})
    rows.append(rows[-1])
    recycled = {
        "step": 3, "task": "pointwise", "prompt": "Sum?\n\n" + pointwise_instruction("\\boxed{1}"), "advantage": 1.0,
        "completion": f"\\boxed{{Yes}}{hostile}", "label": "Yes", "reward": 1.0, "shown_correct": [True], "images": [],
        "question": 0,
    }  # fmt: skip
    (folder / "completions").mkdir()
    pd.DataFrame(rows).to_parquet(folder / "completions" / "completions_00003.parquet")
    pd.DataFrame([recycled]).to_parquet(folder / "completions" / "recycled_00003.parquet")
    return folder


def test_a_runs_rollouts_and_what_was_recycled_from_them(tmp_path):
    run = make_run(tmp_path)
    assert app.logged_steps(run) == [3]
    assert [len(group) for group in by_question(run, 3)] == [2, 2, 2]
    shown = family(run, 3, 0, PROMPT_SUFFIX)
    assert "#### 2 rollouts\n- ✗ «\\boxed{0}»\n- ✓ «\\boxed{1}»\n#### Recycled: Judge one answer" in decoded(shown)
    assert "Label: **Yes**" in shown and decoded(shown).endswith("- ✓ «\\boxed{\\text{Yes}}»")
    assert "Nothing was recycled" in family(run, 3, 2, PROMPT_SUFFIX)
    with pytest.raises(BadInput, match="expected a question from 0 to 2"):
        family(run, 3, 7, PROMPT_SUFFIX)
    path = run / "completions" / "recycled_00003.parquet"
    pd.read_parquet(path).assign(question=1).to_parquet(path)  # of the second of equal words
    assert "Nothing was recycled" in family(run, 3, 0, PROMPT_SUFFIX)
    assert "Label: **Yes**" in family(run, 3, 1, PROMPT_SUFFIX)


def test_a_table_that_is_cut_off_is_passed_over(tmp_path):
    import gradio as gr

    def first_seen() -> str:
        shown = []

        def written(label: str):
            shown.append(gr.Markdown(label=label))
            return shown[0]

        with gr.Blocks():
            app.browse(gr, run, PROMPT_SUFFIX, written)
        return shown[0].value

    run = make_run(tmp_path)
    (run / "completions" / "completions_00004.parquet").write_bytes(b"PAR1 cut off")
    assert first_seen().startswith("### Step 3:")
    (run / "completions" / "completions_00003.parquet").unlink()
    assert "completions_00004.parquet could not be read" in decoded(first_seen())


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--share", "--share and another --host need --auth"),
        ("--host 0.0.0.0", "--share and another --host need --auth"),
        ("--auth me", "--auth: expected USER:PASSWORD"),
        ("--run nowhere", "--run: nowhere has no completions"),
        ("m --server http://127.0.0.1:9", "http://127.0.0.1:9/v1: no server answers there"),
        ("nowhere/at/all", "nowhere/at/all"),
        ("cut_off", "model: cut_off/model.safetensors can't be read"),
    ],
)
def test_what_cannot_be_started_is_one_line(flags, line, tmp_path, monkeypatch, capsys):
    shutil.copytree(OUTPUT, tmp_path / "cut_off")
    weights = tmp_path / "cut_off/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["app.py", *flags.split()])
    try:
        status = app.main()
    except SystemExit as ended:
        status = ended.code
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert (status, line in error) == (2, True), error


# ---- in a browser ----------------------------------------------------------------------------------------------------


class Both(Local):
    """The model, but hostile where it is asked for that."""

    def stream(self, request, sampling):
        yield from [Output(HOSTILE)] if "HOSTILE" in str(request.messages) else super().stream(request, sampling)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    run = make_run(tmp_path_factory.mktemp("run"), HOSTILE)
    blocks = app.build(Page(Both(str(OUTPUT)), PROMPT_SUFFIX), "models/digits", run, folder)
    app.launch(blocks, folder)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium binary on PATH (apt-get install chromium)")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.look(1280, 800)
        opened.open(address)
        opened.wait("document.querySelector('textarea') && document.querySelectorAll('[role=tab]').length >= 3")
        yield opened


WRITTEN = "document.querySelector('.written').innerText"


def ask(page):
    page.click("button", "Ask")
    page.wait(f"!{WRITTEN}.includes('Final answer')")  # of the time before
    page.wait(f"{WRITTEN}.includes('Final answer')")
    return page.js(WRITTEN)


def test_the_page_listens_here_alone_and_is_called_by_its_client(address):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    assert address.startswith("http://127.0.0.1:")
    client = Client(address, verbose=False)
    states = client.submit("What is 3 plus 4?", None, "7", 2, 0, 64, api_name="/talk")
    assert "### Answer" in states.result()
    assert client.predict("What is 3 plus 4?", None, "7", 4, 1.0, 64, api_name="/vote").startswith("### Chosen")
    assert client.predict(3, 1, api_name="/rollouts").startswith("### Step 3: Sum")
    with pytest.raises(AppError, match="not in the list of choices"):
        client.predict(3, 99, api_name="/rollouts")


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_only_what_was_uploaded_is_opened_as_an_image(address, tmp_path, meta):
    """By plain HTTP: Gradio's client would upload the file."""
    Image.new("RGB", (28, 28)).save(tmp_path / "private.png")
    data = ["What is it?", {"path": str(tmp_path / "private.png"), **meta}, "", 0, 0, 16]
    called = httpx.post(f"{address}gradio_api/call/talk", json={"data": data}, timeout=30).json()
    answer = httpx.get(f"{address}gradio_api/call/talk/{called['event_id']}", timeout=30).text
    assert "event: error" in answer or "expected an image that was uploaded" in answer
    assert "### Answer" not in answer


def test_a_person_asks_about_an_image_and_reads_verdict_and_reflection(page, tmp_path):
    """The model is noisy at the start, so that some verdict is no."""
    example = next(row for row in app.examples(tmp_path) if "difference" in row[0])
    page.type("textarea", example[0])
    page.upload("input[type=file]", Path(example[1]))
    page.wait("!!document.querySelector('.picture img')")
    page.js("document.querySelectorAll('input[type=text], textarea')[1].focus()")
    page.call("Input.insertText", text=example[2])
    wanted = ["Answer (wrong)", "Reflection (right)", "✓ correct"] if os.environ.get("SAVE_PICTURE") else ["Reflection"]
    for _ in range(60):
        words = ask(page)
        if all(part in words for part in wanted):
            break
    for part in ("Answer", "Digits:", "tokens", "Verdict: ✗ not correct, probability ", "Reflection"):
        assert part in words
    assert page.js("document.querySelectorAll('.written .katex').length") >= 3  # the boxes, as maths
    picture = page.picture("webp", quality=80)
    assert len(picture) < 150_000
    if os.environ.get("SAVE_PICTURE"):  # README's: SAVE_PICTURE=1 python -m pytest tests/test_app.py
        PICTURE.write_bytes(picture)


def test_readme_shows_the_picture_that_the_test_made():
    with Image.open(PICTURE) as picture:
        assert picture.width == 1280
    assert PICTURE.stat().st_size < 150_000


def test_a_person_looks_at_votes_and_at_training_rollouts(page):
    page.type("textarea", "What is 3 plus 4?")
    page.click("[role=tab]", "Several answers")
    page.click("button", "Draw answers")
    page.wait("document.body.innerText.includes('Knock-out')")
    assert "Votes" in page.text() and "of 8" in page.text()
    page.click("[role=tab]", "Training rollouts")
    page.wait("document.body.innerText.includes('Recycled: Judge one answer')")
    assert "<script>document.title='PWNED'</script>" in page.text()


def test_hostile_text_is_shown_and_does_nothing(page):
    page.click("[role=tab]", "Answer, judge")
    page.type("textarea", "HOSTILE " + HOSTILE)
    page.click("button", "Ask")
    page.wait(f"{WRITTEN}.includes('PWNED') && {WRITTEN}.includes('Final answer')")
    words = page.js(WRITTEN)
    for part in ("<script>document.title='PWNED'</script>", "[link](javascript:alert(1))", "**bold**", "[U+202E]"):
        assert part in words
    assert page.js("document.title") == "SPARK: models/digits"
    inside = "document.querySelectorAll('.written script, .written svg, .written img, .written a, .written b').length"
    assert page.js(inside) == 0
    assert not page.errors
    assert [url for url in page.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert not [url for url in page.requests if ":9/" in url]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_has_no_serious_axe_findings(page, width, dark):
    from axe_core_python import sync_playwright

    page.look(width, 800, dark)
    page.js("document.head.append(Object.assign(document.createElement('style'), {textContent: '* { transition: none "
            "!important }'}))")  # fmt: skip
    assert page.js("document.documentElement.scrollWidth") <= width
    page.js(Path(sync_playwright.__file__).with_name("axe.min.js").read_text() + "; 1")
    found = page.js("axe.run({exclude: [['.katex'], ['.katex-error']]}).then(r => r.violations.filter(v => "
                    "['serious', 'critical'].includes(v.impact)).map(v => v.id + ' ' + v.nodes[0].html))")  # fmt: skip
    assert found == []
