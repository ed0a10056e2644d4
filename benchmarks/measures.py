"""What a small model can do at one of the tasks: answer, judge, reflect, and choose among its own answers.

    python -m benchmarks.measures runs/demo/spark --task digits [--split test] [--questions 250] [--show 2]

Every prompt is worded and quoted as in training, by a template drawn at random. `--show` prints so many samples of each
role. Intervals are 95 %, over questions: the samples of one question are one observation.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import data.arithmetic
import data.equations
import verify
from benchmarks import record
from data.cli import Parser
from demo import balanced, mean
from engines import Output, Request, Sampling, TransformersEngine, VLLMEngine, complete
from evaluation.solvers import same_answers, verdict_probability
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
from scoring.rates import calibration, count_probability

DRAWN = 8  # answers to each question, at temperature 1
SAMPLES = 4  # of them judged and reflected on

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
    suffix: str = PROMPT_SUFFIX
    dtype: str = "auto"


def by_answer(texts: list[str], golds: list[str]) -> list[bool]:
    pairs = [(verify.extract_boxed(text), gold) for text, gold in zip(texts, golds, strict=True)]
    return [verdict is True for verdict in verify.verify_many(pairs)]


def digits() -> Task:
    from demo import held_out

    def rows(n: int, split: str) -> dict[str, list[Row]]:
        """test: the demo's questions, one in five of them text alone, which training has too; unseen: others, all of
        them about an image of test digits; dev: about the training split's digits."""
        if split != "unseen":
            return held_out(n, "test") if split == "test" else held_out(n, "train", seed=2)
        drawn = held_out(2 * n, "test", seed=3)
        with_image = [i for i, row in enumerate(drawn["answers"]) if row["image_path"] is not None][:n]
        points = [drawn["points"][2 * i + j] for i in with_image for j in (0, 1)]
        return {"points": points, **{name: [drawn[name][i] for i in with_image] for name in ("answers", "pairs")}}

    return Task(rows, by_answer, verify.verify_many, 64)


def countdown() -> Task:
    from data.countdown import countdown_reward, held_out, same

    def right(texts: list[str], golds: list[str]) -> list[bool]:
        return [reward == 1.0 for reward in countdown_reward(None, texts, golds)]

    return Task(lambda n, split: held_out(split, n), right, same, 128)


def arithmetic(module: Any = data.arithmetic) -> Task:
    def rows(n: int, split: str) -> dict[str, list[Row]]:
        return module.held_out(split, n)

    return Task(rows, by_answer, verify.verify_many, 48, suffix="", dtype="bfloat16")


TASKS: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "countdown": countdown,
    "arithmetic": arithmetic,
    "equations": lambda: arithmetic(data.equations),
}


