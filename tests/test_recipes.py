"""Recipes and accelerate configs as they are, the models they name by their published sizes, and --plan."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import yaml
from trl import ModelConfig, TrlParser, get_peft_config

import train_spark
from data import countdown
from data.arguments import DataArguments
from models.make_digits import OUTPUT
from train_spark import SparkConfig, SparkTrainer
from training import plan, settings
from training.seconds import Card, Lengths, generation_seconds

RECIPES = sorted(path for path in Path("recipes").glob("*.yaml"))
LAUNCHES = {
    "one_gpu": plan.Launch(1, "none"),
    "ddp": plan.Launch(8, "none"),
    "zero3": plan.Launch(8, "zero3"),
    "fsdp2": plan.Launch(8, "fsdp2"),
    "two_nodes": plan.Launch(16, "zero3"),
}


def qwen2(hidden, intermediate, layers, heads, kv_heads, vocab, tied):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def qwen2_5_vl(text, vision_intermediate=3420):
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": vision_intermediate,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def text_config(name, **sizes):
    import transformers

    return getattr(transformers, f"{name}Config")(architectures=[f"{name}ForCausalLM"], **sizes)


# What their files on the hub say, and the number of parameters shown there.
MODELS = {
    "spark_vl_7b": (lambda: qwen2_5_vl(qwen2(3584, 18944, 28, 28, 4, 152064, False)), 8_292_166_656),
    "spark_paper": (lambda: qwen2_5_vl(qwen2(3584, 18944, 28, 28, 4, 152064, False)), 8_292_166_656),
    "spark_vl_32b": (lambda: qwen2_5_vl(qwen2(5120, 27648, 64, 40, 8, 152064, False), 3456), 33_452_718_336),
    "spark_7b": (lambda: text_config("Qwen2", **qwen2(3584, 18944, 28, 28, 4, 152064, False)), 7_615_616_512),
    "vl_3b_lora_1gpu": (lambda: qwen2_5_vl(qwen2(2048, 11008, 36, 16, 2, 151936, True)), 3_754_622_976),
    "qwen3_4b_lora_1gpu": (
        lambda: text_config("Qwen3", **qwen2(2560, 9728, 36, 32, 8, 151936, True), head_dim=128),
        4_022_468_096,
    ),
    "qwen2.5_0.5b_colab": (lambda: text_config("Qwen2", **qwen2(896, 4864, 24, 14, 2, 151936, True)), 494_032_768),
    "countdown_3b": (lambda: text_config("Qwen2", **qwen2(2048, 11008, 36, 16, 2, 151936, True)), 3_085_938_688),
    "smollm2_135m": (lambda: text_config("Llama", **qwen2(576, 1536, 30, 9, 3, 49152, True)), 134_515_008),
    "smollm2_135m_cpu": (lambda: text_config("Llama", **qwen2(576, 1536, 30, 9, 3, 49152, True)), 134_515_008),
    "demo": (lambda: "models/digits", 1_170_624),
    "countdown": (lambda: "models/countdown", 1_106_432),
}


def parse(arguments, launch=None):
    config_class = plan.for_launch(SparkConfig, launch or plan.Launch())
    return TrlParser((DataArguments, config_class, ModelConfig)).parse_args_and_config(arguments)


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train_spark.py", *map(str, arguments)])
    train_spark.main()


def test_every_recipe_has_its_model():
    assert [path.stem for path in RECIPES] == sorted(MODELS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_says_how_to_run_it(path):
    data, args, _ = parse(["--config", str(path)], plan.Launch(16 if "32b" in path.stem else 8))
    assert data.dataset and args.output_dir.startswith("runs/")
    comment = path.read_text().split("model_name_or_path")[0]
    assert f"train_spark.py --config recipes/{path.name}" in comment
    assert re.search(r"\d+ ?(GiB|GB)", comment) and re.search(r"\b(days?|hours|minutes)\b", comment)
    for config in re.findall(r"recipes/accelerate/\S+\.yaml", comment):
        assert Path(config).is_file()
    defaults = {f.name: f.default for d in (DataArguments, SparkConfig, ModelConfig) for f in fields(d)}
    for name, value in yaml.safe_load(path.read_text()).items():  # a recipe is its differences
        assert value != defaults[name] or name == "use_vllm", f"{name}: {value} is the default"


def test_the_papers_recipe_has_its_hyperparameters():
    launch = plan.Launch(8, "zero3")
    data, args, model = parse(["--config", "recipes/spark_vl_7b.yaml"], launch)
    counts = plan.steps(plan.run_of(data, args, model, launch, None, 38_870))
    # The release takes 8 steps of 64 samples on the 512 rollouts, and 8 on as many recycled ones.
    assert (counts.prompts, counts.rollouts, counts.recycled_rollouts, counts.optimizer_steps) == (64, 512, 128, 8)
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (args.num_generations, args.temperature, args.epsilon) == (8, 1.0, 0.2)
    assert (args.max_prompt_length, args.max_completion_length, data.max_pixels) == (8192, 768, 1_048_576)
    assert (args.learning_rate, args.beta, args.num_train_epochs, args.bf16) == (5e-7, 0.001, 2, True)
    assert args.use_vllm and args.vllm_mode == "colocate" and args.vllm_enable_sleep_mode
    apart = yaml.safe_load(Path("recipes/spark_paper.yaml").read_text())
    ours = yaml.safe_load(Path("recipes/spark_vl_7b.yaml").read_text())
    del ours["gradient_accumulation_steps"]  # it takes twice as many steps, half of them on recycled rollouts
    assert apart | {"output_dir": ours["output_dir"]} == ours | {
        "logging_steps": 16,
        "save_steps": 800,
        "recycle_ratio": 1.0,
        "recycle_matched": False,
        "recycle_balance": False,
        "recycle_apart": True,
        "warmup_steps": 0.03,
        "adam_beta2": 0.95,
    }
    for name, processes in (("spark_vl_32b", 16), ("spark_7b", 8)):
        data, args, model = parse(["--config", f"recipes/{name}.yaml"], plan.Launch(processes))
        counts = plan.steps(plan.run_of(data, args, model, plan.Launch(processes), None, 38_870))
        assert (counts.rollouts, counts.optimizer_steps, args.max_completion_length) == (512, 8, 1024)


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_and_plan_read_the_same_launch(name):
    """By accelerate's own loader and launcher, and by --plan."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = f"recipes/accelerate/{name}.yaml"
    assert plan.launch_in(path) == LAUNCHES[name]
    args = launch_command_parser().parse_args(["--config_file", path, "train_spark.py"])
    args, config, _ = _validate_launch_command(args)
    assert config.num_processes == LAUNCHES[name].processes
    assert args.use_deepspeed == (LAUNCHES[name].sharding == "zero3")
    assert args.use_fsdp == (LAUNCHES[name].sharding == "fsdp2")
    assert {path.stem for path in Path("recipes/accelerate").glob("*.yaml")} == set(LAUNCHES)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipes_model_has_its_published_number_of_parameters(name):
    from transformers import AutoConfig

    make, published = MODELS[name]
    config = make()
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    model = plan.architecture(config)
    assert model.parameters == model.trained == published
    assert model.sees == ("vl" in name or name in ("demo", "spark_paper"))


