"""TRL's vLLM rollouts, for a step with two generations and for images. Used by SparkTrainer where `use_vllm` is on.

What differs from TRL's VLLMGeneration:
    - Colocated, the G rollouts of a prompt are asked for at once (n=G) and not as G requests, so its images go through
      the processor and its tokens through the scheduler once. benchmarks/grouped_rollouts.py measures both.
    - The engine stays awake between the generations of a step: one weight sync, and the recycled prompts find the
      question's prefix in the cache. It sleeps as soon as the last of them has ended.
    - The engine gets prompts with one placeholder an image, which it expands itself. TRL 1.16 gives it expanded ones,
      of which vLLM expands the first image token again (TRL's issue 6294). What it read is compared with what the
      trainer trains on.
    - An adapter is merged into a layer only to be copied from there, and the layer's weights are put back. TRL takes it
      out of them again, which rounds: the base drifts from the one that the saved adapter belongs to.
    - New weights also drop the engine's cache of encoded images, which would be the old vision tower's.
    - Processes that share an engine (vllm_tensor_parallel_size) draw the same random numbers.
    - On the CPU the weights go through vLLM's layer-wise reload, because it repacks linear layers after loading.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.generation.vllm_generation import VLLMGeneration, empty_cache

from data.rows import BadInput


def adopt_engine(trainer, longest: int) -> None:
    """Turn the trainer's VLLMGeneration into a SparkGeneration (TRL offers no other way).

    Raises ValueError where a vLLM server takes fewer tokens than `longest`, the longest prompt with its completion.
    """
    generation = trainer.vllm_generation
    generation.__class__ = SparkGeneration
    if isinstance(trainer.processing_class, ProcessorMixin):
        # Never sampled: the forward pass would look for that image, and fail.
        image_token = trainer._tokenizer.convert_ids_to_tokens(trainer.model.config.image_token_id)
        kwargs = generation.generation_kwargs
        generation.generation_kwargs = {**kwargs, "bad_words": [*kwargs.get("bad_words", ()), image_token]}
    generation.sleeps = generation.asleep = generation.mode == "colocate" and generation.enable_sleep_mode
    generation.enable_sleep_mode = False  # TRL would sleep after each generation
    if generation.mode == "server" and trainer.accelerator.is_main_process:
        client = generation.vllm_client
        served = client.get_server_info()["model_config"]["max_model_len"]
        if served < longest:
            raise ValueError(
                f"{client.base_url}: takes {served} tokens, expected {longest}; restart it with --max-model-len "
                f"{longest}, or set vllm_max_model_length: {served} (longer recycled prompts are skipped)"
            )


class SparkGeneration(VLLMGeneration):
    """VLLMGeneration of a SPARK step.

    Attributes:
        stay_awake: another generation of the same step follows.
        placeholder_ids: the next prompts as the engine is to read them (see `placeholders`); None: as they are.
    """

    stay_awake = False
    placeholder_ids: list[list[int]] | None = None

    def sync_weights(self) -> None:
        """The trainer's weights into the engine, woken if it sleeps; what the old ones cached is dropped."""
        if self.mode == "server":
            super().sync_weights()
            if self.accelerator.is_main_process and isinstance(self.processing_class, ProcessorMixin):
                url = f"{self.vllm_client.base_url}/reset_encoder_cache"
                answer = self.vllm_client.session.post(url)  # an empty one
                if answer.status_code != 200:
                    raise RuntimeError(f"{url}: answered {answer.status_code}: {answer.text}")
            return
        if self.asleep:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
        if self.accelerator.device.type == "cpu":
            from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.reload_weights(weights_iterator=self._iter_named_params())
            # An output layer tied to the embeddings computes with a packed copy of them, which the reload leaves old.
            for layer in runner.model.modules():
                if isinstance(layer, VocabParallelEmbedding):
                    layer.quant_method.process_weights_after_loading(layer)
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()
        self.llm.llm_engine.reset_encoder_cache()  # what the old vision tower made of the images: TRL leaves it
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under vLLM's names, with the adapter in them. Where they are sharded, as TRL does it: what is
        merged into a gathered copy is thrown away by ZeRO-3."""
        model = self.model
        if not is_peft_model(model) or self._dist.is_fsdp or self._dist.is_zero3:
            yield from super()._iter_named_params()
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = defaultdict(list)  # of a weight; experts have one for each of their weights, around one module
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                for weight in layer.get_base_layer().parameters(recurse=False):
                    layers[id(weight)].append(layer)
        for name, weight in model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if model.prefix in name or "original_module" in name:
                continue
            name = self._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."])
            if id(weight) not in layers:
                yield name, weight.data
                continue
            with ExitStack() as merged:
                for layer in layers[id(weight)]:
                    merged.enter_context(_merged(layer))
                copy = weight.data.clone()
            yield name, copy

    def sleep(self) -> None:
        """Free the engine's memory for the optimizer step (level 2: the weights are sent anew in the next step)."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def generate(self, prompts, images, num_generations, profiler=None):
        """As VLLMGeneration.generate; whole groups (G equal rows together, never straddling processes) go as one."""
        images = images and [row_images or None for row_images in images]
        if self.mode == "server":
            return super().generate(prompts, images, num_generations, profiler)
        if self.asleep:  # an evaluation after a step that has put the engine to sleep
            self.sync_weights()
        requests, self.placeholder_ids = self.placeholder_ids or prompts, None
        first = self.accelerator.process_index * len(prompts)
        whole = first % num_generations == 0 and len(prompts) % num_generations == 0
        n = num_generations if whole and self.tensor_parallel_size == 1 else 1  # a tensor-parallel group slices by row
        kwargs = self.generation_kwargs
        self.generation_kwargs = {**kwargs, "n": n}  # TRL asks for one rollout a row; these win
        try:
            with self._sampling_alike():
                read, *rollouts = super().generate(requests[::n], images and images[::n], num_generations, profiler)
        finally:
            self.generation_kwargs = kwargs
        read = [ids for ids in read for _ in range(n)]
        if images and read != prompts:
            n_read, n_prompt = (sum(map(len, ids)) for ids in (read, prompts))
            raise BadInput(
                f"vLLM read {n_read} prompt tokens where the trainer has {n_prompt}: it expands the images of "
                f"{type(self.processing_class).__name__} differently; expected the processor's files beside the "
                "model's weights, or use_vllm: false"
            )
        if not self.stay_awake:
            self.sleep()
        return read, *rollouts

    @contextmanager
    def _sampling_alike(self) -> Iterator[None]:
        """Processes that share an engine draw the same tokens. Each samples for itself, from torch's or numpy's global
        generator, and these differ once one process has drawn alone (dropout, a verifier)."""
        if self.tensor_parallel_size == 1:
            yield
            return
        seeds = [0] * self.tensor_parallel_size
        torch.distributed.all_gather_object(seeds, int(torch.randint(2**31, ())), group=self.tp_group)
        device, state = self.accelerator.device, np.random.get_state()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seeds[0])
                np.random.seed(seeds[0])
                yield
        finally:
            np.random.set_state(state)


@contextmanager
def _merged(layer) -> Iterator[None]:
    """A layer of PEFT's with its adapter merged, and afterwards bit for bit as it was."""
    before = [(weight, weight.data.clone()) for weight in layer.get_base_layer().parameters(recurse=False)]
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        for weight, value in before:
            weight.data.copy_(value)


def placeholders(trainer, prompts: list) -> list[list[int]]:
    """Token ids of chat prompts with one placeholder an image, rendered as TRL renders them."""
    texts = trainer.processing_class.apply_chat_template(
        [prepare_multimodal_messages(prompt) for prompt in prompts],
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **trainer.chat_template_kwargs,
    )
    tokenizer = trainer.processing_class.tokenizer
    has_bos = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)  # from the template
    return tokenizer(texts, add_special_tokens=not has_bos)["input_ids"]
