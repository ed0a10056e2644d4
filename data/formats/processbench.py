"""ProcessBench, for judging: the steps of a solution, and whether its final answer is correct.

{"problem": "1+1?", "steps": ["One and one.", "That is 2."], "final_answer_correct": true, "label": -1}

Its `label` is the first wrong step (-1: none). A judge is asked about the answer here, and so not scored by that.
"""

from data.rows import Record, RowError, literal

NAME = "processbench"
COLUMNS = ("problem", "final_answer_correct")


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"problem", "steps", "final_answer_correct"} <= columns


def record(raw: dict) -> Record:
    """Raises RowError."""
    steps = literal(raw.get("steps"))
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise RowError("steps", f"expected a list of steps as text, got {steps!r:.60}")
    single = {"response": "\n\n".join(steps), "label": raw.get("final_answer_correct")}
    return Record(raw.get("problem"), None, judged=single)