def test_an_adapter_is_what_is_trained():
    """LoRA of r = 16 on every linear layer of the small model: r x (in + out) each."""
    from transformers import AutoConfig

    _, _, model = parse(["--config", "recipes/vl_3b_lora_1gpu.yaml"])
    counted = plan.architecture(AutoConfig.from_pretrained("models/digits"), get_peft_config(model))
    text = 4 * ((128 + 128) * 2 + (128 + 64) * 2 + 3 * (128 + 384))  # q, o; k, v; gate, up, down
    vision = 2 * ((64 + 192) + (64 + 64) + 3 * (64 + 128)) + (256 + 256) + (256 + 128)  # qkv, proj, mlp; merger
    assert counted.trained == 16 * (text + vision)
    assert counted.parameters == 1_170_624 + counted.trained


def test_what_is_frozen_is_not_counted_as_trained(monkeypatch, capsys):
    from safetensors.torch import load_file

    weights = load_file("models/digits/model.safetensors")
    vision = sum(weight.numel() for name, weight in weights.items() if "visual" in name)
    plan_of = ["--config", "recipes/demo.yaml", "--plan", "--freeze_prefix"]
    command(monkeypatch, *plan_of, "visual")
    assert f"1,170,624 parameters, {1_170_624 - vision:,} trained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(monkeypatch, *plan_of, "vison")
    (line,) = capsys.readouterr().err.splitlines()
    assert "freeze_prefix: expected what a parameter's name starts with, got vison" in line


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_step(path, tmp_path, monkeypatch):
    """All of the recipe but what needs a GPU or the hub: a small model, small batches, short rows."""
    monkeypatch.setattr("data.read.EMBEDDED_ROWS", 32)
    trained = []

    def train(self, *args, **kwargs):
        trained.append(self)
        return original(self, *args, **kwargs)

    original = SparkTrainer.train
    monkeypatch.setattr(SparkTrainer, "train", train)
    small = {
        "model_name_or_path": "models/digits",
        "dtype": "float32",
        "dataset": "digits",
        "prompt_column": "prompt",
        "solution_column": "solution",
        "output_dir": tmp_path,
        "use_cpu": "true",
        "bf16": "false",
        "fp16": "false",
        "use_vllm": "false",
        "per_device_train_batch_size": 2 if "steps_per_generation" in path.read_text() else 8,
        "gradient_accumulation_steps": 2,
        "recycle_ratio": 1,  # two items of two questions
        "max_completion_length": 16,
        "max_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": "true",
    }
    if "countdown" in path.stem:  # the verifier reads its own tasks
        small |= {"dataset": tmp_path / "train.json", "model_name_or_path": "models/countdown"}
        assert countdown.main(["--split", "train", "--n", "32", "--output", str(small["dataset"])]) == 0
        small |= {"output_dir": tmp_path / "out", "max_completion_length": 96}
    command(monkeypatch, "--config", path, *(part for name, value in small.items() for part in (f"--{name}", value)))
    (trainer,) = trained
    logged = next(h for h in trainer.state.log_history if "loss" in h)
    assert trainer.state.global_step == 1 and logged["grad_norm"] > 0 and logged["recycle/rows"] > 0
    for name, value in yaml.safe_load(path.read_text()).items():
        if name not in small and name in SparkConfig.__dataclass_fields__:
            assert getattr(trainer.args, name) == value or name == "lr_scheduler_type"
    assert (trainer.ref_model is not None) == (trainer.args.beta > 0)
    saved = {file.name for file in Path(small["output_dir"]).iterdir()}
    assert ("adapter_config.json" if "lora" in path.stem else "config.json") in saved


