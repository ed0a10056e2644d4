"""SparkTrainer on TRL's real trainer and the real Qwen2.5-VL classes."""

import copy
import functools
import json
import math
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from types import MethodType, SimpleNamespace

import PIL.Image
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset, Image, List
from helpers import IMAGE_KINDS, TEXT_KINDS, coin, config, digits, history, mixed, save_text_model, sums, weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

import train_spark
import verify
from data.rows import BadInput
from prompts import neutralise
from recycle import Counts, Group, Item, RecycleConfig, Response, Rollout, recycle
from train_spark import SparkConfig, SparkTrainer
from training import settings
from training.batch import cut_pass, join, merge_images, share_images
from training.checkpoint import last_checkpoint
from training.images import each_image_once, processed_once
from training.metrics import judge_metrics, policy_metrics, recycling_metrics
from training.passes import cuts, plan_passes
from training.rewards import JudgingRewards, load_rewards
from training.settings import check_alike


@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
def test_recycle_ratio_0_is_grpo_bit_for_bit(kind, tmp_path, processor, text_model, vision_model):
    """Same losses and same weights after three steps."""
    if kind == "text":
        model, data, processing, reward = text_model, sums(12), processor.tokenizer, coin
    else:
        data = digits(12, IMAGE_KINDS) if kind == "image" else mixed(12)
        model, processing, reward = vision_model, processor, verify.answer_reward
    runs = []
    for trainer_class, config_class, extra in (
        (GRPOTrainer, GRPOConfig, {}),
        (SparkTrainer, SparkConfig, {"recycle_ratio": 0.0}),
    ):
        if kind == "mixed" and trainer_class is GRPOTrainer:
            trainer_class = _MixedGRPOTrainer
        trainer = trainer_class(
            copy.deepcopy(model),
            reward_funcs=reward,
            args=config(config_class, tmp_path, **extra),
            train_dataset=data,
            processing_class=processing,
        )
        trainer.train()
        runs.append(([h["loss"] for h in trainer.state.log_history if "loss" in h], weights(trainer)))
    (grpo_losses, grpo_weights), (spark_losses, spark_weights) = runs
    assert len(grpo_losses) == 3
    assert any(loss != 0 for loss in grpo_losses)
    assert grpo_losses == spark_losses
    for name, weight in grpo_weights.items():
        assert torch.equal(weight, spark_weights[name]), name
    assert any(not torch.equal(w, dict(model.named_parameters())[n]) for n, w in grpo_weights.items())


class _MixedGRPOTrainer(GRPOTrainer):
    """TRL 1.16 itself refuses a batch with and without images; this is the least that lets it through."""

    def _generate(self, prompts):
        *generated, images, tool_images = super()._generate(prompts)
        return *generated, images and [own or [] for own in images], tool_images


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_five_steps_train_every_task(kind, tmp_path, processor, text_model, vision_model):
    if kind == "text":
        model, data, processing, reward = text_model, sums(20), processor.tokenizer, coin
    else:
        model, data, processing, reward = vision_model, mixed(20), processor, verify.answer_reward
    before = copy.deepcopy(model.state_dict())
    trainer = SparkTrainer(
        model,
        reward_funcs=reward,
        args=config(SparkConfig, tmp_path, max_steps=5, log_completions=True, num_completions_to_print=0),
        train_dataset=data,
        processing_class=processing,
    )
    trainer.train()
    logs = history(trainer)
    assert len(logs) == trainer.state.global_step == 5
    assert all(math.isfinite(h["loss"]) and h["grad_norm"] > 0 for h in logs)
    assert sum(h["recycle/items"] for h in logs) >= 15
    for h in logs:
        assert h["recycle/rows"] == 4 * h["recycle/items"]
        assert h["rewards/" + reward.__name__ + "/mean"] == pytest.approx(h["policy/accuracy"])  # TRL's names: policy
    changed = [n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])]
    assert changed

    import pandas as pd

    tables = [pd.read_parquet(f) for f in sorted((tmp_path / "completions").glob("recycled_*.parquet"))]
    assert len(tables) == 5
    table = pd.concat(tables)
    assert len(table) == sum(h["recycle/rows"] for h in logs)
    assert set(table["task"]) <= {"pointwise", "pairwise", "reflection"}
    policy = pd.read_parquet(sorted((tmp_path / "completions").glob("completions_*.parquet"))[0])
    assert len(policy) == 16
    if kind == "mixed":
        assert any(len(images) for images in table["images"])


def capture_join(monkeypatch):
    """Record the batches that are joined, and the union."""
    seen = []

    def recording(first, second, pad_token_id):
        parts = (dict(first), dict(second))  # join empties them
        union = join(first, second, pad_token_id)
        seen.append((*parts, union))
        return union

    monkeypatch.setattr(train_spark, "join", recording)
    return seen


