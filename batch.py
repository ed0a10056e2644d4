"""Batches in the form that GRPOTrainer makes: two joined into one, and one cut into micro-batches. Pure functions.

A step of SPARK trains on the union of its policy rollouts and its recycled rollouts, whose prompts, completions and
images have other widths (`join`), in passes of either kind that need no more memory than without recycling
(`micro_batches`). The shapes are TRL's: b rows, prompts of P tokens padded on the left, completions of T tokens padded
on the right.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from data.rows import BadInput

IMAGE_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_images",
    "num_tiles",
)
PROMPT_FIELDS = ("prompt_ids", "prompt_mask")  # (b, P), padded on the left
COMPLETION_FIELDS = {  # (b, T), padded on the right with this
    "completion_ids": None,  # the pad token
    "completion_mask": 0,
    "tool_mask": 1,
    "old_per_token_logps": 0.0,
    "ref_per_token_logps": 0.0,
    "sampling_per_token_logps": 0.0,
    "importance_sampling_ratio": 1.0,  # (b, 1) in the sequence modes
}
TYPE_FIELDS = ("token_type_ids", "mm_token_type_ids")  # (b, P + T), padded on both
PER_ROW = {"num_images", "num_tiles", "pixel_attention_mask", "token_type_ids", "mm_token_type_ids"}


def join(first: dict[str, Any], second: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """The rows of `first`, then those of `second`, as one batch of the form GRPOTrainer makes.

    Everything a different width invalidates is redone here: prompts are padded again on the left, completions and
    what goes with their tokens on the right, token types on both sides, and the loss denominator counts both. Either
    batch may be without images.

    Raises KeyError for a field it does not know, rather than misalign it.
    """
    batches = (first, second)
    rows = [len(batch["prompt_ids"]) for batch in batches]
    width_p = max(batch["prompt_ids"].size(1) for batch in batches)
    width_t = max(batch["completion_ids"].size(1) for batch in batches)

    def left(x: torch.Tensor, value) -> torch.Tensor:  # (b, p) -> (b, P)
        return torch.nn.functional.pad(x, (width_p - x.size(1), 0), value=value)

    def right(x: torch.Tensor, value) -> torch.Tensor:  # (b, t) -> (b, T)
        return torch.nn.functional.pad(x, (0, width_t - x.size(1)), value=value)

    union: dict[str, Any] = {}
    for key in dict.fromkeys((*first, *second)):
        present = [batch[key] for batch in batches if batch.get(key) is not None]
        if key == "num_items_in_batch":
            union[key] = sum(present)
        elif key == "advantages":
            union[key] = torch.cat(present)
        elif key in PROMPT_FIELDS:
            union[key] = torch.cat([left(x, pad_token_id if key == "prompt_ids" else 0) for x in present])
        elif key in COMPLETION_FIELDS:
            value = pad_token_id if key == "completion_ids" else COMPLETION_FIELDS[key]
            per_token = all(x.size(1) == b["completion_ids"].size(1) for x, b in zip(present, batches, strict=True))
            union[key] = torch.cat([right(x, value) for x in present] if per_token else present)
        elif key in TYPE_FIELDS:
            parts = []
            for batch, n in zip(batches, rows, strict=True):
                p, t = batch["prompt_ids"].size(1), batch["completion_ids"].size(1)
                types = batch.get(key)
                if types is None:  # a batch of text alone: all of it is type 0
                    types = present[0].new_zeros((n, p + t))
                parts.append(torch.cat([left(types[:, :p], 0), right(types[:, p:], 0)], dim=1))
            union[key] = torch.cat(parts)
        elif key in ("num_images", "num_tiles"):
            union[key] = [n for batch, b in zip(batches, rows, strict=True) for n in batch.get(key) or [0] * b]
        elif key in IMAGE_FIELDS:
            by_patch = any("image_grid_thw" in batch for batch in batches)  # rows of patches, whoever they belong to
            if len({x.shape[1:] for x in present}) > 1 or (len(present) == 1 and not by_patch):
                raise BadInput(
                    f"{key}: batches of shapes {[tuple(x.shape) for x in present]} can't be joined for this model; "
                    "use images of one size, or a model of the Qwen-VL family"
                )
            union[key] = torch.cat(present)
        else:
            raise KeyError(f"join does not know the field {key!r} of this TRL version")
    return union


# ---------------------------------------------------------------------------------------------------------------------
# One batch into micro-batches


def micro_batches(
    union: dict[str, Any],
    n_policy: int,
    blocks: int,
    policy_passes: int,
    recycled_passes: int,
    longest: Callable[[torch.Tensor], torch.Tensor] = lambda lengths: lengths,
) -> list[dict[str, Any]]:
    """`union`, whose first `n_policy` rows are the policy's, in `blocks` random blocks, each as micro-batches of their
    own width: `recycled_passes` of recycled rows, then `policy_passes` of policy rows, as many in each.

    The optimizer takes no step within a block, so the order of its rows is free: rows of one length together leave
    little padding. Recycled rows are cut so that the largest padded area (rows x tokens, what a pass holds in memory)
    is least.

    `longest` takes lengths (b,), descending, to the greatest at each place over all processes: all cut alike, because
    TRL gathers a value per row in each pass, and a gather wants as many rows from everyone.

    Every row is in exactly one micro-batch. Their sizes differ: `weight` is the number of its rows over the average,
    which turns a mean over its rows into its share of the mean over all. Where recycled rows are too few, a micro-batch
    repeats a row with weight 0, so that every process takes part in every pass. `recycled` says which kind it is.
    """
    columns = split_pixel_values_by_grid(union)
    lengths = (union["prompt_mask"].sum(1) + union["completion_mask"].sum(1)).cpu()  # (b,)
    average = len(lengths) / (blocks * (policy_passes + recycled_passes))

    def by_length(rows: torch.Tensor) -> torch.Tensor:
        return rows[lengths[rows].argsort(descending=True, stable=True)]

    def evenly(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not len(rows):
            return (rows,) * recycled_passes
        cuts = even_cuts(longest(lengths[rows]).tolist(), recycled_passes)
        return rows.tensor_split((*cuts[1:], *[len(rows)] * recycled_passes)[: recycled_passes - 1])

    policy = torch.randperm(n_policy).tensor_split(blocks)
    recycled = (n_policy + torch.randperm(len(lengths) - n_policy)).tensor_split(blocks)
    batches = []
    for asked, answered in zip(recycled, policy, strict=True):
        parts = [(rows, True) for rows in evenly(by_length(asked))]
        parts += [(rows, False) for rows in by_length(answered).tensor_split(policy_passes)]
        for rows, is_recycled in parts:
            some = rows if len(rows) else torch.zeros(1, dtype=torch.long)
            batch = trim(unsplit_pixel_values_by_grid(take(columns, some)))
            batches.append({**batch, "weight": len(rows) / average, "recycled": is_recycled})
    return batches


def even_cuts(lengths: list[int], parts: int) -> list[int]:
    """Cuts of `lengths` (descending) into at most `parts` slices whose largest length x size is the least possible."""

    def cuts(area: int) -> list[int]:
        found = [0]
        while found[-1] < len(lengths):
            found.append(min(found[-1] + area // lengths[found[-1]], len(lengths)))
        return found

    areas = range(lengths[0], lengths[0] * len(lengths) + 1)
    return cuts(areas[bisect_left(areas, True, key=lambda area: len(cuts(area)) <= parts + 1)])


def take(columns: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """These rows of every column that has rows."""

    def of(value):
        if isinstance(value, list):
            return [value[i] for i in rows]
        return value[rows.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim else value

    return {key: of(value) for key, value in columns.items()}


def trim(batch: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that are padding in every row."""
    prompt, completion = batch["prompt_mask"].size(1), batch["completion_mask"].size(1)
    left = prompt - int(batch["prompt_mask"].sum(1).max())
    right = max(1, int(batch["completion_mask"].sum(1).max()))
    cut = {key: batch[key][:, left:] for key in PROMPT_FIELDS}
    for key in (*COMPLETION_FIELDS, *TYPE_FIELDS):
        if batch.get(key) is not None and batch[key].size(1) in (completion, prompt + completion):
            first, last = (left, prompt + right) if key in TYPE_FIELDS else (0, right)
            cut[key] = batch[key][:, first:last]
    return {**batch, **cut}
