"""What the small model of Countdown can do: answering, judging, reflecting, and choosing among its own answers.

    python -m benchmarks.countdown_start [--model models/countdown] [--split test] [--questions 250] [--show 2]

Every prompt is worded and quoted as in training (recycle.py), by a template drawn at random. `--show` prints so many
samples of each role. Writes benchmarks/results/countdown_start.json: the table, and the outcome of every sample.
"""

import argparse
import json
import platform
import random
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.countdown import countdown_reward, held_out, same
from demo import _balanced, _mean
from engines import Request, Sampling, TransformersEngine, complete
from recycle import (
    PAIRWISE,
    POINTWISE_A_B,
    POINTWISE_YES_NO,
    PROMPT_SUFFIX,
    REFLECT_ON_ANSWER,
    REFLECT_ON_COT,
    ask,
    neutralise,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)
from verify import extract_boxed, parse_verdict

RESULTS = Path("benchmarks/results/countdown_start.json")
SAMPLES = 4  # of each question, at temperature 1
MAX_TOKENS = 128

Row = dict[str, Any]


class Asked:
    """Puts instructions to one model at one temperature; keeps the first `show` exchanges of each role."""

    def __init__(self, model: str, temperature: float, seed: int = 0, show: int = 0):
        from transformers import set_seed

        set_seed(seed)
        self.engine = TransformersEngine(model, batch_size=256)
        self.sampling = Sampling(MAX_TOKENS, temperature)
        self.rng = random.Random(seed)
        self.show = show

    def __call__(self, role: str, problems: list[str], instructions: list[str] | None = None) -> list[str]:
        messages = [[{"role": "user", "content": problem + PROMPT_SUFFIX}] for problem in problems]
        if instructions is not None:
            messages = [ask(message, text) for message, text in zip(messages, instructions, strict=True)]
        outputs = complete(self.engine, [Request(message) for message in messages], self.sampling)
        for i in random.Random(role).sample(range(len(messages)), min(self.show, len(messages))):
            print(f"--- {role}, temperature {self.sampling.temperature:g}\n{messages[i][0]['content']}")
            print(f">>> {outputs[i].text}")
        self.cut = sum(output.completion_tokens >= MAX_TOKENS for output in outputs)
        return [output.text for output in outputs]

    def shown(self, text: str) -> tuple[str, str]:
        """A response as recycling shows it: its box or all of it, at random."""
        boxed = extract_boxed(text)
        if boxed is not None and self.rng.random() < 0.5:
            return neutralise(boxed), "answer"
        return neutralise(text.strip()), "cot"

    def judge(self, role: str, problems: list[str], responses: list[str]) -> list[bool | None]:
        """Whether each response is called correct, by Yes, No or a letter; None for no readable verdict."""
        instructions, right_verdicts = [], []
        for response in responses:
            letter = self.rng.choice((None, "A", "B"))
            template = self.rng.randrange(len(POINTWISE_A_B if letter else POINTWISE_YES_NO))
            instructions.append(pointwise_instruction(self.shown(response)[0], template, letter))
            right_verdicts.append({None: ("Yes", "No"), "A": ("A", "B"), "B": ("B", "A")}[letter])
        verdicts = [parse_verdict(text) for text in self(role, problems, instructions)]
        return [{yes: True, no: False}.get(v) for v, (yes, no) in zip(verdicts, right_verdicts, strict=True)]

    def choose(self, role: str, problems: list[str], pairs: list[tuple[str, str]]) -> list[int | None]:
        """Which response of each pair is called correct, 0 or 1; None for no readable verdict."""
        instructions = []
        for pair in pairs:
            answers = [extract_boxed(text) for text in pair]
            if all(answers) and self.rng.random() < 0.5:
                pair = answers
            instructions.append(
                pairwise_instruction(*(neutralise(text.strip()) for text in pair), self.rng.randrange(len(PAIRWISE)))
            )
        return [{"A": 0, "B": 1}.get(parse_verdict(text)) for text in self(role, problems, instructions)]

    def reflect(self, role: str, problems: list[str], responses: list[str]) -> list[str]:
        instructions = []
        for response in responses:
            text, form = self.shown(response)
            templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
            instructions.append(reflection_instruction(text, form, self.rng.randrange(len(templates))))
        return self(role, problems, instructions)


