"""Is a group of G rollouts quicker as one request (n=G) than as G requests? With images, on the colocated engine.

    python -m benchmarks.grouped_rollouts [--model DIR_OR_NAME] [--groups 16] [--generations 8] [--size 448]

The prompts of one generation batch go to one vLLM engine both ways in turns, five times each; prefix cache and image
caches are emptied before each, as after a weight sync. Writes benchmarks/results/grouped_rollouts.json.
"""

import os
import statistics
import time
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "grouped_rollouts.json"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="models/digits")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--size", type=int, default=448, help="pixels a side of the images")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in process, as when training
    import torch
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from data.digits import digit_rows

    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    llm = LLM(args.model, max_model_len=1024, max_num_batched_tokens=4096, max_num_seqs=args.groups * args.generations)
    processor = AutoProcessor.from_pretrained(args.model)
    rows = [r for r in digit_rows("train", 4 * args.groups, 0) if r["images"]][: args.groups]
    images = [r["images"][0].resize((args.size, args.size)) for r in rows]
    prompts = []
    for row, image in zip(rows, images, strict=True):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": row["prompt"][-1]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        prompts.append(
            {"prompt_token_ids": processor.tokenizer(text)["input_ids"], "multi_modal_data": {"image": image}}
        )

    def generate(grouped: bool) -> float:
        llm.reset_prefix_cache()
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        requests = prompts if grouped else [p for p in prompts for _ in range(args.generations)]
        sampling = SamplingParams(
            n=args.generations if grouped else 1,
            temperature=1.0,
            max_tokens=args.max_tokens,
            ignore_eos=True,
            logprobs=0,
        )
        start = time.perf_counter()
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert sum(len(o.outputs) for o in outputs) == args.groups * args.generations
        return seconds

    generate(True), generate(False)  # warm
    rows = [
        {"grouped": grouped, "seconds": generate(grouped)} for _ in range(args.repeats) for grouped in (True, False)
    ]
    seconds = {g: statistics.median(r["seconds"] for r in rows if r["grouped"] is g) for g in (True, False)}
    print(f"one request a group: {seconds[True]:.2f} s; one a rollout: {seconds[False]:.2f} s")
    print(f"ratio {seconds[False] / seconds[True]:.2f}")
    ratio = seconds[False] / seconds[True]
    record.write(args.output, model=args.model, ratio=ratio, rows=rows)


if __name__ == "__main__":
    main()
