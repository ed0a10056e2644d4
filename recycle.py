"""Recycling: one step's scored rollouts in, judge and reflection prompts out (SPARK, arXiv 2509.22624, section 3).

A group is one question with its G rollouts, each already scored by the verifier:

    some right, some wrong -> pairwise    "which one is correct?"    with probability recycle_pairwise_prob,
                              else pointwise, twice: "is it correct?" of a right rollout and of a wrong one
    at least one wrong     -> reflection  "solve it again"           label: the question's own gold

The current policy then answers each of these prompts G times, and 0/1 rewards against the labels train it by the same
GRPO update. No reward model, no teacher, no preference data.

Where this departs from the paper's released code:
1. The question says nothing about the label. There, a group that is all right or all wrong becomes a pointwise item
   too, so a judge earns its reward by knowing which questions are easy, without reading the answer. Here a pointwise
   question is asked of a right and of a wrong rollout, or not at all (`recycle_matched`, the paper's way: false).
2. Labels are balanced exactly in every step (right/wrong, Yes-No/A-B wording, A/B position). There, "Yes" takes over
   as the policy gets better.
3. Items are rewritten from this step's rollouts, never from a cache one update old.
4. Every template asks for `\\boxed{}`, which is what the verifier reads, and quotes rollouts safely (prompts.py).

Everything here is a pure function of its arguments: no torch, no trainer, no files, no global random state. Try it:

    >>> rollouts = (Rollout("1+1=2 so \\\\boxed{2}", "2", True), Rollout("\\\\boxed{3}", "3", False))
    >>> groups = [Group(f"q{i}", "What is 1+1?", rollouts) for i in range(4)]
    >>> items, counts = recycle(groups, step=0, config=RecycleConfig())
    >>> [item.task for item in items]
    ['pairwise', 'pairwise', 'reflection', 'reflection']
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prompts import (
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
    """The settings of recycling. SparkConfig inherits these fields, so either may be passed to `recycle`."""

    recycle_ratio: float = field(
        default=1.0,
        metadata={"help": "Recycled prompts per policy prompt, at most. 0 is plain GRPO."},
    )
    recycle_tasks: list[str] = field(
        default_factory=lambda: list(TASKS),
        metadata={"help": "Which recycled tasks to train: pointwise, pairwise, reflection."},
    )
    recycle_source: str = field(
        default="both",
        metadata={
            "help": "What of a rollout is shown: its final answer, its whole reasoning (cot), or both.",
            "choices": ["both", "answer", "cot"],
        },
    )
    recycle_adaptive: bool = field(
        default=False,
        metadata={
            "help": "Only the groups without contrast, which teach the policy nothing, count towards recycle_ratio: "
            "few recycled prompts while answering has much to learn, more later."
        },
    )
    recycle_pairwise_prob: float = field(
        default=0.7,
        metadata={"help": "Probability that a mixed group gives a pairwise item instead of pointwise ones."},
    )
    recycle_balance: bool = field(
        default=True,
        metadata={"help": "Pointwise items show as many right as wrong rollouts in each step."},
    )
    recycle_matched: bool = field(
        default=True,
        metadata={
            "help": "Pointwise items come in twos, a right and a wrong rollout of one question, so that the question "
            "does not give the label away. false: one item a question, also where all rollouts are right or wrong."
        },
    )
    recycle_right_reflections: float = field(
        default=0.0,
        metadata={"help": "Share of the reflection items that show a right rollout, so that not every answer changes."},
    )
    recycle_seed: int = field(
        default=0,
        metadata={"help": "Seed of the choices made in recycling, together with the step."},
    )
    prompt_suffix: str = field(
        default=PROMPT_SUFFIX,
        metadata={"help": "What policy prompts end with; removed before the judge is asked about the question."},
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
    row: what the trainer wants back with each item (images, gold, other columns). Never looked at here, so that no
        gold can reach a prompt.
    """

    key: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def pass_rate(self) -> float:
        """Share of right rollouts among the scored ones."""
        scored = [r.correct for r in self.rollouts if r.correct is not None]
        return sum(scored) / len(scored)


@dataclass(frozen=True)
class Response:
    """A rollout as a judge sees it: `text` in `form`, what it boxed, and whether that is right."""

    text: str
    form: Form
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Candidate:
    """What a group can be asked: one task, and the right and the wrong rollout there are for it."""

    task: Task
    group: Group
    right: Response | None = None
    wrong: Response | None = None


