"""Keep the questions that are neither too easy nor too hard for a model: how the paper's 24k "hard" set was made.

    python -m data.filter --model Qwen/Qwen2.5-VL-7B-Instruct --dataset train.json --image_root images \\
        --n 8 --low 0.1 --high 0.7 --output hard.parquet
    python train_spark.py --config ... --dataset hard.parquet

Samples n answers for each question with vLLM, scores them with the verifier, and keeps the rows whose pass rate is from
--low to --high, both included. By default, 0 and 1 are left out: such a group teaches GRPO nothing. Each pass rate is
written to OUTPUT.rates.jsonl as it is known; running the same command again goes on where it stopped, and new bounds
need no new samples. On one GPU it is the cost of generating n answers a question; on a CPU, for small models only.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.check import batches
from data.read import add_source_flags
from data.rows import BadInput, BadRow
from prompts import PROMPT_SUFFIX

CHUNK = 256  # questions whose rates are written at once


@dataclass(frozen=True)
class Settings:
    """What decides a pass rate. Rates made with other settings are not continued."""

    model: str
    dataset: str
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    min_pixels: int | None
    max_pixels: int | None


class Rates:
    """The pass rates known so far, in a JSON-lines file that survives being cut off.

    The first line holds the settings and what identifies the questions; each other one `row`, `right` and `scored`
    (answers that the verifier could decide). Raises BadInput for a file with rates of other settings or questions.
    """

    def __init__(self, path: Path, settings: Settings, questions: str):
        self.path = path
        self.known: dict[int, dict[str, int]] = {}
        header = {"settings": asdict(settings), "questions": questions}
        lines = (
            path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        )  # the last one may be cut off
        if lines:
            try:
                made = json.loads(lines[0])
                found = [json.loads(line) for line in lines[1:]]
                changed = [k for k in header["settings"] if made["settings"].get(k) != header["settings"][k]]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f"{path}: expected pass rates written by data.filter; remove it") from None
            if found and (changed or made.get("questions") != questions):
                raise BadInput(
                    f"{path}: made with another {', '.join(changed) or 'dataset'}; give another --output or remove it"
                )
            self.known = {rate["row"]: rate for rate in found}
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(
            "".join(json.dumps(row) + "\n" for row in (header, *self.known.values())), encoding="utf-8"
        )
        os.replace(temporary, path)

    def add(self, rates: Iterable[dict[str, int]]) -> None:
        """Append rates, and have them on the disk before returning."""
        with open(self.path, "a", encoding="utf-8") as file:
            for rate in rates:
                self.known[rate["row"]] = rate
                file.write(json.dumps(rate) + "\n")
            file.flush()
            os.fsync(file.fileno())


def questions_of(dataset) -> str:
    """Identifies the questions and golds, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.with_format(None).select_columns(["prompt", "solution"]).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def kept_rows(known: dict[int, dict[str, int]], low: float, high: float) -> tuple[list[int], list[int], list[int]]:
    """(rows with a pass rate from `low` to `high`, rows below or above, rows no answer of which could be scored)."""
    kept, outside, unscorable = [], [], []
    for row, rate in sorted(known.items()):
        if not rate["scored"]:
            unscorable.append(row)
        else:
            (kept if low <= rate["right"] / rate["scored"] <= high else outside).append(row)
    return kept, outside, unscorable


class Sampler:
    """vLLM with the model's own chat template: n answers a question."""

    def __init__(self, settings: Settings, **engine: Any):
        from torch import cuda
        from transformers import AutoProcessor
        from vllm import LLM, SamplingParams

        if not cuda.is_available():  # vLLM 0.31 can't take a request's seed back where it cuts the prompt in two
            engine["enable_chunked_prefill"] = False
        self.processor = AutoProcessor.from_pretrained(settings.model)
        self.llm = LLM(settings.model, seed=settings.seed, **engine)
        self.sampling = SamplingParams(
            n=settings.n,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            seed=settings.seed,  # of each request: a row's samples do not depend on its neighbours
        )

    def answers(self, rows: list[dict[str, Any]]) -> list[list[str]]:
        """(len(rows), n) completions."""
        requests = [self._request(row["prompt"], row.get("images") or []) for row in rows]
        return [
            [sample.text for sample in output.outputs]
            for output in self.llm.generate(requests, self.sampling, use_tqdm=False)
        ]

    def _request(self, prompt: list[dict[str, Any]], images: list) -> dict[str, Any]:
        from trl.data_utils import prepare_multimodal_messages

        messages = prepare_multimodal_messages(prompt, images=images) if images else prompt
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}


