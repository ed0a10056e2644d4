"""Run a model over benchmarks: answering, judging, and test-time scaling with the model as its own judge.

    python evaluate.py --model DIR_OR_NAME --benchmark test.json --mode tts --output results.json
    python calculate_acc.py --result_path results.json

    answer   one answer per question
    tts      answer, judge the own answer, reflect while the verdict is negative (at most --max_rounds times); the first
             and the final answer are both scored, so that training and test-time scaling are never mixed up
    judge    rows with chosen and rejected: which of two is correct, in both orders; rows with response and label: is it

Each row is a small generator that yields requests and returns its result, so that a row's next call goes out as soon as
its last one is back, whatever the other rows do. Finished rows are appended to OUTPUT.part as they finish; running the
same command again evaluates only what is missing or failed. A failed row is recorded with its error: it is not an
answer, right or wrong, and the exit status is 1 while there is one.

The judge prompts are recycle.py's, so a model is tested on what it was trained on.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import verify
from data.read import BadInput
from recycle import (
    PROMPT_SUFFIX,
    ask,
    neutralise,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)

Row = dict[str, Any]
MODES = ("answer", "tts", "judge")


@dataclass(frozen=True)
class Request:
    """One call of the model: chat messages, with the images that stand before the question."""

    messages: list[Row]
    images: tuple[Any, ...] = ()  # paths or PIL images


@dataclass(frozen=True)
class Output:
    """What came back, or why nothing did."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Settings:
    """What decides a result. A results file made with other settings is not continued."""

    model: str
    mode: str
    benchmark: tuple[str, ...]
    engine: str = "auto"
    max_tokens: int = 2048
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    max_rounds: int = 2
    judge_source: str = "cot"
    suffix: str = PROMPT_SUFFIX
    seed: int = 0


class RequestFailed(Exception):
    """A request that came back without a completion; its message is the row's recorded error."""


# ---------------------------------------------------------------------------------------------------------------------
# Modes: a row in, requests out, a result back

Solver = Generator[Request, Output, Row]


class _Tokens:
    """Counts the tokens of a row's calls, and turns a failed call into the row's error."""

    def __init__(self):
        self.prompt = self.completion = 0

    def read(self, output: Output) -> str:
        if output.error is not None:
            raise RequestFailed(output.error)
        self.prompt += output.prompt_tokens
        self.completion += output.completion_tokens
        return output.text


def _question(row: Row, suffix: str) -> tuple[list[Row], tuple]:
    problem = row["problem"]
    text = problem if problem.endswith(suffix) else problem + suffix
    images = (row["image_path"],) if row.get("image_path") is not None else ()
    return [{"role": "user", "content": text}], images


def _shown(text: str, source: str) -> tuple[str, str]:
    """(what a judge sees of a response, its form): the box if asked for and there is one, else all of it."""
    boxed = verify.extract_boxed(text)
    if source == "answer" and boxed is not None:
        return neutralise(boxed), "answer"
    return neutralise(text), "cot"


def answer_row(row: Row, settings: Settings) -> Solver:
    """One answer, scored against the gold."""
    tokens = _Tokens()
    messages, images = _question(row, settings.suffix)
    text = tokens.read((yield Request(messages, images)))
    return _scored(row, text, tokens)


def tts_row(row: Row, settings: Settings) -> Solver:
    """Answer, judge the own answer, reflect while the verdict is No (paper, section 3.4). Every round is kept."""
    tokens = _Tokens()
    messages, images = _question(row, settings.suffix)
    text = tokens.read((yield Request(messages, images)))
    first, rounds = text, []
    for _ in range(settings.max_rounds):
        shown, form = _shown(text, settings.judge_source)
        question = ask(messages, pointwise_instruction(shown), settings.suffix)
        judged = tokens.read((yield Request(question, images)))
        verdict = verify.parse_verdict(judged)
        rounds.append(
            {"answer": verify.extract_boxed(text), "output": text, "verdict": verdict, "judge_output": judged}
        )
        if verdict != "No":  # an unparsed verdict is no reason to throw an answer away
            break
        question = ask(messages, reflection_instruction(shown, form, template=1), settings.suffix)
        text = tokens.read((yield Request(question, images)))
    else:
        rounds.append({"answer": verify.extract_boxed(text), "output": text, "verdict": None, "judge_output": None})
    return {
        **_scored(row, text, tokens),
        "round_num": sum(r["verdict"] == "No" for r in rounds),  # reflections
        "rounds": rounds,
        "first_answer": verify.extract_boxed(first),
        "first_is_correct": verify.is_equal(verify.extract_boxed(first), row["answer"]),
    }


