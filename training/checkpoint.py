"""Stopping and resuming: a resumed run equals an uninterrupted one, and no failure costs what was saved before it."""

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.rows import BadInput

STATE = "spark_state.json"
REFERENCE = "reference/model.safetensors"  # in a folder of its own, or it would be taken for the model's weights
LAYOUT = (  # with the number of processes: how a generation is cut into micro-steps
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
    *("num_iterations", "num_generations"),
)
RESULT_FILES = (  # of a saved model
    *("*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"),
    *("*.json", "*.jinja", "*.txt", "*.model", "README.md"),
)


# transformers loads an optimizer to the device of its process; "cpu:0" is one that torch does not know.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class NotSaved(Exception):
    """A checkpoint could not be written for want of room; the ones before it are whole."""


class SafeCheckpoints:
    """A mixin of GRPOTrainer: saves and loads what TRL forgets, and ends a run whose numbers are no longer finite."""

    _sampler = None

    def _save_checkpoint(self, model, trial):
        """Also saves the rest of a generation that still has optimizer steps to take. That is written first:
        trainer_state.json, which transformers writes last, completes a checkpoint."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            if self._step % (self.args.steps_per_generation * self.num_iterations):
                save_batches(self._buffered_inputs, checkpoint / self._rest_of_generation)
                self.accelerator.wait_for_everyone()  # no process completes the checkpoint before all have written
            if self.args.should_save:
                state = {"step": self._step, **self._layout}
                (checkpoint / STATE).write_text(json.dumps(state), encoding="utf-8")
                if self._saves_reference:
                    (checkpoint / REFERENCE).parent.mkdir(exist_ok=True)
                    save_model(self.accelerator.unwrap_model(self.ref_model), checkpoint / REFERENCE)
            super()._save_checkpoint(model, trial)
        except Exception as error:  # a full disk has as many kinds of error as there are libraries that write
            if not is_whole(checkpoint):
                shutil.rmtree(checkpoint, ignore_errors=True)  # half a checkpoint is room that somebody needs
            if not disk_is_full(error, folder):
                raise
            raise NotSaved(
                f"the checkpoint of step {self.state.global_step} could not be saved: {' '.join(str(error).split())}. "
                f"The last complete one is {last_checkpoint(folder)}; make room, then go on from it with "
                "--resume_from_checkpoint latest"
            ) from error

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    @property
    def _rest_of_generation(self) -> str:
        return f"generation/rank_{self.accelerator.process_index}.safetensors"

    @property
    def _layout(self) -> dict[str, int]:
        return {"processes": self.accelerator.num_processes, **{name: getattr(self.args, name) for name in LAYOUT}}

    def _init_training_state(self, max_steps, updates_of_epoch, epochs, checkpoint, trial):
        """Also finds the place in the order of questions, and in the generation that the checkpoint was saved in."""
        epochs_done, micro_steps = super()._init_training_state(max_steps, updates_of_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return epochs_done, micro_steps
        if self._sampler is not None and self._sampler.shuffle:  # it draws an order for each epoch
            for _ in range(epochs_done):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        whole = self._saves_reference and (Path(checkpoint) / REFERENCE).is_file()
        if self.args.sync_ref_model and not whole and self.accelerator.is_main_process:
            print(f"{checkpoint}: has no reference model: the one that the run began with is used", file=sys.stderr)
        state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        changed = [name for name, value in self._layout.items() if state.get(name, value) != value]
        every = self.args.steps_per_generation * self.num_iterations
        self._step = state["step"]
        if changed:  # an epoch has whole generations: an optimizer step must not begin in one and end in the next
            before = epochs_done * updates_of_epoch * self.args.gradient_accumulation_steps
            self._step = math.ceil(before / every) * every + micro_steps
        if self._step % every == 0:
            return epochs_done, micro_steps
        if not changed:
            self._buffered_inputs = load_batches(Path(checkpoint) / self._rest_of_generation, self.accelerator.device)
        elif self.accelerator.is_main_process:
            was = ", ".join(f"{name} {state[name]}, now {self._layout[name]}" for name in changed)
            print(f"{checkpoint}: saved with {was}: the generation that it was in is drawn anew", file=sys.stderr)
        return epochs_done, micro_steps

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Also loads what Trainer passes over: an adapter beside which TRL has put a second one, `ref`, in a folder of
        its own, and a reference model that moves (`sync_ref_model`)."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        self._load_by_name(resume_from_checkpoint, model)
        if is_peft_model(model) and "ref" in model.peft_config and not self._sharded:
            model.load_adapter(resume_from_checkpoint, model.active_adapter, is_trainable=True)
        reference = Path(resume_from_checkpoint) / REFERENCE
        if self._saves_reference and reference.is_file():
            load_model(self.accelerator.unwrap_model(self.ref_model), reference)

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _saves_reference(self) -> bool:
        return self.args.sync_ref_model and self.ref_model is not None and not self._sharded

    def _load_best_model(self):
        super()._load_best_model()
        self._load_by_name(self.state.best_model_checkpoint, self.model)
        self._last_loaded_step = -1  # TRL's: the engine still has the last weights

    def _load_by_name(self, folder: str, model) -> None:
        """transformers 5.17 renames the weights of a vision-language model when it saves them, and its Trainer does not
        rename them back: the model would keep the weights that it has, with a warning."""
        if isinstance(model, PreTrainedModel) and not self._sharded:
            dtype = max({p.dtype for p in model.parameters()}, key=lambda dtype: dtype.itemsize)  # a head's in float32
            saved = type(model).from_pretrained(folder, dtype=dtype)
            model.load_state_dict(saved.state_dict())

    # ---- numbers that are no longer finite --------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 such steps are skipped by design.
        if self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm):
            self._stop_at("gradient norm", float(norm))
        return norm

    def _stop_at(self, what: str, value: float) -> None:
        """Raise FloatingPointError, with the step's batch in files: tensors for the debugger, texts for the eye."""
        step = self.state.global_step
        path = Path(self.args.output_dir) / "nonfinite" / f"step_{step:05d}_rank_{self.accelerator.process_index}"
        save_batches(self._buffered_inputs, path.with_suffix(".safetensors"))
        with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
            for i, batch in enumerate(batches_in(self._buffered_inputs)):
                prompts = self._texts(batch["prompt_ids"], batch["prompt_mask"])
                completions = self._texts(batch["completion_ids"], batch["completion_mask"])
                advantages = batch["advantages"].tolist()
                for prompt, completion, advantage in zip(prompts, completions, advantages, strict=True):
                    row = {"batch": i, "prompt": prompt, "completion": completion, "advantage": advantage}
                    file.write(json.dumps(row) + "\n")
        raise FloatingPointError(
            f"step {step}: the {what} is {value}; its batch is in {path}.jsonl and .safetensors; the weights are those "
            "before this step. A lower learning_rate, bf16 instead of fp16 or a larger beta often fix this"
        )

    def _texts(self, ids: torch.Tensor, masks: torch.Tensor) -> list[str]:
        return [self._tokenizer.decode(row[mask.bool()]) for row, mask in zip(ids, masks, strict=True)]


