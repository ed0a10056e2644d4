"""The batches of a step, in the form that GRPOTrainer makes: two joined into one, and rows cut out of one.

A step of SPARK trains on the union of its policy rollouts and its recycled rollouts, whose prompts, completions and
images have different widths (`join`). The shapes are TRL's: b rows, prompts of P tokens padded on the left, completions
of T tokens padded on the right. Pixels are kept once a question, not once a rollout (`share_images`).
"""

import math
from collections.abc import Sequence
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
TYPE_FIELDS = ("token_type_ids", "mm_token_type_ids")  # (b, P + T), padded on both sides

Batch = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Two batches into one


def share_images(batch: Batch, keys: Sequence[str], blocks: dict[str, torch.Tensor]) -> Batch:
    """`batch` with its image fields as one tensor per row, shared by the rows of one question.

    Args:
        keys: (b,) the question of each row.
        blocks: question -> its pixels; those that are new are added, as copies, so that the tensor of the whole batch,
            which repeats each image for every rollout, can be freed.
    """
    batch = split_pixel_values_by_grid(batch)
    if isinstance(batch.get("pixel_values"), list):
        shared = []
        for key, pixels in zip(keys, batch["pixel_values"], strict=True):
            if key not in blocks:
                blocks[key] = pixels.clone()
            same = torch.equal(blocks[key], pixels)  # a tool's answer may have added images to one rollout alone
            shared.append(blocks[key] if same else pixels.clone())
        batch = {**batch, "pixel_values": shared}
    return batch


def join(first: Batch, second: Batch, pad_token_id: int) -> Batch:
    """The rows of `first`, then those of `second`, as one batch of the form GRPOTrainer makes.

    Everything that a different width invalidates is redone here: prompts are padded again on the left, completions and
    what goes with their tokens on the right, token types on both sides, and the loss denominator counts both. Either
    batch may be without images. Both lose their fields on the way, so that nothing is held twice.

    Raises KeyError for a field it does not know, rather than misalign it.
    """
    batches = (first, second)
    rows = [len(batch["prompt_ids"]) for batch in batches]
    widths = [(batch["prompt_ids"].size(1), batch["completion_ids"].size(1)) for batch in batches]
    width_p, width_t = (max(width) for width in zip(*widths, strict=True))

    def left(x: torch.Tensor, value) -> torch.Tensor:  # (b, p) -> (b, P)
        return torch.nn.functional.pad(x, (width_p - x.size(1), 0), value=value)

    def right(x: torch.Tensor, value) -> torch.Tensor:  # (b, t) -> (b, T)
        return torch.nn.functional.pad(x, (0, width_t - x.size(1)), value=value)

    union: Batch = {}
    for key in list(dict.fromkeys((*first, *second))):
        values = [batch.pop(key, None) for batch in batches]
        present = [value for value in values if value is not None]
        if key == "num_items_in_batch":
            union[key] = sum(present)
        elif key == "advantages":
            union[key] = torch.cat(present)
        elif key in PROMPT_FIELDS:
            union[key] = torch.cat([left(x, pad_token_id if key == "prompt_ids" else 0) for x in present])
        elif key in COMPLETION_FIELDS:
            value = pad_token_id if key == "completion_ids" else COMPLETION_FIELDS[key]
            per_token = all(x.size(1) == t for x, (_, t) in zip(present, widths, strict=True))
            union[key] = torch.cat([right(x, value) for x in present] if per_token else present)
        elif key in TYPE_FIELDS:
            parts = []
            for types, n, (p, t) in zip(values, rows, widths, strict=True):
                if types is None:  # a batch of text alone: all of it is type 0
                    types = present[0].new_zeros((n, p + t))
                parts.append(torch.cat([left(types[:, :p], 0), right(types[:, p:], 0)], dim=1))
            union[key] = torch.cat(parts)
        elif key in IMAGE_FIELDS and isinstance(present[0], list):  # an entry a row
            none = 0 if key in ("num_images", "num_tiles") else present[0][0][:0]  # of a row without images
            union[key] = [entry for value, n in zip(values, rows, strict=True) for entry in value or [none] * n]
        elif key in IMAGE_FIELDS:
            if len(present) < 2 or present[0].shape[1:] != present[1].shape[1:]:
                raise BadInput(
                    f"{key}: batches of shapes {[tuple(x.shape) for x in present]} can't be joined for this model; "
                    "use images of one size, or a model of the Qwen-VL family"
                )
            union[key] = torch.cat(present)
        else:
            raise KeyError(f"join does not know the field {key!r} of this TRL version")
    return union


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a batch


def cut_pass(union: Batch, rows: torch.Tensor, multiple_of: int | None = None) -> Batch:
    """These rows as a batch of their own, cut to the longest prompt and completion among them, both widths rounded up
    to `multiple_of`. Pixels stay shared."""
    unit = multiple_of or 1

    def of(value):
        if isinstance(value, list):
            return [value[i] for i in rows]
        return value[rows.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim else value

    batch = {key: of(value) for key, value in union.items()}
    prompt, completion = batch["prompt_mask"].size(1), batch["completion_mask"].size(1)
    left = prompt - unit * math.ceil(int(batch["prompt_mask"].sum(1).max()) / unit)
    # TRL's metrics take a single column for values of whole rows.
    right = max(min(2, completion), unit * math.ceil(int(batch["completion_mask"].sum(1).max()) / unit))
    cut = {key: batch[key][:, left:] for key in PROMPT_FIELDS}
    for key in (*COMPLETION_FIELDS, *TYPE_FIELDS):
        if batch.get(key) is not None and batch[key].size(1) in (completion, prompt + completion):
            first, last = (left, prompt + right) if key in TYPE_FIELDS else (0, right)
            cut[key] = batch[key][:, first:last]
    return {**batch, **cut}


def merge_images(batch: Batch) -> Batch:
    """A batch with the image fields as the model takes them: one tensor over all rows, or none where no row has any."""
    seen = any(batch.get("num_images") or ())
    return {k: v for k, v in unsplit_pixel_values_by_grid(batch).items() if seen or k not in IMAGE_FIELDS}
