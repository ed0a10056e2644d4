"""The CPU part of the speed benchmarks, beside the last committed rows, and which goals hold: `make bench`.

    python -m benchmarks.bench [--only recycle_speed prefix_cache ...]

10 minutes on two quiet cores. New rows go to runs/bench/, the committed ones in benchmarks/results/ stay.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import RESULTS
from data.cli import Parser, text_table

OUTPUT = Path("runs/bench")
ARGUMENTS = {
    "recycle_speed": [],
    "prefix_cache": [],
    "each_image": [],
    "step_cost": ["--ratios", "0", "0.25", "--engines", "transformers"],
}
MODEL_PARTS = {"policy generation", "recycled generation", "log-probs", "forward", "backward"}


@dataclass(frozen=True)
class Goal:
    """A figure of a benchmark's results, and what it should be at most (or, with `least`, at least)."""

    benchmark: str
    name: str
    figure: Callable[[dict], float]
    bound: float
    least: bool = False

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


def row_of(results: dict, **settings) -> dict:
    return next(row for row in results["table"] if settings.items() <= row.items())


def spark(results: dict, drop: bool) -> dict:
    return row_of(results, engine="transformers", recycle_ratio=0.25, drop_zero_advantage=drop)


GOALS = (
    Goal("recycle_speed", "64 x 8 rollouts to prompts, ms", lambda r: r["rows"][0]["recycle_ms"], 20),
    Goal(
        "recycle_speed",
        "a rollout's time at 4,096 x 16 over that at 64 x 8",
        lambda r: r["rows"][-1]["recycle_us_a_rollout"] / r["rows"][0]["recycle_us_a_rollout"],
        1.2,
    ),
    Goal("prefix_cache", "repeated tokens from the cache", lambda r: r["table"][0]["from_prefix_cache"], 0.8, True),
    Goal(
        "each_image",
        "seconds of a pass of 8 rows and 1 image, each image once over all",
        lambda r: row_of(r, rows=8, images=1)["seconds"],
        1.0,
    ),
    Goal(
        "step_cost",
        "share of what is neither generation, log-probs, forward nor backward",
        lambda r: 1 - sum(share for part, share in spark(r, False)["parts"].items() if part in MODEL_PARTS),
        0.03,
    ),
    Goal("step_cost", "seconds a token over GRPO's", lambda r: spark(r, False)["seconds_a_token_to_grpo"], 1.0),
    Goal(
        "step_cost",
        "seconds a rollout over GRPO's, rows without gradient left out",
        lambda r: spark(r, True)["seconds_a_rollout_to_grpo"],
        0.75,
    ),
    Goal(
        "step_cost",
        "a step's seconds with rows without gradient left out, times faster",
        lambda r: spark(r, False)["seconds"] / spark(r, True)["seconds"],
        1.4,
        True,
    ),
    Goal("step_cost", "padding of the trained tokens", lambda r: spark(r, True)["padding"], 0.15),
)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=ARGUMENTS, default=list(ARGUMENTS))
    args = parser.parse_args()
    for name in args.only:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *ARGUMENTS[name]]
        OUTPUT.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "--output", str(OUTPUT / f"{name}.json")], check=True, stderr=subprocess.DEVNULL)
    rows = []
    for goal in GOALS:
        if goal.benchmark not in args.only:
            continue
        values = [
            goal.figure(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
            for path in (folder / f"{goal.benchmark}.json" for folder in (OUTPUT, RESULTS))
        ]
        now, committed = ("-" if value is None else f"{value:.3g}" for value in values)
        bound = f"{'at least' if goal.least else 'at most'} {goal.bound:g}"
        rows.append([goal.name, now, committed, bound, "yes" if goal.holds(values[0]) else "no"])
    print("", *text_table([["", "now", "committed", "goal", "holds"], *rows]), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
