"""JudgeBench, for judging: two responses, and a label that says which is the better one.

{"question": "1+1?", "response_A": "It is 2.", "response_B": "It is 3.", "label": "A>B", "source": "livebench-math"}
"""

from data.rows import Record, RowError

NAME = "judgebench"
COLUMNS = ("question", "label")
ORDERS = {"A>B": ("response_A", "response_B"), "B>A": ("response_B", "response_A")}


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"question", "response_A", "response_B", "label"} <= columns


def record(raw: dict) -> Record:
    """Raises RowError."""
    order = ORDERS.get("".join(str(raw.get("label")).split()).upper())
    if order is None:
        raise RowError("label", f"expected A>B or B>A, got {raw.get('label')!r:.60}")
    return Record(raw.get("question"), None, judged={"chosen": raw.get(order[0]), "rejected": raw.get(order[1])})