def measure(model: str, benchmark: dict[str, list[Row]], temperature: float, samples: int, show: int = 0) -> Row:
    """Every measure at one temperature: name -> {mean, n, interval}, and the raw rows.

    Intervals are 95 %, over questions: the samples of one question are one observation.
    """
    asked = Asked(model, temperature, show=show)
    answers, points, pairs = (benchmark[name] for name in ("answers", "points", "pairs"))
    questions = range(len(answers))
    problems = [row["problem"] for row in answers for _ in range(samples)]  # (questions * samples,)
    golds = [row["answer"] for row in answers for _ in range(samples)]

    def grouped(values: list) -> list[list]:
        return [values[i * samples : (i + 1) * samples] for i in questions]

    def repeated(rows: list[Row], name: str) -> list:
        return [row[name] for row in rows for _ in range(samples)]

    texts = asked("answer", problems)
    cut = asked.cut
    right = [reward == 1.0 for reward in countdown_reward(None, texts, golds)]
    judged = asked.judge("pointwise, own answer", problems, texts)
    own_hits = [verdict is was for verdict, was in zip(judged, right, strict=True)]
    reflections = asked.reflect("reflection", problems, texts)
    reflected = [reward == 1.0 for reward in countdown_reward(None, reflections, golds)]
    final = [after if verdict is False else was for was, after, verdict in zip(right, reflected, judged, strict=True)]

    verdicts = asked.judge("pointwise, independent answer", repeated(points, "problem"), repeated(points, "response"))
    labels = [label == "Yes" for label in repeated(points, "label")]
    hits = [verdict is label for verdict, label in zip(verdicts, labels, strict=True)]
    point_hits = [hits[i * samples : (i + 1) * samples] for i in range(len(points))]

    chosen, rejected = repeated(pairs, "chosen"), repeated(pairs, "rejected")
    order = {
        side: asked.choose(f"pairwise, {side} is right", problems, list(zip(*both, strict=True)))
        for side, both in (("A", (chosen, rejected)), ("B", (rejected, chosen)))
    }
    pair_hits = [[a == 0, b == 1] for a, b in zip(order["A"], order["B"], strict=True)]

    by_verdict, by_pairs, by_vote = [], [], []
    for i, its, verdicts_ in zip(questions, grouped(right), grouped(judged), strict=True):
        by_verdict.append([its[max(range(samples), key=lambda k: verdicts_[k] is True)]])
        by_vote.append([its[most_frequent([extract_boxed(t) for t in texts[i * samples : (i + 1) * samples]])]])
    for i, winner in enumerate(knock_out(asked, [row["problem"] for row in answers], grouped(texts))):
        by_pairs.append([grouped(right)[i][winner]])

    split = list(zip(right, reflected, own_hits, strict=True))
    measures = {
        "first answer": _mean(grouped(right)),
        "one of the samples": _mean([[any(its)] for its in grouped(right)]),
        "judge, own answers": _balanced(
            *([[hit for was, _, hit in g if was is s] for g in grouped(split)] for s in (True, False))
        ),
        "judge, independent answers": _balanced(point_hits[::2], point_hits[1::2]),
        "pairwise, both orders": _mean([[h for pair in g for h in pair] for g in grouped(pair_hits)]),
        "pairwise, A chosen": _mean([[v == 0 for v in g] for side in order.values() for g in grouped(side)]),
        "reflection fixes a wrong answer": _mean([[after for was, after, _ in g if not was] for g in grouped(split)]),
        "reflection harms a right answer": _mean([[not after for was, after, _ in g if was] for g in grouped(split)]),
        "final answer, reflecting once": _mean(grouped(final)),
        "vote": _mean(by_vote),
        "best by verdict": _mean(by_verdict),
        "best by pairs": _mean(by_pairs),
        "boxed": _mean(grouped([extract_boxed(text) is not None for text in texts])),
        "verdict says correct": _mean(grouped([v is True for v in judged])),
        "verdict readable": _mean(grouped([v is not None for v in judged])),
    }
    rows = {"right": grouped(right), "judged": grouped(judged), "reflected": grouped(reflected), "points": point_hits,
            "pairs": grouped(pair_hits)}  # fmt: skip
    return {"temperature": temperature, "samples": samples, "cut": cut, "measures": measures, "rows": rows}


def most_frequent(answers: list[str | None]) -> int:
    """The first of those answers that most others are the same as; one without a box only if there is no other."""
    votes = [sum(same([(a, b)])[0] is True for b in answers) for a in answers]
    return max(range(len(answers)), key=lambda i: votes[i])


def knock_out(asked: Asked, problems: list[str], texts: list[list[str]]) -> list[int]:
    """Which sample of each question is left after pairwise judgements; same answers do not meet."""
    left = []
    for its in texts:
        distinct: list[int] = []
        for i, text in enumerate(its):
            answer = extract_boxed(text)
            if answer and not any(same([(answer, extract_boxed(its[k]))])[0] for k in distinct):
                distinct.append(i)
        left.append(distinct or [0])
    while any(len(remaining) > 1 for remaining in left):
        meetings = [(q, a, b) for q, its in enumerate(left) for a, b in zip(its[::2], its[1::2], strict=False)]
        won = asked.choose(
            "pairwise, own answers",
            [problems[q] for q, _, _ in meetings],
            [(texts[q][a], texts[q][b]) for q, a, b in meetings],
        )
        out = {(q, a if winner == 1 else b) for (q, a, b), winner in zip(meetings, won, strict=True)}
        left = [[i for i in its if (q, i) not in out] for q, its in enumerate(left)]
    return [its[0] for its in left]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/countdown")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="test")
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    benchmark = held_out(args.split, args.questions)
    greedy = measure(args.model, benchmark, 0.0, 1, args.show)
    sampled = measure(args.model, benchmark, 1.0, SAMPLES, args.show)
    print(f"\n{args.model}, {args.questions} questions of {args.split}")
    print(f"{'':34}{'greedy':>18}{f'T 1, {SAMPLES} samples':>18}")
    for name in greedy["measures"]:
        cells = []
        for value in (measured["measures"][name] for measured in (greedy, sampled)):
            half = value["interval"][1] - value["mean"] if value["interval"] else 0
            cells.append("-" if value["mean"] is None else f"{value['mean']:.3f} ± {half:.3f}")
        print(f"{name:34}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"{'answers cut off':34}{greedy['cut']:>18}{sampled['cut']:>18}")

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    flags = f"--model {args.model} --split {args.split} --questions {args.questions}"
    record = {
        "command": f"python -m benchmarks.countdown_start {flags}",
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{platform.machine()}, no GPU",
        "greedy": greedy,
        "sampled": sampled,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()
