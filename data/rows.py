"""The one row that training, checking and evaluation read, and what makes a row unusable.

    prompt    messages; contents are text where images only stand in front of the first question, parts otherwise
    images    references (data/images.py), in the order of their places; [] for a text-only row
    solution  the gold answer, as text; for evaluation also a list of them, and the verdict of a row to be judged
    task      what kind of question it is: the data's own category, or the format's name
    source    file and row

A layout turns a record of the data into a `Record`; `build_row` turns that into the row. Of images nothing but the
header is read, and that only on demand.
"""

import ast
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data.arguments import DataSettings
from data.images import BadImage, Reference, narrower, reference, size_of
from prompts import PROMPT_SUFFIX, strip_suffix

ROLES = ("system", "user", "assistant", "tool")

_FLAT_LIST = re.compile(r"\[\s*(?:(['\"])[^'\"\\\[\]]*\1\s*,?\s*)*\]")  # of texts, as long as they like
_OBJECTS = re.compile(r"\s*(?:\[\s*\{|\{\s*['\"](?:messages|conversations)['\"]\s*:)")  # how messages begin as text
_TURN_KEYS = {"role", "content", "from", "value"}
_TURNS = re.compile(r"""\s*(?:\[\s*)?\{\s*['"](?:role|content|from|value|messages|conversations)['"]\s*:""")
# <image>, or <image 1>, <image 2>, ... (also <image_1>, <|image_1|>) in that order
_IMAGE_MARK = re.compile(r"<\|?image[ _]?(\d*)\|?>")

# Tokens that are structure, not text: in a question they would forge a turn, or announce an image that is not there.
_STRUCTURE = re.compile(
    r"<\|(?:im_start|im_end|image_pad|video_pad|vision_start|vision_end|vision_pad|endoftext|eot_id|start_header_id"
    r"|end_header_id|begin_of_text|end_of_text)\|>|<(?:start_of_turn|end_of_turn|IMG_CONTEXT|image_soft_token"
    r"|fake_token_around_image|end_of_utterance|start_of_image|end_of_image)>"
)


class BadInput(ValueError):
    """Input that can't be used: one line that names file, row and field, and what is expected."""


class NotLoaded(BadInput):
    """Data that are not here (yet)."""


class RowError(ValueError):
    """What is wrong with one row: the field, and what was expected."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, replace_surrogates(" ".join(reason.split()))


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used. `row` counts from 0, `line` (of text files) from 1."""

    row: int
    line: int | None
    field: str
    reason: str

    def __str__(self):
        return f"row {self.row}: field {self.field}: {self.reason}"


@dataclass(frozen=True)
class Options:
    """label -> text of a question's options; `has_labels` where the data give the labels, else they are letters."""

    texts: dict[str, str]
    has_labels: bool


@dataclass(slots=True)
class Record:
    """What a layout found in one record of the data, as it is there.

    prompt: text, or messages with contents of text or parts.
    images: those that are not placed in the messages, None among them for one that is missing.
    options: of a multiple-choice question, None for an open one.
    letter: the right option's, where the data say it apart from the answer.
    judged: chosen and rejected, or response and label, of a row that a judge may be asked about.
    """

    prompt: Any
    solution: Any
    images: Sequence = ()
    task: Any = None
    options: Options | None = None
    letter: Any = None
    judged: Mapping[str, Any] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Source:
    """Data, and how they are read.

    name: a file, a folder, a hub name, `digits` or `arithmetic` (embedded), a datasets.Dataset, or dicts.
    suffix: put at the end of each question, once.
    columns_optional: the named columns are those of other data; where they are missing here, and the layout is known,
        that is no error.
    called: the benchmark that its rows are of, where they do not say so; default: by the file's name.
    """

    name: Any
    settings: DataSettings = field(default_factory=DataSettings)
    suffix: str = PROMPT_SUFFIX
    columns_optional: bool = False
    called: str | None = None

    def __str__(self):
        return self.name if isinstance(self.name, str) else "rows"

    def row(self, number: int) -> str:
        """What a row of it is called."""
        return f"{self}: row {number}"

    @property
    def benchmark(self) -> str:
        """What its rows are of, where they do not say so."""
        return self.called or (Path(self.name).stem if isinstance(self.name, str) else "unnamed")

    @cached_property
    def image_folder(self) -> str:
        """What relative paths of images are relative to."""
        folder = Path(self.name) if isinstance(self.name, str) else Path()
        return os.path.abspath(self.settings.image_root or (folder if folder.is_dir() else folder.parent))