def judge_row(row: Row, settings: Settings) -> Solver:
    """A pair in both orders, or one response with its label."""
    tokens = _Tokens()
    messages, images = _question(row, settings.suffix)
    if "response" in row:
        shown, _ = _shown(row["response"], settings.judge_source)
        judged = tokens.read((yield Request(ask(messages, pointwise_instruction(shown), settings.suffix), images)))
        verdict = verify.parse_verdict(judged)
        found = {"task": "pointwise", "label": _label(row["label"]), "verdict": verdict, "verdict_swapped": None}
        return {**_judged(row, judged, tokens), **found, "is_correct": verdict == found["label"]}

    rejected = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
    chosen, _ = _shown(row["chosen"], settings.judge_source)
    verdicts, swapped, outputs = [], [], []
    for other in rejected:
        other, _ = _shown(other, settings.judge_source)
        for pair, into in (((chosen, other), verdicts), ((other, chosen), swapped)):
            question = ask(messages, pairwise_instruction(*pair), settings.suffix)
            outputs.append(tokens.read((yield Request(question, images))))
            into.append(verify.parse_verdict(outputs[-1]))
    one = len(rejected) == 1
    return {
        **_judged(row, "\n---\n".join(outputs), tokens),
        "task": "pairwise" if one else "best_of_n",
        "label": "A",  # in the first order the chosen one is A, in the swapped order it is B
        "verdict": verdicts[0] if one else verdicts,
        "verdict_swapped": swapped[0] if one else swapped,
        "is_correct": all(v == "A" for v in verdicts) and all(v == "B" for v in swapped),
    }


def _label(label) -> str:
    """A pointwise label as the verdict that agrees with it."""
    return {True: "Yes", False: "No"}.get(label, label)


def _common(row: Row, text: str, tokens: _Tokens) -> Row:
    return {
        "dataset": row.get("dataset", "unnamed"),
        "problem": row["problem"],
        "image_path": row["image_path"] if isinstance(row.get("image_path"), str) else None,
        "ground_truth": row.get("answer"),
        "vlm_output": text,
        "extracted_answer": None,
        "is_correct": None,
        "error": None,
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
    }


def _scored(row: Row, text: str, tokens: _Tokens) -> Row:
    answer = verify.extract_boxed(text)
    return {
        **_common(row, text, tokens),
        "extracted_answer": answer,
        "is_correct": verify.is_equal(answer, row["answer"]),
    }


def _judged(row: Row, text: str, tokens: _Tokens) -> Row:
    return {**_common(row, text, tokens), "extracted_answer": verify.extract_boxed(text)}


SOLVERS: dict[str, Callable[[Row, Settings], Solver]] = {"answer": answer_row, "tts": tts_row, "judge": judge_row}


# ---------------------------------------------------------------------------------------------------------------------
# Engine


class TransformersEngine:
    """Batched generation with transformers' own `generate`. `model` and `processor` may be given, loaded or named."""

    def __init__(self, model, processor=None, batch_size: int = 128):
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            ProcessorMixin,
        )

        self.batch_size = batch_size
        if isinstance(model, str):
            processor = processor or AutoProcessor.from_pretrained(model, padding_side="left")
            vision = "vision_config" in AutoConfig.from_pretrained(model).to_dict()
            auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = auto.from_pretrained(model, dtype="auto" if device == "cuda" else torch.float32).to(device)
        self.model, self.processor = model.eval(), processor
        self.tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor

    def generate(self, requests: list[Request], settings: Settings) -> list[Output]:
        """The completions of `requests`, in their order. Batches hold requests of like length."""
        texts = [self._text(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: len(texts[i]))
        outputs: list[Output] = [Output()] * len(requests)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            for i, output in zip(
                chunk, self._batch([texts[i] for i in chunk], [requests[i] for i in chunk], settings), strict=True
            ):
                outputs[i] = output
        return outputs

    def _text(self, request: Request) -> str:
        messages = request.messages
        if request.images:
            *before, last = messages
            parts = [{"type": "image"}] * len(request.images) + [{"type": "text", "text": last["content"]}]
            messages = [*before, {**last, "content": parts}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _batch(self, texts: list[str], requests: list[Request], settings: Settings) -> list[Output]:
        import torch

        images = [open_image(image) for request in requests for image in request.images]
        inputs = self.processor(
            text=texts, padding=True, padding_side="left", return_tensors="pt", **({"images": images} if images else {})
        ).to(self.model.device)
        sampling = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=settings.max_tokens,
                repetition_penalty=settings.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )[:, inputs["input_ids"].size(1) :]  # (b, T)
        kept = (ids != self.tokenizer.pad_token_id).sum(dim=1).tolist()
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Output(text, p, n) for text, p, n in zip(decoded, prompts, kept, strict=True)]


def open_image(image):
    """A path or an image, as RGB."""
    from PIL import Image

    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Running rows


def run(rows: Iterable[Row], engine, settings: Settings, in_flight: int = 512) -> Iterator[tuple[int, Row]]:
    """Yield (index, result) as rows finish. `in_flight` rows are under way at once; each batch takes every request
    that is ready, whichever round its row is in."""
    waiting = enumerate(rows)
    active: dict[int, tuple[Row, Solver, Request]] = {}
    while True:
        for index, row in waiting:
            solver = SOLVERS[settings.mode](row, settings)
            active[index] = (row, solver, next(solver))
            if len(active) >= in_flight:
                break
        if not active:
            return
        ready = list(active)
        outputs = engine.generate([active[i][2] for i in ready], settings)
        for index, output in zip(ready, outputs, strict=True):
            row, solver, _ = active.pop(index)
            try:
                active[index] = (row, solver, solver.send(output))
            except StopIteration as finished:
                yield index, finished.value
            except RequestFailed as failure:
                yield index, {**_common(row, "", _Tokens()), "error": str(failure)}


