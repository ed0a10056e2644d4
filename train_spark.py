"""SPARK on TRL: one model learns to answer, to judge and to reflect from verifiable rewards alone (arXiv 2509.22624).

    python train_spark.py --config recipes/demo.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml train_spark.py --config recipes/spark_vl_7b.yaml

`SparkTrainer` is GRPOTrainer with one seam overridden. Each step:

    1. roll out the policy prompts and score them              super()._generate_and_score_completions
    2. rewrite the scored rollouts into judge and reflection prompts       recycle.recycle
    3. roll those out with the same weights and score them     super()._generate_and_score_completions
    4. take one optimizer step on the union                    batch.join, then TRL's own loss

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
import shutil
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_flash_attn_2_available
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.import_utils import is_vllm_available

import verify
from batch import IMAGE_FIELDS, PER_ROW, join, micro_batches
from callbacks import Progress, StopOnSignal, Watch
from data.rows import BadInput
from prompts import TEMPLATE_TOKENS, instructions
from recycle import (
    Candidate,
    Group,
    Item,
    Limits,
    RecycleConfig,
    Rollout,
    from_json,
    question_only,
    recycle,
    to_json,
)
from rollout import ColocatedGeneration

TRL = "1.16.0"  # the seams overridden here are private methods of this version
RECYCLED = {"pointwise", "pairwise", "reflection"}
JUDGE_VERDICTS = {"Yes": ("Yes", "No"), "No": ("Yes", "No"), "A": ("A", "B"), "B": ("A", "B")}


@dataclass
class SparkConfig(RecycleConfig, GRPOConfig):
    """GRPOConfig, and what recycling can be told (recycle.RecycleConfig: the `recycle_*` fields)."""

    use_vllm: bool | None = field(
        default=None, metadata={"help": "Generate with vLLM; default: where it is installed and there is a GPU."}
    )

    max_prompt_length: int = field(
        default=8192,
        metadata={
            "help": "Longest policy prompt in tokens, images included; longer rows are left out. vLLM has room for "
            "that, two quoted rollouts and a completion (vllm_max_model_length); longer recycled prompts are skipped."
        },
    )

    recycle_micro_steps: int | None = field(
        default=None,
        metadata={
            "help": "Passes for the recycled rows of each of your micro-steps, beside the one for its policy rows. "
            "Default: as many as keep them from holding more tokens than that one."
        },
    )

    def __post_init__(self):
        if self.use_vllm is None:
            self.use_vllm = is_vllm_available() and torch.cuda.is_available() and not self.use_cpu
        super().__post_init__()
        self.check_recycling()
        for name in ("max_prompt_length", "max_completion_length"):
            if (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name}: expected 1 or more tokens, got {getattr(self, name)}")
        if self.recycle_micro_steps is None:
            policy, recycled = self.longest_rows
            self.recycle_micro_steps = math.ceil(self.recycle_ratio * recycled / policy) or 1
        if self.recycle_micro_steps < 1:
            raise ValueError(f"recycle_micro_steps: expected 1 or more, got {self.recycle_micro_steps}")

    @property
    def longest_rows(self) -> tuple[int, int]:
        """Tokens of a policy row and of a recycled row at most: the latter also quotes one rollout or two, and asks."""
        policy = self.max_prompt_length + self.max_completion_length
        quoted = 2 if "pairwise" in self.recycle_tasks else 1
        return policy, policy + quoted * self.max_completion_length + TEMPLATE_TOKENS


@dataclass(frozen=True)
class Scored:
    """What one pass of `_generate_and_score_completions` saw, this process's rows; rewards are everybody's."""

    rows: list[dict[str, Any]]
    completions: list  # (b,) plain texts, or one assistant message each
    rewards: torch.Tensor  # (B, number of reward functions), NaN where a function does not apply


class NotSaved(Exception):
    """A checkpoint could not be written; the ones before it are whole."""


class SparkTrainer(GRPOTrainer):
    """GRPOTrainer whose training batches also hold the recycled rollouts of the same step.

    What makes it SPARK is in `_generate_and_score_completions`. The rest that is overridden, by super(), serves that:
    `_prepare_inputs`, `_get_dataloader` and `compute_loss` give recycled rows passes of their own; `_calculate_rewards`
    looks, `log` writes a table; `_generate` and `_get_per_token_logps_and_entropies` take rows with and without images
    together; `_tokenize_prompts` and `_generate_single_turn` show a colocated engine each image once, and no image that
    a rollout made up; saving and loading keep what waits; a loss or gradient that is not finite ends the run.

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
        args = copy.copy(args)
        if args.use_vllm and args.vllm_max_model_length is None:
            args.vllm_max_model_length = longest_sequence(model, args)
        if args.recycle_ratio > 0:
            reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs = [judging(f, with_verdicts=i == 0) for i, f in enumerate(reward_funcs)]
            # Recycled rows have passes of their own: memory stays what it was without them, and each pass stays one
            # backward, which is all that DeepSpeed allows.
            args.gradient_accumulation_steps *= 1 + args.recycle_micro_steps
            args.steps_per_generation *= 1 + args.recycle_micro_steps
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if self.use_vllm and self.vllm_mode == "colocate":
            ColocatedGeneration.adopt(self.vllm_generation)
        longest = longest_sequence(self.model, args)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            client = self.vllm_generation.vllm_client
            served = client.get_server_info()["model_config"]["max_model_len"]
            if served < longest:
                raise ValueError(
                    f"{client.base_url}: takes {served} tokens, expected {longest}; restart it with --max-model-len "
                    f"{longest}, or set vllm_max_model_length: {served} (longer recycled prompts are skipped)"
                )
        self._longest_prompt = longest - self.max_completion_length
        self._longest_instruction = max(map(len, self._tokenizer(instructions())["input_ids"]))
        self.add_callback(Watch())
        self._scored: Scored | None = None
        self._waiting: tuple[Candidate, ...] = ()
        self._recycled_table: list[dict[str, Any]] = []
        self._passes = 1 + args.recycle_micro_steps if args.recycle_ratio > 0 else 1  # for each of the user's
        world = self.accelerator.num_processes
        self._item_multiple = world // math.gcd(world, self.num_generations)  # every process gets as many rows
        added = self._tokenizer.get_added_vocab()
        self._control_tokens = sorted({*self._tokenizer.all_special_tokens, *added}, key=len, reverse=True)

    # ---- the seam ---------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        try:
            return self._spark_step(inputs)
        finally:
            if self.use_vllm and self.vllm_mode == "colocate":
                self.vllm_generation.sleep()

    def _spark_step(self, inputs):
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
            Limits(
                self._control_tokens,
                self._item_multiple,
                self._equal,
                functools.partial(self._fits, self._prompt_lengths(policy, groups)),
            ),
            self._waiting,
        )
        self._waiting = counts.surplus
        seconds = time.perf_counter() - start
        self._log_recycling(items, counts, seconds)
        if not items:  # the same on every process, so that none waits in a collective
            return policy

        with self._logged_apart():
            recycled = super()._generate_and_score_completions(self._rows(items))
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]  # what the step cost, all of it
        self._log_judging(items, recycled["advantages"])

        return join(policy, recycled, self._tokenizer.pad_token_id)

    # ---- a union into micro-steps -----------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        """TRL cuts a generation into slices of one width; `micro_batches` cuts a union, either kind of row apart."""
        steps = self.args.steps_per_generation
        due = self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None
        if not (self.model.training and self.args.recycle_ratio > 0 and due):
            return super()._prepare_inputs(generation_batch)
        union = self._generate_and_score_completions(generation_batch)
        blocks = steps // math.gcd(steps, self.args.gradient_accumulation_steps)
        policy_passes = steps // self._passes // blocks
        self._buffered_inputs = micro_batches(
            union,
            len(generation_batch),
            blocks,
            policy_passes,
            policy_passes * self.args.recycle_micro_steps,
            self._longest,
        )
        return self._buffered_inputs[self._step % steps]

    def _longest(self, lengths: torch.Tensor) -> torch.Tensor:
        everybodys = self.accelerator.gather(lengths.to(self.accelerator.device))
        return everybodys.view(-1, len(lengths)).amax(0).cpu()

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        weight, recycled = inputs.pop("weight", 1.0), inputs.pop("recycled", False)
        if self.loss_type in ("dapo", "cispo", "vespo"):  # a sum over the tokens of the whole generation
            weight = float(weight > 0)
        with self._logged_apart(keep=weight > 0) if recycled else nullcontext():
            loss = super().compute_loss(model, inputs, *args, **kwargs) * weight
        if not torch.isfinite(loss):
            self._stop_at("loss", loss.item())
        return loss

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        if is_training:  # TRL's product of rows and micro-steps counts the passes added for recycling
            batch_size = self.args.generation_batch_size // self.accelerator.num_processes
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def _tokenize_prompts(self, prompts):
        """Beside TRL's prompts, in which an image is as many tokens as the model sees of it, the same ones with a
        placeholder for each. A colocated engine fills these in itself; TRL 1.16 hands it the first, and it fills in the
        first token of an image again (TRL's issue 6294)."""
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        if images is not None and self.use_vllm and self.vllm_mode == "colocate":
            texts = self.processing_class.apply_chat_template(
                [prepare_multimodal_messages(prompt) for prompt in prompts],
                tools=self.tools or None,
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=False,
                **self.chat_template_kwargs,
            )
            bos = self._tokenizer.bos_token
            written = bos is not None and texts[0].startswith(bos)  # by the template, as processors see it too
            fields["placeholders"] = self._tokenizer(texts, add_special_tokens=not written)["input_ids"]
        return prompt_ids, images, fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        """As TRL's, by `_tokenize_prompts`' prompts. A rollout ends before the token of an image that it makes up: the
        forward pass would look for that image, and fail."""
        asked = multimodal_fields.pop("placeholders", prompt_ids)
        completion_ids, logprobs = super()._generate_single_turn(asked, images, multimodal_fields, *args, **kwargs)
        if asked is not prompt_ids and self.vllm_generation.read != prompt_ids:
            read, own = (sum(map(len, ids)) for ids in (self.vllm_generation.read, prompt_ids))
            raise BadInput(
                f"vLLM read {read} prompt tokens where the trainer has {own}: {self.model.config.model_type} fills in "
                "images otherwise there; expected the processor's files beside the model's weights, or use_vllm: false"
            )
        config = self.model.config
        visual = {getattr(config, "image_token_id", None), getattr(config, "video_token_id", None)}
        for row, ids in enumerate(completion_ids):
            if not visual.isdisjoint(ids):
                end = next(i for i, token in enumerate(ids) if token in visual)
                completion_ids[row] = ids[:end] or [self._tokenizer.eos_token_id]
                if logprobs is not None:
                    logprobs[row] = logprobs[row][: max(end, 1)]
        return completion_ids, logprobs

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
                name = type(self.accelerator.unwrap_model(model)).__name__
                raise BadInput(
                    f"{name}: rows with and without images in one batch are supported for models with image_grid_thw "
                    "(the Qwen-VL family); give every row an image, or none"
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

    def _prompt_lengths(self, policy, groups: list[Group]) -> dict[str, int]:
        """Tokens of each question's prompt, image tokens included."""
        lengths = self.accelerator.gather(policy["prompt_mask"].sum(1)).tolist()  # (B*G,)
        return {group.key: n for group, n in zip(groups, lengths[:: self.num_generations], strict=True)}

    def _fits(self, prompt_lengths: dict[str, int], shown: list[tuple[Group, str]]) -> list[bool]:
        if not shown:
            return []
        tokens = self._tokenizer([text for _, text in shown], add_special_tokens=False)["input_ids"]
        room = self._longest_prompt - self._longest_instruction
        return [prompt_lengths[g.key] + len(ids) <= room for (g, _), ids in zip(shown, tokens, strict=True)]

    # ---- stop and resume --------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):  # with fp16 such steps are skipped by design
            self._stop_at("gradient norm", float(norm))
        return norm

    def _stop_at(self, what: str, value: float) -> None:
        """Raise FloatingPointError, with the step's batch in files: tensors for the debugger, texts for the eye."""
        step = self.state.global_step
        path = Path(self.args.output_dir) / f"nonfinite_step_{step:05d}_rank_{self.accelerator.process_index}"
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = self._buffered_inputs
        tensors = {
            f"{i}.{name}": field.detach().clone().contiguous().cpu()  # batches share some, a file can't
            for i, batch in enumerate(batches)
            for name, field in batch.items()
            if isinstance(field, torch.Tensor)
        }
        save_file(tensors, path.with_suffix(".safetensors"))
        with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
            for i, batch in enumerate(batches):
                decoded = [
                    self._tokenizer.batch_decode([ids[kept.bool()] for ids, kept in zip(*part, strict=True)])
                    for part in (
                        (batch["prompt_ids"], batch["prompt_mask"]),
                        (batch["completion_ids"], batch["completion_mask"]),
                    )
                ]
                for prompt, completion, advantage in zip(*decoded, batch["advantages"].tolist(), strict=True):
                    row = {"batch": i, "prompt": prompt, "completion": completion, "advantage": advantage}
                    file.write(json.dumps(row) + "\n")
        raise FloatingPointError(
            f"step {step}: the {what} is {value}; its batch is in {path}.jsonl and .safetensors; the weights are those "
            "before this step. A lower learning_rate, bf16 instead of fp16 or a larger beta often mend this"
        )

    def _save_checkpoint(self, model, trial):
        """What waits belongs to the checkpoint. It is written first: trainer_state.json, written last, completes it."""
        try:
            self._save_waiting(trial)
            super()._save_checkpoint(model, trial)
        except Exception as error:  # a full disk has as many kinds of error as there are libraries that write
            step = self.state.global_step
            folder = Path(self._get_output_dir(trial=trial))
            last = last_checkpoint(folder)
            if last is None or Path(last).name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
                shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", ignore_errors=True)
            raise NotSaved(
                f"the checkpoint of step {step} could not be saved: {' '.join(str(error).split())}. The last complete "
                f"one is {last}; make room, then go on from it with --resume_from_checkpoint latest"
            ) from error

    def _save_waiting(self, trial) -> None:
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
    def _logged_apart(self, keep: bool = True):
        """TRL logs every pass alike. In here its names have recycle/ before them, so that without they mean the policy;
        its table of completions is left out (`_log_judging` writes another)."""
        metrics, logs = self._metrics, self._logs
        self._metrics = apart = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs = {name: [] for name in logs} | {"rewards": defaultdict(list), "extra": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics, self._logs = metrics, logs
        for name, values in apart["train"].items() if keep else ():
            if name != "num_tokens":  # counts everything, under its own name
                metrics["train"][f"recycle/{name}"] += values

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
                right = item.responses[0].correct
                means["judge/pointwise/label_rate"].append(right)
                means["judge/pointwise/positive_rate"] += [(verdict == item.label) == right] * parsed
                means[f"pointwise, right {right}"].append(reward)
        sides = [means.pop(f"pointwise, right {right}", []) for right in (True, False)]
        if all(sides):
            means["judge/pointwise/balanced_accuracy"] = [sum(sum(side) / len(side) for side in sides) / 2]
        if (blind := question_only(items)) is not None:
            means["judge/pointwise/question_only"] = [blind]
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
                    "shown_correct": [response.correct for response in item.responses],
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
# Small pieces


def longest_sequence(model, args: SparkConfig) -> int:
    """Tokens of the longest prompt and its completion: a pair of quoted rollouts on top of the longest policy prompt,
    capped at the model's context. `model` is a name, a path or a model."""
    if args.vllm_max_model_length is not None:
        return args.vllm_max_model_length
    if isinstance(model, str):
        init = args.model_init_kwargs or {}
        config = AutoConfig.from_pretrained(model, revision=init.get("revision"))
    else:
        config = model.config
    wanted = args.max_prompt_length + 3 * args.max_completion_length + 512  # 512: the wording of any template
    return min(wanted, config.get_text_config().max_position_embeddings)


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
    strict: bool = field(
        default=False, metadata={"help": "Refuse data with unusable rows instead of leaving them out."}
    )
    plan: str | None = field(
        default=None,
        metadata={
            "help": "Print what the run will do and need, and end: for the processes it is started in, or for those "
            "of an accelerate config.",
            "nargs": "?",
            "const": "here",
        },
    )


def main() -> None:
    from transformers import AutoProcessor
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    import plan
    from data.lengths import image_factor, too_long
    from data.read import read_dataset, report

    try:
        launch = plan.requested(sys.argv[1:])
        config_class = plan.for_launch(SparkConfig, launch) if launch else SparkConfig
        data, args, model = TrlParser((DataArguments, config_class, ModelConfig)).parse_args_and_config()
        if launch is None:
            check_versions(args.use_vllm)
            check_weights(model.model_name_or_path)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(refuse(error)) from None

    def read(source: str, split: str, own_columns: bool = False):
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
            own_columns=own_columns,
            fits=too_long(args.max_prompt_length, processor) if processor else None,
            bad_rows=bad_rows,
        )
        if args.process_index == 0:
            print(report(source, len(dataset), bad_rows), flush=True)
        return dataset.remove_columns("task")  # the name of what recycled rows are for

    processor = None
    try:
        processor = AutoProcessor.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            padding_side="left",
            local_files_only=launch is not None,
        )
    except (OSError, ValueError) as error:
        if launch is None:
            raise SystemExit(refuse(error)) from None
    if launch is not None:
        refused = plan.show(data, args, model, launch, read)
        raise SystemExit(refuse(ValueError("; ".join(refused))) if refused else 0)

    try:
        train = read(data.dataset, data.dataset_split)
        evaluation = read(data.eval_dataset, data.eval_split, own_columns=True) if data.eval_dataset else None
        if "images" in train.column_names and not isinstance(processor, ProcessorMixin):
            raise BadInput(
                f"{data.dataset}: rows have images, but {model.model_name_or_path} reads text alone: expected a "
                "vision-language model, or data without the image column"
            )
        prompts = args.generation_batch_size // args.num_generations
        if len(train) < prompts:  # TRL would train on nothing, and say nothing
            raise BadInput(
                f"{data.dataset}: {len(train)} rows, expected at least the {prompts} of one generation; lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
    except (BadInput, OSError) as error:
        raise SystemExit(refuse(error)) from None

    verify.warm_up()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation or attention(args),
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    try:
        trainer = SparkTrainer(
            model.model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processor,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except (OSError, ValueError) as error:  # no weights, a server that does not answer, numbers that do not divide
        raise SystemExit(refuse(error)) from None
    except RuntimeError as error:
        raise SystemExit(refuse_server(error)) from None
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    resume = args.resume_from_checkpoint
    if resume == "latest":  # the last complete checkpoint, if there is one
        resume = last_checkpoint(args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except BadInput as error:  # found when it is used: a broken image, a batch that the model can't take
        raise SystemExit(refuse(error)) from None
    except RuntimeError as error:
        raise SystemExit(refuse_server(error)) from None
    except (NotSaved, FloatingPointError) as error:
        refuse(error)
        raise SystemExit(1) from None
    if stop.received:
        where = last_checkpoint(args.output_dir)
        if args.process_index == 0:
            print(f"stopped; saved in {where}; --resume_from_checkpoint latest goes on from there", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    trainer.save_model(args.output_dir)
    trainer.save_state()


def check_versions(use_vllm: bool) -> None:
    """Raise ValueError for another TRL than the one whose private methods are overridden here, for a vLLM that this TRL
    does not support, or for none."""
    if version("trl") != TRL:
        raise ValueError(f"trl: expected {TRL}, found {version('trl')}; pip install -r requirements.txt")
    if not use_vllm:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # TRL warns, and fails later
        try:
            found = is_vllm_available()
        except UserWarning as error:
            raise ValueError(f"use_vllm: {error} pip install -r requirements.txt") from None
    if not found:
        raise ValueError("use_vllm: vLLM is not installed; pip install -r requirements.txt, or set use_vllm to false")


def attention(args: SparkConfig) -> str | None:
    """flash-attention where it is installed and the GPU and the precision can; else None: sdpa, by transformers."""
    if not (is_flash_attn_2_available() and (args.bf16 or args.fp16)):
        return None
    return "flash_attention_2" if torch.cuda.get_device_capability()[0] >= 8 else None


def check_weights(model: str) -> None:
    """Raise FileNotFoundError for a local folder without weights, before the data are read for it."""
    files = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*")
    if os.path.isdir(model) and not any(path for pattern in files for path in Path(model).glob(pattern)):
        raise FileNotFoundError(f"model_name_or_path: {model} has no weights; expected {', '.join(files)}")


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that was saved whole: trainer_state.json is what the trainer writes last."""

    def whole(path: Path) -> bool:
        try:
            return bool(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:  # the process ended while it was written
            return False

    found = [p.parent for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json") if whole(p)]
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if found else None


def refuse(error: Exception) -> int:
    """One line on stderr instead of a traceback, and the exit status of bad input."""
    print(f"train_spark.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def refuse_server(error: RuntimeError) -> int:
    """`refuse`, where TRL says that a vLLM server lacks a flag that training needs; any other error is raised."""
    if not str(error).startswith("The vLLM server at"):
        raise error
    return refuse(error)


if __name__ == "__main__":
    main()
