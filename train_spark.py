"""SPARK on TRL: one model learns to answer, to judge and to reflect from verifiable rewards alone (arXiv 2509.22624).

    python train_spark.py --config recipes/demo.yaml
    accelerate launch --config_file recipes/accelerate/zero3.yaml train_spark.py --config recipes/spark_vl_7b.yaml

Each step of `SparkTrainer`, a GRPOTrainer:

    1. roll out the policy prompts and score them                          super()._generate_and_score_completions
    2. rewrite the scored rollouts into judge and reflection prompts       recycle.recycle
    3. roll those out with the same weights and score them                 super()._generate_and_score_completions
    4. train on the union of both with TRL's own loss                      training.batch

Where this departs from the paper's released code:
1. Policy and recycled rollouts are trained on together, in as many optimizer steps as you set
   (`steps_per_generation`). There, recycled prompts wait in a cache until 64 of them make a second generation with
   updates of its own; by then the weights that wrote the quoted rollouts have changed.
2. Labels are balanced and the question does not give them away (recycle.py).
3. A quarter as many recycled prompts as questions (there, as many): judges nearly as well, answers better (RESULTS.md).
4. Batch sizes are the ones you set; there, 64 prompts and 8 rollouts are hard-coded.
5. What can't be scored is left out and counted instead of being called wrong.
With `recycle_ratio 0` it is GRPOTrainer, number for number.
"""

import sys

if __name__ == "__main__":  # before torch and TRL are imported
    from training import console

    console.start(sys.argv[1:], __file__)

import copy
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoConfig, AutoProcessor
from transformers.trainer_utils import has_length
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.import_utils import is_vllm_available

import verify
from data.arguments import DataArguments
from data.cli import flag
from data.rows import BadInput, question_key
from prompts import TEMPLATE_TOKENS, instructions
from recycle import TASKS, Group, Item, Limits, RecycleConfig, Rollout, items_come_in, recycle
from training import console, plan
from training.batch import join, share_images
from training.callbacks import MetricsFile, RecycledTable, StopOnSignal, Watch, changed_settings, show_progress
from training.checkpoint import SafeCheckpoints, copy_result, finished, last_checkpoint, where_to_start
from training.images import MixedImages
from training.logs import StepLogs
from training.metrics import recycling_metrics
from training.model_card import SparkModelCard
from training.passes import TOKEN_LOSSES, InPasses
from training.rewards import JudgingRewards, load_rewards
from training.settings import (
    after_loading,
    attention,
    check_alike,
    check_choices,
    check_columns,
    check_engine,
    check_files,
    check_installation,
    check_model,
    check_weights,
    freeze,
    refusing,
    under_fsdp,
)
from training.vllm import adopt_engine


