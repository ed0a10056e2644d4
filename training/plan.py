"""What a run will do and need, before it starts: rows, steps, tokens, memory, seconds. No GPU and no weights.

    python train_spark.py --config recipes/spark_vl_7b.yaml --plan recipes/accelerate/zero3.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml train_spark.py --config recipes/X.yaml --plan

`--plan` alone plans for the processes that it is started in, `--plan FILE` for those of an accelerate config. Rows and
steps are exact where the data can be read; tokens are upper bounds. Memory is an estimate from the real architecture:
expect it to be 20 % off, and activations more.
"""

import argparse
import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from data.rows import NotLoaded
from recycle import items_come_in, most_items
from training.seconds import Card, average_lengths, generation_seconds

Sharding = Literal["none", "zero2", "zero3", "fsdp2"]
ZERO_STAGES: dict[str, Sharding] = {"2": "zero2", "3": "zero3"}

GIB = 2**30
OVERHEAD = 1.5 * GIB  # CUDA context, cuBLAS workspaces, fragments
ENGINE_OVERHEAD = 2 * GIB  # vLLM's own: CUDA graphs, the profiling run's activations
HEAD_TILE = (4096, 32768)  # tokens and vocabulary that TRL's fused head holds logits of at once
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192, 288)  # GiB
USABLE = 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Launch, model and settings


@dataclass(frozen=True)
class Launch:
    """The processes, and what is spread over them."""

    processes: int = 1
    sharding: Sharding = "none"
    offloads_optimizer: bool = False  # to the memory of the node, as DeepSpeed can
    offloads_weights: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model's sizes. `trained` counts the adapter alone under LoRA; vision sizes are 0 without a vision tower."""

    name: str
    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key-value heads x their size
    vocab: int
    sees: bool = False  # takes images
    vision_layers: int = 0
    vision_hidden: int = 0
    pixels_per_token: int = 0  # of a visual token of the text model
    patches_per_token: int = 0
    patch_values: int = 0  # numbers that a patch is


@dataclass(frozen=True)
class Run:
    """The parsed arguments, and what they come to."""

    args: Any  # SparkConfig
    model: Any  # ModelConfig
    launch: Launch
    weight_bytes: float  # of a parameter
    rows: int | None  # of the data; None where it can't be read here
    images: bool  # in any of them
    max_pixels: int | None

    @property
    def micro_steps(self) -> int:
        """Of a generation."""
        return self.args.steps_per_generation * self.args.num_iterations

    @property
    def engine_share(self) -> float | None:
        """Of each GPU; None without a colocated engine."""
        colocated = self.args.use_vllm and self.args.vllm_mode == "colocate"
        return self.args.vllm_gpu_memory_utilization if colocated else None

    @property
    def scores(self) -> bool:
        """Log-probabilities are computed between rolling out and training."""
        args = self.args
        correction = args.use_vllm and args.vllm_importance_sampling_correction
        return args.beta != 0 or correction or args.gradient_accumulation_steps % self.micro_steps != 0


@dataclass(frozen=True)
class Steps:
    """What one generation is, and how many there are."""

    prompts: int
    rollouts: int
    recycled_prompts: int  # at most, as recycled_rollouts
    recycled_rollouts: int
    optimizer_steps: Fraction
    total_generations: int | None
    total_optimizer_steps: int | None


def launch_here(environment: dict[str, str]) -> Launch:
    """The launch that accelerate (or torchrun) described in the environment; one process without."""
    processes = int(environment.get("WORLD_SIZE", 1))
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        named = "ACCELERATE_DEEPSPEED_"
        return deepspeed(
            processes, {k.removeprefix(named).lower(): v for k, v in environment.items() if k.startswith(named)}
        )
    return Launch(processes, "fsdp2" if environment.get("ACCELERATE_USE_FSDP") == "true" else "none")