class Model:
    """Puts instructions to one model at one temperature; counts the tokens it writes in each role.

    `model` is a folder, for transformers' `generate`, or an engine. `show` prints so many exchanges of each role.
    """

    def __init__(self, model, task: Task, temperature: float, seed: int = 0, show: int = 0):
        from transformers import set_seed

        set_seed(seed)
        is_folder = isinstance(model, str)
        self.engine = TransformersEngine(model, batch_size=256, dtype=task.dtype) if is_folder else model
        self.sampling = Sampling(task.max_tokens, temperature)
        self.suffix = task.suffix
        self.rng = random.Random(seed)
        self.tokens: dict[str, int] = {}
        self.show = show

    def __call__(self, role: str, rows: list[Row], instructions: list[str] | None = None) -> list[str]:
        return [output.text for output in self.outputs(role, rows, instructions)]

    def outputs(
        self,
        role: str,
        rows: list[Row],
        instructions: list[str] | None = None,
        logprobs: bool = False,
        sampling: Sampling | None = None,
    ) -> list[Output]:
        requests = []
        for i, row in enumerate(rows):
            messages = [{"role": "user", "content": row["problem"] + self.suffix}]
            images = (row["image_path"],) if row.get("image_path") is not None else ()
            messages = ask(messages, instructions[i]) if instructions else messages
            requests.append(Request(messages, images, with_logprobs=logprobs))
        sampling = sampling or self.sampling
        outputs = complete(self.engine, requests, sampling)
        if error := next((output.error for output in outputs if output.error), None):
            raise RuntimeError(f"{role}: {error}")
        self.tokens[role] = self.tokens.get(role, 0) + sum(output.completion_tokens for output in outputs)
        for i in random.Random(role).sample(range(len(rows)), min(self.show, len(rows))):
            print(f"--- {role}, temperature {sampling.temperature:g}\n{requests[i].messages[-1]['content']}")
            print(f">>> {outputs[i].text}")
        return outputs

    def quoted(self, text: str) -> tuple[str, str]:
        """A response as recycling shows it: its box or all of it, at random."""
        boxed = verify.extract_boxed(text)
        if boxed is not None and self.rng.random() < 0.5:
            return neutralise(boxed), "answer"
        return neutralise(text.strip()), "cot"

    def judge(
        self, role: str, rows: list[Row], responses: list[str], sampling: Sampling | None = None
    ) -> list[tuple[bool | None, float | None]]:
        """Whether each response is called correct, by Yes, No or a letter, and the verdict's probability; None for no
        readable verdict."""
        instructions, verdicts_of = [], []
        for response in responses:
            letter = self.rng.choice((None, "A", "B"))
            template = self.rng.randrange(len(POINTWISE_A_B if letter else POINTWISE_YES_NO))
            instructions.append(pointwise_instruction(self.quoted(response)[0], template, letter))
            verdicts_of.append({None: ("Yes", "No"), "A": ("A", "B"), "B": ("B", "A")}[letter])
        judged = []
        outputs = self.outputs(role, rows, instructions, logprobs=True, sampling=sampling)
        for output, (yes, no) in zip(outputs, verdicts_of, strict=True):
            said = verify.parse_verdict(output.text)
            probability = verdict_probability(output, said) if said in (yes, no) else None
            judged.append(({yes: True, no: False}.get(said), probability))
        return judged

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


