"""Two processes are one process with twice the batch: DDP, FSDP2 and DeepSpeed's ZeRO-3 over gloo, on the CPU.

Rollouts are drawn from the prompt and the place in the group, so that they do not depend on who generates them; all the
rest is the trainer's own. In float64, so that what is left of a difference is the order of a sum.
"""

import copy
import functools
import json
import os
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from helpers import FORKS, print_into
from safetensors.torch import load_file, save_file

ROWS = 12  # a generation batch: 3 groups of 4, so that in two processes of 6 rows a group straddles


def launch(folder: Path, kind: str, dtype: str, world: int, how: str = "ddp") -> dict:
    """What `work` saved in a run of so many processes."""
    out = folder / f"{kind}_{dtype}_{world}"
    out.mkdir()
    launch_all(functools.partial(rank_of_a_run, kind, dtype, how), out, world)
    weights = load_file(out / "weights.safetensors")
    return {"weights": weights, **json.loads((out / "seen.json").read_text(encoding="utf-8"))}


def launch_all(rank_of: Callable[[Path, int, int], None], out: Path, world: int) -> None:
    """`rank_of` in so many processes; where one fails, the others end as well."""
    processes = [FORKS.Process(target=rank_of, args=(out, i, world)) for i in range(world)]
    for process in processes:
        process.start()
    until = time.monotonic() + 500
    while any(process.is_alive() for process in processes):
        if time.monotonic() > until or any(process.exitcode for process in processes):
            for process in processes:  # the others wait for it in a collective
                process.kill()
        time.sleep(0.05)
    logs = [(out / f"rank_{i}.txt").read_text(encoding="utf-8")[-4000:] for i in range(world)]
    assert [process.exitcode for process in processes] == [0] * world, "\n".join(logs)


def as_rank(out: Path, rank: int, world: int) -> None:
    """Print to a file of its own, in the environment that torchrun makes."""
    print_into(out / f"rank_{rank}.txt")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def rank_of_a_run(kind: str, dtype: str, how: str, out: Path, rank: int, world: int) -> None:
    """`work` with the environment that torchrun, or `accelerate launch` with ZeRO-3, makes."""
    as_rank(out, rank, world)
    if how.startswith("zero"):
        stage3 = str(how == "zero3").lower()
        deepspeed = {"ZERO_STAGE": how[-1], "ZERO3_INIT": stage3, "ZERO3_SAVE_16BIT_MODEL": stage3}
        os.environ |= {f"ACCELERATE_DEEPSPEED_{name}": value for name, value in deepspeed.items()}
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        import deepspeed.ops

        # Collectives in shared memory: a C++ extension that DeepSpeed takes a minute to compile. Without it, gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world)
    try:
        resume(out) if how == "resumed" else work(out, kind, getattr(torch, dtype), how)
    except BaseException:
        traceback.print_exc()  # multiprocessing would print it to the parent's stream
        raise