def batches_in(value) -> Iterator[dict[str, Any]]:
    """The batches in a generation's buffer: TRL's slices, or the passes of each micro-step."""
    if isinstance(value, list):
        for part in value:
            yield from batches_in(part)
    elif "prompt_ids" in value:
        yield value
    else:
        yield value["batch"]


# ---------------------------------------------------------------------------------------------------------------------
# Nested lists and dictionaries of tensors in one safetensors file


def save_batches(batches, path: Path) -> None:
    """Lists and dictionaries of tensors and numbers; a tensor that stands in several places is written once. The folder
    must hold no weights: the file would be taken for some."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def outline(value):
        if isinstance(value, torch.Tensor):
            if id(value) not in names:
                names[id(value)] = str(len(names))
                # Views share memory, a file can't.
                tensors[names[id(value)]] = value.detach().clone().contiguous().cpu()
            return {"tensor": names[id(value)]}
        if isinstance(value, dict):
            return {"dict": {key: outline(part) for key, part in value.items()}}
        if isinstance(value, list):
            return {"list": [outline(part) for part in value]}
        return {"value": value}

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"outline": json.dumps(outline(batches))})


def load_batches(path: Path, device: torch.device):
    """What `save_batches` wrote, tensors on `device`."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        outline = json.loads(file.metadata()["outline"])

    def build(node):
        (kind, value), *_ = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: build(part) for key, part in value.items()}
        return [build(part) for part in value] if kind == "list" else value

    return build(outline)