@pytest.fixture
def float64_throughout(monkeypatch):
    """Norms, RoPE and TRL's fused head cast to float32 whatever the model's type; here that word means float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("data", ["mixed", "image", "text"])
def test_union_has_the_loss_and_gradient_of_its_parts(
    loss_type, data, tmp_path, processor, vision_model, monkeypatch, float64_throughout
):
    """The joined batch against the two passes computed apart, in float64: loss and gradient within 1e-9."""
    seen = capture_join(monkeypatch)
    trainer = SparkTrainer(
        vision_model.double(),
        args=config(SparkConfig, tmp_path, loss_type=loss_type, beta=0.01),
        train_dataset={"mixed": mixed(4), "image": digits(4, IMAGE_KINDS), "text": digits(4, TEXT_KINDS)}[data],
        processing_class=processor,
    )
    trainer.ref_model.double()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(4)])
    ((policy, recycled, union),) = seen
    n_policy, n_recycled = len(policy["prompt_ids"]), len(recycled["prompt_ids"])
    assert len(union["prompt_ids"]) == n_policy + n_recycled
    assert torch.equal(union["advantages"], torch.cat([policy["advantages"], recycled["advantages"]]))
    assert policy["prompt_ids"].size(1) != recycled["prompt_ids"].size(1)  # the widths do differ, or this tests nothing
    # Rewards of the shipped model can all be equal in a group; the loss must be a real one.
    torch.manual_seed(0)
    for batch, n in ((policy, n_policy), (recycled, n_recycled)):
        batch["advantages"] = torch.randn(n, dtype=torch.float64)
    union["advantages"] = torch.cat([policy["advantages"], recycled["advantages"]])

    def loss_and_gradient(batch):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, merge_images(batch))
        loss.backward()
        gradient = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trainer.model.parameters()]
        return loss.item(), gradient

    whole, whole_gradient = loss_and_gradient(union)
    parts = []
    for batch, n in ((policy, n_policy), (recycled, n_recycled)):
        share = 1.0 if loss_type == "dapo" else n / (n_policy + n_recycled)  # means over rows weigh by rows
        loss, gradient = loss_and_gradient({**batch, "num_items_in_batch": union["num_items_in_batch"]})
        parts.append((share * loss, [share * g for g in gradient]))
    assert union["num_items_in_batch"] == union["completion_mask"].sum()
    assert abs(whole) > 1e-6
    assert whole == pytest.approx(sum(loss for loss, _ in parts), abs=1e-9)
    for got, a, b in zip(whole_gradient, parts[0][1], parts[1][1], strict=True):
        assert torch.allclose(got, a + b, atol=1e-9, rtol=0)


def test_join_pads_each_side_and_keeps_rows_apart():
    def batch(p, t, n, with_images):
        return share_images(unshared(p, t, n, with_images), list(range(n)), {})

    def unshared(p, t, n, with_images):
        made = {
            "prompt_ids": torch.full((n, p), 7),
            "prompt_mask": torch.ones(n, p, dtype=torch.long),
            "completion_ids": torch.full((n, t), 9),
            "completion_mask": torch.ones(n, t, dtype=torch.long),
            "advantages": torch.arange(float(n)),
            "num_items_in_batch": torch.tensor(n * t),
            "old_per_token_logps": torch.full((n, t), -1.0),
        }
        if with_images:
            made |= {
                "pixel_values": torch.ones(4 * n, 6),
                "image_grid_thw": torch.tensor([[1, 2, 2]] * n),
                "num_images": [1] * n,
                "mm_token_type_ids": torch.cat([torch.ones(n, p), torch.zeros(n, t)], 1).long(),
            }
        return made

    for images in ((True, False), (False, True), (True, True), (False, False)):
        union = join(batch(3, 5, 2, images[0]), batch(6, 2, 4, images[1]), pad_token_id=0)
        assert union["prompt_ids"].tolist()[0] == [0, 0, 0, 7, 7, 7]
        assert union["prompt_mask"].tolist()[0] == [0, 0, 0, 1, 1, 1]
        assert union["completion_ids"].tolist()[-1] == [9, 9, 0, 0, 0]
        assert union["completion_mask"].sum() == union["num_items_in_batch"] == 2 * 5 + 4 * 2
        assert union["old_per_token_logps"].shape == (6, 5)
        if any(images):
            assert union["num_images"] == [int(images[0])] * 2 + [int(images[1])] * 4
            assert [len(grid) for grid in union["image_grid_thw"]] == union["num_images"]
            assert [len(pixels) for pixels in union["pixel_values"]] == [4 * n for n in union["num_images"]]
            assert union["mm_token_type_ids"].shape == (6, 11)
            assert union["mm_token_type_ids"][0].tolist() == [0, 0, 0] + [int(images[0])] * 3 + [0] * 5
    with pytest.raises(KeyError, match="a_new_field"):
        join({**batch(1, 1, 1, False), "a_new_field": torch.ones(1)}, batch(1, 1, 1, False), 0)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations"), [(1, 1, 1), (4, 4, 1), (1, 3, 1), (2, 2, 2), (2, 4, 1), (4, 2, 1)]
)
def test_every_row_that_teaches_is_trained_exactly_once(
    drop, accumulation, per_generation, iterations, tmp_path, processor, text_model, monkeypatch
):
    """Whatever the numbers: the rows of the unions, `num_iterations` times each, and real optimizer steps counted."""
    unions, trained, kept_local = [], [], []
    generate, run_pass = SparkTrainer._generate_and_score_completions, SparkTrainer._pass_loss

    def rows(batch):
        masks = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        return [
            (*row[mask].tolist(), float(a)) for row, mask, a in zip(tokens, masks, batch["advantages"], strict=True)
        ]

    def generating(self, inputs):
        unions.append(generate(self, inputs))
        return dict(unions[-1])

    def running(self, model, part):
        trained.append(part)
        kept_local.append(not self.accelerator.sync_gradients)
        return run_pass(self, model, part)

    monkeypatch.setattr(SparkTrainer, "_generate_and_score_completions", generating)
    monkeypatch.setattr(SparkTrainer, "_pass_loss", running)
    settings = {"gradient_accumulation_steps": accumulation, "steps_per_generation": per_generation}
    settings |= {"num_iterations": iterations, "max_steps": 6, "per_device_train_batch_size": 12}
    trainer = SparkTrainer(
        text_model,
        reward_funcs=coin,
        args=config(SparkConfig, tmp_path, drop_zero_advantage=drop, **settings),
        train_dataset=sums(24),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(unions) == math.ceil(6 * accumulation / (per_generation * iterations))
    expected = Counter(row for union in unions for row in rows(union) if row[-1] or not drop)
    counted = Counter(row for part in trained for row in rows(part["batch"]) if row[-1] or not drop)
    assert counted == Counter({row: n * iterations for row, n in expected.items()})
    assert sum(not local for local in kept_local) == 6  # each optimizer step ends with one pass that exchanges
    if drop:
        assert (
            sum(len(rows(part["batch"])) for part in trained) < sum(len(rows(union)) for union in unions) * iterations
        )
    else:
        blocks = per_generation // math.gcd(per_generation, accumulation) * len(unions) * iterations
        assert sum(part["row_weight"] for part in trained) == pytest.approx(
            blocks * per_generation / blocks * len(unions) * iterations
        )
        assert sum(part["token_weight"] for part in trained) == pytest.approx(per_generation * len(unions) * iterations)


def test_recycled_rows_can_have_steps_of_their_own(tmp_path, processor, text_model):
    """As in the release: first the policy's rows, then the recycled ones, each kind in half of the optimizer steps."""

    def trainer(**settings):
        arguments = config(SparkConfig, tmp_path, max_steps=4, per_device_train_batch_size=4, **settings)
        return SparkTrainer(text_model, coin, arguments, train_dataset=sums(8), processing_class=processor.tokenizer)

    run = trainer(recycle_apart=True, steps_per_generation=4, drop_zero_advantage=False)
    run.train()
    kinds = [{part["recycled"] for part in passes} for passes in run._buffered_inputs]
    assert kinds == [{False}, {False}, {True}, {True}]
    for steps, accumulation in ((1, 1), (1, 2), (2, 4), (5, 2), (2, 3)):
        with pytest.raises(ValueError, match="recycle_apart: expected steps_per_generation of 2, 4"):
            trainer(recycle_apart=True, steps_per_generation=steps, gradient_accumulation_steps=accumulation)


def test_where_nothing_is_recycled_the_policy_has_all_steps(tmp_path, processor, text_model):
    settings = {"recycle_apart": True, "recycle_every": 2, "steps_per_generation": 2, "drop_zero_advantage": False}
    arguments = config(SparkConfig, tmp_path, max_steps=4, per_device_train_batch_size=8, **settings)
    trainer = SparkTrainer(text_model, coin, arguments, train_dataset=sums(8), processing_class=processor.tokenizer)
    trainer.train()
    assert [sum(len(part["batch"]["prompt_ids"]) for part in passes) for passes in trainer._buffered_inputs] == [8, 8]
    assert history(trainer)[2]["recycle/trained_share"] == 1.0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "bnpo"])
def test_apart_each_kind_has_the_loss_that_it_would_have_alone(loss_type, tmp_path, processor, text_model):
    """Of 16 policy rows and fewer, shorter or longer recycled ones: TRL divides by an even share of all tokens."""
    settings = {"recycle_apart": True, "steps_per_generation": 2, "per_device_train_batch_size": 8}
    arguments = config(SparkConfig, tmp_path, loss_type=loss_type, recycle_ratio=0.5, **settings)
    trainer = SparkTrainer(text_model, coin, arguments, train_dataset=sums(4), processing_class=processor.tokenizer)
    union = drawn_union(trainer)
    n_rows = len(union["prompt_ids"])
    micro_steps = trainer._passes(union, n_policy=16)
    for passes, rows in zip(micro_steps, (torch.arange(16), torch.arange(16, n_rows)), strict=True):
        alone = merge_images(cut_pass(union, rows))
        alone["num_items_in_batch"] = alone["completion_mask"].sum()
        loss, expected = gradient_of(trainer, alone)
        assert abs(loss) > 1e-6
        found, got = gradient_of(trainer, passes, per_generation=2)
        assert found == pytest.approx(loss, rel=1e-4)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_every_second_generation_recycles_and_its_rows_have_a_weight(tmp_path, processor, text_model, monkeypatch):
    joined = capture_join(monkeypatch)
    trainer = SparkTrainer(
        text_model,
        coin,
        config(SparkConfig, tmp_path, max_steps=4, recycle_every=2, recycle_weight=0.25),
        train_dataset=sums(16),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    assert ["recycle/rows" in logs for logs in history(trainer)] == [True, False, True, False]
    assert len(joined) == 2
    for _, recycled, union in joined:
        rewards = recycled["advantages"]  # of groups: mean 0, deviation 1, times the weight
        assert rewards.abs().max() < 0.5
        assert torch.equal(union["advantages"][16:], rewards)


def gradient_of(trainer, parts, steps=1, per_generation=None):
    """Loss and gradient of one optimizer step on these parts of a generation, which has one or `per_generation`."""
    trainer.current_gradient_accumulation_steps = steps
    trainer.args.steps_per_generation = per_generation or steps
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, parts)
    loss.backward()
    return loss.item(), [
        p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trainer.model.parameters()
    ]


def drawn_union(trainer):
    """A generation with advantages that are mostly 0, and a real loss whatever the rewards."""
    trainer.model.train()
    union = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(4)])
    torch.manual_seed(0)
    advantages = torch.randn(len(union["prompt_ids"]), dtype=torch.float64)
    union["advantages"] = advantages * (torch.rand(len(advantages)) < 0.5)
    return union


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "sapo", "vespo"])
def test_passes_have_the_gradient_of_the_union(loss_type, tmp_path, processor, vision_model, float64_throughout):
    """Cut by length, without their padding or the rows without gradient, with and without images: 1e-9 in float64."""
    trainer = SparkTrainer(
        vision_model.double(),
        args=config(SparkConfig, tmp_path, loss_type=loss_type),
        train_dataset=mixed(4),
        processing_class=processor,
    )
    union = drawn_union(trainer)
    n_rows = len(union["prompt_ids"])
    whole, expected = gradient_of(trainer, merge_images(cut_pass(union, torch.arange(n_rows))))
    assert abs(whole) > 1e-6
    budget = 16 * (union["prompt_mask"][:16].sum(1).max() + union["completion_mask"][:16].sum(1).max())
    for drop in (False, True):
        trainer._drop_rows = drop
        (passes,) = trainer._passes(union, n_policy=16)
        batches = [part["batch"] for part in passes]
        assert len(batches) >= 2
        for batch in batches:
            assert (
                batch["prompt_ids"].size(0) * (batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)) <= budget
            )
        trained = sum(len(batch["prompt_ids"]) for batch in batches)
        assert trained == (int((union["advantages"] != 0).sum()) if drop else n_rows)
        loss, got = gradient_of(trainer, passes)
        assert loss == pytest.approx(whole, abs=1e-9)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "bnpo"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_an_entropy_bonus_weighs_every_token_alike(loss_type, ratio, tmp_path, processor, text_model):
    """Also where passes differ in size: the bonus alone, against its gradient on all rows at once."""
    trainer = SparkTrainer(
        text_model,
        coin,
        config(SparkConfig, tmp_path, loss_type=loss_type, entropy_coef=0.5, recycle_ratio=1.0),
        train_dataset=sums(4),
        processing_class=processor.tokenizer,
    )
    union = drawn_union(trainer)
    union["advantages"].zero_()
    union["completion_mask"][3, 2:] = 0  # rows of very different lengths
    if not ratio:
        union = cut_pass(union, torch.arange(16))
        union["num_items_in_batch"] = union["completion_mask"].sum()
    whole, expected = gradient_of(trainer, cut_pass(union, torch.arange(len(union["prompt_ids"]))))
    trainer.args.per_device_train_batch_size = 5  # cuts the policy's rows, too
    (passes,) = trainer._passes(union, n_policy=16)
    assert len({len(part["batch"]["prompt_ids"]) for part in passes}) > 1
    loss, got = gradient_of(trainer, passes)
    assert abs(whole) > 1e-3
    assert loss == pytest.approx(whole, rel=1e-4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="entropy_coef: expected 0 with loss_type grpo"):
        config(SparkConfig, tmp_path, loss_type="grpo", entropy_coef=0.5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "cispo"])
