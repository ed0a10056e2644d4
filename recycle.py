"""Recycling: one step's scored rollouts in, judge and reflection prompts out (SPARK, arXiv 2509.22624, section 3).

A group is one question with its G rollouts, each already scored by the verifier:

    all right              -> pointwise   "is this correct?"         label: it is
    all wrong              -> pointwise                              label: it is not
    some right, some wrong -> pairwise    "which one is correct?"    with probability recycle_pairwise_prob,
                              else pointwise on a right or a wrong one, whichever balances the labels
    at least one wrong     -> reflection  "solve it again"           label: the question's own gold

The current policy then answers each of these prompts G times, and 0/1 rewards against the labels train it by the same
GRPO update. No reward model, no teacher, no preference data.

Where this departs from the paper's released code:
1. Labels are balanced exactly in every step (right/wrong, Yes-No/A-B wording, A/B position). There, "Yes" takes over
   as the policy gets better. What balance leaves over waits `recycle_max_age` steps, then expires, and is counted.
2. Items are rewritten from this step's rollouts, not from a cache one update old.
3. Every template asks for `\\boxed{}`, which is what the verifier reads.
4. What a rollout wrote is quoted, never obeyed: control tokens and closing quotes in it are broken up.

Everything here is a pure function of its arguments: no torch, no trainer, no files, no global random state. Try it:

    >>> rollouts = (Rollout("1+1=2 so \\\\boxed{2}", "2", True), Rollout("\\\\boxed{3}", "3", False))
    >>> items, counts = recycle([Group("q0", "What is 1+1?", rollouts)], step=0, config=RecycleConfig())
    >>> [item.task for item in items]
    ['pairwise', 'reflection']
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from verify import verify_many

Task = Literal["pointwise", "pairwise", "reflection"]
Form = Literal["answer", "cot"]
Prompt = str | list[dict[str, Any]]  # plain text, or chat messages

JUDGE_TASKS: tuple[Task, ...] = ("pointwise", "pairwise")
TASKS: tuple[Task, ...] = (*JUDGE_TASKS, "reflection")

# The released models were trained with this at the end of every question. It is an interface, not a style.
PROMPT_SUFFIX = (
    "\nPlease first conduct reasoning, and then answer the question. Repeat the final answer using a '\\boxed{}'."
)

# ---------------------------------------------------------------------------------------------------------------------
# Templates. The question comes first and the candidate after it, so that everything asked about one question shares
# its prefix (image included) in the engine's cache. {response}, {first} and {second} are quoted rollouts; {if_a} and
# {if_b} are "correct" and "incorrect" in either order, so that no letter is tied to a verdict.

TEMPLATE_TOKENS = 128  # room for any of them, without what it quotes

POINTWISE_YES_NO = (
    "Proposed solution:\n{response}\nIs it correct? Work it out, then put Yes or No in \\boxed{}.",
    "Somebody answered:\n{response}\nDid they get it right? Reason first and end with Yes or No in \\boxed{}.",
    "Check this attempt:\n{response}\nSolve the question yourself, compare, and write Yes or No in \\boxed{}.",
    "{response}\nIs the answer above right? Give your reasons, then Yes or No in \\boxed{}.",
    "Here is a student's work:\n{response}\nIs the final answer correct? Conclude with Yes or No in \\boxed{}.",
    "Attempt:\n{response}\nWould you accept this answer? Think first. Verdict, Yes or No, in \\boxed{}.",
    "Grade this:\n{response}\nDoes it reach the correct result? Finish with \\boxed{} holding Yes or No.",
    "One answer was:\n{response}\nDoes it agree with your own result? Show your work and put Yes or No in \\boxed{}.",
    "Candidate:\n{response}\nVerify it step by step. Is it correct? Reply Yes or No inside \\boxed{}.",
    "A model replied:\n{response}\nCan this reply be trusted? Recompute it, then box Yes or No with \\boxed{}.",
    "Read this solution:\n{response}\nIs the result true? Explain shortly and put Yes or No in \\boxed{}.",
    "Given answer:\n{response}\nJudge whether it is correct. The last line must hold Yes or No in \\boxed{}.",
    "{response}\nThis may be right or wrong. Which is it? Yes if right, No if wrong, in \\boxed{}.",
)

POINTWISE_A_B = (
    "Proposed solution:\n{response}\nA: {if_a}. B: {if_b}. Work it out, then put the letter in \\boxed{}.",
    "Somebody answered:\n{response}\nA: {if_a}. B: {if_b}. Reason first and end with A or B in \\boxed{}.",
    "Check this attempt:\n{response}\nA: {if_a}. B: {if_b}. Solve it yourself, compare, and box a letter: \\boxed{}.",
    "{response}\nThe answer above is A: {if_a}. B: {if_b}. Give your reasons, then one letter in \\boxed{}.",
    "Here is a student's work:\n{response}\nA: {if_a}. B: {if_b}. Conclude with the fitting letter in \\boxed{}.",
    "Attempt:\n{response}\nChoose A: {if_a}. B: {if_b}. Think first. Your letter goes in \\boxed{}.",
    "Grade this:\n{response}\nA: {if_a}. B: {if_b}. Finish with \\boxed{} holding one letter.",
    "One answer was:\n{response}\nIt is A: {if_a}. B: {if_b}. Show your work and put A or B in \\boxed{}.",
    "Candidate:\n{response}\nVerify it step by step. A: {if_a}. B: {if_b}. Reply with the letter inside \\boxed{}.",
    "A model replied:\n{response}\nRecompute it, then decide. A: {if_a}. B: {if_b}. Box the letter with \\boxed{}.",
    "Read this solution:\n{response}\nA: {if_a}. B: {if_b}. Explain shortly and put the letter in \\boxed{}.",
    "Given answer:\n{response}\nJudge it. A: {if_a}. B: {if_b}. The last line must hold the letter in \\boxed{}.",
    "{response}\nWhich label fits? A: {if_a}. B: {if_b}. Answer with A or B in \\boxed{}.",
)

PAIRWISE = (
    "Two solutions:\n{first}\n{second}\nWhich one is correct? Work it out, then put A or B in \\boxed{}.",
    "{first}\n{second}\nOnly one of these is right. Solve the question and put its letter in \\boxed{}.",
    "Compare two attempts:\n{first}\n{second}\nWhich answer do you trust? End with A or B in \\boxed{}.",
    "Two students answered:\n{first}\n{second}\nWho is right, A or B? Reason first, then \\boxed{}.",
    "Candidates:\n{first}\n{second}\nCheck both, then name the correct one with A or B in \\boxed{}.",
    "Here are two answers:\n{first}\n{second}\nPick the correct one. Conclude with A or B in \\boxed{}.",
    "{first}\n{second}\nOne is wrong. Find the other one and write its letter in \\boxed{}.",
    "Look at both replies:\n{first}\n{second}\nWhich reply holds the true result? Put A or B in \\boxed{}.",
    "Decide between:\n{first}\n{second}\nSolve it yourself and see which agrees. Letter in \\boxed{}.",
    "Attempt A and attempt B:\n{first}\n{second}\nWhich attempt is right? Box the letter: \\boxed{}.",
    "A model answered twice:\n{first}\n{second}\nWhich time was it correct, A or B? Verdict in \\boxed{}.",
    "Grade the pair:\n{first}\n{second}\nGive your reasons, then the better one's letter in \\boxed{}.",
    "{first}\n{second}\nThese disagree. Who is correct? Show your work and put A or B in \\boxed{}.",
    "Read both solutions:\n{first}\n{second}\nExplain shortly which is true, then A or B in \\boxed{}.",
    "Which of these would you hand in?\n{first}\n{second}\nThink first. A or B goes in \\boxed{}.",
    "Verify each:\n{first}\n{second}\nThe last line must hold the correct one's letter in \\boxed{}.",
    "Two results were proposed:\n{first}\n{second}\nRecompute, then choose A or B in \\boxed{}.",
    "Settle this:\n{first}\n{second}\nFinish with \\boxed{} holding the letter of the right answer.",
    "Somebody wrote A and somebody wrote B:\n{first}\n{second}\nWhose answer holds? Reply A or B in \\boxed{}.",
    "Examine:\n{first}\n{second}\nOne matches the question, one does not. Put the matching letter in \\boxed{}.",
    "{first}\n{second}\nJudge step by step which is correct. Answer with A or B inside \\boxed{}.",
)

# Half of these say that the attempt is wrong, which is known in training; half ask to check, which is all that is
# known at test time, when only the model's own verdict speaks against it.
REFLECT_ON_COT = (
    "An earlier attempt:\n{response}\nIt is wrong. Find the mistake, solve again and box the answer with \\boxed{}.",
    "An earlier attempt:\n{response}\nCheck each step and give the answer you believe in \\boxed{}.",
    "You wrote:\n{response}\nThat was not right. Start over and put the new answer in \\boxed{}.",
    "You wrote:\n{response}\nLook again, step by step. Put your final answer in \\boxed{}.",
    "This reasoning failed:\n{response}\nSay where, then solve it correctly. Answer in \\boxed{}.",
    "This reasoning may have a slip:\n{response}\nVerify it and write the right answer in \\boxed{}.",
    "Rejected solution:\n{response}\nDo it again with more care and end with \\boxed{}.",
    "Draft solution:\n{response}\nReview it, mend it if needed, and end with the answer in \\boxed{}.",
    "{response}\nThe result above is incorrect. Work it out anew. Final answer in \\boxed{}.",
    "{response}\nThe result above is doubtful. Work it out yourself. Final answer in \\boxed{}.",
    "A student's wrong work:\n{response}\nCorrect it and put the answer in \\boxed{}.",
    "A student's work:\n{response}\nGo through it, then give the correct answer in \\boxed{}.",
    "The grader marked this as wrong:\n{response}\nTry again. Box the answer with \\boxed{}.",
    "A reader asked you to check this:\n{response}\nSolve the question once more and box the answer with \\boxed{}.",
    "There is an error in:\n{response}\nAvoid it this time and answer in \\boxed{}.",
    "There may be an error in:\n{response}\nRecompute everything and answer in \\boxed{}.",
    "First try, wrong:\n{response}\nSecond try: reason first, then \\boxed{}.",
    "First try:\n{response}\nSecond try, without trusting the first: reason first, then \\boxed{}.",
    "Learn from this failed solution:\n{response}\nThen solve the question and put the result in \\boxed{}.",
    "Reflect on this solution:\n{response}\nThen solve the question and put the result in \\boxed{}.",
)

REFLECT_ON_ANSWER = (
    "An earlier answer:\n{response}\nIt is wrong. Solve the question again and box the answer with \\boxed{}.",
    "An earlier answer:\n{response}\nCheck it and give the answer you believe in \\boxed{}.",
    "You answered:\n{response}\nThat was not right. Start over and put the new answer in \\boxed{}.",
    "You answered:\n{response}\nLook again, step by step. Put your final answer in \\boxed{}.",
    "This answer failed:\n{response}\nSolve it correctly this time. Answer in \\boxed{}.",
    "This answer may be a slip:\n{response}\nVerify it and write the right answer in \\boxed{}.",
    "Rejected answer:\n{response}\nDo it again with more care and end with \\boxed{}.",
    "Draft answer:\n{response}\nReview it, mend it if needed, and end with the answer in \\boxed{}.",
    "{response}\nThe answer above is incorrect. Work it out anew. Final answer in \\boxed{}.",
    "{response}\nThe answer above is doubtful. Work it out yourself. Final answer in \\boxed{}.",
    "A student's wrong answer:\n{response}\nFind the correct one and put it in \\boxed{}.",
    "A student's answer:\n{response}\nTest it, then give the correct answer in \\boxed{}.",
    "The grader marked this answer as wrong:\n{response}\nTry again. Box the answer with \\boxed{}.",
    "A reader asked you to check this answer:\n{response}\nSolve it once more and box the answer with \\boxed{}.",
    "The answer is not this one:\n{response}\nReason first and put the right one in \\boxed{}.",
    "The answer may not be this one:\n{response}\nRecompute everything and answer in \\boxed{}.",
    "First try, wrong:\n{response}\nSecond try: reason first, then \\boxed{}.",
    "First try:\n{response}\nSecond try, without trusting the first: reason first, then \\boxed{}.",
    "Set this wrong result aside:\n{response}\nSolve the question and put your result in \\boxed{}.",
    "Think twice about this result:\n{response}\nSolve the question and put your result in \\boxed{}.",
)


# ---------------------------------------------------------------------------------------------------------------------
# Records


@dataclass
class RecycleConfig:
    """What recycling can be told. SparkConfig inherits these fields, so either may be passed to `recycle`."""

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
    recycle_pairwise_prob: float = field(
        default=0.7,
        metadata={"help": "Probability that a mixed group gives a pairwise rather than a pointwise item."},
    )
    recycle_balance: bool = field(
        default=True,
        metadata={"help": "Emit as many right as wrong candidates, so that no verdict pays by itself."},
    )
    recycle_max_age: int = field(
        default=1,
        metadata={"help": "Steps a surplus item may wait for its counterpart before it expires."},
    )
    recycle_seed: int = field(
        default=0,
        metadata={"help": "Seed of the choices made in recycling; the step is added to it."},
    )

    def check_recycling(self) -> None:
        """Raise ValueError, naming the field and what it expects, if a setting can't be used."""
        if not self.recycle_ratio >= 0:
            raise ValueError(f"recycle_ratio: expected a number >= 0, got {self.recycle_ratio}")
        if not 0 <= self.recycle_pairwise_prob <= 1:
            raise ValueError(f"recycle_pairwise_prob: expected 0 to 1, got {self.recycle_pairwise_prob}")
        if self.recycle_max_age < 0:
            raise ValueError(f"recycle_max_age: expected 0 or more steps, got {self.recycle_max_age}")
        if self.recycle_source not in ("both", "answer", "cot"):
            raise ValueError(f"recycle_source: expected both, answer or cot, got {self.recycle_source!r}")
        unknown = set(self.recycle_tasks) - set(TASKS)
        if unknown or not self.recycle_tasks:
            raise ValueError(f"recycle_tasks: expected some of {', '.join(TASKS)}, got {self.recycle_tasks}")


