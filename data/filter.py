"""Keep the questions that are neither too easy nor too hard for a model: how the paper's 24k "hard" set was made.

    python -m data.filter --model Qwen/Qwen2.5-VL-7B-Instruct --dataset train.json --image_root images \\
        --n 8 --low 0.1 --high 0.7 --output hard.parquet
    python train_spark.py --config ... --dataset hard.parquet

Samples n answers for each question with vLLM, scores them with the verifier, and keeps the rows whose pass rate is from
--low to --high, both included. By default, rates of 0 and 1 are left out: such a group teaches GRPO nothing. Each pass
rate is written to OUTPUT.rates.jsonl as it is known; running the same command again resumes where it stopped, and new
bounds need no new samples. On one GPU its cost is generating n answers per question; on a CPU, for small models only.
"""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.arguments import DataSettings
from data.cli import Parser, flag, progress_bar, refuse
from data.progress import PartFile
from data.rows import BadInput, BadRow
from data.table import batched
from engines import Request, prompt_text, whole_prompts
from prompts import PROMPT_SUFFIX

CHUNK = 256  # questions whose rates are written at once


@dataclass(frozen=True)
class SamplingSettings:
    """What decides a pass rate, besides the data. Rates made with other settings are not continued."""

    model: str = flag(help="a folder or a hub name")
    dataset: str = flag(help="a file, a folder or a hub name")
    n: int = flag(8, "answers per question", least=1)
    temperature: float = flag(1.0, least=0.01)
    top_p: float = flag(1.0, least=0.01)
    max_tokens: int = flag(2048, least=1)
    prompt_suffix: str = flag(PROMPT_SUFFIX, "what questions end with; as in training")
    seed: int = flag(0)


@dataclass(frozen=True)
class EngineSettings:
    """vLLM's."""

    max_model_len: int | None = flag(None, "tokens of prompt and answer (default: the model's)", least=1)
    tensor_parallel_size: int = flag(1, least=1)
    gpu_memory_utilization: float = flag(0.9, least=0)
    enforce_eager: bool = flag(False)


def rates_file(path: Path, settings: SamplingSettings, dataset, data: DataSettings) -> PartFile:
    """The pass rates known so far: `right`, and `scored` (answers that the verifier could decide), of each row.

    Raises BadInput for a file with rates of other settings or questions.
    """
    pixels = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    header = {**asdict(settings), **pixels, "dataset contents": questions_of(dataset)}
    return PartFile(path, header, fields=("right", "scored"))


