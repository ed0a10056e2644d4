"""The settings of data, and the reading of what is trained on."""

from dataclasses import dataclass, field, replace
from typing import Any

from data.cli import flag


@dataclass(kw_only=True)
class DataSettings:
    """How data are read, for training, checking, filtering and evaluation alike. Each field is also a flag."""

    prompt_column: str = flag("prompt", "Column of the question: text or messages.")
    solution_column: str = flag("solution", "Column of the gold answer.")
    image_column: str | None = flag(None, "Column of the image or images, if any.")
    answer_kind: str | None = flag(
        None,
        "How answers name the right option; default: what the first 100 rows agree on.",
        choices=["letter", "text", "from_0", "from_1"],
    )
    keep_solution: bool = flag(
        False, "Take the solution as it is, for a verifier of your own: test cases, JSON, long texts."
    )
    image_root: str | None = flag(None, "Folder that image paths are relative to, and may not leave.")
    allow_remote_images: bool = flag(False, "Fetch http(s) images when they are used.")
    min_pixels: int | None = flag(None, "Smaller images are enlarged to this many pixels.")
    max_pixels: int | None = flag(None, "Larger images are reduced to this many pixels.")
    dataset_config: str | None = flag(None, "Configuration of a hub dataset.")
    dataset_split: str = flag("train", "Split of a hub dataset or a folder.")


@dataclass(kw_only=True)
class DataArguments(DataSettings):
    """What to train on."""

    dataset: str = flag(help="A file (json, jsonl, csv, tsv, parquet), a folder, a hub name, `digits`, `arithmetic`.")
    eval_dataset: str | None = flag(None, "The same, for evaluation during training (eval_strategy).")
    eval_split: str = flag("test", "Split of eval_dataset, if that is a hub dataset or a folder.")
    strict: bool = flag(False, "Refuse data with unusable rows instead of leaving them out.")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Your own reward functions, FILE.py:NAME; the first is the verifier. Default: the boxed answer "
            "against the solution (verify.answer_reward)."
        },
    )
    plan: str | None = flag(
        None,
        "Print what the run will do and need, and end: for the processes it is started in, or for those of an "
        "accelerate config.",
        nargs="?",
        const="here",
    )

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):  # one, in a recipe
            self.reward_funcs = [self.reward_funcs]
        if self.keep_solution and not self.reward_funcs:
            raise ValueError("keep_solution: expected reward_funcs beside it: verify.py wants the answer alone")

    def read(self, args: Any, processor: Any, longest: int, setting: str) -> tuple[Any, Any]:
        """The training set and the evaluation set (None without one), without prompts of more than `longest` tokens, as
        `setting` wants it. Raises BadInput."""
        from data.lengths import too_long
        from data.rows import BadInput

        if self.eval_dataset and args.eval_strategy == "no" and not args.eval_on_start:
            raise BadInput("eval_dataset: expected --eval_strategy steps or epoch beside it, or it is never used")
        reject = too_long(longest, processor, setting, **(args.chat_template_kwargs or {}))
        train = self.read_one(self.dataset, self.dataset_split, args, processor, reject)
        evaluation = None
        if self.eval_dataset:
            evaluation = self.read_one(
                self.eval_dataset, self.eval_split, args, processor, reject, columns_optional=True
            )
        prompts = args.generation_batch_size // args.num_generations
        if len(train) < prompts:  # TRL would train on nothing, and say nothing
            raise BadInput(
                f"{self.dataset}: {len(train)} rows, expected at least the {prompts} of one generation; lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        return train, evaluation

    def read_one(self, source: str, split: str, args: Any, processor: Any, reject: Any, columns_optional: bool = False):
        """One data set, without the rows that `reject` gives a reason for."""
        from data.lengths import image_factor
        from data.read import read_dataset, reading_summary

        bad_rows = None if self.strict else []
        dataset = read_dataset(
            source,
            replace(self, dataset_split=split),
            suffix=args.prompt_suffix,
            image_factor=image_factor(processor),
            columns_optional=columns_optional,
            reject=reject,
            bad_rows=bad_rows,
        )
        if args.process_index == 0:
            print(reading_summary(source, len(dataset), bad_rows), flush=True)
        return dataset