def test_a_plan_is_the_one_made_by_hand(tmp_path, monkeypatch, capsys):
    """spark_vl_7b on eight GPUs under ZeRO-3, with 200 questions instead of the 38,870."""
    MODELS["spark_vl_7b"][0]().save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is 1+1?", "solution": "2"}\n' * 200)
    options = ("--model_name_or_path", tmp_path, "--dataset", rows, "--plan", "recipes/accelerate/zero3.yaml")
    command(monkeypatch, "--config=recipes/spark_vl_7b.yaml", *options)
    printed = capsys.readouterr().out
    lines = {
        re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in printed.split("\n")
    }

    # 4 rows x 8 GPUs x 16 = 512 rollouts, 64 prompts; 200 // 64 = 3 an epoch, 6 in two; 8 optimizer steps each.
    assert lines["prompts"] == ["64", "384"]
    assert lines["rollouts"] == ["512", "3,072"]
    assert lines["recycled prompts, at most"] == ["16", "96"]
    assert lines["recycled rollouts, at most"] == ["128", "768"]
    assert lines["optimizer steps"] == ["8", "48"]
    assert lines["tokens generated, at most"] == ["491,520", "2,949,120"]  # 640 x 768
    # 512 x (8,192 + 768) + 128 x (8,192 + 2 x 768 + 512 + 768)
    assert lines["tokens trained on, at most"] == ["5,996,544", "35,979,264"]

    # 8,292,166,656 / 8 = 1,036,520,832 parameters a GPU: 2 bytes, 2, 12 and 2 for the reference.
    assert lines["weights"] == lines["gradients"] == lines["reference"] == ["1.9"]
    assert lines["optimizer"] == ["11.6"]
    # 14 bytes, as the optimizer's state has float32 weights; 3 kept and one more that is being written.
    assert "checkpoints every 400 optimizer steps, 108.1 GiB each, at most 4 at a time" in printed
    assert lines["refused"] == ["nothing"]
    # 64 rows of 1,337 visual tokens of 4 patches of 1,176 float32 values; kept of 8 questions, 2 more and a pass.
    assert lines["pixels"] == ["1.5"]
    assert lines["kept pixels"] == ["0.3"]
    assert "fits on a GPU of 80 GiB" in printed


