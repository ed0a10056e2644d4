"""TRL's vLLM rollouts, as a step with two generations wants them. Used by SparkTrainer where `use_vllm` is on.

What differs from TRL's VLLMGeneration, colocated (server mode is TRL's, untouched):
    - The G rollouts of a prompt are asked for at once (n=G) and not as G requests, so its images go through the
      processor and its tokens through the scheduler once. benchmarks/grouped_rollouts.py measures both.
    - The engine stays awake between the generations of a step: one weight sync, and the recycled prompts find the
      question's prefix in the cache. `sleep` is called by the trainer when the step has generated all it needs.
    - New weights also drop the engine's cache of encoded images, which would be the old vision tower's.
    - On the CPU the weights go through vLLM's layer-wise reload, because it repacks linear layers after loading.
"""

from contextlib import contextmanager

from trl.generation.vllm_generation import VLLMGeneration, empty_cache


class ColocatedGeneration(VLLMGeneration):
    """VLLMGeneration of a colocated engine; `adopt` turns TRL's own object into one (TRL offers no other way).

    Attributes:
        read: token ids (b, P) of the last prompts as the engine saw them, images filled in.
    """

    @classmethod
    def adopt(cls, generation: VLLMGeneration) -> "ColocatedGeneration":
        generation.__class__ = cls
        generation.sleeps = generation.asleep = generation.enable_sleep_mode
        generation.enable_sleep_mode = False  # what TRL would do after each generation is done by `sleep`
        return generation

    def sync_weights(self) -> None:
        """The trainer's weights into the engine, woken if it sleeps; what the old ones cached is dropped."""
        if self.asleep:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
        if self.accelerator.device.type == "cpu":
            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.reload_weights(weights_iterator=self._iter_named_params())
            self._repack_embeddings(runner.model)
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()
        self.llm.llm_engine.reset_encoder_cache()  # what the old vision tower made of the images: TRL leaves it
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    @staticmethod
    def _repack_embeddings(model) -> None:
        """An output layer tied to the embeddings computes with a packed copy of them, which the reload leaves old."""
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for layer in model.modules():
            if isinstance(layer, VocabParallelEmbedding):
                layer.quant_method.process_weights_after_loading(layer)

    def sleep(self) -> None:
        """Free the engine's memory for the optimizer step (level 2: the weights are sent anew in the next step)."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def generate(self, prompts, images, num_generations, profiler=None):
        """As VLLMGeneration.generate; whole groups (G equal rows in a row, never straddling processes) go as one."""
        if self.asleep:  # an evaluation after a step that has put the engine to sleep
            self.sync_weights()
        first = self.accelerator.process_index * len(prompts)
        whole = first % num_generations == 0 and len(prompts) % num_generations == 0
        if not whole or self.tensor_parallel_size > 1:  # across a tensor-parallel group TRL slices by row
            self.read, *rollouts = super().generate(prompts, images, num_generations, profiler)
            return self.read, *rollouts
        with self._asking(num_generations):
            read, *rollouts = super().generate(
                prompts[::num_generations], images and images[::num_generations], num_generations, profiler
            )
        self.read = [ids for ids in read for _ in range(num_generations)]
        return self.read, *rollouts

    @contextmanager
    def _asking(self, n: int):
        """TRL asks for one rollout a row; `generation_kwargs` is where it lets that be said otherwise."""
        own = self.generation_kwargs
        self.generation_kwargs = {**own, "n": n}
        try:
            yield
        finally:
            self.generation_kwargs = own