def test_an_auxiliary_loss_counts_once_however_the_rows_are_cut(loss_type, tmp_path, processor):
    """A mixture of experts whose router knows no difference has the same auxiliary loss on any rows."""
    tokenizer = processor.tokenizer
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.5,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    arguments = config(SparkConfig, tmp_path, loss_type=loss_type, temperature=1.0)
    trainer = SparkTrainer(model, coin, arguments, train_dataset=sums(4), processing_class=tokenizer)
    union = drawn_union(trainer)
    union["advantages"].zero_()
    union["completion_mask"][3, 2:] = 0
    whole, _ = gradient_of(trainer, cut_pass(union, torch.arange(len(union["prompt_ids"]))))
    trainer.args.per_device_train_batch_size = 5
    (passes,) = trainer._passes(union, n_policy=16)
    assert len({len(part["batch"]["prompt_ids"]) for part in passes}) > 1
    loss, _ = gradient_of(trainer, passes)
    assert loss == pytest.approx(whole, rel=1e-5)
    assert whole == pytest.approx(0.5 * 2, rel=1e-3)  # the coefficient, times experts a token


def test_dropping_rows_is_refused_where_more_than_the_advantage_trains_them(tmp_path, processor, text_model):
    def trainer(**settings):
        arguments = config(SparkConfig, tmp_path, **settings)
        return SparkTrainer(
            copy.deepcopy(text_model), coin, arguments, train_dataset=sums(4), processing_class=processor.tokenizer
        )

    for terms in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ValueError, match="drop_zero_advantage: expected false"):
            trainer(drop_zero_advantage=True, **terms)
        assert not trainer(**terms)._drop_rows
    assert config(SparkConfig, tmp_path, beta=0.001).has_extra_terms  # a KL term trains every row
    assert trainer()._drop_rows
    assert not trainer(recycle_ratio=0)._drop_rows  # plain GRPO is TRL's, number for number
    assert trainer(recycle_ratio=0, drop_zero_advantage=True)._drop_rows


def test_plain_grpo_can_leave_out_rows_too_where_some_have_images(tmp_path, processor, vision_model):
    """The weights of two steps are those with every row trained on."""
    ended = []
    for drop in (False, True):
        set_seed(0)
        arguments = config(SparkConfig, tmp_path, recycle_ratio=0, drop_zero_advantage=drop, max_steps=2)
        trainer = SparkTrainer(
            copy.deepcopy(vision_model), coin, arguments, train_dataset=mixed(8), processing_class=processor
        )
        trainer.train()
        ended.append(weights(trainer))
    assert all("recycle/trained_share" in logs for logs in history(trainer))
    assert all(torch.allclose(ended[0][name], ended[1][name], atol=2e-5) for name in ended[0])


def test_trl_names_mean_the_policy(tmp_path, processor, vision_model):
    """A first step's metrics under TRL's names are plain GRPO's, whatever was recycled beside; those have their own."""
    logged = []
    for ratio in (0, 2):
        arguments = config(SparkConfig, tmp_path, recycle_ratio=ratio, beta=0.01, max_steps=1)
        trainer = SparkTrainer(
            copy.deepcopy(vision_model), args=arguments, train_dataset=digits(20), processing_class=processor
        )
        trainer.train()
        logged.append(trainer.state.log_history[0])
    plain, spark = logged
    of_the_union = {"loss", "grad_norm", "num_tokens", "step_time"}
    assert {"entropy", "kl", "clip_ratio/region_mean", "completions/mean_length", "reward"} <= plain.keys()
    for name in plain.keys() - of_the_union:
        assert spark[name] == pytest.approx(plain[name], abs=1e-6), name
    assert spark["num_tokens"] > plain["num_tokens"]
    for name in ("entropy", "completions/mean_length", "reward"):
        assert spark[f"recycle/{name}"] != pytest.approx(spark[name], abs=1e-5)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=30), st.integers(1, 2000))
def test_no_slice_of_several_rows_is_over_budget(widths, budget):
    widths.sort(key=sum, reverse=True)
    bounds = cuts(widths, budget)
    slices = [widths[a:b] for a, b in pairwise(bounds)]
    assert [width for part in slices for width in part] == widths
    areas = [len(part) * (max(p for p, _ in part) + max(t for _, t in part)) for part in slices]
    assert all(area <= budget or len(part) == 1 for area, part in zip(areas, slices, strict=True))


def plans_of_two(unions, *args, **settings):
    """plan_passes of two processes, in threads."""
    meeting, sent = Barrier(2), [None, None]

    def plan(rank):
        def everyone(local):
            sent[rank] = local
            meeting.wait()
            tensors = torch.stack(sent)
            meeting.wait()
            return tensors

        return plan_passes(unions[rank], *args, everyone=everyone, **settings)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(plan, range(2)))


