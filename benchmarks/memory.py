"""What recycling costs in memory: the peak of a training run beside plain GRPO with the same batch size.

    python -m benchmarks.memory [--ratios 0 1 2] [--steps 4] [--batch 128]

The demo's model and task, each run in a process of its own. Peak: on a GPU what torch allocated at most, elsewhere the
process's resident memory (with an allocator that gives freed tensors back at once), both less what was there before
training. Three runs each, the median counts (a quarter of an hour; --repeats 1: five minutes).
Writes benchmarks/results/memory.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"


def resident(field: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most since the process began or `forget_peak` was called."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(ratio: float, micro_steps: int | None, steps: int, batch: int) -> dict:
    import torch
    from transformers import AutoProcessor

    from data.read import read_dataset
    from data.tiny_model import OUTPUT
    from train_spark import SparkConfig, SparkTrainer

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = SparkConfig(
            folder,
            per_device_train_batch_size=batch,
            num_generations=8,
            recycle_ratio=ratio,
            recycle_micro_steps=micro_steps,
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
        processor = AutoProcessor.from_pretrained(OUTPUT, padding_side="left")
        data = read_dataset("digits").remove_columns("task")
        trainer = SparkTrainer(str(OUTPUT), args=args, train_dataset=data, processing_class=processor)
        before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
        if not gpu:
            forget_peak()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
    rows = [h.get("recycle/rows", 0.0) for h in trainer.state.log_history if "loss" in h]
    return {"recycle_ratio": ratio, "recycle_micro_steps": micro_steps, "peak_bytes": peak - before, "recycled": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker, args.steps, args.batch)))
        return

    # With as many passes as plain GRPO has (one), the union is what it is; the default cuts it.
    settings = [(ratio, passes) for ratio in args.ratios for passes in ((None, 1) if ratio else (None,))]
    rows = []
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: larger blocks are the system's as soon as freed
    for _ in range(args.repeats):
        for setting in settings:
            command = [sys.executable, "-m", "benchmarks.memory", "--worker", json.dumps(setting)]
            command += ["--steps", str(args.steps), "--batch", str(args.batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = []
    for ratio, passes in settings:
        peaks = [r["peak_bytes"] for r in rows if (r["recycle_ratio"], r["recycle_micro_steps"]) == (ratio, passes)]
        table.append({"recycle_ratio": ratio, "recycle_micro_steps": passes, "peak_bytes": statistics.median(peaks)})
    plain = table[0]["peak_bytes"]
    for row in table:
        row["to_plain"] = row["peak_bytes"] / plain
        passes = row["recycle_micro_steps"] or "default"
        print(
            f"recycle_ratio {row['recycle_ratio']}, recycle_micro_steps {passes}: {row['peak_bytes'] / 2**20:,.0f} MiB"
        )
        print(f"    {row['to_plain']:.2f} x plain GRPO")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "command": f"python -m benchmarks.memory --steps {args.steps} --batch {args.batch} --repeats {args.repeats}",
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "table": table,
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
