"""The settings that say what to train on, and the reading of it."""

from dataclasses import dataclass, field
from typing import Any

from data.rows import BadInput


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(metadata={"help": "A file (json, jsonl, csv, tsv, parquet), a folder, a hub name, `digits`."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same, for evaluation during training."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset or a folder."})
    eval_split: str = field(default="test", metadata={"help": "The same, of eval_dataset."})
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

    def read(self, args: Any, processor: Any) -> tuple[Any, Any]:
        """The training set and the evaluation set (None without one). Raises BadInput."""
        from transformers import ProcessorMixin

        train = self.read_one(self.dataset, self.dataset_split, args, processor)
        evaluation = None
        if self.eval_dataset:
            evaluation = self.read_one(self.eval_dataset, self.eval_split, args, processor, own_columns=True)
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

    def read_one(self, source: str, split: str, args: Any, processor: Any, own_columns: bool = False):
        """One data set; prompts are as long as they may be where there is no processor to measure them."""
        from data.lengths import image_factor, too_long
        from data.read import read_dataset, report

        bad_rows = None if self.strict else []
        dataset = read_dataset(
            source,
            self.prompt_column,
            self.solution_column,
            self.image_column,
            image_root=self.image_root,
            suffix=args.prompt_suffix,
            allow_remote_images=self.allow_remote_images,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            image_factor=image_factor(processor),
            config=self.dataset_config,
            split=split,
            own_columns=own_columns,
            answer_kind=self.answer_kind,
            fits=too_long(args.max_prompt_length, processor) if processor else None,
            bad_rows=bad_rows,
        )
        if args.process_index == 0:
            print(report(source, len(dataset), bad_rows), flush=True)
        return dataset