@pytest.mark.parametrize(
    ("sharding", "processes", "expected"),
    [  # of 1,000 parameters in float32: weights, gradients, optimizer, reference
        ("none", 4, (4000, 4000, 8000, 4000)),
        ("fsdp2", 4, (1000, 1000, 2000, 1000)),
        ("zero3", 4, (500, 500, 3000, 500)),
        ("zero2", 4, (2000, 500, 3000, 2000)),
    ],
)
def test_sharding_divides_weights_gradients_moments_and_reference(sharding, processes, expected):
    data, args, model = parse(["--dataset", "digits", "--output_dir", "x", "--beta", "0.1"])
    run = plan.run_of(data, args, model, plan.Launch(processes, sharding), None, None)
    parts = plan.memory(run, plan.Architecture("x", 1000, 1000, 1, 1, 1, 1, 1))
    assert tuple(parts[name] for name in ("weights", "gradients", "optimizer", "reference")) == expected


@pytest.mark.parametrize(
    ("flags", "sharding", "expected"),
    [  # of 2**30 parameters: float32 and two moments; 2 bytes and 12, which zero2 has with the model once more
        ([], "none", "every 500 optimizer steps, 12.0 GiB each, all of them kept"),
        (["--save_total_limit", "1"], "zero3", "every 500 optimizer steps, 14.0 GiB each, at most 2 at a time"),
        (["--save_steps", "0.1"], "zero2", "every 10%, 16.0 GiB each, all of them kept"),
        (["--save_only_model", "--save_strategy", "epoch"], "zero2", "every epoch, 2.0 GiB each, all of them kept"),
        (["--save_strategy", "no"], "none", "none"),
    ],
)
def test_the_size_and_number_of_checkpoints(flags, sharding, expected):
    data, args, model = parse(["--dataset", "digits", "--output_dir", "x", *flags])
    run = plan.run_of(data, args, model, plan.Launch(4, sharding), None, None)
    line = plan._checkpoints(run, plan.Architecture("x", 2**30, 2**30, 1, 1, 1, 1, 1))
    assert line == f"checkpoints {expected}"


