"""What a run will do and need, before it starts: rows, steps, tokens, memory, seconds. No GPU and no weights.

    python train_spark.py --config recipes/spark_vl_7b.yaml --plan recipes/accelerate/zero3.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml train_spark.py --config recipes/X.yaml --plan

`--plan` alone plans for the processes it is started in, `--plan FILE` for those of an accelerate config, which need not
be here. Rows and steps are exact where the data can be read, tokens are the most there can be. Memory is an estimate
from the real architecture (`memory` has a formula a line); expect it to be 20 % off, and activations more.
"""

import argparse
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, Literal

from training.seconds import Card, average_lengths, generation_seconds

Sharding = Literal["none", "zero2", "zero3", "fsdp2"]

GIB = 2**30
OVERHEAD = 1.5 * GIB  # CUDA context, cuBLAS workspaces, fragments
ENGINE_OVERHEAD = 2 * GIB  # vLLM's own: CUDA graphs, the profiling run's activations
HEAD_TILE = (4096, 32768)  # tokens and vocabulary that TRL's fused head holds logits of at once
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192, 288)  # GiB
USABLE = 0.95


# ---------------------------------------------------------------------------------------------------------------------
# What a plan is made from


@dataclass(frozen=True)
class Launch:
    """The processes, and what is spread over them."""

    processes: int = 1
    sharding: Sharding = "none"


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
    """The settings that count."""

    launch: Launch
    per_device: int
    accumulation: int
    steps_per_generation: int
    num_iterations: int
    num_generations: int
    recycle_ratio: float
    prompt_tokens: int
    completion_tokens: int
    policy_tokens: int  # of a policy row, at most: prompt and completion
    recycled_tokens: int  # of a recycled row: the question, the rollouts it quotes, the instruction, a completion
    epochs: float
    max_steps: int
    rows: int | None  # of the data; None where it can't be read here
    images: bool  # in any of them
    weight_bytes: float
    half: bool  # computes in bf16 or fp16
    lora: bool
    reference: bool
    checkpointing: bool
    max_pixels: int | None
    engine_share: float | None  # of each GPU; None without a colocated engine
    engine_parallel: int
    engine_sleeps: bool
    scores: bool  # computes log-probabilities between rolling out and training
    drops_rows: bool  # leaves rows without gradient out of the passes


@dataclass(frozen=True)
class Steps:
    """What one generation is, and how many there are."""

    prompts: int
    rollouts: int
    recycled_prompts: int  # at most, as the two below
    recycled_rollouts: int
    generated_tokens: int
    trained_tokens: int  # prompts and completions
    optimizer_steps: Fraction
    total_generations: int | None
    total_optimizer_steps: int | None


def launch_here(environment: dict[str, str]) -> Launch:
    """The launch that accelerate (or torchrun) described in the environment; one process without."""
    sharding: Sharding = "none"
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        sharding = {"2": "zero2", "3": "zero3"}.get(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", ""), "none")
    elif environment.get("ACCELERATE_USE_FSDP") == "true":
        sharding = "fsdp2"
    return Launch(int(environment.get("WORLD_SIZE", 1)), sharding)


def launch_in(path: str) -> Launch:
    """The launch that an accelerate config describes. Raises FileNotFoundError, ValueError."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(path)
    sharding: Sharding = "none"
    if config.distributed_type == "DEEPSPEED":
        sharding = {2: "zero2", 3: "zero3"}.get(config.deepspeed_config.get("zero_stage"), "none")
    elif config.distributed_type == "FSDP":
        sharding = "fsdp2"
    return Launch(config.num_processes, sharding)


def architecture(config, peft_config=None) -> Architecture:
    """The sizes of the model of a transformers config, counted on its real class without memory for it."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    name = config.architectures[0]
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, name)(config)
        model.tie_weights()  # left out with the initialisation
        parameters = trained = model.num_parameters()
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            parameters += trained
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {
        "name": name,
        "parameters": parameters,
        "trained": trained,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "kv_width": text.num_key_value_heads * head,
        "vocab": text.vocab_size,
    }
    vision = getattr(config, "vision_config", None)
    sizes["sees"] = vision is not None
    if hasattr(vision, "spatial_merge_size"):  # the Qwen-VL family; others are not reckoned
        merged = vision.spatial_merge_size**2
        sizes |= {
            "vision_layers": vision.depth,
            "vision_hidden": vision.hidden_size,
            "pixels_per_token": vision.patch_size**2 * merged,
            "patches_per_token": merged,
            "patch_values": vision.patch_size**2 * vision.in_channels * vision.temporal_patch_size,
        }
    return Architecture(**sizes)


