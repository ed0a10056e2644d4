"""SPARK on TRL: one model learns to answer, to judge and to reflect from verifiable rewards alone (arXiv 2509.22624).

    python train_spark.py --config recipes/demo.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml train_spark.py --config recipes/spark_vl_7b.yaml

`SparkTrainer` is GRPOTrainer with one seam overridden. Each step:

    1. roll out the policy prompts and score them              super()._generate_and_score_completions
    2. rewrite the scored rollouts into judge and reflection prompts       recycle.recycle
    3. roll those out with the same weights and score them     super()._generate_and_score_completions
    4. take one optimizer step on the union                    join, then TRL's own loss

Where this departs from the paper's released code: one on-policy step on the union instead of two updates with judged
content one update old; batch sizes are the ones you set; labels are balanced (see recycle.py); what can't be scored is
left out and counted instead of being called wrong. With `recycle_ratio 0` it is GRPOTrainer, number for number.
"""

import copy
import functools
import hashlib
import inspect
import io
import json
import math
import os
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

import verify
from recycle import PROMPT_SUFFIX, Candidate, Group, Item, RecycleConfig, Rollout, from_json, recycle, to_json

RECYCLED = {"pointwise", "pairwise", "reflection"}
JUDGE_VERDICTS = {"Yes": ("Yes", "No"), "No": ("Yes", "No"), "A": ("A", "B"), "B": ("A", "B")}