def launch_in(path: str) -> Launch:
    """The launch that an accelerate config describes. Raises FileNotFoundError, ValueError."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(path)
    if config.distributed_type == "DEEPSPEED":
        settings = config.deepspeed_config
        return deepspeed(config.num_processes, {**settings, "config_file": settings.get("deepspeed_config_file")})
    return Launch(config.num_processes, "fsdp2" if config.distributed_type == "FSDP" else "none")


def deepspeed(processes: int, settings: dict[str, Any]) -> Launch:
    """The launch by accelerate's settings of DeepSpeed, or by the file of DeepSpeed's own that they name."""
    stage, names = settings.get("zero_stage"), ("offload_optimizer", "offload_param")
    devices = [settings.get(f"{name}_device") for name in names]
    if path := settings.get("config_file"):
        zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        stage, devices = zero.get("stage"), [zero.get(name, {}).get("device") for name in names]
    offloads = [device not in (None, "none") for device in devices]
    return Launch(processes, ZERO_STAGES.get(str(stage), "none"), *offloads)


def architecture(config, peft_config=None, freeze_prefix: list[str] | None = None) -> Architecture:
    """The sizes of the model of a transformers config, counted on its real class without memory for it. Raises
    ValueError for a `freeze_prefix` that training would refuse."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    from training.settings import freeze

    name = config.architectures[0]
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, name)(config)
        model.tie_weights()  # left out with the initialisation
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        freeze(model, freeze_prefix or [])
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    vision, vision_sizes = getattr(config, "vision_config", None), {}
    if hasattr(vision, "spatial_merge_size"):  # the Qwen-VL family; others are not counted
        merged = vision.spatial_merge_size**2
        vision_sizes = {
            "vision_layers": vision.depth,
            "vision_hidden": vision.hidden_size,
            "pixels_per_token": vision.patch_size**2 * merged,
            "patches_per_token": merged,
            "patch_values": vision.patch_size**2 * vision.in_channels * vision.temporal_patch_size,
        }
    return Architecture(
        name,
        parameters,
        trained,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head,
        vocab=text.vocab_size,
        sees=vision is not None,
        **vision_sizes,
    )


