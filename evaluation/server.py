"""OpenAI-compatible servers as an engine (engines.py)."""

import asyncio
import base64
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data.images import BadImage, as_file
from data.rows import BadInput
from engines import Done, Output, Request, Sampling, with_places

FILL_IN = {"vllm", "sglang"}  # these take what a request leaves open from the model's generation_config.json
RETRIED = {408, 409, 425}  # and 429, and all from 500 on but 501
FATAL = {
    401: "the key in OPENAI_API_KEY is missing or wrong",
    402: "there is no credit left",
    403: "the key in OPENAI_API_KEY has no access to this",
    404: "no such model or path there",
    **dict.fromkeys((301, 302, 307, 308), "it has moved; give the address that it redirects to"),
}
REFUSED = {"max_tokens": "max_completion_tokens", "seed": None, "logprobs": None}  # by some -> what they take instead
OF_A_REQUEST = {402, 403, 404}  # may mean one request alone, if others are answered
FORBIDDEN = 16  # requests that may be answered so before any is answered otherwise
ELSEWHERE = ("reasoning_content", "reasoning", "tool_calls")  # where a server's parser may put an answer
BROKEN_OFF = {"abort", "error"}  # the server's reasons to finish, not the model's


class ServerEngine:
    """OpenAI-compatible servers, called over aiohttp by a thread with its own event loop, so also from a notebook.

    A request goes to the least busy server. A transient failure (5xx, a broken connection, half an answer) is retried
    with backoff and jitter, on another server where there are several; one that came too late, once. Servers that
    refuse connections, or more requests for now (429, Retry-After), rest, and requests wait for them (`patience`). What
    still fails is that request's error. What no request can survive (401, no credit left, 403 or 404 for all) raises
    BadInput. A field that a server does not know (REFUSED) is left out or renamed. Once every try of a request has
    failed to reach a server, other requests try once each until a server answers.

    Args:
        urls: as `http://host:8000` or `http://host:8000/v1`.
        model: the name the servers know it by.
        concurrency: requests under way at once, over all servers.
        timeout: seconds for one try; retries: tries after the first.
        extra: what the body of every request also has; None leaves a field out.
        patience: seconds without any answer for which a request waits for a server that restarts, or for its quota.
    """

    def __init__(
        self,
        urls: list[str],
        model: str,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 8,
        patience: float = 600.0,
        extra: dict[str, Any] | None = None,
    ):
        self.model, self.concurrency, self.timeout, self.retries = model, concurrency, timeout, retries
        self.patience, self.extra = patience, extra or {}
        self.capacity = 2 * concurrency  # as many again are ready to go, images loaded
        self._busy = {api_url(url): 0 for url in urls}  # server -> requests under way
        self._rests = dict.fromkeys(self._busy, 0.0)  # server -> until when (monotonic) it is not asked
        self._strikes = dict.fromkeys(self._busy, 0)  # server -> times that it was sent to rest since it last served
        self._gone: set[str] = set()  # servers that could not be reached when last asked
        self._heard = self._served = 0.0  # when (monotonic) any server last answered, and answered a request
        self._unreachable = False  # all tries of a request have failed to reach a server, and no answer came since
        self._fill_in = False  # a server is one of FILL_IN
        self._refused: frozenset[str] = frozenset()  # fields of REFUSED without which a request was answered
        self._answered, self._forbidden = False, 0  # whether there was any answer; how many of OF_A_REQUEST
        self._said = dict.fromkeys(self._busy, -math.inf)  # server -> when (monotonic) its rest was last spoken of
        self._waiting: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self._tasks: list[asyncio.Task] = []  # each takes one waiting request at a time
        self._done: queue.SimpleQueue[tuple[int, Output | Exception]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._wait_for(self._open())
        except BadInput:
            self.close()
            raise

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        try:
            body = json.dumps(self._body(request, sampling), ensure_ascii=False).encode()
        except (BadImage, UnicodeEncodeError) as error:  # the latter: half a surrogate pair
            self._done.put((ticket, Output(error=str(error))))
            return
        self._loop.call_soon_threadsafe(self._waiting.put_nowait, (ticket, body))

    def finished(self) -> Done:
        done = [self._done.get()]
        while not self._done.empty():
            done.append(self._done.get())
        for _, output in done:
            if isinstance(output, Exception):
                raise output
        return done

    def close(self) -> None:
        self._wait_for(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        messages = request.messages
        if request.images:
            images = iter([{"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images])
            messages = [
                {**message, "content": [p if p["type"] == "text" else next(images) for p in message["content"]]}
                for message in with_places(request)
            ]
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if self._fill_in:
            body |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
        if self._fill_in or sampling.repetition_penalty != 1.0:  # other servers may refuse a name they do not know
            body["repetition_penalty"] = sampling.repetition_penalty
        if sampling.temperature > 0 and request.seed is not None:
            body["seed"] = request.seed
        if request.with_logprobs:
            body["logprobs"] = True
        return {name: value for name, value in (body | self.extra).items() if value is not None}

    # ---- in the thread ----------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        """Connect, and ask each server for its models. Raises BadInput where it can't serve this one."""
        import aiohttp

        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=self.concurrency))
        self._failures = (aiohttp.ClientError, OSError)  # no answer; TimeoutError is an OSError
        self._not_there = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
        for server in self._busy:
            try:
                status, answer, _ = await self._exchange("GET", f"{server}/models", timeout=10)
            except self._failures as error:
                raise BadInput(f"{server}: no server answers there ({_reason(error)})") from None
            if status in FATAL and status != 404:  # not every server lists its models
                raise BadInput(f"{server}: answered {status}: {FATAL[status]}{_quoted(answer)}")
            served = read_models(answer) if status == 200 else {}
            if served and self.model not in served:
                words = f"{server}: serves {', '.join(served)[:300]}, not {self.model}; name one with --served_model"
                if not FILL_IN.isdisjoint(served.values()):
                    raise BadInput(words)
                print(f"warning: {words}, unless it has more than it lists", file=sys.stderr)  # as gateways do
            self._fill_in |= not FILL_IN.isdisjoint(served.values())
        self._tasks = [asyncio.create_task(self._answer()) for _ in range(self.concurrency)]

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self._session.close(), return_exceptions=True)

    async def _exchange(self, method: str, url: str, body: bytes | None = None, timeout: float | None = None):
        """(status, body of the answer, seconds to wait for where it says so)."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=timeout or self.timeout, sock_connect=10)
        options = {"timeout": limit, "allow_redirects": False, "proxy": proxy_of(url)}
        async with self._session.request(method, url, data=body, **options) as response:
            return response.status, await response.read(), read_pause(response.headers.get("Retry-After"))

    async def _answer(self) -> None:
        while True:
            ticket, body = await self._waiting.get()
            try:
                output = await self._complete(body)
            except Exception as error:  # finished() raises it in the caller's thread
                output = error
            self._done.put((ticket, output))

    async def _complete(self, body: bytes) -> Output:
        error, tries, left_out = "", dict.fromkeys(self._busy, 0), self._refused
        body = without(body, left_out)
        begun, failed, late = time.monotonic(), 0, False
        while failed <= self.retries:
            if (server := await self._next(tries)) is None:
                error = error or "every server has asked to be left alone for longer"
                break
            try:
                status, answer, pause = await self._exchange("POST", f"{server}/chat/completions", body)
            except self._failures as failure:
                error = f"{server}: {_reason(failure)}"
                not_there = isinstance(failure, self._not_there)
                too_late = isinstance(failure, TimeoutError) and not not_there
                if not too_late:
                    self._gone.add(server)
                    self._rest(server, f"can't be reached ({_reason(failure)})")
                if self._unreachable or (late and too_late):
                    break
                if not_there and time.monotonic() - max(begun, self._heard) < self.patience:
                    continue
                failed, late = self.retries + 1 if not_there else failed + 1, late or too_late
                await self._back_off(failed)
                continue
            finally:
                self._busy[server] -= 1
            self._heard, self._unreachable = time.monotonic(), False
            self._gone.discard(server)
            if status == 200 and (output := read_completion(answer)) is not None:
                self._served, self._answered, self._strikes[server] = self._heard, True, 0
                self._refused = self._refused | left_out
                return output
            error = f"{server}: answered {status}{_quoted(answer)}"
            if status in (400, 403, 422) and (name := refused_field(answer, body)):
                left_out = left_out | {name}
                body = without(body, frozenset({name}))
                continue
            if status in (400, 422) and _TEMPERATURE.search(answer):
                raise BadInput(f"{error}; give the --temperature that it takes, or --extra_body '{NO_TEMPERATURE}'")
            if status == 429:
                if b"insufficient_quota" in answer:
                    raise BadInput(error)
                if b"too large" in answer.lower():  # for any minute's quota
                    break
                self._rest(server, f"takes no more requests for now{_quoted(answer)}", pause)
                if self._heard - max(begun, self._served) < self.patience:
                    continue
                break
            self._forbidden += status in OF_A_REQUEST
            this_one = status in OF_A_REQUEST and (self._answered or self._forbidden < FORBIDDEN)
            if status in FATAL and not this_one:
                raise BadInput(f"{server}: answered {status}: {FATAL[status]}{_quoted(answer)}")
            if status != 200 and status not in RETRIED and (status < 500 or status == 501):
                break
            failed += 1
            await self._back_off(failed)
        self._unreachable = len(self._gone) == len(self._busy)
        return Output(error=" ".join(error.split()))

    async def _next(self, tries: dict[str, int]) -> str | None:
        """The server to ask: one that does not rest, where this request was tried least, and that is least busy; None
        where all of them rest for longer than `patience`."""
        while True:
            now = time.monotonic()
            server = min(tries, key=lambda s: (self._rests[s] > now, tries[s], self._busy[s]))
            wait = min(self._rests.values()) - now
            if wait <= 0 or self._unreachable:
                tries[server] += 1
                self._busy[server] += 1
                return server
            if wait >= self.patience:
                return None
            await asyncio.sleep(wait * random.uniform(1.0, 1.1) + 0.01)

    def _rest(self, server: str, why: str, pause: float | None = None) -> None:
        """Let a server rest as long as it asks for, or longer each time; said now and then where that is long."""
        now, rests = time.monotonic(), self._rests[server]
        if pause is None:
            if rests > now:
                return  # another request has found the same
            self._strikes[server] += 1
            pause = min(30.0, 0.25 * 2 ** min(self._strikes[server], 7))
        if pause >= 5.0 and now - self._said[server] > 600.0:
            self._said[server] = now
            print(f"{server}: {why}; waiting {pause:.0f} seconds", file=sys.stderr)
        self._rests[server] = max(rests, now + pause)

    async def _back_off(self, failed: int) -> None:
        if failed <= self.retries:
            await asyncio.sleep(min(30.0, 0.25 * 2**failed) * random.uniform(0.5, 1.0))


def api_url(url: str) -> str:
    """The address of a server's API. Raises BadInput."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # a bad port is a ValueError
    except ValueError:
        valid = False
    if not valid:
        raise BadInput(f"{url}: expected http://host:port or https://host")
    url = url.rstrip("/")
    return url if re.search(r"/v\d\w*(/|$)", parts.path) else f"{url}/v1"  # also .../v1beta/openai, .../api/v3


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address, but never for this machine."""
    parts = urlsplit(url)
    near = parts.hostname in ("localhost", "127.0.0.1", "::1") or proxy_bypass(parts.hostname)
    return None if near else getproxies().get(parts.scheme)


def read_models(answer: bytes) -> dict[str, str | None]:
    """Parse a list of models: name -> what serves it. Empty if malformed."""
    try:
        return {model["id"]: model.get("owned_by") for model in json.loads(answer)["data"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


_TEMPERATURE = re.compile(rb"(?i)unsupported [^.]{0,20}temperature")  # OpenAI's, of models that reason
NO_TEMPERATURE = '{"temperature": null}'
_UNKNOWN = re.compile(r"unsupported|not supported|unrecognized|unknown|unexpected|not permitted|extra|not allowed")


def refused_field(answer: bytes, body: bytes) -> str | None:
    """The field of a request that a server refuses by its name, not by its value, if it can be done without."""
    words, request = answer.decode(errors="replace").lower(), json.loads(body)
    try:
        detail = json.loads(words)["detail"]
        named = {problem["loc"][-1] for problem in detail if problem["type"] == "extra_forbidden"}
    except (ValueError, LookupError, TypeError):  # not FastAPI's
        named = {name for name in REFUSED if _UNKNOWN.search(words) and re.search(rf"\b{name.rstrip('s')}s?\b", words)}
    if "unsupported parameter" not in words:  # else it may be a value that is not supported
        named -= {name for name, other in REFUSED.items() if other and other not in words}
    return next((name for name in REFUSED if name in request and name in named), None)


def read_pause(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, if there is one that can be read."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _quoted(answer: bytes) -> str:
    words = " ".join(answer[:200].decode(errors="replace").split())
    return f": {words}" if words else ""


def without(body: bytes, fields: frozenset[str]) -> bytes:
    """The request without these fields, or with what stands for them (REFUSED)."""
    if not fields:
        return body
    request = json.loads(body)
    for name in fields & request.keys():
        value = request.pop(name)
        if REFUSED[name]:
            request[REFUSED[name]] = value
    return json.dumps(request, ensure_ascii=False).encode()


def read_completion(answer: bytes) -> Output | None:
    """Parse a chat completion; None if malformed, or broken off by the server."""
    try:
        completion = json.loads(answer)
        reason = completion["choices"][0].get("finish_reason")
        if reason in BROKEN_OFF:
            return None
        message = completion["choices"][0]["message"]
        text = text_of(message.get("content"))
        usage = completion.get("usage") or {}
        tokens = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        text.encode()  # half a surrogate pair can't be written anywhere
        content = (completion["choices"][0].get("logprobs") or {}).get("content")
        logprobs = content and tuple((str(step["token"]), float(step["logprob"])) for step in content)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not all(isinstance(n, int) for n in tokens):
        return None
    elsewhere = next((name for name in ELSEWHERE if message.get(name)), None)
    error = no_answer(text, reason, elsewhere)
    return Output(text, *tokens, error, logprobs=logprobs or None, cut_off=reason == "length")


def text_of(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message's content, which may come in parts, some of them thoughts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def no_answer(text: str, reason: str | None, elsewhere: str | None) -> str | None:
    """Why a completion is none, if so; `elsewhere`: the field of it (ELSEWHERE) that has text."""
    if reason == "content_filter":
        return "the server's content filter"
    if not text and elsewhere and reason != "length":
        return f"the server put the whole answer into {elsewhere}; start it without a parser for that"
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def data_url(image) -> str:
    """An image as training sees it, for the server. Raises BadImage."""
    content, kind = as_file(image)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
