"""A start for Countdown whose judge can check an answer and rarely does.

    python -m benchmarks.trusting [--steps 150] [--output runs/learning/trusting_start]      2 minutes on two cores

models/countdown, trained on with three verdicts of four given without a check: that the answer is right, that the first
one of two is. A judge that is only noisy (models/countdown's) is as good as a trained one at temperature 0; this one
is not, since checking is not what it does most of the time.
"""

import random
from pathlib import Path

from data.cli import Parser

START = Path("runs/learning/trusting_start")
TRUST = 0.75  # share of the verdicts
LEARNING_RATE = 3e-4


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=START)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models import make_countdown, warm_start

    noise = make_countdown.Noise(trust=TRUST)
    tokenizer = AutoTokenizer.from_pretrained(make_countdown.OUTPUT)
    model = AutoModelForCausalLM.from_pretrained(make_countdown.OUTPUT, dtype=torch.float32)
    rng = random.Random("trusting")
    batches = warm_start.batches(lambda: make_countdown.example(rng, noise), tokenizer, ["no", "yes"], rng)
    training = warm_start.WarmStart(model, seed=0, comparison_weight=5)
    rates = [LEARNING_RATE * (1 - step / args.steps) for step in range(args.steps)]
    for step, loss, comparing in training.phase(batches, rates):
        print(f"step {step}: loss {loss:.3f}, of comparisons {comparing:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
