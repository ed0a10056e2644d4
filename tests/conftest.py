"""Small models for the tests: the real classes, a few thousand parameters, random weights."""

import atexit
import copy
import os
import shutil
import signal
import tempfile
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read once, when TRL imports trackio

import pytest

from models.make_digits import OUTPUT

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

# A job that a script started in the background ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


# In minutes the longest: with --dist loadfile they begin first, or one of them would end alone.
LONG = ("test_processes.py", "test_train_spark.py", "test_engines.py", "test_stop.py", "test_demo.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """TRL and vLLM set RANK, MASTER_PORT and others for good; the commands that another file starts would obey them."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def processor():
    """The shipped processor, as the trainer loads it."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(OUTPUT, padding_side="left")


@pytest.fixture
def vision_model():
    """A copy of the shipped Qwen2.5-VL, in float32."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(OUTPUT, dtype=torch.float32)


@pytest.fixture(scope="session")
def _text_model(processor):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture
def text_model(_text_model):
    """A Qwen2 of random weights; its rollouts are noise, so the verdict on them is given by the test."""
    return copy.deepcopy(_text_model)
