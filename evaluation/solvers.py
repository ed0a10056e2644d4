"""The modes of evaluate.py: a row in, requests out, a result back. Each is a generator that yields the calls which may
go out together, is sent their outputs in that order, and returns the row's result."""

import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Any

import verify
from data.images import Reference, content_digest, loaded
from data.rows import BadInput
from engines import Output, Request
from evaluation.settings import COLUMNS, Settings
from prompts import Form, ask, neutralise, pairwise_instruction, pointwise_instruction, reflection_instruction

Row = dict[str, Any]
Solver = Generator[list[Request], list[Output], Row]


def _digest(images: Sequence[Reference]) -> str:
    """Identifies images that have no path, so that two questions in the same words stay apart."""
    return hashlib.blake2b(b"".join(map(content_digest, images)), digest_size=8).hexdigest()


class Calls:
    """The calls of a row: what they ask, the tokens that they take, and the result that they lead to."""

    def __init__(self, row: Row, settings: Settings):
        self.row, self.settings = row, settings
        self.prompt_tokens = self.completion_tokens = self.cut_off = 0

    def request(self, instruction: str | None = None) -> Request:
        """The row's question, or one about it."""
        messages = self.row["prompt"]
        if instruction is not None:
            messages = ask(messages, instruction, self.settings.prompt_suffix)
        return Request(messages, tuple(self.row["images"]))

    def judging(self, instruction: str, with_logprobs: bool = True) -> Request:
        """A question whose answer is a verdict."""
        temperature = self.settings.judge_temperature
        return self.request(instruction)._replace(with_logprobs=with_logprobs, temperature=temperature)

    def reflecting(self, candidate: str, form: Form) -> Request:
        """The question again, with an earlier answer as `candidate` shows it."""
        return self.request(reflection_instruction(candidate, form, template=1, mark=self.settings.answer_mark))

    def read(self, outputs: list[Output]) -> list[str]:
        """The texts of the outputs, whose tokens are counted."""
        for output in outputs:
            self.prompt_tokens += output.prompt_tokens
            self.completion_tokens += output.completion_tokens
            self.cut_off += output.cut_off
        return [output.text for output in outputs]

    def candidate(self, response: str) -> tuple[str, Form]:
        """(what a judge sees of a response, its form): the box if that is wanted and there is one, else all of it."""
        boxed = self.settings.extract(response)
        if self.settings.judge_source == "answer" and boxed is not None:
            return neutralise(boxed), "answer"
        return neutralise(response), "cot"

    def may_be_right(self, text: str) -> bool:
        """False where there is no answer; a verifier that does not say how it finds one may see it anywhere."""
        reward = self.settings.reward
        tells = reward is None or hasattr(reward, "extract")
        return not tells or self.settings.extract(text) is not None

    def round(self, text: str, verdict: str | None = None, judged: str | None = None) -> Row:
        return {"answer": self.settings.extract(text), "output": text, "verdict": verdict, "judge_output": judged}

    def result(self, text: str, **fields: Any) -> Row:
        row = self.row
        return {
            "dataset": row["dataset"],
            "problem": row["problem"],
            "image_path": row["image_path"],
            "ground_truth": None if "chosen" in row or "response" in row else row["solution"],
            "vlm_output": text,
            "extracted_answer": None,
            "is_correct": None,
            "error": None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cut_off": self.cut_off,
            **({"image_digest": _digest(row["images"])} if row["images"] and row["image_path"] is None else {}),
            **{name: row[name] for name in ("categories", "group") if row[name]},
            **fields,
        }

    def is_right(self, text: str) -> bool | None:
        """The verifier gets the columns of training. Raises BadInput for another reward than 0, 1 or None (or NaN)."""
        row, reward = self.row, self.settings.reward
        if reward is None:
            return verify.is_equal(self.settings.extract(text), row["solution"])
        given = {name: [row[name]] for name in COLUMNS}
        given["images"] = [[loaded(image) for image in row["images"]]]
        message = [{"role": "assistant", "content": text}]
        (value,) = reward(prompts=[row["prompt"]], completions=[message], **given)
        if value is None or value != value:
            return None
        if self.settings.correct_at is not None:
            return bool(value >= self.settings.correct_at)
        if value not in (0, 1):
            raise BadInput(f"reward_funcs: expected 0 or 1 (None: no opinion), got {value!r:.60}; or set --correct_at")
        return bool(value)

    def scored(self, text: str, **fields: Any) -> Row:
        if self.settings.reward_funcs:
            fields["verifier"] = self.settings.reward_funcs
        answer = self.settings.extract(text)
        return self.result(text, extracted_answer=answer, is_correct=self.is_right(text), **fields)

    def final(self, text: str, first: str, first_tokens: int, rounds: list[Row], **fields: Any) -> Row:
        """The result of test-time scaling; `first` is the answer without it."""
        return self.scored(
            text,
            rounds=rounds,
            first_answer=self.settings.extract(first),
            first_is_correct=self.is_right(first),
            first_completion_tokens=first_tokens,
            **fields,
        )


