"""What training of SmolLM2-135M starts from: samples and accuracies of policy, judge and reflection on arithmetic.

    python -m benchmarks.smollm2_start [runs/smollm2_135m_start] [--questions 200] [--digits 1]

Prints one prompt and completion of each kind. Nothing is written.
"""

import random

import verify
from data.arithmetic import arithmetic_rows
from data.cli import Parser
from engines import Request, Sampling, TransformersEngine, complete
from prompts import ask, pairwise_instruction, pointwise_instruction, reflection_instruction


def look(model: str, questions: int, digits: int) -> None:
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
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?", default="runs/smollm2_135m_start")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--digits", type=int, default=1)
    args = parser.parse_args()
    look(args.model, args.questions, args.digits)


if __name__ == "__main__":
    main()
