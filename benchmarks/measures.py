"""What a small model can do at one of the two tasks: answer, judge, reflect, and choose among its own answers.

    python -m benchmarks.measures runs/demo/spark --task digits [--split test] [--questions 250] [--show 2]

Every prompt is worded and quoted as in training, by a template drawn at random. `--show` prints so many samples of each
role. Intervals are 95 %, over questions: the samples of one question are one observation.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import verify
from data.cli import Parser
from demo import _balanced as balanced
from demo import _mean as mean
from engines import Request, Sampling, TransformersEngine, complete
from prompts import (
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

SAMPLES = 4  # of each question, at temperature 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task: its questions, and what is right and what is the same answer.

    rows: (n, split) -> answers [{problem, image_path, answer}], pairs [{..., chosen, rejected}] and points
        [{..., response, label}], the latter by no model.
    right: (texts, golds) -> right or wrong; same: pairs of answers -> the same or not.
    """

    rows: Callable[[int, str], dict[str, list[Row]]]
    right: Callable[[list[str], list[str]], list[bool]]
    same: Callable[[list[tuple[str, str]]], list[bool | None]]
    max_tokens: int


def digits() -> Task:
    from demo import held_out

    def rows(n: int, split: str) -> dict[str, list[Row]]:
        return held_out(n, "test") if split == "test" else held_out(n, "train", seed=2)  # the training split's digits

    def right(texts: list[str], golds: list[str]) -> list[bool]:
        pairs = [(verify.extract_boxed(text), gold) for text, gold in zip(texts, golds, strict=True)]
        return [verdict is True for verdict in verify.verify_many(pairs)]

    return Task(rows, right, verify.verify_many, 64)


def countdown() -> Task:
    from data.countdown import countdown_reward, held_out, same

    def right(texts: list[str], golds: list[str]) -> list[bool]:
        return [reward == 1.0 for reward in countdown_reward(None, texts, golds)]

    return Task(lambda n, split: held_out(split, n), right, same, 128)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "countdown": countdown}


class Model:
    """Puts instructions to one model at one temperature; counts the tokens it writes in each role.

    `show` prints so many exchanges of each role.
    """

    def __init__(self, folder: str, task: Task, temperature: float, seed: int = 0, show: int = 0):
        from transformers import set_seed

        set_seed(seed)
        self.engine = TransformersEngine(folder, batch_size=256)
        self.sampling = Sampling(task.max_tokens, temperature)
        self.rng = random.Random(seed)
        self.tokens: dict[str, int] = {}
        self.show = show

    def __call__(self, role: str, rows: list[Row], instructions: list[str] | None = None) -> list[str]:
        requests = []
        for i, row in enumerate(rows):
            messages = [{"role": "user", "content": row["problem"] + PROMPT_SUFFIX}]
            images = (row["image_path"],) if row.get("image_path") is not None else ()
            requests.append(Request(ask(messages, instructions[i]) if instructions else messages, images))
        outputs = complete(self.engine, requests, self.sampling)
        self.tokens[role] = self.tokens.get(role, 0) + sum(output.completion_tokens for output in outputs)
        for i in random.Random(role).sample(range(len(rows)), min(self.show, len(rows))):
            print(f"--- {role}, temperature {self.sampling.temperature:g}\n{requests[i].messages[-1]['content']}")
            print(f">>> {outputs[i].text}")
        return [output.text for output in outputs]

    def quoted(self, text: str) -> tuple[str, str]:
        """A response as recycling shows it: its box or all of it, at random."""
        boxed = verify.extract_boxed(text)
        if boxed is not None and self.rng.random() < 0.5:
            return neutralise(boxed), "answer"
        return neutralise(text.strip()), "cot"

    def judge(self, role: str, rows: list[Row], responses: list[str]) -> list[bool | None]:
        """Whether each response is called correct, by Yes, No or a letter; None for no readable verdict."""
        instructions, verdicts_of = [], []
        for response in responses:
            letter = self.rng.choice((None, "A", "B"))
            template = self.rng.randrange(len(POINTWISE_A_B if letter else POINTWISE_YES_NO))
            instructions.append(pointwise_instruction(self.quoted(response)[0], template, letter))
            verdicts_of.append({None: ("Yes", "No"), "A": ("A", "B"), "B": ("B", "A")}[letter])
        verdicts = map(verify.parse_verdict, self(role, rows, instructions))
        return [{yes: True, no: False}.get(v) for v, (yes, no) in zip(verdicts, verdicts_of, strict=True)]

    def choose(self, role: str, rows: list[Row], pairs: list[tuple[str, str]]) -> list[int | None]:
        """Which response of each pair is called correct, 0 or 1; None for no readable verdict."""
        instructions = []
        for pair in pairs:
            answers = [verify.extract_boxed(text) for text in pair]
            texts = answers if all(answers) and self.rng.random() < 0.5 else pair
            template = self.rng.randrange(len(PAIRWISE))
            instructions.append(pairwise_instruction(*(neutralise(text.strip()) for text in texts), template))
        return [{"A": 0, "B": 1}.get(verify.parse_verdict(text)) for text in self(role, rows, instructions)]

    def reflect(self, role: str, rows: list[Row], responses: list[str]) -> list[str]:
        instructions = []
        for response in responses:
            text, form = self.quoted(response)
            templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
            # The odd templates do not claim that the response is wrong, which nobody knows at test time.
            instructions.append(reflection_instruction(text, form, self.rng.randrange(len(templates)) | 1))
        return self(role, rows, instructions)


