"""SparkTrainer on TRL's real trainer and the real Qwen2.5-VL classes."""

import copy
import json
import math
from collections import Counter
from itertools import combinations_with_replacement, pairwise

import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

import train_spark
import verify
from batch import even_cuts, join, micro_batches
from data.digits import digit_rows
from recycle import PROMPT_SUFFIX, RecycleConfig
from train_spark import SparkConfig, SparkTrainer, judging

MESSAGES = List({"role": Value("string"), "content": Value("string")})


def digits(n, kinds=None, seed=0):
    """Rows of the embedded task as the trainer gets them, with or without images."""
    rows = [r for r in digit_rows("train", 8 * n, seed) if kinds is None or r["dataset"].split("-")[1] in kinds][:n]
    features = Features({"prompt": MESSAGES, "images": List(Image()), "solution": Value("string")})
    return Dataset.from_list([{k: r[k] for k in features} for r in rows], features=features)


def sums(n):
    """Text rows without an image column."""
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i}+1?" + PROMPT_SUFFIX}], "solution": str(i + 1)}
        for i in range(n)
    ]
    return Dataset.from_list(rows, features=Features({"prompt": MESSAGES, "solution": Value("string")}))


def config(cls, tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return cls(**(settings | changes))


def coin(prompts, completions, **columns):
    """A verifier for a model whose rollouts are noise: right where the completion has an even length."""
    return [float(len(c[0]["content"]) % 2 == 0) for c in completions]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
def test_recycle_ratio_0_is_grpo_bit_for_bit(kind, tmp_path, processor, text_model, vision_model):
    """Same losses and same weights after three steps."""
    if kind == "text":
        model, data, processing, reward = text_model, sums(12), processor.tokenizer, coin
    else:
        kinds = {"sum", "product"} if kind == "image" else None
        model, data, processing, reward = vision_model, digits(12, kinds), processor, verify.answer_reward
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
        model, data, processing, reward = vision_model, digits(20), processor, verify.answer_reward
    before = copy.deepcopy(model.state_dict())
    trainer = SparkTrainer(
        model,
        reward_funcs=reward,
        args=config(SparkConfig, tmp_path, max_steps=5, log_completions=True, num_completions_to_print=0),
        train_dataset=data,
        processing_class=processing,
    )
    trainer.train()
    history = [h for h in trainer.state.log_history if "loss" in h]
    assert len(history) == trainer.state.global_step == 5
    assert all(math.isfinite(h["loss"]) and h["grad_norm"] > 0 for h in history)
    assert sum(h["recycle/items"] for h in history) >= 15
    for h in history:
        assert h["recycle/rows"] == 4 * h["recycle/items"]
        assert h["rewards/" + reward.__name__ + "/mean"] == pytest.approx(h["policy/accuracy"])  # TRL's names: policy
    changed = [n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])]
    assert changed

    import pandas as pd

    tables = [pd.read_parquet(f) for f in sorted((tmp_path / "completions").glob("recycled_*.parquet"))]
    assert len(tables) == 5
    table = pd.concat(tables)
    assert len(table) == sum(h["recycle/rows"] for h in history)
    assert set(table["task"]) <= {"pointwise", "pairwise", "reflection"}
    policy = pd.read_parquet(sorted((tmp_path / "completions").glob("completions_*.parquet"))[0])
    assert len(policy) == 16
    if kind == "mixed":
        assert any(len(images) for images in table["images"])


def capture_join(monkeypatch):
    """Record the batches that are joined, and the union."""
    seen = []

    def recording(first, second, pad_token_id):
        union = join(first, second, pad_token_id)
        seen.append((first, second, union))
        return union

    monkeypatch.setattr(train_spark, "join", recording)
    return seen