@dataclass(frozen=True)
class Rollout:
    """One scored completion: `answer` is what it boxed (None: nothing), `correct` is None where it can't be scored."""

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


@dataclass(frozen=True)
class Shown:
    """A rollout as a judge will see it (`text`, in `form`), what it boxed, and whether that was right."""

    text: str
    form: Form
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Candidate:
    """A group's chance of one item: which rollouts it would show. `born` is the step of its rollouts."""

    task: Task
    group: Group
    born: int
    right: Shown | None = None
    wrong: Shown | None = None


@dataclass(frozen=True)
class Item:
    """One recycled prompt. `label` is the verdict that earns the reward (None for reflection: there it is the gold)."""

    task: Task
    prompt: Prompt
    label: str | None
    group: Group
    born: int
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Counts:
    """Where every candidate of the step went. `surplus` is to be given back as the next step's `waiting`."""

    emitted: int
    waiting: int
    expired: int
    skipped: Mapping[str, int]  # reason -> candidates
    surplus: tuple[Candidate, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def strip_suffix(question: str, suffix: str = PROMPT_SUFFIX) -> str:
    """The question without the policy's instruction on how to answer, which is not the judge's."""
    return question.removesuffix(suffix).rstrip() if suffix else question.rstrip()


# What common chat templates use for control. The trainer adds the tokens of its own tokenizer.
_CONTROL = re.compile(
    r"<(?=[|｜])|<(?=/?(?:s|bos|eos|pad|unk|image|img|video|audio|end_of_utterance|fake_token_around_image|row_\d+_col_\d+"
    r"|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|start_header_id|end_header_id|eot_id)>)"
    r"|<(?=/?SYS>|<SYS|</SYS|IMG_CONTEXT)|\[(?=/?INST\])|\[(?=/?(?:IMG|IMG_BREAK|IMG_END|SYSTEM_PROMPT)\])",
    re.IGNORECASE,
)
_QUOTE = re.compile(r"<(?=\s*/?\s*response)", re.IGNORECASE)


def neutralise(text: str, control_tokens: Iterable[str] = ()) -> str:
    """Break up, with a space, whatever in a rollout would act as a control token or close its quote.

    Only inserts, so nothing new can be formed by what is left, and a reader still sees what the rollout wrote.
    """
    for token in control_tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    text = _CONTROL.sub(lambda match: match[0] + " ", text)
    return _QUOTE.sub("< ", text)


def quote(shown: str, letter: str = "") -> str:
    """A rollout between marks that it can't close itself (see `neutralise`); `letter` is "" or the side of a pair."""
    name = f"response_{letter.lower()}" if letter else "response"
    return f"<{name}>\n{shown.strip()}\n</{name}>"


_SLOT = re.compile(r"\{(response|first|second|if_a|if_b)\}")


def fill(template: str, **slots: str) -> str:
    """Fill a template in one pass, so that braces or slot names inside a rollout stay text."""
    return _SLOT.sub(lambda match: slots[match[1]], template)


def ask(prompt: Prompt, instruction: str, suffix: str = PROMPT_SUFFIX) -> Prompt:
    """The policy's prompt with `instruction` after the question, instead of the suffix.

    System prompt, earlier turns and images stay as they are; only the last text of the last user turn changes.
    Raises ValueError if there is no user turn with text.
    """
    if isinstance(prompt, str):
        return f"{strip_suffix(prompt, suffix)}\n\n{instruction}"
    for turn in range(len(prompt) - 1, -1, -1):
        message = prompt[turn]
        if message["role"] != "user":
            continue
        content = message["content"]
        if isinstance(content, str):
            asked = f"{strip_suffix(content, suffix)}\n\n{instruction}"
        else:
            last = max((i for i, part in enumerate(content) if part["type"] == "text"), default=None)
            if last is None:
                break
            text = f"{strip_suffix(content[last]['text'], suffix)}\n\n{instruction}"
            asked = [*content[:last], {**content[last], "text": text}, *content[last + 1 :]]
        return [*prompt[:turn], {**message, "content": asked}, *prompt[turn + 1 :]]
    raise ValueError(f"prompt: expected a user message with text, got roles {[m['role'] for m in prompt]}")


def pointwise_instruction(response: str, template: int = 0, right_letter: str | None = None) -> str:
    """Ask whether `response` is correct: Yes or No, or by letter, `right_letter` ("A" or "B") standing for correct."""
    if right_letter is None:
        return fill(POINTWISE_YES_NO[template], response=quote(response))
    words = ("correct", "incorrect") if right_letter == "A" else ("incorrect", "correct")
    return fill(POINTWISE_A_B[template], response=quote(response), if_a=words[0], if_b=words[1])


def pairwise_instruction(first: str, second: str, template: int = 0) -> str:
    """Ask which of two responses is correct, A (`first`) or B (`second`)."""
    return fill(PAIRWISE[template], first=quote(first, "A"), second=quote(second, "B"))


def reflection_instruction(response: str, form: Form, template: int = 0) -> str:
    """Ask to solve the question again after `response`, shown as `form`."""
    templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
    return fill(templates[template], response=quote(response))


def instructions() -> list[str]:
    """Every instruction there is, with nothing shown: what the wording of a prompt costs in tokens."""
    return [
        *(pointwise_instruction("", i) for i in range(len(POINTWISE_YES_NO))),
        *(pointwise_instruction("", i, "A") for i in range(len(POINTWISE_A_B))),
        *(pairwise_instruction("", "", i) for i in range(len(PAIRWISE))),
        *(reflection_instruction("", "cot", i) for i in range(len(REFLECT_ON_COT))),
        *(reflection_instruction("", "answer", i) for i in range(len(REFLECT_ON_ANSWER))),
    ]


def to_json(candidate: Candidate) -> dict[str, Any]:
    """A waiting candidate as plain data for a checkpoint, without its group's row (whose types are the dataset's)."""
    return asdict(replace(candidate, group=replace(candidate.group, row={})))


def from_json(found: Mapping[str, Any], row: Mapping[str, Any]) -> Candidate:
    """The candidate of `to_json`, with its row again."""
    group = found["group"]
    rollouts = tuple(Rollout(**rollout) for rollout in group["rollouts"])
    sides = {side: Shown(**found[side]) if found[side] else None for side in ("right", "wrong")}
    return Candidate(found["task"], Group(group["key"], group["prompt"], rollouts, row), found["born"], **sides)


# ---------------------------------------------------------------------------------------------------------------------
# From groups to items


def recycle(
    groups: Sequence[Group],
    step: int,
    config: RecycleConfig,
    waiting: Sequence[Candidate] = (),
    *,
    suffix: str = PROMPT_SUFFIX,
    control_tokens: Sequence[str] = (),
    multiple_of: int = 1,
    equal: Callable[[list[tuple[str, str]]], list[bool | None]] = verify_many,
    fits: Callable[[list[tuple[Group, str]]], list[bool]] = lambda shown: [True] * len(shown),
) -> tuple[tuple[Item, ...], Counts]:
    """Rewrite one step's scored groups into judge and reflection prompts (paper, section 3.2).

    Args:
        groups: this step's questions, in the same order on every process.
        step: seeds the choices together with `config.recycle_seed`; also the clock of `recycle_max_age`.
        waiting: the last step's `counts.surplus`.
        suffix: what the policy prompts end with and the judge's must not.
        control_tokens: the tokenizer's special tokens, to be broken up where a rollout spells one.
        multiple_of: emit a multiple of this many items, so that their rollouts divide over processes and micro-steps.
        equal: tells which pairs of answers are the same to the verifier; None (unknown) counts as the same.
        fits: tells of which groups a prompt that also shows this text is short enough for the model.

    Returns:
        At most `recycle_ratio * len(groups)` items, half judge and half reflection where both can fill their half,
        and the counts of what became of everything.
    """
    config.check_recycling()
    rng = random.Random(f"{config.recycle_seed}/{step}")
    skipped: Counter[str] = Counter()

    fresh = _candidates(groups, step, config, control_tokens, rng, skipped)
    fresh = _drop_overlong(_drop_equal_pairs(fresh, equal, skipped), fits, skipped)
    expired = [c for c in waiting if step - c.born > config.recycle_max_age]
    keys = {c.group.key for c in fresh}
    again = [c for c in waiting if step - c.born <= config.recycle_max_age and c.group.key in keys]
    skipped["duplicate"] += len(again)  # the question came back: its new rollouts replace the old ones
    still = [c for c in waiting if step - c.born <= config.recycle_max_age and c.group.key not in keys]

    # Fresh before waiting: a waiting item only fills a gap, so what is judged is on-policy wherever it can be.
    chosen, surplus = _choose(
        [*fresh, *still], int(config.recycle_ratio * len(groups) + 1e-9), multiple_of, config, rng
    )
    surplus = [c for c in surplus if step + 1 - c.born <= config.recycle_max_age]
    lost = len(fresh) + len(still) - len(chosen) - len(surplus)

    items = _word(chosen, config, suffix, rng)
    counts = Counts(
        emitted=len(items),
        waiting=len(surplus),
        expired=len(expired) + lost,
        skipped={reason: n for reason, n in sorted(skipped.items()) if n},
        surplus=tuple(surplus),
    )
    return items, counts


def _candidates(groups, step, config, control_tokens, rng, skipped) -> list[Candidate]:
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
        judge = _judge_candidate(group, right, wrong, step, config, forms, control_tokens, rng)
        can_judge = "pointwise" in config.recycle_tasks or ("pairwise" in config.recycle_tasks and right and wrong)
        if can_judge and judge is None:
            skipped["unboxed"] += 1
        reflection = None
        if wrong and "reflection" in config.recycle_tasks:
            judged = {judge.wrong.text} if judge and judge.task == "pointwise" and judge.wrong else set()
            order = rng.sample(forms, len(forms))
            shown = _show(wrong, order, control_tokens, rng, judged) or _show(wrong, order, control_tokens, rng)
            if shown is None:
                skipped["unboxed"] += 1
            elif shown.text in judged and judge.right and rng.random() < 0.5:
                judge = replace(judge, wrong=None)  # one wrong rollout for two: the judge takes a right one
            elif shown.text in judged:
                skipped["duplicate"] += 1
                shown = None
            reflection = Candidate("reflection", group, step, wrong=shown) if shown else None
        candidates += [c for c in (judge, reflection) if c]
    return candidates


def _judge_candidate(group, right, wrong, step, config, forms, control_tokens, rng) -> Candidate | None:
    """Pairwise with probability `recycle_pairwise_prob` for a mixed group, else pointwise with the sides there are."""
    # The form is drawn before anything is known of the sides: it must not give the label away.
    forms = rng.sample(forms, len(forms))
    mixed = right and wrong and "pairwise" in config.recycle_tasks
    if mixed and ("pointwise" not in config.recycle_tasks or rng.random() < config.recycle_pairwise_prob):
        for form in forms:  # both sides of a pair in one form
            shown_right = _show(right, (form,), control_tokens, rng)
            shown_wrong = _show(wrong, (form,), control_tokens, rng)
            if shown_right and shown_wrong:
                return Candidate("pairwise", group, step, shown_right, shown_wrong)
    if "pointwise" in config.recycle_tasks:
        shown_right = _show(right, forms, control_tokens, rng)
        shown_wrong = _show(wrong, forms, control_tokens, rng)
        if shown_right or shown_wrong:
            return Candidate("pointwise", group, step, shown_right, shown_wrong)
    return None


def _show(rollouts, forms, control_tokens, rng, taken=frozenset()) -> Shown | None:
    """A random rollout in the first of `forms` that has one not in `taken`; unboxed ones have no answer form."""
    for form in forms:
        for rollout in rng.sample(rollouts, len(rollouts)):
            text = rollout.answer if form == "answer" else rollout.text
            if text is None or not text.strip():
                continue
            text = neutralise(text.strip(), control_tokens)
            if text not in taken:
                return Shown(text, form, rollout.answer, rollout.correct)
    return None


def _drop_equal_pairs(candidates, equal, skipped) -> list[Candidate]:
    """A pair whose two answers are the same to the verifier has no correct side. One batched call for all pairs."""
    both_boxed = [
        c.task == "pairwise" and c.right.answer is not None and c.wrong.answer is not None for c in candidates
    ]
    pairs = [(c.wrong.answer, c.right.answer) for c, both in zip(candidates, both_boxed, strict=True) if both]
    verdicts = iter(equal(pairs) if pairs else [])
    kept = [c for c, both in zip(candidates, both_boxed, strict=True) if not both or next(verdicts) is False]
    skipped["equal_pair"] += len(candidates) - len(kept)
    return kept


def _drop_overlong(candidates, fits, skipped) -> list[Candidate]:
    """A prompt too long for the model is left out whole, never cut. One batched call for all."""
    shown = [(c.group, "\n".join(side.text for side in (c.right, c.wrong) if side)) for c in candidates]
    kept = [c for c, short in zip(candidates, fits(shown), strict=True) if short]
    skipped["overlong"] += len(candidates) - len(kept)
    return kept


def _choose(candidates, capacity, multiple_of, config, rng) -> tuple[list[Candidate], list[Candidate]]:
    """Which candidates become items, and the surplus. A chosen pointwise candidate has one side left."""
    pairs = [c for c in candidates if c.task == "pairwise"]
    points = [c for c in candidates if c.task == "pointwise"]
    reflections = [c for c in candidates if c.task == "reflection"]
    either = [c for c in points if c.right and c.wrong]
    only_right = [c for c in points if not c.wrong]
    only_wrong = [c for c in points if not c.right]

    # How many of each: half judge and half reflection, either filling what the other can't.
    most_points = len(points)
    if config.recycle_balance:
        most_points = min(most_points, 2 * (min(len(only_right), len(only_wrong)) + len(either)))
    most_judge = len(pairs) + most_points
    n_judge = min(most_judge, capacity - min(len(reflections), capacity // 2))
    n = {"reflection": min(len(reflections), capacity - n_judge)}
    n["pointwise"] = min(most_points, round(n_judge * most_points / max(most_judge, 1)))
    n["pairwise"] = min(len(pairs), n_judge - n["pointwise"])
    n["pointwise"] = n_judge - n["pairwise"]
    while sum(n.values()) % multiple_of:
        n[max(n, key=n.get)] -= 1

    if config.recycle_balance:
        n_right, n_wrong = n["pointwise"] // 2, n["pointwise"] // 2
        if n["pointwise"] % 2:  # the odd one falls on either side, where it can
            odd_right = len(only_right) + len(either) > n_right
            odd_wrong = len(only_wrong) + len(either) > n_wrong
            to_right = rng.random() < 0.5 if odd_right and odd_wrong else odd_right
            n_right, n_wrong = n_right + to_right, n_wrong + (not to_right)
        free = iter(either)
        right = only_right[:n_right] + [next(free) for _ in range(n_right - len(only_right))]
        wrong = only_wrong[:n_wrong] + [next(free) for _ in range(n_wrong - len(only_wrong))]
    else:
        coins = {id(c): rng.random() < 0.5 for c in either}
        drawn = points[: n["pointwise"]]
        right = [c for c in drawn if not c.wrong or coins.get(id(c), False)]
        wrong = [c for c in drawn if not c.right or not coins.get(id(c), True)]

    reflected = reflections[: n["reflection"]]
    taken = {id(c) for c in (*right, *wrong, *pairs[: n["pairwise"]], *reflected)}
    surplus = [c for c in candidates if id(c) not in taken]
    chosen = [replace(c, wrong=None) for c in right] + [replace(c, right=None) for c in wrong]
    return [*chosen, *pairs[: n["pairwise"]], *reflected], surplus


def _word(chosen, config, suffix, rng) -> tuple[Item, ...]:
    """Give each chosen candidate its wording, its order and its label, each balanced to within one."""
    points = [c for c in chosen if c.task == "pointwise"]  # right ones first: alternating balances within each label
    pairs = [c for c in chosen if c.task == "pairwise"]
    reflections = [c for c in chosen if c.task == "reflection"]

    items = []
    by_letter = rng.randrange(2)
    letter = rng.randrange(2)
    for i, candidate in enumerate(points):
        shown = candidate.right or candidate.wrong
        if (i + by_letter) % 2:
            label = "AB"[(i // 2 + letter) % 2]
            right_letter = label if shown.correct else "BA"["AB".index(label)]
            template = rng.randrange(len(POINTWISE_A_B))
        else:
            label = "Yes" if shown.correct else "No"
            right_letter = None
            template = rng.randrange(len(POINTWISE_YES_NO))
        instruction = pointwise_instruction(shown.text, template, right_letter)
        items.append((candidate, instruction, label, (shown,)))

    position = rng.randrange(2)
    for i, candidate in enumerate(pairs):
        label = "AB"[(i + position) % 2]
        shown = (candidate.right, candidate.wrong) if label == "A" else (candidate.wrong, candidate.right)
        instruction = pairwise_instruction(shown[0].text, shown[1].text, rng.randrange(len(PAIRWISE)))
        items.append((candidate, instruction, label, shown))

    for candidate in reflections:
        form = candidate.wrong.form
        templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
        instruction = reflection_instruction(candidate.wrong.text, form, rng.randrange(len(templates)))
        items.append((candidate, instruction, None, (candidate.wrong,)))

    return tuple(
        Item(c.task, ask(c.group.prompt, instruction, suffix), label, c.group, c.born, shown)
        for c, instruction, label, shown in items
    )
