"""What it saves to encode each image once: seconds and memory of a pass, images of 1,024 patches, forward and backward.

    python -m benchmarks.each_image [--repeats 3] [--rows 8]

A slim Qwen2.5-VL whose vision tower has as large a part of the parameters as the 7B model's (a tenth), a pass of `rows`
rows that show 8, 4, 2 or 1 image, 100 tokens of text each; with every row's image encoded and with each distinct
one once, in turns. Peak: torch's on a GPU, elsewhere the process's resident memory. And what comes before it: the
processor's work on 64 rows that show 8 images of 1,000 x 1,000 pixels. Writes benchmarks/results/each_image.json.
"""

import os
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import MethodType, SimpleNamespace

from benchmarks import record
from benchmarks.memory import forget_peak, resident
from data.cli import Parser

RESULTS = record.RESULTS / "each_image.json"
SIDE = 32  # patches


def slim_model():
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {
        "depth": 6,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_heads": 4,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [2, 5],
    }
    tokens = {
        "image_token_id": 1000,
        "video_token_id": 1001,
        "vision_start_token_id": 1002,
        "vision_end_token_id": 1003,
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def batch(rows: int, images: int, device) -> dict:
    """`rows` rows, which show `images` distinct images."""
    import torch

    drawn = [torch.rand(SIDE**2, 1176) for _ in range(images)]
    image = torch.full((SIDE**2 // 4,), 1000)
    row = torch.cat([torch.tensor([1002]), image, torch.tensor([1003]), torch.arange(100)])
    inputs = {
        "input_ids": row.repeat(rows, 1),
        "attention_mask": torch.ones(rows, len(row), dtype=torch.long),
        "mm_token_type_ids": (row == 1000).long().repeat(rows, 1),
        "pixel_values": torch.cat([drawn[i % images] for i in range(rows)]),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * rows),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def prepared(repeats: int) -> list[dict]:
    """Seconds of the processor for 8 rollouts of 8 questions with an image, as TRL asks it and with equal ones once."""
    import numpy
    import PIL.Image
    from transformers import AutoImageProcessor

    from training.images import processed_once

    processor = SimpleNamespace(image_processor=AutoImageProcessor.from_pretrained("models/digits"))
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 1024 * 1024}
    noise = numpy.random.default_rng(0)
    drawn = [PIL.Image.fromarray(noise.integers(0, 256, (1000, 1000, 3), numpy.uint8)) for _ in range(8)]
    images = [[image.copy()] for image in drawn for _ in range(8)]
    rows = []
    for _ in range(repeats + 1):
        for once in (False, True):
            start = time.perf_counter()
            with processed_once(processor) if once else nullcontext():
                processor.image_processor(images=images, return_tensors="pt")
            rows.append({"rows": 64, "images": 8, "once": once, "seconds": time.perf_counter() - start})
    return rows[2:]


def main() -> None:
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc: larger blocks are the system's as soon as freed
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.each_image", *sys.argv[1:]])
    import torch

    from training.images import each_image_once

    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    model = slim_model()
    vision = sum(weight.numel() for weight in model.model.visual.parameters())
    share = vision / sum(weight.numel() for weight in model.model.language_model.layers.parameters())
    print(f"vision tower: {share:.2f} of the language model's layers")
    images = [args.rows >> i for i in range(args.rows.bit_length())]
    rows = []
    for _ in range(args.repeats + 1):
        for n in images:
            inputs = batch(args.rows, n, model.device)
            for once in (False, True):
                model.model.__dict__.pop("get_image_features", None)
                if once:
                    model.model.get_image_features = MethodType(each_image_once, model.model)
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                else:
                    forget_peak()
                before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
                start = time.perf_counter()
                model(**inputs).logits.square().mean().backward()
                if gpu:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                peak = (torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")) - before
                model.zero_grad()
                rows.append({"images": n, "once": once, "seconds": seconds, "peak_bytes": peak})
    rows = rows[2 * len(images) :]  # the first round warms up
    table = []
    for n in images:
        of = {once: [row for row in rows if (row["images"], row["once"]) == (n, once)] for once in (False, True)}
        ratio = {
            what: statistics.median(r[what] for r in of[True]) / statistics.median(r[what] for r in of[False])
            for what in ("seconds", "peak_bytes")
        }
        table.append({"rows": args.rows, "images": n, **ratio})
        cost = f"{ratio['seconds']:.2f} x the seconds, {ratio['peak_bytes']:.2f} x the memory"
        print(f"{args.rows} rows, {n} images: {cost}")
    preparation = prepared(args.repeats)
    medians = [statistics.median(r["seconds"] for r in preparation if r["once"] is once) for once in (False, True)]
    table.append({"prepared": 64, "images": 8, "seconds": medians[1] / medians[0]})
    print(f"64 rows, 8 images: prepared in {medians[1] / medians[0]:.2f} x the seconds ({medians[0]:.2f})")
    record.write(args.output, vision_share=share, table=table, rows=rows, preparation=preparation)


if __name__ == "__main__":
    main()
