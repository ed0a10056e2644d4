"""Where completions come from: transformers, vLLM in this process, or OpenAI-compatible servers, behind one interface.

    engine.submit(ticket, request, sampling)      hand a request over; its images are loaded now
    engine.finished() -> [(ticket, Output)]       wait until one or more are done, and return those
    engine.capacity                               requests that it wants to hold at once: enough to be busy, few
                                                  enough for memory
    engine.close()

All of them see the same messages: the images of a request stand where its messages have parts for them, else in front
of the first question, as in training; the model's own chat template does the rest. Images are what training sees
(data/images.py); one that can't be used is its request's error. At temperature 0 they give the same completions.
"""

import asyncio
import heapq
import os
import queue
import random
import threading
import time
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import httptools
import msgspec
import pybase64
import uvloop

from data.images import BadImage, as_file, loaded
from data.rows import BadInput


class Request(NamedTuple):
    """One call of the model: chat messages and their images."""

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()  # references, paths or PIL images
    seed: int | None = None  # of this request's sampling, where the engine can


class Output(NamedTuple):
    """What came back, or why nothing did."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy."""

    max_tokens: int = 2048
    temperature: float = 0.0
    repetition_penalty: float = 1.0


Done = list[tuple[int, Output]]


def complete(engine, requests: list[Request], sampling: Sampling) -> list[Output]:
    """The completions of `requests`, in their order."""
    outputs: dict[int, Output] = {}
    waiting = iter(enumerate(requests))
    held = 0
    while len(outputs) < len(requests):
        while held < engine.capacity and (following := next(waiting, None)) is not None:
            engine.submit(*following, sampling)
            held += 1
        done = engine.finished()
        held -= len(done)
        outputs.update(done)
    return [outputs[i] for i in range(len(requests))]


def with_places(request: Request) -> list[dict[str, Any]]:
    """The messages of a request with images, all in parts: where they have none for images, these stand in front of the
    first question."""
    messages = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in request.messages
    ]
    if all(part["type"] == "text" for message in messages for part in message["content"]):
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        content = [{"type": "image"}] * len(request.images) + messages[first]["content"]
        messages[first] = {**messages[first], "content": content}
    return messages


def prompt_text(processor, request: Request) -> str:
    """The request under the model's chat template. Raises BadImage if the model takes none."""
    from transformers import ProcessorMixin

    if request.images and not isinstance(processor, ProcessorMixin):
        raise BadImage("the model takes no images")
    messages = with_places(request) if request.images else request.messages
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


class BatchEngine:
    """What works in batches: a subclass gives `batch`. Requests of like length go together, the longest first, so that
    memory is at its peak at the start."""

    def __init__(self, batch_size: int = 128):
        self.batch_size = batch_size
        self.capacity = 8 * batch_size
        self._waiting: dict[int, tuple[Request, Sampling]] = {}

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        self._waiting[ticket] = (request, sampling)

    def finished(self) -> Done:
        def length(ticket: int) -> int:
            return sum(len(str(m["content"])) for m in self._waiting[ticket][0].messages)

        tickets = heapq.nlargest(self.batch_size, self._waiting, key=length)
        held = [self._waiting.pop(ticket) for ticket in tickets]
        return list(zip(tickets, self.batch([request for request, _ in held], held[0][1]), strict=True))

    def batch(self, requests: list[Request], sampling: Sampling) -> list[Output]:
        """The completions of at most `batch_size` requests, in their order."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class TransformersEngine(BatchEngine):
    """transformers' own `generate`. `model` is a name, or a loaded model with its processor."""

    def __init__(self, model, processor=None, batch_size: int = 128, dtype: str = "auto"):
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            ProcessorMixin,
        )

        from data.lengths import image_factor

        super().__init__(batch_size)
        if isinstance(model, str):
            processor = processor or AutoProcessor.from_pretrained(model, padding_side="left")
            vision = "vision_config" in AutoConfig.from_pretrained(model).to_dict()
            auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if dtype == "auto" and device == "cpu":
                dtype = "float32"
            model = auto.from_pretrained(model, dtype=dtype).to(device)
        self.model, self.processor = model.eval(), processor
        self.tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.factor = image_factor(processor)
        if self.tokenizer.pad_token is None:  # Llama's
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def batch(self, requests: list[Request], sampling: Sampling) -> list[Output]:
        import torch

        outputs: list[Output | None] = [None] * len(requests)
        texts, images, rows = [], [], []
        for i, request in enumerate(requests):
            try:
                text = prompt_text(self.processor, request)
                images += [loaded(image, self.factor) for image in request.images]
            except BadImage as error:
                outputs[i] = Output(error=str(error))
                continue
            texts.append(text)
            rows.append(i)
        if not rows:
            return outputs
        inputs = self.processor(
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the chat template has written them
            return_tensors="pt",
            **({"images": images} if images else {}),
        ).to(self.model.device)
        drawn = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=sampling.max_tokens,
                repetition_penalty=sampling.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id,
                **drawn,
            )[:, inputs["input_ids"].size(1) :]  # (b, T)
        kept = (ids != self.tokenizer.pad_token_id).sum(dim=1).tolist()
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for i, text, p, n in zip(rows, decoded, prompts, kept, strict=True):
            outputs[i] = Output(text, p, n)
        return outputs