# ---------------------------------------------------------------------------------------------------------------------
# Output folders


def _state_of(checkpoint: str | Path) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to its end: trainer_state.json is what transformers writes last."""
    try:
        return bool(_state_of(checkpoint))
    except (OSError, ValueError):  # the process ended before or while it was written
        return False


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was saved whole."""
    checkpoints = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_whole(p)]
    return str(max(checkpoints, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if checkpoints else None


def where_to_start(args: Any) -> str | None:
    """The checkpoint that a run goes on from, None for a new one.

    Raises BadInput for an incomplete checkpoint, and where a new run would be mixed with what an earlier one left.
    """
    resume, folder = args.resume_from_checkpoint, args.output_dir
    if resume is not None:
        checkpoint = last_checkpoint(folder) if resume == "latest" else resume
        if checkpoint is None and any(Path(folder).glob("*.safetensors")):
            raise BadInput(
                f"output_dir: {folder} has a model and no checkpoint to go on from; name another --output_dir"
            )
        if checkpoint is not None and not is_whole(Path(checkpoint)):
            raise BadInput(
                f"resume_from_checkpoint: expected a run's checkpoint-N, or latest, got {resume or 'nothing'}"
            )
        if checkpoint is not None and not (Path(checkpoint) / STATE).is_file():
            raise BadInput(
                f"resume_from_checkpoint: expected a checkpoint of train_spark.py, with {STATE}: {checkpoint}"
            )
        if checkpoint is not None and any(Path(checkpoint).glob("global_step*")):  # DeepSpeed's
            saved = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["processes"]
            if saved != args.world_size:
                raise BadInput(
                    f"resume_from_checkpoint: expected {saved} processes, with which DeepSpeed saved {checkpoint}, got "
                    f"{args.world_size}; a new run can start from its weights (--model_name_or_path {checkpoint})"
                )
        return checkpoint
    patterns = (f"{PREFIX_CHECKPOINT_DIR}-*", "completions/*.parquet", "*.safetensors", "trainer_state.json")
    traces = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
    if traces:
        raise BadInput(
            f"output_dir: {folder} has an earlier run's {traces[0].name}; expected a folder without one: resume that "
            "run with --resume_from_checkpoint latest, or name another --output_dir"
        )
    return None


def finished(checkpoint: str, max_steps: int, epochs: float) -> bool:
    """Whether the run that saved `checkpoint` has taken all its steps, and is asked for no more of them now."""
    state = _state_of(checkpoint)
    if max_steps > 0:
        return state["global_step"] >= max_steps
    return state["global_step"] >= state["max_steps"] and epochs <= state["epoch"] + 1e-6


def copy_result(checkpoint: str, folder: str | Path) -> None:
    """What a finished run's last checkpoint has of its result, model and state, if the run ended before saving it."""
    no_model = not any(Path(folder).glob("*.safetensors"))
    for pattern in RESULT_FILES:
        for path in Path(checkpoint).glob(pattern):
            if path.name == "trainer_state.json":
                wanted = not Path(folder, path.name).exists()
            else:
                wanted = no_model and path.name != STATE
            if wanted:
                shutil.copy2(path, folder)


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error comes from a full disk, a quota or a limit on file sizes, by whichever library wrote."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = [f"(os error {number})" for number in numbers] + [os.strerror(number) for number in numbers]
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in numbers or any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return shutil.disk_usage(folder).free < 2**20  # torch.save tells no more than that writing failed
