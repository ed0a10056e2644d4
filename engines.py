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
import base64
import heapq
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data.images import BadImage, as_file, loaded
from data.rows import BadInput, in_parts


class Request(NamedTuple):
    """One call of the model: chat messages and their images."""

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()  # references, paths or PIL images
    seed: int | None = None  # of this request's sampling, where the engine can
    with_logprobs: bool = False  # of each token of the completion
    temperature: float | None = None  # instead of the sampling's (Sampling.of)


class Output(NamedTuple):
    """What came back, or why nothing did."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    logprobs: tuple[tuple[str, float], ...] | None = None  # (token, its log-probability), where they were wanted
    cut_off: bool = False  # at max_tokens


class BadRequest(ValueError):
    """What this model can't be asked."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy."""

    max_tokens: int = 2048
    temperature: float = 0.0
    repetition_penalty: float = 1.0

    def of(self, request: Request) -> "Sampling":
        """With the request's own temperature, if it has one."""
        return self if request.temperature is None else replace(self, temperature=request.temperature)


Done = list[tuple[int, Output]]


def complete(engine, requests: list[Request], sampling: Sampling) -> list[Output]:
    """The completions of `requests`, in their order."""
    outputs: dict[int, Output] = {}
    waiting = iter(enumerate(requests))
    held = 0
    while len(outputs) < len(requests):
        while held < engine.capacity and (following := next(waiting, None)) is not None:
            ticket, request = following
            engine.submit(ticket, request, sampling.of(request))
            held += 1
        done = engine.finished()
        held -= len(done)
        outputs.update(done)
    return [outputs[i] for i in range(len(requests))]


def load_processor(model: str, **settings: Any):
    """The model's processor or tokenizer. Raises BadInput if it has no chat template."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model, **settings)
    if processor.chat_template is None:
        raise BadInput(f"--model {model}: expected a model with a chat template, which its tokenizer has not")
    return processor


def with_places(request: Request) -> list[dict[str, Any]]:
    """The messages of a request in parts; its images stand in front of the first question where the messages have no
    places for them."""
    messages = in_parts(request.messages)
    if request.images and all(part["type"] == "text" for message in messages for part in message["content"]):
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        content = [{"type": "image"}] * len(request.images) + messages[first]["content"]
        messages[first] = {**messages[first], "content": content}
    return messages


def prompt_text(processor, request: Request) -> str:
    """The request under the model's chat template. Raises BadRequest, and BadImage if the model takes none."""
    from jinja2 import TemplateError
    from transformers import ProcessorMixin

    if request.images and not isinstance(processor, ProcessorMixin):
        raise BadImage("the model takes no images")
    # A vision-language model's template may pass over contents that are plain text.
    messages = with_places(request) if isinstance(processor, ProcessorMixin) else request.messages
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:  # some take no system prompt
        raise BadRequest(f"chat template: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# transformers


class BatchEngine:
    """An engine that works in batches: a subclass defines `batch`. Requests of similar length go together, the longest
    first, so that memory is at its peak at the start."""

    def __init__(self, batch_size: int = 128):
        self.batch_size = batch_size
        self.capacity = 8 * batch_size
        self._waiting: dict[int, tuple[Request, Sampling]] = {}

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        self._waiting[ticket] = (request, sampling)

    def finished(self) -> Done:
        def length(ticket: int) -> int:
            return sum(len(str(m["content"])) for m in self._waiting[ticket][0].messages)

        sampling = self._waiting[max(self._waiting, key=length)][1]
        alike = [ticket for ticket, (_, of_ticket) in self._waiting.items() if of_ticket == sampling]
        tickets = heapq.nlargest(self.batch_size, alike, key=length)
        requests = [self._waiting.pop(ticket)[0] for ticket in tickets]
        return list(zip(tickets, self.batch(requests, sampling), strict=True))

    def batch(self, requests: list[Request], sampling: Sampling) -> list[Output]:
        """The completions of at most `batch_size` requests, in their order."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class TransformersEngine(BatchEngine):
    """transformers' own `generate`. `model` is a name, or a loaded model with its processor."""

    def __init__(self, model, processor=None, batch_size: int = 128, dtype: str = "auto"):
        import torch
        import transformers

        from data.lengths import image_factor

        transformers.utils.logging.disable_progress_bar()  # of the weights' loading
        super().__init__(batch_size)
        if isinstance(model, str):
            processor = processor or load_processor(model, padding_side="left")
            vision = "vision_config" in transformers.AutoConfig.from_pretrained(model).to_dict()
            auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if dtype == "auto" and device == "cpu":
                dtype = "float32"
            model = auto.from_pretrained(model, dtype=dtype).to(device)
        self.model, self.processor = model.eval(), processor
        self.tokenizer = processor.tokenizer if isinstance(processor, transformers.ProcessorMixin) else processor
        self.factor = image_factor(processor)
        if self.tokenizer.pad_token is None:  # Llama's
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id  # tokens that end an answer: a list, one, or None
        self._ends = ends if isinstance(ends, list) else [end for end in [ends] if end is not None]

    def batch(self, requests: list[Request], sampling: Sampling, **more: Any) -> list[Output]:
        """`more` is passed on to `generate`: stopping criteria, for one (not `logits_processor`, which is ours)."""
        import torch

        outputs: list[Output | None] = [None] * len(requests)
        texts, images, rows = [], [], []
        for i, request in enumerate(requests):
            try:
                text = prompt_text(self.processor, request)
                shown = [loaded(image, self.factor) for image in request.images]
            except (BadImage, BadRequest) as error:
                outputs[i] = Output(error=str(error))
                continue
            texts.append(text)
            images.append(shown)  # a list for each row: of a flat one, some processors make a single row
            rows.append(i)
        if not rows:
            return outputs
        inputs = self.processor(
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the chat template has written them
            return_tensors="pt",
            **({"images": images} if any(images) else {}),
        ).to(self.model.device)
        recorder = TokenLogprobs() if any(requests[i].with_logprobs for i in rows) else None
        drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=sampling.max_tokens,
                repetition_penalty=sampling.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=[recorder] if recorder else [],
                do_sample=bool(drawn),
                **drawn,
                **more,
            )[:, inputs["input_ids"].size(1) :]  # (b, T)
        ends = torch.isin(ids, torch.tensor(self._ends).to(ids))  # the first is the last token
        kept = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, ids.size(1)).tolist()
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        logprobs = recorder.of(ids).tolist() if recorder else None  # (b, T)
        found = zip(rows, decoded, prompts, kept, ends.any(dim=1).tolist(), strict=True)
        for place, (i, text, p, n, ended) in enumerate(found):
            tokens = None
            if logprobs is not None and requests[i].with_logprobs:
                written = self.tokenizer.batch_decode([[token] for token in ids[place, :n].tolist()])
                tokens = tuple(zip(written, logprobs[place][:n], strict=True))
            outputs[i] = Output(text, p, n, logprobs=tokens, cut_off=not ended)
        return outputs


