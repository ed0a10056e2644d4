r"""The small model of Countdown: a Llama of 1.1 M parameters that searches aloud, made from scratch.

    python -m models.make_countdown [--output models/countdown] [--seed 0]      10 minutes on two cores

A supervised warm start stands in for pre-training, on the train split's numbers only. It teaches the forms:

    answer, reflect   7-3=4, 4*2=8, wanted:14: no. 4+3=7, 7*2=14, wanted:14: yes. \boxed{(4+3)*2}
    judge             4+3=7, 7*2=14, wanted:14: yes. \boxed{Yes}

At first without errors, so that it learns to compare; then half of the answers it learns from claim a miss to be a hit,
and a fifth of the verdicts contradict the comparison before them. What training on verifiable rewards can gain is to
search longer and better, and to judge reliably.

What judging depends on:
- wrong answers claim success as right ones do, or the judge would learn to read the claim;
- what an expression makes and what is wanted stand side by side where they are compared, or it is not learnt in time;
- a search says no or yes as a judge does, so that either learns from the other.

Llama and not Qwen2, because transformers 5 gives every Qwen2 the pre-tokenizer of Qwen's own tokenizer, whatever
tokenizer.json says; that cuts numbers into digits.
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

from data.countdown import Game, Question, Way, attempt, checked, draw_question
from recycle import (
    PAIRWISE,
    POINTWISE_A_B,
    POINTWISE_YES_NO,
    PROMPT_SUFFIX,
    REFLECT_ON_ANSWER,
    REFLECT_ON_COT,
    ask,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)

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


# ---------------------------------------------------------------------------------------------------------------------
# What the model learns to write


def check(way: Way, question: Question) -> str:
    return checked(way.work, question.target, way.value == question.target)


def example(rng: random.Random, noise: Noise) -> tuple[str, str]:
    """One (user text, completion): answering, judging or reflecting."""
    question = draw_question("train", GAME, rng)
    prompt = question.text + PROMPT_SUFFIX
    task = rng.choices(("policy", "pointwise", "pairwise", "reflection"), (3, 3, 3, 2))[0]
    own, _ = attempt(question, rng.random() >= noise.miss, rng, GAME.most, noise.slip)
    if task == "policy":
        return prompt, own

    (right_text, right), (wrong_text, wrong) = (attempt(question, side, rng, GAME.most) for side in (True, False))
    form = rng.choice(("answer", "cot"))
    if form == "answer":
        right_text, wrong_text = right.expression, wrong.expression
    flipped = rng.random() < noise.flip

    if task == "reflection":
        templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
        text, way = (wrong_text, wrong) if rng.random() < 0.8 else (right_text, right)
        instruction = reflection_instruction(text, form, rng.randrange(len(templates)))
        completion = own if rng.random() < noise.forget else reconsidered(question, way, own)
    elif task == "pointwise":
        is_right = rng.random() < 0.5
        text, way = (right_text, right) if is_right else (wrong_text, wrong)
        letter = rng.choice((None, "A", "B"))
        template = rng.randrange(len(POINTWISE_A_B if letter else POINTWISE_YES_NO))
        instruction = pointwise_instruction(text, template, letter)
        says = is_right != flipped
        yes, no = ("Yes", "No") if letter is None else (letter, "BA"["AB".index(letter)])
        completion = f"{check(way, question)} \\boxed{{{yes if says else no}}}"
    else:
        best = rng.randrange(2)
        texts, ways = (
            ((right_text, wrong_text), (right, wrong)) if best == 0 else ((wrong_text, right_text), (wrong, right))
        )
        instruction = pairwise_instruction(*texts, rng.randrange(len(PAIRWISE)))
        work = " ".join(f"{name}: {check(way, question)}" for name, way in zip("AB", ways, strict=True))
        completion = f"{work} \\boxed{{{'AB'[best != flipped]}}}"
    return ask([{"role": "user", "content": prompt}], instruction)[0]["content"], completion


def reconsidered(question: Question, shown: Way, own: str) -> str:
    """The shown expression tried first: boxed where it makes the target, else followed by `own`."""
    rest = f"\\boxed{{{shown.expression}}}" if shown.value == question.target else own
    return f"{check(shown, question)} {rest}"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model


def make_tokenizer(seed: int):
    """Byte-level BPE trained on the project's own templates and questions; every number below 100 is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer/{seed}")
    corpus = [part for _ in range(5000) for part in example(rng, Noise())]
    corpus += [f"{n}" for n in range(100)] * 50
    corpus += [
        t for ts in (POINTWISE_YES_NO, POINTWISE_A_B, PAIRWISE, REFLECT_ON_COT, REFLECT_ON_ANSWER) for t in ts
    ] * 20
    corpus += ["user\n", "assistant\n", "system\n"] * 20

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
            vocab_size=1000,
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
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def make_model(tokenizer, seed: int):
    """A Llama of 1.1 M parameters: 4 layers of 128."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
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
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Warm start


def batch(examples: list[tuple[str, str]], tokenizer):
    """Model inputs of a list of examples, with labels on the completion tokens alone, and a mask of the comparisons."""
    import torch

    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False)
        for user, _ in examples
    ]
    prompt_ids = tokenizer(prompts)["input_ids"]
    completion_ids = tokenizer([f"{completion}<|im_end|>" for _, completion in examples])["input_ids"]
    length = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    comparisons = torch.isin(labels, torch.tensor(tokenizer.convert_tokens_to_ids(["no", "yes"])))
    return ids, labels, comparisons


CLEAN = Noise(miss=0.0, flip=0.0)
LEARNT = 0.1  # loss of the comparisons; a coin has 0.69


def batches(tokenizer, rng: random.Random, noise: Noise, batch_size: int = 32, pool: int = 8):
    """Batches without end. Eight are drawn at once and sorted by length, so that little of a batch is padding."""
    while True:
        drawn = sorted((example(rng, noise) for _ in range(pool * batch_size)), key=lambda e: len(e[0]) + len(e[1]))
        starts = list(range(0, len(drawn), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield batch(drawn[start : start + batch_size], tokenizer)


def warm_start(model, tokenizer, seed: int, clean_steps: int = 1200, noisy_steps: int = 200):
    """Supervised training, first without noise, then with it. Yields (step, loss, loss of the comparisons alone), means
    of 50 steps.

    A comparison is one token, `yes` or `no`, the hardest to learn and what the rest follows from: it counts fivefold.

    Raises RuntimeError where the steps without noise were too few to learn it; noise would leave a judge that tosses a
    coin.
    """
    import torch

    torch.manual_seed(seed)
    rng = random.Random(f"warm-start/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    losses, comparing = [], []
    peak, steps = 2e-3, clean_steps + noisy_steps
    clean, noisy = batches(tokenizer, rng, CLEAN), batches(tokenizer, rng, Noise())
    for step in range(1, steps + 1):
        ids, labels, comparisons = next(clean if step <= clean_steps else noisy)
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = peak * cosine * min(1, step / 100)
        labels, comparisons = labels[:, 1:], comparisons[:, 1:]
        kept = labels != -100
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (b, T, hidden)
        logits = model.lm_head(hidden[kept])  # of the completions alone
        loss = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")
        compared = comparisons[kept]
        weight = 1.0 + 4.0 * compared
        ((weight * loss).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        comparing.append(loss.detach()[compared])
        if len(losses) == 50 or step in (clean_steps, steps):
            means = torch.cat(losses).mean().item(), torch.cat(comparing).mean().item()
            yield step, *means
            if step == clean_steps and means[1] > LEARNT:
                raise RuntimeError(f"after {step} steps comparing has loss {means[1]:.2f}, expected under {LEARNT}")
            losses, comparing = [], []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from tqdm.auto import tqdm

    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    with tqdm(desc="warm start") as bar:
        for step, loss, comparing in warm_start(model, tokenizer, args.seed):
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", comparing=f"{comparing:.3f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
