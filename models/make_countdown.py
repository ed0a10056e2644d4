r"""Countdown's model: a Llama of 1.1 M parameters that searches aloud, made from scratch.

    python -m models.make_countdown [--output models/countdown] [--seed 0]      10 minutes on two cores

A supervised warm start (models/warm_start.py), on the train split's numbers only. It teaches the forms:

    answer, reflect   7-3=4, 4*2=8, wanted:14: no. 4+3=7, 7*2=14, wanted:14: yes. \boxed{(4+3)*2}
    judge             4+3=7, 7*2=14, wanted:14: yes. \boxed{Yes}

First without errors, then with `Noise`.

What judging depends on:
- wrong answers claim success as right ones do, or the judge would learn to read the claim;
- the result of an expression and the target stand next to each other where they are compared, or comparing is not
  learnt in time;
- a search says no or yes as a judge does, so that each is practice for the other.

Llama, not Qwen2: transformers 5 gives every Qwen2 the pre-tokenizer of Qwen's own tokenizer, whatever tokenizer.json
says, and that one cuts numbers into digits.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from data.countdown import Game, Question, Way, attempt, checked, draw_question
from models import warm_start
from prompts import PROMPT_SUFFIX, TEMPLATES, ask

OUTPUT = Path(__file__).parent / "countdown"
GAME = Game()
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# The shape of Qwen2.5's own template.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


@dataclass(frozen=True)
class Noise:
    """What the warm start gets wrong on purpose, as probabilities."""

    miss: float = 0.5  # an answer boxes an expression that misses the target
    slip: float = 0.0  # of those, whose last result is called the target
    forget: float = 0.5  # a reflection does not try the shown expression first
    flip: float = 0.2  # a verdict contradicts the comparison before it
    trust: float = 0.0  # a verdict is given without a check: the answer is right, the first one of two is


# ---------------------------------------------------------------------------------------------------------------------
# What the model learns to write


def check(way: Way, question: Question) -> str:
    return checked(way.work, question.target, way.value == question.target)


def example(rng: random.Random, noise: Noise) -> tuple[str, list, str]:
    """One (user text, images (none), completion): answering, judging or reflecting."""
    question = draw_question("train", GAME, rng)
    prompt = question.text + PROMPT_SUFFIX
    task = rng.choices(("policy", "pointwise", "pairwise", "reflection"), (3, 3, 3, 2))[0]
    answer, _ = attempt(question, rng.random() >= noise.miss, rng, GAME.most, noise.slip)
    if task == "policy":
        return prompt, [], answer

    (right_text, right), (wrong_text, wrong) = (attempt(question, side, rng, GAME.most) for side in (True, False))
    form = rng.choice(("answer", "cot"))
    if form == "answer":
        right_text, wrong_text = right.expression, wrong.expression
    flipped = rng.random() < noise.flip
    trusting = noise.trust > 0 and rng.random() < noise.trust

    if task == "reflection":
        instruction, shows_right = warm_start.reflection_example(right_text, wrong_text, form, rng)
        if rng.random() >= noise.forget:  # the shown expression is tried first, and boxed where it makes the target
            way = right if shows_right else wrong
            answer = f"{check(way, question)} " + (f"\\boxed{{{way.expression}}}" if shows_right else answer)
    elif task == "pointwise":
        instruction, shows_right, yes, no = warm_start.pointwise_example(right_text, wrong_text, rng)
        verdict = yes if shows_right != flipped else no
        answer = f"{check(right if shows_right else wrong, question)} \\boxed{{{verdict}}}"
        if trusting:
            answer = f"\\boxed{{{yes}}}"
    else:
        best = rng.randrange(2)
        texts, ways = (right_text, wrong_text), (right, wrong)
        if best == 1:
            texts, ways = texts[::-1], ways[::-1]
        instruction = warm_start.pairwise_example(*texts, rng)
        work = " ".join(f"{name}: {check(way, question)}" for name, way in zip("AB", ways, strict=True))
        answer = r"\boxed{A}" if trusting else f"{work} \\boxed{{{'AB'[best != flipped]}}}"
    return ask(prompt, instruction), [], answer


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model


def make_tokenizer(seed: int):
    rng = random.Random(f"tokenizer/{seed}")
    return warm_start.make_tokenizer(
        [part for _ in range(5000) for part in example(rng, Noise())[::2]]
        + [f"{n}" for n in range(100)] * 50
        + [*TEMPLATES, "user\n", "assistant\n", "system\n"] * 20,
        vocab_size=1000,
        special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, seed: int):
    """A Llama of 1.1 M parameters: 4 layers of 128."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            initializer_range=0.06,  # 0.02 is for widths in the thousands; at 128 attention starts flat
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Warm start

CLEAN = Noise(miss=0.0, flip=0.0)
LEARNT = 0.1  # loss of the comparisons; a coin has 0.69


def train(model, tokenizer, seed: int, clean_steps: int = 1200, noisy_steps: int = 200):
    """`clean_steps` without noise, then `noisy_steps` with it.

    Yields (step, loss, loss of the comparisons). Raises RuntimeError where `clean_steps` were not enough.
    """
    training = warm_start.WarmStart(model, seed, comparison_weight=5)
    rng = random.Random(f"warm-start/{seed}")

    def batches(noise: Noise):
        return warm_start.batches(lambda: example(rng, noise), tokenizer, ["no", "yes"], rng)

    steps = clean_steps + noisy_steps
    cosine = [0.05 + 0.95 * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(1, steps + 1)]
    rates = [2e-3 * share * min(1, i / 100) for i, share in enumerate(cosine, 1)]
    for progress in training.phase(batches(CLEAN), rates[:clean_steps]):
        yield progress
    warm_start.expect_learnt(training.step, progress[2], LEARNT)
    yield from training.phase(batches(Noise()), rates[clean_steps:])


if __name__ == "__main__":
    warm_start.main(__doc__, OUTPUT, make_tokenizer, make_model, train)
