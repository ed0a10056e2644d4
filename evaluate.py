"""Run a model over benchmarks: answering, judging, and test-time scaling with the model as its own judge.

    python evaluate.py --model DIR_OR_NAME --benchmark test.json --mode tts --output results.json
    python calculate_acc.py --result_path results.json

    answer   one answer per question
    tts      test-time scaling, with the one model as its own judge; the first and the final answer are both scored, so
             that training and test-time scaling are never mixed up. --tts says how:
               reflect         answer, judge that answer, reflect while the verdict is No (paper, section 3.4) or there
                               is no answer to judge
               vote            --n answers, the most frequent one
               weighted_vote   the same, each answer weighted by the judge's probability that it is right
               best_of_n       --n answers, a knock-out of pairwise judgements in both orders; more votes win a tie
               compare         all of them, from one set of --n answers, each with the tokens that it takes
    judge    rows with chosen and rejected: which of two is correct, in both orders; rows with response and label:
             whether it is correct. Each verdict comes with its probability, from the log-probabilities of its tokens;
             --judge_samples k asks k times and takes the majority

Each row is a small generator that yields requests and returns its result, so that a row's next call goes out as soon as
its last one is back, whatever the other rows do. Finished rows are appended to OUTPUT.part as they finish; running the
same command again evaluates only what is missing or failed. A failed row is recorded with its error: it is not an
answer, right or wrong, and the exit status is 1 while any remain.

Rows are read as for training (data/README.md has the formats), and the judge prompts are prompts.py's, so a model is
tested on what it was trained on. Where completions come from: engines.py. The same in a notebook, records in and
records out:

    rows = [{"dataset": "sums", "problem": "1+1?", "answer": "2"}]
    results = evaluate_records(rows, TransformersEngine("runs/demo/spark"), Settings("spark", "tts"))
    print(render(summarise([tally("spark", rows=results)]), "table"))  # calculate_acc.py's
"""

import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import verify
from data.arguments import DataSettings
from data.cli import Errors, Parser, flag, printable, progress_bar, refuse, write_atomically
from data.formats import columns
from data.images import Reference, content_digest, loaded
from data.progress import PartFile
from data.read import Reader
from data.rows import BadInput, BadRow, Source
from data.table import list_text
from engines import Output, Request, Sampling, ServerEngine, TransformersEngine, VLLMEngine
from prompts import (
    BOX,
    PROMPT_SUFFIX,
    Form,
    ask,
    neutralise,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)

Row = dict[str, Any]
COLUMNS = ("solution", "task", "source")  # what a verifier of yours gets of a row, beside its images
TTS = ("reflect", "vote", "weighted_vote", "best_of_n", "compare")


