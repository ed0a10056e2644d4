"""Prompt lengths in tokens, images included, without opening an image: their sizes are in the rows."""

from typing import Any

from data.images import fitted_size
from data.rows import BadInput


def image_factor(processor: Any) -> int | None:
    """Pixels a side of a visual token where the processor rounds images to a grid of them (the Qwen-VL family)."""
    from transformers import ProcessorMixin, Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

    images = processor.image_processor if isinstance(processor, ProcessorMixin) else None
    grid = isinstance(images, (Qwen2VLImageProcessor, Qwen2VLImageProcessorPil))
    return images.patch_size * images.merge_size if grid else None


def image_tokens(row: dict[str, Any], processor: Any) -> int:
    """Tokens of the row's images; an unmeasured one counts as its whole budget, or as none without a budget."""
    if not row["images"]:
        return 0
    if not hasattr(processor, "image_processor"):
        raise BadInput(
            f"rows have images, but {processor.name_or_path} reads text alone: expected a vision-language model, or "
            "data without the image column"
        )
    factor = image_factor(processor)
    sizes = []  # (height, width)
    for ref in row["images"]:
        if ref["width"] is None:
            width = height = int((ref["max_pixels"] or 0) ** 0.5)
        else:
            width, height = fitted_size(ref["width"], ref["height"], ref["min_pixels"], ref["max_pixels"], factor)
        if width:
            sizes.append((height, width))
    return sum(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]) if sizes else 0


def prompt_tokens(rows: list[dict[str, Any]], processor: Any, **template: Any) -> list[int]:
    """Tokens of each row's prompt in the model's chat template, those of images included; `template` is what the
    template is told beside the messages (`chat_template_kwargs`).

    Raises BadInput where rows have images and the model reads text alone, and where its template can't write them.
    """
    from jinja2 import TemplateError
    from transformers import ProcessorMixin
    from trl.data_utils import prepare_multimodal_messages

    images = [image_tokens(row, processor) for row in rows]
    prompts = [
        prepare_multimodal_messages(row["prompt"], images=row["images"])
        if isinstance(processor, ProcessorMixin)
        else row["prompt"]
        for row in rows
    ]
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    try:
        texts = processor.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True, **template)
    except (TemplateError, ValueError) as error:  # of a base model there is none; some take no system prompt
        raise BadInput(f"chat template of {tokenizer.name_or_path}: {error}") from None
    # The template has written the special tokens; one token stands for each image.
    lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
    return [n + more - len(row["images"]) for n, more, row in zip(lengths, images, rows, strict=True)]


def too_long(limit: int, processor: Any, setting: str = "max_prompt_length", **template: Any):
    """A function of a row: why its prompt is too long (by which setting), or None. Only prompts that could be are
    tokenised: a token is at least a byte (a Chinese character or an emoji may be several), and what the template adds
    to a message or an image is no more than the whole of it around an empty question.

    The function raises BadInput for roles that the template can't write, such as a system prompt."""
    (frame,) = prompt_tokens([{"prompt": [{"role": "user", "content": ""}], "images": []}], processor, **template)
    written: set[tuple[str, ...]] = set()  # sequences of roles that the template has been seen to write

    def reason(row: dict[str, Any]) -> str | None:
        roles = tuple(message["role"] for message in row["prompt"])
        size = sum(len(str(message["content"]).encode()) for message in row["prompt"])
        most = size + frame * (len(row["prompt"]) + len(row["images"])) + image_tokens(row, processor)
        if roles in written and most <= limit:
            return None
        (n,) = prompt_tokens([row], processor, **template)
        written.add(roles)
        return f"{n} tokens, expected at most {limit} ({setting})" if n > limit else None

    return reason
