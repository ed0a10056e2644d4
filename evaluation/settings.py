"""What decides a result of evaluate.py, and what its engine needs."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import verify
from data.arguments import DataSettings
from data.cli import flag
from data.rows import BadInput
from engines import Sampling
from prompts import BOX, PROMPT_SUFFIX

COLUMNS = ("solution", "task", "source")  # what a verifier of yours gets of a row, beside its images
TTS = ("reflect", "vote", "weighted_vote", "best_of_n", "compare")


@dataclass(frozen=True)
class Settings:
    """What decides a result. A results file made with other settings is not continued."""

    model: str = flag(help="a folder or a hub name")
    mode: str = flag("answer", choices=("answer", "tts", "judge"))
    benchmark: tuple[str, ...] = flag((), "files (data/README.md), folders or hub names", required=True)
    engine: str = flag("auto", choices=("auto", "vllm", "transformers", "server"))
    max_tokens: int = flag(2048, least=1)
    temperature: float = flag(0.0, least=0)
    judge_temperature: float | None = flag(None, "of verdicts (default: --temperature)", least=0)
    repetition_penalty: float = flag(1.0, least=0.01)
    tts: str = flag("reflect", "mode tts: how", choices=TTS)
    max_rounds: int = flag(2, "tts reflect: maximum number of reflections", least=0)
    n: int = flag(8, "tts, other than reflect: answers per question", least=1)
    judge_samples: int = flag(1, "judge: verdicts per question; the majority counts", least=1)
    judge_source: str = flag("cot", "what a judge sees", choices=("cot", "answer"))
    reflect_on: str = flag("no", "tts reflect: on a No alone, or on anything but a Yes", choices=("no", "not_yes"))
    prompt_suffix: str = flag(PROMPT_SUFFIX, "what questions end with; as in training")
    answer_mark: str = flag(BOX, "where reflections put the answer; as in training")
    reward_funcs: str | None = flag(None, "your own verifier as in training, FILE.py:NAME (default: verify.py)")
    correct_at: float | None = flag(None, "least reward of that verifier that is right (default: it gives 0 or 1)")
    seed: int = flag(0)
    served_model: str | None = flag(None, "server: the name the model has there (default: --model)")
    extra_body: str | None = flag(
        None, 'server: what every request also has, as {"top_k": 20} in JSON; null: leave it out'
    )

    @property
    def extra(self) -> dict[str, Any]:
        """`extra_body`, read. Raises BadInput."""
        try:
            found = json.loads(self.extra_body or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise BadInput(f"--extra_body: expected a JSON object, got {self.extra_body!r:.80}")
        return found

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.repetition_penalty)

    @cached_property
    def reward(self) -> Callable | None:
        """Your own verifier, if any, of TRL's signature: 1 is right, 0 wrong, None no opinion. Raises BadInput."""
        if self.reward_funcs is None:
            return None
        from training.rewards import load_rewards

        (function,) = load_rewards([self.reward_funcs])
        try:
            inspect.signature(function).bind(prompts=[], completions=[], **dict.fromkeys((*COLUMNS, "images")))
        except TypeError as error:
            passed = ", ".join(("prompts", "completions", *COLUMNS, "images"))
            raise BadInput(f"reward_funcs: {self.reward_funcs}: {error}; evaluation passes {passed}") from None
        return function

    @property
    def equal(self) -> Callable[[list[tuple]], list[bool | None]]:
        """For pairs of answers: whether they are the same."""
        return getattr(self.reward, "equal", verify.verify_many)

    @property
    def extract(self) -> Callable[[str], str | None]:
        """The answer in a text, or None."""
        return getattr(self.reward, "extract", verify.extract_boxed)


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs and no result depends on."""

    dtype: str = flag(
        "auto",
        "vllm, transformers: auto is the model's own (vllm: bfloat16 for float32), float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    batch_size: int = flag(128, "transformers", least=1)
    max_model_len: int | None = flag(
        None,
        "vllm: most tokens of prompt and completion together (default: the model's, all of which needs room)",
        least=1,
    )
    gpu_memory_utilization: float | None = flag(None, "vllm: share of the GPU's memory (default: vLLM's)", least=0)
    tensor_parallel_size: int = flag(1, "vllm: GPUs that the model is split over", least=1)
    server: tuple[str, ...] = flag((), "server: URLs; the key is read from OPENAI_API_KEY")
    concurrency: int = flag(64, "server: concurrent requests, over all URLs", least=1)
    timeout: float = flag(600.0, "server: seconds for one try", least=0.1)


def refuse_idle(settings: Settings, data: DataSettings) -> None:
    """Raises BadInput for a flag that the others leave without effect."""
    for mode, names in (("tts", ("tts", "max_rounds", "n")), ("judge", ("judge_samples",))):
        for name in names:
            if settings.mode != mode and getattr(settings, name) != getattr(Settings, name):
                raise BadInput(f"--{name}: expected --mode {mode} beside it, got {settings.mode}")
    for name in ("served_model", "extra_body"):
        if settings.engine != "server" and getattr(settings, name) is not None:
            raise BadInput(f"--{name}: expected --server URL beside it")
    _ = settings.extra
    if settings.mode == "tts" and settings.tts != "reflect" and settings.temperature == 0:
        raise BadInput(f"--tts {settings.tts}: expected a --temperature above 0, or all answers are the same")
    judging_at = settings.temperature if settings.judge_temperature is None else settings.judge_temperature
    if settings.judge_samples > 1 and judging_at == 0:
        raise BadInput("--judge_samples: expected a --temperature above 0, or all verdicts are the same")
    for name, value in (("keep_solution", data.keep_solution), ("correct_at", settings.correct_at is not None)):
        if value and settings.reward_funcs is None:
            raise BadInput(f"--{name}: expected --reward_funcs beside it: verify.py has no use for it")
