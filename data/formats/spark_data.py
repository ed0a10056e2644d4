r"""Spark-Data, the training JSON of the paper's release: `message`, a conversation as a JSON string, and `answer`.

[{"answer": "12", "message":
  "[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"image\":\"a.png\"},{\"type\":\"text\",\"text\":\"Area?\"}]}]"}]
"""

import json

from data.rows import Record, RowError

NAME = "spark"
COLUMNS = ("message", "answer")


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"message", "answer"} <= columns


def record(raw: dict) -> Record:
    """Images are where the conversation has them, each with its own pixel budget. Raises RowError."""
    message = raw.get("message")
    if isinstance(message, str):
        try:
            message = json.loads(message)
        except (ValueError, RecursionError) as error:
            raise RowError("message", f"expected a JSON list of messages, got {error}") from None
    if not isinstance(message, list):
        raise RowError("message", f"expected a JSON list of messages, got {type(message).__name__}")
    return Record(message, raw.get("answer"))