@dataclass(frozen=True)
class Item:
    """One recycled prompt. `label` is the verdict that earns the reward (None for reflection: there it is the gold)."""

    task: Task
    prompt: Prompt
    label: str | None
    group: Group
    responses: tuple[Response, ...]  # in the order of the prompt


@dataclass(frozen=True)
class Counts:
    """Where every candidate of the step went.

    unused: usable, but beyond the ratio, or without a counterpart that balances its label.
    skipped: reason -> candidates that can't be used.
    """

    emitted: int
    unused: int
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class Limits:
    """What the model and the launch impose on items; by default nothing.

    control_tokens: the tokenizer's special tokens, broken up where a rollout spells one.
    multiple_of: emit a multiple of this many items, so that their rollouts divide over the processes.
    equal: tells which (prediction, gold) answers are the same to the verifier; None (unknown) counts as the same.
    fits: tells which (group, text) prompts are short enough for the model.
    at_most: so many items, instead of recycle_ratio for each group.
    """

    control_tokens: Sequence[str] = ()
    multiple_of: int = 1
    equal: Callable[[list[tuple[str, str]]], list[bool | None]] = verify_many
    fits: Callable[[list[tuple[Group, str]]], list[bool]] = lambda shown: [True] * len(shown)
    at_most: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# From groups to items


def recycle(
    groups: Sequence[Group], step: int, config: RecycleConfig, limits: Limits | None = None
) -> tuple[tuple[Item, ...], Counts]:
    """Rewrite one step's scored groups into judge and reflection prompts (paper, section 3.2).

    Args:
        groups: this step's questions, in the same order on every process.
        step: seeds the choices together with `config.recycle_seed`.

    Returns:
        At most `recycle_ratio * len(groups)` items, half judge and half reflection where both can fill their half,
        and the counts of what became of every candidate.
    """
    config.check_recycling()
    limits = limits or Limits()
    rng = random.Random(f"{config.recycle_seed}/{step}")
    skipped: Counter[str] = Counter()

    candidates = _candidates(groups, config, limits.control_tokens, rng, skipped)
    candidates = _drop_equal_answers(candidates, limits.equal, skipped)
    candidates = _drop_overlong(candidates, limits.fits, skipped)
    capacity = _capacity(groups, config) if limits.at_most is None else limits.at_most
    quotas = _quotas(candidates, capacity, limits.multiple_of, config)
    chosen = _select(candidates, quotas, config, rng)

    used = len({(task, group.key) for task, group, _ in chosen})
    counts = Counts(len(chosen), len(candidates) - used, {reason: n for reason, n in sorted(skipped.items()) if n})
    return _word(chosen, config.prompt_suffix, rng), counts


def _capacity(groups, config) -> int:
    """Items of this step, at most."""
    counted = [g for g in groups if len({r.correct for r in g.rollouts}) == 1] if config.recycle_adaptive else groups
    return int(config.recycle_ratio * len(counted) + 1e-9)


def _candidates(groups, config, control_tokens, rng, skipped) -> list[Candidate]:
    """At most one judge and one reflection candidate per question, with the rollouts each would show."""
    forms: tuple[Form, ...] = ("answer", "cot") if config.recycle_source == "both" else (config.recycle_source,)
    candidates = []
    seen = set()
    for group in groups:
        right = [r for r in group.rollouts if r.correct is True]
        wrong = [r for r in group.rollouts if r.correct is False]
        if not right and not wrong:
            skipped["unscorable"] += 1
            continue
        if group.key in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(group.key)

        task = _judge_task(bool(right and wrong), config, rng)
        # The form is drawn before anything is known of the sides: it must not give the label away.
        order = rng.sample(forms, len(forms))
        sides = _both_sides(right, wrong, order, control_tokens, rng)
        if task is not None and any(sides):
            candidates.append(Candidate(task, group, *sides))
        elif task is not None:
            skipped["unboxed"] += 1

        if wrong and "reflection" in config.recycle_tasks:
            order = rng.sample(forms, len(forms))
            share = config.recycle_right_reflections
            of_right = share and right and rng.random() < share
            shown = _show(right if of_right else wrong, order, control_tokens, rng)
            if shown:
                side = "right" if of_right else "wrong"
                candidates.append(Candidate("reflection", group, **{side: shown}))
            else:
                skipped["unboxed"] += 1
    return candidates