@pytest.fixture
def float64_throughout(monkeypatch):
    """Norms, RoPE and TRL's fused head cast to float32 whatever the model's type; here that word means float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("kinds", [None, {"sum", "largest"}, {"plus", "factor"}])
def test_union_has_the_loss_and_gradient_of_its_parts(
    loss_type, kinds, tmp_path, processor, vision_model, monkeypatch, float64_throughout
):
    """The joined batch against the two passes computed apart, in float64: loss and gradient within 1e-9."""
    seen = capture_join(monkeypatch)
    trainer = SparkTrainer(
        vision_model.double(),
        args=config(SparkConfig, tmp_path, loss_type=loss_type, beta=0.01),
        train_dataset=digits(4, kinds),
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
        loss = trainer._compute_loss(trainer.model, batch)
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
            assert len(union["image_grid_thw"]) == sum(union["num_images"])
            assert len(union["pixel_values"]) == 4 * sum(union["num_images"])
            assert union["mm_token_type_ids"].shape == (6, 11)
            assert union["mm_token_type_ids"][0].tolist() == [0, 0, 0] + [int(images[0])] * 3 + [0] * 5
    with pytest.raises(KeyError, match="a_new_field"):
        join({**batch(1, 1, 1, False), "a_new_field": torch.ones(1)}, batch(1, 1, 1, False), 0)


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "passes"),
    [(1, 1, 1, None), (4, 4, 1, None), (1, 3, 1, 2), (2, 2, 2, 1), (6, 3, 1, 5), (2, 3, 1, 50)],
)
def test_every_row_is_trained_exactly_once(
    accumulation, per_generation, iterations, passes, tmp_path, processor, text_model, monkeypatch
):
    """Whatever the numbers: all rows of the unions, `num_iterations` times each, and real optimizer steps counted."""
    unions, trained = [], []
    generate, compute = SparkTrainer._generate_and_score_completions, SparkTrainer.compute_loss

    def rows(batch):
        masks = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        return [
            (*row[mask].tolist(), float(a)) for row, mask, a in zip(tokens, masks, batch["advantages"], strict=True)
        ]

    def generating(self, inputs):
        unions.append(generate(self, inputs))
        return unions[-1]

    def computing(self, model, inputs, *args, **kwargs):
        trained.append((inputs["weight"], rows(inputs)))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SparkTrainer, "_generate_and_score_completions", generating)
    monkeypatch.setattr(SparkTrainer, "compute_loss", computing)
    trainer = SparkTrainer(
        text_model,
        reward_funcs=coin,
        args=config(
            SparkConfig,
            tmp_path,
            per_device_train_batch_size=12,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=per_generation,
            num_iterations=iterations,
            recycle_micro_steps=passes,
            max_steps=6,
        ),
        train_dataset=sums(24),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    passes = 1 + (passes or 2)  # policy rows have at most 8,192 + 24 tokens, recycled ones 176 more
    assert trainer.state.global_step == 6
    assert len(trained) == 6 * accumulation * passes
    generations = 6 * accumulation // (per_generation * iterations)
    assert len(unions) == generations
    expected = Counter(row for union in unions for row in rows(union) for _ in range(iterations))
    assert Counter(row for weight, batch in trained if weight for row in batch) == expected
    assert all(len(batch) == 1 for weight, batch in trained if not weight)
    per_block = per_generation * passes
    for start in range(0, len(trained), per_block):  # the weights are each row's equal share
        block = trained[start : start + per_block]
        total = sum(len(batch) for weight, batch in block if weight)
        assert [weight for weight, _ in block] == pytest.approx(
            [len(batch) * per_block / total if weight else 0 for weight, batch in block]
        )


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_micro_batches_have_the_gradient_of_the_union(
    loss_type, tmp_path, processor, vision_model, monkeypatch, float64_throughout
):
    """Cut by length, without their padding, with and without images, one of them empty: within 1e-9 in float64."""
    trainer = SparkTrainer(
        vision_model.double(),
        args=config(SparkConfig, tmp_path, loss_type=loss_type, recycle_micro_steps=5),
        train_dataset=digits(4),
        processing_class=processor,
    )
    trainer.model.train()
    union = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(4)])
    torch.manual_seed(0)
    union["advantages"] = torch.randn(len(union["prompt_ids"]), dtype=torch.float64)
    batches = micro_batches(union, 16, 1, 2, 3)
    assert [b["recycled"] for b in batches] == [True] * 3 + [False] * 2
    assert sum(len(b["prompt_ids"]) for b in batches if b["recycled"]) == len(union["prompt_ids"]) - 16
    assert [len(b["prompt_ids"]) for b in batches if not b["recycled"]] == [8, 8]
    assert len({b["prompt_ids"].size(1) for b in batches}) > 1
    batches += [{**batches[0], "weight": 0.0}]

    def gradient(parts, steps):
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = steps
        trainer.model.zero_grad()
        loss = sum(trainer.compute_loss(trainer.model, part) for part in parts)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]

    whole, expected = gradient([union], 1)
    parts, got = gradient(batches, 5)
    assert abs(whole) > 1e-6
    assert parts == pytest.approx(whole, abs=1e-9)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=0)


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
        assert spark[f"recycle/{name}"] != pytest.approx(spark[name], abs=1e-3)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 6))
def test_cuts_are_the_best_possible(lengths, parts):
    lengths.sort(reverse=True)
    cuts = even_cuts(lengths, parts)

    def largest(cuts):
        return max((lengths[a] * (b - a) for a, b in pairwise(cuts) if b > a), default=0)

    assert cuts[0] == 0 and cuts[-1] == len(lengths) and cuts == sorted(set(cuts)) and len(cuts) <= parts + 1
    if len(lengths) <= 9:
        others = combinations_with_replacement(range(len(lengths) + 1), parts - 1)
        assert largest(cuts) == min(largest([0, *other, len(lengths)]) for other in others)


def test_a_rollout_that_makes_up_an_image_ends_there(tmp_path, processor, vision_model, monkeypatch):
    """The forward pass would look for an image behind the token, and end the run."""
    image_token, eos = vision_model.config.image_token_id, processor.tokenizer.eos_token_id
    generate, made_up = GRPOTrainer._generate_single_turn, []

    def with_images_made_up(self, prompt_ids, *args, **kwargs):
        ids, logprobs = generate(self, prompt_ids, *args, **kwargs)
        ids[0][2] = ids[1][0] = image_token
        made_up.append((ids[0][:2], ids[2]))
        return ids, logprobs

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", with_images_made_up)
    seen = capture_join(monkeypatch)
    trainer = SparkTrainer(
        vision_model,
        reward_funcs=coin,
        args=config(SparkConfig, tmp_path, max_steps=1),
        train_dataset=digits(8, {"sum"}),
        processing_class=processor,
    )
    trainer.train()
    ((policy, recycled, *_),) = seen
    for part, (cut, whole) in zip((policy, recycled), made_up, strict=True):
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(part["completion_ids"], part["completion_mask"], strict=True)
        ]
        assert rows[0] == cut
        assert rows[1] == [eos]
        assert rows[2] == whole


def test_evaluation_does_not_recycle(tmp_path, processor, text_model, monkeypatch):
    seen = capture_join(monkeypatch)
    trainer = SparkTrainer(
        text_model,
        reward_funcs=coin,
        args=config(SparkConfig, tmp_path, per_device_eval_batch_size=8),
        train_dataset=sums(4),
        eval_dataset=sums(4),
        processing_class=processor.tokenizer,
    )
    metrics = trainer.evaluate()
    assert seen == []
    assert 0 <= metrics["eval_policy/accuracy"] <= 1
    assert not any("judge" in name or "recycle" in name for name in metrics)


def test_reward_functions_meet_judge_rows():
    def answers(prompts, completions, solution, **columns):
        assert len(prompts) == len(completions) == len(solution)
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    def length(prompts, completions, **columns):
        return [1.0] * len(completions)

    rows = {
        "prompts": ["p"] * 4,
        "completions": ["\\boxed{Yes}", "7", "\\boxed{A}", "8"],
        "solution": ["9", "7", "9", "7"],
        "task": ["pointwise", "reflection", "pairwise", "reflection"],
        "label": ["Yes", None, "B", None],
    }
    assert judging(answers, with_verdicts=True)(**rows) == [1.0, 1.0, 0.0, 0.0]
    assert judging(length, with_verdicts=False)(**rows) == [None, 1.0, None, 1.0]
    plain = {k: rows[k] for k in ("prompts", "completions", "solution")}
    assert judging(answers, with_verdicts=True)(**plain) == [0.0, 1.0, 0.0, 0.0]
    assert judging(answers, with_verdicts=True)(**plain, task=["algebra"] * 4) == [
        0.0,
        1.0,
        0.0,
        0.0,
    ]  # a user's column
    assert judging(answers, True).__name__ == "answers"  # TRL names its metrics after it
    with pytest.raises(ValueError, match="reward models"):
        judging("some/reward-model", True)


def test_settings_are_checked_and_have_one_source(tmp_path):
    for name in ("max_prompt_length", "max_completion_length"):
        for wrong in (0, None):
            with pytest.raises(ValueError, match=f"{name}: expected 1 or more tokens"):
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
    paths["recipe"].write_text("recycle_ration: 0.5\n")
    for name in ("bare", "text"):
        processor.tokenizer.save_pretrained(paths[name])
    text_model.save_pretrained(paths["text"])
    settings = json.loads((paths["text"] / "tokenizer_config.json").read_text())
    del settings["processor_class"]  # this tokenizer comes from a model that sees
    (paths["text"] / "tokenizer_config.json").write_text(json.dumps(settings))
    picture = tmp_path / "a.png"
    digits(8)[0]["images"][0].save(picture)
    for name, rows in files.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(rows))
    arguments = [a.format(**paths) for a in arguments]
    common = ["--model_name_or_path", "data/tiny_qwen2_5_vl", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    monkeypatch.setattr("sys.argv", ["train_spark.py", *common, "--bf16", "false", *arguments])
    monkeypatch.setattr(train_spark, "SparkTrainer", None)  # a model must not be loaded
    capsys.readouterr()  # the bar of save_pretrained
    with pytest.raises(SystemExit) as exited:
        train_spark.main()
    assert exited.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert expected in message


@pytest.mark.parametrize(
    ("found", "expected"),
    [("trl", "trl: expected 1.16.0, found 1.15.0"), ("vllm", "0.32.0"), ("none", "vLLM is not installed")],
)
def test_versions_are_checked(found, expected, monkeypatch):
    from trl import import_utils

    if found == "trl":
        monkeypatch.setattr(train_spark, "version", lambda name: "1.15.0")
    state = {"vllm": (True, "0.32.0"), "none": (False, None)}.get(found, (True, "0.31.0"))
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *args, **kwargs: state)
    with pytest.raises(ValueError, match=expected):
        train_spark.check_versions(use_vllm=True)
    if found != "trl":
        train_spark.check_versions(use_vllm=False)


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
    assert train_spark.attention(args) is None
    monkeypatch.setattr(train_spark, "is_flash_attn_2_available", lambda: True)
    assert train_spark.attention(args) is None  # float32
    args.bf16 = True
    for capability, expected in (((9, 0), "flash_attention_2"), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert train_spark.attention(args) == expected


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
        "model_name_or_path": "data/tiny_qwen2_5_vl",
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


def test_resumed_is_uninterrupted(tmp_path, processor, vision_model):
    """Stopped after two steps of four and resumed: the same metrics and bitwise the same weights, waiting items too."""

    def trainer(folder, **changes):
        return SparkTrainer(
            copy.deepcopy(vision_model),
            args=config(SparkConfig, folder, max_steps=4, save_strategy="steps", save_steps=2, **changes),
            train_dataset=digits(16),
            processing_class=processor,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    state = json.loads((checkpoint / "recycle_state.json").read_text())
    assert state["waiting"]  # or this would not test what waits
    assert train_spark.last_checkpoint(str(tmp_path / "whole")) == str(tmp_path / "whole" / "checkpoint-4")

    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    timed = ("seconds", "time", "runtime", "per_second")

    def metrics(run, step):
        (logged,) = (h for h in run.state.log_history if h["step"] == step and "loss" in h)
        return {k: v for k, v in logged.items() if not any(t in k for t in timed)}

    for step in (3, 4):
        assert metrics(resumed, step) == metrics(whole, step)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    assert [c.group.key for c in resumed._waiting] == [c.group.key for c in whole._waiting]

    (tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").unlink()  # killed while saving
    assert train_spark.last_checkpoint(str(tmp_path / "whole")) == str(checkpoint)
    assert train_spark.last_checkpoint(str(tmp_path / "nothing")) is None


def test_metrics_against_a_case_by_hand(tmp_path, processor, text_model):
    """Two pointwise items (one right, one wrong candidate), one pair and one reflection, four rollouts each."""
    from recycle import Group, Item, Response, Rollout
    from train_spark import Scored

    trainer = SparkTrainer(
        text_model, coin, config(SparkConfig, tmp_path), train_dataset=sums(4), processing_class=processor.tokenizer
    )
    rollouts = (Rollout("\\boxed{2}", "2", True), Rollout("\\boxed{3}", "3", False))
    group = Group("q", [{"role": "user", "content": "1+1?"}], rollouts)
    right, wrong = Response("2", "answer", "2", True), Response("3", "answer", "3", False)
    items = (
        Item("pointwise", group.prompt, "Yes", group, (right,)),
        Item("pointwise", group.prompt, "B", group, (wrong,)),
        Item("pairwise", group.prompt, "A", group, (right, wrong)),
        Item("reflection", group.prompt, None, group, (wrong,)),
    )
    texts = "Yes Yes No A B A A dunno A A B A 2 3 2 2".split()
    rewards = torch.tensor([float(c) for c in "1100100011011011"])
    completions = [[{"role": "assistant", "content": f"\\boxed{{{t}}}"}] for t in texts]
    trainer._scored = Scored([{}] * 16, completions, rewards[:, None])
    trainer._log_judging(items, torch.zeros(16))
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged == pytest.approx(
        {
            "judge/pointwise/accuracy": 3 / 8,
            "judge/pointwise/balanced_accuracy": (2 / 4 + 1 / 4) / 2,
            "judge/pointwise/label_rate": 1 / 2,
            "judge/pointwise/question_only": 1 / 2,
            # parsed: Yes Yes No for the right one (a letter answers another question), B A A for the wrong one
            "judge/pointwise/positive_rate": 4 / 6,
            "judge/pairwise/accuracy": 3 / 4,
            "judge/pairwise/first_rate": 3 / 4,
            "judge/unparsed": 2 / 12,
            "reflection/fix_rate": 3 / 4,
        }
    )
