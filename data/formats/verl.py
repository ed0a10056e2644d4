"""verl: a `prompt` of messages, and the gold in `reward_model`.

{"data_source": "gsm8k", "prompt": [{"role": "user", "content": "6*7?"}], "reward_model": {"ground_truth": "42"}}
"""

from data.rows import Record, RowError, literal

NAME = "verl"
COLUMNS = ("prompt", "reward_model")


def matches(columns: set[str], head: list[dict]) -> bool:
    return {"prompt", "reward_model"} <= columns


def record(raw: dict) -> Record:
    """Raises RowError where there is no ground truth."""
    reward = literal(raw.get("reward_model"))
    if not isinstance(reward, dict) or reward.get("ground_truth") is None:
        raise RowError("reward_model", f"expected an object with ground_truth, got {reward!r:.60}")
    return Record(raw.get("prompt"), reward["ground_truth"], task=raw.get("data_source"))
