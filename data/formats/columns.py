"""Columns by their names: those that were named, else the ones that everybody uses.

{"prompt": "1+1?", "solution": "2"}
{"question": "Area?", "answer": "12", "images": ["a.png"]}
{"dataset": "areas", "problem": "Area?", "answer": "12", "image_path": "a.png"}

For judging, a pair or one response with its label:

{"dataset": "areas", "problem": "Area?", "chosen": "It is 12.", "rejected": ["It is 7."], "image_path": "a.png"}
{"dataset": "areas", "problem": "Area?", "response": "It is 7.", "label": "No"}
"""

import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from PIL import Image

from data.rows import RowError, from_text, literal, replace_surrogates, unicode_text

ROTATION = 1_000_000  # MMBench: what is added to a question's index for each rotation of its options
QUESTIONS = ("prompt", "problem", "question", "query")
ANSWERS = ("answer", "ground_truth", "final_answer", "expected_answer", "solution", "answerkey")
IMAGES = ("decoded_image", "images", "image", "image_path")  # MathVista has a path in `image`, beside the image itself
# BoolQ, SQuAD, RACE, SVAMP, MultiRC, MCTest, ProofWriter, MuSR, DREAM
PASSAGES = (
    "passage", "context", "article", "body", "paragraph", "story", "theory", "narrative", "document", "dialogue",
)  # fmt: skip
BESIDE = ("history", "table", "premise", "paragraphs", "passages", "documents", "evidence")  # of a question in text
NEVER_USED = ("video", "videos", "audio", "audios", "tools")
TASK_COLUMNS = ("task", "category", "subject", "dataset")
PAIR, SINGLE = ("chosen", "rejected"), ("response", "label")  # what a judge is shown
LABELS = {
    **dict.fromkeys(("yes", "true", "1", "correct"), "Yes"),
    **dict.fromkeys(("no", "false", "0", "incorrect"), "No"),
}
CATEGORIES = (
    "category", "subset", "split", "subject", "question_type", "answer_type", "task", "skills", "skill",
    "problem_version", "knowledge_level", "level", "query_source", "source", "generator",
)  # fmt: skip

_NUMBERED_IMAGE = re.compile(r"(?:image|img)[_ ]?(\d+)", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"image|img|photo|picture|figure|diagram|screenshot", re.IGNORECASE)
_IMAGE_URL = re.compile(r"(?:image|img|photo|picture|figure)s?[_ ]?(?:url|uri|link|src)s?", re.IGNORECASE)
_SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF.{4}WEBP", re.DOTALL)
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR.{6}XRUJQ)\S{44}")  # the same, in text
# May be an image's where there is no column for images.
_FILE_NAME = re.compile(r"file_?(?:name|path)|^(?:file|path)$", re.IGNORECASE)
_IMAGE_FILE = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def usual(names: tuple[str, ...], columns: Iterable[str]) -> str | None:
    """The first of `names` that is there, in whatever case."""
    there = {column.lower(): column for column in columns}
    return next((there[name] for name in names if name in there), None)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def image_of(raw: dict[str, Any], strict: bool = True) -> tuple[str, Any]:
    """(column, image or images) of a record, ("", None) where it has none.

    With `strict`, raises RowError for a column that holds an image under another name.
    """
    usual_names, numbered, others = _image_columns(tuple(raw))
    for name in usual_names:
        if not is_none(raw[name]):
            more = [other for other in numbered if not is_none(raw[other])]
            if not more and name.lower() == "images":
                more = [each for each in usual_names if each.lower() == "image" and not _among(raw[each], raw[name])]
            if more and strict:
                raise RowError(more[0], f"expected the images once, got others in {name}; name one as --image_column")
            return name, raw[name]
    if several := [raw[name] for name in numbered if not is_none(raw[name])]:
        return numbered[0], several
    for name in others if strict else ():
        if _holds_image(name, raw[name]) or (not usual_names and _names_image(name, raw[name], _FILE_NAME)):
            raise RowError(
                name, f"holds an image and is not used; expected {', '.join(IMAGES)}, or its name as --image_column"
            )
    return "", None


