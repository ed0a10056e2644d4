"""Batches in which some rows have images and others none, on one process or across several, and images that repeat."""

from contextlib import contextmanager, nullcontext
from functools import cached_property
from types import MethodType
from typing import Any

import PIL.Image
import torch
from accelerate.utils import DistributedType, gather_object
from transformers import ProcessorMixin, Qwen2_5_VLModel, Qwen2VLImageProcessor, Qwen2VLModel
from transformers.image_utils import make_flat_list_of_images
from trl.data_utils import is_conversational, prepare_multimodal_messages
from trl.trainer.utils import split_pixel_values_by_grid

from data.rows import BadInput, images_of
from training.batch import merge_images
from training.vllm import placeholders


class MixedImages:
    """A mixin of GRPOTrainer. TRL 1.16 takes images in every row of a batch or in none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._with_images = {True: True, False: True}  # training or not -> whether its last generation had any
        if self.args.recycle_ratio > 0:  # else it is TRL's, rounding included
            for module in self.model.modules():
                if isinstance(module, Qwen2VLModel | Qwen2_5_VLModel):
                    module.get_image_features = MethodType(each_image_once, module)

    def _generate_and_score_completions(self, inputs):
        """Messages become lists of parts where a row has an image. TRL's table of completions can't hold these beside
        the plain texts of a process without any image, so that all become such lists. Where a row's images are None,
        as Arrow has it, they are []: TRL would take it for an image."""
        if any(row.get(name, name) is None for row in inputs for name in ("images", "image")):
            inputs = [{**row, "images": images_of(row)} for row in inputs]
        if self._every_process_must_see:
            self._with_images[self.model.training] = any(gather_object([any(images_of(row) for row in inputs)]))
        if self._generates_sharded and len(set(gather_object([any(images_of(row) for row in inputs)]))) > 1:
            raise BadInput(
                "use_vllm: expected true under FSDP, and under ZeRO-3 with ds3_gather_for_generation false, where some "
                "processes have images and others none: `generate` would wait for the vision tower for ever"
            )
        parts = isinstance(self.processing_class, ProcessorMixin) and is_conversational(inputs[0])
        if parts and not any(images_of(row) for row in inputs):
            inputs = [{**row, "prompt": prepare_multimodal_messages(row["prompt"])} for row in inputs]
        with processed_once(self.processing_class) if self.args.recycle_ratio > 0 else nullcontext():
            return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts):
        """TRL marks a row without images by None, which processors refuse beside rows that have some."""
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        if images is not None:
            images = [row_images or [] for row_images in images]
            if self.use_vllm and self.vllm_mode == "colocate":
                self.vllm_generation.placeholder_ids = placeholders(self, prompts)
        return prompt_ids, images, fields

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, num_images=None, **kwargs
    ):
        """The vision tower can't take an empty batch, so a chunk without any image must not reach it. Where the model
        is sharded it must, because every process gathers each layer's weights: there such a chunk sees a blank image in
        a row of its own, whose outputs are dropped."""
        flags = {name: kwargs.pop(name, False) for name in ("compute_entropy", "compute_aux_loss")}
        exchanges = self._every_process_must_see and self._with_images[self.model.training]
        blank = self._blank_image if exchanges else None
        if (num_images is None and blank is None) or (num_images is not None and all(num_images)):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, num_images=num_images, **flags, **kwargs
            )
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "num_images": num_images, **kwargs}
        rows = split_pixel_values_by_grid({name: value for name, value in rows.items() if value is not None})
        size = batch_size or len(input_ids)
        if "pixel_values" in rows and not isinstance(rows["pixel_values"], list) and size < len(input_ids):
            raise BadInput(
                f"{type(self.accelerator.unwrap_model(model)).__name__}: rows with and without images in one batch are "
                "supported for models with image_grid_thw (the Qwen-VL family); give every row an image, or none"
            )
        parts = []
        for start in range(0, len(input_ids), size):
            chunk = merge_images({name: value[start : start + size] for name, value in rows.items()})
            n = len(chunk["input_ids"])
            if blank is not None and "pixel_values" not in chunk:
                chunk = add_row(chunk, blank, logits_to_keep, self._tokenizer.pad_token_id)
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, chunk.pop("input_ids"), chunk.pop("attention_mask"), logits_to_keep, **flags, **chunk
            )
            parts.append((logps[:n], entropies if entropies is None else entropies[:n], aux_loss))
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logps),
            torch.cat(entropies) if entropies[0] is not None else None,
            torch.stack(aux_losses).mean() if aux_losses[0] is not None else None,
        )

    @property
    def _every_process_must_see(self) -> bool:
        """Each forward pass gathers the weights of the vision tower from all processes, or each backward pass its
        gradients, in the order in which they come (DeepSpeed's stages below 3)."""
        deepspeed = self.accelerator.state.deepspeed_plugin is not None
        exchanges = deepspeed or self.accelerator.distributed_type == DistributedType.FSDP
        return exchanges and self.accelerator.num_processes > 1 and isinstance(self.processing_class, ProcessorMixin)

    @property
    def _generates_sharded(self) -> bool:
        """`generate` runs layers whose weights are gathered as it goes."""
        plugin = self.accelerator.state.deepspeed_plugin
        zero3 = plugin is not None and plugin.zero_stage == 3 and not self.args.ds3_gather_for_generation
        sharded = zero3 or self.accelerator.distributed_type == DistributedType.FSDP
        return sharded and not self.use_vllm and isinstance(self.processing_class, ProcessorMixin)

    @cached_property
    def _blank_image(self) -> dict[str, Any]:
        """The shortest prompt with an image: its fields (1, ...) as the model takes them."""
        content = [{"type": "image", "image": PIL.Image.new("RGB", (28, 28))}, {"type": "text", "text": "."}]
        fields = self.processing_class.apply_chat_template(
            [[{"role": "user", "content": content}]], tokenize=True, return_dict=True, return_tensors="pt"
        )
        return {name: value.to(self.accelerator.device) for name, value in fields.items()}


def add_row(chunk: dict[str, Any], row: dict[str, Any], completion: int, pad_token_id: int) -> dict[str, Any]:
    """`chunk`, whose rows end in `completion` columns and have no image, with one more row: a prompt with an image and
    an empty completion."""
    prompt = chunk["input_ids"].size(1) - completion
    width = max(prompt, row["input_ids"].size(1))

    def widen(rows: torch.Tensor, value: int, to: int) -> torch.Tensor:
        return torch.nn.functional.pad(rows, (to - rows.size(1), 0), value=value)

    wider = {**chunk, **{name: value for name, value in row.items() if not name.endswith("token_type_ids")}}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        value = pad_token_id if name == "input_ids" else 0
        if name in row:
            rows = chunk[name] if name in chunk else torch.zeros_like(chunk["input_ids"])
            last = torch.nn.functional.pad(row[name], (0, completion), value=value)
            total = width + completion
            wider[name] = torch.cat([widen(rows, value, total), widen(last, value, total).to(rows.dtype)])
    return {**wider, "num_images": [0] * len(chunk["input_ids"]) + [1]}


@contextmanager
def processed_once(processor):
    """Within it, a Qwen2-VL image processor prepares images that are equal once: TRL gives it those of every rollout of
    a question, twice."""
    image_processor = getattr(processor, "image_processor", None)
    if not isinstance(image_processor, Qwen2VLImageProcessor):
        yield
        return
    preprocess = image_processor.preprocess

    def once(images, **kwargs):
        images = make_flat_list_of_images(images)
        # The bytes of a palette image are not yet its colours.
        keys = [id(i) if i.mode == "P" else (i.mode, i.size, i.tobytes()) for i in images]
        places: dict[Any, int] = {}
        place = [places.setdefault(key, len(places)) for key in keys]
        done = preprocess([images[place.index(k)] for k in range(len(places))], **kwargs)
        blocks = done["pixel_values"].split(done["image_grid_thw"].prod(-1).tolist())
        done["pixel_values"] = torch.cat([blocks[k] for k in place])
        done["image_grid_thw"] = done["image_grid_thw"][place]
        return done

    image_processor.preprocess = once
    try:
        yield
    finally:
        del image_processor.preprocess


def each_image_once(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs):
    """`get_image_features` of a Qwen2-VL or Qwen2.5-VL. The rollouts of a question, and all that is recycled from them,
    repeat its images: those that are equal go through the vision tower once.

    Args:
        pixel_values: (patches, values), the images one after the other; image_grid_thw: (images, 3).
    """
    grids = image_grid_thw.tolist()
    blocks = pixel_values.split(image_grid_thw.prod(-1).tolist())
    sums = torch.stack([block.sum() for block in blocks]).tolist()
    distinct: list[int] = []
    place = []  # (images,) in `distinct`
    for i, block in enumerate(blocks):
        equal = (
            k
            for k, j in enumerate(distinct)
            if grids[j] == grids[i] and sums[j] == sums[i] and torch.equal(blocks[j], block)
        )
        k = next(equal, len(distinct))
        if k == len(distinct):
            distinct.append(i)
        place.append(k)
    features = type(self).get_image_features(
        self, torch.cat([blocks[i] for i in distinct]), image_grid_thw[distinct], **kwargs
    )
    features.pooler_output = tuple(features.pooler_output[k] for k in place)
    return features