def measure(folder: str, task: Task, benchmark: dict[str, list[Row]], temperature: float, show: int = 0) -> Row:
    """Every measure at one temperature, {name: {mean, n, interval}}; tokens written a question; the raw outcomes."""
    samples = SAMPLES if temperature > 0 else 1
    model = Model(folder, task, temperature, show=show)
    answers, points, pairs = (benchmark[name] for name in ("answers", "points", "pairs"))
    rows = [row for row in answers for _ in range(samples)]  # (questions * samples,)
    golds = [row["answer"] for row in rows]

    def grouped(values: list) -> list[list]:
        return [values[i : i + samples] for i in range(0, len(values), samples)]

    texts = model("answer", rows)
    right = task.right(texts, golds)
    judged = model.judge("pointwise, own answer", rows, texts)
    reflected = task.right(model.reflect("reflection", rows, texts), golds)
    final = [new if verdict is False else old for old, new, verdict in zip(right, reflected, judged, strict=True)]
    verdicts = model.judge("pointwise, independent answer", points, [row["response"] for row in points])
    point_hits = [[v is (row["label"] == "Yes")] for v, row in zip(verdicts, points, strict=True)]
    first = model.choose("pairwise, A is right", pairs, [(row["chosen"], row["rejected"]) for row in pairs])
    second = model.choose("pairwise, B is right", pairs, [(row["rejected"], row["chosen"]) for row in pairs])

    outcomes = grouped(right)
    votes = [outcome[most_frequent(task, t)] for outcome, t in zip(outcomes, grouped(texts), strict=True)]
    by_verdict = [
        outcome[weighted(task, t, v)] for outcome, t, v in zip(outcomes, grouped(texts), grouped(judged), strict=True)
    ]
    winners = knock_out(model, task, answers, grouped(texts))
    by_pairs = [outcome[winner] for outcome, winner in zip(outcomes, winners, strict=True)]

    own = list(zip(right, reflected, judged, strict=True))
    measures = {
        "first answer": mean(outcomes),
        f"one of {samples}": mean([[any(outcome)] for outcome in outcomes]),
        "judge, own answers": balanced(
            *([[v is side for was, _, v in group if was is side] for group in grouped(own)] for side in (True, False))
        ),
        "judge, independent answers": balanced(point_hits[::2], point_hits[1::2]),
        "pairwise, both orders": mean([[a == 0, b == 1] for a, b in zip(first, second, strict=True)]),
        "pairwise, A chosen": mean([[a == 0, b == 0] for a, b in zip(first, second, strict=True)]),
        "reflection fixes a wrong answer": mean([[new for old, new, _ in g if not old] for g in grouped(own)]),
        "reflection harms a right answer": mean([[not new for old, new, _ in g if old] for g in grouped(own)]),
        "final answer, reflecting on a No": mean(grouped(final)),
        f"vote of {samples}": mean([[vote] for vote in votes]),
        f"vote of {samples} weighed by verdicts": mean([[vote] for vote in by_verdict]),
        f"best of {samples} by pairs": mean([[vote] for vote in by_pairs]),
        "verdict says correct": mean(grouped([v is True for v in judged])),
        "verdict readable": mean(grouped([v is not None for v in judged])),
        "boxed": mean(grouped([verify.extract_boxed(text) is not None for text in texts])),
    }
    return {
        "temperature": temperature,
        "samples": samples,
        "measures": measures,
        "tokens": {role: n / len(answers) for role, n in model.tokens.items()},
        "rows": {"right": outcomes, "judged": grouped(judged), "reflected": grouped(reflected), "points": verdicts,
                 "pairs": list(zip(first, second, strict=True)), "vote": votes, "by_verdict": by_verdict,
                 "by_pairs": by_pairs},
    }  # fmt: skip