def majority(outputs: list[Output]) -> tuple[str | None, float | None]:
    """(the most frequent verdict of a judge's completions, the earlier of equally many; its mean probability, where the
    engine gave log-probabilities)"""
    verdicts = [verify.parse_verdict(output.text) for output in outputs]
    verdict = statistics.mode([verdict for verdict in verdicts if verdict is not None] or [None])
    probabilities = []
    for output, said in zip(outputs, verdicts, strict=True):
        if said is not None and (p := verdict_probability(output, said)) is not None:
            probabilities.append(p if said == verdict else 1 - p)
    return verdict, sum(probabilities) / len(probabilities) if probabilities else None


def verdict_probability(output: Output, verdict: str) -> float | None:
    """The probability of the tokens that spell the verdict in the last box, given all before them."""
    if output.logprobs is None:
        return None
    text = "".join(token for token, _ in output.logprobs)
    boxes = [match.end() for match in re.finditer(r"(?:boxed|fbox)\s*\{", text)]
    word = re.compile(rf"(?<![A-Za-z]){verdict}(?![A-Za-z])", re.IGNORECASE)
    spelled = word.search(text, boxes[-1] if boxes else 0)
    if not spelled:
        return None
    total, end = 0.0, 0
    for token, logprob in output.logprobs:
        start, end = end, end + len(token)
        if start < spelled.end() and spelled.start() < end:
            total += logprob
    return min(1.0, math.exp(total))


def answer_row(row: Row, settings: Settings) -> Solver:
    """One answer, scored against the gold."""
    calls = Calls(row, settings)
    (text,) = calls.read((yield [calls.request()]))
    return calls.scored(text)


def reflect_row(row: Row, settings: Settings) -> Solver:
    """Answer, judge that answer, reflect while it is a No, or no Yes (paper, section 3.4). Every round is kept."""
    calls = Calls(row, settings)
    (first,) = calls.read((yield [calls.request()]))
    first_tokens = calls.completion_tokens
    text, rounds, _ = yield from _reflect(calls, first)
    return calls.final(text, first, first_tokens, rounds, round_num=len(rounds) - 1)


def _reflect(calls: Calls, text: str):
    """The answer that `text` becomes, the rounds, and for each number of reflections at most, from 1 on, which answer
    that would give and the completion tokens spent until then."""
    start, rounds, stops = calls.completion_tokens, [], []
    for left in range(calls.settings.max_rounds, 0, -1):
        candidate, form = calls.candidate(text)
        verdict, judged = "No", None  # of what has no answer, unasked: judges are trained on answers
        if calls.may_be_right(text):
            (judged,) = calls.read((yield [calls.judging(pointwise_instruction(candidate), with_logprobs=False)]))
            verdict = verify.parse_verdict(judged)
        rounds.append(calls.round(text, verdict, judged))
        # By default an unparsed verdict is no reason to throw an answer away.
        if verdict == "Yes" or (verdict is None and calls.settings.reflect_on == "no"):
            stops += [(text, calls.completion_tokens - start)] * left
            break
        (text,) = calls.read((yield [calls.reflecting(candidate, form)]))
        stops.append((text, calls.completion_tokens - start))
    else:
        rounds.append(calls.round(text))
    return text, rounds, stops