def measure(model_or_engine, task: Task, benchmark: dict[str, list[Row]], temperature: float, show: int = 0) -> Row:
    """Every measure at one temperature, {name: {mean, n, interval}}; what each way to a final answer costs, in tokens
    written a question; the raw outcomes."""
    drawn, samples = (DRAWN, SAMPLES) if temperature > 0 else (1, 1)
    model = Model(model_or_engine, task, temperature, show=show)
    answers, points, pairs = (benchmark[name] for name in ("answers", "points", "pairs"))

    def grouped(values: list) -> list[list]:
        size = len(values) // len(answers)
        return [values[i : i + size] for i in range(0, len(values), size)]

    rows = [row for row in answers for _ in range(drawn)]  # (questions * drawn,)
    written = model("answer", rows)
    all_right = grouped(task.right(written, [row["answer"] for row in rows]))

    rows = [row for row in answers for _ in range(samples)]  # (questions * samples,)
    texts = [text for group in grouped(written) for text in group[:samples]]
    outcomes = [group[:samples] for group in all_right]
    right = [outcome for group in outcomes for outcome in group]
    judgements = model.judge("pointwise, own answer", rows, texts)
    judged = [verdict for verdict, _ in judgements]
    greedily = model.judge("pointwise, greedy", rows, texts, Sampling(task.max_tokens))
    reflected = task.right(model.reflect("reflection", rows, texts), [row["answer"] for row in rows])
    final = [new if verdict is False else old for old, new, verdict in zip(right, reflected, judged, strict=True)]
    verdicts = [v for v, _ in model.judge("pointwise, independent answer", points, [row["response"] for row in points])]
    point_hits = [[v is (row["label"] == "Yes")] for v, row in zip(verdicts, points, strict=True)]
    first = model.choose("pairwise, A is right", pairs, [(row["chosen"], row["rejected"]) for row in pairs])
    second = model.choose("pairwise, B is right", pairs, [(row["rejected"], row["chosen"]) for row in pairs])

    def voted(n: int) -> list[list[bool]]:
        return [
            [outcome[most_votes(task, group[:n], [1.0] * n)]]
            for outcome, group in zip(all_right, grouped(written), strict=True)
        ]

    def weighed(weights: list[float]) -> list[list[bool]]:
        groups = zip(outcomes, grouped(texts), grouped(weights), strict=True)
        return [[outcome[most_votes(task, group, weight)]] for outcome, group, weight in groups]

    by_verdict = weighed([{True: 1.0, False: 0.0, None: 0.5}[verdict] for verdict in judged])
    by_greedy = weighed([{True: 1.0, False: 0.0, None: 0.5}[verdict] for verdict, _ in greedily])
    # Of "correct", as the judge's sampled reasoning leaves it.
    chances = [0.5 if p is None else p if verdict else 1 - p for verdict, p in judgements]
    by_probability = weighed(chances)
    winners = knock_out(model, task, answers, grouped(texts))
    by_pairs = [[outcome[winner]] for outcome, winner in zip(outcomes, winners, strict=True)]

    own = list(zip(right, reflected, judged, strict=True))

    any_answer = [True] * len(texts)
    boxed = [verify.extract_boxed(text) is not None for text in texts]  # the others are easily told from right ones

    def balanced_accuracy(verdicts: list[bool | None], among: list[bool]) -> Row:
        rows = grouped(list(zip(right, verdicts, among, strict=True)))

        def hits(side: bool) -> list[list[bool]]:
            return [[verdict is side for was, verdict, counts in group if counts and was is side] for group in rows]

        return balanced(hits(True), hits(False))

    probable = Counter()
    for was, (verdict, probability) in zip(right, judgements, strict=True):
        count_probability(probable, probability, verdict is was)
    calibrated = calibration(probable) if probable["with_probability"] else {"brier": None, "calibration_error": None}
    measures = {
        "first answer": mean(all_right),
        "judge, own answers": balanced_accuracy(judged, any_answer),
        "greedy judge, own answers": balanced_accuracy([verdict for verdict, _ in greedily], any_answer),
        "judge, own boxed answers": balanced_accuracy(judged, boxed),
        "greedy judge, own boxed answers": balanced_accuracy([verdict for verdict, _ in greedily], boxed),
        "judge, independent answers": balanced(point_hits[::2], point_hits[1::2]),
        "pairwise, both orders": mean([[a == 0, b == 1] for a, b in zip(first, second, strict=True)]),
        "pairwise, A chosen": mean([[a == 0, b == 0] for a, b in zip(first, second, strict=True)]),
        "reflection fixes a wrong answer": mean([[new for old, new, _ in g if not old] for g in grouped(own)]),
        "reflection harms a right answer": mean([[not new for old, new, _ in g if old] for g in grouped(own)]),
        "final answer, reflecting on a No": mean(grouped(final)),
        "verdict says correct": mean(grouped([v is True for v in judged])),
        "verdict readable": mean(grouped([v is not None for v in judged])),
        "boxed": mean(grouped([verify.extract_boxed(text) is not None for text in written])),
    }
    for name, value in (("Brier score of verdicts", "brier"), ("calibration error of verdicts", "calibration_error")):
        measures[name] = {"mean": calibrated[value], "n": probable["with_probability"], "interval": None}
    tokens = {role: n / len(answers) for role, n in model.tokens.items()}
    answer, verdict = tokens["answer"] / drawn, tokens["pointwise, own answer"] / samples
    again = tokens["reflection"] / samples
    price = {
        "first answer": answer,
        "final answer, reflecting on a No": answer + verdict + judged.count(False) / len(judged) * again,
    }
    if drawn > 1:
        measures |= {
            f"one of {samples}": mean([[any(outcome)] for outcome in outcomes]),
            f"one of {drawn}": mean([[any(outcome)] for outcome in all_right]),
            f"vote of {samples}": mean(voted(samples)),
            f"vote of {drawn}": mean(voted(drawn)),
            f"vote of {samples} weighed by verdicts": mean(by_verdict),
            f"vote of {samples} weighed by their probability": mean(by_probability),
            f"vote of {samples} weighed by greedy verdicts": mean(by_greedy),
            f"best of {samples} by pairs": mean(by_pairs),
        }
        price |= {
            f"vote of {samples}": samples * answer,
            f"vote of {drawn}": drawn * answer,
            f"vote of {samples} weighed by verdicts": samples * (answer + verdict),
            f"vote of {samples} weighed by their probability": samples * (answer + verdict),
            f"vote of {samples} weighed by greedy verdicts": samples * answer + tokens["pointwise, greedy"],
            f"best of {samples} by pairs": samples * answer + tokens.get("pairwise, own answers", 0),
        }
    return {
        "temperature": temperature,
        "engine": type(model.engine).__name__,
        "samples": samples,
        "measures": measures,
        "tokens": {"answer": answer, "verdict": verdict, "reflection": again},
        "price": price,
        "rows": {
            "right": all_right,
            "boxed": grouped(boxed),
            "judged": grouped(judged),
            "judged_greedily": grouped([verdict for verdict, _ in greedily]),
            "chances": grouped([round(chance, 4) for chance in chances]),
            "reflected": grouped(reflected),
            "points": verdicts,
            "pairs": list(zip(first, second, strict=True)),
            "vote": voted(samples),
            "by_verdict": by_verdict,
            "by_probability": by_probability,
            "by_greedy": by_greedy,
            "by_pairs": by_pairs,
        },
    }


