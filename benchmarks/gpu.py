"""What only a GPU can show, in parts of a few minutes, the most telling first; no network is needed.

    python -m benchmarks.gpu [--minutes 8] [--cases CASE ...] [--small]

- smoke: three steps of SPARK with the shipped model in bfloat16, with LoRA, with a colocated engine that stays awake
  or sleeps; losses are finite, how far engine and trainer differ and samples are kept.
- slim: seconds and peak memory of a step beside what `--plan` says, GRPO and SPARK, at real image sizes: a Qwen2.5-VL
  as wide as the 7B one, with few layers and random weights, right and wrong by a coin.

Each case runs in a process of its own and is kept in runs/gpu/CASE.json, a failure as one. The same command goes on
with those that are missing, and ends with status 75 when a case might not fit into what is left of --minutes;
`gpu_smollm2` is next. `--small`: the same on a CPU, in miniature. Writes benchmarks/results/gpu.json.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from benchmarks.gpu_smollm2 import UNFINISHED
from data.cli import Parser

RESULTS = record.RESULTS / "gpu.json"
RUNS = Path("runs/gpu")
LIMIT = 150  # seconds of a case; a longer one is recorded as a failure

ENGINE = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
SMOKE = {
    "smoke/bf16": {},
    "smoke/float32": {"bf16": False},
    "smoke/lora": {"lora": True},
    "smoke/checkpointing": {"gradient_checkpointing": True, "beta": 0.01},
    "smoke/engine": ENGINE,
    "smoke/engine_sleeps": ENGINE | {"vllm_enable_sleep_mode": True},
    "smoke/engine_lora": ENGINE | {"vllm_enable_sleep_mode": True, "lora": True},
}
SLIM = {
    f"slim/{side}_ratio_{ratio}": {"side": side, "recycle_ratio": ratio} for side in (512, 1024) for ratio in (0, 1)
}
CASES = SMOKE | SLIM


def coin(prompts, completions, **columns):
    """Right or wrong by what was written, whatever it is: groups have contrast, and the same text the same reward."""
    from benchmarks.noisy import draw

    return [float(draw(prompt, text) < 0.5) for prompt, text in zip(prompts, completions, strict=True)]


def trained(model, rows, reward, processor, small: bool, lora: bool = False, **settings) -> dict:
    """A few steps: their rows, and samples of the last one."""
    import pyarrow.parquet
    import torch
    from peft import LoraConfig

    from benchmarks.clock import TimedTrainer
    from train_spark import SparkConfig

    with tempfile.TemporaryDirectory() as folder:
        defaults = {"num_generations": 8, "recycle_ratio": 1, "max_steps": 3, "learning_rate": 1e-4, "logging_steps": 1}
        defaults |= {"bf16": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
        defaults |= {"log_completions": True, "num_completions_to_print": 0, "disable_tqdm": True}
        if small:
            defaults |= {"use_cpu": True, "bf16": False}
            settings = {name: value for name, value in settings.items() if name not in ("bf16", *ENGINE)}
            settings.pop("vllm_enable_sleep_mode", None)
        args = SparkConfig(folder, **defaults | settings)
        trainer = TimedTrainer(
            model,
            reward_funcs=reward,
            args=args,
            train_dataset=rows,
            processing_class=processor,
            peft_config=LoraConfig(target_modules="all-linear") if lora else None,
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert all(map(math.isfinite, losses)), losses
        written = pyarrow.parquet.read_table(max(Path(folder, "completions").glob("*.parquet"))).to_pylist()
        written = written[:: max(1, len(written) // 4)]  # of the last step, policy and recycled rows
        agreement = [
            {name: value for name, value in row.items() if name.startswith("sampling/")}
            for row in trainer.state.log_history
        ]
    return {
        "dtype": str(next(trainer.model.parameters()).dtype),
        "device": str(torch.device(trainer.accelerator.device)),
        "losses": losses,
        "steps": trainer.steps,
        "engine_and_trainer": [row for row in agreement if row],
        "samples": [{name: str(row[name])[:2000] for name in ("prompt", "completion")} for row in written],
        "args": args,
    }


def smoke(small: bool, **settings) -> dict:
    from transformers import AutoProcessor

    import verify
    from data.read import read_dataset

    sizes = {"per_device_train_batch_size": 16 if small else 128, "max_completion_length": 48}
    processor = AutoProcessor.from_pretrained("models/digits", padding_side="left")
    rows = read_dataset("digits")
    run = trained("models/digits", rows, verify.answer_reward, processor, small, **sizes, **settings)
    del run["args"]
    return run


def slim(small: bool, side: int, recycle_ratio: int) -> dict:
    import numpy
    import PIL.Image
    import torch
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from trl import ModelConfig

    from data.arguments import DataArguments
    from training import plan
    from training.seconds import Card, average_lengths, generation_seconds

    wide = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    sees = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "depth": 8}
    layers, sections, words = 4, [16, 24, 24], 152_064
    if small:
        side, layers, sections, words = side // 8, 1, [4, 2, 2], 2048
        wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        sees = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "depth": 2}
    processor = AutoProcessor.from_pretrained("models/digits", padding_side="left")
    processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": side**2}
    shipped = Qwen2_5_VLConfig.from_pretrained("models/digits")
    tokens = {name: getattr(shipped, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    tokens["vision_end_token_id"] = shipped.vision_end_token_id
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = {"vocab_size": words, "num_hidden_layers": layers, "rope_parameters": rope, **wide}
    text |= {name: getattr(processor.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sees | {"fullatt_block_indexes": [1]}, **tokens)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.suppress_tokens = list(range(len(processor.tokenizer), words))  # words without letters

    noise = numpy.random.default_rng(0)
    pictures = [PIL.Image.fromarray(noise.integers(0, 256, (side, side, 3), numpy.uint8)) for _ in range(16)]
    question = [{"role": "user", "content": "What is the sum of the digits?"}]
    rows = Dataset.from_list([{"prompt": question, "images": [picture], "solution": "1"} for picture in pictures])
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    sizes |= {"max_completion_length": 16 if small else 256, "max_prompt_length": 64 + side**2 // 784}
    run = trained(model, rows, coin, processor, small, recycle_ratio=recycle_ratio, **sizes)
    data = DataArguments(dataset="digits", max_pixels=side**2)
    launch = plan.Launch()
    planned = plan.run_of(data, run.pop("args"), ModelConfig(dtype="float32"), launch, config, len(rows), images=True)
    sized = plan.architecture(config)
    parts = plan.memory(planned, sized)
    run["planned_peaks"] = dict(zip(("generating", "training"), plan.peaks(planned, parts, 0), strict=True))
    run["planned_seconds"] = generation_seconds(
        planned, plan.steps(planned), sized, average_lengths(planned, sized), Card()
    )
    return run


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        part = smoke if args.worker in SMOKE else slim
        print(json.dumps(part(args.small, **CASES[args.worker])))
        return 0

    until = time.monotonic() + 60 * args.minutes
    for case in args.cases:
        path = args.runs / f"{case}.json"
        if path.exists():
            continue
        if time.monotonic() + LIMIT > until:
            print(f"{case}: {LIMIT} seconds are not left; the same command goes on", file=sys.stderr)
            return UNFINISHED
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", case, *["--small"] * args.small]
        begun = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
            failed = done.returncode != 0
            outcome = {"error": done.stderr[-2000:]} if failed else json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            outcome = {"error": f"not through after {LIMIT} seconds"}
        outcome |= {"case": case, "commit": record.commit(), "machine": record.machine()}
        path.write_text(json.dumps(outcome), encoding="utf-8")
        last = outcome.get("error", "").strip().splitlines()[-1:]
        print(f"{case}: {time.monotonic() - begun:.0f} s{''.join(f', failed: {line}' for line in last)}", flush=True)
    kept = [json.loads((args.runs / f"{case}.json").read_text(encoding="utf-8")) for case in args.cases]
    record.write(args.output, small=args.small, cases=kept)
    return 1 if any("error" in case for case in kept) else 0


if __name__ == "__main__":
    sys.exit(main())