def measure(dataset, rates: Rates, sampler, chunk: int = CHUNK) -> None:
    """Fill in the pass rates that are not known yet. `sampler.answers(rows)` gives n completions for each row."""
    from tqdm.auto import tqdm

    from verify import extract_boxed, verify_many

    todo = [i for i in range(len(dataset)) if i not in rates.known]
    sources = dataset.with_format(None)["source"]
    with tqdm(total=len(dataset), initial=len(rates.known), desc="pass rates", unit=" rows") as bar:
        for numbers in batches(todo, chunk):
            rows = [dataset[i] for i in numbers]
            completions = sampler.answers(rows)
            pairs = [
                (extract_boxed(text), row["solution"])
                for row, texts in zip(rows, completions, strict=True)
                for text in texts
            ]
            verdicts = iter(verify_many(pairs))
            found = []
            for number, row, texts in zip(numbers, rows, completions, strict=True):
                own = [next(verdicts) for _ in texts]
                if row["source"] != sources[number]:  # its image broke; what was answered is the row in its place
                    own = []
                found.append({"row": number, "right": own.count(True), "scored": len(own) - own.count(None)})
            rates.add(found)
            bar.update(len(numbers))


def _model(args: argparse.Namespace) -> tuple[Any, int]:
    """(the model's processor, tokens that its longest prompt may have). Raises BadInput."""
    from transformers import AutoConfig, AutoProcessor

    try:
        processor, config = (auto.from_pretrained(args.model) for auto in (AutoProcessor, AutoConfig))
    except (OSError, ValueError) as error:
        raise BadInput(f"model: {error}") from None
    context = args.max_model_len or config.get_text_config().max_position_embeddings
    return processor, context - 1  # an answer has at least one


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data.filter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--dataset", required=True, help="a file, a folder or a hub name")
    parser.add_argument("--output", type=Path, required=True, help="the kept rows, as Parquet")
    parser.add_argument("--n", type=int, default=8, help="answers a question")
    parser.add_argument("--low", type=float, help="lowest pass rate to keep (default: more than 0)")
    parser.add_argument("--high", type=float, help="highest pass rate to keep (default: less than 1)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_tokens", type=int, default=2048)
    parser.add_argument("--max_model_len", type=int, help="tokens of prompt and answer (default: the model's)")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.9)
    parser.add_argument("--enforce_eager", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    add_source_flags(parser)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    args = parser.parse_args(arguments)
    low, high = args.low if args.low is not None else 1e-9, args.high if args.high is not None else 1 - 1e-9
    if args.n < 1 or not 0 <= low <= high <= 1:
        parser.error(f"expected n >= 1 and 0 <= low <= high <= 1, got {args.n}, {args.low} and {args.high}")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})

    from data.lengths import image_factor, too_long
    from data.read import read_dataset, summary

    bad_rows: list[BadRow] = []
    try:
        processor, longest = _model(args)
        dataset = read_dataset(
            args.dataset,
            args.prompt_column,
            args.solution_column,
            args.image_column,
            image_root=args.image_root,
            suffix=PROMPT_SUFFIX,
            allow_remote_images=args.allow_remote_images,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
            image_factor=image_factor(processor),
            config=args.dataset_config,
            split=args.dataset_split,
            answer_kind=args.answer_kind,
            fits=too_long(longest, processor, "max_model_len"),
            bad_rows=bad_rows,
            checked=math.inf,  # each of them is used
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        rates = Rates(args.output.with_name(args.output.name + ".rates.jsonl"), settings, questions_of(dataset))
        if bad_rows:
            print(summary(bad_rows))
        if len(rates.known) < len(dataset):
            if importlib.util.find_spec("vllm") is None:
                raise BadInput("expected vLLM to be installed (requirements.txt)")
            engine = ("max_model_len", "enforce_eager", "tensor_parallel_size", "gpu_memory_utilization")
            measure(dataset, rates, Sampler(settings, **{name: getattr(args, name) for name in engine}))
    except (BadInput, OSError) as error:
        print(f"data.filter: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    kept, outside, unscorable = kept_rows(rates.known, low, high)
    print(f"{len(kept):,} rows kept, {len(outside):,} outside the bounds, {len(unscorable):,} with no scorable answer")
    rate = [rates.known[i]["right"] / rates.known[i]["scored"] for i in kept]
    temporary = args.output.with_name(args.output.name + ".tmp")
    dataset.select(kept).add_column("pass_rate", rate).to_parquet(temporary)
    os.replace(temporary, args.output)
    print(f"{args.output}: --dataset {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