class TokenLogprobs:
    """A logits processor that changes nothing and remembers the log-probability of each token that was chosen: (b, V)
    of one step at a time, where `generate(output_logits=True)` keeps those of all steps."""

    def __init__(self):
        self._last, self._chosen = None, []

    def __call__(self, input_ids, scores):
        if self._last is not None:
            self._chosen.append(self._last.gather(1, input_ids[:, -1:]))
        self._last = scores.float().log_softmax(dim=-1)
        return scores

    def of(self, ids):
        """The log-probabilities of the generated `ids`."""
        import torch

        return torch.cat([*self._chosen, self._last.gather(1, ids[:, -1:])], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM in this process


def whole_prompts(engine_arguments: dict[str, Any]) -> dict[str, Any]:
    """Without a GPU, prompts are not cut into chunks: vLLM 0.31 can't take back the seed of one that was, and ends."""
    import torch

    return engine_arguments if torch.cuda.is_available() else {"enable_chunked_prefill": False, **engine_arguments}


class VLLMEngine:
    """One vLLM engine, stepped by `finished`; its scheduler batches whatever has been submitted."""

    def __init__(self, model: str, dtype: str = "auto", max_model_len: int | None = None, **engine_arguments):
        import torch
        from transformers import ProcessorMixin
        from vllm import LLM

        from data.lengths import image_factor

        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"
        self.processor = load_processor(model)
        self.tokenizer = self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor
        self.factor = image_factor(self.processor)
        self.llm = LLM(model, dtype=dtype, max_model_len=max_model_len, **whole_prompts(engine_arguments))
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
            logprobs=0 if request.with_logprobs else None,
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
                logprobs = None
                if completion.logprobs is not None:
                    chosen = [
                        step[token] for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
                    ]
                    logprobs = tuple((token.decoded_token or "", token.logprob) for token in chosen)
                cut_off = completion.finish_reason == "length"
                written = Output(completion.text, *tokens, logprobs=logprobs, cut_off=cut_off)
                done.append((int(output.request_id), written))
        return done

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Servers

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
        extra: what the body of every request also has.
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
        return body | self.extra

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