def evaluate(rows: list[Row], engine, settings: Settings) -> list[Row]:
    """Results of `rows`, in their order. For notebooks and scripts; nothing is written."""
    results: list[Row | None] = [None] * len(rows)
    for index, result in run(rows, engine, settings):
        results[index] = result
    return results


def read_benchmark(path: str, mode: str, image_root: str | None = None) -> list[Row]:
    """The rows of a benchmark file (JSON list or JSONL), image paths made absolute.

    Raises BadInput for a missing file, a row without a field its mode needs, or an image that is not there.
    """
    file = Path(path)
    if not file.exists():
        raise BadInput(f"{path}: no such file")
    text = file.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines() if line] if file.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path}: expected {'one JSON object a line' if file.suffix == '.jsonl' else 'a JSON list'}: {error}"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path}: expected a list of rows")
    root = Path(image_root) if image_root else file.parent
    for i, row in enumerate(rows):
        where = f"{path}: row {i}"
        wanted = ["problem"]
        if mode == "judge":
            wanted += ["response", "label"] if "response" in row else ["chosen", "rejected"]
        else:
            wanted += ["answer"]
        for field in wanted:
            if row.get(field) in (None, "", []):
                raise BadInput(f"{where}: field {field}: expected a value for mode {mode}, got {row.get(field)!r}")
        if "response" in row and _label(row["label"]) not in ("Yes", "No"):
            raise BadInput(f"{where}: field label: expected Yes, No, true or false, got {row['label']!r}")
        if row.get("image_path"):
            image = Path(row["image_path"])
            image = image if image.is_absolute() else root / image
            if not image.exists():
                raise BadInput(f"{where}: field image_path: no such file {image}")
            row["image_path"] = str(image)
    return rows


def run_to_file(rows: list[Row], engine, settings: Settings, output: Path) -> list[Row]:
    """Evaluate what `output` does not hold yet; append each row as it finishes, then write the final JSON atomically.

    Raises BadInput if the file was made with other settings.
    """
    from tqdm.auto import tqdm

    part = output.with_name(output.name + ".part")
    header = json.loads(json.dumps({"settings": asdict(settings), "rows": len(rows)}))
    done: dict[int, Row] = {}
    if part.exists():
        lines = part.read_text(encoding="utf-8").split("\n")
        made = json.loads(lines[0])
        if made != header:
            changed = [k for k in header["settings"] if made["settings"].get(k) != header["settings"][k]] or ["rows"]
            raise BadInput(f"{part}: made with another {', '.join(changed)}; give another --output or remove it")
        for line in lines[1:-1]:  # what follows the last newline was cut off while being written
            entry = json.loads(line)
            if entry["result"]["error"] is None:
                done[entry["index"]] = entry["result"]
        kept = [json.dumps(header)] + [json.dumps({"index": i, "result": r}) for i, r in done.items()]
        write_atomically(part, "\n".join(kept) + "\n")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(part, json.dumps(header) + "\n")

    todo = [i for i in range(len(rows)) if i not in done]
    with open(part, "a", encoding="utf-8") as log, tqdm(total=len(rows), initial=len(done), desc=settings.mode) as bar:
        for k, result in run((rows[i] for i in todo), engine, settings):
            done[todo[k]] = result
            log.write(json.dumps({"index": todo[k], "result": result}) + "\n")
            log.flush()
            bar.update()
    results = [done[i] for i in range(len(rows))]
    write_atomically(output, json.dumps(results, ensure_ascii=False, indent=1))
    return results


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--benchmark", required=True, nargs="+", help="JSON or JSONL files")
    parser.add_argument("--mode", choices=MODES, default="answer")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--engine", choices=("auto", "transformers"), default="auto")
    parser.add_argument("--max_tokens", type=int, default=2048)
    parser.add_argument("--max_rounds", type=int, default=2, help="tts: reflections at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--judge_source", choices=("cot", "answer"), default="cot", help="what a judge sees")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--image_root", help="folder that image paths are relative to (default: the benchmark's)")
    parser.add_argument("--limit", type=int, help="rows at most, of each benchmark")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = Settings(
        model=args.model,
        mode=args.mode,
        benchmark=tuple(args.benchmark),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        max_rounds=args.max_rounds,
        judge_source=args.judge_source,
        seed=args.seed,
    )
    try:
        rows = [
            row for path in args.benchmark for row in read_benchmark(path, args.mode, args.image_root)[: args.limit]
        ]
        from transformers import set_seed

        set_seed(args.seed)
        engine = TransformersEngine(args.model, batch_size=args.batch_size)
        results = run_to_file(rows, engine, settings, args.output)
    except (BadInput, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    failed = sum(result["error"] is not None for result in results)
    print(f"{len(results)} rows, {failed} failed; python calculate_acc.py --result_path {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
