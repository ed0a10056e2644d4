"""What vLLM's caches save of recycled prompts: they begin with the question and its image, which the engine has seen.

    python -m benchmarks.prefix_cache [--model DIR_OR_NAME] [--groups 16] [--size 448]

One engine rolls out the policy prompts, then judge and reflection prompts about made-up rollouts of `--words` words,
with the question first, as here, and with the instruction first, as in the paper's release. By vLLM's own counters: the
share of the recycled prompts' image and question tokens that came from the prefix cache, and the share of their images
that came from the cache of processed ones; and the seconds of their prefill, beside those with empty caches. Blocks of
32 tokens, the smallest on a CPU (16 on a GPU). Writes benchmarks/results/prefix_cache.json.
"""

import os
import statistics
import time
from itertools import takewhile
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "prefix_cache.json"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="models/digits")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--size", type=int, default=448, help="pixels a side of the images")
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in process, as when training
    import torch
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from data.digits import digit_rows
    from data.rows import question_key
    from recycle import Group, RecycleConfig, Rollout, recycle

    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    llm = LLM(args.model, max_model_len=1024, block_size=32, disable_log_stats=False)
    processor = AutoProcessor.from_pretrained(args.model)
    rows = [row for row in digit_rows("train", 4 * args.groups, 0) if row["images"]][: args.groups]
    for row in rows:
        row["images"] = [row["images"][0].resize((args.size, args.size))]
    rollouts = tuple(Rollout(f"{'so ' * args.words}\\boxed{{{n}}}", n, n == "7") for n in ("7", "8"))
    groups = [Group(question_key(row), row["prompt"], rollouts, row) for row in rows]
    items, _ = recycle(groups, 0, RecycleConfig(recycle_ratio=3.0))

    def tokens(content: list[dict]) -> list[int]:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return processor.tokenizer(text)["input_ids"]

    def request(row: dict, content: list[dict]) -> dict:
        return {"prompt_token_ids": tokens(content), "multi_modal_data": {"image": row["images"][0]}}

    def counters() -> dict[str, int]:
        return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}

    image = {"type": "image"}
    policy = [request(row, [image, {"type": "text", "text": row["prompt"][-1]["content"]}]) for row in rows]
    orders = {"question first": [], "instruction first": []}
    repeated = 0  # tokens of the recycled prompts that are the question's and its image's
    merge = processor.image_processor.merge_size**2
    for item in items:
        text = item.prompt[-1]["content"]
        question = item.group.prompt[-1]["content"].removesuffix(RecycleConfig().prompt_suffix)
        instruction = text.removeprefix(question).strip()
        orders["question first"].append(request(item.group.row, [image, {"type": "text", "text": text}]))
        parts = [{"type": "text", "text": instruction + "\n\n"}, image, {"type": "text", "text": question}]
        orders["instruction first"].append(request(item.group.row, parts))
        grid = processor.image_processor(item.group.row["images"], return_tensors="pt")["image_grid_thw"]
        start = tokens([image, {"type": "text", "text": question}])
        both = zip(start, tokens([image, {"type": "text", "text": text}]), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        repeated += shared - 1 + int(grid.prod()) // merge  # an image is one token in the template

    def empty() -> None:
        llm.reset_prefix_cache()
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()

    measured = []
    for _ in range(args.repeats):
        for order, prompts in orders.items():
            for warm in (True, False):
                empty()
                if warm:
                    llm.generate(policy, SamplingParams(max_tokens=8, temperature=1.0), use_tqdm=False)
                before = counters()
                start = time.perf_counter()
                llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
                seconds = time.perf_counter() - start
                counted = {name: value - before.get(name, 0) for name, value in counters().items()}
                measured.append({"order": order, "after_policy": warm, "seconds": seconds, **{
                    name: counted.get(f"vllm:{name}")
                    for name in ("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits")
                }})  # fmt: skip

    table = []
    for order in orders:
        warm = [row for row in measured if row["order"] == order and row["after_policy"]]
        cold = [row for row in measured if row["order"] == order and not row["after_policy"]]
        hits = statistics.median(row["prefix_cache_hits"] for row in warm)
        row = {
            "order": order,
            "from_prefix_cache": hits / repeated,
            "images_from_cache": statistics.median(r["mm_cache_hits"] / max(r["mm_cache_queries"], 1) for r in warm),
            "prefill_seconds": statistics.median(row["seconds"] for row in warm),
            "prefill_seconds_with_empty_caches": statistics.median(row["seconds"] for row in cold),
        }
        table.append(row)
        print(f"{order}: {row['from_prefix_cache']:.0%} of the question's and image's tokens from the prefix cache, "
              f"{row['images_from_cache']:.0%} of the images; prefill {row['prefill_seconds']:.2f} s, "
              f"{row['prefill_seconds_with_empty_caches']:.2f} s with empty caches")  # fmt: skip
    record.write(args.output, prompts=len(items), repeated_tokens=repeated, table=table, rows=measured)


if __name__ == "__main__":
    main()