@dataclass
class SparkConfig(RecycleConfig, GRPOConfig):
    """GRPOConfig and the settings of recycling (recycle.RecycleConfig: the `recycle_*` fields, `prompt_suffix`)."""

    use_vllm: bool | None = flag(None, "Generate with vLLM; default: where it is installed and there is a GPU.")
    max_prompt_length: int = flag(
        8192,
        "Longest policy prompt in tokens, images included; the command leaves longer rows out. vLLM has room for that, "
        "two quoted rollouts and a completion (vllm_max_model_length); longer recycled prompts are skipped.",
    )
    correct_at: float | None = flag(
        None,
        "Least reward from the first reward function that makes a rollout right. Default: it gives 0 or 1; anything "
        "else is refused.",
    )
    recycle_every: int = flag(1, "Recycle in every n-th generation; the others are plain GRPO.")
    recycle_in_evaluation: bool = flag(
        True,
        "Evaluation during training measures judging and reflecting as well, on everything that its rollouts can be "
        "recycled into. Give it several questions per batch (per_device_eval_batch_size).",
    )
    recycle_weight: float = flag(1.0, "Multiplies the advantages of recycled rows (not a KL term).")
    recycle_apart: bool = flag(
        False,
        "Recycled rows have optimizer steps of their own, after the policy's, as in the release, which rolls them out "
        "after those, too: needs steps_per_generation to be 2, 4, ... times gradient_accumulation_steps.",
    )
    freeze_prefix: list[str] | None = flag(  # noqa: RUF009 (training/console.py reads flags)
        None, "Parameters whose names start with one of these are not trained, as visual: the vision tower."
    )
    drop_zero_advantage: bool | None = flag(
        None,
        "Leave rows without gradient (advantage 0) out of the passes. Default: with recycling on, where that changes "
        "no gradient (no KL term, entropy bonus, auxiliary loss or entropy quantile).",
    )

    def __post_init__(self):
        self.choose_engine()
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
        for name in (*sizes, "max_prompt_length", "max_completion_length", "recycle_every"):
            if not (isinstance(size := getattr(self, name), int) and size >= 1):
                raise ValueError(f"{name}: expected 1 or more, got {size!r}")
        super().__post_init__()
        self.check_recycling()
        if self.recycle_ratio > 0 and self.has_entropy_bonus and self.loss_type not in (*TOKEN_LOSSES, "bnpo"):
            raise ValueError(
                f"entropy_coef: expected 0 with loss_type {self.loss_type} and recycling, whose passes differ in size: "
                f"a bonus by tokens needs a loss by tokens ({', '.join(TOKEN_LOSSES)}, bnpo)"
            )

        if self.use_transformers_continuous_batching and self.eval_strategy != "no":
            raise ValueError(
                "use_transformers_continuous_batching: expected false with an eval_strategy: after generating with it, "
                "TRL 1.16 leaves the model in training mode"
            )
        if self.recycle_ratio > 0 and self.reward_weights and self.reward_weights[0] == 0:
            raise ValueError(
                "reward_weights: expected a first one other than 0 with recycling: it weighs verdicts as well"
            )
        check_choices(self)
        if self.recycle_ratio > 0 and self.vllm_structured_outputs_regex is not None:
            raise ValueError(
                "vllm_structured_outputs_regex: expected none with recycling: judges write Yes, No, A or B"
            )
        if self.recycle_apart and self.steps_per_generation % (2 * self.gradient_accumulation_steps):
            raise ValueError(
                f"recycle_apart: expected steps_per_generation of 2, 4, ... x gradient_accumulation_steps, got "
                f"{self.steps_per_generation} and {self.gradient_accumulation_steps}"
            )

    def choose_engine(self) -> None:
        if self.use_vllm is None:
            self.use_vllm = is_vllm_available() and torch.cuda.is_available() and not self.use_cpu

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef != 0 or self.use_adaptive_entropy

    @property
    def has_extra_terms(self) -> bool:
        """Whether more than its advantage decides a row's gradient."""
        return self.beta != 0 or self.has_entropy_bonus or self.top_entropy_quantile < 1

    @property
    def longest_rows(self) -> tuple[int, int]:
        """Most tokens of a policy row, and of a recycled one, which also quotes one rollout or two and asks."""
        policy = self.max_prompt_length + self.max_completion_length
        if self.recycle_ratio == 0:
            return policy, policy
        quoted = 2 if "pairwise" in self.recycle_tasks else 1
        return policy, policy + quoted * self.max_completion_length + TEMPLATE_TOKENS

    def longest_sequence(self, config) -> int:
        """Tokens that the engine has room for: the longest row, capped at the model's context."""
        if self.vllm_max_model_length is not None:
            return self.vllm_max_model_length
        return min(max(self.longest_rows), config.get_text_config().max_position_embeddings)

    def longest_prompt(self, config) -> tuple[int, str]:
        """(most tokens of a policy prompt, the setting that says so): it needs room for a completion after it."""
        room = self.longest_sequence(config) - self.max_completion_length
        if room >= self.max_prompt_length:
            return self.max_prompt_length, "max_prompt_length"
        of = "the model's context" if self.vllm_max_model_length is None else "vllm_max_model_length"
        return room, f"{of} less max_completion_length"


