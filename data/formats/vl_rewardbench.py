"""VL-RewardBench, for judging: two responses, and which is the better one (in VLMEvalKit's TSV, `answer` says it).

{"query": "What is this?", "image": "a.png", "response": ["A cat.", "A dog."], "human_ranking": [0, 1]}
"""

from data.rows import Record, RowError, literal

NAME = "vl_rewardbench"
COLUMNS = ("query", "human_ranking")


def matches(columns: set[str], head: list[dict]) -> bool:
    ranked = any(literal(raw.get("answer")) in ([0, 1], [1, 0]) for raw in head)
    return "response" in columns and ("human_ranking" in columns or ({"question", "answer"} <= columns and ranked))


def record(raw: dict) -> Record:
    """Raises RowError."""
    responses = literal(raw.get("response"))
    field = "human_ranking" if raw.get("human_ranking") is not None else "answer"
    ranking = literal(raw.get(field))
    if not isinstance(responses, list) or len(responses) != 2:
        raise RowError("response", f"expected a list of two responses, got {responses!r:.60}")
    if ranking not in ([0, 1], [1, 0]):
        raise RowError(field, f"expected [0, 1] (the first is better) or [1, 0], got {ranking!r:.60}")
    pair = {"chosen": responses[ranking.index(0)], "rejected": responses[ranking.index(1)]}
    return Record(raw.get("query") or raw.get("question"), None, judged=pair)