def test_what_deepspeed_offloads_is_not_on_the_gpu(tmp_path):
    recipe = Path("recipes/accelerate/zero3.yaml").read_text()
    (tmp_path / "offload.yaml").write_text(re.sub(r"(offload_\w+_device): none", r"\1: cpu", recipe))
    launch = plan.launch_in(str(tmp_path / "offload.yaml"))
    assert launch == plan.Launch(8, "zero3", True, True)
    data, args, model = parse(["--dataset", "digits", "--output_dir", "x"])
    parts = plan.memory(plan.run_of(data, args, model, launch, None, None), plan.Architecture("x", 9, 9, 1, 1, 1, 1, 1))
    assert parts["weights"] == parts["optimizer"] == 0 < parts["gathered"]

    own = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "ds.json").write_text(json.dumps(own))
    named = f"deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'ds.json'}\n"
    (tmp_path / "own.yaml").write_text(f"distributed_type: DEEPSPEED\nnum_processes: 4\n{named}")
    assert plan.launch_in(str(tmp_path / "own.yaml")) == plan.Launch(4, "zero2", True, False)


def test_models_without_grouped_heads_have_sizes_too():
    from transformers import GPT2Config

    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, architectures=["GPT2LMHeadModel"])
    sizes = plan.architecture(config)
    assert (sizes.kv_width, sizes.intermediate, sizes.sees) == (8, 32, False)


def test_a_steps_seconds_are_those_worked_out_by_hand():
    """A model of a million parameters on one and on two cards that do 1e9 operations and read 1e6 bytes a second."""
    card = Card("x", 1e9, 1e6, links=1e6, network=1e3, per_node=8, training=0.5, prefill=1.0, decoding=0.5, launching=1)
    model = plan.Architecture("x", 1_000_000, 1_000_000, 1, 1, 1, 1, 1)
    batch = ("--per_device_train_batch_size", "16", "--max_completion_length", "100", "--use_cpu", "true")
    batch += ("--recycle_ratio", "1")
    data, args, parsed = parse(
        ["--dataset", "digits", "--output_dir", "x", *batch, "--gradient_checkpointing", "false"]
    )
    lengths = Lengths(prompt=10, recycled_prompt=40, completion=50)
    for processes in (1, 2):
        run = plan.run_of(data, args, parsed, plan.Launch(processes, "none"), None, None)
        parts = generation_seconds(run, plan.steps(run), model, lengths, card)
        # A step of 16 x processes rollouts, 2 x processes prompts. The cache has 4 bytes a token. Each card reads 2 MB
        # of weights 100 times, and 16 caches that grow from 10 to 60 tokens.
        assert parts["policy generation"] == pytest.approx(
            2e6 * 2 * 10 / 1e9 + (100 * 2e6 + 16 * 50 * (10 + 25) * 4) / (1e6 * 0.5)
        )
        tokens = 16 * (10 + 50) + 16 * (40 + 50)
        assert parts["forward, backward"] == pytest.approx(
            max(3 * 2e6 * tokens / (1e9 * 0.5), (processes > 1) * 2 * 2e6 / 1e6)
        )
        assert parts["log-probs"] == 0
        assert parts["weight sync"] == 2e6 / 1e6 * processes  # gathered by two, and written
    slow = replace(card, launching=100.0)  # 100 tokens, each waiting for Python
    parts = generation_seconds(run, plan.steps(run), model, lengths, slow)
    assert parts["policy generation"] == pytest.approx(2e6 * 2 * 10 / 1e9 + 100 * 100)


def test_a_plan_says_what_is_unknown_without_model_and_data(monkeypatch, capsys):
    """The hub is out of reach here: what depends on it is said to be unknown, the rest is there."""
    for name, value in {"WORLD_SIZE": "8", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    command(monkeypatch, "--config", "recipes/spark_vl_7b.yaml", "--plan")
    printed = capsys.readouterr().out
    assert "launch     8 processes, sharding fsdp2" in printed
    assert re.search(r"^data +unknown \(", printed, re.M) and re.search(r"^model +unknown \(", printed, re.M)
    assert re.search(r"^rollouts +512 +unknown$", printed, re.M)

    monkeypatch.setenv("RANK", "1")  # deleted above: only one process makes the plan
    with pytest.raises(SystemExit):
        command(monkeypatch, "--config", "recipes/spark_vl_7b.yaml", "--plan")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("dataset", "reason"), [("digits", "reads text alone"), ("{bad}", "row 0: field solution")])