# ---------------------------------------------------------------------------------------------------------------------
# vLLM in this process


class VLLMEngine:
    """One vLLM engine, stepped by `finished`; its scheduler batches whatever has been submitted."""

    def __init__(self, model: str, dtype: str = "auto", max_model_len: int | None = None, **engine_arguments):
        import torch
        from transformers import AutoProcessor, ProcessorMixin
        from vllm import LLM

        from data.lengths import image_factor

        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"
        self.processor = AutoProcessor.from_pretrained(model)
        self.tokenizer = self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor
        self.factor = image_factor(self.processor)
        self.llm = LLM(model, dtype=dtype, max_model_len=max_model_len, **engine_arguments)
        self.capacity = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs + 256  # these are ready to go
        self._refused: Done = []

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            seed=request.seed if sampling.temperature > 0 else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            text = prompt_text(self.processor, request)
            prompt = {"prompt_token_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
            if request.images:
                prompt["multi_modal_data"] = {"image": [loaded(image, self.factor) for image in request.images]}
            self.llm.llm_engine.add_request(str(ticket), prompt, parameters)
        except (ValueError, VLLMClientError) as error:  # a broken image; a prompt longer than the model takes
            self._refused.append((ticket, Output(error=" ".join(str(error).split())[:300])))

    def finished(self) -> Done:
        done, self._refused = self._refused, []
        while not done:
            for output in self.llm.llm_engine.step():
                completion = output.outputs[0]
                tokens = len(output.prompt_token_ids), len(completion.token_ids)
                done.append((int(output.request_id), Output(completion.text, *tokens)))
        return done

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Servers

# Those that fill in what a request leaves open from the model's generation_config.json; as /models gives their name.
FILL_IN = {"vllm", "sglang"}
TOGETHER = 32  # requests handed to the thread at once: each time costs its attention, and waiting costs the first ones
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
FATAL = {
    401: "the key in OPENAI_API_KEY is missing or wrong",
    403: "the key in OPENAI_API_KEY may not use this",
    404: "no such model or path there",
    **dict.fromkeys((301, 302, 307, 308), "it has moved; give the address that it redirects to"),
}


class ServerEngine:
    """OpenAI-compatible servers, called by one thread of coroutines; a request goes to the least busy server.

    Retries what may pass (429, 5xx, a broken connection, half an answer) with backoff and jitter, where there are
    several servers on another one. What is left then is that request's error. What no request can survive (401, 403,
    404) raises BadInput.

    Args:
        urls: as `http://host:8000` or `http://host:8000/v1`.
        model: the name the servers know it by.
        concurrency: requests under way at once, over all servers.
        timeout: seconds for one try; retries: tries after the first.
    """

    def __init__(self, urls: list[str], model: str, concurrency: int = 64, timeout: float = 600.0, retries: int = 8):
        self.model, self.concurrency, self.timeout, self.retries = model, concurrency, timeout, retries
        self.capacity = 2 * concurrency  # as many again are ready to go, images loaded
        self._servers = [_Server(url) for url in urls]
        self._fill_in = False  # whether a server is one of FILL_IN
        self._submitted: list[tuple[int, bytes]] = []
        self._answered: list[tuple[int, Output | Exception]] = []
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks: list[asyncio.Task] = []
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BadInput:
            self.close()
            raise

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        try:
            self._submitted.append((ticket, msgspec.json.encode(self._body(request, sampling))))
            if len(self._submitted) == TOGETHER:
                self._hand_over()
        except (BadImage, UnicodeEncodeError) as error:  # half a surrogate pair
            self._done.put([(ticket, Output(error=str(error)))])

    def finished(self) -> Done:
        self._hand_over()
        done = self._done.get()
        while not self._done.empty():
            done += self._done.get()
        for _, output in done:
            if isinstance(output, Exception):
                raise output
        return done

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _hand_over(self) -> None:
        submitted, self._submitted = self._submitted, []
        if submitted:
            self._loop.call_soon_threadsafe(self._start, submitted)

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        messages = request.messages
        if request.images:
            urls = iter([msgspec.Raw(b'"%s"' % data_url(image)) for image in request.images])  # nothing to escape
            messages = [
                {**m, "content": [p if p["type"] == "text" else {"type": "image_url", "image_url": {"url": next(urls)}}
                                  for p in m["content"]]}
                for m in with_places(request)
            ]  # fmt: skip
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
        return body

    # ---- in the thread ----------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._tasks = [self._loop.create_task(self._watch())]
        for server in self._servers:
            try:
                status, body = await server.exchange("GET", "/models", b"", timeout=10)
            except OSError as error:
                raise BadInput(f"{server.url}: no server answers there ({_reason(error)})") from None
            if status in FATAL and status != 404:  # not every server lists its models
                raise BadInput(f"{server.url}: answered {status}: {FATAL[status]}")
            served = _served(body) if status == 200 else {}
            if served and self.model not in served:
                raise BadInput(
                    f"{server.url}: serves {', '.join(served)[:300]}, not {self.model}; name one by --served_model"
                )
            self._fill_in |= not FILL_IN.isdisjoint(served.values())
        self._todo: asyncio.Queue = asyncio.Queue()
        self._tasks += [self._loop.create_task(self._work()) for _ in range(self.concurrency)]

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            server.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.timeout / 8))
            for server in self._servers:
                server.end_overdue()

    def _start(self, submitted: list[tuple[int, bytes]]) -> None:
        for request in submitted:
            self._todo.put_nowait(request)

    async def _work(self) -> None:
        """One of `concurrency`: takes requests, one after the other."""
        while True:
            ticket, body = await self._todo.get()
            try:
                output = await self._call(body)
            except Exception as error:  # handed to finished(), which raises it in the caller's thread
                output = error
            if not self._answered:
                self._loop.call_soon(self._hand_back)  # together with what else comes in at this moment
            self._answered.append((ticket, output))

    def _hand_back(self) -> None:
        self._done.put(self._answered)
        self._answered = []

    async def _call(self, body: bytes) -> Output:
        error, tries = "", dict.fromkeys(self._servers, 0)
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(min(30.0, 0.25 * 2**attempt) * random.uniform(0.5, 1.0))
            server = min(self._servers, key=lambda server: (tries[server], server.busy))  # a dead one is never busy
            tries[server] += 1
            try:
                status, answer = await server.exchange("POST", "/chat/completions", body, self.timeout)
            except OSError as failure:
                error = f"{server.url}: {_reason(failure)}"
                continue
            if status in FATAL:
                raise BadInput(f"{server.url}: answered {status}: {FATAL[status]}")
            if status == 200 and (output := _read(answer)) is not None:
                return output
            error = f"{server.url}: answered {status}: {answer[:200].decode(errors='replace')}"
            if status not in RETRIED and status != 200:
                break
        return Output(error=" ".join(error.split()))