def classes(task: Task, texts: list[str]) -> list[int]:
    """For each sample the first one with the same answer; one without a box is alone."""
    first = list(range(len(texts)))
    for group in same_answers([verify.extract_boxed(text) or None for text in texts], task.same):
        for i in group:
            first[i] = group[0]
    return first


def most_votes(task: Task, texts: list[str], weights: list[float]) -> int:
    """A sample of the answer with the most votes by weight, then by number, the earliest of equals; one without a box
    only if there is no other."""
    first = classes(task, texts)

    def votes(i: int) -> tuple[bool, float, int, int]:
        same = [k for k, other in enumerate(first) if other == first[i]]
        return verify.extract_boxed(texts[i]) is not None, sum(weights[k] for k in same), len(same), -first[i]

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
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM instead of transformers")
    parser.add_argument("--temperature", type=float, choices=(0.0, 1.0), help="at this one alone")
    parser.add_argument("--dtype", help="instead of the task's; float32 is faster on cores without bfloat16")
    parser.add_argument("--output", type=Path, help="a JSON file for the outcomes")
    args = parser.parse_args()
    task = TASKS[args.task]()
    task = replace(task, dtype=args.dtype or task.dtype)
    model = VLLMEngine(args.model, dtype=task.dtype, max_model_len=1024, seed=0) if args.vllm else args.model
    benchmark = task.rows(args.questions, args.split)
    temperatures = {name: t for name, t in (("greedy", 0.0), ("sampled", 1.0)) if args.temperature in (None, t)}
    results = {name: measure(model, task, benchmark, t, args.show) for name, t in temperatures.items()}
    titles = "".join(f"{'temperature 1' if name == 'sampled' else name:>18}" for name in results)
    print(f"\n{args.model}, {args.questions} questions of {args.split}\n{'':36}{titles}")
    last = list(results.values())[-1]
    for name in last["measures"]:
        cells = []
        for result in results.values():
            value = result["measures"].get(name, {"mean": None})
            half = f" ± {value['interval'][1] - value['mean']:.3f}" if value.get("interval") else ""
            cells.append("-" if value["mean"] is None else f"{value['mean']:.3f}{half}")
        print(f"{name:36}" + "".join(f"{cell:>18}" for cell in cells))
    print("tokens: " + ", ".join(f"{role} {n:.0f}" for role, n in last["tokens"].items()))
    if args.output:
        record.write(args.output, indent=None, **results)


if __name__ == "__main__":
    main()