def questions_of(dataset) -> str:
    """Identifies the questions and golds, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.with_format(None).select_columns(["prompt", "solution"]).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def kept_rows(rates: dict[int, dict[str, int]], low: float, high: float) -> tuple[list[int], list[int], list[int]]:
    """(rows with a pass rate from `low` to `high`, rows below or above, rows no answer of which could be scored)."""
    kept, outside, unscorable = [], [], []
    for row, rate in sorted(rates.items()):
        if not rate["scored"]:
            unscorable.append(row)
        elif low <= rate["right"] / rate["scored"] <= high:
            kept.append(row)
        else:
            outside.append(row)
    return kept, outside, unscorable


class Sampler:
    """vLLM with the model's own chat template: n answers a question."""

    def __init__(self, settings: SamplingSettings, engine: dict[str, Any]):
        from transformers import AutoProcessor, ProcessorMixin
        from vllm import LLM, SamplingParams

        self.processor = AutoProcessor.from_pretrained(settings.model)
        self.tokenizer = self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor
        self.llm = LLM(settings.model, seed=settings.seed, **whole_prompts(engine))
        drawn = {
            name: value for name, value in asdict(settings).items() if name not in ("model", "dataset", "prompt_suffix")
        }
        self.sampling = SamplingParams(**drawn)  # each request has the seed: its samples do not depend on others

    def answers(self, rows: list[dict[str, Any]]) -> list[list[str]]:
        """(len(rows), n) completions."""
        requests = []
        for row in rows:
            images = row.get("images")
            text = prompt_text(self.processor, Request(row["prompt"], images or ()))
            prompt = {"prompt_token_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
            requests.append({**prompt, **({"multi_modal_data": {"image": images}} if images else {})})
        return [
            [sample.text for sample in output.outputs]
            for output in self.llm.generate(requests, self.sampling, use_tqdm=False)
        ]


def measure(dataset, rates: PartFile, sampler, chunk: int = CHUNK) -> None:
    """Fill in the pass rates that are not known yet. `sampler.answers(rows)` gives n completions for each row."""
    from verify import answer_reward

    todo = [i for i in range(len(dataset)) if i not in rates.done]
    sources = dataset.with_format(None)["source"]
    with progress_bar(len(dataset), len(rates.done), "pass rates") as bar:
        for numbers in batched(todo, chunk):
            rows = [dataset[i] for i in numbers]
            completions = sampler.answers(rows)
            asked = [row for row, texts in zip(rows, completions, strict=True) for _ in texts]
            prompts, solutions = ([row[name] for row in asked] for name in ("prompt", "solution"))
            rewards = iter(answer_reward(prompts, list(itertools.chain(*completions)), solutions))
            results = {}
            for number, row, texts in zip(numbers, rows, completions, strict=True):
                scores = [next(rewards) for _ in texts]
                if row["source"] != sources[number]:  # its image broke; what was answered is the row in its place
                    scores = []
                results[number] = {"right": scores.count(1.0), "scored": len(scores) - scores.count(None)}
            rates.add(results)
            bar.update(len(numbers))
    rates.close()


def _model(name: str, max_model_len: int | None) -> tuple[Any, int]:
    """(the model's processor, tokens that its longest prompt may have). Raises BadInput."""
    from transformers import AutoConfig, AutoProcessor

    try:
        processor, config = (auto.from_pretrained(name) for auto in (AutoProcessor, AutoConfig))
    except (OSError, ValueError) as error:
        raise BadInput(f"model: {error}") from None
    context = max_model_len or config.get_text_config().max_position_embeddings
    return processor, context - 1  # an answer has at least one


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__, prog="data.filter")
    parser.add_argument("--output", type=Path, required=True, help="the kept rows, as Parquet")
    parser.add_argument("--low", type=float, help="lowest pass rate to keep (default: more than 0)")
    parser.add_argument("--high", type=float, help="highest pass rate to keep (default: less than 1)")
    for fields in (SamplingSettings, EngineSettings, DataSettings):
        parser.add_fields(fields)
    args = parser.parse_args(arguments)
    settings, engine, data = (parser.values(args, c) for c in (SamplingSettings, EngineSettings, DataSettings))
    low, high = args.low if args.low is not None else 1e-9, args.high if args.high is not None else 1 - 1e-9
    if data.keep_solution:
        parser.error("--keep_solution: expected none: pass rates are verify.py's, which wants the answer alone")
    if not 0 <= low <= high <= 1:
        parser.error(f"expected 0 <= low <= high <= 1, got {args.low} and {args.high}")

    from data.lengths import image_factor, too_long
    from data.read import bad_rows_summary, read_dataset

    bad_rows: list[BadRow] = []
    try:
        processor, longest = _model(settings.model, engine.max_model_len)
        dataset = read_dataset(
            settings.dataset,
            data,
            suffix=settings.prompt_suffix,
            image_factor=image_factor(processor),
            reject=too_long(longest, processor, "max_model_len"),
            bad_rows=bad_rows,
            checked=math.inf,  # each of them is used
        )
        rates = rates_file(args.output.with_name(args.output.name + ".rates.jsonl"), settings, dataset, data)
        if bad_rows:
            print(bad_rows_summary(bad_rows))
        if len(rates.done) < len(dataset):
            if importlib.util.find_spec("vllm") is None:
                raise BadInput("expected vLLM to be installed (requirements.txt)")
            measure(dataset, rates, Sampler(settings, asdict(engine)))
    except (BadInput, OSError) as error:
        return refuse("data.filter", error)

    kept, outside, unscorable = kept_rows(rates.done, low, high)
    print(f"{len(kept):,} rows kept, {len(outside):,} outside the bounds, {len(unscorable):,} with no scorable answer")
    pass_rates = [rates.done[i]["right"] / rates.done[i]["scored"] for i in kept]
    temporary = args.output.with_name(args.output.name + ".tmp")
    dataset.select(kept).add_column("pass_rate", pass_rates).to_parquet(temporary)
    os.replace(temporary, args.output)
    print(f"{args.output}: --dataset {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