def build_row(record: Record, source: Source, name: str, look: bool = True) -> dict[str, Any]:
    """The row of `record`, whose solution is taken as it is. With `look`, the headers of its images are read.

    Raises RowError.
    """
    messages, placed = _messages(record.prompt)
    if record.options:
        messages[-1] = _with_options(messages[-1], record.options.texts)
    listed = [image for image in record.images if image is not None]
    images = placed or listed
    content = messages[0]["content"]
    if len(messages) > 1 or not isinstance(content, str) or _IMAGE_MARK.search(content):  # else nothing to place
        if listed:
            messages, images = _place(messages, listed)
        places = _places(messages)
        if places and places != len(images):
            raise RowError("images", f"expected {places}, one for each place in the prompt, got {len(images)}")
        if placed and listed:
            raise RowError("images", "expected images in the prompt or in their own column, got both")
        if not images and (mark := _IMAGE_MARK.search(_words(messages))):
            raise RowError("images", f"expected an image for each {mark[0]} in the prompt, got none")
        messages = _simplest(messages)
    return {
        "prompt": [*messages[:-1], _with_suffix(messages[-1], source.suffix)],
        "images": [_reference(image, record, source, look) for image in images],
        "solution": record.solution,
        "task": replace_surrogates(str(record.task)),
        "source": replace_surrogates(name),
    }


def image_list(images: Any) -> Sequence:
    """One image or several, which a CSV file holds as a list in text."""
    images = literal(images)
    if isinstance(images, str) and images.startswith("["):
        raise RowError("image", f"expected an image or a list of them, got {images:.60}")
    return images if isinstance(images, (list, tuple)) else [images]