def _among(image: Any, images: Any) -> bool:
    """Whether one column names no image that the other does not, as far as both have paths, of which one may be longer
    at its start."""
    here, there = (_paths(literal(value)) for value in (image, images))
    return not there or all(any(f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}") for b in there) for a in here)


def _paths(value: Any) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [os.path.normpath(path).lstrip("/") for path in values if isinstance(path, str) and not is_none(path)]


def is_none(value: Any) -> bool:
    """Whether a field holds nothing, in any format's way of saying so."""
    return value is None or (isinstance(value, float) and value != value) or value in ("", [], ())


@lru_cache(maxsize=1024)
def _image_columns(columns: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """(the usual ones in order, image_1 and so on in order, all others)."""
    usual_names = [column for name in IMAGES for column in columns if column.lower() == name]
    numbers = {column: int(match[1]) for column in columns if (match := _NUMBERED_IMAGE.fullmatch(column))}
    others = [column for column in columns if column not in {*usual_names, *numbers}]
    return usual_names, sorted(numbers, key=numbers.get), others


def _holds_image(name: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, dict):
        path = value.get("path") or value.get("image") or value.get("images") or value.get("url")
        return isinstance(value.get("bytes"), bytes) or (path is not None and _holds_image("image", path))
    if isinstance(value, str):
        at = value.startswith(("http://", "https://")) and _IMAGE_URL.fullmatch(name)
        return bool(
            at or value.startswith("data:image/") or _BASE64.match(value) or _names_image(name, value, _IMAGE_NAME)
        )
    return isinstance(value, Image.Image) or bool(isinstance(value, bytes) and _SIGNATURE.match(value))


def _names_image(name: str, value: Any, column: re.Pattern) -> bool:
    if not isinstance(value, str) or not column.search(name):
        return False
    path = value.partition("?")[0] if value.startswith(("http://", "https://")) else value
    return path[-5:].lower().endswith(_IMAGE_FILE)


# ---------------------------------------------------------------------------------------------------------------------
# What a question is about


def with_passage(question: str, raw: dict[str, Any]) -> str:
    """The question under the text that it is about, or the turns of a dialogue, where that is in a column of its own.
    Raises RowError."""
    names = [column for name in PASSAGES if (column := usual((name,), raw)) and not is_none(raw[column])]
    if names and names[0].lower() == "document" and _is_id(raw[names[0]]):
        return question
    if not names or not question.strip():
        return question
    passage = raw[names[0]]
    turns = literal(passage)
    if isinstance(turns, (list, tuple)) and all(isinstance(turn, str) for turn in turns):
        passage = "\n".join(turns)
    if not isinstance(passage, str):
        raise RowError(names[0], f"expected the question's text, or no such column, got {passage!r:.60}")
    asked = question if passage.strip() in question else f"{passage.strip()}\n\n{question}"
    for name in names[1:]:
        if not isinstance(raw[name], str) or raw[name].strip() not in asked:
            raise RowError(name, f"expected one text that the question is about, got another in {names[0]}")
    return asked


def _is_id(value: Any) -> bool:
    """Whether a document is only named, as `doc_12.pdf`."""
    return isinstance(value, str) and value.isascii() and len(value.split()) < 2


def with_system(prompt: Any, raw: dict[str, Any]) -> Any:
    """The prompt after the system prompt that is in a column of its own. Raises RowError where it has another."""
    name = usual(("system", "system_prompt"), raw)
    system = None if name is None else raw[name]
    if is_none(system):
        return prompt
    if not isinstance(system, str):
        raise RowError(name, f"expected the system prompt as text, or no such column, got {system!r:.60}")
    messages = from_text(prompt) or [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    first = messages[0] if isinstance(messages, (list, tuple)) and messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        content = first.get("content")
        parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
        if "".join(str(part.get("text")) for part in parts if isinstance(part, dict)).strip() != system.strip():
            raise RowError(name, "expected one system prompt, got another than that of the messages")
        return prompt
    return [{"role": "system", "content": system}, *messages] if first else prompt


def refuse_unused(raw: dict[str, Any], question: str | None) -> None:
    """Raises RowError for a column that holds a part of the question and is not used; `question`: where it is text, and
    nobody has said which column it is."""
    for name in NEVER_USED if question is None else (*NEVER_USED, *BESIDE):
        column = usual((name,), raw)
        value = None if column is None else literal(raw[column])
        if not _is_empty(value) and not (question and isinstance(value, str) and value in question):
            expected = "expected it in the prompt, or nothing"
            if name in BESIDE and not {"prompt", "solution"} <= raw.keys():
                expected += "; where the question does without it, name --prompt_column or --solution_column"
            raise RowError(column, f"holds a part of the question and is not used; {expected}")


def _is_empty(value: Any) -> bool:
    """Whether a field holds nothing, nor do its parts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    return is_none(value) or value is False or value == "null"


def refuse_another(raw: dict[str, Any], question: str, prompt: str) -> None:
    """Raises RowError where another column holds another question, by its letters and digits. A word is an id."""
    other = usual(tuple(name for name in QUESTIONS if name != question.lower()), raw)
    if other and isinstance(raw[other], str) and len(raw[other].split()) > 1:
        here, there = (re.sub(r"[\W_]+", "", text).casefold() for text in (prompt, raw[other]))
        if here and there and here not in there and there not in here:
            raise RowError(
                other, f"expected one question, got another in {question}; name --prompt_column or --solution_column"
            )


def with_input(prompt: str, raw: dict[str, Any]) -> str:
    """Alpaca's instruction, and what it is about."""
    given = raw.get("input")
    return f"{prompt}\n{given}" if isinstance(given, str) and given.strip() else prompt


def with_hint(question: str, hint: Any) -> str:
    """The question under its hint, as VLMEvalKit writes it."""
    said = (
        isinstance(hint, str)
        and hint.strip() not in ("", "nan")
        and isinstance(question, str)
        and hint.strip() not in question
    )
    return f"Hint: {hint.strip()}\n{question}" if said else question


# ---------------------------------------------------------------------------------------------------------------------
# What a judge is shown


def judged_fields(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a record for judging, None where it has none."""
    fields = {name: raw.get(name) for pair in (PAIR, SINGLE) if raw.get(pair[0]) is not None for name in pair}
    return fields or None


def for_judge(fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the fields as text, the right verdict: A is the pair's first). Of several chosen ones, as in the ties of
    RewardBench 2, each is better than each rejected one. Raises RowError."""
    if fields.get("response") is not None:
        if fields.get("chosen") is not None:
            raise RowError("response", "expected a pair of chosen and rejected, or a response with its label, got both")
        label = fields.get("label")
        verdict = LABELS.get(str(label).strip().lower()) if isinstance(label, (str, int)) else None
        if verdict is None:
            raise RowError("label", f"expected Yes, No, true or false, got {label!r:.60}")
        return {"response": _response("response", fields["response"]), "label": verdict}, verdict
    if fields.get("chosen") is None:
        raise RowError("chosen", "expected a pair of chosen and rejected, or a response with its label")
    sides: dict[str, Any] = {}
    for name in PAIR:
        several = fields[name] if isinstance(fields[name], (list, tuple)) and fields[name] else [fields[name]]
        sides[name] = [_response(name, response) for response in several]
    if len(sides["chosen"]) == 1:
        (sides["chosen"],) = sides["chosen"]
    return sides, "A"


def _response(field: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RowError(field, f"expected a response as text, got {text!r:.60}")
    return unicode_text(text, field)


# ---------------------------------------------------------------------------------------------------------------------
# What results are grouped by


def categories(raw: dict[str, Any]) -> dict[str, str | list[str]]:
    """The categories of a record, those in its `metadata` included; of some there are several, as of skills."""
    metadata = literal(raw.get("metadata"))
    fields = {**metadata, **raw} if isinstance(metadata, dict) else raw
    return {name: value for name in CATEGORIES if (value := _category(fields.get(name)))}


def _category(value: Any) -> str | list[str] | None:
    value = literal(value)
    if isinstance(value, (list, tuple)):
        return [text for text in map(_category, value) if isinstance(text, str)]
    text = str(value).strip() if isinstance(value, (str, int)) else ""
    return replace_surrogates(text) if len(text) < 100 else None


def group_of(raw: dict[str, Any], rotated: bool = False) -> list[str] | None:
    """(the question, which part of it this row is) of a record that may be one of several of its question: a variant,
    as in DynaMath, a step, as in We-Math, or a rotation of its options, as in MMBench, whose index then has a million
    or more added to it."""
    index = str(raw.get("index")).removesuffix(".0")
    if raw.get("qid") is not None and raw.get("varid") is not None:
        names = ("qid", "varid")
    elif raw.get("ID") is not None and "steps_" in str(raw.get("key")):
        names = ("ID", "key")
    elif rotated and index.isdecimal():
        return [str(int(index) % ROTATION), f"rotation {int(index) // ROTATION}"]
    else:
        return None
    return [replace_surrogates(str(raw[name])) for name in names]


def is_no_group(parts: set[str]) -> bool:
    """Whether these parts are no rotations after all, but indices of a million and more, or a question without any."""
    rotations = {f"rotation {i}" for i in range(len(parts))}
    return any(part.startswith("rotation ") for part in parts) and (len(parts) == 1 or parts != rotations)