class SparkTrainer(InPasses, MixedImages, SafeCheckpoints, StepLogs, SparkModelCard, GRPOTrainer):
    """GRPOTrainer whose training batches also hold the recycled rollouts of the same step.

    What makes it SPARK is `_generate_and_score_completions`. Everything that is overridden; what is not about recycling
    falls through to super():

    | member | why | where |
    | --- | --- | --- |
    | `_generate_and_score_completions` | the step: rolls out twice, recycles in between | here, training/images.py |
    | `_prepare_inputs` | cuts a generation into passes of no more tokens than plain GRPO's | training/passes.py |
    | `compute_loss` | weighs those passes, of different sizes, and runs them one after the other | training/passes.py |
    | `_tokenize_prompts` | rows without images beside rows with them; TRL issue 6294 | training/images.py |
    | `_get_per_token_logps_and_entropies` | the same, in the forward pass | training/images.py |
    | `_save_checkpoint`, `_init_training_state` | what is left of a generation | training/checkpoint.py |
    | `_get_train_sampler` | resumes the order of questions | training/checkpoint.py |
    | `_load_from_checkpoint`, `_load_best_model` | weights renamed by transformers 5.17 | training/checkpoint.py |
    | `_get_grad_norm` | ends a run that is no longer finite | training/checkpoint.py |
    | `evaluate` | leaves training's random numbers alone | here |
    | `save_model`, `create_model_card` | a model card of SPARK's | training/model_card.py |

    Args:
        model, train_dataset, processing_class, ...: as for GRPOTrainer.
        reward_funcs: functions of (prompts, completions, **columns), as TRL's; default: verify.answer_reward, or with
            an environment none but its own. The first one is the verifier: a rollout is right where it gives 1 (or
            `correct_at`), and a row on which it has no opinion (None) is left out. Judge rows are scored by their label
            instead, reflection rows by these functions. Two attributes of the verifier are used where it has them:
            `extract` (text -> the answer in it, or None) instead of verify.extract_boxed, and `equal` (pairs of
            prediction and gold -> whether they are the same answer) instead of verify.verify_many.
        args: a SparkConfig.

    Raises ValueError, with recycling on, for reward models, async functions and environments: a label must come from
    something verifiable, and an environment would add its own reward to the judge's.
    """

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: SparkConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        *rest,
        **kwargs,
    ):
        args = copy.copy(args if args is not None else SparkConfig("spark"))
        environment = kwargs.get("environment_factory") is not None
        if args.recycle_ratio > 0 and environment:
            raise ValueError("environment_factory: can't be used with recycle_ratio > 0: its reward is not the judge's")
        if reward_funcs is None:
            reward_funcs = [] if environment else [verify.answer_reward]
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not environment:  # which may ask its own questions
            check_columns("train_dataset", train_dataset, reward_funcs)
            check_columns("eval_dataset", eval_dataset, reward_funcs)
        loading = {
            "revision": (args.model_init_kwargs or {}).get("revision"),
            "trust_remote_code": args.trust_remote_code,
        }
        config = AutoConfig.from_pretrained(model, **loading) if isinstance(model, str) else model.config
        check_model(args, config)
        longest = args.longest_sequence(config)
        if args.use_vllm and args.vllm_max_model_length is None:
            args.vllm_max_model_length = longest
        self._rewards = JudgingRewards(reward_funcs, args.recycle_ratio > 0, args.correct_at)
        under_fsdp(args, adapter=kwargs.get("peft_config") is not None or hasattr(model, "peft_config"))
        super().__init__(model, self._rewards.functions or None, args, train_dataset, eval_dataset, *rest, **kwargs)
        after_loading(self)
        freeze(self.model, args.freeze_prefix or [])
        # TRL gathers images on processes that have some, which would wait for the others; `_log_images` gathers on all.
        self.log_multimodal = False
        exact = not (args.has_extra_terms or self.aux_loss_enabled)  # leaving such a row out changes no gradient
        if args.drop_zero_advantage and not exact:
            raise ValueError(
                "drop_zero_advantage: expected false where more than the advantage enters the loss (beta, entropy "
                "bonus, auxiliary loss, top_entropy_quantile)"
            )
        if args.recycle_ratio > 0 and args.top_entropy_quantile < 1 and self.accelerator.num_processes > 1:
            raise ValueError(
                "top_entropy_quantile: expected 1 with recycling on several processes: its threshold is a pass's, and "
                "passes depend on the number of processes"
            )
        self._drop_rows = args.drop_zero_advantage
        if self._drop_rows is None:
            self._drop_rows = exact and args.recycle_ratio > 0
        if self.use_vllm:
            adopt_engine(self, longest)
        self._longest_prompt = longest - self.max_completion_length
        self._longest_instruction = max(map(len, self._tokenizer(instructions(args.answer_mark))["input_ids"]))
        tokens = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        # Some tokenizers add runs of blanks or of newlines, which are text.
        self._control_tokens = sorted((token for token in tokens if not token.isspace()), key=len, reverse=True)
        self._begin_evaluation()
        self._table = RecycledTable()
        self.add_callback(self._table)
        self.add_callback(Watch())
        self.metrics_file = MetricsFile(self._metrics["train"])
        self.add_callback(self.metrics_file)

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        """One generation: policy rollouts, and those of the prompts recycled from them, as one batch.

        Args:
            inputs: (b,) this process's rows, each question G times in a row.

        Returns:
            TRL's batch of (b + r) rows, the policy's first and then the r recycled ones, as many on every process. The
            policy's alone in evaluation, where it is not recycling's turn, or where nothing can be recycled.
        """
        training = self.model.training
        recycles = self.args.recycle_ratio > 0 and (training or self.args.recycle_in_evaluation)
        with self._engine_awake() if recycles else nullcontext():
            policy = super()._generate_and_score_completions(inputs)
        groups = self._groups(inputs, with_rows=recycles)
        groups = groups if training else self._asked_once(groups)
        self._log_policy(groups)
        self._log_images(inputs)
        if not recycles:
            return policy

        blocks: dict[str, torch.Tensor] = {}  # question -> its pixels
        if training:
            policy = share_images(policy, self._mine([g.key for g in groups for _ in g.rollouts]), blocks)

        items = self._recycle(policy, groups)
        if not items:  # the same on every process, so that none waits in a collective
            if self.use_vllm and not self.vllm_generation.stay_awake:
                self.vllm_generation.sleep()
            return policy

        asked = [item for item in items for _ in range(self._group_size)]  # (items*G,)
        with self._logged(recycled=True), self._judging(asked):
            recycled = super()._generate_and_score_completions(
                [{**item.group.row, "prompt": item.prompt} for item in self._mine(asked)]
            )
        self._log_judging(groups, asked, recycled["advantages"])
        if not training:  # measured is all they are; the loss is the policy's
            return policy
        recycled = share_images(recycled, self._mine([item.group.key for item in asked]), blocks)
        recycled["advantages"] *= self.args.recycle_weight
        return join(policy, recycled, self._tokenizer.pad_token_id)

    def _recycle(self, policy, groups: list[Group]) -> tuple[Item, ...]:
        """This generation's items; none where it is not its turn (`recycle_every`)."""
        if self.model.training and self._generation % self.args.recycle_every:
            return ()
        start = time.perf_counter()
        step = self._generation
        if not self.model.training:  # batches of an evaluation draw apart, each evaluation alike
            step, self._evaluated = f"{step}/evaluation/{self._evaluated}", self._evaluated + 1
        items, counts = recycle(groups, step, self.args, self._limits(policy, groups))
        self._log(recycling_metrics(items, counts, self._group_size, time.perf_counter() - start))
        return items

    def evaluate(self, *args, **kwargs):
        """TRL's, but with recycling on training's random numbers continue as if no evaluation had run, and the engine
        is sent the weights once, not for each batch."""
        self._begin_evaluation()
        if self.args.recycle_ratio == 0:
            return super().evaluate(*args, **kwargs)
        device, state = self.accelerator.device, np.random.get_state()  # vLLM draws its seeds from numpy's
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._engine_awake():
            metrics = super().evaluate(*args, **kwargs)
        if self.use_vllm:
            self.vllm_generation.sleep()
        np.random.set_state(state)
        return metrics

    def _begin_evaluation(self) -> None:
        self._evaluated = self._asked = 0  # batches, questions
        self._outcomes = {"policy": defaultdict(list), "judge": defaultdict(list)}

    def _asked_once(self, groups: list[Group]) -> list[Group]:
        """Without the first questions, which accelerate asks again at the end of an evaluation, so that every process
        has equally many rows."""
        dataset = self.callback_handler.eval_dataloader.dataset
        left = len(dataset) - self._asked if has_length(dataset) else len(groups)
        self._asked += len(groups)
        return groups[: max(0, left)]

    # ---- rollouts to groups, items to rows --------------------------------------------------------------------------

    @property
    def _generation(self) -> int:
        """Number of the generation: the step of recycling."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    @property
    def _group_size(self) -> int:
        """G: rollouts of a prompt."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _groups(self, inputs: list[dict[str, Any]], with_rows: bool) -> list[Group]:
        """The rollouts just scored as groups, the same on every process, in the order of the prompts. Without rows they
        have no prompt either: enough for metrics, and no image goes from process to process."""
        size = self._group_size
        texts = gather_object(self._rewards.texts)  # (B*G,)
        right = gather_object(self._rewards.right)
        first = self.accelerator.process_index * len(inputs)
        rows = gather_object(
            [row if with_rows and (first + i) % size == 0 else None for i, row in enumerate(inputs)]
        )  # (B*G,), the question once a group
        groups = []
        for start in range(0, len(texts), size):
            group = slice(start, start + size)
            rollouts = tuple(
                Rollout(text, self._rewards.extract(text), correct)
                for text, correct in zip(texts[group], right[group], strict=True)
            )
            row = rows[start]
            groups.append(
                Group(question_key(row), row["prompt"], rollouts, row) if row else Group(str(start), "", rollouts)
            )
        return groups

    def _mine(self, everyone: list) -> list:
        """This process's part of a list over all processes' rows."""
        share = len(everyone) // self.accelerator.num_processes
        return everyone[self.accelerator.process_index * share :][:share]

    @contextmanager
    def _judging(self, asked: list[Item]):
        """While inside, rewards are computed for these items' rows, not for policy rows."""
        self._rewards.items = self._mine(asked)
        try:
            yield
        finally:
            self._rewards.items = None

    @contextmanager
    def _engine_awake(self):
        """An engine that sleeps during the optimizer step stays awake for the next generation."""
        if not self.use_vllm:
            yield
            return
        before, self.vllm_generation.stay_awake = self.vllm_generation.stay_awake, True
        try:
            yield
        finally:
            self.vllm_generation.stay_awake = before

    def _limits(self, policy, groups: list[Group]) -> Limits:
        lengths = self.accelerator.gather(policy["prompt_mask"].sum(1)).tolist()  # (B*G,), image tokens included
        prompt_lengths = {g.key: n for g, n in zip(groups, lengths[:: self._group_size][: len(groups)], strict=True)}
        room = self._longest_prompt - self._longest_instruction

        def fits(prompts: list[tuple[Group, str]]) -> list[bool]:
            if not prompts:
                return []
            tokens = self._tokenizer([text for _, text in prompts], add_special_tokens=False)["input_ids"]
            return [prompt_lengths[g.key] + len(ids) <= room for (g, _), ids in zip(prompts, tokens, strict=True)]

        def equal(pairs: list[tuple[str, str]]) -> list[bool | None]:
            """On one process for all: a time limit could fall differently on each."""
            return broadcast_object_list([self._rewards.equal(pairs) if self.accelerator.is_main_process else None])[0]

        multiple_of = items_come_in(self.accelerator.num_processes, self._group_size)
        at_most = None if self.model.training else len(TASKS) * len(groups)
        return Limits(self._control_tokens, multiple_of, equal, fits, at_most)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    # TypeError: a recipe's list where a number is expected. ImportError: what an option needs.
    with refusing(ValueError, TypeError, OSError, ImportError, NotImplementedError):
        arguments = [part for a in sys.argv[1:] for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
        check_files(arguments)
        launch = plan.requested(arguments)
        config_class = plan.for_launch(SparkConfig, launch) if launch else SparkConfig
        parser = TrlParser((DataArguments, config_class, ModelConfig))
        parser.error = lambda message: parser.exit(2, f"train_spark.py: {message}\n")  # one line, without the usage
        if "--help_all" in sys.argv:
            parser.usage = console.USAGE
            return parser.print_help()
        data, args, model = parser.parse_args_and_config(arguments)
        check_engine(args, model)
        if launch is not None:
            plan.show(data, args, model, launch)
            return
        console.quiet()
        check_installation(args, model)
        check_weights(model.model_name_or_path)
        resume = where_to_start(args)
        if resume:
            check_weights(resume, "resume_from_checkpoint")
        if resume and finished(resume, args.max_steps, args.num_train_epochs):
            if args.process_index == 0:
                copy_result(resume, args.output_dir)
                print(f"{args.output_dir}: finished before ({resume}); more --max_steps go on from there", flush=True)
            return
        loading = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
        processor = AutoProcessor.from_pretrained(model.model_name_or_path, padding_side="left", **loading)
        longest = args.longest_prompt(AutoConfig.from_pretrained(model.model_name_or_path, **loading))
        train, evaluation = data.read(args, processor, *longest)
        check_alike(resume, train, evaluation)
        verify.warm_up()
        args.model_init_kwargs = {
            "revision": model.model_revision,
            "attn_implementation": model.attn_implementation or attention(args),
            "dtype": model.dtype,
            **(args.model_init_kwargs or {}),
        }
        trainer = SparkTrainer(
            model.model_name_or_path,
            load_rewards(data.reward_funcs),
            args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processor,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    trainer.metrics_file.more = {**changed_settings(data), **changed_settings(model)}
    show_progress(trainer)
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    with refusing(BadInput):  # found when it is used: a broken image, a batch that the model can't take
        trainer.train(resume_from_checkpoint=resume)
    if stop.received:
        if args.process_index == 0:
            where = last_checkpoint(args.output_dir)
            print(f"stopped; saved in {where}; --resume_from_checkpoint latest goes on from there", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    console.show_result(args, trainer.state, model.use_peft)
    if trainer.use_vllm and args.vllm_mode == "colocate":
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()  # while its process groups are still there
    trainer.accelerator.end_training()  # process groups left to the interpreter's end can abort it


if __name__ == "__main__":
    main()