def literal(value: Any) -> Any:
    """The list or dict that a text stands for, as JSON or as Python writes it; any other value as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] in ("[", "{"):
        python = len(text) < 100_000 or _FLAT_LIST.fullmatch(text)  # parsing it takes a hundred times the memory
        for read in (json.loads, ast.literal_eval) if python else (json.loads,):
            try:
                return read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return text


def replace_surrogates(text: str) -> str:
    """Text that can be written in UTF-8: half a surrogate pair (in a file's name, say) becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def unicode_text(text: str, field: str) -> str:
    """`text`, if it can be written in UTF-8. A question or an answer is refused rather than changed."""
    if text != replace_surrogates(text):
        raise RowError(field, "expected text in Unicode, got half a surrogate pair")
    return text


def _reference(image: Any, record: Record, source: Source, look: bool) -> Reference:
    settings = source.settings
    least = narrower(max, record.min_pixels, settings.min_pixels)
    most = narrower(min, record.max_pixels, settings.max_pixels)
    remote = settings.allow_remote_images
    try:
        ref = reference(image, source.image_folder, settings.image_root, remote, least, most)
        if look:
            ref["width"], ref["height"] = size_of(ref, remote)
    except BadImage as error:
        raise RowError("image", str(error)) from None
    return ref


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def _messages(prompt: Any) -> tuple[list[dict[str, Any]], list]:
    """(messages whose contents are text or parts, the images placed in them)."""
    if isinstance(prompt, str):
        prompt = from_text(prompt) or [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise RowError("prompt", f"expected text or messages, got {reprlib.repr(prompt)}")
    images: list = []
    messages = [_message(message, images) for message in prompt]
    if messages[-1]["role"] != "user":
        raise RowError("prompt", f"expected messages that end with the user's, got {messages[-1]['role']}'s")
    return messages, images


def from_text(text: str) -> list | None:
    """Messages that a text stands for, as JSON or as Python writes them (pandas, in a CSV file); None for any other
    text. Raises RowError for turns that are no messages, or no longer whole: as a question they would be nonsense."""
    if not may_be_messages(text):
        return None
    messages = literal(text)
    objects = messages if isinstance(messages, list) and all(isinstance(m, dict) for m in messages) else []
    if objects and all({"role", "content"} <= message.keys() for message in objects):
        return objects
    if _TURNS.match(text) or any(len(_TURN_KEYS & message.keys()) > 1 for message in objects):
        raise RowError("prompt", f"expected text or messages with role and content, got {text:.60}")
    return None


def may_be_messages(text: str) -> bool:
    """Whether a text begins as messages in JSON do."""
    return bool(_OBJECTS.match(text))


def shows_images(prompt: Any) -> bool:
    """Whether messages, or text that stands for them, have images among their parts."""
    if isinstance(prompt, str):
        return may_be_messages(prompt) and bool(re.search(r"""['"]type['"]\s*:\s*['"]image""", prompt))
    messages = prompt if isinstance(prompt, (list, tuple)) else ()
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return any(isinstance(part, dict) and str(part.get("type")).startswith("image") for part in parts)


def _message(message: Any, images: list) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
        raise RowError(
            "prompt", f"expected messages with content and a role of {', '.join(ROLES)}, got {reprlib.repr(message)}"
        )
    content = message["content"]
    if isinstance(content, str):
        if not content.strip() and message["role"] == "user":
            raise RowError("prompt", "expected a question, got nothing")
        return {"role": message["role"], "content": plain_text(content)}
    if not isinstance(content, (list, tuple)) or not content:
        raise RowError("prompt", f"expected content as text or parts, got {reprlib.repr(content)}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": plain_text(part["text"])})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            image = part.get(kind) if kind in part else part.get("path") or part.get("url")
            image = image.get("url", image) if isinstance(image, dict) else image
            if image is not None:
                budget = {name: part[name] for name in ("min_pixels", "max_pixels") if part.get(name) is not None}
                if budget:
                    image = {**(image if isinstance(image, dict) else {"path": image}), **budget}
                images.append(image)
        else:
            raise RowError("prompt", f"expected parts of type text or image, got {reprlib.repr(part)}")
    return {"role": message["role"], "content": parts}


def plain_text(text: str, field: str = "prompt") -> str:
    """`text`, if nothing in it would act as a turn of the conversation or as an image."""
    if token := _STRUCTURE.search(text):
        raise RowError(field, f"expected text, got the control token {token[0]}")
    return unicode_text(text, field)


def in_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with contents as parts, also where they are text."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]


def _parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of all messages, one after the other."""
    return [part for message in in_parts(messages) for part in message["content"]]


def _places(messages: Sequence[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for part in _parts(messages))


def _words(messages: Sequence[dict[str, Any]]) -> str:
    return " ".join(part.get("text", "") for part in _parts(messages))


def _first_question(messages: Sequence[dict[str, Any]]) -> int:
    return next(i for i, message in enumerate(messages) if message["role"] == "user")


def _place(messages: list[dict[str, Any]], images: list) -> tuple[list[dict[str, Any]], list]:
    """(the messages with a place for each image, the images in that order).

    Where the messages have places, there; else where the text says <image>, or <image 2> for the second one, which
    later marks name in words; what the text does not mention goes in front of the first question. Raises RowError
    where it says <image> of more or fewer images, or numbers one that is not there.
    """
    if _places(messages):
        return messages, images
    numbers = [number for part in _parts(messages) for number in _IMAGE_MARK.findall(part["text"])]
    if "" in numbers:
        fit = numbers == [""] * len(images)
    else:
        fit = {str(n + 1) for n in range(len(images))}.issuperset(numbers)
    if not fit:
        marks = ", ".join(f"<image{number and ' ' + number}>" for number in numbers)
        raise RowError("images", f"expected an image for each of {marks} in the prompt, got {len(images)}")
    marked: list[int] = []

    def split(text: str) -> list[dict[str, Any]]:
        pieces = _IMAGE_MARK.split(text)  # words, number, words, number, ..., words
        parts = [{"type": "text", "text": pieces[0]}]
        for number, words in zip(pieces[1::2], pieces[2::2], strict=True):
            n = int(number) - 1 if number else len(marked)
            if n in marked:
                parts[-1]["text"] += f"image {number}{words}"
            else:
                marked.append(n)
                parts += [{"type": "image", "n": n}, {"type": "text", "text": words}]
        return [part for part in parts if part["type"] == "image" or part["text"].strip()]

    contents = [[part for p in m["content"] for part in split(p["text"])] for m in in_parts(messages)]
    first = _first_question(messages)
    contents[first] = [{"type": "image", "n": n} for n in range(len(images)) if n not in marked] + contents[first]
    order = [part.pop("n") for content in contents for part in content if part["type"] == "image"]
    placed = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
    return placed, [images[n] for n in order]


def _simplest(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents as text where that says the same: no image, or all of them before the text of the first question. A
    model of text alone knows no parts, and the same question should look the same whichever way it was written."""
    first = _first_question(messages)
    parts = in_parts(messages)
    leading = next((i for i, part in enumerate(parts[first]["content"]) if part["type"] == "text"), 0)
    if leading != _places(parts):
        return parts
    plain = [{**message, "content": "".join(p.get("text", "") for p in message["content"])} for message in parts]
    if leading:
        plain[first]["content"] = plain[first]["content"].lstrip("\n")
    return plain


def _with_suffix(message: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The suffix at the end of the message, once, whatever blank space or copies of it are there."""
    if not suffix:
        return message
    content = message["content"]
    if not isinstance(content, str) and content[-1]["type"] != "text":  # it may be there, before the last image
        last = max((i for i, part in enumerate(content) if part["type"] == "text"), default=None)
        text = content[last]["text"] if last is not None else ""
        if (question := strip_suffix(text, suffix)) != text.rstrip():
            part = {"type": "text", "text": question}
            message = {**message, "content": [*content[:last], part, *content[last + 1 :]]}
    return _changed(message, lambda text: strip_suffix(text, suffix) + suffix)


def _with_options(message: dict[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """The options as lines at the end of the message, unless that lists them itself."""

    def listed(text: str) -> str:
        patterns = (rf"(?<!\w)\(?{re.escape(label)}\)?[.):]?\s*{re.escape(o)}(?!\w)" for label, o in options.items())
        if all(re.search(pattern, text, re.IGNORECASE) for pattern in patterns):
            return text
        return "\n".join([text.rstrip(), *(f"{label}. {option}" for label, option in options.items())])

    return _changed(message, listed)


def _changed(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The message with another text at its end, "" where it ends with an image."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    ends_with_text = content[-1]["type"] == "text"
    before, text = (content[:-1], content[-1]["text"]) if ends_with_text else (content, "")
    after = [{"type": "text", "text": changed}] if (changed := change(text)) or not before else []
    return {**message, "content": [*before, *after]}


def question_of(prompt: list[dict[str, Any]], suffix: str) -> str:
    """The words of the last question, without the suffix."""
    return _words([_changed(prompt[-1], lambda text: text.removesuffix(suffix))])


def question_text(prompt: list[dict[str, Any]], suffix: str) -> str:
    """The words of a row's prompt, without the suffix and in one case and spacing: what two rows are compared by."""
    words = f"{_words(prompt[:-1])} {question_of(prompt, suffix)}"
    return " ".join(words.casefold().split())


# ---------------------------------------------------------------------------------------------------------------------
# Rows as the trainer has them, images opened


def images_of(row: dict[str, Any]) -> list:
    """The row's images as a list, from TRL's `images` or `image` column."""
    if row.get("images") is not None:
        return row["images"]
    return [row["image"]] if row.get("image") is not None else []


def question_key(row: dict[str, Any]) -> str:
    """Identifies a question: its prompt, and the pixels of its images."""
    digest = hashlib.blake2b(json.dumps(row["prompt"], sort_keys=True, default=str).encode(), digest_size=16)
    for image in images_of(row):
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()