def work(out: Path, kind: str, dtype: torch.dtype, how: str) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
    from datasets import Dataset
    from helpers import IMAGE_KINDS, TEXT_KINDS, coin, config, digits, history, sums
    from torch.distributed.fsdp import FSDPModule
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

    from models.make_digits import OUTPUT
    from train_spark import SparkConfig, SparkTrainer

    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(OUTPUT, padding_side="left")
    if kind in ("text", "few"):
        processor = processor.tokenizer
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(processor), num_key_value_heads=1, **sizes)).to(dtype)
        data, layers = sums(12), ["Qwen2DecoderLayer"]
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(OUTPUT, dtype=dtype)
        images, texts = digits(4, IMAGE_KINDS), digits(8, TEXT_KINDS)
        rows = {True: iter(images), False: iter(texts)}  # of each generation's three: the second straddles
        order = [False, False, True, True, False, False, False, True, False, False, False, True]
        data = Dataset.from_list([next(rows[with_image]) for with_image in order], features=images.features)
        layers = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
    tokenizer = processor.tokenizer if kind == "mixed" else processor
    answers = [tokenizer(f"\\boxed{{{text}}}")["input_ids"] for text in "Yes No A B 1 2 3 5 8 13".split()]
    seen = {"prompts": [], "labels": [], "advantages": [], "metrics": [], "images": [], "passes": []}

    class Drawn(SparkTrainer):
        _generates_sharded = False  # nothing is generated

        def create_accelerator_and_postprocess(self):
            """accelerate knows FSDP2 for accelerators alone; torch has it for the CPU too."""
            super().create_accelerator_and_postprocess()
            if how == "fsdp2":
                plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2,
                    auto_wrap_policy="transformer_based_wrap",
                    transformer_cls_names_to_wrap=layers,
                    state_dict_type="FULL_STATE_DICT",
                )
                PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
                self.accelerator.state.fsdp_plugin = plugin
                self.is_fsdp_enabled = True

        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
            first = self.accelerator.process_index * len(prompt_ids)
            seen["images"].append(gather_object([images is not None]))
            drawn = []
            for i, ids in enumerate(prompt_ids):
                seed = zlib.crc32(repr((list(ids), (first + i) % num_generations, self.state.global_step)).encode())
                generator = torch.Generator().manual_seed(seed)
                words = torch.randint(
                    len(answers), (int(torch.randint(1, 4, (), generator=generator)),), generator=generator
                )
                drawn.append([token for word in words for token in answers[word]])
            return drawn, None

        def _judging(self, asked):
            items = asked[:: self.num_generations]
            seen["prompts"].append([item.prompt for item in items])
            seen["labels"].append([item.label for item in items])
            return super()._judging(asked)

        def _passes(self, union, n_policy):
            policy, recycled = union["advantages"][:n_policy].tolist(), union["advantages"][n_policy:].tolist()
            seen["advantages"].append(gather_object(policy) + gather_object(recycled))
            micro_steps = super()._passes(union, n_policy)
            seen["passes"].append([len(passes) for passes in micro_steps])
            return micro_steps

    def mostly_right(prompts, completions, **columns):
        contrast = [prompt[-1]["content"].startswith(("What is 0", "What is 4", "What is 8")) for prompt in prompts]
        return [value if mixed else 1.0 for value, mixed in zip(coin(prompts, completions), contrast, strict=True)]

    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"per_device_train_batch_size": ROWS // world, "max_steps": 3, "shuffle_dataset": False}
    if kind == "mixed" or dtype == torch.float32:
        # Qwen's norms and rotations are float32 whatever the weights; Adam would make a step of that noise.
        settings |= {"optim": "sgd", "learning_rate": 0.1}
    if kind == "few":  # of 16 rows a generation 4 teach, in 4 micro-steps
        settings |= {"per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 4, "recycle_every": 2}
    verifier, arguments = mostly_right if kind == "few" else coin, config(SparkConfig, out, **settings)
    trainer = Drawn(model, verifier, arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    timed = ("seconds", "time", "runtime", "per_second", "flos")
    seen["metrics"] = [{k: v for k, v in h.items() if not any(t in k for t in timed)} for h in history(trainer)]
    if kind == "text" and how == "ddp":  # five questions: of two processes, one has three of their own and one has two
        trained = copy.deepcopy(seen)
        measured = trainer.evaluate(sums(5))
        assert "eval_judge/pointwise/accuracy" in measured
        seen = trained  # what is recycled in an evaluation depends on its batches
        seen["evaluated"] = [measured[f"eval_policy/{name}"] for name in ("accuracy", "pass_at_g", "unboxed")]
    trainer.save_model(str(out / "model"))  # gathers what FSDP has sharded
    assert trainer.accelerator.num_processes == world
    assert isinstance(trainer.model_wrapped, FSDPModule) == (how == "fsdp2")
    assert (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine") == how.startswith("zero")
    if trainer.accelerator.is_main_process:
        seen["processes"] = world
        (out / "model" / "model.safetensors").rename(out / "weights.safetensors")
        (out / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.barrier()


def resume(out: Path) -> None:
    """A run that is saved in the middle of a generation, goes on, and is resumed from there: as it is, and with half of
    the batch and twice the accumulation. Every process says whether its weights are those of all."""
    from accelerate.utils import gather_object
    from helpers import coin, config, sums
    from transformers import AutoProcessor, Qwen2Config, Qwen2ForCausalLM

    from models.make_digits import OUTPUT
    from train_spark import SparkConfig, SparkTrainer

    tokenizer = AutoProcessor.from_pretrained(OUTPUT, padding_side="left").tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

    def trained(folder: str, checkpoint=None, **settings) -> torch.Tensor:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
        arguments = config(SparkConfig, out / folder, save_strategy="steps", save_steps=3, **settings)
        trainer = SparkTrainer(model, coin, arguments, train_dataset=sums(16), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    cut = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    finer = {"per_device_train_batch_size": 2, "steps_per_generation": 8, "gradient_accumulation_steps": 4}
    whole = trained("whole", max_steps=5, **cut)
    saved = str(out / "whole" / "checkpoint-3")
    again, other = trained("again", saved, max_steps=5, **cut), trained("finer", saved, max_steps=5, **finer)
    alike = [all(torch.equal(w, gathered) for gathered in gather_object([w])) for w in (whole, again, other)]
    alike = gather_object([alike])
    if int(os.environ["RANK"]) == 0:
        seen = {"same": torch.equal(whole, again), "moved": not torch.equal(whole, other), "alike": alike}
        (out / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
        save_file({"weights": whole}, out / "weights.safetensors")
    torch.distributed.barrier()


def assert_same_run(one: dict, two: dict, recycled: int = 3) -> None:
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["prompts"]) == recycled
    assert one["prompts"] == two["prompts"]
    assert one["labels"] == two["labels"]
    for a, b in zip(one["advantages"], two["advantages"], strict=True):
        assert a == pytest.approx(b, abs=1e-6)
        assert any(a)
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        for name in a:
            # Entropy and clip ratios are of the rows trained on: two processes keep some rows without gradient, so as
            # to have equally many.
            loss_metric = name.removeprefix("recycle/").startswith(("clip_ratio", "entropy", "trained"))
            if not loss_metric and name not in ("loss", "num_tokens", "step_time"):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    moved = max((two["weights"][name] - weight).abs().max().item() for name, weight in one["weights"].items())
    assert moved < 5e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, each made when a test first asks for it."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda kind, dtype: launch(folder, kind, dtype, 1))


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_ddp_is_one_process_with_twice_the_batch(kind, alone, tmp_path):
    one, two = alone(kind, "float64"), launch(tmp_path, kind, "float64", 2)
    assert_same_run(one, two)
    if kind == "text":
        assert one["evaluated"] == two["evaluated"] and 0 < one["evaluated"][0] < 1
    if kind == "mixed":
        assert [False, True] in two["images"] and [True, False] in two["images"]  # a rank without any image


@pytest.mark.parametrize(
    "how, kind", [("fsdp2", "text"), ("fsdp2", "mixed"), ("zero3", "text"), ("zero3", "mixed"), ("zero2", "mixed")]
)
def test_sharded_it_is_one_process_with_twice_the_batch(how, kind, alone, tmp_path):
    """DeepSpeed takes float64 only on a CPU without float16 arithmetic."""
    dtype = "float32" if how.startswith("zero") else "float64"
    assert_same_run(alone(kind, dtype), launch(tmp_path, kind, dtype, 2, how))


def test_deepspeed_has_a_gradient_of_every_micro_step(alone, tmp_path):
    """Where rows are left out, some micro-steps have none to train on; DeepSpeed can't go backward from nothing."""
    one, two = alone("few", "float32"), launch(tmp_path, "few", "float32", 2, "zero3")
    assert any(0 in micro_steps for micro_steps in one["passes"])
    assert not any(0 in micro_steps for micro_steps in two["passes"])
    assert_same_run(one, two, recycled=2)


def test_two_processes_resume_as_if_never_interrupted_and_stay_alike(tmp_path):
    seen = launch(tmp_path, "text", "float32", 2, "resumed")
    assert seen["same"] and seen["moved"]
    assert seen["alike"] == [[True] * 3] * 2


SMALL = "--config recipes/demo.yaml --num_generations 4 --max_completion_length 16 --save_strategy no".split()
SMALL += ["--recycle_ratio", "1.5"]


def test_the_demos_own_data_trains_on_two_processes(tmp_path):
    """A quarter of it is text, so that soon one process has no image."""
    flags = [*SMALL, "--ddp_backend", "gloo", "--max_steps", "4", "--per_device_train_batch_size", "8"]
    launch_all(functools.partial(command_of_a_rank, [*flags, "--output_dir", str(tmp_path / "run")]), tmp_path, 2)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def command_of_a_rank(flags: list[str], out: Path, rank: int, world: int) -> None:
    """train_spark.py with the environment that torchrun makes."""
    as_rank(out, rank, world)
    import train_spark

    torch.distributed.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world)
    sys.argv = ["train_spark.py", *flags]
    train_spark.main()


def test_a_process_that_fails_alone_ends_the_run(tmp_path):
    """The others wait for it in a collective: `accelerate launch` ends them, and the run, within a minute."""
    rows = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        PIL.Image.effect_noise((56, 56), 50).save(path)
        rows.append({"prompt": f"{i}+1?", "solution": str(i + 1), "image": path.name})
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])  # found when it is used, by one process
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "train_spark.py"]
    command += [*SMALL, "--dataset", str(tmp_path / "rows.json"), "--strict", "true", "--ddp_backend", "gloo"]
    command += ["--max_steps", "2", "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:
            if "row 2: field image" in line:
                break
        else:
            pytest.fail("the broken image was not found")
        start = time.monotonic()
        rest = run.communicate(timeout=240)[1]
    assert run.returncode != 0
    assert time.monotonic() - start < 120
    assert rest.count("row 2: field image") == 0  # one line, by the process that met it


def test_two_processes_that_share_an_engine_sample_the_same_tokens(tmp_path):
    """The real command: dropout draws another number on each process, and each samples its half of the layers' tokens.
    Of other tokens than the engine's, the log-probabilities would differ by 10."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_spark.py"]
    engine = ["--use_vllm", "true", "--vllm_tensor_parallel_size", "2", "--vllm_gpu_memory_utilization", "0.3"]
    adapter = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_dropout", "0.05"]
    run = ["--config", "recipes/demo.yaml", "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    sizes = ["--per_device_train_batch_size", "16", "--log_completions", "false", "--save_strategy", "no"]
    env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"VLLM_CPU_CI_ENV": "1"}  # traced, but not compiled
    done = subprocess.run(
        [*command, *run, *engine, *adapter, *sizes], env=os.environ | env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr  # the engine ends before its process groups do
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    name = "sampling/sampling_logp_difference/max"
    differences = [row[part + name] for row in logs if "loss" in row for part in ("", "recycle/")]
    assert len(differences) == 4 and max(differences) < 1  # of float32 and bfloat16