def run_of(data, args, model, launch: Launch, config, rows: int | None, images: bool = False) -> Run:
    """A Run of train_spark's parsed arguments and the model's config (None: unknown)."""
    import torch

    dtype = getattr(torch, model.dtype) if model.dtype != "auto" else config.dtype if config else torch.float32
    weight_bytes = 0.6 if model.load_in_4bit else 1 if model.load_in_8bit else dtype.itemsize
    return Run(args, model, launch, weight_bytes, rows, images, data.max_pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and steps


def steps(run: Run) -> Steps:
    """Counts of a generation and of the run: `max_steps`, or epochs of as many generations as there are rows for."""
    args, world = run.args, run.launch.processes
    rollouts = args.per_device_train_batch_size * args.steps_per_generation * world
    prompts = rollouts // args.num_generations
    recycled = most_items(prompts, args, items_come_in(world, args.num_generations))
    optimizer_steps = Fraction(run.micro_steps, args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else None
    if total is None and run.rows is not None:  # the last incomplete generation of an epoch is dropped
        epoch = max(math.ceil(run.rows // prompts * run.micro_steps / args.gradient_accumulation_steps), 1)
        total = math.ceil(args.num_train_epochs * epoch)
    return Steps(
        prompts=prompts,
        rollouts=rollouts,
        recycled_prompts=recycled,
        recycled_rollouts=recycled * args.num_generations,
        optimizer_steps=optimizer_steps,
        total_generations=None if total is None else math.ceil(total / optimizer_steps),
        total_optimizer_steps=total,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def bytes_each(run: Run) -> tuple[int, int, int]:
    """Bytes of a weight, of a trained weight (and of its gradient), and of its optimizer state."""
    args, sharding = run.args, run.launch.sharding
    with_deepspeed, half, lora = sharding in ("zero2", "zero3"), args.bf16 or args.fp16, run.model.use_peft
    weight_bytes = 2 if with_deepspeed and half else run.weight_bytes
    float32 = (lora and sharding != "zero3") or (half and sharding == "fsdp2")  # an adapter; what accelerate makes it
    trained_bytes = 4 if float32 else weight_bytes
    return weight_bytes, trained_bytes, 12 if with_deepspeed and half else 2 * trained_bytes  # with its float32 weights


def memory(run: Run, model: Architecture) -> dict[str, float]:
    """Bytes of each GPU, by what they are for.

    A pass holds no more tokens than per_device policy rows at their longest, or one longest recycled row if that is
    more, and an image of max_pixels in each row.
    """
    args, sharding, world = run.args, run.launch.sharding, run.launch.processes
    lora, half = run.model.use_peft, args.bf16 or args.fp16
    whole = sharding in ("none", "zero2")
    weight_shards = 1 if whole else world
    state_shards = 1 if sharding == "none" else world  # of gradients and moments
    weight_bytes, trained_bytes, moment_bytes = bytes_each(run)
    compute_bytes = 2 if half or run.weight_bytes < 4 else 4
    residual_bytes = 4 if run.weight_bytes == 4 and sharding == "none" else compute_bytes  # autocast leaves it alone
    copies = sharding == "none" and half and run.weight_bytes == 4 and not lora  # autocast's, of the weights
    weights = (model.parameters - model.trained) * weight_bytes + model.trained * trained_bytes
    references = args.beta != 0 and not lora  # an adapter's reference is the model without it
    embedding = model.vocab * model.hidden
    one_layer = (model.parameters - 2 * embedding) / max(model.layers, 1)

    per_device = args.per_device_train_batch_size
    rollouts = per_device * args.steps_per_generation  # of a process and a generation
    policy_tokens, recycled_tokens = run.args.longest_rows
    longest = recycled_tokens if args.recycle_ratio > 0 else policy_tokens
    tokens = max(per_device * policy_tokens, longest)
    visual = 0  # tokens of an image
    if model.pixels_per_token:
        visual = args.max_prompt_length
        if run.max_pixels is not None:
            visual = min(visual, run.max_pixels // model.pixels_per_token)
    patches = visual * model.patches_per_token
    image = patches * model.patch_values * 4

    text_sizes = (model.hidden, model.intermediate)
    vision_sizes = (model.vision_hidden, 4 * model.vision_hidden)

    def layer(tokens: float, hidden: int, intermediate: int) -> float:
        return tokens * (8 * hidden + 4 * intermediate) * compute_bytes

    def activations(layers: int, tokens: float, hidden: int, intermediate: int) -> float:
        one = layer(tokens, hidden, intermediate)  # checkpointing keeps the inputs of all layers and one layer whole
        return layers * tokens * hidden * residual_bytes + one if args.gradient_checkpointing else layers * one

    tile = min(HEAD_TILE[0], tokens) * min(HEAD_TILE[1], model.vocab) * compute_bytes  # of logits
    cached = 2 * compute_bytes * model.layers * model.kv_width  # keys and values of a token
    reference_pass = references * 2 * model.parameters if sharding == "fsdp2" else 0  # TRL has it gathered whole
    scored = max(layer(per_device * longest, *text_sizes), layer(per_device * patches, *vision_sizes))
    generated = rollouts * longest * cached + layer(rollouts * args.max_prompt_length, *text_sizes)
    engine = (2 * model.parameters + longest * cached) / args.vllm_tensor_parallel_size + ENGINE_OVERHEAD
    questions = rollouts / args.num_generations
    # To generate without an engine, and to merge an adapter for one, TRL gathers all weights on each GPU.
    gathers = sharding == "zero3" and (lora if run.engine_share else args.ds3_gather_for_generation)
    return {
        "weights": 0 if run.launch.offloads_weights else weights / weight_shards,
        "gradients": model.trained * trained_bytes / state_shards,
        "optimizer": 0 if run.launch.offloads_optimizer else model.trained * moment_bytes / state_shards,
        "reference": references * model.parameters * weight_bytes / weight_shards,
        "buckets": model.trained * trained_bytes if sharding == "none" and world > 1 else 0,  # DDP's, of gradients
        "half copies": copies * 2 * model.trained,
        "gathered": 0 if whole else 2 * 2 * max(one_layer, embedding),
        "gathered whole": model.parameters * weight_bytes if gathers else 0,
        "activations": activations(model.layers, tokens, *text_sizes)
        + activations(model.vision_layers, per_device * patches, *vision_sizes),
        "head": 2 * tile + (0 if lora else 4 * embedding),  # logits and their gradient, the weights' gradient
        "scoring": scored + 2 * tile + reference_pass if run.scores else 0,  # without gradient, of per_device rows
        "pixels": rollouts * max(args.recycle_ratio, 1) * image,  # as TRL makes them: once a rollout
        "kept pixels": questions * image * (1 + args.recycle_ratio) + per_device * image,  # a pass has its own
        "cache": 0 if run.engine_share else generated,  # of generate()
        "engine": 0 if run.engine_share is None else engine,  # the least that vLLM needs
    }


def peaks(run: Run, parts: dict[str, float], card: float) -> tuple[float, float]:
    """The most bytes in use while generating and while training, on a GPU of `card` bytes.

    While generating, the engine stays awake until the recycled prompts are answered, so its share of the card is in
    use while the rollouts are scored. While training, its share stays in use unless it sleeps.
    """
    share = (run.engine_share or 0) * card
    state = parts["weights"] + parts["optimizer"] + parts["reference"] + parts["buckets"] + OVERHEAD
    scoring = parts["pixels"] + parts["scoring"] + parts["gathered"]
    engine = parts["engine"] if run.args.vllm_enable_sleep_mode else share  # while it is sent the weights
    generating = state + max(parts["cache"] + parts["gathered whole"] + engine, share + scoring) + parts["kept pixels"]
    working = ("gradients", "half copies", "gathered", "activations", "head", "kept pixels")
    training = state + sum(parts[name] for name in working) + (0 if run.args.vllm_enable_sleep_mode else share)
    return generating, training


def smallest_card(run: Run, parts: dict[str, float]) -> int | None:
    """The smallest GPU (GiB) on which both peaks fit, and the engine into its share; None if there is none."""
    for card in CARDS:
        engine_fits = run.engine_share is None or parts["engine"] <= run.engine_share * card * GIB
        if engine_fits and max(peaks(run, parts, card * GIB)) <= USABLE * card * GIB:
            return card
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and remarks


def refusals(run: Run, model: Architecture | None) -> list[str]:
    """Settings that can't be trained, each with what to change."""
    reasons = []
    prompts, processes, parallel = steps(run).prompts, run.launch.processes, run.args.vllm_tensor_parallel_size
    if run.rows is not None and run.rows < prompts:
        reasons.append(
            f"dataset: {run.rows} rows, expected at least the {prompts} of one generation; lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    if run.engine_share is not None and processes % parallel:
        reasons.append(f"vllm_tensor_parallel_size: {parallel}, expected a divisor of {processes} processes")
    if run.images and model is not None and not model.sees:
        reasons.append(f"dataset: rows with images, expected none: {model.name} takes text alone")
    return reasons


def remarks(run: Run) -> list[str]:
    """What will run, but perhaps not as intended."""
    recycles = run.args.recycle_ratio > 0
    drops_rows = run.args.drop_zero_advantage is not False and not run.args.has_extra_terms
    with_deepspeed = run.launch.sharding in ("zero2", "zero3")
    found = []
    if run.engine_share is not None and not find_spec("vllm"):
        found.append("use_vllm: vLLM is not installed here")
    if with_deepspeed and not find_spec("deepspeed"):
        found.append("DeepSpeed is not installed here")
    if recycles and not drops_rows:
        found.append("drop_zero_advantage: off, rows without gradient are trained on (beta, an entropy bonus, ...)")
    float32 = with_deepspeed or (run.launch.sharding == "fsdp2" and (run.args.bf16 or run.args.fp16))
    if run.weight_bytes == 2 and not run.model.use_peft and not float32:
        found.append("dtype: in 2 bytes, without LoRA, most updates at a small learning rate are rounded away")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command


def requested(arguments: list[str]) -> Launch | None:
    """The launch to plan for, if `--plan` is among the arguments; the other processes of a launch end here.

    Raises FileNotFoundError, ValueError for an accelerate config that can't be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", nargs="?", const="here")
    target = parser.parse_known_args(arguments)[0].plan
    if target is None:
        return None
    launch = launch_here(dict(os.environ)) if target == "here" else launch_in(target)
    if int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(0)
    for name in list(os.environ):  # nobody is waited for: a plan is made by one process, without a device
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
    return launch


def for_launch(config_class: type, launch: Launch) -> type:
    """`config_class`, checked as if in that launch: its number of processes, and no GPU needed for bf16."""

    @dataclass
    class Planned(config_class):
        def __post_init__(self):
            self.choose_engine()  # as a run here would have it
            self.use_cpu = True
            super().__post_init__()

        @property
        def world_size(self):
            return launch.processes

    return Planned


def announce_fetch(model: str) -> None:
    """Say what is about to come from the hub: a plan needs a model's config and its processor's files, no weights."""
    from huggingface_hub import constants, try_to_load_from_cache

    if not (os.path.isdir(model) or constants.HF_HUB_OFFLINE or try_to_load_from_cache(model, "config.json")):
        print(f"{model}: fetching its config and its processor's files from the hub, not its weights", file=sys.stderr)


def show(data, args, model, launch: Launch) -> None:
    """Print the plan of train_spark's parsed arguments. Raises ValueError for what would be refused."""
    import huggingface_hub.constants
    from datasets import config as datasets_config
    from transformers import AutoConfig, AutoProcessor
    from trl import get_peft_config

    from data.lengths import too_long

    def unknown(error: Exception) -> str:
        return f"unknown ({' '.join(str(error).split())[:160]})"

    name, revision = model.model_name_or_path, model.model_revision
    announce_fetch(name)
    config = counted = processor = None
    with suppress(OSError, ValueError):  # lengths are then not known
        processor = AutoProcessor.from_pretrained(name, revision=revision, padding_side="left")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        counted = architecture(config, get_peft_config(model))
    except (OSError, ValueError) as error:
        model_line = unknown(error)
    if counted:
        if args.freeze_prefix:
            counted = architecture(config, get_peft_config(model), args.freeze_prefix)
        model_line = f"{counted.name}, {counted.parameters:,} parameters, {counted.trained:,} trained"

    datasets_config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True  # no gigabytes for a plan
    rows, images = None, counted is not None and counted.sees  # a model that sees is given images, for all we know
    unusable = []
    try:
        reject = None
        if processor is not None and config is not None:
            longest, setting = args.longest_prompt(config)
            reject = too_long(longest, processor, setting, **(args.chat_template_kwargs or {}))
        dataset = data.read_one(data.dataset, data.dataset_split, args, processor, reject)
        rows, images = len(dataset), "images" in dataset.column_names
        data_line = f"{rows:,} rows of {data.dataset}"
    except NotLoaded as error:
        data_line = unknown(error)
    except (OSError, ValueError) as error:
        data_line, unusable = "none that can be used", [str(error)]

    run = run_of(data, args, model, launch, config, rows, images)
    reasons = unusable + refusals(run, counted)
    estimates = ["memory     unknown, like the model"]
    if counted:
        estimates = [*_memory(run, counted), "", *_seconds(run, counted), "", _checkpoints(run, counted)]
    lines = [
        f"model      {model_line}",
        f"data       {data_line}",
        f"launch     {launch.processes} process{'es' * (launch.processes > 1)}, sharding {launch.sharding}",
        "",
        *_table(run, steps(run)),
        "",
        *estimates,
        "",
        *(f"remark     {remark}" for remark in remarks(run)),
        *(f"refused    {reason}" for reason in reasons or ["nothing"]),
    ]
    print("\n".join(lines), flush=True)
    if reasons:
        raise ValueError("; ".join(reasons))


def _table(run: Run, counts: Steps) -> list[str]:
    """The counts of a generation and of the run."""
    policy, recycled = run.args.longest_rows
    completion = run.args.max_completion_length
    rows = {  # of a generation: policy's, recycled
        "prompts": (counts.prompts, 0),
        "rollouts": (counts.rollouts, 0),
        "recycled prompts, at most": (0, counts.recycled_prompts),
        "recycled rollouts, at most": (0, counts.recycled_rollouts),
        "tokens generated, at most": (counts.rollouts * completion, counts.recycled_rollouts * completion),
        "tokens trained on, at most": (counts.rollouts * policy, counts.recycled_rollouts * recycled),
    }
    n = counts.total_generations
    recycling = None if n is None else math.ceil(n / run.args.recycle_every)
    totals = [(name, p + r, None if n is None else n * p + recycling * r) for name, (p, r) in rows.items()]
    totals.append(("optimizer steps", counts.optimizer_steps, counts.total_optimizer_steps))
    return [f"{'':<30}{'a generation':>18}{'in total':>20}"] + [
        f"{name:<30}{float(each):>18,.10g}{'unknown' if total is None else f'{total:,}':>20}"
        for name, each, total in totals
    ]


def _memory(run: Run, model: Architecture) -> list[str]:
    """The parts and the peaks, on the smallest GPU where they fit."""
    parts = memory(run, model)
    lines = ["memory of each GPU, GiB (an estimate)"]
    lines += [f"  {name:<28}{size / GIB:>18.1f}" for name, size in parts.items() if size]
    card = smallest_card(run, parts)
    if card is None:
        return [*lines, f"  fits on no GPU up to {CARDS[-1]} GiB: try more processes, sharding, LoRA or shorter rows"]
    generating, training = peaks(run, parts, card * GIB)
    if run.engine_share is not None:
        lines.append(f"  {f'vLLM: {run.engine_share:.0%} of {card} GiB':<28}{run.engine_share * card:>18.1f}")
    lines += [
        f"  {'peak while generating':<28}{generating / GIB:>18.1f}",
        f"  {'peak while training':<28}{training / GIB:>18.1f}",
        f"  fits on a GPU of {card} GiB",
    ]
    return lines


def _checkpoints(run: Run, model: Architecture) -> str:
    """How often, how large, how many. One more than save_total_limit while it is written."""
    args, (_, trained_bytes, moment_bytes) = run.args, bytes_each(run)
    if args.save_strategy == "no":
        return "checkpoints none"
    often = f"every {args.save_steps:,.10g} optimizer steps" if args.save_steps >= 1 else f"every {args.save_steps:.0%}"
    often = often if args.save_strategy == "steps" else "every epoch"
    copies = 2 if run.launch.sharding == "zero2" and not args.save_only_model else 1  # DeepSpeed's, beside the model
    size = model.trained * (copies * trained_bytes + (0 if args.save_only_model else moment_bytes)) / GIB
    many = "all of them kept" if args.save_total_limit is None else f"at most {args.save_total_limit + 1} at a time"
    return f"checkpoints {often}, {size:,.1f} GiB each, {many}"


def _seconds(run: Run, model: Architecture) -> list[str]:
    """A generation's seconds by part, and days of the whole."""
    card, lengths, counts = Card(), average_lengths(run, model), steps(run)
    parts = generation_seconds(run, counts, model, lengths, card)
    whole = sum(parts.values())
    lines = [f"seconds of a generation, if each GPU is an {card.name} (an estimate)"]
    lines += [f"  {name:<28}{seconds:>18,.1f}" for name, seconds in parts.items() if seconds]
    n = counts.total_generations
    days = "" if n is None else f", {whole * n / 86400:,.1f} days in total"
    return [
        *lines,
        f"  {'all':<28}{whole:>18,.1f}{days}",
        f"  prompts of {lengths.prompt:,.0f} tokens, recycled ones of {lengths.recycled_prompt:,.0f}, completions of "
        f"{lengths.completion:,.0f}; every row trained on;",
        f"  {card.training:.0%} of the peak in training, {card.prefill:.0%} in prefill, {card.decoding:.0%} of the "
        "memory's bandwidth in decoding",
    ]