@dataclass
class SparkConfig(RecycleConfig, GRPOConfig):
    """GRPOConfig, and what recycling can be told (recycle.RecycleConfig: the `recycle_*` fields)."""

    prompt_suffix: str = field(
        default=PROMPT_SUFFIX,
        metadata={"help": "What policy prompts end with; taken off a question before the judge is asked about it."},
    )

    recycle_micro_steps: int | None = field(
        default=None,
        metadata={
            "help": "Passes that each of your micro-steps is split into when recycling; default: 1 + recycle_ratio, "
            "rounded up, so that a pass holds about per_device_train_batch_size rows. More passes take less memory."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_recycling()
        if self.recycle_micro_steps is None:
            self.recycle_micro_steps = 1 + math.ceil(self.recycle_ratio)
        if self.recycle_micro_steps < 1:
            raise ValueError(f"recycle_micro_steps: expected 1 or more, got {self.recycle_micro_steps}")


@dataclass(frozen=True)
class Scored:
    """What one pass of `_generate_and_score_completions` saw, this process's rows; rewards are everybody's."""

    rows: list[dict[str, Any]]
    completions: list  # (b,) plain texts, or one assistant message each
    rewards: torch.Tensor  # (B, number of reward functions), NaN where a function does not apply


class SparkTrainer(GRPOTrainer):
    """GRPOTrainer whose training batches also hold the recycled rollouts of the same step.

    The only change is in `_generate_and_score_completions`; `_calculate_rewards` is overridden to look, not to touch,
    and `log` to write what was recycled. Everything else is inherited.

    Args:
        model, train_dataset, processing_class, ...: as for GRPOTrainer.
        reward_funcs: functions of (prompts, completions, **columns), as TRL's. The first one is the verifier: a rollout
            is right where it gives 1. Judge rows are scored by their label instead, reflection rows by these functions.
            Reward models are refused with recycling on: a label must come from something verifiable.
        args: a SparkConfig.
    """

    _tag_names = ("trl", "spark")
    _name = "SPARK"

    def __init__(self, model, reward_funcs=verify.answer_reward, args: SparkConfig | None = None, *rest, **kwargs):
        args = args if args is not None else SparkConfig("spark")
        if args.recycle_ratio > 0:
            reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs = [judging(f, with_verdicts=i == 0) for i, f in enumerate(reward_funcs)]
            # As many passes more per optimizer step as there are rows more: memory stays what it was without recycling,
            # and each pass stays one backward, which is all that DeepSpeed allows.
            args = copy.copy(args)
            args.gradient_accumulation_steps *= args.recycle_micro_steps
            args.steps_per_generation *= args.recycle_micro_steps
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._scored: Scored | None = None
        self._waiting: tuple[Candidate, ...] = ()
        self._recycled_table: list[dict[str, Any]] = []
        self._passes = args.recycle_micro_steps if args.recycle_ratio > 0 else 1
        world = self.accelerator.num_processes
        self._item_multiple = world // math.gcd(world, self.num_generations)  # every process gets as many rows
        added = self._tokenizer.get_added_vocab()
        self._control_tokens = sorted({*self._tokenizer.all_special_tokens, *added}, key=len, reverse=True)

    # ---- the seam ---------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        policy = super()._generate_and_score_completions(inputs)
        groups = self._groups()
        self._log_policy(groups)
        if not self.model.training or self.args.recycle_ratio == 0:
            return policy

        start = time.perf_counter()
        items, counts = recycle(
            groups,
            self._step // (self.args.steps_per_generation * self.num_iterations),  # counts generations
            self.args,
            self._waiting,
            suffix=self.args.prompt_suffix,
            control_tokens=self._control_tokens,
            multiple_of=self._item_multiple,
            equal=self._equal,
        )
        self._waiting = counts.surplus
        seconds = time.perf_counter() - start
        self._log_recycling(items, counts, seconds)
        if not items:  # the same on every process, so that none waits in a collective
            return policy

        with self._own_logs():
            recycled = super()._generate_and_score_completions(self._rows(items))
            self._metrics["train"].clear()
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]  # what the step cost, all of it
        self._log_judging(items, recycled["advantages"])

        return join(policy, recycled, self._tokenizer.pad_token_id)

    # ---- a union into micro-steps -----------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        """TRL cuts a generation into equal slices of one width and drops the rest; `micro_batches` cuts a union."""
        steps = self.args.steps_per_generation
        due = self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None
        if not (self.model.training and self.args.recycle_ratio > 0 and due):
            return super()._prepare_inputs(generation_batch)
        union = self._generate_and_score_completions(generation_batch)
        blocks = steps // math.gcd(steps, self.args.gradient_accumulation_steps)
        self._buffered_inputs = micro_batches(union, blocks, steps // blocks)
        return self._buffered_inputs[self._step % steps]

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        weight = inputs.pop("weight", 1.0)
        if self.loss_type in ("dapo", "cispo", "vespo"):  # a sum over the tokens of the whole generation
            weight = float(weight > 0)
        return super().compute_loss(model, inputs, *args, **kwargs) * weight

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        if is_training:  # TRL's product of rows and micro-steps counts the passes added for recycling
            batch_size = self.args.generation_batch_size // self.accelerator.num_processes
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def _generate(self, prompts):
        """TRL marks a row without images by None beside rows that have some; processors take an empty list for that."""
        *generated, images, tool_images = super()._generate(prompts)
        return *generated, images and [own or [] for own in images], tool_images

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = Scored(inputs, completions, rewards)
        return rewards

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
        """A chunk without any image must not reach the vision tower, which can't take an empty batch."""
        num_images = kwargs.get("num_images")
        if num_images is None or all(num_images):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **kwargs
            )
        size = kwargs.pop("batch_size", None) or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            chunk = {k: v[rows] if k in PER_ROW else v for k, v in kwargs.items() if v is not None}
            image_start, image_stop = sum(num_images[:start]), sum(num_images[: start + size])
            if image_start == image_stop:
                chunk = {k: v for k, v in chunk.items() if k not in IMAGE_FIELDS}
            elif "image_grid_thw" in chunk:
                patches = [0, *chunk["image_grid_thw"].prod(-1).cumsum(0).tolist()]
                chunk["pixel_values"] = chunk["pixel_values"][patches[image_start] : patches[image_stop]]
                chunk["image_grid_thw"] = chunk["image_grid_thw"][image_start:image_stop]
            elif size < len(input_ids):
                raise NotImplementedError(
                    f"{type(model).__name__}: rows with and without images in one batch are supported for models "
                    "with image_grid_thw (the Qwen-VL family); give every row an image, or none"
                )
            parts.append(
                super()._get_per_token_logps_and_entropies(
                    model, input_ids[rows], attention_mask[rows], logits_to_keep, **chunk
                )
            )
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logps),
            torch.cat(entropies) if entropies[0] is not None else None,
            torch.stack(aux_losses).mean() if aux_losses[0] is not None else None,
        )

    # ---- rollouts to groups, items to rows --------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """This generation batch as groups, the same on every process, in the order of the prompts."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        scored = self._scored
        first = self.accelerator.process_index * len(scored.rows)
        local = [
            (
                row if (first + i) % size == 0 else None,
                completion if isinstance(completion, str) else completion[-1]["content"],
            )
            for i, (row, completion) in enumerate(zip(scored.rows, scored.completions, strict=True))
        ]
        rows, texts = zip(*gather_object(local), strict=True)  # (B*G,), the question once a group
        right = [None if math.isnan(r) else r == 1.0 for r in scored.rewards[:, 0].tolist()]
        groups = []
        for start in range(0, len(texts), size):
            row = rows[start]
            rollouts = [
                Rollout(text, verify.extract_boxed(text), correct)
                for text, correct in zip(texts[start : start + size], right[start : start + size], strict=True)
            ]
            groups.append(Group(question_key(row), row["prompt"], tuple(rollouts), row))
        return groups

    def _rows(self, items: tuple[Item, ...]) -> list[dict[str, Any]]:
        """This process's share of the recycled rows: every item G times in a row, as TRL's sampler would give them."""
        everybody = [item for item in items for _ in range(self.num_generations)]  # (items*G,)
        share = len(everybody) // self.accelerator.num_processes
        mine = everybody[self.accelerator.process_index * share :][:share]
        return [{**item.group.row, "prompt": item.prompt, "task": item.task, "label": item.label} for item in mine]

    def _equal(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        """`verify_many` on one process for all: a time limit could fall differently on each."""
        verdicts = [verify.verify_many(pairs) if self.accelerator.is_main_process else None]
        return broadcast_object_list(verdicts)[0]

    # ---- stop and resume --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        """What waits belongs to the checkpoint. It is written first: trainer_state.json, written last, completes it."""
        if self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "recycle_state.json"), "w", encoding="utf-8") as file:
                json.dump({"step": self._step // self._passes, "waiting": [to_json(c) for c in self._waiting]}, file)
            if self._waiting:  # rows go as the dataset's own types, images included
                rows = [{k: c.group.row[k] for k in self.train_dataset.column_names} for c in self._waiting]
                saved = Dataset.from_list(rows, features=self.train_dataset.features)
                saved.to_parquet(os.path.join(folder, "recycle_rows.parquet"))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """transformers 5.17 renames the weights of a vision-language model when it saves them, and its Trainer does not
        rename them back: a resumed run would go on from the initial weights, with a warning. Load them by name."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not self.is_fsdp_enabled:
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        with open(os.path.join(checkpoint, "recycle_state.json"), encoding="utf-8") as file:
            saved = json.load(file)
        self._step = saved["step"] * self._passes
        if saved["waiting"]:
            rows = Dataset.from_parquet(os.path.join(checkpoint, "recycle_rows.parquet"))
            self._waiting = tuple(from_json(c, row) for c, row in zip(saved["waiting"], rows, strict=True))

    # ---- logging ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _own_logs(self):
        """TRL logs every pass alike. The recycled one logs aside, so that TRL's names keep meaning the policy."""
        metrics, logs = self._metrics, self._logs
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs = {name: [] for name in logs} | {"rewards": defaultdict(list), "extra": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics, self._logs = metrics, logs

    def _log_policy(self, groups: list[Group]) -> None:
        mode = "train" if self.model.training else "eval"
        scored = [[r for r in group.rollouts if r.correct is not None] for group in groups]
        rollouts = [r for group in scored for r in group]
        everything = [r for group in groups for r in group.rollouts]
        means = {
            "policy/accuracy": [r.correct for r in rollouts],
            "policy/pass_at_g": [any(r.correct for r in group) for group in scored if group],
            "policy/unboxed": [r.answer is None for r in everything],
        }
        self._log_means(means, mode)

    def _log_recycling(self, items, counts, seconds: float) -> None:
        values = {
            "items": counts.emitted,
            "rows": len(items) * self.num_generations,
            "carried": counts.waiting,
            "expired": counts.expired,
            "skipped": sum(counts.skipped.values()),
            "seconds": seconds,
        }
        for name, value in values.items():
            self._metrics["train"][f"recycle/{name}"].append(float(value))

    def _log_judging(self, items: tuple[Item, ...], advantages: torch.Tensor) -> None:
        """Metrics of the recycled rollouts under the contract's names, and their table."""
        texts = gather_object([c if isinstance(c, str) else c[-1]["content"] for c in self._scored.completions])
        rewards = self._scored.rewards[:, 0].tolist()  # (items*G,)
        advantages = self.accelerator.gather(advantages).tolist()
        asked = [item for item in items for _ in range(self.num_generations)]
        means = defaultdict(list)
        for item, text, reward in zip(asked, texts, rewards, strict=True):
            if item.task == "reflection":
                if not math.isnan(reward):
                    means["reflection/fix_rate"].append(reward)
                continue
            verdict = verify.parse_verdict(text)
            parsed = verdict in JUDGE_VERDICTS[item.label]
            means["judge/unparsed"].append(not parsed)
            means[f"judge/{item.task}/accuracy"].append(reward)
            if item.task == "pairwise":
                means["judge/pairwise/first_rate"] += [verdict == "A"] * parsed
            else:
                right = item.shown[0].correct
                means["judge/pointwise/label_rate"].append(right)
                means["judge/pointwise/positive_rate"] += [(verdict == item.label) == right] * parsed
                means[f"pointwise, right {right}"].append(reward)
        sides = [means.pop(f"pointwise, right {right}", []) for right in (True, False)]
        if all(sides):
            means["judge/pointwise/balanced_accuracy"] = [sum(sum(side) / len(side) for side in sides) / 2]
        self._log_means(means, "train")

        if self.log_completions and self.accelerator.is_main_process:
            self._recycled_table = [
                {
                    "task": item.task,
                    "prompt": last_text(item.prompt),
                    "completion": text,
                    "label": item.label,
                    "reward": reward,
                    "advantage": advantage,
                    "shown_correct": [shown.correct for shown in item.shown],
                    "images": [thumbnail(image) for image in images_of(item.group.row)]
                    if i % self.num_generations == 0
                    else [],
                }
                for i, (item, text, reward, advantage) in enumerate(zip(asked, texts, rewards, advantages, strict=True))
            ]

    def _log_means(self, means: dict[str, list], mode: str) -> None:
        for name, values in means.items():
            if values:
                self._metrics[mode][name].append(sum(values) / len(values))

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if self._recycled_table:
            import pandas as pd

            step = self.state.global_step
            table = pd.DataFrame([{"step": step, **row} for row in self._recycled_table])
            table.to_parquet(os.path.join(self.args.output_dir, "completions", f"recycled_{step:05d}.parquet"))
            self._recycled_table = []


# ---------------------------------------------------------------------------------------------------------------------
# Rewards of recycled rows


def judging(reward_func: Callable, with_verdicts: bool) -> Callable:
    """`reward_func` for answers; judge rows are scored by their label (`with_verdicts`), or not at all (None).

    Raises ValueError for a reward model or an async function.
    """
    if isinstance(reward_func, (str, torch.nn.Module)) or inspect.iscoroutinefunction(reward_func):
        raise ValueError(
            f"reward_funcs: expected functions of (prompts, completions, **columns), got {reward_func!r}; "
            "reward models and async functions can't be used with recycle_ratio > 0"
        )

    @functools.wraps(reward_func)
    def reward(prompts, completions, task=None, label=None, **columns):
        if task is None or not set(task) <= RECYCLED:  # the policy's rows, whose data may have such columns itself
            columns |= {name: its for name, its in (("task", task), ("label", label)) if its is not None}
            return reward_func(prompts=prompts, completions=completions, **columns)
        answers = [i for i, t in enumerate(task) if t == "reflection"]
        judged = [i for i, t in enumerate(task) if t != "reflection"]
        rewards: list[float | None] = [None] * len(task)

        def pick(values, rows):
            return [values[i] for i in rows] if isinstance(values, list) and len(values) == len(task) else values

        if answers:
            its = {name: pick(values, answers) for name, values in columns.items()}
            scores = reward_func(prompts=pick(prompts, answers), completions=pick(completions, answers), **its)
            for i, score in zip(answers, scores, strict=True):
                rewards[i] = score
        if judged and with_verdicts:
            scores = verify.verdict_reward(pick(prompts, judged), pick(completions, judged), label=pick(label, judged))
            for i, score in zip(judged, scores, strict=True):
                rewards[i] = score
        return rewards

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# Two batches into one

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
                raise NotImplementedError(
                    f"{key}: batches of shapes {[tuple(x.shape) for x in present]} can't be joined for this model; "
                    "use images of one size, or a model of the Qwen-VL family"
                )
            union[key] = torch.cat(present)
        else:
            raise KeyError(f"join does not know the field {key!r} of this TRL version")
    return union


# ---------------------------------------------------------------------------------------------------------------------
# One batch into micro-batches


def micro_batches(union: dict[str, Any], blocks: int, parts: int) -> list[dict[str, Any]]:
    """`union` in `blocks` random blocks of rows, each cut by length into `parts` micro-batches of their own width.

    The optimizer takes no step within a block, so the order of its rows is free: rows of one length together leave
    little padding, and the cuts make the largest padded area (rows x tokens, what a pass holds in memory) least.

    Every row is in exactly one micro-batch. Their sizes differ: `weight` is the number of its rows over the average,
    which turns a mean over its rows into its share of the mean over all. Where rows are too few, a micro-batch repeats
    one with weight 0, so that every process takes part in every pass.
    """
    columns = split_pixel_values_by_grid(union)
    lengths = (union["prompt_mask"].sum(1) + union["completion_mask"].sum(1)).cpu()  # (b,)
    batches = []
    for block in torch.randperm(len(lengths)).tensor_split(blocks):
        block = block[lengths[block].argsort(descending=True, stable=True)]
        cuts = even_cuts(lengths[block].tolist(), parts)
        cuts += [len(block)] * (parts + 1 - len(cuts))
        for start, stop in pairwise(cuts):
            rows = block[start:stop] if start < stop else torch.zeros(1, dtype=torch.long)
            batch = trim(unsplit_pixel_values_by_grid(take(columns, rows)))
            batches.append({**batch, "weight": (stop - start) * blocks * parts / len(lengths)})
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


# ---------------------------------------------------------------------------------------------------------------------
# Small pieces


def images_of(row: dict[str, Any]) -> list:
    """The row's images as a list, from TRL's `images` or `image` column."""
    if row.get("images") is not None:
        return row["images"]
    return [row["image"]] if row.get("image") is not None else []


def question_key(row: dict[str, Any]) -> str:
    """Identifies a question: its prompt, and the pixels of its images."""
    digest = hashlib.blake2b(json.dumps(row["prompt"], sort_keys=True, default=str).encode(), digest_size=16)
    for image in images_of(row):
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def last_text(prompt) -> str:
    """The text of a prompt's last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def thumbnail(image, size: int = 256) -> bytes:
    """A PNG of at most `size` pixels a side, for the completions table."""
    small = image.copy()
    small.thumbnail((size, size))
    with io.BytesIO() as buffer:
        small.convert("RGB").save(buffer, format="PNG")
        return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(metadata={"help": "A file (json, jsonl, csv, tsv, parquet), a folder, a hub name, `digits`."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same, for evaluation during training."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset or a folder."})
    eval_split: str = field(default="test", metadata={"help": "The same, of eval_dataset."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the question: text or messages."})
    solution_column: str = field(default="solution", metadata={"help": "Column of the gold answer."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the image or images, if any."})
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to, and may not leave."}
    )
    allow_remote_images: bool = field(default=False, metadata={"help": "Fetch http(s) images when they are used."})
    min_pixels: int | None = field(default=None, metadata={"help": "Smaller images are enlarged to so many pixels."})
    max_pixels: int | None = field(default=None, metadata={"help": "Larger images are reduced to so many pixels."})
    max_prompt_length: int = field(default=8192, metadata={"help": "A row with a longer prompt (tokens) is left out."})
    strict: bool = field(
        default=False, metadata={"help": "Refuse data with unusable rows instead of leaving them out."}
    )


class Progress(ProgressCallback):
    """One bar with the numbers that matter, instead of all metrics of every step between its lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {
            "policy": "policy/accuracy",
            "pointwise": "judge/pointwise/balanced_accuracy",
            "pairwise": "judge/pairwise/accuracy",
            "fixed": "reflection/fix_rate",
        }
        if self.training_bar is not None:
            self.training_bar.set_postfix({k: f"{logs[metric]:.2f}" for k, metric in shown.items() if metric in logs})


def main() -> None:
    from transformers import AutoProcessor
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    from data.lengths import image_factor, too_long
    from data.read import BadInput, read_dataset, report

    try:
        data, args, model = TrlParser((DataArguments, SparkConfig, ModelConfig)).parse_args_and_config()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(refuse(error)) from None

    def read(source: str, split: str):
        bad_rows = None if data.strict else []
        columns = (data.prompt_column, data.solution_column, data.image_column)
        dataset = read_dataset(
            source,
            *columns,
            image_root=data.image_root,
            suffix=args.prompt_suffix,
            allow_remote_images=data.allow_remote_images,
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            image_factor=image_factor(processor),
            config=data.dataset_config,
            split=split,
            fits=too_long(data.max_prompt_length, processor),
            bad_rows=bad_rows,
        )
        if args.process_index == 0:
            print(report(source, len(dataset), bad_rows), flush=True)
        return dataset.remove_columns("task")  # the name of what recycled rows are for

    try:
        processor = AutoProcessor.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, padding_side="left"
        )
        train = read(data.dataset, data.dataset_split)
        evaluation = read(data.eval_dataset, data.eval_split) if data.eval_dataset else None
    except (BadInput, OSError) as error:
        raise SystemExit(refuse(error)) from None

    verify.warm_up()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = SparkTrainer(
        model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    resume = args.resume_from_checkpoint
    if resume == "latest":  # the last complete checkpoint, if there is one
        resume = last_checkpoint(args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except BadInput as error:  # an image that broke, or is found broken, when it is used
        raise SystemExit(refuse(error)) from None
    trainer.save_model(args.output_dir)
    trainer.save_state()


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that was saved whole: trainer_state.json is what the trainer writes last."""
    found = [p.parent for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if found else None


def refuse(error: Exception) -> int:
    """One line on stderr instead of a traceback, and the exit status of bad input."""
    print(f"train_spark.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
