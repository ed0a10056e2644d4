"""LoRA, gradient checkpointing and bf16: adapters are trained, saved, resumed and merged."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import coin, config, digits, sums
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3MoeConfig, Qwen3MoeForCausalLM

from models.make_digits import OUTPUT
from train_spark import SparkConfig, SparkTrainer
from training import merge
from training.vllm import SparkGeneration

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def trainer(folder, processor):
    return SparkTrainer(
        str(OUTPUT),
        args=config(SparkConfig, folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.01),
        train_dataset=digits(16),
        processing_class=processor,
        peft_config=LoraConfig(**LORA),
    )


def sent_to_the_engine(model) -> dict[str, torch.Tensor]:
    engine = SparkGeneration.__new__(SparkGeneration)
    engine.model, engine._dist = model, SimpleNamespace(is_fsdp=False, is_zero3=False, fsdp_version=None)
    return {name: weight.clone() for name, weight in engine._iter_named_params()}


def test_an_adapter_is_saved_resumed_and_merged(tmp_path, processor, monkeypatch, capsys):
    whole = trainer(tmp_path / "whole", processor)
    base = {name: p.clone() for name, p in whole.model.named_parameters() if "lora" not in name}
    whole.train()
    steps = [h for h in whole.state.log_history if "loss" in h]
    assert all(h["recycle/rows"] > 0 for h in steps)
    for name, parameter in whole.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert any(w.abs().max() > 0 for name, w in saved.items() if "lora_B" in name)

    resumed = trainer(tmp_path / "resumed", processor)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = load_file(tmp_path / "resumed" / "checkpoint-4" / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    for name, weight in saved.items():
        assert torch.equal(weight, again[name]), name

    whole.save_model(str(tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", ["merge.py", str(tmp_path / "run")])
    merge.main()
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    start = Qwen2_5_VLForConditionalGeneration.from_pretrained(OUTPUT, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "run")
    ids = torch.arange(8, 40)[None]
    expected = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=0.1, rtol=0)  # stored in bf16, as the base
    assert (start(input_ids=ids).logits - expected).abs().max() > 0.3
    assert (tmp_path / "run" / "merged" / "tokenizer.json").is_file()


def test_an_adapter_beside_the_one_of_its_reference_is_resumed(tmp_path, processor, text_model):
    """With beta and a model that has its adapter already, TRL adds a second one, whose folder Trainer takes for all."""

    def trained(folder, checkpoint=None):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(text_model), LoraConfig(**LORA, init_lora_weights="gaussian"))
        arguments = config(SparkConfig, folder, beta=0.05, max_steps=4, save_strategy="steps", save_steps=2)
        run = SparkTrainer(model, coin, arguments, train_dataset=sums(16), processing_class=processor.tokenizer)
        run.train(resume_from_checkpoint=checkpoint)
        assert run.model.active_adapters == ["default"]
        return {name: p.clone() for name, p in run.model.named_parameters() if "lora" in name}

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert any(".ref." in name for name in whole) and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_merging_what_is_no_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merge.py", str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        merge.main()
    assert exited.value.code == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_gradient_checkpointing_changes_memory_and_nothing_else(tmp_path, processor):
    runs = []
    for checkpointing in (False, True):
        run = SparkTrainer(
            str(OUTPUT),
            args=config(SparkConfig, tmp_path, max_steps=2, gradient_checkpointing=checkpointing),
            train_dataset=digits(12),
            processing_class=processor,
        )
        run.train()
        runs.append(run)
    losses = [[h["loss"] for h in run.state.log_history if "loss" in h] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for (name, a), (_, b) in zip(runs[0].model.named_parameters(), runs[1].model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=name)


def test_bf16(tmp_path, processor):
    run = SparkTrainer(
        str(OUTPUT),
        args=config(SparkConfig, tmp_path, max_steps=2, bf16=True),
        train_dataset=digits(12),
        processing_class=processor,
    )
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    steps = [h for h in run.state.log_history if "loss" in h]
    assert len(steps) == 2 and all(h["recycle/rows"] > 0 for h in steps)
    assert any(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_weights_for_the_engine_have_the_adapter_and_the_base_stays_as_it_was(dora, text_model):
    """In bfloat16, where merging an adapter and taking it out again would round the base a little at every step."""
    settings = LoraConfig(**LORA, use_dora=dora, modules_to_save=["lm_head"] if not dora else None)
    model = get_peft_model(copy.deepcopy(text_model).to(torch.bfloat16), settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        sent = sent_to_the_engine(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert sent.keys() >= {name for name in merged if "lm_head" not in name}
    for name, weight in sent.items():
        assert torch.equal(weight, merged[name]), name
    assert not torch.equal(sent["model.layers.0.mlp.up_proj.weight"], text_model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("experts", ["all-linear", "named"])
def test_the_engine_gets_every_weight_of_adapted_experts(experts):
    """PEFT wraps the one module of all experts once for each of its weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    mixture = Qwen3MoeConfig(vocab_size=100, num_experts=4, num_experts_per_tok=2, **shape, **heads)
    named = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    targets = named if experts == "named" else {"target_modules": "all-linear"}
    model = get_peft_model(Qwen3MoeForCausalLM(mixture), LoraConfig(r=2, lora_alpha=8, **targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sent = sent_to_the_engine(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in before.items()}
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert sent.keys() == merged.keys()
    for name, weight in sent.items():
        assert torch.equal(weight, merged[name]), name
    for weight in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{weight}"
        assert not torch.equal(sent[name], plain[name])


def test_what_is_frozen_is_not_trained(tmp_path, processor):
    def every_other(completions, **_):
        return [float(i % 2) for i in range(len(completions))]

    def trainer(prefixes, **more):
        args = config(SparkConfig, tmp_path, max_steps=2, freeze_prefix=prefixes, gradient_checkpointing=True)
        data = {"train_dataset": digits(16), "processing_class": processor}
        return SparkTrainer(str(OUTPUT), every_other, args, **data, **more)

    run = trainer(["visual", "model.language_model.layers.0."])
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    frozen = ("model.visual.", "model.language_model.layers.0.")
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("model.visual.") for name in before)
    assert moved and not any(name.startswith(frozen) for name in moved)
    assert moved == {name for name in before if not name.startswith(frozen)}

    with pytest.raises(ValueError, match="freeze_prefix: expected what a parameter's name starts with, got vision"):
        trainer(["vision"])
    with pytest.raises(ValueError, match="freeze_prefix: expected none beside an adapter"):
        trainer(["visual"], peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="leave nothing to train"):
        trainer(["visual", "language_model"])