class Samples(Calls):
    """`n` answers to a question, and what the model's own judge says of them. Answers that the verifier calls equal are
    one answer.

    A judge may lean to a letter, so it is asked everything twice, with the letters the other way round. Nothing is
    asked twice the same way: a choice among the first k answers reuses what is known, and has the price (completion
    tokens) that it would have had alone.
    """

    def __init__(self, row: Row, settings: Settings):
        super().__init__(row, settings)
        self.matches: list[Row] = []  # of the last knock-out
        self._weights: list[tuple[float, int]] = []  # of each answer, and its price
        self._matches: dict[tuple[int, int], tuple[Row, int]] = {}  # (a, b) -> its verdicts, and their price

    def draw(self) -> Generator[list[Request], list[Output], None]:
        outputs = yield [self.request()] * self.settings.n
        self.texts, self.prices = self.read(outputs), [output.completion_tokens for output in outputs]
        self.rounds = [self.round(text) for text in self.texts]
        self._candidates = [self.candidate(text)[0] for text in self.texts]
        self._clusters = same_answers([self.settings.extract(text) for text in self.texts], self.settings.equal)

    def chosen(self, i: int, **fields: Any) -> Row:
        """The result, if the i-th answer is the one to give."""
        fields |= {"round_num": 0, "chosen": i, "matches": self.matches}
        return self.final(self.texts[i], self.texts[0], self.prices[0], self.rounds, **fields)

    def choose(self, how: str, n: int):
        """(which of the first `n` answers, what it cost), by vote, weighted_vote or best_of_n."""
        clusters = [[i for i in cluster if i < n] for cluster in self._clusters]
        clusters = [cluster for cluster in clusters if cluster] or [list(range(n))]
        price = sum(self.prices[:n])
        if how == "vote":
            clusters.sort(key=lambda c: -len(c))
        elif how == "weighted_vote":
            yield from self._weigh(n)
            clusters.sort(key=lambda c: (-sum(self._weights[i][0] for i in c), -len(c)))
            price += sum(cost for _, cost in self._weights[:n])
        else:
            price += yield from self._knock_out(clusters)
        return clusters[0][0], price

    def _ask_both_ways(self, pairs: list[tuple[str, str]]):
        """(the outputs, their texts, their price) of each pair of instructions."""
        if not pairs:
            return []
        outputs = yield [self.judging(text) for pair in pairs for text in pair]
        texts, prices = self.read(outputs), [output.completion_tokens for output in outputs]
        return [
            (outputs[i : i + 2], "\n---\n".join(texts[i : i + 2]), sum(prices[i : i + 2]))
            for i in range(0, len(outputs), 2)
        ]

    def _weigh(self, n: int) -> Generator[list[Request], list[Output], None]:
        new = range(len(self._weights), n)
        replies = yield from self._ask_both_ways([
            tuple(pointwise_instruction(self._candidates[i], right_letter=letter) for letter in "AB") for i in new
        ])  # fmt: skip
        for i, (both, judged, price) in zip(new, replies, strict=True):
            beliefs = [_belief(output, letter) for output, letter in zip(both, "AB", strict=True)]
            self._weights.append((sum(beliefs) / 2, price))
            verdict = "Yes" if min(beliefs) > 0.5 else "No" if max(beliefs) < 0.5 else None
            self.rounds[i] = {**self.round(self.texts[i], verdict, judged), "weight": sum(beliefs) / 2}

    def _knock_out(self, clusters: list[list[int]]):
        """Reduce `clusters` to the winner of a knock-out; return its price. A pair is won by the side that both
        verdicts name; where one can't be read, or they contradict each other, by the side with more votes."""
        self.matches, price = [], 0
        while len(clusters) > 1:
            pairs = list(zip(clusters[::2], clusters[1::2], strict=False))
            new = [(a[0], b[0]) for a, b in pairs if (a[0], b[0]) not in self._matches]
            sides = [(self._candidates[a], self._candidates[b]) for a, b in new]
            replies = yield from self._ask_both_ways([
                (pairwise_instruction(a, b), pairwise_instruction(b, a)) for a, b in sides
            ])  # fmt: skip
            for match, (both, judged, cost) in zip(new, replies, strict=True):
                verdict, swapped = (verify.parse_verdict(output.text) for output in both)
                self._matches[match] = {"verdict": verdict, "verdict_swapped": swapped, "judge_output": judged}, cost
            winners = []
            for a, b in pairs:
                outcome, cost = self._matches[a[0], b[0]]
                agreed = {("A", "B"): a, ("B", "A"): b}.get((outcome["verdict"], outcome["verdict_swapped"]))
                winners.append(agreed or max(a, b, key=len))  # equal votes: a, the earlier
                self.matches.append({"a": a[0], "b": b[0], "winner": winners[-1][0], **outcome})
                price += cost
            clusters[:] = winners + clusters[2 * len(pairs) :]
        return price


def sampled_row(row: Row, settings: Settings) -> Solver:
    """`n` answers, one of them chosen by vote, weighted_vote or best_of_n."""
    samples = Samples(row, settings)
    yield from samples.draw()
    chosen, _ = yield from samples.choose(settings.tts, settings.n)
    return samples.chosen(chosen)