def settings(data, args, model, launch: Launch, config, rows: int | None, images: bool = False) -> Run:
    """A Run of train_spark's parsed arguments."""
    import torch

    dtype = getattr(torch, model.dtype) if model.dtype != "auto" else config.dtype if config else torch.float32
    colocated = args.use_vllm and args.vllm_mode == "colocate"
    policy_tokens, recycled_tokens = args.longest_rows
    return Run(
        launch=launch,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        num_generations=args.num_generations,
        recycle_ratio=args.recycle_ratio,
        prompt_tokens=args.max_prompt_length,
        completion_tokens=args.max_completion_length,
        policy_tokens=policy_tokens,
        recycled_tokens=recycled_tokens,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        rows=rows,
        images=images,
        weight_bytes=0.6 if model.load_in_4bit else 1 if model.load_in_8bit else dtype.itemsize,
        half=args.bf16 or args.fp16,
        lora=model.use_peft,
        reference=args.beta != 0 and not model.use_peft,
        checkpointing=args.gradient_checkpointing,
        max_pixels=data.max_pixels,
        engine_share=args.vllm_gpu_memory_utilization if colocated else None,
        engine_parallel=args.vllm_tensor_parallel_size,
        engine_sleeps=args.vllm_enable_sleep_mode,
        scores=args.beta != 0
        or (args.use_vllm and args.vllm_importance_sampling_correction)
        or args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0,
        drops_rows=args.recycle_ratio > 0 and args.drop_zero_advantage is not False and not args.has_extra_terms,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rows and steps


def steps(run: Run) -> Steps:
    """Counts of a generation and of the run.

    rollouts            per_device x processes x steps_per_generation
    prompts             rollouts / num_generations
    recycled prompts    recycle_ratio x prompts, rounded down so that their rollouts divide over the processes
    optimizer steps     steps_per_generation x num_iterations / accumulation
    in total            max_steps, or epochs x those of an epoch, where a last incomplete generation batch is dropped
    """
    world = run.launch.processes
    rollouts = run.per_device * world * run.steps_per_generation
    prompts = rollouts // run.num_generations
    multiple = world // math.gcd(world, run.num_generations)
    recycled = int(run.recycle_ratio * prompts + 1e-9) // multiple * multiple
    recycled_rollouts = recycled * run.num_generations
    micro_steps = run.steps_per_generation * run.num_iterations
    total = run.max_steps if run.max_steps > 0 else None
    if total is None and run.rows is not None:
        epoch = max(math.ceil(run.rows // prompts * micro_steps / run.accumulation), 1)
        total = math.ceil(run.epochs * epoch)
    return Steps(
        prompts=prompts,
        rollouts=rollouts,
        recycled_prompts=recycled,
        recycled_rollouts=recycled_rollouts,
        generated_tokens=(rollouts + recycled_rollouts) * run.completion_tokens,
        trained_tokens=rollouts * run.policy_tokens + recycled_rollouts * run.recycled_tokens,
        optimizer_steps=Fraction(micro_steps, run.accumulation),
        total_generations=None if total is None else math.ceil(total * run.accumulation / micro_steps),
        total_optimizer_steps=total,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory(run: Run, model: Architecture) -> dict[str, float]:
    """Bytes of each GPU, by what they are for. N is the number of processes that share; P parameters, T trained ones.

    weights        P x bytes of dtype (DeepSpeed: 2) / N        N = processes under ZeRO-3 and FSDP2, else 1
    gradients      T x the same / N                             ZeRO-2 shares these and the next, not the weights
    optimizer      T x 2 moments / N                            AdamW; DeepSpeed: 12 bytes, with its float32 weights
    reference      P x bytes of dtype / N                       with beta > 0 and no adapter
    half copies    P x 2                                        autocast's, of float32 weights that are not shared
    gathered       2 x 2 bytes x the larger of a layer and the embedding         ZeRO-3 and FSDP2, while computing
    activations    layers x tokens of a pass x hidden x bytes   what gradient checkpointing keeps, and one layer
                   + tokens x (8 hidden + 4 intermediate) x 2   (all of them without checkpointing); the vision tower
                                                                the same over its patches
    head           one tile of logits x 2 (fused: they are never whole), + 4 x vocabulary x hidden for its gradient
    scoring        one layer's activations, its tile of logits  log-probabilities without gradient, of per_device rows
    pixels         rows of a generation x patches x patch size x 4 bytes        as TRL makes them: once a rollout
    kept pixels    the same / num_generations, x (1 + ratio)    through training: once a question, and a pass's copy
    cache          rows of a generation x longest row x 4 x layers x kv width        generate() without vLLM, and one
                   + rows x prompt x (8 hidden + 4 intermediate) x 2                 layer's activations of the prompts
    engine         weights in 2 bytes / tensor parallel + a longest row's cache + 2 GiB: the least that vLLM needs

    A LoRA adapter is float32, except under ZeRO-3. A pass holds no more tokens than per_device policy rows at their
    longest, or one longest recycled row if that is more; an image of max_pixels in each row.
    """
    sharding, world = run.launch.sharding, run.launch.processes
    deepspeed = sharding in ("zero2", "zero3")
    whole = sharding in ("none", "zero2")
    weight_bytes = 2 if deepspeed and run.half else run.weight_bytes
    trained_bytes = 4 if run.lora and sharding != "zero3" else weight_bytes
    frozen = model.parameters - model.trained
    weights = frozen * weight_bytes + model.trained * trained_bytes
    state_shards = 1 if sharding == "none" else world
    compute_bytes = 2 if run.half or run.weight_bytes < 4 else 4
    residual_bytes = 4 if run.weight_bytes == 4 and sharding == "none" else compute_bytes  # autocast leaves it alone

    longest = run.recycled_tokens if run.recycle_ratio > 0 else run.policy_tokens
    tokens = max(run.per_device * run.policy_tokens, longest)
    rows = run.per_device * run.steps_per_generation  # of a process and a generation

    visual = 0
    if model.pixels_per_token:
        visual = run.prompt_tokens
        if run.max_pixels is not None:
            visual = min(visual, run.max_pixels // model.pixels_per_token)
    patches = visual * model.patches_per_token  # of an image
    image = patches * model.patch_values * 4

    def layer(tokens: float, hidden: int, intermediate: int) -> float:
        return tokens * (8 * hidden + 4 * intermediate) * compute_bytes

    def activations(layers: int, tokens: float, hidden: int, intermediate: int) -> float:
        one = layer(tokens, hidden, intermediate)
        return layers * tokens * hidden * residual_bytes + one if run.checkpointing else layers * one

    vision = (model.vision_hidden, 4 * model.vision_hidden)
    held = activations(model.layers, tokens, model.hidden, model.intermediate)
    held += activations(model.vision_layers, run.per_device * patches, *vision)
    scoring = max(
        layer(run.per_device * longest, model.hidden, model.intermediate), layer(run.per_device * patches, *vision)
    )

    tile = min(HEAD_TILE[0], tokens) * min(HEAD_TILE[1], model.vocab) * compute_bytes
    one_layer = (model.parameters - 2 * model.vocab * model.hidden) / max(model.layers, 1)
    cached = 2 * compute_bytes * model.layers * model.kv_width  # of a token: keys and values
    prefill = layer(rows * run.prompt_tokens, model.hidden, model.intermediate)
    moments = 12 if deepspeed and run.half else 2 * trained_bytes
    return {
        "weights": weights / (1 if whole else world),
        "gradients": model.trained * trained_bytes / state_shards,
        "optimizer": model.trained * moments / state_shards,
        "reference": run.reference * model.parameters * weight_bytes / (1 if whole else world),
        "half copies": 2 * model.trained * (sharding == "none" and run.half and run.weight_bytes == 4 and not run.lora),
        "gathered": 0 if whole else 2 * 2 * max(one_layer, model.vocab * model.hidden),
        "activations": held,
        "head": 2 * tile + (0 if run.lora else 4 * model.vocab * model.hidden),
        "scoring": scoring + 2 * tile if run.scores else 0,
        "pixels": rows * max(run.recycle_ratio, 1) * image,
        "kept pixels": rows * image / run.num_generations * (1 + run.recycle_ratio) + run.per_device * image,
        "cache": 0 if run.engine_share else rows * longest * cached + prefill,
        "engine": 0
        if run.engine_share is None
        else 2 * model.parameters / run.engine_parallel + longest * cached / run.engine_parallel + ENGINE_OVERHEAD,
    }


def peaks(run: Run, parts: dict[str, float], card: float) -> tuple[float, float]:
    """The most bytes in use while generating and while training, on a GPU of `card` bytes.

    generating    weights, optimizer, reference + cache, or the engine's share of the card and what is scored beside it:
                  the engine stays awake until the recycled prompts are answered
    training      all but cache, engine, pixels and scoring; the engine's share stays unless it sleeps
    """
    share = (run.engine_share or 0) * card
    state = parts["weights"] + parts["optimizer"] + parts["reference"] + OVERHEAD
    scoring = parts["pixels"] + parts["scoring"] + parts["gathered"]
    generating = state + max(parts["cache"], share + scoring) + parts["kept pixels"]
    working = ("gradients", "half copies", "gathered", "activations", "head", "kept pixels")
    training = state + sum(parts[name] for name in working) + (0 if run.engine_sleeps else share)
    return generating, training


def smallest_card(run: Run, parts: dict[str, float]) -> int | None:
    """The smallest GPU (GiB) on which both peaks fit, and the engine into its share; None if there is none."""
    for card in CARDS:
        engine_fits = run.engine_share is None or parts["engine"] <= run.engine_share * card * GIB
        if engine_fits and max(peaks(run, parts, card * GIB)) <= USABLE * card * GIB:
            return card
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What it will refuse, and what it will not but should be known


def refusals(run: Run, model: Architecture | None) -> list[str]:
    """Settings that can't be trained, each with what to change."""
    found = []
    prompts = steps(run).prompts
    if run.rows is not None and run.rows < prompts:
        found.append(
            f"dataset: {run.rows} rows, expected at least the {prompts} of one generation; lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    if run.engine_share is not None and run.launch.processes % run.engine_parallel:
        found.append(
            f"vllm_tensor_parallel_size: {run.engine_parallel}, expected a divisor of {run.launch.processes} processes"
        )
    if run.images and model is not None and not model.sees:
        found.append(f"dataset: rows with images, expected none: {model.name} takes text alone")
    return found


def remarks(run: Run) -> list[str]:
    """What runs, but perhaps not as meant."""
    found = []
    if run.recycle_ratio > 0 and not steps(run).recycled_prompts:
        found.append("recycle_ratio: nothing will be recycled, less than one prompt (of a multiple that divides)")
    if run.engine_share is not None and not find_spec("vllm"):
        found.append("use_vllm: vLLM is not installed here")
    if run.launch.sharding in ("zero2", "zero3") and not find_spec("deepspeed"):
        found.append("DeepSpeed is not installed here")
    if run.recycle_ratio > 0 and not run.drops_rows:
        found.append("drop_zero_advantage: off, rows without gradient are trained on (beta, an entropy bonus, ...)")
    if run.weight_bytes == 2 and not run.lora and run.launch.sharding not in ("zero2", "zero3"):
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

    announce_fetch(model.model_name_or_path)
    config = counted = processor = None
    with suppress(OSError, ValueError):  # lengths are then not known
        processor = AutoProcessor.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, padding_side="left"
        )
    try:
        config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
        counted = architecture(config, get_peft_config(model))
        described = f"{counted.name}, {counted.parameters:,} parameters, {counted.trained:,} trained"
    except (OSError, ValueError) as error:
        described = f"unknown ({' '.join(str(error).split())[:160]})"

    datasets_config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True  # no gigabytes for a plan
    rows, images = None, False
    try:
        dataset = data.read_one(data.dataset, data.dataset_split, args, processor)
        rows, images = len(dataset), "images" in dataset.column_names
        rows_described = f"{rows:,} rows of {data.dataset}"
    except (OSError, ValueError) as error:
        rows_described = f"unknown ({' '.join(str(error).split())[:160]})"

    run = settings(data, args, model, launch, config, rows, images)
    lines = [
        f"model      {described}",
        f"data       {rows_described}",
        f"launch     {launch.processes} process{'es' * (launch.processes > 1)}, sharding {launch.sharding}",
        "",
        *_table(steps(run)),
        "",
    ]
    if counted is None:
        lines.append("memory     unknown, as the model is")
    else:
        lines += [*_memory(run, memory(run, counted)), "", *_seconds(run, counted)]
    refused = refusals(run, counted)
    lines += ["", *(f"remark     {remark}" for remark in remarks(run))]
    lines += [f"refused    {reason}" for reason in refused or ["nothing"]]
    print("\n".join(lines), flush=True)
    if refused:
        raise ValueError("; ".join(refused))


def _table(counts: Steps) -> list[str]:
    """The counts of a generation and of the run."""

    def row(name: str, each: Any, n: int | None) -> str:
        total = "unknown" if n is None else f"{n:,}"
        return f"{name:<30}{float(each):>18,.10g}{total:>20}"

    n = counts.total_generations
    rows = {
        "prompts": counts.prompts,
        "rollouts": counts.rollouts,
        "recycled prompts, at most": counts.recycled_prompts,
        "recycled rollouts, at most": counts.recycled_rollouts,
        "tokens generated, at most": counts.generated_tokens,
        "tokens trained on, at most": counts.trained_tokens,
    }
    return [
        f"{'':<30}{'a generation':>18}{'in total':>20}",
        *(row(name, each, None if n is None else n * each) for name, each in rows.items()),
        row("optimizer steps", counts.optimizer_steps, counts.total_optimizer_steps),
    ]


def _memory(run: Run, parts: dict[str, float]) -> list[str]:
    """The parts and the peaks, on the smallest GPU where they fit."""
    lines = ["memory of each GPU, GiB (an estimate)"]
    lines += [f"  {name:<28}{size / GIB:>18.1f}" for name, size in parts.items() if size]
    card = smallest_card(run, parts)
    if card is None:
        return [*lines, f"  fits on no GPU of up to {CARDS[-1]} GiB: more processes, a sharding, LoRA or shorter rows"]
    generating, training = peaks(run, parts, card * GIB)
    if run.engine_share is not None:
        lines.append(f"  {f'vLLM: {run.engine_share:.0%} of {card} GiB':<28}{run.engine_share * card:>18.1f}")
    lines += [
        f"  {'peak while generating':<28}{generating / GIB:>18.1f}",
        f"  {'peak while training':<28}{training / GIB:>18.1f}",
        f"  fits on a GPU of {card} GiB",
    ]
    return lines


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
