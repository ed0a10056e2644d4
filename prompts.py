"""The text of judge and reflection prompts: templates, and safe quoting of rollouts.

A recycled prompt is the policy's prompt (system prompt, earlier turns and images unchanged) in which the suffix of the
last question is replaced by an instruction:

    What is 1+1?

    Proposed solution:
    <response>
    1+1=3 so \\boxed{3}
    </response>
    Is it correct? Work it out, then put Yes or No in \\boxed{}.

The question comes first, so that all prompts about one question share its prefix (image included) in the engine's
cache. A rollout can't pass for an instruction or end its own quote: `neutralise` breaks up control tokens and closing
tags in it. Every template asks for `\\boxed{}`, which is what the verifier reads (the released templates ask for
`\\box{}`, which it does not).

Pure functions and constants: no torch, no model.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

Form = Literal["answer", "cot"]
Prompt = str | list[dict[str, Any]]  # plain text, or chat messages

# The released models were trained and are asked with this text at the end of every question (their card). The code that
# trained them looks for another spelling.
PROMPT_SUFFIX = (
    "\nPlease first conduct reasoning, and then answer the question. Repeat the final answer using a '\\boxed{}'."
)
_TRAINING_SUFFIX = PROMPT_SUFFIX.strip().replace("'.", ".'")

BOX = "\\boxed{}"  # where answers and verdicts go

# ---------------------------------------------------------------------------------------------------------------------
# Templates. {response}, {first} and {second} are quoted rollouts; {if_a} and {if_b} are "correct" and "incorrect" in
# either order, so that no letter stands for one verdict. In whatever language: the verdicts that verify.parse_verdict
# reads are Yes, No, A and B.

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

# The even ones (0, 2, ...) say that the attempt is wrong, which is known in training. The odd ones only ask to check
# it: at test time there is only the model's own verdict.
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

TEMPLATES = (*POINTWISE_YES_NO, *POINTWISE_A_B, *PAIRWISE, *REFLECT_ON_COT, *REFLECT_ON_ANSWER)
TEMPLATE_TOKENS = 512  # of any of them, and more of your own: what room is left for before there is a tokenizer


def strip_suffix(question: str, suffix: str = PROMPT_SUFFIX) -> str:
    """The question without the instruction on how to answer, which is meant for the policy alone, however often it is
    there; the default's also as the release's training code spells it."""
    endings = [suffix.strip()] * bool(suffix.strip()) + [_TRAINING_SUFFIX] * (suffix == PROMPT_SUFFIX)
    question = question.rstrip()
    while ending := next((ending for ending in endings if question.endswith(ending)), None):
        question = question.removesuffix(ending).rstrip()
    return question


# Control tokens of common chat templates. The trainer adds those of its tokenizer.
_CONTROL = re.compile(
    r"<(?=[|｜])|<(?=/?(?:s|bos|eos|pad|unk|think|tool_call|tool_response|image|img|video|audio|end_of_utterance"
    r"|fake_token_around_image|row_\d+_col_\d+|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token"
    r"|start_header_id|end_header_id|eot_id)>)"
    r"|<(?=/?SYS>|<SYS|</SYS|IMG_CONTEXT)|\[(?=/?INST\])|\[(?=/?(?:IMG|IMG_BREAK|IMG_END|SYSTEM_PROMPT)\])",
    re.IGNORECASE,
)
_QUOTE = re.compile(r"<(?=\s*/?\s*response)", re.IGNORECASE)


def neutralise(text: str, control_tokens: Iterable[str] = ()) -> str:
    """Insert a space into everything in a rollout that would act as a control token or close its quote.

    Nothing is removed: removing could join what is left into a new token, and hides what the rollout wrote.
    """
    for token in control_tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    text = _CONTROL.sub(lambda match: match[0] + " ", text)
    return _QUOTE.sub("< ", text)


def quote(response: str, letter: str = "") -> str:
    """A rollout between tags that it can't close itself (see `neutralise`); `letter` is its side of a pair, or ""."""
    name = f"response_{letter.lower()}" if letter else "response"
    return f"<{name}>\n{response.strip()}\n</{name}>"


_SLOT = re.compile(r"\{(response|first|second|if_a|if_b)\}")


def fill(template: str, **slots: str) -> str:
    """Fill a template in one pass, so that "{response}" inside a rollout stays text."""
    return _SLOT.sub(lambda match: slots[match[1]], template)


def ask(prompt: Prompt, instruction: str, suffix: str = PROMPT_SUFFIX) -> Prompt:
    """The policy's prompt with `instruction` in place of the suffix.

    System prompt, earlier turns and images stay as they are; the instruction is what the last user turn ends with.
    Raises ValueError if there is no user turn with text.
    """

    def instead(question: str) -> str:
        return f"{strip_suffix(question, suffix)}\n\n{instruction}"

    if isinstance(prompt, str):
        return instead(prompt)
    turn = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    content = prompt[turn]["content"] if turn is not None else []
    if isinstance(content, str):
        content = instead(content)
    else:
        last = max((i for i, part in enumerate(content) if part["type"] == "text"), default=None)
        if last is None:
            raise ValueError(f"prompt: expected a user message with text, got roles {[m['role'] for m in prompt]}")
        part, images = content[last], content[last + 1 :]
        text = strip_suffix(part["text"], suffix) if images else instead(part["text"])
        after = [{"type": "text", "text": f"\n\n{instruction}"}] if images else []
        content = [*content[:last], {**part, "text": text}, *images, *after]
    return [*prompt[:turn], {**prompt[turn], "content": content}, *prompt[turn + 1 :]]


def pointwise_instruction(response: str, template: int = 0, right_letter: str | None = None) -> str:
    """Ask whether `response` is correct: Yes or No, or A or B, where `right_letter` is the one for correct."""
    if right_letter is None:
        return fill(POINTWISE_YES_NO[template], response=quote(response))
    words = ("correct", "incorrect") if right_letter == "A" else ("incorrect", "correct")
    return fill(POINTWISE_A_B[template], response=quote(response), if_a=words[0], if_b=words[1])


def pairwise_instruction(first: str, second: str, template: int = 0) -> str:
    """Ask which of two responses is correct, A (`first`) or B (`second`)."""
    return fill(PAIRWISE[template], first=quote(first, "A"), second=quote(second, "B"))


def reflection_instruction(response: str, form: Form, template: int = 0, mark: str = BOX) -> str:
    """Ask to solve the question again, given an earlier response in the form `form`; the answer goes into `mark`."""
    templates = REFLECT_ON_COT if form == "cot" else REFLECT_ON_ANSWER
    return fill(templates[template].replace(BOX, mark), response=quote(response))


def instructions(mark: str = BOX) -> list[str]:
    """Every instruction with empty responses, to count the tokens of its wording."""
    slots = {"response": quote(""), "first": quote("", "A"), "second": quote("", "B")}
    return [fill(template.replace(BOX, mark), **slots, if_a="correct", if_b="incorrect") for template in TEMPLATES]
