r"""MATH: `problem`, and a `solution` with the answer in its last \boxed{}; MATH-500 has it in `answer` as well, and
data for R1-style training in `<answer>` tags.

{"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "subject": "Algebra", "level": 1}
"""

from data.formats.columns import is_none
from data.rows import Record, RowError
from verify import extract_boxed

NAME = "math"
COLUMNS = ("problem", "solution")


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"problem", "solution"} <= columns


def record(raw: dict) -> Record:
    """Raises RowError for a solution without a box where there is no `answer` either."""
    answer = raw.get("answer")
    if answer in ("proof", "notfound"):  # NuminaMath's
        raise RowError("answer", f"expected an answer, got {answer!r}, which stands for none")
    if is_none(answer):
        solution = str(raw.get("solution"))
        answer = solution if "<answer>" in solution else extract_boxed(solution)
    if answer is None:
        raise RowError("solution", f"expected \\boxed{{}} in it, got {str(raw.get('solution'))[-60:]!r}")
    return Record(raw.get("problem"), answer, task=raw.get("subject") or raw.get("type"))