def _reason(error: OSError) -> str:
    return f"{type(error).__name__} {error}".strip()


class _Server:
    """The address of a server, and its connections. Plain HTTP/1.1 without what an API does not need (cookies,
    redirects, compression): a fifth of a general client's CPU."""

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.busy = 0
        self._idle: list[_Connection] = []
        self._deadlines: dict[_Connection, float] = {}
        parts = urlsplit(self.url)
        try:
            self._port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            key = os.environ.get("OPENAI_API_KEY", "").strip().encode("ascii")
            self._host, host = parts.hostname, parts.netloc.rpartition("@")[2].encode("idna")
        except (KeyError, UnicodeError, ValueError):
            raise BadInput(f"{url}: expected http://host:port or https://host, and a key of ASCII letters") from None
        if not self._host:
            raise BadInput(f"{url}: expected http://host:port or https://host")
        self._tls = parts.scheme == "https"
        self._path = parts.path
        self._headers = b"Host: " + host + b"\r\nContent-Type: application/json\r\n"
        self._headers += b"Authorization: Bearer " + key + b"\r\n" if key else b""

    async def exchange(self, method: str, path: str, body: bytes, timeout: float) -> tuple[int, bytes]:
        """(status, body) of the answer. Raises OSError, TimeoutError among them, if there is none."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n".encode() + self._headers
        self.busy += 1
        connection = None
        try:
            connection = await self._connection(timeout)
            self._deadlines[connection] = time.monotonic() + timeout
            answer = await connection.exchange(head + b"\r\n" + body)
        except BaseException:  # also cancelled: an answer may still come, and would be taken for the next one's
            if connection:
                connection.transport.abort()
            raise
        finally:
            self.busy -= 1
            self._deadlines.pop(connection, None)
        self._idle.append(connection)
        return answer

    async def _connection(self, timeout: float) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout):
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls or None)
        return connection

    def end_overdue(self) -> None:
        """To be called now and then: a timer for each request would cost a quarter of its CPU."""
        now = time.monotonic()
        for connection in [c for c, deadline in self._deadlines.items() if deadline < now]:
            connection.end(TimeoutError("no answer in time"))

    def close(self) -> None:
        for connection in self._idle:
            connection.transport.close()


class _Connection(asyncio.Protocol):
    """One exchange at a time, the connection kept open between them."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._waiting: asyncio.Future | None = None

    def exchange(self, request: bytes) -> asyncio.Future:
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._body = 0, []
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._waiting

    def data_received(self, data: bytes) -> None:
        if self._waiting is None:  # nobody asked
            self.transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.end(ConnectionError(f"no HTTP: {error}"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._status >= 200:  # before that, it announces another one
            if not self._parser.should_keep_alive():
                self.transport.close()
            self.end()

    def connection_lost(self, error: Exception | None) -> None:
        # An answer without a length ends with the connection. Half an answer is no JSON.
        self.end(None if self._status >= 200 and error is None else error or ConnectionError("closed, no answer"))

    def end(self, error: Exception | None = None) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.done():  # done: it was cancelled
            return
        if error is None:
            waiting.set_result((self._status, b"".join(self._body)))
        else:
            waiting.set_exception(error)


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None


_decode_models = msgspec.json.Decoder(_Models).decode
_decode_completion = msgspec.json.Decoder(_Completion).decode


def _served(body: bytes) -> dict[str, str | None]:
    """The names of the models in a list of them, with what serves each; none if it is no such list."""
    try:
        return {model.id: model.owned_by for model in _decode_models(body).data}
    except msgspec.DecodeError:
        return {}


def _read(body: bytes) -> Output | None:
    """A chat completion; None if it is none."""
    try:
        answer = _decode_completion(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    usage = answer.usage or _Usage()
    return Output(answer.choices[0].message.content or "", usage.prompt_tokens or 0, usage.completion_tokens or 0)


def data_url(image) -> bytes:
    """An image as the server is to see it: as training does. Raises BadImage."""
    content, kind = as_file(image)
    return b"data:%s;base64,%s" % (kind.encode(), pybase64.b64encode(content))
