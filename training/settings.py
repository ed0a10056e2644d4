"""Settings that can't be used, found before data and model are read. Each check raises ValueError: one line that names
the setting and what is expected."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors import SafetensorError, safe_open
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_flash_attn_2_available
from trl.import_utils import is_vllm_available

import verify
from data.cli import refuse
from training.checkpoint import NotSaved

TRL = "1.16.0"  # whose private methods are overridden
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*")


def check_files(arguments: list[str]) -> None:
    """The settings files of a command line: --config, and --plan where it names one."""
    for flag, settings in (("--config", "a recipe"), ("--plan", "an accelerate config")):
        if flag not in arguments:
            continue
        value = "".join(arguments[arguments.index(flag) + 1 :][:1])
        if value.startswith("--") or (flag, value) == ("--plan", ""):
            continue
        try:
            found = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{flag} {value}: expected {settings} in YAML: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{flag} {value}: expected {settings} in YAML, lines of `name: value`, got {found!r:.60}")


def check_installation(args: Any, model: Any) -> None:
    """This TRL and the vLLM that it supports, and the packages that only some settings need."""
    if version("trl") != TRL:
        raise ValueError(f"trl: expected {TRL}, found {version('trl')}; pip install -r requirements.txt")
    if args.n_gpu > 1:  # without a launcher TRL would spread the model over them
        raise ValueError(
            f"{args.n_gpu} GPUs for one process: expected accelerate launch for all of them, or CUDA_VISIBLE_DEVICES=0"
        )
    if args.use_vllm:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # TRL warns of another version, and fails later
            try:
                available = is_vllm_available()
            except UserWarning as error:
                raise ValueError(f"use_vllm: {error} pip install -r requirements.txt") from None
        if not available:
            raise ValueError("use_vllm: vLLM is not installed; pip install -r requirements.txt, or use_vllm: false")
    if (model.load_in_4bit or model.load_in_8bit) and find_spec("bitsandbytes") is None:
        setting = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise ValueError(f"{setting}: bitsandbytes is not installed; requirements.txt has its version")
    for logger in args.report_to:
        if logger not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: expected none or some of {', '.join(INTEGRATION_TO_CALLBACK)}, got {logger}")
        if logger not in get_available_reporting_integrations() and logger != "flyte":  # which asks for itself
            raise ValueError(f"report_to: {logger} is not installed; pip install {logger}, or set report_to to none")


def check_engine(args: Any, model: Any) -> None:
    """vLLM 0.31 no longer has bitsandbytes; TRL would find out only once the model is loaded."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if args.use_vllm and getattr(model, name):
            raise ValueError(f"{name}: expected use_vllm false beside it: vLLM can't load a bitsandbytes model")


def check_model(args: Any, config: Any) -> None:
    """vLLM 0.31 wants the weights of some models in another layout than transformers has them."""
    if args.use_vllm and config.model_type == "qwen3_vl_moe":
        raise ValueError("use_vllm: expected false for qwen3_vl_moe: vLLM can't be sent its experts' weights")


def check_weights(folder: str, setting: str = "model_name_or_path") -> None:
    """A local folder has weights, and whole ones; a hub name is no folder."""
    if not Path(folder).is_dir():
        return
    if not any(path for pattern in WEIGHTS for path in Path(folder).glob(pattern)):
        raise ValueError(f"{setting}: {folder} has no weights; expected {', '.join(WEIGHTS)}")
    for file in Path(folder).glob("*.safetensors"):
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{setting}: {file} can't be read: {error}") from None


CHOICES = {  # TRL 1.16 finds out after a generation
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
}


def check_choices(args: Any) -> None:
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns: expected false: verifiers read the columns")
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name}: expected {', '.join(choices)}, got {getattr(args, name)!r}")


