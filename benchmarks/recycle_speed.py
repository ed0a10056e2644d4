"""How long recycling takes: scored rollouts in, prompts out, without model or trainer. One core.

    python -m benchmarks.recycle_speed [--tokens 700] [--repeats 5]

Groups of mixed difficulty, rollouts of so many tokens (four letters each), answers compared as text. The time of
`recycle`, and of taking the box out of each rollout, from 64 questions x 8 rollouts (a step of the paper's) to
4,096 x 16. Writes benchmarks/results/recycle_speed.json.
"""

import random
import statistics
import time
from pathlib import Path

from benchmarks import record
from data.cli import Parser
from recycle import Group, Limits, RecycleConfig, Rollout, recycle
from verify import extract_boxed

RESULTS = record.RESULTS / "recycle_speed.json"
SIZES = ((64, 8), (256, 8), (1024, 16), (4096, 16))


def texts_of(n: int, size: int, tokens: int) -> list[tuple[str, bool]]:
    """Rollouts that end in a box, right with a probability that differs from question to question."""
    rng = random.Random(0)
    words = ["word", "step", "then", "so 4", "x=12", "hence"]
    body = [" ".join(rng.choices(words, k=tokens)) for _ in range(64)]
    drawn = []
    for _ in range(n):
        p = rng.betavariate(1, 1)
        for _ in range(size):
            right = rng.random() < p
            drawn.append((f"{rng.choice(body)} \\boxed{{{12 if right else rng.randrange(100, 999)}}}", right))
    return drawn


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for n, size in SIZES:
        drawn = texts_of(n, size, args.tokens)
        times = {"boxes": [], "recycle": []}
        for repeat in range(args.repeats):
            start = time.perf_counter()
            rollouts = [Rollout(text, extract_boxed(text), right) for text, right in drawn]
            times["boxes"].append(time.perf_counter() - start)
            groups = [Group(str(i), f"Question {i}?", tuple(rollouts[i * size : (i + 1) * size])) for i in range(n)]
            limits = Limits(equal=lambda pairs: [a == b for a, b in pairs])
            start = time.perf_counter()
            items, _ = recycle(groups, repeat, RecycleConfig(), limits)
            times["recycle"].append(time.perf_counter() - start)
        row = {"questions": n, "rollouts": n * size, "items": len(items)}
        row |= {f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in times.items()}
        row["recycle_us_a_rollout"] = 1000 * row["recycle_ms"] / row["rollouts"]
        rows.append(row)
        print(
            f"{n} x {size}: recycle {row['recycle_ms']:.1f} ms ({len(items)} prompts), boxes {row['boxes_ms']:.1f} ms"
        )
    record.write(args.output, packages=(), rows=rows)


if __name__ == "__main__":
    main()
