"""Training data in the formats people have, all read into the same row.

    prompt    messages; images of a row stand before the text of its first user message, unless the data places them
    images    list of PIL images (decoded when used), [] for a text-only row
    solution  the gold answer, as text
    source    file and row, for messages about it

    read_dataset("train.json", image_root="images")      Spark-Data: message (a JSON string), answer
    read_dataset("gsm8k.jsonl", "question", "answer")    JSON, JSONL, CSV, Parquet, a folder or a hub name
    read_dataset("digits")                               the embedded task (data/digits.py)

What is wrong with a row is known before any model is loaded: `BadInput` names file, row and field.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recycle import PROMPT_SUFFIX

EMBEDDED_ROWS = 8000
_LOADERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class BadInput(ValueError):
    """Input that can't be used: one line that names file, row and field, and what is expected."""


def read_dataset(
    source: str,
    prompt_column: str = "prompt",
    solution_column: str = "solution",
    image_column: str | None = None,
    *,
    image_root: str | None = None,
    suffix: str = PROMPT_SUFFIX,
):
    """Read `source` into a datasets.Dataset of the row above. `suffix` is added to each question that lacks it.

    Raises BadInput for a missing file or column, a row without prompt or gold, an image that is missing or broken.
    """
    from datasets import Dataset, Features, Image, List, Value

    if source == "digits":
        from data.digits import digit_rows

        rows = [{**row, "source": f"digits:{i}"} for i, row in enumerate(digit_rows("train", EMBEDDED_ROWS))]
        rows = [{k: row[k] for k in ("prompt", "images", "solution", "source")} for row in rows]
    else:
        records = _records(source, prompt_column, solution_column, image_column)
        root = Path(image_root) if image_root else _folder_of(source)
        rows = [_row(f"{source}: row {i}", *record, root, suffix) for i, record in enumerate(records)]
    if not rows:
        raise BadInput(f"{source}: expected at least one row, found none")

    placed = any(not isinstance(m["content"], str) for row in rows for m in row["prompt"])
    if placed:  # one layout for the column: parts everywhere
        for row in rows:
            row["prompt"] = [{**m, "content": _parts(m["content"])} for m in row["prompt"]]
    text = Value("string")
    content = List({"type": text, "text": text}) if placed else text
    features = {"prompt": List({"role": text, "content": content}), "solution": text, "source": text}
    if any(row["images"] for row in rows):
        features["images"] = List(Image())
    else:
        rows = [{k: v for k, v in row.items() if k != "images"} for row in rows]
    return Dataset.from_list(rows, features=Features(features))


def _folder_of(source: str) -> Path:
    path = Path(source)
    return path if path.is_dir() else path.parent


def _records(source, prompt_column, solution_column, image_column) -> Iterator[tuple[Any, Any, Any]]:
    """(prompt, gold, images) of each row, as the file has them."""
    path = Path(source)
    if path.suffix == ".json":
        if not path.exists():
            raise BadInput(f"{source}: no such file")
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{source}: expected a JSON list of rows, got {error}") from None
        if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
            raise BadInput(f"{source}: expected a JSON list of rows")
        if loaded and "message" in loaded[0]:
            prompt_column, solution_column, image_column = "message", "answer", None
        rows, columns = loaded, set().union(*loaded)
    else:
        rows = _load(source, path)
        columns = set(rows.column_names)
    for column, field in ((prompt_column, "prompt"), (solution_column, "solution"), (image_column, "image")):
        if column is not None and column not in columns:
            raise BadInput(
                f"{source}: no column {column!r}; name the column of the {field} with --{field}_column, "
                f"one of: {', '.join(sorted(columns))}"
            )
    if image_column is None and prompt_column != "message":
        image_column = next((name for name in ("images", "image") if name in columns), None)
    for row in rows:
        yield row.get(prompt_column), row.get(solution_column), row.get(image_column) if image_column else None


def _load(source: str, path: Path):
    from datasets import DatasetDict, load_dataset

    if path.suffix in _LOADERS:
        if not path.exists():
            raise BadInput(f"{source}: no such file")
        return load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
    try:
        loaded = load_dataset(source)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{source}: expected a file (json, jsonl, csv, parquet), a folder or a hub name; "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    return loaded["train"] if isinstance(loaded, DatasetDict) and "train" in loaded else next(iter(loaded.values()))