def check_alike(*found: Any) -> None:
    """Every process has found the same checkpoint and the same rows: where images are missing on one machine, say, it
    would train on other questions, and for fewer steps."""
    if PartialState().num_processes == 1:
        return

    def summary(value: Any) -> str:
        if value is None or isinstance(value, str):
            return str(value)
        digest = hashlib.blake2b(digest_size=4)
        for name in ("prompt", "solution", "source"):  # as they are stored: of a source, the number of the row
            for text in value.data.column(name).to_pylist():
                digest.update(repr(text if name != "source" else text.rpartition(": ")[2]).encode())
        return f"{len(value):,} rows ({digest.hexdigest()})"

    mine = [Path(found[0]).name if found[0] else "no checkpoint", *map(summary, found[1:])]
    everyone = gather_object([mine])
    for process, other in enumerate(everyone):
        if other != everyone[0]:
            raise ValueError(
                f"expected the same on every process; process 0 found {', '.join(everyone[0])}, process {process} "
                f"{', '.join(other)}: are data and output_dir whole on each machine?"
            )


def check_columns(name: str, dataset: Any, reward_funcs: list) -> None:
    """A data set given from Python has the columns that its rows are asked and scored by."""
    needed = ["prompt", *(["solution"] if verify.answer_reward in reward_funcs else [])]
    for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
        there = getattr(each, "column_names", None)
        if missing := [column for column in needed if there is not None and column not in there]:
            raise ValueError(f"{name}: expected a column {' and '.join(missing)}, got {', '.join(there)}")


def attention(args: Any) -> str | None:
    """flash-attention where it is installed and GPU and precision allow it; else None: transformers' sdpa."""
    if args.use_cpu or not (is_flash_attn_2_available() and (args.bf16 or args.fp16)):
        return None
    return "flash_attention_2" if torch.cuda.get_device_capability()[0] >= 8 else None


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are one line on stderr and exit status 2, instead of a traceback; so is what a vLLM server
    turns out to lack. A run that can't go on (no room, no finite numbers) is one line and status 1."""
    status = 2
    try:
        yield
        return
    except kinds as error:
        reason = error
    except (NotSaved, FloatingPointError) as error:
        reason, status = error, 1
    except RuntimeError as error:
        if not str(error).startswith("The vLLM server at"):
            raise
        reason = error
    refuse("train_spark.py", reason)
    raise SystemExit(status)


def under_fsdp(args: Any, adapter: bool) -> None:
    """Let TRL load the reference model whole in each process, as it shards it without exchanging weights."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if args.beta != 0 and not adapter and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: expected false where beta is not 0: all processes but one would load "
            "zeros for the reference model"
        )
    args.model_init_kwargs = {"device_map": None, **(args.model_init_kwargs or {})}


def freeze(model: Any, prefixes: list[str]) -> None:
    """Train no parameter whose name starts with one of `prefixes`, with or without `model.` before it, as a vision
    tower's. Raises ValueError for a prefix that no parameter has, and beside an adapter, which freezes all the rest."""
    if prefixes and hasattr(model, "peft_config"):
        raise ValueError("freeze_prefix: expected none beside an adapter; see lora_target_modules")
    parameters = {name.removeprefix("model."): parameter for name, parameter in model.named_parameters()}
    for prefix in prefixes:
        frozen = [p for name, p in parameters.items() if name.startswith(prefix.removeprefix("model."))]
        if not frozen:
            known = ", ".join(sorted({name.partition(".")[0] for name in parameters}))
            raise ValueError(f"freeze_prefix: expected what a parameter's name starts with, got {prefix}; e.g. {known}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if prefixes and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze_prefix: {', '.join(prefixes)} leave nothing to train")


def after_loading(trainer: Any) -> None:
    """What TRL and Trainer leave to be set for FSDP2 and for float16. Raises ValueError where they would save no model
    at the end."""
    if trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        raise ValueError("fsdp_state_dict_type: expected FULL_STATE_DICT: with any other, no model is saved at the end")
    zero = trainer.accelerator.state.deepspeed_plugin
    if zero is not None and zero.zero_stage == 3:
        saving = "stage3_gather_16bit_weights_on_model_save"
        if not zero.deepspeed_config["zero_optimization"].get(saving):
            raise ValueError(f"zero3_save_16bit_model ({saving}): expected true, or no model is saved at the end")
    if trainer.is_fsdp_enabled:  # else every process keeps whole gradients until the last micro-step
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if trainer.args.fp16:  # a quantised model's adapter is bfloat16, which CUDA's gradient scaler can't unscale
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