def compared_row(row: Row, settings: Settings) -> Solver:
    """`n` answers, and what every way of test-time scaling makes of the first 1, 2, 4, ... of them, at what price;
    reflection starts from the first one. The majority is known for each number, to compare with at equal tokens."""
    samples, n = Samples(row, settings), settings.n
    yield from samples.draw()
    powers = [2**i for i in range(n.bit_length())]
    variants, right = [], lru_cache(samples.is_right)

    def add(variant: str, count: int, text: str, price: int) -> None:
        answer = {"answer": settings.extract(text), "is_correct": right(text)}
        variants.append({"variant": variant, "n": count, **answer, "completion_tokens": price})

    for variant, counts in (("vote", range(1, n + 1)), ("weighted_vote", powers), ("best_of_n", powers)):
        for count in counts:
            chosen, price = yield from samples.choose(variant, count)
            add(variant, count, samples.texts[chosen], price)
    *_, stops = yield from _reflect(samples, samples.texts[0])
    for count, (text, price) in enumerate(stops, 1):
        add("reflect", count, text, samples.prices[0] + price)
    chosen, _ = yield from samples.choose("vote", n)
    return samples.chosen(chosen, variants=variants)


def _belief(output: Output, right_letter: str) -> float:
    """How probable a pointwise verdict makes it that a response is right: 0.5 where it can't be read; without
    log-probabilities, 1 or 0."""
    verdict = verify.parse_verdict(output.text)
    if verdict is None:
        return 0.5
    probability = verdict_probability(output, verdict)
    probability = 1.0 if probability is None else probability
    return probability if verdict in ("Yes", right_letter) else 1 - probability


def same_answers(answers: list[str | None], equal: Callable) -> list[list[int]]:
    """Clusters of equal answers, as positions, in order of appearance; answers without a box (None) are in none."""
    clusters: list[list[int]] = []
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        for cluster in clusters:
            if answer == answers[cluster[0]] or equal([(answer, answers[cluster[0]])])[0]:
                cluster.append(i)
                break
        else:
            clusters.append([i])
    return clusters


def judge_row(row: Row, settings: Settings) -> Solver:
    """A pair in both orders, or one response with its label. Of several chosen and rejected ones, every pair."""
    calls, k = Calls(row, settings), settings.judge_samples
    single = row.get("response") is not None
    if single:
        instructions = [pointwise_instruction(calls.candidate(row["response"])[0])]
    else:
        chosen = row["chosen"] if isinstance(row["chosen"], list) else [row["chosen"]]
        sides = [[calls.candidate(text)[0] for text in side] for side in (chosen, row["rejected"])]
        pairs = list(itertools.product(*sides))
        instructions = [pairwise_instruction(*order) for pair in pairs for order in (pair, pair[::-1])]
    outputs = yield [request for request in map(calls.judging, instructions) for _ in range(k)]
    texts = calls.read(outputs)
    verdicts, probabilities = zip(*(majority(outputs[i : i + k]) for i in range(0, len(outputs), k)), strict=True)
    result = calls.result("\n---\n".join(texts), extracted_answer=verify.extract_boxed(texts[-1]))
    if k > 1:
        result["votes"] = [verify.parse_verdict(text) for text in texts]
    if single:
        return result | {
            "task": "pointwise",
            "label": row["label"],
            "verdict": verdicts[0],
            "verdict_probability": probabilities[0],
            "verdict_swapped": None,
            "is_correct": verdicts[0] == row["label"],
        }

    def one_or_all(values: tuple) -> Any:
        return values[0] if len(pairs) == 1 else list(values)

    first, swapped = verdicts[::2], verdicts[1::2]
    result |= {
        "task": "pairwise" if len(pairs) == 1 else "best_of_n",
        "label": "A",  # in the first order the chosen one is A, in the swapped order it is B
        "verdict": one_or_all(first),
        "verdict_probability": one_or_all(probabilities[::2]),
        "verdict_swapped": one_or_all(swapped),
        "verdict_swapped_probability": one_or_all(probabilities[1::2]),
        "is_correct": set(first) == {"A"} and set(swapped) == {"B"},
    }
    return result


SOLVERS: dict[str, Callable[[Row, Settings], Solver]] = {  # by mode, or way of test-time scaling
    "answer": answer_row,
    "judge": judge_row,
    "reflect": reflect_row,
    "compare": compared_row,
    **dict.fromkeys(("vote", "weighted_vote", "best_of_n"), sampled_row),
}
