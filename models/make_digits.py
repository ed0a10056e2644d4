"""The demo's model: a Qwen2.5-VL of 1.2 M parameters, made from scratch in minutes on two cores.

    python -m models.make_digits [--output models/digits] [--seed 0]

A supervised warm start (models/warm_start.py) on the train split's digits, first without errors, then with `Noise`.

    answer, reflect   Digits:3,4. 3+4=7. \\boxed{7}
    judge             Digits:3,4. 3+4=7. Mine:7, shown:8, differs: incorrect. \\boxed{No}
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from data.digits import IMAGE_KINDS, TEXT_KINDS, draw, question, solve
from models import warm_start
from prompts import PROMPT_SUFFIX, TEMPLATES

OUTPUT = Path(__file__).parent / "digits"

# The shape of Qwen2.5-VL's own template: roles between <|im_start|> and <|im_end|>, an image as three vision tokens.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""

SPECIAL_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
""".split()


@dataclass(frozen=True)
class Noise:
    """What the warm start gets wrong on purpose, as probabilities."""

    misread: float = 0.5  # a result is wrong, mostly by a misread digit
    reflect: float = 1.0  # the same when reflecting: at the start, looking again does more harm than good
    flip: float = 0.17  # a verdict contradicts the comparison before it


# ---------------------------------------------------------------------------------------------------------------------
# What the model learns to write


def work(kind: str, values: tuple[int, ...], result: int) -> str:
    """The reasoning before the box, for the digits as read and the result as computed."""
    read = "" if kind in TEXT_KINDS else f"Digits:{','.join(map(str, values))}. "
    if kind in ("largest", "smallest"):
        return f"{read}{kind.capitalize()}:{result}."
    if kind == "difference":
        steps = f"{max(values)}-{min(values)}"
    elif kind == "factor":
        steps = f"{values[1]}/{values[0]}"
    else:
        steps = "+".join(map(str, values))
    return f"{read}{steps}={result}."


def attempt(kind: str, values: tuple[int, ...], wrong: bool, rng: random.Random) -> tuple[str, int]:
    """(reasoning, result). A wrong result comes from a misread digit, or (without an image always) from a slip."""
    gold = solve(kind, values)
    read, result = values, gold
    while wrong and (result == gold or result < 0):
        read = values
        if kind in TEXT_KINDS or rng.random() < 0.15:
            result = gold + rng.choice((-2, -1, 1, 2))
        else:
            place = rng.randrange(len(values))
            read = (*values[:place], rng.randrange(10), *values[place + 1 :])
            result = solve(kind, read)
    return work(kind, read, result), result


def candidate_text(reasoning: str, result: int, form: str) -> str:
    """A rollout as recycling shows it."""
    return str(result) if form == "answer" else f"{reasoning} \\boxed{{{result}}}"


def example(rng: random.Random, noise: Noise) -> tuple[str, list, str]:
    """One (user text, images, completion): answering, judging or reflecting."""
    kind, values, text = question(rng)
    images = [draw(values, "train", rng)] if kind in IMAGE_KINDS else []
    gold = solve(kind, values)
    task = rng.choices(("policy", "pointwise", "pairwise", "reflection"), (3, 4, 3, 2))[0]
    misread = noise.reflect if task == "reflection" else noise.misread
    reasoning, result = attempt(kind, values, rng.random() < misread, rng)
    form = rng.choice(("answer", "cot"))
    if task == "policy":
        return text + PROMPT_SUFFIX, images, f"{reasoning} \\boxed{{{result}}}"

    right_text = candidate_text(*attempt(kind, values, False, rng), form)
    wrong_work, wrong_result = attempt(kind, values, True, rng)
    wrong_text = candidate_text(wrong_work, wrong_result, form)
    flipped = rng.random() < noise.flip

    if task == "reflection":
        instruction, _ = warm_start.reflection_example(right_text, wrong_text, form, rng)
    elif task == "pointwise":
        instruction, shows_right, yes, no = warm_start.pointwise_example(right_text, wrong_text, rng)
        shown = gold if shows_right else wrong_result
        compared = "same" if result == shown else "differs"
        opinion, verdict = ("correct", yes) if (result == shown) != flipped else ("incorrect", no)
        reasoning += f" Mine:{result}, shown:{shown}, {compared}: {opinion}."
        result = verdict
    else:
        texts, shown = (right_text, wrong_text), (gold, wrong_result)
        if rng.random() >= 0.5:
            texts, shown = texts[::-1], shown[::-1]
        instruction = warm_start.pairwise_example(*texts, rng)
        best = shown.index(result) if result in shown else rng.randrange(2)
        compared = ["same" if each == result else "differs" for each in shown]
        reasoning += f" Mine:{result}, A:{shown[0]} {compared[0]}, B:{shown[1]} {compared[1]}."
        result = "AB"[best != flipped]
    return f"{text}\n\n{instruction}", images, f"{reasoning} \\boxed{{{result}}}"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, processor, model


def make_tokenizer(seed: int):
    rng = random.Random(f"tokenizer/{seed}")
    return warm_start.make_tokenizer(
        [part for _ in range(20_000) for part in example(rng, Noise())[::2]]
        + [f"{n}" for n in range(100)] * 200
        + [*TEMPLATES, "user\n", "assistant\n", "system\nYou are a helpful assistant."] * 50,
        vocab_size=1400,
        special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={name: f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")},
    )


def make_processor(seed: int):
    """Qwen2.5-VL's processor around that tokenizer, with an image budget that leaves 28 x 28 a digit."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2),
        tokenizer=make_tokenizer(seed),
        video_processor=Qwen2VLVideoProcessor(size=size, patch_size=14, merge_size=2),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, seed: int):
    """A Qwen2.5-VL of about 1.2 M parameters: text 4 layers of 128, vision 2 layers of 64."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "initializer_range": 0.06,  # 0.02 is for widths in the thousands; at 128 attention starts flat
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
            "tokens_per_second": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


# ---------------------------------------------------------------------------------------------------------------------
# Warm start


CLEAN = Noise(0.0, 0.0, 0.0)
COMPARISONS = ["same", "differs", "Ġsame", "Ġdiffers"]


def train(model, processor, seed: int, clean_steps: int = 2000, clean_loss: float = 0.05, noisy_steps: int = 800):
    """Without noise until the loss of the comparisons is under `clean_loss`, then `noisy_steps` with noise.

    Yields (step, loss, loss of the comparisons). Raises RuntimeError where `clean_steps` were not enough.
    """
    training = warm_start.WarmStart(model, seed, comparison_weight=10)
    rng = random.Random(f"warm-start/{seed}")

    def batches(noise: Noise):
        return warm_start.batches(lambda: example(rng, noise), processor, COMPARISONS, rng)

    peak, floor = 2e-3, 3e-4
    cosine = [floor + (peak - floor) * (1 + math.cos(math.pi * i / clean_steps)) / 2 for i in range(clean_steps)]
    for progress in training.phase(batches(CLEAN), [rate * min(1, (i + 1) / 180) for i, rate in enumerate(cosine)]):
        yield progress
        if progress[2] < clean_loss:
            break
    warm_start.expect_learnt(training.step, progress[2], clean_loss)
    yield from training.phase(batches(Noise()), [peak / 2 * (1 - i / noisy_steps) for i in range(noisy_steps)])


if __name__ == "__main__":
    warm_start.main(__doc__, OUTPUT, make_processor, make_model, train)