def _judge_task(mixed: bool, config, rng) -> Task | None:
    """Pairwise with probability `recycle_pairwise_prob` for a mixed group, else pointwise."""
    pointwise = "pointwise" in config.recycle_tasks
    if mixed and "pairwise" in config.recycle_tasks:
        return "pairwise" if not pointwise or rng.random() < config.recycle_pairwise_prob else "pointwise"
    return "pointwise" if pointwise else None


def _both_sides(right, wrong, forms, control_tokens, rng) -> tuple[Response | None, Response | None]:
    """A right and a wrong rollout in one form, the first of `forms` that both have; of a pure group, its one side."""
    sides: tuple[Response | None, Response | None] = (None, None)
    for form in forms:
        sides = _show(right, (form,), control_tokens, rng), _show(wrong, (form,), control_tokens, rng)
        if bool(sides[0]) == bool(right) and bool(sides[1]) == bool(wrong):
            return sides
    return sides if not (right and wrong) else (None, None)


def _show(rollouts, forms, control_tokens, rng) -> Response | None:
    """A random rollout in the first of `forms` that any has; unboxed ones have no answer form."""
    for form in forms:
        for rollout in rng.sample(rollouts, len(rollouts)):
            text = rollout.answer if form == "answer" else rollout.text
            if text is not None and text.strip():
                return Response(neutralise(text.strip(), control_tokens), form, rollout.answer, rollout.correct)
    return None


def _drop_equal_answers(candidates, equal, skipped) -> list[Candidate]:
    """Two rollouts whose answers are the same to the verifier can't be right and wrong. One batched call for all."""
    comparable = [c.right and c.wrong and None not in (c.right.answer, c.wrong.answer) for c in candidates]
    pairs = [(c.wrong.answer, c.right.answer) for c, both in zip(candidates, comparable, strict=True) if both]
    verdicts = iter(equal(pairs) if pairs else [])
    kept = [c for c, both in zip(candidates, comparable, strict=True) if not both or next(verdicts) is False]
    skipped["equal_pair"] += len(candidates) - len(kept)
    return kept


def _drop_overlong(candidates, fits, skipped) -> list[Candidate]:
    """A prompt too long for the model is left out whole, never cut. One batched call for all."""
    texts = [[side.text for side in (c.right, c.wrong) if side] for c in candidates]
    texts = [["\n".join(t)] if c.task == "pairwise" else t for c, t in zip(candidates, texts, strict=True)]
    verdicts = iter(fits([(c.group, text) for c, prompts in zip(candidates, texts, strict=True) for text in prompts]))
    fitting = [[next(verdicts) for _ in prompts] for prompts in texts]
    kept = [c for c, fits_all in zip(candidates, map(all, fitting), strict=True) if fits_all]
    skipped["overlong"] += len(candidates) - len(kept)
    return kept


