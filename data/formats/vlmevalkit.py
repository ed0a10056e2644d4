"""VLMEvalKit's TSV files: MathVista, MathVision, MathVerse, WeMath, LogicVista, DynaMath and many more.

index  image     question  A   B   hint  answer      image: base64, a list of it, or the index of a row with the image
1      iVBORw..  Longer?   AB  CD        A           options: columns A, B, ..., or a list in `choices`
2      1         Area?               cm  12          hint: goes before the question

`answer_option` is the letter of the option that is `answer`. MathVerse's questions that stand in the image alone are
asked with `query_cot`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from data.formats.columns import with_hint
from data.rows import BadRow, Record

NAME = "vlmevalkit"
COLUMNS = ("question", "answer")

_INDEX = re.compile(r"[\w-]{1,64}")  # no path, and no image is so short


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"index", "question", "answer"} <= columns and bool({"image", "image_path"} & columns)


def record(raw: dict) -> Record:
    question = with_hint(raw.get("question") or raw.get("query_cot"), raw.get("hint"))
    return Record(question, raw.get("answer"), letter=raw.get("answer_option"))


def with_images(records: Callable[[], Iterator[tuple]]) -> Iterator[tuple]:
    """The entries of `records()`; an `image` that is the index of another row is replaced by that row's image."""
    images = None
    for row, line, raw in records():
        if (index := _pointer(raw)) is not None:
            if images is None:
                wanted = {_pointer(raw) for _, _, raw in records()}
                images = {
                    str(other["index"]): other["image"]
                    for _, _, other in records()
                    if isinstance(other, dict) and str(other.get("index")) in wanted and _pointer(other) is None
                }
            if image := images.get(index):
                raw = {**raw, "image": image}
            else:
                raw = BadRow(row, line, "image", f"expected an image or the index of a row with one, got {index!r}")
        yield row, line, raw


def _pointer(raw: Any) -> str | None:
    """The index of the row whose image is meant."""
    image = raw.get("image") if isinstance(raw, dict) and raw.get("index") is not None else None
    return image.strip() if isinstance(image, str) and _INDEX.fullmatch(image.strip()) else None
