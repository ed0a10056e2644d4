"""What SparkTrainer relies on in TRL 1.16, transformers 5.17 and accelerate 1.15 beyond their public interface.

When one of them moves, a test here names the member, our file that builds on it, and what to look at. Look, then take
the new digest over: `python tests/test_trl_contract.py` prints them.
"""

import hashlib
import inspect
import re

import pytest
from accelerate.state import GradientState
from accelerate.utils import DeepSpeedEngineWrapper
from transformers import Trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils

MEMBERS = {
    # overridden
    (GRPOTrainer, "_generate_and_score_completions"): (
        "train_spark.py, training/batch.py",
        "the fields of the batch that it returns (join and cut_pass list them), and which names it logs",
        "1fa48922792d",
    ),
    (GRPOTrainer, "_prepare_inputs"): (
        "training/passes.py",
        "when it generates, what it keeps in _buffered_inputs, and that _step counts micro-steps",
        "f824e7fb0714",
    ),
    (GRPOTrainer, "_tokenize_prompts"): (
        "training/images.py",
        "images: None for a row without any (issue 6294)",
        "d2d27f7c9bfd",
    ),
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): (
        "training/images.py",
        "its arguments, and that image fields are flat over rows",
        "ea73c3909275",
    ),
    (GRPOTrainer, "_save_checkpoint"): ("training/checkpoint.py", "that it calls transformers'", "ec91bde12364"),
    (GRPOTrainer, "_get_train_sampler"): ("training/checkpoint.py", "that it gives a RepeatSampler", "36497afb4d31"),
    (utils.RepeatSampler, "__iter__"): ("training/checkpoint.py", "that an epoch draws one order", "d80412d80424"),
    (Trainer, "_init_training_state"): (
        "training/checkpoint.py",
        "that it returns the epochs done and the micro-steps done in this one",
        "8fbd17ebb7d3",
    ),
    (Trainer, "_save_checkpoint"): (
        "training/checkpoint.py",
        "that trainer_state.json is written last",
        "a9111e30faa9",
    ),
    (Trainer, "_load_from_checkpoint"): (
        "training/checkpoint.py",
        "whether it renames vision-language weights now",
        "4711d0506786",
    ),
    (Trainer, "_load_best_model"): (
        "training/checkpoint.py",
        "whether it renames vision-language weights now",
        "0e183d55a9db",
    ),
    (Trainer, "_get_grad_norm"): ("training/checkpoint.py", "that it runs before the optimizer's step", "913ba6f52f07"),
    # relied on
    (GRPOTrainer, "_calculate_rewards"): (
        "training/rewards.py",
        "that functions are called in order, in this thread, with lists as long as the rows",
        "736ae29b0838",
    ),
    (GRPOTrainer, "_compute_loss"): (
        "training/passes.py",
        "what each loss type divides by, what is added to it, and which terms make a row without advantage count",
        "80295546bbdb",
    ),
    (GRPOTrainer, "_generate_single_turn"): (
        "training/vllm.py",
        "how images reach the engine, and that transformers' generate suppresses image tokens",
        "e0f02e4fc094",
    ),
    (GRPOTrainer, "_generate"): ("training/images.py", "what becomes of rows without images", "2a27fdf8f5e6"),
    (GRPOTrainer, "training_step"): ("training/passes.py", "that _step counts calls", "9e18632f7dd8"),
    (GRPOTrainer, "log"): ("training/callbacks.py", "that metrics are means over what was appended", "1e7772819cc8"),
    (GRPOTrainer, "get_train_dataloader"): ("training/passes.py", "that a batch is a generation", "2bffe5a57c53"),
    (Trainer, "training_step"): ("training/passes.py", "that compute_loss's result goes backward once", "a95f8c94253a"),
    (VLLMGeneration, "generate"): (
        "training/vllm.py",
        "generation_kwargs win; what it returns; sleep mode",
        "2d2ac2be5b13",
    ),
    (VLLMGeneration, "sync_weights"): (
        "training/vllm.py",
        "how colocated weights are loaded; sleep mode",
        "63d669fb3230",
    ),
    (VLLMGeneration, "_iter_named_params"): (
        "training/vllm.py",
        "that it yields (name, tensor), adapters merged",
        "baab615d5c7b",
    ),
    (utils, "split_pixel_values_by_grid"): (
        "training/batch.py",
        "which image fields become a list, one entry a row",
        "3aca66e33a79",
    ),
    (utils, "unsplit_pixel_values_by_grid"): ("training/batch.py", "that it undoes the above", "9d31b407fc5f"),
    (GradientState, "_set_sync_gradients"): ("training/passes.py", "that sync_gradients follows it", "c853f24eddce"),
    (DeepSpeedEngineWrapper, "backward"): (
        "training/passes.py",
        "that it steps only where sync_gradients is set",
        "0185cad8f450",
    ),
}


def digest(owner, name: str) -> str:
    source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


@pytest.mark.parametrize(("owner", "name"), MEMBERS, ids=lambda part: part if isinstance(part, str) else part.__name__)
def test_what_we_build_on_is_as_it_was(owner, name):
    file, check, expected = MEMBERS[owner, name]
    assert digest(owner, name) == expected, f"{owner.__name__}.{name} has changed: {file} builds on it; check {check}"


def test_the_docstring_lists_every_private_member_that_is_overridden():
    from train_spark import SparkTrainer

    ours = [cls for cls in SparkTrainer.__mro__ if cls.__module__.startswith(("train_spark", "training"))]
    overridden = {
        name
        for cls in ours
        for name, member in vars(cls).items()
        if callable(member) and hasattr(GRPOTrainer, name) and not name.startswith("__")
    }
    listed = {
        name for row in re.findall(r"^ *\| `.*$", SparkTrainer.__doc__, re.M) for name in re.findall(r"`(\w+)`", row)
    }
    assert overridden == listed
    assert {name for owner, name in MEMBERS if owner in GRPOTrainer.__mro__} >= {n for n in listed if n[0] == "_"}
    with open("README.md", encoding="utf-8") as file:
        assert f"{sum(name.startswith('_') for name in listed)} private" in file.read()


if __name__ == "__main__":
    for (owner, name), (*_, expected) in MEMBERS.items():
        print(f"{owner.__name__}.{name}: {digest(owner, name)}" + " (new)" * (digest(owner, name) != expected))
