"""Shared by the tests: files, small data sets, a trainer's settings, and a verifier for a model that writes noise."""

import io
import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from data.digits import digit_rows
from prompts import PROMPT_SUFFIX
from recycle import RecycleConfig

# Of processes that are forked from one that has imported everything, which takes longer than most runs of the tests.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_spark"])

MESSAGES = List({"role": Value("string"), "content": Value("string")})
IMAGE_KINDS = ("sum", "difference", "largest", "smallest")
TEXT_KINDS = ("plus", "factor")


def write(path, rows, lines=False) -> str:
    """Rows as a file, one JSON list or one object a line; returns its path."""
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return str(path)


def png(colour="white") -> bytes:
    with io.BytesIO() as buffer:
        PILImage.new("RGB", (56, 28), colour).save(buffer, format="PNG")
        return buffer.getvalue()


def digits(n, kinds=None, seed=0):
    """Rows of the embedded task as the trainer gets them, with or without images."""
    rows = [r for r in digit_rows("train", 8 * n, seed) if kinds is None or r["dataset"].split("-")[1] in kinds][:n]
    assert len(rows) == n
    features = Features({"prompt": MESSAGES, "images": List(Image()), "solution": Value("string")})
    return Dataset.from_list([{k: r[k] for k in features} for r in rows], features=features)


def mixed(n, seed=0):
    """As many rows with an image as without, in turn."""
    images, texts = digits(n // 2, IMAGE_KINDS, seed), digits(n // 2, TEXT_KINDS, seed)
    rows = [row for pair in zip(images, texts, strict=True) for row in pair]
    return Dataset.from_list(rows, features=images.features)


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
    if issubclass(cls, RecycleConfig):
        settings["recycle_ratio"] = 1.0  # enough items in a small batch
    return cls(**(settings | changes))


def coin(prompts, completions, **columns):
    """A verifier for a model whose rollouts are noise: right where the completion has an even length."""
    return [float(len(c[0]["content"]) % 2 == 0) for c in completions]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def history(trainer):
    """The logs of the optimizer steps."""
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def save_text_model(model, tokenizer, folder: Path) -> None:
    """A folder as a text model's is; the tests' tokenizer comes from a model that sees, and says so."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def print_into(path: Path) -> None:
    """What this process prints, and those that it starts, goes into a file from now on."""
    with open(path, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class ForkedTraining:
    """train_spark.py with these arguments in a process of its own, with what a test needs of subprocess.Popen.

    file_limit: bytes that a file can have.
    """

    def __init__(self, arguments: list[str], errors: Path, file_limit: int | None = None):
        self._errors = errors
        self._process = FORKS.Process(target=_train, args=(arguments, errors, file_limit))
        self._process.start()
        self.kill = self._process.kill

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    @property
    def stderr(self) -> io.StringIO:
        return io.StringIO(self._errors.read_text(encoding="utf-8"))

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _train(arguments: list[str], errors: Path, file_limit: int | None) -> None:
    with open(errors, "w", encoding="utf-8") as file, open(os.devnull, "w") as nowhere:
        os.dup2(file.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import train_spark

    sys.argv = ["train_spark.py", *arguments]
    train_spark.main()