def _quotas(candidates, capacity: int, multiple_of: int, config: RecycleConfig) -> dict[Task, int]:
    """How many items of each task: half judge and half reflection, either filling what the other can't."""
    n = Counter(c.task for c in candidates)
    points = [(bool(c.right), bool(c.wrong)) for c in candidates if c.task == "pointwise"]
    mixed = points.count((True, True))
    balanced = 2 * (mixed + min(points.count((True, False)), points.count((False, True))))
    most, usable, unit = len(points), len(points), 1
    if config.recycle_balance and config.recycle_matched:
        # Pure groups count towards the pointwise share, as in the paper, but mixed groups take their places.
        most, usable, unit = balanced, 2 * mixed, 2
    elif config.recycle_balance:
        most = usable = min(len(points), balanced)

    n_judge = min(most + n["pairwise"], capacity - min(n["reflection"], capacity // 2))
    share = unit * round(n_judge * most / max(most + n["pairwise"], 1) / unit)
    n_pairs = min(n["pairwise"], max(n_judge - min(share, usable), 0))  # share may be rounded up beyond n_judge
    n_points = min(usable, (n_judge - n_pairs) // unit * unit)
    quotas: dict[Task, int] = {"pointwise": n_points, "pairwise": n_pairs}
    quotas["reflection"] = min(n["reflection"], capacity - n_points - n_pairs)
    while sum(quotas.values()) % multiple_of:
        task = max(quotas, key=lambda t: (quotas[t] > 0, t != "pointwise", quotas[t]))
        quotas[task] -= unit if task == "pointwise" else 1
    return quotas


def _select(candidates, quotas, config, rng) -> list[tuple[Task, Group, tuple[Response, ...]]]:
    """The responses that each item will show; pointwise ones first, the right before the wrong."""

    def of(task: Task) -> list[Candidate]:
        return [c for c in candidates if c.task == task]

    right, wrong = _select_pointwise(of("pointwise"), quotas["pointwise"], config, rng)
    chosen = [("pointwise", c.group, (c.right,)) for c in right] + [("pointwise", c.group, (c.wrong,)) for c in wrong]
    chosen += [("pairwise", c.group, (c.right, c.wrong)) for c in of("pairwise")[: quotas["pairwise"]]]
    return chosen + [("reflection", c.group, (c.wrong or c.right,)) for c in of("reflection")[: quotas["reflection"]]]


def _select_pointwise(points, n: int, config, rng) -> tuple[list[Candidate], list[Candidate]]:
    """`n` pointwise items: the candidates that show their right rollout, and those that show their wrong one."""
    mixed = [c for c in points if c.right and c.wrong]
    if config.recycle_balance and config.recycle_matched:
        return mixed[: n // 2], mixed[: n // 2]
    if not config.recycle_balance:
        by_side = [(c, bool(c.right) and (not c.wrong or rng.random() < 0.5)) for c in points[:n]]
        return [c for c, shows_right in by_side if shows_right], [c for c, shows_right in by_side if not shows_right]
    only_right = [c for c in points if not c.wrong]
    only_wrong = [c for c in points if not c.right]
    n_right = n // 2
    if n % 2:  # the odd one falls on either side, where it can
        can_right, can_wrong = (len(only) + len(mixed) > n_right for only in (only_right, only_wrong))
        n_right += rng.random() < 0.5 if can_right and can_wrong else can_right
    free = iter(mixed)
    right = only_right[:n_right] + [next(free) for _ in range(n_right - len(only_right))]
    n_wrong = n - n_right
    return right, only_wrong[:n_wrong] + [next(free) for _ in range(n_wrong - len(only_wrong))]


def _word(chosen, suffix: str, rng) -> tuple[Item, ...]:
    """Give each item its wording, its order and its label, each balanced to within one."""
    n_of: Counter[Task] = Counter()
    by_letter, letter, position = rng.randrange(2), rng.randrange(2), rng.randrange(2)
    items = []
    for task, group, responses in chosen:
        i = n_of[task]
        n_of[task] += 1
        label = None
        if task == "pairwise":
            label = "AB"[(i + position) % 2]
            responses = responses if label == "A" else responses[::-1]
            instruction = pairwise_instruction(responses[0].text, responses[1].text, rng.randrange(len(PAIRWISE)))
        elif task == "reflection":
            form = responses[0].form
            templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
            template = rng.randrange(len(templates))
            if responses[0].correct:
                template |= 1  # every other template says that the attempt is wrong
            instruction = reflection_instruction(responses[0].text, form, template)
        elif (i + by_letter) % 2:  # right responses come first, so alternating balances within each label
            label = "AB"[(i // 2 + letter) % 2]
            right_letter = label if responses[0].correct else "BA"["AB".index(label)]
            instruction = pointwise_instruction(responses[0].text, rng.randrange(len(POINTWISE_A_B)), right_letter)
        else:
            label = "Yes" if responses[0].correct else "No"
            instruction = pointwise_instruction(responses[0].text, rng.randrange(len(POINTWISE_YES_NO)))
        items.append(Item(task, ask(group.prompt, instruction, suffix), label, group, responses))
    return tuple(items)


# ---------------------------------------------------------------------------------------------------------------------
# What gives a label away


def question_only(items: Iterable[Item]) -> float | None:
    """Accuracy on the pointwise items of a judge that never reads the response: it says correct where the question's
    pass rate is at least some threshold, the best one for these items. 0.5 is no leak; None without pointwise items."""
    points = sorted(((i.group.pass_rate, i.responses[0].correct) for i in items if i.task == "pointwise"), reverse=True)
    if not points:
        return None
    hits = best = sum(not correct for _, correct in points)  # a threshold above all: "incorrect" throughout
    for i, (rate, correct) in enumerate(points):
        hits += 1 if correct else -1
        if i + 1 == len(points) or points[i + 1][0] != rate:  # a threshold can't fall between equal pass rates
            best = max(best, hits)
    return best / len(points)
