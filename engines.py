"""Where completions come from: transformers, vLLM in this process, or OpenAI-compatible servers (evaluation/server.py),
behind one interface.

    engine.submit(ticket, request, sampling)      hand a request over; its images are loaded now
    engine.finished() -> [(ticket, Output)]       wait until one or more are done, and return those
    engine.capacity                               requests that it wants to hold at once: enough to be busy, few
                                                  enough for memory
    engine.close()

All of them see the same messages: the images of a request stand where its messages have parts for them, else in front
of the first question, as in training; the model's own chat template does the rest. Images are what training sees
(data/images.py); one that can't be used is its request's error. At temperature 0 they give the same completions.
"""

import heapq
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data.images import BadImage, loaded
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