def test_a_plan_refuses_data_that_a_run_would(dataset, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "solution": ""}')
    arguments = ["--model_name_or_path", "models/countdown", "--output_dir", "x", "--use_cpu", "true", "--plan"]
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--dataset", dataset.format(bad=tmp_path / "bad.jsonl"), *arguments)
    printed = capsys.readouterr()
    assert reason in printed.out.split("refused")[1] and reason in printed.err


def test_a_plan_fetches_config_and_processor_but_no_weights(tmp_path):
    """On a machine that has nothing of the model yet: the real hub client, against a server with the small model."""
    requests = []
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is 1+1?", "solution": "2"}\n' * 200)

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.reply(b"")

        def do_GET(self):
            self.reply(None)

        def reply(self, body):
            requests.append(self.path)
            path = OUTPUT / self.path.rpartition("/")[2]
            exists = "/resolve/" in self.path and path.is_file()
            content = path.read_bytes() if exists else b"[]"
            self.send_response(200 if exists or self.path.startswith("/api/") else 404)
            headers = {"Content-Length": len(content), "ETag": f'"{path.name}"', "X-Repo-Commit": "0" * 40}
            for name, value in (headers if exists else {"Content-Length": 2, "X-Error-Code": "EntryNotFound"}).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content if body is None else b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "train_spark.py", "--config", "recipes/demo.yaml", "--plan"]
        command += ["--model_name_or_path", "someone/tiny", "--output_dir", str(tmp_path / "run")]
        command += ["--dataset", str(rows)]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        hub.shutdown()
    assert run.returncode == 0, run.stderr
    assert "someone/tiny: fetching its config and its processor's files from the hub, not its weights" in run.stderr
    assert "Qwen2_5_VLForConditionalGeneration, 1,170,624 parameters" in run.stdout
    assert "200 rows" in run.stdout
    assert any(path.endswith("/config.json") for path in requests)
    assert not any("safetensors" in path or path.endswith(".bin") for path in requests)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--per_device_train_batch_size", "16384"], "dataset: 64 rows, expected at least the 16384"),
        (["--num_generations", "3"], "divisible by num_generations"),
        (["--use_vllm", "true", "--vllm_tensor_parallel_size", "3"], "vllm_tensor_parallel_size: 3"),
        (["--recycle_ration", "1"], "recycle_ration"),
        (["--plan", "no.yaml"], "no.yaml"),
    ],
)
def test_what_a_plan_refuses_is_one_line(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr("data.read.EMBEDDED_ROWS", 64)
    launch = "recipes/accelerate/ddp.yaml"
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--config", "recipes/demo.yaml", "--plan", launch, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error


def test_an_unknown_key_in_a_recipe_is_one_line(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Path("recipes/spark_7b.yaml").read_text() + "num_generation: 8\n")
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--config", recipe, "--use_cpu", "true")
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "num_generation" in error and "\n" not in error


def test_fsdp_with_a_reference_model_loads_it_whole(monkeypatch):
    """TRL shards it without exchanging weights, and spreads it over all GPUs unless told not to."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    args = SimpleNamespace(beta=0.1, model_init_kwargs=None)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: expected false"):
        settings.under_fsdp(args, adapter=False)
    settings.under_fsdp(args, adapter=True)  # its reference is the model without it
    assert args.model_init_kwargs == {"device_map": None}
    recipe = yaml.safe_load(Path("recipes/accelerate/fsdp2.yaml").read_text())
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", str(recipe["fsdp_config"]["fsdp_cpu_ram_efficient_loading"]))
    settings.under_fsdp(args, adapter=False)


def test_an_adapter_in_bfloat16_is_float32_where_gradients_are_scaled():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).to(torch.bfloat16)
    layers[0].requires_grad_(False)
    gradients = SimpleNamespace(plugin_kwargs={})
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=SimpleNamespace(state_dict_type="FULL_STATE_DICT"))
    trainer = SimpleNamespace(
        is_fsdp_enabled=False,
        args=SimpleNamespace(fp16=True),
        model=layers,
        accelerator=SimpleNamespace(gradient_state=gradients, state=state),
    )
    settings.after_loading(trainer)
    assert [p.dtype for p in layers.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert gradients.plugin_kwargs == {}
    trainer.is_fsdp_enabled = True
    settings.after_loading(trainer)
    assert gradients.plugin_kwargs == {"sync_each_batch": True}
    state.fsdp_plugin.state_dict_type = "SHARDED_STATE_DICT"
    with pytest.raises(ValueError, match="fsdp_state_dict_type: expected FULL_STATE_DICT"):
        settings.after_loading(trainer)
    trainer.is_fsdp_enabled = False
    zero = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}}
    state.deepspeed_plugin = SimpleNamespace(zero_stage=3, deepspeed_config=zero)
    with pytest.raises(ValueError, match=r"zero3_save_16bit_model .*: expected true"):
        settings.after_loading(trainer)


def test_what_ddp_and_fsdp_hold_beside_the_weights():
    sizes = plan.Architecture("x", 1000, 1000, 1, 1, 1, 1, 1)

    def parts(sharding, *flags):
        data, args, model = parse(["--dataset", "digits", "--output_dir", "x", *flags])
        return plan.memory(plan.run_of(data, args, model, plan.Launch(4, sharding), None, None), sizes)

    assert parts("none", "--bf16", "false")["buckets"] == 4000 and parts("fsdp2")["buckets"] == 0
    half = parts("fsdp2", "--bf16", "true", "--dtype", "bfloat16")  # accelerate makes what is trained float32
    assert (half["weights"], half["gradients"], half["optimizer"]) == (1000, 1000, 2000)
    lora = ("--use_vllm", "true", "--use_peft", "true", "--lora_target_modules", "all-linear")
    gathers = (
        ("zero3", "--use_vllm", "false"),
        ("zero3", *lora),
        ("zero3", *lora[:2]),
        ("zero2", "--use_vllm", "false"),
    )
    assert [parts(*flags)["gathered whole"] for flags in gathers] == [2000, 2000, 0, 0]
    more = parts("fsdp2", "--beta", "0.1")["scoring"] - parts("zero3", "--beta", "0.1")["scoring"]
    assert more == 2000  # the reference, in two bytes


def test_the_plan_knows_that_not_every_generation_recycles(capsys, monkeypatch, tmp_path):
    from training.console import plan_lines

    flags = [
        "--config",
        "recipes/demo.yaml",
        "--max_steps",
        "40",
        "--recycle_every",
        "4",
        "--output_dir",
        tmp_path / "x",
    ]
    command(monkeypatch, *flags, "--plan")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recycled rollouts")]
    each, total = (int(number.replace(",", "")) for number in line.split()[-2:])
    assert total == 10 * each
    _, args, _ = parse(list(map(str, flags)), plan.Launch(1))
    assert f"at most {total:,} recycled ones" in plan_lines(args, 40, 0)[0]
    assert args.longest_rows[1] > args.longest_rows[0]
    args.recycle_ratio = 0
    assert args.longest_rows[1] == args.longest_rows[0]  # plain GRPO asks an engine for no more


def test_a_prompt_has_room_for_its_completion_in_the_model_and_in_the_engine():
    from transformers import AutoConfig

    flags = ["--config", "recipes/demo.yaml", "--max_prompt_length", "280", "--max_completion_length", "48"]
    _, args, model = parse(flags, plan.Launch(1))
    config = AutoConfig.from_pretrained(model.model_name_or_path)
    assert args.longest_prompt(config) == (280, "max_prompt_length")
    config.get_text_config().max_position_embeddings = 300
    assert args.longest_prompt(config) == (252, "the model's context less max_completion_length")
    args.vllm_max_model_length = 290
    assert args.longest_prompt(config) == (242, "vllm_max_model_length less max_completion_length")
