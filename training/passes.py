"""A generation in passes: forward and backward over as many rows as hold no more tokens than a slice of plain GRPO's.

TRL cuts a generation into slices of one size. The union of policy and recycled rollouts has rows of very different
lengths, and many without gradient; here each micro-step is a list of passes (`plan_passes`), run one after the other
and weighted so that the loss is that of all rows at once (`InPasses`).
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import split_pixel_values_by_grid

from training.batch import Batch, cut_pass, merge_images

TOKEN_LOSSES = ("dapo", "cispo", "vespo")  # a sum over tokens, divided by those of the whole generation


class InPasses:
    """A mixin of GRPOTrainer: each micro-step is a list of passes instead of one slice of the generation."""

    def _prepare_inputs(self, generation_batch):
        """The passes of this micro-step. TRL cuts a generation into slices of one size; here each micro-step is a list
        of passes that hold all of its rows, policy and recycled ones apart, each pass with no more padded tokens than a
        slice of the policy's rows."""
        if not (self.model.training and (self.args.recycle_ratio > 0 or self._drop_rows)):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = None  # free the last generation before the next one is made
            union = self._generate_and_score_completions(generation_batch)
            if self.args.recycle_ratio == 0:  # else its images are already one tensor a row (share_images)
                union = split_pixel_values_by_grid(union)
            self._buffered_inputs = self._passes(union, n_policy=len(generation_batch))
        return self._buffered_inputs[self._step % steps]

    def _passes(self, union, n_policy: int) -> list[list[dict[str, Any]]]:
        steps, accumulation = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        masks = (union["prompt_mask"][:n_policy], union["completion_mask"][:n_policy])
        width = self._everyone(torch.stack([mask.sum(1).max() for mask in masks])).amax(0).sum().item()
        plan = plan_passes(
            union,
            n_policy,
            micro_steps=steps,
            blocks=steps // math.gcd(steps, accumulation),
            budget=self.args.per_device_train_batch_size * width,
            drop=self._drop_rows,
            apart=self.args.recycle_apart and n_policy < len(union["prompt_ids"]),
            fill=self._with_deepspeed,
            everyone=self._everyone,
        )
        trained = sum(len(p.rows) for passes in plan for p in passes if p.row_weight)
        share = trained / len(union["prompt_ids"])
        self._log({"recycle/trained_rows": trained * self.accelerator.num_processes, "recycle/trained_share": share})
        return [
            [{**p.weights, "batch": cut_pass(union, p.rows, self.pad_to_multiple_of)} for p in passes]
            for passes in plan
        ]

    @property
    def _with_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _everyone(self, local: torch.Tensor) -> torch.Tensor:
        """Every process's tensor, (n, ...) -> (processes, n, ...)."""
        return self.accelerator.gather(local[None].to(self.accelerator.device)).cpu()

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Of a batch as TRL makes it, or of a micro-step's passes: those but the last go backward in here."""
        if isinstance(inputs, dict):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return self._finite(loss) if self.model.training else loss
        total = 0.0
        for part in inputs[:-1]:
            with self._gradients_kept_local(model):
                loss = self._pass_loss(model, part)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self._with_deepspeed else {}))
                total += loss.detach()
        if not inputs:  # every row of the block was left out; its last micro-step has a pass all the same
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        return self._pass_loss(model, inputs[-1]) + total

    def _pass_loss(self, model, part: dict[str, Any]) -> torch.Tensor:
        """A pass's share of the loss of its micro-step.

        TRL divides by the rows or the tokens of the pass, or (TOKEN_LOSSES) by the tokens of the generation. The
        latter needs no weight, but an entropy bonus or auxiliary loss that TRL adds to it does.
        """
        batch = merge_images(part["batch"])
        weight = part["token_weight"] if self.loss_type in (*TOKEN_LOSSES, "bnpo") else part["row_weight"]
        if self.loss_type in TOKEN_LOSSES:
            batch["num_items_in_batch"] = batch["num_items_in_batch"] * part["token_share"]
            if self.args.has_entropy_bonus or self.aux_loss_enabled:
                batch["num_items_in_batch"] = batch["num_items_in_batch"] * weight
            else:
                weight = float(weight > 0)
        with self._logged(part["recycled"], part["metric_weight"]):
            loss = super().compute_loss(model, batch) * weight
        return self._finite(loss)

    @contextmanager
    def _gradients_kept_local(self, model):
        """Gradients add up and are not yet exchanged; DeepSpeed takes no optimizer step. Sharded models exchange theirs
        all the same, since whole gradients might not fit."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            state._set_sync_gradients(before)

    def _finite(self, loss: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(loss):
            self._stop_at("loss", loss.item())
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# Which rows go together


@dataclass(frozen=True)
class Pass:
    """Rows of the generation batch that go through the model together, on this process.

    row_weight: its share of the rows of its block, times the block's micro-steps: turns a mean over its rows, divided
        by the accumulation steps, into its part of the mean over all rows of the block.
    token_weight: the same of the loss tokens of all processes.
    metric_weight: its loss tokens over those of an average pass of its kind in the block, all processes together;
        passes without any don't count.
    token_share: loss tokens of its kind over half of the generation's, where the kinds have optimizer steps of their
        own: TRL assumes that all steps of a generation have equally many.
    """

    rows: torch.Tensor  # (b,)
    recycled: bool
    row_weight: float
    token_weight: float
    metric_weight: float
    token_share: float = 1.0

    @property
    def weights(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "rows"}


def plan_passes(
    union: Batch,
    n_policy: int,
    micro_steps: int,
    blocks: int,
    budget: int,
    drop: bool = False,
    apart: bool = False,
    fill: bool = False,
    everyone: Callable[[torch.Tensor], torch.Tensor] = lambda local: local[None],
) -> list[list[Pass]]:
    """The passes of each micro-step.

    The optimizer takes no step within a block, so the order of its rows is free: rows of similar length go together,
    as many as `budget` holds. Policy rows and recycled rows have passes of their own, so that metrics can be told
    apart. All processes make as many passes of as many rows, because TRL gathers in each of them and sharded models
    must run in step.

    Args:
        n_policy: how many of the rows, the first ones, are the policy's.
        micro_steps, blocks: of the generation; a block is a run of micro-steps that no optimizer step cuts.
        budget: the most padded tokens (rows x width) of a pass; one row may have more.
        drop: leave out rows without gradient: their advantage is 0, or all of their tokens are masked. Their part of
            the denominators stays.
        apart: policy rows in the first half of the blocks, recycled rows in the second.
        fill: each micro-step has a pass, if need be one without weight: DeepSpeed wants a gradient from each.
        everyone: (n, ...) -> (processes, n, ...), every process's tensor.
    """
    n_rows = len(union["prompt_ids"])
    kinds = []  # (block, recycled?, rows), of all blocks first the policy's
    for start, stop, recycled in ((0, n_policy, False), (n_policy, n_rows, True)):
        drawn = start + torch.randperm(stop - start)
        parts = drawn.tensor_split(blocks // 2 if apart else blocks)
        if apart:
            none = (drawn[:0],) * (blocks // 2)
            parts = (*none, *parts) if recycled else (*parts, *none)
        kinds += [(block, recycled, rows) for block, rows in enumerate(parts)]

    prompt = union["prompt_mask"].sum(1).cpu()
    completion = union["completion_mask"].sum(1).cpu()
    total = prompt + completion
    loss_mask = union["completion_mask"] * union.get("tool_mask", 1)
    loss_tokens = loss_mask.sum(1).cpu()
    teaches = (union["advantages"].cpu() != 0) & (loss_tokens > 0) if drop else torch.ones(n_rows, dtype=torch.bool)

    # As many rows on every process: those that teach, and short ones that don't where another process has more.
    taught = everyone(torch.tensor([int(teaches[rows].sum()) for *_, rows in kinds])).amax(0).tolist()
    ordered = []
    for (_, _, rows), n in zip(kinds, taught, strict=True):
        rows = rows[total[rows].argsort(stable=True)]
        rows = torch.cat([rows[teaches[rows]], rows[~teaches[rows]]])[:n]
        ordered.append(rows[total[rows].argsort(descending=True, stable=True)])

    size = max(map(len, ordered))
    lengths = torch.zeros(len(kinds), size, 3, dtype=torch.long)  # of prompt and completion, and the loss tokens
    for i, rows in enumerate(ordered):
        lengths[i, : len(rows)] = torch.stack([prompt[rows], completion[rows], loss_tokens[rows]], dim=1)
    lengths = everyone(lengths)  # (processes, kinds, size, 3)
    widths, tokens = lengths[..., :2].amax(0).tolist(), lengths[..., 2].sum(0)
    processes = len(lengths)
    block_tokens = everyone(torch.tensor([int(loss_tokens[rows].sum()) for *_, rows in kinds])).sum(0)
    of_kind = block_tokens.view(2, blocks).sum(1)  # the policy's, the recycled ones', of all processes
    shares = (2 * of_kind / of_kind.sum().clamp(min=1)).tolist() if apart else [1.0, 1.0]
    block_tokens = block_tokens.view(2, blocks).sum(0).tolist()

    steps_of_block = micro_steps // blocks
    plan: list[list[Pass]] = []
    for block in range(blocks):
        block_rows = sum(len(rows) for b, _, rows in kinds if b == block)
        passes = []
        for i in (block + blocks, block):  # recycled rows first
            n = len(ordered[i])
            slices = list(pairwise(cuts(widths[i][:n], budget)))
            measured = [int(tokens[i, start:stop].sum()) for start, stop in slices]
            average = sum(measured) / max(sum(map(bool, measured)), 1)
            for (start, stop), of_slice in zip(slices, measured, strict=True):
                rows = ordered[i][start:stop]
                passes.append(
                    Pass(
                        rows,
                        recycled=kinds[i][1],
                        row_weight=len(rows) / block_rows * steps_of_block,
                        token_weight=int(loss_tokens[rows].sum())
                        * processes
                        / max(block_tokens[block], 1)
                        * steps_of_block,
                        metric_weight=of_slice / max(average, 1),
                        token_share=shares[kinds[i][1]],
                    )
                )
        # Without any, the gradients of blocks before it in the optimizer step would not be exchanged.
        while len(passes) < (steps_of_block if fill else 1):
            passes.insert(0, Pass(total.argmin()[None], False, row_weight=0.0, token_weight=0.0, metric_weight=0.0))
        bounds = [len(passes) * i // steps_of_block for i in range(steps_of_block + 1)]
        plan += [passes[a:b] for a, b in pairwise(bounds)]  # the last micro-step of a block always has one
    return plan


def cuts(widths: list[tuple[int, int]], budget: int) -> list[int]:
    """Where to cut rows of these (prompt, completion) lengths, longest first, so that no slice of several rows holds
    more than `budget` padded tokens."""
    bounds = [0] if widths else []
    prompt = completion = 0
    for i, (p, t) in enumerate(widths):
        prompt, completion = max(prompt, p), max(completion, t)
        if i > bounds[-1] and (i + 1 - bounds[-1]) * (prompt + completion) > budget:
            bounds.append(i)
            prompt, completion = p, t
    return [*bounds, len(widths)] if widths else []
