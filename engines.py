"""Where completions come from: transformers, vLLM in this process, or OpenAI-compatible servers, behind one interface.

    engine.submit(ticket, request, sampling)      hand a request over; its images are loaded now
    engine.finished() -> [(ticket, Output)]       wait until one or more are done, and return those
    engine.capacity                               requests that it wants to hold at once: enough to be busy, few
                                                  enough for memory
    engine.close()

All of them see the same messages: the images of a request stand before the text of its last message, and the model's
own chat template does the rest. Images are what training sees (data/images.py); one that can't be used is its request's
error. At temperature 0 they give the same completions.
"""

import asyncio
import base64
import contextlib
import heapq
import json
import os
import queue
import random
import threading
from dataclasses import dataclass
from typing import Any

from data.images import BadImage, as_file, open_image, reference
from data.read import BadInput


@dataclass(frozen=True)
class Request:
    """One call of the model: chat messages, with the images that stand before the last one's text."""

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()  # paths or PIL images
    seed: int | None = None  # of this request's sampling, where the engine can


@dataclass(frozen=True)
class Output:
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


def prompt_text(processor, request: Request) -> str:
    """The request under the model's chat template."""
    messages = request.messages
    if request.images:
        *before, last = messages
        parts = [{"type": "image"}] * len(request.images) + [{"type": "text", "text": last["content"]}]
        messages = [*before, {**last, "content": parts}]
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
            return sum(len(m["content"]) for m in self._waiting[ticket][0].messages)

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

    def batch(self, requests: list[Request], sampling: Sampling) -> list[Output]:
        import torch

        outputs: list[Output | None] = [None] * len(requests)
        texts, images, rows = [], [], []
        for i, request in enumerate(requests):
            try:
                images += [open_image(reference(image)) for image in request.images]
            except BadImage as error:
                outputs[i] = Output(error=str(error))
                continue
            texts.append(prompt_text(self.processor, request))
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

    capacity = 512

    def __init__(self, model: str, dtype: str = "auto", max_model_len: int | None = None, **engine_arguments):
        import torch
        from transformers import AutoProcessor, ProcessorMixin
        from vllm import LLM

        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"
        self.processor = AutoProcessor.from_pretrained(model)
        self.tokenizer = self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor
        self.llm = LLM(model, dtype=dtype, max_model_len=max_model_len, **engine_arguments)
        self._refused: Done = []

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        text = prompt_text(self.processor, request)
        prompt = {"prompt_token_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            seed=request.seed if sampling.temperature > 0 else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            if request.images:
                prompt["multi_modal_data"] = {"image": [open_image(reference(image)) for image in request.images]}
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

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
FATAL = {
    401: "the key in OPENAI_API_KEY is missing or wrong",
    403: "the key in OPENAI_API_KEY may not use this",
    404: "no such model or path there",
}


class ServerEngine:
    """OpenAI-compatible servers, called by one thread of coroutines; a request goes to the least busy server.

    Retries what may pass (429, 5xx, a broken connection, half an answer) with backoff and jitter. What is left then is
    that request's error. What no request can survive (401, 403, 404) raises BadInput.

    Args:
        urls: as `http://host:8000` or `http://host:8000/v1`.
        model: the name the servers know it by.
        concurrency: requests under way at once, over all servers.
        timeout: seconds for one try; retries: tries after the first.
    """

    def __init__(self, urls: list[str], model: str, concurrency: int = 64, timeout: float = 600.0, retries: int = 8):
        self.urls = [url.rstrip("/") if url.rstrip("/").endswith("/v1") else url.rstrip("/") + "/v1" for url in urls]
        self.model, self.concurrency, self.timeout, self.retries = model, concurrency, timeout, retries
        self.capacity = 2 * concurrency  # as many again are ready to go, images loaded
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._busy = dict.fromkeys(self.urls, 0)
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BadInput:
            self.close()
            raise

    def submit(self, ticket: int, request: Request, sampling: Sampling) -> None:
        self._loop.call_soon_threadsafe(self._start, ticket, request, sampling)

    def finished(self) -> Done:
        done = [self._done.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                done.append(self._done.get_nowait())
        for _, output in done:
            if isinstance(output, BaseException):
                raise output
        return done

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- in the thread ----------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        import aiohttp

        key = os.environ.get("OPENAI_API_KEY")
        self._slots = asyncio.Semaphore(self.concurrency)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
        )
        for url in self.urls:
            try:
                async with self._session.get(f"{url}/models", timeout=aiohttp.ClientTimeout(total=10)) as response:
                    status, body = response.status, await response.read()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise BadInput(f"{url}: no server answers there ({error or type(error).__name__})") from None
            if status in (401, 403):
                raise BadInput(f"{url}: answered {status}: {FATAL[status]}")
            served = _served(body) if status == 200 else []
            if served and self.model not in served:
                raise BadInput(f"{url}: serves {', '.join(served)}, not {self.model}; name one by --served_model")

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_session"):
            await self._session.close()

    def _start(self, ticket: int, request: Request, sampling: Sampling) -> None:
        task = self._loop.create_task(self._serve(ticket, request, sampling))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, ticket: int, request: Request, sampling: Sampling) -> None:
        try:
            output = await self._call(request, sampling)
        except BadImage as error:
            output = Output(error=str(error))
        except Exception as error:  # handed to finished(), which raises it in the caller's thread
            output = error
        self._done.put((ticket, output))

    async def _call(self, request: Request, sampling: Sampling) -> Output:
        import aiohttp

        body = json.dumps(self._body(request, sampling)).encode()
        error = ""
        async with self._slots:
            for attempt in range(self.retries + 1):
                if attempt:
                    await asyncio.sleep(min(30.0, 0.25 * 2**attempt) * random.uniform(0.5, 1.0))
                url = min(self.urls, key=self._busy.get)
                self._busy[url] += 1
                try:
                    async with self._session.post(f"{url}/chat/completions", data=body) as response:
                        status, answer = response.status, await response.read()
                except (aiohttp.ClientError, TimeoutError, OSError) as failure:
                    error = f"{url}: {type(failure).__name__} {failure}".strip()
                    continue
                finally:
                    self._busy[url] -= 1
                if status in FATAL:
                    raise BadInput(f"{url}: answered {status}: {FATAL[status]}")
                if status == 200 and (output := _read(answer)) is not None:
                    return output
                error = f"{url}: answered {status}: {answer[:200].decode(errors='replace')}"
                if status not in RETRIED and status != 200:
                    break
        return Output(error=" ".join(error.split()))

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        *before, last = request.messages
        if request.images:
            parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images]
            last = {**last, "content": [*parts, {"type": "text", "text": last["content"]}]}
        body = {
            "model": self.model,
            "messages": [*before, last],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.repetition_penalty != 1.0:  # vLLM's own; other servers refuse a name they do not know
            body["repetition_penalty"] = sampling.repetition_penalty
        if sampling.temperature > 0 and request.seed is not None:
            body["seed"] = request.seed
        return body


def _served(body: bytes) -> list[str]:
    try:
        return [model["id"] for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _read(body: bytes) -> Output | None:
    """A chat completion; None if it is none."""
    try:
        answer = json.loads(body)
        usage = answer.get("usage") or {}
        tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        return Output(answer["choices"][0]["message"]["content"] or "", *tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def data_url(image) -> str:
    """A path or an image as the server is to see it: as training does. Raises BadImage."""
    content, kind = as_file(reference(image))
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
