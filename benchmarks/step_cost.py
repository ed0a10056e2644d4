"""What a step costs: its seconds by part, for GRPO and for SPARK at several ratios, by transformers and by vLLM.

    python -m benchmarks.step_cost [--ratios 0 0.25 1 2] [--engines transformers vllm] [--steps 12]

The demo's model and task, with the same number of policy rollouts in every setting. The settings take turns, so that
other work on the machine slows all of them alike; medians over the steps after the first three. The same command runs
on a GPU. Also says how much of the trained rows is padding and how many rows are left out.
Writes benchmarks/results/step_cost.json, with every step's row.
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

RESULTS = record.RESULTS / "step_cost.json"


def work(engine: str, ratio: float, drop: bool, steps: int, batch: int, start: str) -> list[dict]:
    """One setting in this process: the rows of its steps."""
    import torch
    from transformers import AutoProcessor

    import verify
    from benchmarks.clock import TimedTrainer
    from data.read import read_dataset
    from train_spark import SparkConfig

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = SparkConfig(
            folder,
            per_device_train_batch_size=batch,
            num_generations=8,
            recycle_ratio=ratio,
            recycle_pairwise_prob=0.4,
            drop_zero_advantage=drop,
            max_prompt_length=256,
            max_completion_length=48,
            max_steps=steps,
            learning_rate=1.2e-4,
            lr_scheduler_type="constant",
            beta=0.0,
            use_vllm=engine == "vllm",
            vllm_gpu_memory_utilization=0.3,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not gpu,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=0,
            disable_tqdm=True,
        )
        processor = AutoProcessor.from_pretrained(start, padding_side="left")
        verify.warm_up()  # as train_spark.py does: a worker's start is no step's
        trainer = TimedTrainer(start, args=args, train_dataset=read_dataset("digits"), processing_class=processor)
        padding = []
        cut = trainer._passes

        def measured(union, n_policy):
            micro_steps = cut(union, n_policy)
            masks = [
                torch.cat([part["batch"]["prompt_mask"], part["batch"]["completion_mask"]], 1)
                for passes in micro_steps
                for part in passes
            ]
            padding.append(1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))
            return micro_steps

        trainer._passes = measured
        trainer.train()
    if padding:
        for row, share in zip(trainer.steps, padding, strict=True):
            row["padding"] = share
    return trainer.steps


def summary(engine: str, ratio: float, drop: bool, rows: list[dict]) -> dict:
    """Medians of a setting's steps, and each part's share of their seconds."""
    whole = sum(row["whole"] for row in rows)
    return {
        "engine": engine,
        "recycle_ratio": ratio,
        "drop_zero_advantage": drop,
        "seconds": statistics.median(row["whole"] for row in rows),
        "seconds_a_rollout": statistics.median(row["whole"] / row["rollouts"] for row in rows),
        "seconds_a_token": statistics.median(row["whole"] / row["tokens"] for row in rows),
        "trained_share": statistics.fmean(row["trained_rows"] / row["rollouts"] for row in rows),
        "padding": statistics.fmean(row["padding"] for row in rows) if "padding" in rows[0] else None,
        "parts": {part: sum(row["seconds"][part] for row in rows) / whole for part in rows[0]["seconds"]},
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0, 0.25, 1, 2])
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], choices=("transformers", "vllm"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128, help="policy rollouts of a step")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each setting takes")
    parser.add_argument("--model", default="models/digits", help="runs/demo/spark: late in training")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker)))
        return

    settings = [(engine, ratio, drop) for engine in args.engines for ratio in args.ratios for drop in (False, True)]
    runs = {setting: [] for setting in settings}
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for _ in range(args.rounds):
        for setting in settings:
            worker = json.dumps([*setting, args.steps, args.batch, args.model])
            command = [sys.executable, "-m", "benchmarks.step_cost", "--worker", worker]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            runs[setting] += json.loads(done.stdout.splitlines()[-1])[3:]
    table = [summary(*setting, rows) for setting, rows in runs.items()]
    for row in table:
        plain = next(other for other in table if other["engine"] == row["engine"])
        row |= {f"{unit}_to_grpo": row[unit] / plain[unit] for unit in ("seconds_a_rollout", "seconds_a_token")}
        dropping = ", rows without gradient left out" if row["drop_zero_advantage"] else ""
        print(f"\n{row['engine']}, ratio {row['recycle_ratio']:g}{dropping}: {row['seconds']:.2f} s a step")
        rollout, token = row["seconds_a_rollout_to_grpo"], row["seconds_a_token_to_grpo"]
        print(f"    {rollout:.2f} x GRPO's a rollout, {token:.2f} a token")
        padding = "" if row["padding"] is None else f", {row['padding']:.0%} of its tokens padding"
        print(f"    trained on {row['trained_share']:.0%} of the rows{padding}")
        shares = sorted(row["parts"].items(), key=lambda part: -part[1])
        print("    " + ", ".join(f"{part} {share:.1%}" for part, share in shares if share > 0.0005))
    rows = [{"engine": e, "recycle_ratio": r, "drop": d, **row} for (e, r, d), rows in runs.items() for row in rows]
    record.write(args.output, indent=None, table=table, rows=rows)


if __name__ == "__main__":
    main()
