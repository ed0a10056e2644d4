"""Rollouts by a real colocated vLLM engine, on the CPU: text and images, weights that change, one request a group."""

import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import concatenate_datasets
from helpers import coin, config, digits, history
from peft import LoraConfig, get_peft_model
from test_families import TEXT, idefics3
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import selective_log_softmax

import train_spark
from data.rows import BadInput
from models.make_digits import OUTPUT
from recycle import recycle
from train_spark import SparkConfig, SparkTrainer
from training.vllm import SparkGeneration, placeholders


@pytest.fixture(scope="module")
def engine():
    """TRL's engine on the CPU, as precise as the trainer: what still differs is weights, or a prompt read otherwise."""
    from trl.generation import vllm_generation

    settings = {"dtype": "float32", "enforce_eager": True}  # compiling takes a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **settings))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield {"use_vllm": True, "vllm_gpu_memory_utilization": 0.3}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, processor, engine):
    """A SparkTrainer on the shipped model; the engine takes half a minute to start, so it serves most tests here."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return SparkTrainer(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(OUTPUT, dtype=torch.float32),
        args=config(
            SparkConfig,
            tmp_path_factory.mktemp("vllm"),
            max_prompt_length=256,
            max_completion_length=48,
            learning_rate=1e-4,
            log_completions=True,
            num_completions_to_print=0,
            **engine,
        ),
        train_dataset=concatenate_datasets([digits(8, {"sum"}), digits(8, {"plus"})]),
        processing_class=processor,
    )


@pytest.fixture
def asked(trainer, monkeypatch):
    """What the engine is asked, and how often it is given weights."""
    calls = {"requests": [], "syncs": 0}
    generate, sync = trainer.vllm_generation.llm.generate, trainer.vllm_generation.sync_weights

    def counted_generate(prompts, sampling_params, **kwargs):
        calls["requests"].append((prompts, sampling_params.n))
        return generate(prompts, sampling_params=sampling_params, **kwargs)

    def counted_sync():
        calls["syncs"] += 1
        sync()

    monkeypatch.setattr(trainer.vllm_generation.llm, "generate", counted_generate)
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", counted_sync)
    return calls


def test_steps_with_images_and_text(trainer, asked):
    assert isinstance(trainer.vllm_generation, SparkGeneration)
    trainer.train()
    logs = history(trainer)
    assert len(logs) == 3
    assert asked["syncs"] == 3  # once a step, for the policy and the recycled prompts
    assert len(asked["requests"]) == 6
    for policy, recycled in zip(asked["requests"][::2], asked["requests"][1::2], strict=True):
        assert policy[1] == recycled[1] == 4
        assert len(policy[0]) == 4  # 16 rows, 4 groups
        assert 1 <= len(recycled[0]) <= 4
    for h in logs:
        assert h["recycle/items"] > 0
        assert h["sampling/sampling_logp_difference/mean"] < 1e-5  # else other weights, or an image read otherwise


def conversation(row):
    parts = [{"type": "image", "image": image} for image in row["images"] or []]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": row["prompt"][-1]["content"]}]}]


def greedy(trainer, conversations):
    """Token ids by the engine, and their log-probabilities."""
    generation = trainer.vllm_generation
    prompts, images, _ = trainer._tokenize_prompts(conversations)
    generation.temperature, before = 0.0, generation.temperature
    try:
        _, tokens, logprobs, _ = generation.generate(prompts, images, 1)
    finally:
        generation.temperature = before
    return tokens, [[lp[0] for lp in row] for row in logprobs]


def trainers_logprobs(trainer, conversations, tokens):
    model, processor = trainer.model.eval(), trainer.processing_class
    rows = []
    for conversation, ids in zip(conversations, tokens, strict=True):
        inputs = processor.apply_chat_template(
            [conversation], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        completion = torch.tensor([ids])
        extended = {
            "input_ids": torch.cat([inputs["input_ids"], completion], 1),
            "attention_mask": torch.ones(1, inputs["input_ids"].size(1) + len(ids), dtype=torch.long),
            "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(completion)], 1),
        }
        with torch.no_grad():
            logits = model(**{**inputs, **extended}).logits[:, -len(ids) - 1 : -1]
        rows.append((selective_log_softmax(logits, completion)[0].tolist(), logits.argmax(-1)[0].tolist()))
    return rows


@pytest.mark.parametrize(
    ("part", "noise"),
    [
        ("model.visual", 3.0),
        ("model.language_model", 0.3),
        ("model.language_model.embed_tokens", 0.3),
        ("adapter", 0.03),
    ],
)
def test_the_engine_follows_the_trainers_weights(part, noise, trainer, monkeypatch):
    """New weights of the vision tower count too for images that the engine has seen before; an adapter goes merged."""
    rows = [*digits(4, {"sum"})] if part == "model.visual" else [*digits(2, {"sum"}), *digits(2, {"plus"})]
    conversations = [conversation(row) for row in rows]
    trainer.vllm_generation.sync_weights()
    old_logprobs = greedy(trainer, conversations)[1]

    start = copy.deepcopy(trainer.model.state_dict())
    own = trainer.model
    if part == "adapter":
        fresh = type(own).from_pretrained(OUTPUT, dtype=torch.float32)
        adapted = get_peft_model(fresh, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
        monkeypatch.setattr(trainer, "model", adapted)
        monkeypatch.setattr(trainer.vllm_generation, "model", adapted)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.startswith(part):
                parameter += noise * parameter.abs().mean() * torch.randn_like(parameter)
            elif "lora_B" in name:  # zero at the start
                parameter += noise * torch.randn_like(parameter)
    try:
        assert greedy(trainer, conversations)[1] == old_logprobs  # not yet
        trainer.vllm_generation.sync_weights()
        tokens, logprobs = greedy(trainer, conversations)
        new_weights = trainers_logprobs(trainer, conversations, tokens)
    finally:
        monkeypatch.undo()
        own.load_state_dict(start)
        trainer.vllm_generation.sync_weights()
    old_weights = trainers_logprobs(trainer, conversations, tokens)

    def distance(trainers):
        pairs = [pair for a, (b, _) in zip(logprobs, trainers, strict=True) for pair in zip(a, b, strict=True)]
        return sum(abs(a - b) for a, b in pairs) / len(pairs)

    same = [a == b for a, (_, best) in zip(tokens, new_weights, strict=True) for a, b in zip(a, best, strict=True)]
    assert distance(new_weights) < 1e-5
    assert distance(old_weights) > 1e-3
    assert all(same)  # greedy


@pytest.mark.parametrize(("written", "added"), [("<s>Hello", False), ("Hello", True)])
def test_a_bos_that_the_template_wrote_is_not_written_twice(written, added):
    class Processor:
        bos_token = "<s>"

        def apply_chat_template(self, prompts, **settings):
            return [written] * len(prompts)

        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[add_special_tokens]] * len(texts)}

    processor = Processor()
    processor.tokenizer = processor
    trainer = SimpleNamespace(processing_class=processor, tools=None, chat_template=None, chat_template_kwargs={})
    assert placeholders(trainer, [[{"role": "user", "content": "Hello"}]]) == [[added]]


def test_an_image_that_the_engine_reads_otherwise_is_refused(trainer, monkeypatch):
    image_processor = trainer.processing_class.image_processor
    monkeypatch.setattr(image_processor, "size", {"shortest_edge": 28**2 * 16, "longest_edge": 28**2 * 16})
    with pytest.raises(BadInput, match=r"vLLM read \d+ prompt tokens where the trainer has \d+"):
        trainer._generate([conversation(row) for row in digits(4, {"sum"}) for _ in range(4)])


def test_no_rollout_makes_up_an_image(trainer, monkeypatch):
    """The forward pass would look for an image behind the token; here all rollouts would be nothing but such tokens."""
    image_token = trainer.model.config.image_token_id
    head = trainer.model.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head[image_token] = 50 * head[trainer.processing_class.tokenizer.eos_token_id]
    try:
        trainer.vllm_generation.sync_weights()
        trainer.model.train()
        batch = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(4)][:16])
        assert not (batch["completion_ids"] == image_token).any()
    finally:
        with torch.no_grad():
            head.copy_(before)
        trainer.vllm_generation.sync_weights()


def test_a_group_is_one_request_and_rows_keep_their_place(trainer, asked):
    rows = digits(4, {"plus"})
    conversations = [conversation(row) for row in rows]
    prompts, images, _ = trainer._tokenize_prompts([c for c in conversations for _ in range(4)])
    returned, tokens, logprobs, _ = trainer.vllm_generation.generate(prompts, images, 4)
    assert returned == prompts
    assert len(tokens) == len(logprobs) == 16
    ((requests, n),) = asked["requests"]
    assert (len(requests), n) == (4, 4)
    assert any(len({tuple(t) for t in tokens[i : i + 4]}) > 1 for i in range(0, 16, 4))  # four samples, not one
    trainer.vllm_generation.generate(prompts[:6], None, 4)  # a group that goes on in another process
    assert (len(asked["requests"][1][0]), asked["requests"][1][1]) == (6, 1)


def test_what_does_not_fit_is_skipped_and_counted(trainer, monkeypatch):
    assert trainer.vllm_generation.llm.llm_engine.model_config.max_model_len == 256 + 3 * 48 + 512
    monkeypatch.setattr(trainer, "_longest_prompt", trainer._longest_instruction + 60)  # text fits, images do not
    recycled = []

    def recording(*args):
        recycled.append(recycle(*args))
        return recycled[-1]

    monkeypatch.setattr(train_spark, "recycle", recording)
    trainer.model.train()
    batch = [row for row in trainer.train_dataset for _ in range(4)]
    trainer._generate_and_score_completions(batch)
    ((items, counts),) = recycled
    assert counts.skipped["overlong"] > 0
    assert items
    lengths = trainer._tokenize_prompts([item.prompt for item in items])[0]
    assert max(map(len, lengths)) <= trainer._longest_prompt


def test_another_family(tmp_path, processor, engine):
    """Idefics3 (SmolVLM): the engine marks an image by more tokens than its placeholder. Last: its engine ends the
    other one's process groups."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_families.TEXT", TEXT | {"hidden_size": 64, "head_dim": 32})  # the least that vLLM takes
        model, own_processor = idefics3(processor)
    model.save_pretrained(tmp_path / "model")
    own_processor.save_pretrained(tmp_path / "model")
    trainer = SparkTrainer(
        type(model).from_pretrained(tmp_path / "model", dtype=torch.float32),
        reward_funcs=coin,
        args=config(SparkConfig, tmp_path, max_steps=2, max_prompt_length=256, max_completion_length=16, **engine),
        train_dataset=digits(12, {"sum"}),
        processing_class=own_processor,
    )
    trainer.train()
    for h in history(trainer):
        assert h["recycle/items"] > 0
        # Image tokens are never sampled; random weights give one as much as any other of the 980 tokens.
        assert h["sampling/sampling_logp_difference/max"] < 0.003
        assert h["recycle/sampling/sampling_logp_difference/max"] < 0.003


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_drops_the_images_that_the_old_weights_encoded(status, processor, monkeypatch):
    """vLLM answers that with an empty body."""
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: asked.append("weights"))
    asked = []
    generation = object.__new__(SparkGeneration)
    generation.mode, generation.processing_class = "server", processor
    generation.accelerator = SimpleNamespace(is_main_process=True)
    answer = SimpleNamespace(status_code=status, text="")
    session = SimpleNamespace(post=lambda url: asked.append(url) or answer)
    generation.vllm_client = SimpleNamespace(base_url="http://x", session=session)
    with nullcontext() if status == 200 else pytest.raises(RuntimeError, match="reset_encoder_cache: answered 404"):
        generation.sync_weights()
    assert asked == ["weights", "http://x/reset_encoder_cache"]
    generation.processing_class = processor.tokenizer  # a text model has none
    generation.sync_weights()
    assert asked[2:] == ["weights"]
