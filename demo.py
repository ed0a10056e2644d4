"""The demo: SPARK on real handwritten digits, measured before and after on held-out ones. No GPU, about 5 minutes.

    make demo                      set-up, then this file
    python demo.py [--output runs/demo] [--steps 42] [--questions 300]

1. draw a held-out benchmark: digits that neither the warm start nor training saw
2. measure the shipped checkpoint on it
3. train: train_spark.py with recipes/demo.yaml
4. measure the trained model on the same questions
5. write metrics.json and report.html, print a table

Each stage writes its result and is skipped if that exists: an interrupted demo resumes when it is run again.
"""

import hashlib
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import verify
from data.cli import Parser, text_table, write_atomically
from engines import Request, TransformersEngine, complete
from evaluate import Settings, evaluate_records
from prompts import PROMPT_SUFFIX, ask, neutralise, reflection_instruction

START = Path("models/digits")
SAMPLES = 4  # at temperature 1

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The held-out benchmark


def held_out(n: int, split: str = "test", seed: int = 1) -> dict[str, list[Row]]:
    """`n` questions, each with a right and a wrong answer that no model wrote, as rows for evaluate.py: `answers`,
    `pairs` and `points`. For half of the questions the answers come with their reasoning. Images are PIL images."""
    from data.digits import draw, question, solve
    from models.make_digits import IMAGE_KINDS, attempt, candidate_text

    rng = random.Random(f"held-out/{split}/{seed}")
    answers, pairs, points = [], [], []
    for _ in range(n):
        kind, values, text = question(rng)
        image = draw(values, split, rng) if kind in IMAGE_KINDS else None
        gold = solve(kind, values)
        wrong = attempt(kind, values, True, rng)
        form = rng.choice(("answer", "cot"))
        right_text = candidate_text(*attempt(kind, values, False, rng), form)
        wrong_text = candidate_text(*wrong, form)
        row = {"dataset": f"digits-{kind}", "problem": text, "image_path": image}
        answers.append({**row, "answer": str(gold)})
        pairs.append({**row, "chosen": right_text, "rejected": wrong_text})
        points += [{**row, "response": right_text, "label": "Yes"}, {**row, "response": wrong_text, "label": "No"}]
    return {"answers": answers, "pairs": pairs, "points": points}


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def measure(model: str, benchmark: dict[str, list[Row]], temperature: float = 1.0, samples: int = SAMPLES) -> Row:
    """The demo's table at one temperature, measure -> {mean, n, interval}, and the outcomes by question and sample.

    Intervals are 95 %, over questions: the samples of one question are one observation.
    """
    from transformers import set_seed

    set_seed(0)
    engine = TransformersEngine(model, batch_size=256)
    settings = Settings(model, "answer", (), max_tokens=64, temperature=temperature)
    samples = samples if temperature > 0 else 1

    def several(rows: list[Row], mode: str) -> list[list[Row]]:  # (rows, samples)
        results = evaluate_records(rows * samples, engine, replace(settings, mode=mode))
        return [results[i :: len(rows)] for i in range(len(rows))]

    tts = several(benchmark["answers"], "tts")
    pairs = several(benchmark["pairs"], "judge")
    points = several(benchmark["points"], "judge")
    reflected = _reflect(benchmark["answers"], tts, engine, settings)

    first = [[s["first_is_correct"] for s in row] for row in tts]
    final = [[s["is_correct"] for s in row] for row in tts]
    gain = [[s["is_correct"] - s["first_is_correct"] for s in row] for row in tts]
    point_hits = [[s["is_correct"] for s in row] for row in points]
    order = [[(s["verdict"] == "A") / 2 + (s["verdict_swapped"] == "B") / 2 for s in row] for row in pairs]
    fixed = [[new for old, new in row if not old] for row in reflected]
    harmed = [[not new for old, new in row if old] for row in reflected]

    def own_hits(correct: bool, label: str) -> list[list[bool]]:
        judged = [[s for s in row if s["rounds"][0]["judge_output"] is not None] for row in tts]
        return [[s["rounds"][0]["verdict"] == label for s in row if s["first_is_correct"] is correct] for row in judged]

    return {
        "temperature": temperature,
        "questions": len(benchmark["answers"]),
        "samples": samples,
        "measures": {
            "policy accuracy": mean(first),
            "pointwise balanced accuracy": balanced(point_hits[::2], point_hits[1::2]),
            "pointwise, own answers": balanced(own_hits(True, "Yes"), own_hits(False, "No")),
            "pairwise accuracy, both orders": mean(order),
            "reflection fixes a wrong answer": mean(fixed),
            "reflection harms a right answer": mean(harmed),
            "test-time scaling, final answer": mean(final),
            "test-time scaling minus first": mean(gain),
        },
        "rows": {
            "first": first,
            "final": final,
            "own_verdicts": [[s["rounds"][0]["verdict"] for s in row] for row in tts],
            "points": [[s["verdict"] for s in row] for row in points],
            "pairs": [[(s["verdict"], s["verdict_swapped"]) for s in row] for row in pairs],
            "reflected": reflected,
        },
    }