@dataclass(frozen=True)
class Settings:
    """What decides a result. A results file made with other settings is not continued."""

    model: str = flag(help="a folder or a hub name")
    mode: str = flag("answer", choices=("answer", "tts", "judge"))
    benchmark: tuple[str, ...] = flag((), "files (data/README.md), folders or hub names", required=True)
    engine: str = flag("auto", choices=("auto", "vllm", "transformers", "server"))
    max_tokens: int = flag(2048, least=1)
    temperature: float = flag(0.0, least=0)
    judge_temperature: float | None = flag(None, "of verdicts (default: --temperature)", least=0)
    repetition_penalty: float = flag(1.0, least=0.01)
    tts: str = flag("reflect", "mode tts: how", choices=TTS)
    max_rounds: int = flag(2, "tts reflect: maximum number of reflections", least=0)
    n: int = flag(8, "tts, other than reflect: answers per question", least=1)
    judge_samples: int = flag(1, "judge: verdicts per question; the majority counts", least=1)
    judge_source: str = flag("cot", "what a judge sees", choices=("cot", "answer"))
    prompt_suffix: str = flag(PROMPT_SUFFIX, "what questions end with; as in training")
    answer_mark: str = flag(BOX, "where reflections put the answer; as in training")
    reward_funcs: str | None = flag(None, "your own verifier as in training, FILE.py:NAME (default: verify.py)")
    correct_at: float | None = flag(None, "least reward of that verifier that is right (default: it gives 0 or 1)")
    seed: int = flag(0)
    served_model: str | None = flag(None, "server: the name the model has there (default: --model)")
    extra_body: str | None = flag(None, 'server: what every request also has, as {"top_k": 20} in JSON')

    @property
    def extra(self) -> dict[str, Any]:
        """`extra_body`, read. Raises BadInput."""
        try:
            found = json.loads(self.extra_body or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise BadInput(f"--extra_body: expected a JSON object, got {self.extra_body!r:.80}")
        return found

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.repetition_penalty)

    @cached_property
    def reward(self) -> Callable | None:
        """Your own verifier, if any, of TRL's signature: 1 is right, 0 wrong, None no opinion. Raises BadInput."""
        if self.reward_funcs is None:
            return None
        from training.rewards import load_rewards

        (function,) = load_rewards([self.reward_funcs])
        try:
            inspect.signature(function).bind(prompts=[], completions=[], **dict.fromkeys((*COLUMNS, "images")))
        except TypeError as error:
            passed = ", ".join(("prompts", "completions", *COLUMNS, "images"))
            raise BadInput(f"reward_funcs: {self.reward_funcs}: {error}; evaluation passes {passed}") from None
        return function

    @property
    def equal(self) -> Callable[[list[tuple]], list[bool | None]]:
        """For pairs of answers: whether they are the same."""
        return getattr(self.reward, "equal", verify.verify_many)

    @property
    def extract(self) -> Callable[[str], str | None]:
        """The answer in a text, or None."""
        return getattr(self.reward, "extract", verify.extract_boxed)


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs and no result depends on."""

    dtype: str = flag(
        "auto",
        "vllm, transformers: auto is the model's own (vllm: bfloat16 for float32), float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    batch_size: int = flag(128, "transformers", least=1)
    max_model_len: int | None = flag(
        None,
        "vllm: most tokens of prompt and completion together (default: the model's, all of which needs room)",
        least=1,
    )
    gpu_memory_utilization: float | None = flag(None, "vllm: share of the GPU's memory (default: vLLM's)", least=0)
    tensor_parallel_size: int = flag(1, "vllm: GPUs that the model is split over", least=1)
    server: tuple[str, ...] = flag((), "server: URLs; the key is read from OPENAI_API_KEY")
    concurrency: int = flag(64, "server: concurrent requests, over all URLs", least=1)
    timeout: float = flag(600.0, "server: seconds for one try", least=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Modes: a row in, requests out, a result back

Solver = Generator[list[Request], list[Output], Row]  # calls that may go out together, their outputs in that order


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
    """Answer, judge that answer, reflect while the verdict is No (paper, section 3.4). Every round is kept."""
    calls = Calls(row, settings)
    (first,) = calls.read((yield [calls.request()]))
    first_tokens = calls.completion_tokens
    text, rounds, _ = yield from _reflect(calls, first)
    reflections = sum(r["verdict"] == "No" for r in rounds)
    return calls.final(text, first, first_tokens, rounds, round_num=reflections)


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
        if verdict != "No":  # an unparsed verdict is no reason to throw an answer away
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


# ---------------------------------------------------------------------------------------------------------------------
# Running rows


@dataclass
class _Running:
    """A row under way: its solver, the outputs of the calls it waits for, and how many are still out."""

    index: int
    row: Row
    solver: Solver
    outputs: list[Output | None] | None = None
    missing: int = 0
    calls: int = 0


def run(rows: Iterable[tuple[int, Row]], engine, settings: Settings) -> Iterator[list[tuple[int, Row]]]:
    """Yield [(index, result), ...] as rows finish, for (index, row) pairs. As many rows are under way as keep the
    engine busy; a row's next calls go out as soon as its last ones are back."""
    waiting = iter(rows)
    tickets = itertools.count()
    out: dict[int, tuple[_Running, int]] = {}  # ticket -> (row, place of the call among those it waits for)

    solver = SOLVERS[settings.tts if settings.mode == "tts" else settings.mode]

    def advance(running: _Running) -> Row | None:
        for output in running.outputs or ():
            if output.error is not None:
                return Calls(running.row, settings).result("", error=output.error)
        try:
            requests = running.solver.send(running.outputs)
        except StopIteration as finished:
            return finished.value
        assert requests, "a row that waits for nothing would never finish"
        running.outputs, running.missing = [None] * len(requests), len(requests)
        for place, request in enumerate(requests):
            sampling = settings.sampling.of(request)
            if sampling.temperature > 0:
                request = request._replace(seed=_seed(settings.seed, running.index, running.calls))
            ticket = next(tickets)
            out[ticket] = running, place
            engine.submit(ticket, request, sampling)
            running.calls += 1
        return None

    while True:
        while len(out) < engine.capacity and (pair := next(waiting, None)) is not None:
            index, row = pair
            advance(_Running(index, row, solver(row, settings)))
        if not out:
            return
        finished = []
        for ticket, output in engine.finished():
            running, place = out.pop(ticket)
            running.outputs[place] = output
            running.missing -= 1
            if running.missing == 0 and (result := advance(running)) is not None:
                finished.append((running.index, result))
        yield finished


