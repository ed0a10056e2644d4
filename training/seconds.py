"""How long a generation takes: from tokens, parameters, GPUs and bandwidths to seconds, part by part.

An estimate to compare settings by, not a promise: `--plan` prints it with its assumptions, docs/scaling.md says what
follows from it, and benchmarks/step_cost.py has what was measured.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.plan import Architecture, Run, Steps


@dataclass(frozen=True)
class Card:
    """A GPU, and the shares of its peaks that are usually reached."""

    name: str = "H100 80GB"
    flops: float = 989e12  # a second, dense bfloat16
    memory: float = 3.35e12  # bytes a second
    links: float = 450e9  # bytes a second to the other GPUs of its node
    network: float = 50e9  # and to other nodes: 400 Gbit/s
    per_node: int = 8
    training: float = 0.4  # of flops, forward and backward
    prefill: float = 0.5  # of flops
    decoding: float = 0.6  # of memory: vLLM with CUDA graphs
    launching: float = 0.03  # seconds a token of transformers' generate, which waits for Python


@dataclass(frozen=True)
class Lengths:
    """Tokens of an average row, where `Run` has the longest."""

    prompt: float
    recycled_prompt: float
    completion: float


def average_lengths(run: "Run", model: "Architecture") -> Lengths:
    """Completions of half their limit; a question of 256 tokens, and an image at its budget (a megapixel without one)
    where there are any."""
    image = (run.max_pixels or 2**20) // model.pixels_per_token if run.images and model.pixels_per_token else 0
    prompt = min(run.args.max_prompt_length, 256 + image)
    completion = run.args.max_completion_length / 2
    return Lengths(prompt, prompt + 1.5 * completion + 64, completion)  # a pair quotes two rollouts, a point one


def generation_seconds(
    run: "Run", counts: "Steps", model: "Architecture", lengths: Lengths, card: Card
) -> dict[str, float]:
    """Seconds of one generation by part, on cards of one kind, with every row trained on.

    2 floating point operations a parameter and token forward, 4 backward, 2 more where activations are computed again;
    attention itself and the vision tower's share of the parameters are in that, roughly. Decoding reads the weights
    once a token of the longest completion, and the cache of every sequence; a group's prompt is prefilled once.
    """
    args, processes = run.args, run.launch.processes
    gpus = args.vllm_tensor_parallel_size if run.engine_share is not None else 1  # of an engine
    weights = 2 * model.parameters  # bytes, bfloat16
    cache = 4 * model.layers * model.kv_width  # bytes a token

    def generating(prompts: float, rollouts: float, prompt: float) -> float:
        if not prompts:
            return 0.0
        sequences = rollouts * gpus / processes
        prefill = 2 * model.parameters * prompts * prompt / (processes * card.flops * card.prefill)
        cached = sequences * lengths.completion * (prompt + lengths.completion / 2) * cache
        reads = args.max_completion_length * weights + cached
        compute = 2 * model.parameters * sequences * lengths.completion / (gpus * card.flops * card.prefill)
        launches = 0 if args.use_vllm else args.max_completion_length * card.launching
        return prefill + max(reads / (gpus * card.memory * card.decoding), compute, launches)

    policy_tokens = counts.rollouts * (lengths.prompt + lengths.completion)
    recycled_tokens = counts.recycled_rollouts * (lengths.recycled_prompt + lengths.completion)
    tokens = (policy_tokens + recycled_tokens / args.recycle_every) / processes
    forward = 2 * model.parameters * tokens / (card.flops * card.training)
    links = card.links if processes <= card.per_node else card.network
    sharded = run.launch.sharding in ("zero3", "fsdp2")
    # Weights gathered forward and backward and gradients spread in each micro-step, or one exchange an optimizer step.
    passes = run.micro_steps * (1 + args.recycle_ratio / args.recycle_every)
    exchanges = 3 * passes if sharded else 2 * float(counts.optimizer_steps)
    compute = forward * (4 if args.gradient_checkpointing else 3) * args.num_iterations
    exchanged = exchanges * weights / links if processes > 1 else 0.0
    recycled = generating(counts.recycled_prompts, counts.recycled_rollouts, lengths.recycled_prompt)
    return {
        "policy generation": generating(counts.prompts, counts.rollouts, lengths.prompt),
        "recycled generation": recycled / args.recycle_every,
        "log-probs": forward * (run.scores + (args.beta != 0)),
        "forward, backward": max(compute, exchanged),  # they overlap
        "weight sync": weights / links * (processes > 1) + weights / card.memory,
    }
