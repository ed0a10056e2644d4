"""GSM8K: `question`, and an `answer` whose last line is `#### 42`.

{"question": "6 packs of 7 pens. How many pens?", "answer": "6*7=42\\n#### 42"}
"""

from data.rows import Record, RowError

NAME = "gsm8k"
COLUMNS = ("question", "answer")


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"question", "answer"} <= columns and any("####" in str(raw.get("answer")) for raw in head)


def record(raw: dict) -> Record:
    """Raises RowError for an answer without `####`: its last number may be anything."""
    answer = raw.get("answer")
    if "####" not in str(answer):
        raise RowError("answer", f"expected a solution that ends with #### and the answer, got {str(answer)[-60:]!r}")
    return Record(raw.get("question"), answer)
