"""LLaVA: `conversations` of human and gpt turns, the last of which is the gold answer, and an `image`. Turns may also
have role and content.

[{"id": "1", "image": "a.png", "conversations": [
  {"from": "human", "value": "<image>\\nArea?"}, {"from": "gpt", "value": "12"}]}]
"""

from data.rows import Record, RowError, literal

NAME = "llava"
COLUMNS = ("conversations", "conversations")
KEYS = (("from", "value"), ("role", "content"))
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def matches(columns: set[str], head: list[dict]) -> bool:
    return "conversations" in columns


def record(raw: dict) -> Record:
    """Raises RowError for turns that do not end with an answer."""
    turns = literal(raw.get("conversations"))
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("conversations", f"expected two or more turns of from and value, got {turns!r:.60}")
    speaker, words = next((keys for keys in KEYS if keys[0] in turns[0]), KEYS[0])
    messages = [{"role": ROLES.get(str(turn.get(speaker))), "content": turn.get(words)} for turn in turns]
    for turn, message in zip(turns, messages, strict=True):
        if message["role"] is None or not isinstance(message["content"], str):
            raise RowError("conversations", f"expected turns from human or gpt with a value as text, got {turn!r:.60}")
    if messages[-1]["role"] != "assistant":
        raise RowError("conversations", f"expected a last turn from gpt, the answer, got one from {turns[-1][speaker]}")
    return Record(messages[:-1], messages[-1]["content"])
