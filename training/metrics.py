"""What a step is measured by: pure functions of groups, items, texts and rewards. docs/reference.md explains the names.

Each returns metric name -> mean over all processes' rollouts; a metric with nothing to average is left out.
"""

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import verify
from data.rows import images_of
from recycle import Counts, Group, Item, question_only

OTHER_VERDICT = {"Yes": "No", "No": "Yes", "A": "B", "B": "A"}


def policy_metrics(groups: Sequence[Group], earlier: dict[str, list] | None = None) -> dict[str, float]:
    """Accuracy, pass@G and share of unboxed answers of the policy's rollouts; unscorable ones are left out. `earlier`:
    see `judge_metrics`."""
    values = defaultdict(list) if earlier is None else earlier
    for group in groups:
        scored = [r.correct for r in group.rollouts if r.correct is not None]
        values["policy/accuracy"] += scored
        values["policy/pass_at_g"] += [any(scored)] if scored else []
        values["policy/unboxed"] += [r.answer is None for r in group.rollouts]
    return means(values)


def recycling_metrics(items: Sequence[Item], counts: Counts, num_generations: int, seconds: float) -> dict[str, float]:
    """What was recycled in the step, and what was not."""
    metrics = {
        "recycle/items": len(items),
        "recycle/rows": len(items) * num_generations,
        "recycle/unused": counts.unused,
        "recycle/skipped": sum(counts.skipped.values()),
        "recycle/seconds": seconds,
    }
    blind = question_only(items)
    return metrics if blind is None else {**metrics, "judge/pointwise/question_only": blind}


def judge_metrics(
    items: Sequence[Item],
    texts: Sequence[str],
    right: Sequence[float | None],
    earlier: dict[str, list[float]] | None = None,
) -> dict[str, float]:
    """Of the recycled rollouts.

    Args:
        items: (n*G,) the item that each rollout answers.
        texts: (n*G,) what was written.
        right: (n*G,) 0 or 1, None where the verifier has no opinion.
        earlier: values of earlier batches, by metric: these are appended to them in place, and the means are of all.
    """
    values = defaultdict(list) if earlier is None else earlier
    for item, text, correct in zip(items, texts, right, strict=True):
        if item.label is None:
            if correct is not None:
                values[f"{item.task}/fix_rate"].append(correct)
            continue
        verdict = verify.parse_verdict(text)
        readable = verdict in (item.label, OTHER_VERDICT[item.label])
        values["judge/unparsed"].append(not readable)
        values[f"judge/{item.task}/accuracy"].append(correct)
        if item.task == "pairwise":
            if readable:
                values["judge/pairwise/first_rate"].append(verdict == "A")
        else:
            shown_right = item.responses[0].correct
            values["judge/pointwise/label_rate"].append(shown_right)
            if readable:
                values["judge/pointwise/positive_rate"].append((verdict == item.label) == shown_right)
            values["on right" if shown_right else "on wrong"].append(correct)
    metrics = means(values)
    sides = [metrics.pop(side, None) for side in ("on right", "on wrong")]
    return metrics if None in sides else {**metrics, "judge/pointwise/balanced_accuracy": sum(sides) / 2}


def means(values: dict[str, list]) -> dict[str, float]:
    """The mean of each list that has any values."""
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}


# ---------------------------------------------------------------------------------------------------------------------
# The table of recycled rollouts


def recycled_table(
    groups: Sequence[Group],
    items: Sequence[Item],
    texts: Sequence[str],
    rewards: Sequence[float | None],
    advantages: Sequence[float],
) -> list[dict[str, Any]]:
    """A row per recycled rollout; the images are in the first row of each item. `question` is the number of its group
    in the step."""
    numbers = {group.key: number for number, group in reversed(list(enumerate(groups)))}
    rows = []
    for i, (item, text, reward, advantage) in enumerate(zip(items, texts, rewards, advantages, strict=True)):
        first = i == 0 or items[i - 1] is not item
        rows.append(
            {
                "task": item.task,
                "question": numbers[item.group.key],
                "prompt": verify.last_text(item.prompt),
                "completion": text,
                "label": item.label,
                "reward": reward,
                "advantage": advantage,
                "shown_correct": [response.correct for response in item.responses],
                "images": [thumbnail(image) for image in images_of(item.group.row)] if first else [],
            }
        )
    return rows


def thumbnail(image) -> bytes:
    """A PNG of at most 256 pixels a side."""
    small = image.copy()
    small.thumbnail((256, 256))
    with io.BytesIO() as buffer:
        small.convert("RGB").save(buffer, format="PNG")
        return buffer.getvalue()