def classes(task: Task, texts: list[str]) -> list[int]:
    """For each sample the first one with the same answer; one without a box is alone."""
    boxed = [verify.extract_boxed(text) for text in texts]
    first: list[int] = []
    for i, answer in enumerate(boxed):
        candidates = [k for k in dict.fromkeys(first) if answer and boxed[k]]
        equal = task.same([(answer, boxed[k]) for k in candidates]) if candidates else []
        first.append(next((k for k, verdict in zip(candidates, equal, strict=True) if verdict), i))
    return first


def most_frequent(task: Task, texts: list[str]) -> int:
    """A sample of the most frequent answer, the earliest of equals; one without a box only if there is no other."""
    return weighted(task, texts, [True] * len(texts))


def weighted(task: Task, texts: list[str], verdicts: list[bool | None]) -> int:
    """A sample of the answer with the most votes, a vote counting 1, 0 or 1/2 by the judge's verdict on it."""
    first = classes(task, texts)
    weight = {True: 1.0, False: 0.0, None: 0.5}

    def votes(i: int) -> tuple[bool, float, int, int]:
        same = [k for k, other in enumerate(first) if other == first[i]]
        return verify.extract_boxed(texts[i]) is not None, sum(weight[verdicts[k]] for k in same), len(same), -first[i]

    return max(range(len(texts)), key=votes)


def knock_out(model: Model, task: Task, rows: list[Row], texts: list[list[str]]) -> list[int]:
    """Which sample of each question is left after pairwise judgements in both orders; a tie goes to the votes."""
    left, votes = [], []
    for group in texts:
        first = classes(task, group)
        boxed = [i for i in dict.fromkeys(first) if verify.extract_boxed(group[i]) is not None]
        left.append(boxed or [0])
        votes.append({i: first.count(i) for i in first})
    while any(len(remaining) > 1 for remaining in left):
        meetings = [(q, a, b) for q, group in enumerate(left) for a, b in zip(group[::2], group[1::2], strict=False)]
        asked = [rows[q] for q, _, _ in meetings]
        one = model.choose("pairwise, own answers", asked, [(texts[q][a], texts[q][b]) for q, a, b in meetings])
        two = model.choose("pairwise, own answers", asked, [(texts[q][b], texts[q][a]) for q, a, b in meetings])
        beaten = set()
        for (q, a, b), first, second in zip(meetings, one, two, strict=True):
            a_wins = (first == 0) + (second == 1) - (first == 1) - (second == 0)
            if a_wins == 0:
                a_wins = votes[q][a] - votes[q][b]
            beaten.add((q, b if a_wins >= 0 else a))
        left = [[i for i in group if (q, i) not in beaten] for q, group in enumerate(left)]
    return [group[0] for group in left]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--output", help="a JSON file for the outcomes")
    args = parser.parse_args()
    task = TASKS[args.task]()
    benchmark = task.rows(args.questions, args.split)
    results = {
        name: measure(args.model, task, benchmark, t, args.show) for name, t in (("greedy", 0.0), ("sampled", 1.0))
    }
    print(f"\n{args.model}, {args.questions} questions of {args.split}\n{'':36}{'greedy':>18}{'temperature 1':>18}")
    for a, b in zip(*(result["measures"].items() for result in results.values()), strict=True):
        cells = []
        for _, value in (a, b):
            half = value["interval"][1] - value["mean"] if value["interval"] else 0
            cells.append("-" if value["mean"] is None else f"{value['mean']:.3f} ± {half:.3f}")
        print(f"{b[0]:36}" + "".join(f"{cell:>18}" for cell in cells))
    print("tokens a question: " + ", ".join(f"{role} {n:.0f}" for role, n in results["sampled"]["tokens"].items()))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(results, file, separators=(",", ":"))


if __name__ == "__main__":
    main()
