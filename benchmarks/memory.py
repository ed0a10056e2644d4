"""What recycling costs in memory: the peak of a training run beside plain GRPO with the same batch size.

    python -m benchmarks.memory [--ratios 0 1 2] [--sides 28 448] [--steps 3] [--batch 128]

The demo's model and task, images enlarged to so many pixels a side (448: 1,024 patches, so that pixels outweigh the
text), each run in a process of its own. Peak: on a GPU what torch allocated at most, elsewhere the process's resident
memory (with an allocator that gives freed tensors back at once), both less what was there before training. Every row is
trained on (`drop_zero_advantage` off), the worst case. The median of the repeats counts.
Writes benchmarks/results/memory.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "memory.json"


def resident(field: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most since the process began or `forget_peak` was called."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(ratio: float, side: int, steps: int, batch: int) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoProcessor

    from data.digits import digit_rows
    from models.make_digits import OUTPUT
    from train_spark import SparkConfig, SparkTrainer

    gpu = torch.cuda.is_available()
    rows = [row for row in digit_rows("train", 8 * batch) if row["images"]][:batch]
    for row in rows:
        row["images"] = [image.resize((side, side)) for image in row["images"]]
    processor = AutoProcessor.from_pretrained(OUTPUT, padding_side="left")
    processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": side**2}
    with tempfile.TemporaryDirectory() as folder:
        args = SparkConfig(
            folder,
            per_device_train_batch_size=batch // 8,
            gradient_accumulation_steps=8,
            num_generations=8,
            recycle_ratio=ratio,
            drop_zero_advantage=False,
            max_completion_length=48,
            max_steps=steps,
            learning_rate=1e-4,
            beta=0.0,
            use_vllm=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not gpu,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = SparkTrainer(
            str(OUTPUT), args=args, train_dataset=Dataset.from_list(rows), processing_class=processor
        )
        before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
        if not gpu:
            forget_peak()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
    recycled = [h.get("recycle/rows", 0.0) for h in trainer.state.log_history if "loss" in h]
    return {"recycle_ratio": ratio, "side": side, "peak_bytes": peak - before, "recycled": recycled}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=[28, 448])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128, help="policy rollouts of a step, in 8 micro-steps")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker, args.steps, args.batch)))
        return

    settings = [(ratio, side) for side in args.sides for ratio in args.ratios]
    rows = []
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: larger blocks are the system's as soon as freed
    for _ in range(args.repeats):
        for setting in settings:
            command = [sys.executable, "-m", "benchmarks.memory", "--worker", json.dumps(setting)]
            command += ["--steps", str(args.steps), "--batch", str(args.batch)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = []
    for ratio, side in settings:
        peaks = [r["peak_bytes"] for r in rows if (r["recycle_ratio"], r["side"]) == (ratio, side)]
        table.append({"recycle_ratio": ratio, "side": side, "peak_bytes": statistics.median(peaks)})
    for row in table:
        plain = next(other for other in table if other["side"] == row["side"])
        row["to_plain"] = row["peak_bytes"] / plain["peak_bytes"]
        peak = f"{row['peak_bytes'] / 2**20:,.0f} MiB, {row['to_plain']:.2f} x plain GRPO"
        print(f"images of {row['side']} pixels a side, recycle_ratio {row['recycle_ratio']}: {peak}")
    record.write(args.output, table=table, rows=rows)


if __name__ == "__main__":
    main()