def _row(where: str, prompt, gold, images, root: Path, suffix: str) -> dict[str, Any]:
    messages, placed = _messages(where, prompt)
    found = [_image(where, image, root) for image in (placed or _as_list(images))]
    solution = _solution(gold)
    if not solution:
        raise BadInput(f"{where}: field solution: expected a gold answer, got {gold!r}")
    if not messages or messages[-1]["role"] != "user":
        raise BadInput(f"{where}: field prompt: expected messages that end with the user's, got {prompt!r:.80}")
    if suffix:
        messages = [*messages[:-1], _with_suffix(messages[-1], suffix)]
    return {"prompt": messages, "images": found, "solution": solution, "source": where}


def _messages(where: str, prompt) -> tuple[list[dict[str, Any]], list]:
    """(messages, the images placed in them). Contents stay text where images only stand in front of it."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        try:
            prompt = json.loads(prompt)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: field message: expected a JSON list of messages, got {error}") from None
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}], []
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise BadInput(f"{where}: field prompt: expected text or messages with role and content, got {prompt!r:.80}")
    messages, images = [], []
    first_user = True
    for message in prompt:
        content = message["content"]
        if not isinstance(content, str):
            parts = [{"type": p["type"], "text": p.get("text")} for p in content]
            images += [p.get("image") for p in content if p["type"] == "image"]
            kinds = [p["type"] for p in parts]
            simple = kinds == sorted(kinds) and (first_user or "image" not in kinds)  # "image" sorts before "text"
            content = "".join(p["text"] or "" for p in parts) if simple else parts
        first_user = first_user and message["role"] != "user"
        messages.append({"role": message["role"], "content": content})
    return messages, [image for image in images if image is not None]


def _parts(content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_suffix(message: dict[str, Any], suffix: str) -> dict[str, Any]:
    """The suffix at the end of the message's last text, once."""
    content = message["content"]
    if isinstance(content, str):
        return message if content.endswith(suffix) else {**message, "content": content + suffix}
    last = max((i for i, part in enumerate(content) if part["type"] == "text"), default=None)
    if last is None:
        return {**message, "content": [*content, {"type": "text", "text": suffix}]}
    if content[last]["text"].endswith(suffix):
        return message
    content = [*content[:last], {"type": "text", "text": content[last]["text"] + suffix}, *content[last + 1 :]]
    return {**message, "content": content}


def _solution(gold) -> str:
    """The answer in a gold: after GSM8K's `####`, in MATH's last box, or the gold itself."""
    from verify import extract_boxed

    text = "" if gold is None else str(gold).strip()
    if match := re.search(r"####\s*(.+?)\s*$", text):
        return match[1]
    return extract_boxed(text) or text


def _as_list(images) -> list:
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def _image(where: str, image, root: Path) -> Any:
    """A path (checked, opened when used) or an image object, as datasets.Image takes it."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(image, str):
        return image
    path = Path(image.removeprefix("file://"))
    path = path if path.is_absolute() else root / path
    try:
        with Image.open(path) as opened:
            opened.verify()
    except FileNotFoundError:
        raise BadInput(f"{where}: field image: no such file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{where}: field image: {path} can't be read as an image ({error})") from None
    return str(path)


def check_prompt_lengths(dataset, processor, limit: int, source: str) -> None:
    """Raise BadInput for the first prompt of more than `limit` tokens, image tokens counted.

    Only rows that could be too long by their characters and pixels are tokenised.
    """
    has_images = "images" in dataset.column_names
    for i, prompt in enumerate(dataset["prompt"]):
        bound = sum(len(str(m["content"])) for m in prompt)  # a token is at least one character
        images = dataset[i]["images"] if has_images else []
        bound += sum(image.width * image.height // 100 + 16 for image in images)
        if bound <= limit:
            continue
        if images:
            from trl.data_utils import prepare_multimodal_messages

            prompt = prepare_multimodal_messages(prompt, images=images)
        ids = processor.apply_chat_template([prompt], tokenize=True, return_dict=True, add_generation_prompt=True)
        n = len(ids["input_ids"][0])
        if n > limit:
            raise BadInput(f"{source}: row {i}: field prompt: {n} tokens, expected at most {limit} (max_prompt_length)")
