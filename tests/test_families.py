"""Two real steps with recycling for each family of models: their own classes and processors, random weights."""

import copy

import pytest
import torch
from helpers import coin, config, digits, sums, weights
from PIL import Image
from transformers import (
    Gemma3ForCausalLM,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GenerationConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from data.images import reference
from engines import Request, Sampling, TransformersEngine, complete
from train_spark import SparkConfig, SparkTrainer

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = WIDTH | {"num_key_value_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def text_config(config_class, tokenizer):
    return config_class(
        **TEXT,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (Qwen2ForCausalLM, Qwen2Config),  # Qwen2.5 too
        (Qwen3ForCausalLM, Qwen3Config),
        (LlamaForCausalLM, LlamaConfig),
        (Gemma3ForCausalLM, Gemma3TextConfig),
    ],
)
def test_text(model_class, config_class, tmp_path, processor):
    torch.manual_seed(0)
    model = model_class(text_config(config_class, processor.tokenizer))
    two_steps(model, processor.tokenizer, sums(12), tmp_path)


def qwen_vl(processor, config_class, model_class, processor_class, **vision):
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    text = text_config(Qwen2Config, tokenizer).to_dict() | {"rope_parameters": rope}
    text.pop("model_type")
    model = model_class(
        config_class(
            text_config=text,
            vision_config={
                "depth": 2,
                "num_heads": 2,
                "patch_size": processor.image_processor.patch_size,
                "spatial_merge_size": processor.image_processor.merge_size,
                **vision,
            },
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        )
    )
    videos = processor.video_processor if processor_class is Qwen2VLProcessor else Qwen3VLVideoProcessor()
    made = processor_class(processor.image_processor, tokenizer, videos, chat_template=processor.chat_template)
    return model, made


def qwen2_vl(processor):
    return qwen_vl(
        processor, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, embed_dim=32, hidden_size=32
    )


def qwen3_vl(processor):
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64}
    return qwen_vl(
        processor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        deepstack_visual_indexes=[0],
        **sizes,
    )


def idefics3(processor):  # SmolVLM is the same with another processor
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<image>", "<fake_token_around_image>", "<global-img>"], special_tokens=True)
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    images.do_image_splitting = False
    template = CHAT.replace("IMAGE", "<image>")
    made = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=text_config(LlamaConfig, tokenizer),
            vision_config=VISION | {"image_size": 32, "patch_size": 8},
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, made


def internvl(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    made = InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=text_config(Qwen2Config, tokenizer),
            vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
            image_token_id=tokenizer.context_image_token_id,
            image_seq_length=4,
        )
    )
    return model, made


@pytest.mark.parametrize("family", [qwen2_vl, qwen3_vl, idefics3, internvl])  # Qwen2.5-VL: every other test
def test_vision(family, tmp_path, processor):
    torch.manual_seed(0)
    model, made = family(processor)
    two_steps(model, made, digits(12, {"sum"}), tmp_path)


PARTS_ALONE = """\
{%- for message in messages -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endfor -%}"""  # as Idefics3's published one: of contents that are plain text it writes nothing


def gemma3(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    for name, token in (("image", "<image_soft_token>"), ("boi", "<start_of_image>"), ("eoi", "<end_of_image>")):
        tokenizer.add_tokens([token], special_tokens=True)
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    template = CHAT.replace("IMAGE", "<start_of_image>")
    return None, Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


@pytest.mark.parametrize("family", [idefics3, internvl, gemma3])
def test_evaluation_asks_about_texts_and_images_together(family, processor):
    made = family(processor)[1]
    made.chat_template = PARTS_ALONE.replace("IMAGE", made.chat_template.split("'image' %}")[1].split("{%")[0])
    seen = {}

    class Sees(torch.nn.Module):
        device, generation_config = torch.device("cpu"), GenerationConfig()

        def generate(self, **inputs):
            seen.update(inputs)
            return torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], dim=1)

    red, blue = (reference(Image.new("RGB", (32, 32), colour)) for colour in ("red", "blue"))
    asked = [("What is 1+1?", ()), ("Which colour?", (red,)), ("The same?", (red, blue))]
    requests = [Request([{"role": "user", "content": text}], images) for text, images in asked]
    complete(TransformersEngine(Sees(), made), requests, Sampling(max_tokens=1))
    texts = made.batch_decode(seen["input_ids"], skip_special_tokens=True)
    assert {text for text, _ in asked} == {next(t for t, _ in asked if t in text) for text in texts}
    pixels = [value for name, value in seen.items() if "pixel_values" in name]
    assert len(pixels) == 1 and pixels[0].numel() > 0


def two_steps(model, processor, data, folder):
    before = copy.deepcopy(model.state_dict())
    trainer = SparkTrainer(
        model,
        reward_funcs=coin,
        args=config(SparkConfig, folder, max_steps=2),
        train_dataset=data,
        processing_class=processor,
    )
    trainer.train()
    steps = [h for h in trainer.state.log_history if "loss" in h]
    assert len(steps) == 2
    assert all(h["recycle/rows"] > 0 and h["grad_norm"] > 0 for h in steps)
    for name, weight in weights(trainer).items():
        assert weight.isfinite().all(), name
    parts = [name for name in before if not torch.equal(before[name], trainer.model.state_dict()[name])]
    assert any("layers" in name for name in parts)
    assert any("visual" in n or "vision" in n for n in parts) or "images" not in data.column_names