def _seed(*parts: int) -> int:
    """The same for the same call of the same row, whenever it is made."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def evaluate_records(records: list[Row], engine, settings: Settings) -> list[Row]:
    """Results of `records`, in their order. For notebooks and scripts; nothing is written.

    The records are what a benchmark file would hold; images may also be PIL images. Raises BadInput for one that can't
    be used.
    """
    rows = read_benchmark(Source(records, suffix=settings.prompt_suffix), settings.mode)
    results = dict(itertools.chain.from_iterable(run(enumerate(rows), engine, settings)))
    return [results[index] for index in range(len(rows))]


def benchmark_names(names: Sequence[str]) -> dict[str, str]:
    """What each benchmark is called: its file's name, with the folder's where others are called the same, as two
    downloads of test.jsonl are. Raises BadInput where one is given twice."""
    paths = Counter(os.path.realpath(name) for name in names)
    if twice := [name for name in names if paths[os.path.realpath(name)] > 1]:
        raise BadInput(f"--benchmark {twice[0]}: expected each once, got {twice[-1]} as well")
    called = {name: Path(name).stem for name in names}
    for longer in (lambda name: f"{Path(os.path.abspath(name)).parent.name}/{Path(name).stem}", str):
        alike = Counter(called.values())
        called = {name: short if alike[short] == 1 else longer(name) for name, short in called.items()}
    return called


def read_benchmark(source: Source, mode: str) -> list[Row]:
    """The rows of a benchmark. Images must be there, and are opened when a model is asked about them.

    Raises BadInput for data that can't be read, and for rows that the mode can't use.
    """
    rows = [row for _, _, row in Reader(source, "judge" if mode == "judge" else "answer", look=False)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    if bad:
        more = f"; {len(bad) - 1:,} more rows can't be used, python -m data.check names them" if len(bad) > 1 else ""
        raise BadInput(f"{source}: {bad[0]}{more}")
    if not rows:
        raise BadInput(f"{source}: expected at least one row, found none")
    parts: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["group"]:
            parts.setdefault((row["dataset"], row["group"][0]), set()).add(row["group"][1])
    for row in rows:
        if row["group"]:  # its size: --limit may leave parts of a question out
            of = parts[row["dataset"], row["group"][0]]
            row["group"] = None if columns.is_no_group(of) else [*row["group"], str(len(of))]
    return rows


def run_to_file(
    rows: list[Row], engine, settings: Settings, output: Path, wanted: list[int] | None = None
) -> list[Row]:
    """Evaluate what `output` does not hold yet; append each row as it finishes, then write the final JSON atomically.

    Args:
        wanted: which of `rows`, in order; None: all of them. Another run may want others, and goes on from this one.

    Raises BadInput if the file was made with other settings.
    """
    part = part_file(rows, settings, output)
    wanted = list(range(len(rows))) if wanted is None else wanted
    todo = [(i, rows[i]) for i in wanted if i not in part.done]
    with progress_bar(len(wanted), len(wanted) - len(todo), settings.mode) as bar:
        try:
            for finished in run(todo, engine, settings):
                part.add(dict(finished))
                bar.update(len(finished))
        finally:
            part.close()
    results = [part.done[i] for i in wanted]
    write_atomically(output, list_text(json.dumps(result, ensure_ascii=False) for result in results))
    return results


def part_file(rows: list[Row], settings: Settings, output: Path) -> PartFile:
    """OUTPUT.part, where results are kept while they come in; what it holds is without the failed ones.

    Raises BadInput if it, or `output`, is of another run.
    """
    path = output.with_name(output.name + ".part")
    if output.is_dir():
        raise BadInput(f"{output}: expected a file, got a folder")
    if output.exists() and not path.exists():
        raise BadInput(
            f"{output}: exists, and has no {path.name} that says what made it; give another --output or remove it"
        )
    header = {**asdict(settings), "number of rows": len(rows), **contents(settings, rows)}
    part = PartFile(path, header, fields=("error",))
    part.done = {index: result for index, result in part.done.items() if result["error"] is None}
    return part


def contents(settings: Settings, rows: list[Row]) -> dict[str, str]:
    """Digests of the questions and, for a model in a folder, of its files: the same name may hold another model."""
    questions = hashlib.blake2b(digest_size=8)
    for row in rows:
        left_out = ("images", "source", "task", "categories", "group")
        question = {name: value for name, value in row.items() if name not in left_out}
        budgets = [(image["min_pixels"], image["max_pixels"]) for image in row["images"]]
        questions.update(json.dumps([question, budgets], sort_keys=True).encode())
        for image in row["images"]:  # a file by its name, wherever it lies
            questions.update(image["bytes"] or os.path.basename(image["path"]).encode())
    digests = {"benchmark contents": questions.hexdigest()}
    if settings.reward_funcs:
        file = Path(settings.reward_funcs.rpartition(":")[0])
        digests["reward_funcs contents"] = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    folder = Path(settings.model)
    if settings.engine != "server" and folder.is_dir():
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as opened:
                for at in range(0, size, max(size // 256, 1 << 16)):  # all over it: training may leave the start as is
                    opened.seek(at)
                    digest.update(opened.read(1 << 16))
        digests["model contents"] = digest.hexdigest()
    return digests


def make_engine(settings: Settings, engine: EngineSettings):
    """The engine that the settings ask for. Raises BadInput where it can't be had."""
    from safetensors import SafetensorError

    try:
        if settings.engine == "server":
            model = settings.served_model or settings.model
            return ServerEngine(list(engine.server), model, engine.concurrency, engine.timeout, extra=settings.extra)
        if settings.engine == "vllm":
            share = engine.gpu_memory_utilization
            return VLLMEngine(
                settings.model,
                dtype=engine.dtype,
                max_model_len=engine.max_model_len,
                tensor_parallel_size=engine.tensor_parallel_size,
                **({} if share is None else {"gpu_memory_utilization": share}),
            )
        from transformers import set_seed

        set_seed(settings.seed)
        return TransformersEngine(settings.model, batch_size=engine.batch_size, dtype=engine.dtype)
    except BadInput:
        raise
    except (ValueError, ImportError, RuntimeError, SafetensorError) as error:  # about a model that can't be loaded
        raise BadInput(f"--model {settings.model}: {error}") from error


