"""The small model of the demo: real Qwen2.5-VL classes, 1.2 M parameters, made from scratch in minutes on two cores.

    python -m models.make_digits [--output models/digits] [--seed 0]

A supervised warm start stands in for pre-training. It teaches the forms (read the digits, compute, box; judge by
computing and comparing; reflect) but leaves the model noisy: a share of the readings and of the verdicts it learns from
are wrong on purpose. What training on verifiable rewards can then gain is to answer and to judge reliably.

First without noise, so that it learns to compare two numbers at all, then with it. The train split's digits only.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from data.cli import Parser
from data.digits import IMAGE_KINDS, TEXT_KINDS, draw, question, solve
from prompts import (
    PAIRWISE,
    POINTWISE_A_B,
    POINTWISE_YES_NO,
    PROMPT_SUFFIX,
    REFLECT_ON_ANSWER,
    REFLECT_ON_COT,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)

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

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


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
    match kind:
        case "sum" | "plus":
            steps = f"{'+'.join(map(str, values))}={result}."
        case "difference":
            steps = f"{max(values)}-{min(values)}={result}."
        case "largest" | "smallest":
            steps = f"{kind.capitalize()}:{result}."
        case "factor":
            steps = f"{values[1]}/{values[0]}={result}."
    return read + steps


def attempt(kind: str, values: tuple[int, ...], wrong: bool, rng: random.Random) -> tuple[str, int]:
    """(reasoning, result); a wrong result comes from a misread digit, now and then (always without an image) from a
    slip."""
    gold = solve(kind, values)
    if not wrong:
        return work(kind, values, gold), gold
    while True:
        read = values
        if kind in TEXT_KINDS or rng.random() < 0.15:
            result = gold + rng.choice((-2, -1, 1, 2))
        else:
            place = rng.randrange(len(values))
            read = (*values[:place], rng.randrange(10), *values[place + 1 :])
            result = solve(kind, read)
        if result != gold and result >= 0:
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
        templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
        candidate = wrong_text if rng.random() < 0.8 else right_text
        instruction = reflection_instruction(candidate, form, rng.randrange(len(templates)))
        completion = f"{reasoning} \\boxed{{{result}}}"
    elif task == "pointwise":
        right = rng.random() < 0.5
        seen = gold if right else wrong_result
        same = result == seen
        letter = rng.choice((None, "A", "B"))
        template = rng.randrange(len(POINTWISE_A_B if letter else POINTWISE_YES_NO))
        instruction = pointwise_instruction(right_text if right else wrong_text, template, letter)
        says = same != flipped
        yes, no = ("Yes", "No") if letter is None else (letter, "BA"["AB".index(letter)])
        verdict = yes if says else no
        compared = "same" if same else "differs"
        opinion = "correct" if says else "incorrect"
        completion = f"{reasoning} Mine:{result}, shown:{seen}, {compared}: {opinion}. \\boxed{{{verdict}}}"
    else:
        a_right = rng.random() < 0.5
        pair = (right_text, wrong_text) if a_right else (wrong_text, right_text)
        seen = (gold, wrong_result) if a_right else (wrong_result, gold)
        instruction = pairwise_instruction(*pair, rng.randrange(len(PAIRWISE)))
        matches = [result == s for s in seen]
        best = matches.index(True) if True in matches else rng.randrange(2)
        said = ["same" if m else "differs" for m in matches]
        verdict = "AB"[best != flipped]
        completion = f"{reasoning} Mine:{result}, A:{seen[0]} {said[0]}, B:{seen[1]} {said[1]}. \\boxed{{{verdict}}}"
    return f"{text}\n\n{instruction}", images, completion


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, processor, model


def make_tokenizer(seed: int):
    """Byte-level BPE trained on the project's own templates and questions; every number below 100 is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer/{seed}")
    corpus = [part for _ in range(20_000) for part in example(rng, Noise())[::2]]
    corpus += [f"{n}" for n in range(100)] * 200
    corpus += [
        t for group in (POINTWISE_YES_NO, POINTWISE_A_B, PAIRWISE, REFLECT_ON_COT, REFLECT_ON_ANSWER) for t in group
    ] * 50
    corpus += ["user\n", "assistant\n", "system\nYou are a helpful assistant."] * 50

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\\boxed\{|</?response(?:_[ab])?>\n?|\d{1,2}| ?\p{L}+|[^\s\p{L}\p{N}] ?|\s+"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1400,
            min_frequency=2,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={name: f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
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
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Warm start


def batch(examples, processor):
    """Model inputs of a list of examples, with labels on the completion tokens alone, and a mask of the comparisons."""
    import torch

    texts, images = [], []
    for user, pictures, completion in examples:
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": user}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append((prompt, f"{completion}<|im_end|>"))
        images += pictures
    inputs = processor(
        text=[prompt + completion for prompt, completion in texts],
        images=images or None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    # Count from the right end of each row: what the processor adds to a prompt (image tokens) is in front of it.
    completion_lengths = [len(ids) for ids in processor.tokenizer([c for _, c in texts])["input_ids"]]
    labels = inputs["input_ids"].clone()
    for row, (length, mask) in enumerate(zip(completion_lengths, inputs["attention_mask"], strict=True)):
        end = int(mask.sum())
        labels[row, : end - length] = -100
        labels[row, end:] = -100
    words = processor.tokenizer.convert_tokens_to_ids(["same", "differs", "Ġsame", "Ġdiffers"])
    compared = torch.isin(labels, torch.tensor(words))
    return {**inputs, "labels": labels}, compared


CLEAN = Noise(0.0, 0.0, 0.0)


def training_batches(processor, rng: random.Random, noise: Noise, batch_size: int = 32, pool: int = 8):
    """Batches without end. Eight are drawn at once and sorted by length, so that little of a batch is padding."""
    while True:
        drawn = sorted((example(rng, noise) for _ in range(pool * batch_size)), key=lambda e: len(e[0]) + len(e[2]))
        starts = list(range(0, len(drawn), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield batch(drawn[start : start + batch_size], processor)


def warm_start(model, processor, seed: int, clean_steps: int = 2000, clean_loss: float = 0.05, noisy_steps: int = 800):
    """Supervised training. Yields (step, loss, loss of the comparisons alone), means of 50 steps.

    A verdict follows from one token, `same` or `differs`, which is 2 % of what there is to learn and the hardest of it:
    it counts tenfold, and the part without noise lasts until its loss is under `clean_loss` (a coin has 0.69). Noise
    before that would leave a judge that tosses a coin. Then `noisy_steps` with noise.

    Raises RuntimeError when `clean_steps` were not enough.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(f"warm-start/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    step = 0

    def train(noise: Noise, learning_rates):
        nonlocal step
        losses, comparisons = [], []
        for rate, (inputs, compared) in zip(learning_rates, training_batches(processor, rng, noise), strict=False):
            optimizer.param_groups[0]["lr"] = rate
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs).logits[:, :-1][labels != -100].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none")
            weight = 1.0 + 9.0 * compared[:, 1:][labels != -100]
            ((weight * loss).sum() / weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            comparisons.append(loss.detach()[weight > 1])
            step += 1
            if len(losses) == 50:
                yield step, torch.cat(losses).mean().item(), torch.cat(comparisons).mean().item()
                losses, comparisons = [], []

    peak, floor = 2e-3, 3e-4
    cosine = [floor + (peak - floor) * (1 + math.cos(math.pi * i / clean_steps)) / 2 for i in range(clean_steps)]
    for progress in train(CLEAN, [rate * min(1, (i + 1) / 180) for i, rate in enumerate(cosine)]):
        yield progress
        if progress[2] < clean_loss:
            break
    else:
        raise RuntimeError(
            f"after {clean_steps} clean steps comparing has loss {progress[2]:.2f}, not under {clean_loss}"
        )
    yield from train(Noise(), [peak / 2 * (1 - i / noisy_steps) for i in range(noisy_steps)])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from tqdm.auto import tqdm

    processor = make_processor(args.seed)
    model = make_model(processor.tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    with tqdm(desc="warm start") as bar:
        for step, loss, comparing in warm_start(model, processor, args.seed):
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", comparing=f"{comparing:.3f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
