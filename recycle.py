"""Recycling: one step's scored rollouts in, judge and reflection prompts out (SPARK, arXiv 2509.22624, section 3).

A group is one question with its G rollouts, each already scored by the verifier. It is mixed if some are right and
some are wrong, else pure:

    mixed               -> pairwise    "which one is correct?", with probability recycle_pairwise_prob
                           or two pointwise items: "is it correct?" of a right rollout and of a wrong one
    at least one wrong  -> reflection  "solve it again", rewarded by the question's own gold answer

The current policy then answers each of these prompts G times, and 0/1 rewards against the labels train it by the same
GRPO update. No reward model, no teacher, no preference data.

Where this departs from the paper's released code:
1. The question says nothing about the label. There, pure groups become pointwise items too, so a judge earns its reward
   by knowing which questions are easy, without reading the response. Here a question is judged pointwise with both a
   right and a wrong rollout, or not at all (`recycle_matched`; false is the paper's way).
2. Nor does being cut off: such a rollout is wrong for lack of a box, and a judge would learn to look for one. The two
   rollouts of a question that are judged both have a box, or neither has.
3. Labels are balanced in every step, to within one item (right/wrong, Yes-No/A-B wording, A/B position). There, "Yes"
   becomes the label of most items as the policy gets better.
4. Items are written from this step's rollouts. There, they wait in a cache and are one update old.
5. Every template asks for `\\boxed{}`, which is what the verifier reads, and quotes rollouts safely (prompts.py).

Everything here is a pure function of its arguments: no torch, no trainer, no files, no global random state. Try it:

    >>> rollouts = (Rollout("1+1=2 so \\\\boxed{2}", "2", True), Rollout("\\\\boxed{3}", "3", False))
    >>> groups = [Group(f"q{i}", "What is 1+1?", rollouts) for i in range(4)]
    >>> items, counts = recycle(groups, step=0, config=RecycleConfig(recycle_ratio=1.0))
    >>> [item.task for item in items]
    ['pairwise', 'pairwise', 'reflection', 'reflection']
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from data.cli import flag
from prompts import (
    BOX,
    PAIRWISE,
    POINTWISE_A_B,
    POINTWISE_YES_NO,
    PROMPT_SUFFIX,
    REFLECT_ON_ANSWER,
    REFLECT_ON_COT,
    Form,
    Prompt,
    ask,
    neutralise,
    pairwise_instruction,
    pointwise_instruction,
    reflection_instruction,
)
from verify import verify_many

Task = Literal["pointwise", "pairwise", "reflection"]
TASKS: tuple[Task, ...] = ("pointwise", "pairwise", "reflection")


# ---------------------------------------------------------------------------------------------------------------------
# Records


@dataclass
class RecycleConfig:
    """The settings of recycling. SparkConfig inherits these fields, so either can be passed to `recycle`."""

    recycle_ratio: float = flag(
        0.25, "Recycled prompts per policy prompt, at most; a step's number is rounded at random. 0 is plain GRPO."
    )
    recycle_tasks: list[str] = field(
        default_factory=lambda: list(TASKS),
        metadata={"help": "Which recycled tasks to train: pointwise, pairwise, reflection."},
    )
    recycle_source: str = flag(
        "both",
        "What a prompt quotes of a rollout: its final answer, its whole reasoning (cot), or one of the two at random.",
        choices=["both", "answer", "cot"],
    )
    recycle_adaptive: bool = flag(
        False,
        "Only the groups without contrast, which teach the policy nothing, count towards recycle_ratio: few recycled "
        "prompts while answering has much to learn, more later.",
    )
    recycle_pairwise_prob: float = flag(
        0.7, "Probability that a mixed group gives a pairwise item instead of pointwise ones."
    )
    recycle_balance: bool = flag(
        True, "Pointwise items quote as many right as wrong rollouts in each step, even without recycle_matched."
    )
    recycle_matched: bool = flag(
        True,
        "Pointwise items come in twos, a right and a wrong rollout of one question, so that the question does not give "
        "the label away. false: one item per question, even where all rollouts are right or all are wrong.",
    )
    recycle_right_reflections: float = flag(
        0.0, "Share of mixed groups' reflection items that quote a right rollout: not every answer has to change."
    )
    recycle_seed: int = flag(0, "Seed of the random choices of recycling, together with the step.")
    prompt_suffix: str = flag(
        PROMPT_SUFFIX, "What policy prompts end with; removed before the judge is asked about the question."
    )
    answer_mark: str = flag(
        BOX, "Where reflection prompts want the answer, if your verifier reads something else: <answer></answer>."
    )

    def check_recycling(self) -> None:
        """Raise ValueError, naming the field and what it expects, if a setting can't be used."""
        if not self.recycle_ratio >= 0:
            raise ValueError(f"recycle_ratio: expected a number >= 0, got {self.recycle_ratio}")
        for name in ("recycle_pairwise_prob", "recycle_right_reflections"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.recycle_source not in ("both", "answer", "cot"):
            raise ValueError(f"recycle_source: expected both, answer or cot, got {self.recycle_source!r}")
        unknown = set(self.recycle_tasks) - set(TASKS)
        if unknown or not self.recycle_tasks:
            raise ValueError(f"recycle_tasks: expected some of {', '.join(TASKS)}, got {self.recycle_tasks}")


@dataclass(frozen=True)
class Rollout:
    """One scored completion. `answer` is what it boxed (None: nothing), `correct` is None where it can't be scored."""

    text: str
    answer: str | None
    correct: bool | None


@dataclass(frozen=True)
class Group:
    """One question and its rollouts.

    key: identifies the question, images included; two groups with one key are the same question.
    prompt: as the policy saw it, plain text or chat messages; images stay in it as they are.
    row: what the trainer wants back with each item (images, gold, other columns). Never read here, so that no gold can
        reach a prompt.
    """

    key: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def pass_rate(self) -> float:
        """Share of right rollouts among the scored ones, of which there must be one at least."""
        scored = [r.correct for r in self.rollouts if r.correct is not None]
        return sum(scored) / len(scored)


@dataclass(frozen=True)
class Response:
    """A rollout as a prompt quotes it: `text` in `form`, what it boxed, and whether that is right."""

    text: str
    form: Form
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Candidate:
    """A task that a group can be used for, with its right and its wrong response, as far as it has them."""

    task: Task
    group: Group
    right: Response | None = None
    wrong: Response | None = None


@dataclass(frozen=True)
class Item:
    """One recycled prompt. `label` is the verdict that earns the reward; None where the answer is scored like the
    policy's, against the gold: reflection."""

    task: Task
    prompt: Prompt
    label: str | None
    group: Group
    responses: tuple[Response, ...]  # in the order of the prompt


@dataclass(frozen=True)
class Counts:
    """What became of the step's candidates without an item.

    unused: candidates that could be used, but exceed the ratio or have no counterpart that balances their label.
    skipped: reason -> candidates that can't be used.
    """

    unused: int
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class Limits:
    """What the model and the number of processes demand of items; by default nothing.

    control_tokens: the tokenizer's special tokens, broken up where a rollout spells one.
    multiple_of: emit a multiple of this many items, so that their rollouts divide over the processes.
    equal: tells which (prediction, gold) pairs are one answer to the verifier; None (unknown) counts as one answer.
    fits: tells which (group, quoted text) prompts are short enough for the model.
    at_most: number of items, instead of what recycle_ratio gives.
    """

    control_tokens: Sequence[str] = ()
    multiple_of: int = 1
    equal: Callable[[list[tuple[str, str]]], list[bool | None]] = verify_many
    fits: Callable[[list[tuple[Group, str]]], list[bool]] = lambda prompts: [True] * len(prompts)
    at_most: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# From groups to items


def recycle(
    groups: Sequence[Group], step: int | str, config: RecycleConfig, limits: Limits | None = None
) -> tuple[tuple[Item, ...], Counts]:
    """Rewrite one step's scored groups into judge and reflection prompts (paper, section 3.2).

    Args:
        groups: this step's questions, in the same order on every process.
        step: seeds the random choices, together with `config.recycle_seed`.
        config: a RecycleConfig, or a SparkConfig.
        limits: what the model and the number of processes demand; by default nothing.

    Returns:
        At most `recycle_ratio * len(groups)` items, rounded at random, half judge and half reflection where there are
        enough of both, and the counts of what became of every candidate.

    Raises ValueError for a setting that can't be used, and for a prompt without a user turn.
    """
    config.check_recycling()
    limits = limits or Limits()
    rng, rounding = (random.Random(f"{config.recycle_seed}/{step}{use}") for use in ("", "/rounding"))
    skipped: Counter[str] = Counter()

    candidates = _candidates(groups, config, limits.control_tokens, rng, skipped)
    candidates = _drop_equal_answers(candidates, limits.equal, skipped)
    candidates = _drop_overlong(candidates, limits.fits, skipped)
    capacity = _capacity(groups, config, limits.multiple_of, rounding) if limits.at_most is None else limits.at_most
    quotas = _quotas(candidates, capacity, limits.multiple_of, config, rounding)
    selected = _select(candidates, quotas, config, rng)

    used = len({(task, group.key) for task, group, _ in selected})
    counts = Counts(len(candidates) - used, {reason: n for reason, n in sorted(skipped.items()) if n})
    return _write_items(selected, config, rng), counts


def _capacity(groups, config, multiple_of: int, rounding: random.Random) -> int:
    """Items of this step, at most; rounded at random, so that small steps recycle as well, and have room for two where
    pointwise items come in twos."""
    pure = [group for group in groups if len({r.correct for r in group.rollouts} - {None}) == 1]
    counted = pure if config.recycle_adaptive else groups
    return _rounded(config.recycle_ratio * len(counted), _unit(config, multiple_of), rounding)


def _unit(config, multiple_of: int) -> int:
    """What a step's number of items is a multiple of, before it is known which ones there are."""
    return math.lcm(multiple_of, 2 if config.recycle_matched and "pointwise" in config.recycle_tasks else 1)


def most_items(n: int, config: RecycleConfig, multiple_of: int = 1) -> int:
    """Items of a step of `n` groups, at most."""
    unit = _unit(config, multiple_of)
    return unit * math.ceil(config.recycle_ratio * n / unit - 1e-9)


def items_come_in(processes: int, group_size: int) -> int:
    """A step's items are a multiple of this, so that their rollouts divide over the processes."""
    return processes // math.gcd(processes, group_size)


def _rounded(number: float, multiple_of: int, rounding: random.Random) -> int:
    """The multiple below or above, at random, so that the mean is `number`."""
    return multiple_of * int(number / multiple_of + rounding.random() + 1e-9)


def _candidates(groups, config, control_tokens, rng, skipped) -> list[Candidate]:
    """At most one judge and one reflection candidate per question, with the rollouts that each would quote."""
    forms: tuple[Form, ...] = ("answer", "cot") if config.recycle_source == "both" else (config.recycle_source,)
    candidates = []
    keys = set()
    for group in groups:
        right = [r for r in group.rollouts if r.correct is True]
        wrong = [r for r in group.rollouts if r.correct is False]
        if not right and not wrong:
            skipped["unscorable"] += 1
            continue
        if group.key in keys:
            skipped["duplicate"] += 1
            continue
        keys.add(group.key)

        task = _judge_task(bool(right and wrong), config, rng)
        # The form is drawn before the rollouts are looked at: it must not give the label away.
        responses = _right_and_wrong(right, wrong, rng.sample(forms, len(forms)), control_tokens, rng)
        if task is not None and any(responses):
            candidates.append(Candidate(task, group, *responses))
        elif task is not None:
            skipped["unboxed"] += 1

        if wrong and "reflection" in config.recycle_tasks:
            order = rng.sample(forms, len(forms))
            share = config.recycle_right_reflections
            side = "right" if share and right and rng.random() < share else "wrong"
            response = _response(right if side == "right" else wrong, order, control_tokens, rng)
            if response:
                candidates.append(Candidate("reflection", group, **{side: response}))
            else:
                skipped["unboxed"] += 1
    return candidates


def _judge_task(mixed: bool, config, rng) -> Task | None:
    """Pairwise with probability `recycle_pairwise_prob` for a mixed group, else pointwise; None if neither is on."""
    pointwise = "pointwise" in config.recycle_tasks
    if mixed and "pairwise" in config.recycle_tasks:
        return "pairwise" if not pointwise or rng.random() < config.recycle_pairwise_prob else "pointwise"
    return "pointwise" if pointwise else None


def _right_and_wrong(right, wrong, forms, control_tokens, rng) -> tuple[Response | None, Response | None]:
    """A right and a wrong response in the first of `forms` that both have, both with a box, else both without; from a
    pure group, the one that it has."""
    for boxed, form in product((True, False), forms):
        pair = tuple(
            _response([r for r in side if (r.answer is not None) is boxed], (form,), control_tokens, rng)
            for side in (right, wrong)
        )
        if bool(pair[0]) == bool(right) and bool(pair[1]) == bool(wrong):
            return pair
    return None, None


def _response(rollouts, forms, control_tokens, rng) -> Response | None:
    """A random rollout in the first of `forms` that any of them has; one without a box has no answer form."""
    for form in forms:
        for rollout in rng.sample(rollouts, len(rollouts)):
            text = rollout.answer if form == "answer" else rollout.text
            if text is not None and text.strip():
                return Response(neutralise(text.strip(), control_tokens), form, rollout.answer, rollout.correct)
    return None


def _drop_equal_answers(candidates, equal, skipped) -> list[Candidate]:
    """Two rollouts whose answers are equal to the verifier can't be right and wrong. One batched call for all."""
    pairs = {
        i: (c.wrong.answer, c.right.answer)
        for i, c in enumerate(candidates)
        if c.right and c.wrong and None not in (c.right.answer, c.wrong.answer)
    }
    verdicts = equal(list(pairs.values())) if pairs else []
    dropped = {i for i, verdict in zip(pairs, verdicts, strict=True) if verdict is not False}
    skipped["equal_pair"] += len(dropped)
    return [c for i, c in enumerate(candidates) if i not in dropped]


def _drop_overlong(candidates, fits, skipped) -> list[Candidate]:
    """A prompt too long for the model is left out, never cut. One batched call for all."""
    prompts = []  # (index of its candidate, quoted text)
    for i, c in enumerate(candidates):
        texts = [response.text for response in (c.right, c.wrong) if response]
        prompts += [(i, text) for text in (["\n".join(texts)] if c.task == "pairwise" else texts)]
    fitting = fits([(candidates[i].group, text) for i, text in prompts])
    dropped = {i for (i, _), fits_model in zip(prompts, fitting, strict=True) if not fits_model}
    skipped["overlong"] += len(dropped)
    return [c for i, c in enumerate(candidates) if i not in dropped]


def _quotas(candidates, capacity: int, multiple_of: int, config: RecycleConfig, rounding) -> dict[Task, int]:
    """How many items of each task: half judge and half reflection; either takes places that the other can't fill."""
    n = Counter(c.task for c in candidates)
    has = Counter((bool(c.right), bool(c.wrong)) for c in candidates if c.task == "pointwise")
    mixed = has[True, True]
    balanced = 2 * (mixed + min(has[True, False], has[False, True]))
    share, usable, unit = n["pointwise"], n["pointwise"], 1  # what decides the pointwise share, and what can fill it
    if config.recycle_matched:
        # Pure groups count towards the pointwise share, as in the paper, but mixed groups take their places.
        share, usable, unit = balanced, 2 * mixed, 2
    elif config.recycle_balance:
        share = usable = min(n["pointwise"], balanced)

    judge = min(share + n["pairwise"], capacity - min(n["reflection"], _rounded(capacity / 2, 1, rounding)))
    wanted = _rounded(judge * share / max(share + n["pairwise"], 1), unit, rounding)  # also beyond judge: to the mean
    wanted = min(wanted, usable, capacity // unit * unit)
    pairwise = min(n["pairwise"], max(judge - wanted, 0))
    pointwise = min(usable, max(wanted, (judge - pairwise) // unit * unit))
    reflection = min(n["reflection"], capacity - pointwise - pairwise)
    quotas: dict[Task, int] = {"pointwise": pointwise, "pairwise": pairwise, "reflection": reflection}
    while sum(quotas.values()) % multiple_of:
        task = max(quotas, key=lambda t: (quotas[t] > 0, t != "pointwise", quotas[t]))
        quotas[task] -= unit if task == "pointwise" else 1
    return quotas


def _select(candidates, quotas, config, rng) -> list[tuple[Task, Group, tuple[Response, ...]]]:
    """The responses that each item will quote; pointwise items first, those of right rollouts before the others."""
    of: dict[Task, list[Candidate]] = {task: [c for c in candidates if c.task == task] for task in TASKS}
    right, wrong = _select_pointwise(of["pointwise"], quotas["pointwise"], config, rng)
    return [
        *(("pointwise", c.group, (c.right,)) for c in right),
        *(("pointwise", c.group, (c.wrong,)) for c in wrong),
        *(("pairwise", c.group, (c.right, c.wrong)) for c in of["pairwise"][: quotas["pairwise"]]),
        *(("reflection", c.group, (c.wrong or c.right,)) for c in of["reflection"][: quotas["reflection"]]),
    ]


def _select_pointwise(candidates, n: int, config, rng) -> tuple[list[Candidate], list[Candidate]]:
    """`n` pointwise items: the candidates whose right response is quoted, and those whose wrong one is."""
    mixed = [c for c in candidates if c.right and c.wrong]
    if config.recycle_matched:
        return mixed[: n // 2], mixed[: n // 2]
    if not config.recycle_balance:
        right, wrong = [], []
        for c in candidates[:n]:
            (right if c.right and (not c.wrong or rng.random() < 0.5) else wrong).append(c)
        return right, wrong
    only_right = [c for c in candidates if not c.wrong]
    only_wrong = [c for c in candidates if not c.right]
    n_right = n // 2
    if n % 2:  # the odd one goes to either side, where there is a candidate for it
        can_right, can_wrong = (len(only) + len(mixed) > n_right for only in (only_right, only_wrong))
        n_right += rng.random() < 0.5 if can_right and can_wrong else can_right
    from_mixed = max(n_right - len(only_right), 0)
    right = only_right[:n_right] + mixed[:from_mixed]
    return right, (only_wrong + mixed[from_mixed:])[: n - n_right]


def _write_items(selected, config, rng) -> tuple[Item, ...]:
    """Give each item its wording, its order and its label, each balanced to within one."""
    n_of: Counter[Task] = Counter()
    by_letter, letter, position = rng.randrange(2), rng.randrange(2), rng.randrange(2)
    items = []
    for task, group, responses in selected:
        i = n_of[task]
        n_of[task] += 1
        label = None
        response = responses[0]
        if task == "pairwise":
            label = "AB"[(i + position) % 2]
            responses = responses if label == "A" else responses[::-1]
            instruction = pairwise_instruction(responses[0].text, responses[1].text, rng.randrange(len(PAIRWISE)))
        elif task == "reflection":
            template = rng.randrange(len(REFLECT_ON_COT if response.form == "cot" else REFLECT_ON_ANSWER))
            if response.correct:
                template |= 1  # the even templates say that the attempt is wrong
            instruction = reflection_instruction(response.text, response.form, template, config.answer_mark)
        elif task != "pointwise":
            raise ValueError(f"{task}: expected one of {', '.join(TASKS)}, which have prompts")
        elif (i + by_letter) % 2:  # right responses come first, so alternating balances within each label
            label = "AB"[(i // 2 + letter) % 2]
            right_letter = label if response.correct else "BA"["AB".index(label)]
            instruction = pointwise_instruction(response.text, rng.randrange(len(POINTWISE_A_B)), right_letter)
        else:
            label = "Yes" if response.correct else "No"
            instruction = pointwise_instruction(response.text, rng.randrange(len(POINTWISE_YES_NO)))
        items.append(Item(task, ask(group.prompt, instruction, config.prompt_suffix), label, group, responses))
    return tuple(items)


# ---------------------------------------------------------------------------------------------------------------------
# What gives a label away


def question_only(items: Iterable[Item]) -> float | None:
    """Accuracy on the pointwise items of a judge that never reads the response: it says correct where the question's
    pass rate reaches a threshold, the best one for these items. 0.5 is no leak; None without pointwise items."""
    points = sorted(((i.group.pass_rate, i.responses[0].correct) for i in items if i.task == "pointwise"), reverse=True)
    if not points:
        return None
    hits = best = sum(not correct for _, correct in points)  # a threshold above all: "incorrect" throughout
    for i, (rate, correct) in enumerate(points):
        hits += 1 if correct else -1
        if i + 1 == len(points) or points[i + 1][0] != rate:  # a threshold can't fall between equal pass rates
            best = max(best, hits)
    return best / len(points)