def test_all_processes_make_as_many_passes_of_as_many_rows():
    """Two processes in threads, of which one has nearly all rows that teach and the other the long ones."""
    unions = []
    for teaching, length in ((8, 3), (1, 9)):
        masks = {"prompt_mask": torch.ones(24, 6), "completion_mask": torch.ones(24, length)}
        advantages = torch.tensor([1.0] * teaching + [0.0] * (24 - teaching))
        unions.append({"prompt_ids": torch.ones(24, 6), **masks, "advantages": advantages})
    plans = plans_of_two(unions, 12, micro_steps=6, blocks=3, budget=40, drop=True)
    shapes = [[[(len(p.rows), p.recycled) for p in passes] for passes in plan] for plan in plans]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 6
    assert all(shapes[0][i] for i in (1, 3, 5))  # the last micro-step of each block exchanges gradients
    for fill, empty in ((False, 4), (True, 0)):
        few = plan_passes(unions[1], 24, micro_steps=6, blocks=2, budget=400, drop=True, fill=fill)
        assert sum(not passes for passes in few) == empty
        assert sum(p.row_weight for passes in few for p in passes) == pytest.approx(3 / 12)  # one row of a block's 12
    for union, passes in zip(unions, plans, strict=True):
        rows = torch.cat([p.rows for micro_step in passes for p in micro_step])
        assert len(rows.unique()) == len(rows) < 24
        assert set(union["advantages"].nonzero().flatten().tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("recycles", [True, False])
def test_evaluation_measures_the_judge_and_changes_nothing_in_training(
    recycles, tmp_path, processor, text_model, monkeypatch
):
    """Two steps with an evaluation after the first one end with the weights of two steps without."""
    unions = capture_join(monkeypatch)
    ended = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        set_seed(0)
        trainer = SparkTrainer(
            copy.deepcopy(text_model),
            reward_funcs=coin,
            args=config(
                SparkConfig,
                tmp_path,
                per_device_eval_batch_size=16,
                max_steps=2,
                recycle_in_evaluation=recycles,
                **evaluation,
            ),
            train_dataset=sums(8),
            eval_dataset=sums(6),
            processing_class=processor.tokenizer,
        )
        trainer.train()
        ended.append(weights(trainer))
    assert len(unions) == 4  # the batches of training alone
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    measured = [logs for logs in trainer.state.log_history if "eval_policy/accuracy" in logs]
    assert len(measured) == 2
    names = {name for logs in measured for name in logs}
    judged = {"eval_judge/pointwise/accuracy", "eval_judge/pairwise/accuracy", "eval_reflection/fix_rate"}
    assert judged <= names if recycles else not any("judge" in name or "recycle" in name for name in names)
    trained = {name for logs in history(trainer) for name in logs}
    assert "judge/unparsed" in trained and not any(name.startswith("eval_") for name in trained)


def test_accuracy_of_an_evaluation_is_of_all_its_rollouts(tmp_path, processor, text_model):
    """Five questions in batches of four and one, of which the last alone is answered."""

    def last(prompts, completions, **columns):
        return [float("4+1" in prompt[-1]["content"]) for prompt in prompts]

    arguments = config(SparkConfig, tmp_path, per_device_eval_batch_size=16)
    data, tokenizer = sums(5), processor.tokenizer
    trainer = SparkTrainer(
        text_model, last, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    for _ in range(2):
        measured = trainer.evaluate()
        assert (measured["eval_policy/accuracy"], measured["eval_policy/pass_at_g"]) == pytest.approx((0.2, 0.2))


def test_metrics_of_an_evaluation_are_of_all_its_verdicts(tmp_path, processor, text_model):
    """Not means of its batches' means: those have different numbers of items."""
    verdicts = []

    class Seen(SparkTrainer):
        def _log_judging(self, groups, asked, advantages):
            verdicts.append([r for item, r in zip(asked, self._rewards.values, strict=True) if item.task == "pairwise"])
            self._rewards.values[:] = [float(len(verdicts) == 1)] * len(asked)  # the first batch is right throughout
            verdicts[-1] = verdicts[-1] and [float(len(verdicts) == 1)] * len(verdicts[-1])
            return super()._log_judging(groups, asked, advantages)

    arguments = config(SparkConfig, tmp_path, per_device_eval_batch_size=8, recycle_pairwise_prob=1.0)
    data, tokenizer = sums(40), processor.tokenizer
    trainer = Seen(text_model, coin, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    for _ in range(2):  # nothing is left of an earlier one
        verdicts.clear()
        measured = trainer.evaluate()
        sizes = [len(batch) for batch in verdicts]
        assert len(set(sizes) - {0}) > 1 and sizes[0]
        assert measured["eval_judge/pairwise/accuracy"] == pytest.approx(sizes[0] / sum(sizes))


@pytest.mark.parametrize("drop", [None, False])
def test_metrics_of_passes_are_means_over_tokens_where_cut_off_rows_are_masked(drop, tmp_path, processor, text_model):
    """Such rows have no tokens: they make no pass where nothing is lost by it, and no pass of theirs counts."""

    class Cut(SparkTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            ended = [[20 + i] * (5 + i % 7) + [self._tokenizer.eos_token_id] for i in range(len(prompt_ids))]
            return [[30] * 24 if i % 4 else ids for i, ids in enumerate(ended)], None

    def half(prompts, completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    entropies = []
    for size, accumulation in ((16, 1), (4, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        settings |= {"mask_truncated_completions": True, "drop_zero_advantage": drop}
        arguments = config(SparkConfig, tmp_path, max_steps=1, **settings)
        tokenizer = processor.tokenizer
        trainer = Cut(copy.deepcopy(text_model), half, arguments, train_dataset=sums(16), processing_class=tokenizer)
        trainer.train()
        entropies.append(history(trainer)[0]["entropy"])
    assert entropies[1] == pytest.approx(entropies[0], rel=1e-3)
    assert 0 < entropies[0] < math.log(len(processor.tokenizer))


def test_batches_of_an_evaluation_draw_apart(tmp_path, processor, text_model):
    """Of one question each, as by default: else every batch would have the same task, label and letter."""
    items = []

    class Seen(SparkTrainer):
        def _judging(self, asked):
            items.extend((item.task, item.label) for item in asked[:: self._group_size])
            return super()._judging(asked)

    def half(prompts, completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    arguments = config(SparkConfig, tmp_path, per_device_eval_batch_size=4, recycle_source="cot")
    data, tokenizer = sums(12), processor.tokenizer
    trainer = Seen(text_model, half, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.evaluate()
    labels = Counter(label for task, label in items if task != "reflection")
    assert len(labels) == 4 and labels["A"] > 1 and labels["B"] > 1
    first = items.copy()
    items.clear()
    trainer.evaluate()
    assert items == first  # evaluations of the same weights are comparable


def test_equal_images_go_through_the_vision_tower_once(processor, vision_model):
    """Of six rows, three times one image, twice another of the same size, and a larger one: the same gradients."""
    rng = random.Random(0)
    one, two = (PIL.Image.new("L", (56, 56), rng.randrange(256)).convert("RGB") for _ in range(2))
    pictures = [one, two, one.copy(), two.resize((84, 56)), one, two]
    inputs = processor(
        text=["<|vision_start|><|image_pad|><|vision_end|>4" for _ in pictures],
        images=pictures,
        padding=True,
        return_tensors="pt",
    )
    encoded, results = [], []
    vision_model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(args[0])), with_kwargs=True
    )
    for once in (False, True):
        model = copy.deepcopy(vision_model)
        if once:
            model.model.get_image_features = MethodType(each_image_once, model.model)
            model = copy.deepcopy(model)  # a copy encodes with its own weights
        logits = model(**inputs).logits
        (logits.float() ** 2).mean().backward()
        results.append((logits, {name: weight.grad for name, weight in model.named_parameters()}))
    (before, gradients), (after, same) = results
    patches = inputs["image_grid_thw"].prod(-1).tolist()
    assert encoded == [sum(patches), patches[0] + patches[1] + patches[3]]
    assert torch.allclose(before, after, atol=1e-6)
    assert all(torch.allclose(gradients[name], same[name], atol=1e-6) for name in gradients)


def items_of(*tasks):
    """An item a task, with its label; the two responses are a right and a wrong one."""
    rollouts = (Rollout("\\boxed{2}", "2", True), Rollout("\\boxed{3}", "3", False))
    group = Group("q", [{"role": "user", "content": "1+1?"}], rollouts)
    right, wrong = Response("2", "answer", "2", True), Response("3", "answer", "3", False)
    responses = {"pairwise": (right, wrong), "reflection": (wrong,)}
    return [
        Item(task, group.prompt, label, group, responses.get(task, (right if shows_right else wrong,)))
        for task, label, shows_right in tasks
    ]


def equals_solution(prompts, completions, solution, **columns):
    assert len(prompts) == len(completions) == len(solution)
    return [None if s is None else float(c == s) for c, s in zip(completions, solution, strict=True)]


def test_judge_rows_are_scored_by_their_label_and_reflections_by_their_gold():
    def length(prompts, completions, **columns):
        return [1.0] * len(completions)

    rewards = JudgingRewards([equals_solution, length], recycling=True, correct_at=None)
    verifier, other = rewards.functions
    assert verifier.__name__ == "equals_solution"  # TRL names its metrics after it
    rows = {
        "prompts": ["p"] * 4,
        "completions": ["\\boxed{Yes}", "7", "\\boxed{A}", "8"],
        "solution": ["9", "7", "9", "7"],
        "task": ["algebra"] * 4,  # a user's own column
    }
    assert verifier(**rows) == [0.0, 1.0, 0.0, 0.0]
    assert rewards.right == [False, True, False, False]
    rewards.items = items_of(("pointwise", "Yes", True), ("reflection", None, False), ("pairwise", "B", True))
    rewards.items.append(rewards.items[1])
    assert verifier(**rows) == [1.0, 1.0, 0.0, 0.0]
    assert other(**rows) == [None, 1.0, None, 1.0]
    assert rewards.texts == rows["completions"]


def test_without_an_opinion_of_the_verifier_a_row_has_no_reward(tmp_path, processor, text_model):
    """A second reward function must not turn unscorable into wrong: the group's advantages stay 0."""

    def verifier(prompts, completions, **columns):
        return [None if i == 0 else 1.0 for i in range(len(completions))]

    def constant(prompts, completions, **columns):
        return [0.5] * len(completions)

    trainer = SparkTrainer(
        text_model,
        [verifier, constant],
        config(SparkConfig, tmp_path),
        train_dataset=sums(4),
        processing_class=processor.tokenizer,
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert batch["advantages"][:4].tolist() == [0.0] * 4
    assert trainer._rewards.right[0] is None


@pytest.mark.parametrize("recycle_ratio", [0, 1.0])
@pytest.mark.parametrize("data", ["null images", "null image", "plain text"])
def test_rows_as_others_make_them(data, recycle_ratio, tmp_path, processor, vision_model):
    """Arrow's null for no image, also where a whole batch has none, and prompts that are text."""
    rows = digits(6, IMAGE_KINDS).to_list() + digits(6, TEXT_KINDS).to_list()
    if data == "plain text":
        rows = [{"prompt": "What is 1+1?", "solution": "2"}] * 12
    elif data == "null images":
        rows = [{**row, "images": row["images"] or None} for row in rows]
    else:
        rows = [{**row, "image": row.pop("images")[0] if row["images"] else None} for row in rows]
    dataset = Dataset.from_list(rows)
    for name, feature in (("images", List(Image())), ("image", Image())):
        dataset = dataset.cast_column(name, feature) if name in dataset.column_names else dataset

    def even(prompts, completions, **columns):
        return [float(len(verify.last_text(completion)) % 2 == 0) for completion in completions]

    trainer = SparkTrainer(
        vision_model,
        reward_funcs=even,
        args=config(SparkConfig, tmp_path, recycle_ratio=recycle_ratio, shuffle_dataset=False),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()  # in order: batches with images, with some, with none
    assert len(history(trainer)) == 3


def test_merging_images_leaves_the_batch_as_it_was():
    batch = {"num_images": [1, 1], "pixel_values": torch.zeros(2, 3), "num_items_in_batch": torch.tensor(8)}
    merged = merge_images(batch)
    merged["num_items_in_batch"] = 0
    assert batch["num_items_in_batch"] == 8


def test_a_verifier_that_wants_images_gets_none_for_questions_of_text(tmp_path, processor, text_model):
    seen = []

    def reward(prompts, completions, images, **columns):
        seen.append((len(completions), images))
        return [float(i % 2) for i in range(len(completions))]

    arguments, tokenizer = config(SparkConfig, tmp_path, max_steps=1), processor.tokenizer
    SparkTrainer(text_model, reward, arguments, train_dataset=sums(8), processing_class=tokenizer).train()
    assert all(images == [[]] * n for n, images in seen) and len(seen) == 2


def test_a_verifier_that_reads_something_else_than_boxes(tmp_path, processor, text_model, monkeypatch):
    """Reflections are asked for what earns the reward, and answers are quoted as it reads them."""

    def tagged_reward(prompts, completions, **columns):
        return coin(prompts, completions)

    tagged_reward.extract = lambda text: f"tag of {len(text)}"
    tagged_reward.equal = lambda pairs: [a == b for a, b in pairs]
    trainer = SparkTrainer(
        text_model,
        tagged_reward,
        config(SparkConfig, tmp_path, recycle_source="answer", answer_mark="<answer></answer>"),
        train_dataset=sums(4),
        processing_class=processor.tokenizer,
    )
    found = []
    monkeypatch.setattr(train_spark, "recycle", lambda *args: found.append(recycle(*args)) or found[-1])
    trainer.train()
    items = [item for made, _ in found for item in made]
    assert {item.task for item in items} == {"pointwise", "pairwise", "reflection"}
    for item in items:
        text = item.prompt[-1]["content"]
        assert "tag of" in text
        assert ("<answer></answer>" in text) == (item.task == "reflection") == ("\\boxed" not in text)


def test_a_verifier_that_pays_anything_but_0_or_1_is_refused_or_has_a_threshold(tmp_path, processor, text_model):
    def pays_twenty(prompts, completions, **columns):
        return [20.0 * reward for reward in coin(prompts, completions)]

    def first_step(**settings):
        trainer = SparkTrainer(
            copy.deepcopy(text_model),
            pays_twenty,
            config(SparkConfig, tmp_path, max_steps=1, **settings),
            train_dataset=sums(4),
            processing_class=processor.tokenizer,
        )
        trainer.train()
        return history(trainer)[0]

    with pytest.raises(BadInput, match="pays_twenty gave 20, expected 0 or 1"):
        first_step()
    logs = first_step(correct_at=20.0)
    assert 0 < logs["reflection/fix_rate"] <= 1  # a rate, not a mean of rewards
    assert logs["policy/accuracy"] == pytest.approx(logs["reward"] / 20)
    assert 0 < logs["policy/accuracy"] < 1
    assert "policy/accuracy" not in first_step(recycle_ratio=0)  # plain GRPO takes any reward


def test_callable_objects_and_partials_keep_their_names_in_the_metrics(tmp_path, processor, text_model):
    class Verifier:
        def __call__(self, prompts, completions, **columns):
            return coin(prompts, completions)

    def constant(prompts, completions, value, **columns):
        return [value] * len(completions)

    functions = [Verifier(), functools.partial(constant, value=0.5)]
    arguments = config(SparkConfig, tmp_path, max_steps=1)
    trainer = SparkTrainer(
        text_model, functions, arguments, train_dataset=sums(4), processing_class=processor.tokenizer
    )
    trainer.train()
    assert {"rewards/Verifier/mean", "rewards/constant/mean"} <= history(trainer)[0].keys()


def test_a_reward_function_of_ones_own_by_its_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def longest(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    (function,) = load_rewards([f"{path}:longest"])
    assert function([None], ["a"]) == [1.0]
    assert load_rewards(None) == [verify.answer_reward]
    for wrong, expected in (
        (str(path), "expected FILE.py:NAME"),
        ("no.py:f", "expected FILE.py:NAME"),
        (f"{path}:f", "no function 'f'"),
    ):
        with pytest.raises(BadInput, match=expected):
            load_rewards([wrong])


def test_what_a_reward_function_imports_may_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("REWARD = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "from beside_it import REWARD\n\ndef f(prompts, completions, **columns):\n"
        "    return [REWARD] * len(completions)\n"
    )
    (function,) = load_rewards([f"{tmp_path}/mine.py:f"])
    assert function([None], ["a"]) == [1.0]
    (tmp_path / "mine.py").write_text("import not_to_be_found\n")
    with pytest.raises(BadInput, match=r"mine\.py: No module named 'not_to_be_found'"):
        load_rewards([f"{tmp_path}/mine.py:f"])


@pytest.mark.parametrize(
    "name, value",
    [("loss_type", "foo"), ("importance_sampling_level", "foo"), ("scale_rewards", "foo"),
     ("multi_objective_aggregation", "foo"), ("remove_unused_columns", True)],
)  # fmt: skip
def test_values_that_trl_would_find_wrong_later_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: expected "):
        config(SparkConfig, tmp_path, **{name: value})


def test_without_recycling_an_environment_brings_questions_and_rewards(tmp_path, processor, text_model, monkeypatch):
    """As with GRPOTrainer: neither a verifier nor a column `prompt` is needed."""
    seen = {}

    def init(self, model, reward_funcs, args, train_dataset, *rest, **kwargs):
        seen.update(kwargs, reward_funcs=reward_funcs, columns=train_dataset.column_names)
        raise InterruptedError

    monkeypatch.setattr(GRPOTrainer, "__init__", init)
    with pytest.raises(InterruptedError):
        SparkTrainer(
            text_model,
            args=config(SparkConfig, tmp_path, recycle_ratio=0),
            train_dataset=Dataset.from_list([{"environment": "sums"}] * 4),
            processing_class=processor.tokenizer,
            environment_factory=object,
        )
    assert (seen["reward_funcs"], seen["columns"], seen["environment_factory"]) == (None, ["environment"], object)


def test_a_pass_is_never_one_column_wide():
    """TRL's metrics would take it for values of whole rows."""
    ones = torch.ones(2, 6, dtype=torch.long)
    union = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": ones * 0}
    assert cut_pass(union, torch.tensor([0, 1]))["completion_ids"].shape == (2, 2)


def test_processes_that_found_other_rows_are_refused(monkeypatch):
    def rows(n, folder="x", solution="1"):
        columns = {"source": [f"{folder}: row {i}" for i in range(n)], "prompt": ["a"] * n, "solution": [solution] * n}
        return Dataset.from_dict(columns)

    seen = []
    monkeypatch.setattr("training.settings.PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr("training.settings.gather_object", lambda mine: [*mine, *seen, seen.append(mine[0]) or mine[0]])
    check_alike("runs/checkpoint-3", rows(3), None)
    check_alike("elsewhere/checkpoint-3", rows(3, "another/folder"), None)  # the same rows
    for other in (
        (None, rows(3), None),
        ("x/checkpoint-3", rows(2), None),
        ("x/checkpoint-3", rows(3, "x", "2"), None),
    ):
        with pytest.raises(ValueError, match="expected the same on every process; process 0 found "):
            check_alike(*other)
        seen.pop()


def test_generating_from_a_sharded_vision_tower_needs_images_everywhere(tmp_path, processor, vision_model, monkeypatch):
    arguments = config(SparkConfig, tmp_path)
    trainer = SparkTrainer(vision_model, coin, arguments, train_dataset=mixed(8), processing_class=processor)
    assert not trainer._generates_sharded
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    assert trainer._generates_sharded
    monkeypatch.setattr("training.images.gather_object", lambda mine: [*mine, not mine[0]])
    with pytest.raises(BadInput, match="use_vllm: expected true under FSDP"):
        trainer._generate_and_score_completions([mixed(8)[0]] * 4)


def test_an_evaluation_sends_the_engine_the_weights_once(tmp_path, processor, text_model, monkeypatch):
    awake, slept = [], []
    arguments = config(SparkConfig, tmp_path, per_device_eval_batch_size=8, vllm_importance_sampling_correction=False)
    data, tokenizer = sums(6), processor.tokenizer
    trainer = SparkTrainer(
        text_model, coin, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    turn = trainer._generate_single_turn

    def generate(*args, **kwargs):
        awake.append(trainer.vllm_generation.stay_awake)
        trainer.use_vllm = False
        try:
            return turn(*args, **kwargs)
        finally:
            trainer.use_vllm = True

    trainer.vllm_generation = SimpleNamespace(stay_awake=False, sleep=lambda: slept.append(len(awake)))
    monkeypatch.setattr(trainer, "_generate_single_turn", generate)
    trainer.use_vllm = True
    trainer.evaluate()
    assert len(awake) >= 3 and all(awake) and slept == [len(awake)] and not trainer.vllm_generation.stay_awake


def test_rewards_that_can_make_no_label_are_refused_while_recycling(tmp_path, processor, text_model):
    async def slow(prompts, completions, **columns):
        return [1.0] * len(completions)

    for wrong in ("some/reward-model", torch.nn.Linear(1, 1), slow):
        with pytest.raises(ValueError, match="reward models and async functions"):
            JudgingRewards([wrong], recycling=True, correct_at=None)
        assert JudgingRewards([wrong], recycling=False, correct_at=None).functions == [wrong]
    with pytest.raises(ValueError, match="reward_weights: expected a first one other than 0"):
        config(SparkConfig, tmp_path, reward_weights=[0.0, 1.0])
    assert config(SparkConfig, tmp_path, reward_weights=[0.0, 1.0], recycle_ratio=0)
    with pytest.raises(ValueError, match="environment_factory"):
        SparkTrainer(
            text_model,
            coin,
            config(SparkConfig, tmp_path),
            train_dataset=sums(4),
            processing_class=processor.tokenizer,
            environment_factory=object,
        )


def test_a_completion_that_ends_in_a_tool_call_has_no_text(monkeypatch):
    """Its last message has no content."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    completions = [
        [{"role": "assistant", "tool_calls": calls}],
        [{"role": "assistant", "content": None, "tool_calls": calls}],
        [{"role": "assistant", "content": [{"type": "text", "text": "\\boxed{2}"}]}],
    ]
    rewards = JudgingRewards([lambda prompts, completions, **columns: [0.0, 0, 1]], recycling=True, correct_at=None)
    assert rewards.functions[0](prompts=[None] * 3, completions=completions) == [0.0, 0.0, 1.0]
    assert rewards.texts == ["", "", "\\boxed{2}"]
    assert verify.answer_reward([None] * 3, completions, solution=["2"] * 3) == [0.0, 0.0, 1.0]


def test_a_model_s_own_code_runs_where_that_is_asked_for(tmp_path, processor, text_model, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = tmp_path / "mine"
    save_text_model(text_model, processor.tokenizer, folder)
    (folder / "mine_config.py").write_text(
        "from transformers import Qwen2Config\nclass MineConfig(Qwen2Config):\n    model_type = 'mine'\n"
    )
    (folder / "mine_model.py").write_text(
        "from transformers import Qwen2ForCausalLM\nfrom .mine_config import MineConfig\n"
        "class MineForCausalLM(Qwen2ForCausalLM):\n    config_class = MineConfig\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "mine_config.MineConfig", "AutoModelForCausalLM": "mine_model.MineForCausalLM"}
    settings |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(settings))
    arguments = config(SparkConfig, tmp_path / "run", trust_remote_code=True)
    tokenizer = processor.tokenizer
    trainer = SparkTrainer(str(folder), coin, arguments, train_dataset=sums(8), processing_class=tokenizer)
    assert type(trainer.model).__name__ == "MineForCausalLM"


def test_settings_are_checked_and_have_one_source(tmp_path):
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    for name in (*sizes, "max_prompt_length", "max_completion_length"):
        for wrong in (0, None):
            with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got {wrong}"):
                config(SparkConfig, tmp_path, **{name: wrong})
    with pytest.raises(ValueError, match="recycle_source"):
        SparkConfig(str(tmp_path), recycle_source="everything", bf16=False)
    defaults = SparkConfig(str(tmp_path), bf16=False)
    for name in RecycleConfig.__dataclass_fields__:
        assert getattr(defaults, name) == getattr(RecycleConfig(), name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dataset", "digits", "--no_such_flag", "1"], "no_such_flag"),
        (["--dataset", "missing.json"], "missing.json: no such file"),
        (["--dataset", "{file}", "--solution_column", "gold"], "no column 'gold'"),
        (["--dataset", "{good}", "--keep_solution"], "keep_solution: expected reward_funcs beside it"),
        (["--dataset", "{file}", "--max_prompt_length", "5"], "row 0: field prompt"),
        (["--dataset", "{image}", "--strict", "true"], "row 1: field image"),
        (["--dataset", "{gold}"], "row 0: field solution"),
        (["--dataset", "digits", "--config", "missing.yaml"], "missing.yaml"),
        (["--dataset", "digits", "--config", "{recipe}"], "recycle_ration"),
        (["--dataset", "digits", "--recycle_tasks", "judging"], "recycle_tasks"),
        (["--dataset", "digits", "--model_name_or_path", "{bare}"], "has no weights"),
        (["--dataset", "{good}", "--model_name_or_path", "{text}"], "reads text alone"),
        (["--dataset", "{good}", "--per_device_train_batch_size", "16"], "1 rows, expected at least the 2 of one"),
        (["--dataset", "digits", "--num_generations", "7"], "divisible"),
        (["--dataset", "digits", "--eval_dataset", "digits"], "eval_dataset: expected --eval_strategy"),
        (
            ["--dataset", "digits", "--use_vllm", "true", "--load_in_4bit", "true"],
            "load_in_4bit: expected use_vllm false",
        ),
        (["--dataset", "digits", "--vllm_structured_outputs_regex", "[0-9]+"], "judges write Yes, No, A or B"),
        (
            ["--dataset", "digits", "--use_transformers_continuous_batching", "true", "--eval_strategy", "steps"],
            "use_transformers_continuous_batching: expected false with an eval_strategy",
        ),
        (["--dataset", "digits", "--resume_from_checkpoint", "{other}"], "expected a checkpoint of train_spark.py"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, expected, tmp_path, processor, text_model, monkeypatch, capsys):
    files = {
        "file": [{"prompt": "What is 1+1? " * 9, "solution": "2"}],
        "image": [{"prompt": "a", "image": None, "solution": "2"}, {"prompt": "b", "image": "no.png", "solution": "2"}],
        "gold": [{"prompt": "a", "solution": ""}],
        "good": [{"prompt": "a", "image": "a.png", "solution": "2"}],
    }
    paths = {"recipe": tmp_path / "bad.yaml", "bare": tmp_path / "bare", "text": tmp_path / "text"}
    paths["other"] = tmp_path / "checkpoint-3"  # TRL's own
    paths["other"].mkdir()
    (paths["other"] / "trainer_state.json").write_text('{"global_step": 3}')
    paths["recipe"].write_text("recycle_ration: 0.5\n")
    processor.tokenizer.save_pretrained(paths["bare"])
    save_text_model(text_model, processor.tokenizer, paths["text"])
    picture = tmp_path / "a.png"
    digits(8)[0]["images"][0].save(picture)
    for name, rows in files.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(rows))
    arguments = [a.format(**paths) for a in arguments]
    common = ["--model_name_or_path", "models/digits", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    monkeypatch.setattr("sys.argv", ["train_spark.py", *common, "--bf16", "false", *arguments])
    monkeypatch.setattr(train_spark, "SparkTrainer", None)  # a model must not be loaded
    capsys.readouterr()  # the bar of save_pretrained
    with pytest.raises(SystemExit) as exited:
        train_spark.main()
    assert exited.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert expected in message


def test_several_gpus_need_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(SparkConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="2 GPUs for one process: expected accelerate launch"):
        settings.check_installation(config(SparkConfig, tmp_path), None)


@pytest.mark.parametrize(
    ("installed", "expected"),
    [("trl", "trl: expected 1.16.0, found 1.15.0"), ("vllm", "0.32.0"), ("none", "vLLM is not installed")],
)
def test_versions_are_checked(installed, expected, tmp_path, monkeypatch):
    from trl import ModelConfig, import_utils

    args = config(SparkConfig, tmp_path)
    if installed == "trl":
        monkeypatch.setattr(settings, "version", lambda name: "1.15.0")
    state = {"vllm": (True, "0.32.0"), "none": (False, None)}.get(installed, (True, "0.31.0"))
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *args, **kwargs: state)
    if installed != "trl":
        settings.check_installation(args, ModelConfig())  # without use_vllm no version of it is wrong
    args.use_vllm = True
    with pytest.raises(ValueError, match=expected):
        settings.check_installation(args, ModelConfig())


def test_a_vllm_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    server = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", "http://127.0.0.1:9"]
    recipe = ["--config", "recipes/demo.yaml", "--output_dir", str(tmp_path), "--vllm_server_timeout", "0"]
    monkeypatch.setattr("data.read.EMBEDDED_ROWS", 32)
    monkeypatch.setattr("sys.argv", ["train_spark.py", *recipe, *server])
    with pytest.raises(SystemExit) as exited:
        train_spark.main()
    assert exited.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("train_spark.py: ")
    assert "http://127.0.0.1:9" in message


@pytest.mark.parametrize(
    ("message", "raised"),
    [("The vLLM server at X does not serve Y: restart it with Z.", SystemExit), ("out of memory", RuntimeError)],
)
def test_what_a_server_turns_out_to_lack_is_one_line(message, raised, tmp_path, monkeypatch, capsys):
    def failing(self, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(SparkTrainer, "train", failing)
    monkeypatch.setattr("data.read.EMBEDDED_ROWS", 32)
    monkeypatch.setattr("sys.argv", ["train_spark.py", "--config", "recipes/demo.yaml", "--output_dir", str(tmp_path)])
    with pytest.raises(raised) as exited:
        train_spark.main()
    if raised is SystemExit:
        assert exited.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == f"train_spark.py: {message}"


def test_flash_attention_where_it_can_run(tmp_path, monkeypatch):
    args = SparkConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert settings.attention(args) is None
    monkeypatch.setattr(settings, "is_flash_attn_2_available", lambda: True)
    assert settings.attention(args) is None  # float32
    args.bf16 = True
    assert settings.attention(args) is None  # on the CPU, beside a GPU that could
    args.use_cpu = False
    for capability, expected in (((9, 0), "flash_attention_2"), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert settings.attention(args) == expected


@pytest.mark.parametrize("strict", [True, False])
def test_an_image_that_breaks_during_training(strict, tmp_path, monkeypatch, capsys):
    """Its header is whole, so that it is found when its row is used: a line that names it, which ends a strict run."""
    images = [PIL.Image.effect_noise((56, 56), 50) for _ in range(4)]
    rows = [{"prompt": f"{i}+1?", "solution": str(i + 1), "image": f"{i}.png"} for i in range(4)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
    (tmp_path / "x.json").write_text(json.dumps(rows))
    flags = {
        "dataset": tmp_path / "x.json",
        "output_dir": tmp_path / "run",
        "model_name_or_path": "models/digits",
    }
    flags |= {"per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 1, "max_completion_length": 8}
    flags |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "strict": strict}
    monkeypatch.setattr("sys.argv", ["train_spark.py", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))])
    status = 0
    try:
        train_spark.main()
    except SystemExit as ended:
        status = ended.code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "row 2" in line)
    assert "x.json: row 2: field image:" in line and "2.png can't be read as an image" in line
    assert line.endswith("another row stands in for it (1 so far)") != strict
    assert status == (2 if strict else 0)
    assert (tmp_path / "run" / "model.safetensors").exists() != strict


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("steps_per_generation", [1, 2, 4])
def test_resumed_is_uninterrupted(steps_per_generation, ratio, tmp_path, processor, vision_model):
    """Stopped after three steps of five, also within a generation: the same metrics and bitwise the same weights."""

    def trainer(folder):
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "recycle_ratio": ratio}
        settings |= {"steps_per_generation": steps_per_generation, "per_device_train_batch_size": 8}
        return SparkTrainer(
            copy.deepcopy(vision_model),
            args=config(SparkConfig, folder, **settings),
            train_dataset=mixed(16),
            processing_class=processor,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "generation" / "rank_0.safetensors").exists() == (steps_per_generation > 1)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    timed = ("seconds", "time", "runtime", "per_second")

    def metrics(run, step):
        (logged,) = (h for h in history(run) if h["step"] == step)
        return {k: v for k, v in logged.items() if not any(t in k for t in timed)}

    for step in (4, 5):
        assert metrics(resumed, step) == metrics(whole, step)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_resumed_in_a_later_epoch_it_asks_the_same_questions(tmp_path, processor, text_model):
    """TRL's sampler draws each epoch's order from where the last one left its generator."""

    def run(folder, resume=None):
        asked = []

        def seen(prompts, completions, **columns):
            asked.append([prompt[-1]["content"] for prompt in prompts[::4]])
            return coin(prompts, completions)

        arguments = config(SparkConfig, folder, max_steps=8, save_strategy="steps", save_steps=5, recycle_ratio=0.0)
        arguments.per_device_train_batch_size = arguments.generation_batch_size = 8
        model, tokenizer = copy.deepcopy(text_model), processor.tokenizer
        trainer = SparkTrainer(model, seen, arguments, train_dataset=sums(6), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return asked, weights(trainer)

    asked, ended = run(tmp_path / "whole")
    asked_on, ended_on = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-5"))
    assert sorted(asked[0] + asked[1] + asked[2]) == sorted(asked[3] + asked[4] + asked[5])  # epochs of three steps
    assert asked_on == asked[5:] and asked[:3] != asked[3:6]
    assert all(torch.equal(weight, ended_on[name]) for name, weight in ended.items())


def test_a_head_in_float32_is_resumed_in_float32(tmp_path, processor, text_model):
    model = copy.deepcopy(text_model).to(torch.bfloat16)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(processor.tokenizer), bias=False)
    model.config.tie_word_embeddings = False
    arguments = config(SparkConfig, tmp_path)
    trainer = SparkTrainer(model, coin, arguments, train_dataset=sums(8), processing_class=processor.tokenizer)
    head = model.lm_head.weight.detach().clone()
    model.save_pretrained(tmp_path / "saved")
    torch.nn.init.zeros_(model.lm_head.weight)
    trainer._load_by_name(str(tmp_path / "saved"), model)
    assert model.lm_head.weight.dtype == torch.float32 and torch.equal(model.lm_head.weight, head)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_only_a_whole_checkpoint_counts(tmp_path):
    for step, text in ((2, '{"global_step": 2}'), (9, '{"global_step"'), (10, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)  # 9: killed while saving
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "nothing") is None


def test_the_best_model_is_loaded_at_the_end(tmp_path, processor, vision_model):
    """transformers would keep the last weights of a vision-language model, and say so only in a warning."""
    scores = iter([1.0, 0.0])  # the first checkpoint is the better one
    trainer = SparkTrainer(
        vision_model,
        args=config(
            SparkConfig,
            tmp_path,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        ),
        train_dataset=digits(8, IMAGE_KINDS),
        eval_dataset=digits(1, IMAGE_KINDS),
        processing_class=processor,
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_score": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert trainer._last_loaded_step != trainer.state.global_step  # an engine has the last weights, and gets these
    saved = {step: type(vision_model).from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2)}
    best, last = (dict(saved[step].named_parameters()) for step in (1, 2))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, best[name]), name


def test_equal_images_are_prepared_once(processor, monkeypatch):
    noise = [PIL.Image.effect_noise(size, 50).convert("RGB") for size in ((56, 56), (84, 56))]
    palettes = [PIL.Image.new("P", (56, 56)) for _ in range(2)]
    palettes[1].putpalette([200, 0, 0] * 256)  # the same bytes, another colour
    images = [[noise[0]], [noise[1], noise[0].copy()], [palettes[0]], [palettes[1]], [noise[1].copy()]]
    expected = processor.image_processor(images=images, return_tensors="pt")
    seen = []
    prepare = type(processor.image_processor)._preprocess
    monkeypatch.setattr(
        type(processor.image_processor),
        "_preprocess",
        lambda self, images, *args, **kwargs: seen.append(len(images)) or prepare(self, images, *args, **kwargs),
    )
    with processed_once(processor):
        shared = processor.image_processor(images=images, return_tensors="pt")
    assert seen == [4]
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(shared[name], expected[name])
    assert "preprocess" not in vars(processor.image_processor)  # or it could not be saved


def test_images_are_decoded_as_often_as_by_trl_and_kept_once_a_question(tmp_path, processor, vision_model, monkeypatch):
    fetched = Counter()
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (SparkTrainer, SparkConfig)):
        data = digits(8, IMAGE_KINDS)
        original = type(data).__getitems__

        def counting(self, keys, original=original, name=trainer_class.__name__):
            fetched[name] += len(keys)
            return original(self, keys)

        monkeypatch.setattr(type(data), "__getitems__", counting)
        settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
        if trainer_class is SparkTrainer:
            settings["drop_zero_advantage"] = False
        trainer = trainer_class(
            copy.deepcopy(vision_model),
            reward_funcs=verify.answer_reward,
            args=config(config_class, tmp_path, **settings),
            train_dataset=data,
            processing_class=processor,
        )
        trainer.train()
        monkeypatch.undo()
    assert fetched["SparkTrainer"] <= fetched["GRPOTrainer"]
    pixels = [p for passes in trainer._buffered_inputs for part in passes for p in part["batch"]["pixel_values"]]
    assert len({p.data_ptr() for p in pixels}) == 4 < len(pixels)  # 16 rollouts of 4 questions, and the recycled ones


def test_the_model_card_tells_what_was_trained(tmp_path, processor, vision_model):
    trainer = SparkTrainer(
        vision_model,
        args=config(SparkConfig, tmp_path / "run", max_steps=1),
        train_dataset=mixed(8),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    card = (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "elsewhere" / "README.md").read_text() == card
    accuracy = history(trainer)[0]["policy/accuracy"]
    for part in (
        "A local Qwen2_5_VLForConditionalGeneration trained with [SPARK",
        "arXiv:2509.22624",
        f"| answers right, mean of the last 10 logs | {accuracy:.3f} |",
        f"python evaluate.py --model {tmp_path / 'run'} --benchmark",
        "Please first conduct reasoning",
        'pipeline("image-text-to-text"',
    ):
        assert part in card
    for part in ("None", "DeepSeekMath", "time machine"):
        assert part not in card


def test_metrics_against_a_case_by_hand():
    """Two pointwise items (one right, one wrong candidate), one pair and one reflection, four rollouts each."""
    items = items_of(
        ("pointwise", "Yes", True), ("pointwise", "B", False), ("pairwise", "A", True), ("reflection", None, False)
    )
    asked = [item for item in items for _ in range(4)]
    texts = [f"\\boxed{{{t}}}" for t in "Yes Yes No A B A A dunno A A B A 2 3 2 2".split()]
    rewards = [float(c) for c in "1100100011011011"]
    assert judge_metrics(asked, texts, rewards) == pytest.approx(
        {
            "judge/pointwise/accuracy": 3 / 8,
            "judge/pointwise/balanced_accuracy": (2 / 4 + 1 / 4) / 2,
            "judge/pointwise/label_rate": 1 / 2,
            # parsed: Yes Yes No for the right one (a letter answers another question), B A A for the wrong one
            "judge/pointwise/positive_rate": 4 / 6,
            "judge/pairwise/accuracy": 3 / 4,
            "judge/pairwise/first_rate": 3 / 4,
            "judge/unparsed": 2 / 12,
            "reflection/fix_rate": 3 / 4,
        }
    )
    counts = Counts(unused=3, skipped={"unboxed": 1, "overlong": 1})
    assert recycling_metrics(items, counts, num_generations=4, seconds=0.5) == {
        "recycle/items": 4,
        "recycle/rows": 16,
        "recycle/unused": 3,
        "recycle/skipped": 2,
        "recycle/seconds": 0.5,
        "judge/pointwise/question_only": 0.5,
    }


def test_policy_metrics_by_hand():
    def group(*outcomes):
        return Group("q", "1+1?", tuple(Rollout("", answer, correct) for answer, correct in outcomes))

    groups = [group(("2", True), ("3", False)), group((None, False), ("3", False)), group(("x", None), (None, None))]
    assert policy_metrics(groups) == {"policy/accuracy": 1 / 4, "policy/pass_at_g": 1 / 2, "policy/unboxed": 2 / 6}


def test_iterations_do_not_count_as_generations(tmp_path, processor, text_model):
    arguments = config(SparkConfig, tmp_path, max_steps=4, num_iterations=2, recycle_every=2)
    trainer = SparkTrainer(text_model, coin, arguments, train_dataset=sums(16), processing_class=processor.tokenizer)
    trainer.train()
    assert ["recycle/rows" in logs for logs in history(trainer)] == [True, False, False, False]


def test_the_tokenizers_own_control_tokens_are_broken_up_too(tmp_path, processor, text_model):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<my_tool>"], special_tokens=True)
    tokenizer.add_tokens(["\n\n", "    "])  # as Gemma's: text, all the same
    trainer = SparkTrainer(
        text_model, coin, config(SparkConfig, tmp_path), train_dataset=sums(4), processing_class=tokenizer
    )
    trainer.model.train()
    made = Group("q", "1+1?", (Rollout("<my_tool>", None, False),))
    limits = trainer._limits({"prompt_mask": torch.ones(4, 3)}, [made])
    assert neutralise("<my_tool>", limits.control_tokens) == "< my_tool>"
    assert neutralise("One.\n\n    Two.", limits.control_tokens) == "One.\n\n    Two."


def test_metrics_of_passes_are_means_over_tokens(tmp_path, processor, vision_model):
    arguments = config(SparkConfig, tmp_path, drop_zero_advantage=False)
    trainer = SparkTrainer(
        vision_model, args=arguments, train_dataset=digits(4, TEXT_KINDS), processing_class=processor
    )
    union, logged = drawn_union(trainer), trainer._metrics["train"]
    union["completion_mask"][:8, 2:] = 0  # half of the policy's rows are short
    logged.clear()
    gradient_of(trainer, merge_images(cut_pass(union, torch.arange(16))))
    (whole,) = logged["entropy"]
    trainer.args.per_device_train_batch_size = 5
    (passes,) = trainer._passes(union, n_policy=16)
    assert sum(not part["recycled"] for part in passes) > 1
    logged.clear()
    gradient_of(trainer, passes)
    assert sum(logged["entropy"]) / len(logged["entropy"]) == pytest.approx(whole, rel=1e-4)


def test_whether_a_prompt_fits_is_told_by_its_own_question(processor):
    """Rows of a question follow each other: its length is that of its first row."""
    tokenizer = processor.tokenizer
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda lengths: lengths, num_processes=1, is_main_process=True),
        model=SimpleNamespace(training=True),
        _group_size=2,
        _longest_prompt=20,
        _longest_instruction=5,
        _tokenizer=tokenizer,
        _control_tokens=[],
    )
    mask = torch.tensor([[1] * n + [0] * (12 - n) for n in (3, 3, 12, 12)])  # (B*G, T)
    groups = [Group(key, "", ()) for key in ("short", "long")]
    limits = SparkTrainer._limits(trainer, {"prompt_mask": mask}, groups)
    text = "7 8 9 1"
    assert 3 + len(tokenizer(text)["input_ids"]) <= 15 < 12 + len(tokenizer(text)["input_ids"])
    assert limits.fits([(group, text) for group in groups]) == [True, False]


def test_an_evaluations_groups_are_of_its_own_size(tmp_path, processor, text_model):
    sizes = []

    class Seen(SparkTrainer):
        def _log_policy(self, groups):
            sizes.extend(len(group.rollouts) for group in groups)
            super()._log_policy(groups)

    arguments = config(SparkConfig, tmp_path, num_generations_eval=2, per_device_eval_batch_size=8)
    data = {"train_dataset": sums(4), "eval_dataset": sums(4), "processing_class": processor.tokenizer}
    Seen(copy.deepcopy(text_model), coin, arguments, **data).evaluate()
    assert set(sizes) == {2}


def test_a_run_with_several_iterations_resumes_within_a_generation(tmp_path, processor, text_model):
    def trained(folder, checkpoint=None):
        saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2}
        arguments = config(SparkConfig, folder, **saving)
        data = {"train_dataset": sums(16), "processing_class": processor.tokenizer}
        trainer = SparkTrainer(copy.deepcopy(text_model), coin, arguments, **data)
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer)

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_token_weights_add_up_over_processes():
    """Two processes whose rows have 3 and 9 tokens: what they weigh is two micro-steps each."""
    same = {name: torch.ones(8, 6) for name in ("prompt_ids", "prompt_mask")} | {"advantages": torch.ones(8)}
    unions = [same | {"completion_mask": torch.ones(8, tokens)} for tokens in (3, 9)]
    plans = plans_of_two(unions, 4, micro_steps=2, blocks=1, budget=40)
    assert sum(part.token_weight for plan in plans for step in plan for part in step) == pytest.approx(2 * 2)


def test_steps_of_their_own_are_weighed_by_their_own_tokens():
    """24 rows, 16 of them the policy's, in four optimizer steps: two of eight rows, and two of four."""
    union = {name: torch.ones(24, 6) for name in ("prompt_ids", "prompt_mask")}
    union |= {"completion_mask": torch.ones(24, 4), "advantages": torch.ones(24)}
    plan = plan_passes(union, 16, micro_steps=4, blocks=4, budget=400, apart=True)
    assert [part.token_share for step in plan for part in step] == pytest.approx([4 / 3] * 2 + [2 / 3] * 2)


def test_images_that_differ_only_in_the_order_or_shape_of_their_pixels_are_two(processor):
    class Tower:
        def get_image_features(self, pixels, grids, **_):
            return SimpleNamespace(pooler_output=tuple(pixels.split(4)))

    pixels = torch.arange(8.0).view(4, 2)  # and upside down: with the same sum
    both = each_image_once(Tower(), torch.cat([pixels, pixels.flip(0)]), torch.tensor([[1, 2, 2]] * 2))
    assert torch.equal(both.pooler_output[1], pixels.flip(0))

    images = [[PIL.Image.new("RGB", size, "red")] for size in ((56, 84), (84, 56))]
    expected = processor.image_processor(images=images, return_tensors="pt")["image_grid_thw"]
    with processed_once(processor):
        found = processor.image_processor(images=images, return_tensors="pt")["image_grid_thw"]
    assert found.tolist() == expected.tolist()


def test_a_reward_that_is_no_number_is_no_opinion():
    rewards = JudgingRewards([lambda prompts, completions, **_: [math.nan, 1.0]], True, 0.5)
    assert rewards.functions[0](prompts=[0, 0], completions=["a", "b"]) == [None, 1.0]
    assert rewards.right == [None, True]