def _reflect(answers, tts, engine, settings) -> list[list[tuple[bool, bool]]]:
    """Every first answer, right or wrong, reflected on once: (was right, is right) of each question and sample."""
    requests = []
    for row, samples in zip(answers, tts, strict=True):
        images = (row["image_path"],) if row["image_path"] is not None else ()
        for sample in samples:
            instruction = reflection_instruction(neutralise(sample["rounds"][0]["output"]), "cot", template=1)
            messages = ask([{"role": "user", "content": row["problem"] + PROMPT_SUFFIX}], instruction)
            requests.append(Request(messages, images))
    outputs = iter(complete(engine, requests, settings.sampling))
    reflected = []
    for row, samples in zip(answers, tts, strict=True):
        after = [verify.is_equal(verify.extract_boxed(next(outputs).text), row["answer"]) for _ in samples]
        reflected.append([(bool(s["first_is_correct"]), bool(now)) for s, now in zip(samples, after, strict=True)])
    return reflected


def mean(groups: list[list[float]]) -> Row:
    """Mean over all samples of all questions that have any, with an interval over questions (a ratio estimator)."""
    groups = [g for g in groups if g]
    total = sum(map(len, groups))
    if not total:
        return {"mean": None, "n": 0, "interval": None}
    rate = sum(sum(g) for g in groups) / total
    squares = sum((sum(g) - rate * len(g)) ** 2 for g in groups)
    half = 1.96 * math.sqrt(squares * len(groups) / max(len(groups) - 1, 1)) / total
    return {"mean": rate, "n": len(groups), "interval": [rate - half, rate + half]}


def balanced(right: list[list[bool]], wrong: list[list[bool]]) -> Row:
    """Mean of the accuracies on right and on wrong candidates."""
    sides = [mean(right), mean(wrong)]
    if any(side["mean"] is None for side in sides):
        return {"mean": None, "n": 0, "interval": None}
    rate = sum(side["mean"] for side in sides) / 2
    half = math.hypot(*(side["interval"][1] - side["mean"] for side in sides)) / 2
    return {"mean": rate, "n": sum(side["n"] for side in sides), "interval": [rate - half, rate + half]}


def random_judge(measured: Row) -> dict[str, float]:
    """The measures of the same answers with a coin for a judge; a coin's No is reflected on, twice at most."""
    m = {name: value["mean"] for name, value in measured["measures"].items()}
    p = first = m["policy accuracy"]
    fix, harm = m["reflection fixes a wrong answer"] or 0.0, m["reflection harms a right answer"] or 0.0
    for share in (0.5, 0.25):  # of answers to which the coin has said No each time so far
        p += share * ((1 - p) * fix - p * harm)
    return {
        "pointwise balanced accuracy": 0.5,
        "pointwise, own answers": 0.5,
        "pairwise accuracy, both orders": 0.5,
        "test-time scaling, final answer": p,
        "test-time scaling minus first": p - first,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def staged(path: Path, settings: Row, make) -> Row:
    """The JSON at `path` where it was made with these settings, else `make()`'s result, written there."""
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] == settings:
            print(f"{path}: already done", flush=True)
            return stored
    result = {"settings": settings, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result))
    return result


def train(output: Path, **overrides: Any) -> None:
    """train_spark.py in a process of its own, resumed from its last checkpoint; nothing to do if it has finished."""
    state = output / "trainer_state.json"
    done = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.exists() else 0
    if (output / "model.safetensors").exists() and done >= overrides.get("max_steps", 0):
        print(f"{output}: already trained", flush=True)
        return
    flags = [str(part) for name, value in overrides.items() for part in (f"--{name}", value)]
    command = [sys.executable, "train_spark.py", "--config", "recipes/demo.yaml", "--output_dir", str(output)]
    subprocess.run([*command, "--resume_from_checkpoint", "latest", *flags], check=True)


def printed_table(rows: list[Row]) -> str:
    def cell(value: Row) -> str:
        return "-" if value["mean"] is None else f"{value['mean']:.3f} ± {value['interval'][1] - value['mean']:.3f}"

    lines = [["held-out digits, temperature 1", "start", "after", "random judge"]]
    for row in rows:
        chance = "" if row["random"] is None else f"{row['random']:.3f}"
        lines.append([row["measure"], cell(row["start"]), cell(row["after"]), chance])
    return "\n".join(text_table(lines))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--questions", type=int, default=300)
    args = parser.parse_args()

    from report import write_report

    benchmark = held_out(args.questions)
    settings = {"questions": args.questions, "samples": SAMPLES}
    print("1/3  measuring the starting model", flush=True)
    start = staged(args.output / "start.json", settings, lambda: measure(str(START), benchmark))
    print("2/3  training: answer, judge and reflect, from verifiable rewards alone", flush=True)
    trained = args.output / "spark"
    train(trained, max_steps=args.steps)
    print("3/3  measuring the trained model", flush=True)
    steps = json.loads((trained / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    with open(trained / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    settings = {**settings, "steps": steps, "model": digest[:16]}
    after = staged(args.output / "after.json", settings, lambda: measure(str(trained), benchmark))

    chance = random_judge(after)
    rows = [
        {"measure": name, "start": value, "after": after["measures"][name], "random": chance.get(name)}
        for name, value in start["measures"].items()
    ]
    metrics = {"table": rows, "settings": settings}
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    report = args.output / "report.html"
    write_report([trained], report, metrics=metrics)
    print(f"\n{printed_table(rows)}\n\n{args.output / 'metrics.json'}\n{report}")


if __name__ == "__main__":
    main()