def choose_engine(engine: str, server: tuple[str, ...]) -> str:
    """`auto`: servers if there are any; vLLM where it is installed beside a GPU; else transformers."""
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise BadInput("--engine vllm: expected vLLM to be installed (requirements.txt has its version)")
    if engine == "server" and not server:
        raise BadInput("--engine server: expected --server URL")
    if server and engine not in ("auto", "server"):
        raise BadInput(f"--server: expected --engine server beside it, got {engine}")
    if engine != "auto":
        return engine
    if server:
        return "server"
    if importlib.util.find_spec("vllm"):
        import torch

        if torch.cuda.is_available():
            return "vllm"
    return "transformers"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_fields(Settings)
    parser.add_fields(EngineSettings)
    parser.add_fields(DataSettings, dataset_split="test")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--limit", type=int, help="maximum number of rows per benchmark")
    parser.add_argument("--check", action="store_true", help="read the benchmarks and stop: no model is loaded")
    args = parser.parse_args()
    settings, engine, data = (parser.values(args, fields) for fields in (Settings, EngineSettings, DataSettings))
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: expected a number from 1 on, got {args.limit}")
    try:
        settings = replace(settings, engine=choose_engine(settings.engine, engine.server))
        for mode, names in (("tts", ("tts", "max_rounds", "n")), ("judge", ("judge_samples",))):
            for name in names:
                if settings.mode != mode and getattr(settings, name) != getattr(Settings, name):
                    raise BadInput(f"--{name}: expected --mode {mode} beside it, got {settings.mode}")
        for name in ("served_model", "extra_body"):
            if settings.engine != "server" and getattr(settings, name) is not None:
                raise BadInput(f"--{name}: expected --server URL beside it")
        _ = settings.extra
        if settings.mode == "tts" and settings.tts != "reflect" and settings.temperature == 0:
            raise BadInput(f"--tts {settings.tts}: expected a --temperature above 0, or all answers are the same")
        judging_at = settings.temperature if settings.judge_temperature is None else settings.judge_temperature
        if settings.judge_samples > 1 and judging_at == 0:
            raise BadInput("--judge_samples: expected a --temperature above 0, or all verdicts are the same")
        if settings.engine != "server" and (Path(settings.model) / "adapter_config.json").is_file():
            raise BadInput(
                f"--model {settings.model}: expected a model, got an adapter (LoRA); python -m training.merge "
                f"{settings.model} makes a model of it, in {settings.model}/merged"
            )
        for name, value in (("keep_solution", data.keep_solution), ("correct_at", settings.correct_at is not None)):
            if value and settings.reward_funcs is None:
                raise BadInput(f"--{name}: expected --reward_funcs beside it: verify.py has no use for it")
        _ = settings.reward  # refused now, and not after the first answer
        rows, wanted = [], []
        for name, called in benchmark_names(settings.benchmark).items():
            of_benchmark = read_benchmark(Source(name, data, settings.prompt_suffix, called=called), settings.mode)
            wanted += range(len(rows), len(rows) + len(of_benchmark[: args.limit]))
            rows += of_benchmark
        part_file(rows, settings, args.output)  # refused now, and not when the model is loaded
        if args.check:
            print(f"{len(wanted)} rows")
            return 0
        with closing(make_engine(settings, engine)) as running:
            results = run_to_file(rows, running, settings, args.output, wanted)
    except (BadInput, OSError) as error:
        return refuse("evaluate.py", error)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    errors, failed = Errors(), [result["error"] for result in results if result["error"] is not None]
    for error in failed:
        errors.add(error)
    print(*map(printable, errors.lines()), sep="\n", end="\n" if failed else "")
    print(f"{len(results)} rows, {len(failed)} failed; python calculate_acc.py --result_path {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
