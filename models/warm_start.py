"""What make_digits.py and make_countdown.py share: judge and reflection prompts, the tokenizer, supervised training.

A warm start stands in for pre-training. It teaches the forms (answer, judge, reflect): at first without errors, so that
the model learns to compare; then with some answers and verdicts wrong on purpose, which leaves reliability for training
on verifiable rewards to gain.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from data.cli import Parser
from prompts import (
    PAIRWISE,
    POINTWISE_A_B,
    POINTWISE_YES_NO,
    REFLECT_ON_ANSWER,
    REFLECT_ON_COT,
    Form,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)

WINDOW = 50  # steps between two reports

# ---------------------------------------------------------------------------------------------------------------------
# Judge and reflection prompts, by a template drawn at random


def pointwise_example(right: str, wrong: str, rng: random.Random) -> tuple[str, bool, str, str]:
    """(instruction, whether it shows `right`, the verdict for correct, the verdict for incorrect)."""
    shows_right = rng.random() < 0.5
    letter, yes, no = rng.choice(((None, "Yes", "No"), ("A", "A", "B"), ("B", "B", "A")))
    template = rng.randrange(len(POINTWISE_A_B if letter else POINTWISE_YES_NO))
    return pointwise_instruction(right if shows_right else wrong, template, letter), shows_right, yes, no


def pairwise_example(first: str, second: str, rng: random.Random) -> str:
    return pairwise_instruction(first, second, rng.randrange(len(PAIRWISE)))


def reflection_example(right: str, wrong: str, form: Form, rng: random.Random) -> tuple[str, bool]:
    """(instruction, whether it shows `right`): a fifth does."""
    templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
    shows_right = rng.random() >= 0.8
    return reflection_instruction(right if shows_right else wrong, form, rng.randrange(len(templates))), shows_right


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def make_tokenizer(corpus: list[str], vocab_size: int, special_tokens: list[str], **settings):
    """Byte-level BPE; every number below 100 is one token. `settings` go to PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"\\boxed\{|</?response(?:_[ab])?>\n?|\d{1,2}| ?\p{L}+|[^\s\p{L}\p{N}] ?|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        **settings,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training


def encode(examples: list[tuple[str, list, str]], processor, comparisons: list[str]):
    """(model inputs with labels on the completions alone, mask of the labels that are in `comparisons`) of examples
    (user text, images, completion). `processor` may be a tokenizer where no example has an image."""
    import torch

    tokenizer = getattr(processor, "tokenizer", processor)
    prompts, images = [], []
    for user, pictures, _ in examples:
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": user}] if pictures else user
        turns = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        images += pictures
    completions = [f"{completion}<|im_end|>" for *_, completion in examples]
    inputs = processor(
        text=[prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        **({"images": images} if images else {}),
    )
    inputs.pop("token_type_ids", None)
    # Counted from the right end of each row: the processor adds image tokens to its prompt.
    labels = inputs["input_ids"].clone()  # (B, T)
    for row, (ids, mask) in enumerate(zip(tokenizer(completions)["input_ids"], inputs["attention_mask"], strict=True)):
        end = int(mask.sum())
        labels[row, : end - len(ids)] = -100
        labels[row, end:] = -100
    words = torch.tensor(tokenizer.convert_tokens_to_ids(comparisons))
    return {**inputs, "labels": labels}, torch.isin(labels, words)


def batches(example: Callable[[], tuple], processor, comparisons: list[str], rng: random.Random):
    """Encoded batches without end. Eight are drawn at once and sorted by length, for little padding."""
    size = 32
    while True:
        examples = sorted((example() for _ in range(8 * size)), key=lambda e: len(e[0]) + len(e[-1]))
        starts = list(range(0, len(examples), size))
        rng.shuffle(starts)
        for start in starts:
            yield encode(examples[start : start + size], processor, comparisons)


class WarmStart:
    """Supervised training in phases, each with its own batches and learning rates.

    A verdict follows from the one token that says how a comparison came out. It is the hardest to learn, and rare: it
    counts `comparison_weight` times. `bf16`: matrices are multiplied in bfloat16; the weights stay what they are.
    """

    def __init__(self, model, seed: int, comparison_weight: float, bf16: bool = False):
        import torch

        torch.manual_seed(seed)
        self.model, self.bf16 = model.train(), bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.comparison_weight, self.step = comparison_weight, 0

    def phase(self, batches: Iterator, learning_rates: list[float]) -> Iterator[tuple[int, float, float]]:
        """A step for each learning rate. Yields (step, loss, loss of the comparisons alone), means of WINDOW steps."""
        import torch

        losses, comparisons = [], []
        for rate, (inputs, compared) in zip(learning_rates, batches, strict=False):
            self.optimizer.param_groups[0]["lr"] = rate
            labels = inputs.pop("labels")[:, 1:]
            kept = labels != -100  # (B, T - 1); logits are only computed for these
            # Entered anew at each step: autocast keeps the weights that it has cast until it is left.
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.model.model(**inputs).last_hidden_state[:, :-1]
                logits = self.model.lm_head(hidden[kept]).float()
            loss = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")
            compared = compared[:, 1:][kept]
            weight = 1 + (self.comparison_weight - 1) * compared
            ((weight * loss).sum() / weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
            comparisons.append(loss.detach()[compared])
            self.step += 1
            if len(losses) == WINDOW:
                yield self.step, torch.cat(losses).mean().item(), torch.cat(comparisons).mean().item()
                losses, comparisons = [], []


def expect_learnt(step: int, loss: float, most: float) -> None:
    """Raises RuntimeError where it was not: with noise the judge would stay at chance (a loss of 0.69)."""
    if loss > most:
        raise RuntimeError(f"after {step} steps without noise comparing has loss {loss:.2f}, expected at most {most}")


def main(description: str, output: Path, make_processor: Callable, make_model: Callable, train: Callable) -> None:
    """The command: make a model, train it, save it."""
    parser = Parser(description)
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from tqdm.auto import tqdm

    processor = make_processor(args.seed)
    tokenizer = getattr(processor, "tokenizer", processor)
    model = make_model(tokenizer, args.seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    with tqdm(desc="warm start") as bar:
        for step, loss, comparing in train(model, processor, args.seed):
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", comparing=f"{comparing:.3f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"saved {args.output}")
