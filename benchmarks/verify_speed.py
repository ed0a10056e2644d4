"""How much faster one step's rewards are than math-verify called one after another.

    python -m benchmarks.verify_speed

512 completions of a realistic mix: 60 % integers and letters, 30 % simple LaTeX, 10 % heavy
(equal expressions in different forms, sets, intervals, matrices, equations). Both sides see the
same completions and must reach the same verdicts. Ours starts with an empty cache; the start of
the worker processes, which a training run pays once, is reported apart and also included. Two
hostile items are then added to the batch: they may add their limit, not their sum. Raw rows go to
benchmarks/results/verify_speed.json. Takes a minute on two cores; target: ratio >= 10.
"""

import logging
import os
import random
import time
from pathlib import Path

import verify
from answers import workers
from answers.normalize import clean
from benchmarks import record
from data.cli import Parser

RESULTS = record.RESULTS / "verify_speed.json"
HOSTILE = [rf"\int_0^1 \int_0^1 \int_0^1 e^{{\sin(x^y)^{{\cos z}}}} dx dy dz + {k}" for k in (1, 2)]


def mix(seed: int) -> list[tuple[str, str, str]]:
    """512 (kind, prediction, gold), each kind about half right, all predictions distinct."""
    rng = random.Random(seed)
    rows = set()
    while len(rows) < 308:
        if rng.random() < 0.8:
            gold = rng.randint(-5000, 5000)
            rows.add(("integer", str(gold + rng.choice([0, 0, 1, -2])), str(gold)))
        else:
            gold = rng.choice("ABCDE")
            letter = rng.choice([gold, rng.choice("ABCDE")])
            rows.add(("letter", f"{letter}. {rng.randint(1, 999)}", gold))
    while len(rows) < 308 + 154:
        a, b, c = rng.randint(2, 97), rng.randint(2, 97), rng.choice([2, 3, 5, 7])
        d = a + rng.choice([0, 0, 1])
        rows.add(
            rng.choice(
                [
                    ("latex", rf"\dfrac{{{d}}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}"),
                    ("latex", rf"{d}\sqrt{{{c}}}", rf"{a}\sqrt{{{c}}}"),
                    ("latex", rf"{d}\pi", rf"{a}\pi"),
                    ("latex", rf"{d}^\circ", str(a)),
                    ("latex", f"x = {d}", str(a)),
                    (
                        "latex",
                        rf"\frac{{{d}\sqrt{{{c}}}}}{{{b}}}",
                        rf"\frac{{{a}\sqrt{{{c}}}}}{{{b}}}",
                    ),
                    ("latex", f"({d}, {b})", f"({a},{b})"),
                ]
            )
        )
    while len(rows) < 512:
        a, b, c = rng.randint(2, 40), rng.randint(2, 40), rng.choice([2, 3, 5, 7, 11])
        d = a + rng.choice([0, 0, 1])
        rows.add(
            rng.choice(
                [
                    (
                        "heavy",
                        rf"\frac{{{d * c}}}{{{b}\sqrt{{{c}}}}}",
                        rf"\frac{{{a}\sqrt{{{c}}}}}{{{b}}}",
                    ),
                    ("heavy", rf"(x+{d})^2", rf"x^2+{2 * a}x+{a * a}"),
                    ("heavy", rf"\{{{b}, {d}, {a + 100}\}}", rf"\{{{a}, {b}, {a + 100}\}}"),
                    (
                        "heavy",
                        rf"(-\infty, {d}) \cup ({a + 50}, \infty)",
                        rf"(-\infty,{a})\cup({a + 50},\infty)",
                    ),
                    (
                        "heavy",
                        rf"\begin{{pmatrix}} {d} & {b} \\ {c} & 1 \end{{pmatrix}}",
                        rf"\begin{{pmatrix}}{a}&{b}\\{c}&1\end{{pmatrix}}",
                    ),
                    ("heavy", rf"{2 * d}x + {2 * b}y = {2 * c}", rf"{a}x+{b}y={c}"),
                    ("heavy", rf"\sqrt{{{c * d * d}}}", rf"{a}\sqrt{{{c}}}"),
                    ("heavy", rf"2\sin({d}x)\cos({a}x)", rf"\sin({2 * a}x)"),
                ]
            )
        )
    rows = sorted(rows)
    rng.shuffle(rows)
    return rows


def ours(rows) -> tuple[list, float]:
    workers.pool.results.clear()
    clean.cache_clear()
    completions = [rf"We compute. The answer is \boxed{{{pred}}}." for _, pred, _ in rows]
    start = time.perf_counter()
    verdicts = verify.verify_many(
        [(verify.extract_boxed(c), gold) for c, (_, _, gold) in zip(completions, rows, strict=True)]
    )
    return verdicts, time.perf_counter() - start


def theirs(rows) -> tuple[list, float]:
    """math-verify as TRL's accuracy reward calls it, but with letters as strings."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, StringExtractionConfig, parse
    from math_verify import verify as math_verify

    latex = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=NormalizationConfig(units=True))]
    letters = [StringExtractionConfig(strings=("A", "B", "C", "D", "E"))]
    completions = [rf"We compute. The answer is $\boxed{{{pred}}}$." for _, pred, _ in rows]
    parse("$1$"), math_verify(parse(r"$\sqrt{2}$"), parse("$x$"))  # its imports are not counted
    verdicts, start = [], time.perf_counter()
    for completion, (kind, pred, gold) in zip(completions, rows, strict=True):
        if kind == "letter":
            verdicts.append(math_verify(parse(gold, letters), parse(pred, letters)))
        else:
            verdicts.append(math_verify(parse(f"${gold}$", latex), parse(completion, latex)))
    return verdicts, time.perf_counter() - start


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    start = time.perf_counter()
    verify.warm_up()
    startup = time.perf_counter() - start
    runs = []
    for seed in args.seeds:
        rows = mix(seed)
        our_verdicts, our_seconds = ours(rows)
        their_verdicts, their_seconds = theirs(rows)
        differ = [
            {"kind": k, "pred": p, "gold": g, "ours": a, "theirs": b}
            for (k, p, g), a, b in zip(rows, our_verdicts, their_verdicts, strict=True)
            if a is not b
        ]
        hostile_rows = rows + [("hostile", text, "1") for text in HOSTILE]
        _, hostile_seconds = ours(hostile_rows)
        run = {
            "seed": seed,
            "pairs": len(rows),
            "right": sum(map(bool, our_verdicts)),
            "ours_seconds": our_seconds,
            "math_verify_seconds": their_seconds,
            "ratio": their_seconds / our_seconds,
            "ratio_with_startup": their_seconds / (our_seconds + startup),
            "pairs_per_second": len(rows) / our_seconds,
            "seconds_added_by_two_hostile_items": hostile_seconds - our_seconds,
            "differences": differ,
        }
        runs.append(run)
        print(
            f"seed {seed}: ours {our_seconds:.3f} s ({run['pairs_per_second']:.0f} pairs/s), "
            f"math-verify {their_seconds:.2f} s, ratio {run['ratio']:.1f} "
            f"({run['ratio_with_startup']:.1f} with {startup:.1f} s of start-up), "
            f"{len(differ)} verdicts differ, "
            f"two hostile items add {run['seconds_added_by_two_hostile_items']:.2f} s"
        )
    packages = ("math-verify", "latex2sympy2_extended", "sympy", "mpmath")
    load = os.getloadavg()[0]
    record.write(args.output, packages, load=load, timeout=verify.TIMEOUT, startup_seconds=startup, runs=runs)


if __name__ == "__main__":
    main()
