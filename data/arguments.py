"""The settings of data, and the reading of what is trained on."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(kw_only=True)
class DataSettings:
    """How data are read, for training, checking, filtering and evaluation alike. Each field is also a flag."""

    prompt_column: str = field(default="prompt", metadata={"help": "Column of the question: text or messages."})
    solution_column: str = field(default="solution", metadata={"help": "Column of the gold answer."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the image or images, if any."})
    answer_kind: str | None = field(
        default=None,
        metadata={
            "help": "What answers to questions with options are.",
            "choices": ["letter", "text", "from_0", "from_1"],
        },
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to, and may not leave."}
    )
    allow_remote_images: bool = field(default=False, metadata={"help": "Fetch http(s) images when they are used."})
    min_pixels: int | None = field(default=None, metadata={"help": "Smaller images are enlarged to so many pixels."})
    max_pixels: int | None = field(default=None, metadata={"help": "Larger images are reduced to so many pixels."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset or a folder."})


@dataclass(kw_only=True)
class DataArguments(DataSettings):
    """What to train on."""

    dataset: str = field(metadata={"help": "A file (json, jsonl, csv, tsv, parquet), a folder, a hub name, `digits`."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same, for evaluation during training."})
    eval_split: str = field(default="test", metadata={"help": "The same, of eval_dataset."})
    strict: bool = field(
        default=False, metadata={"help": "Refuse data with unusable rows instead of leaving them out."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Your own reward functions, FILE.py:NAME; the first is the verifier. Default: the boxed answer "
            "against the solution (verify.answer_reward)."
        },
    )
    plan: str | None = field(
        default=None,
        metadata={
            "help": "Print what the run will do and need, and end: for the processes it is started in, or for those "
            "of an accelerate config.",
            "nargs": "?",
            "const": "here",
        },
    )

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):  # one, in a recipe
            self.reward_funcs = [self.reward_funcs]

    def read(self, args: Any, processor: Any) -> tuple[Any, Any]:
        """The training set and the evaluation set (None without one). Raises BadInput."""
        from transformers import ProcessorMixin

        from data.rows import BadInput

        train = self.read_one(self.dataset, self.dataset_split, args, processor)
        evaluation = None
        if self.eval_dataset:
            evaluation = self.read_one(self.eval_dataset, self.eval_split, args, processor, columns_optional=True)
        if "images" in train.column_names and not isinstance(processor, ProcessorMixin):
            raise BadInput(
                f"{self.dataset}: rows have images, but {processor.name_or_path} reads text alone: expected a "
                "vision-language model, or data without the image column"
            )
        prompts = args.generation_batch_size // args.num_generations
        if len(train) < prompts:  # TRL would train on nothing, and say nothing
            raise BadInput(
                f"{self.dataset}: {len(train)} rows, expected at least the {prompts} of one generation; lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        return train, evaluation

    def read_one(self, source: str, split: str, args: Any, processor: Any, columns_optional: bool = False):
        """One data set; prompts are as long as they may be where there is no processor to measure them."""
        from data.lengths import image_factor, too_long
        from data.read import read_dataset, reading_summary

        bad_rows = None if self.strict else []
        dataset = read_dataset(
            source,
            replace(self, dataset_split=split),
            suffix=args.prompt_suffix,
            image_factor=image_factor(processor),
            columns_optional=columns_optional,
            fits=too_long(args.max_prompt_length, processor) if processor else None,
            bad_rows=bad_rows,
        )
        if args.process_index == 0:
            print(reading_summary(source, len(dataset), bad_rows), flush=True)
        return dataset
