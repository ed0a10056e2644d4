"""Chat messages in a column `messages`, as OpenAI, ms-swift and LLaMA-Factory write them. The gold is the column of the
answer, if there is one, else the last turn, if that is the assistant's.

{"messages": [{"role": "user", "content": "<image>Area?"}], "images": ["a.png"], "solution": "12"}
{"messages": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42"}]}
"""

from data.formats.columns import ANSWERS, is_none, usual
from data.rows import Record, RowError, literal

NAME = "messages"
COLUMNS = ("messages", "messages")


def matches(columns: set[str], head: list[dict]) -> bool:
    return "messages" in columns and usual(("prompt", "problem", "question", "query"), columns) is None


def record(raw: dict) -> Record:
    """Raises RowError for turns that are no messages, or without an answer."""
    turns = literal(raw.get("messages"))
    if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("messages", f"expected messages with role and content, got {turns!r:.60}")
    last = turns[-1].get("content") if turns[-1].get("role") == "assistant" else None
    prompt = list(turns[:-1] if last is not None else turns)
    column = usual(ANSWERS, raw)
    answer = last if column is None or is_none(raw[column]) else raw[column]
    return Record(prompt, answer)
