"""The README.md of a trained model: what was trained on what, with the run's figures, and how to use it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import ProcessorMixin

TEMPLATE = Path(__file__).parent / "model_card.md"
PIPELINES = ("text-generation", "image-text-to-text")
WINDOW = 10  # logs
FIGURES = {
    "policy/accuracy": "answers right",
    "judge/pointwise/balanced_accuracy": "pointwise verdicts right, balanced",
    "judge/pairwise/accuracy": "pairwise verdicts right",
    "reflection/fix_rate": "wrong answers mended",
}


class SparkModelCard:
    """A mixin of GRPOTrainer: TRL's card tells of chats, and of a base model None where that is a folder."""

    _tag_names = ("trl", "spark")
    _name = "SPARK"
    _paper = {  # noqa: RUF012 (TRL's own form)
        "title": "SPARK: Synergistic Policy And Reward Co-Evolving Framework",
        "id": "2509.22624",
        "citation": "@article{liu2025spark,\n"
        "    title   = {{SPARK: Synergistic Policy And Reward Co-Evolving Framework}},\n"
        "    author  = {Ziyu Liu and Yuhang Zang and Shengyuan Ding and Yuhang Cao and Xiaoyi Dong and Haodong Duan "
        "and Dahua Lin and Jiaqi Wang},\n"
        "    year    = 2025,\n"
        "    journal = {arXiv:2509.22624},\n"
        "}",
    }

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            self._card().save(Path(output_dir or self.args.output_dir) / "README.md")

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            self._card(model_name, dataset_name, tags).save(Path(self.args.output_dir) / "README.md")

    def _card(self, model_name=None, dataset_name=None, tags=None) -> ModelCard:
        args, config = self.args, self.model.config
        base = config.name_or_path
        base = base if base and not Path(base).is_dir() else None
        tags = [*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())]
        adapter = hasattr(self.model, "peft_config")
        settings: dict[str, Any] = {
            "model_name": model_name or Path(args.output_dir).name,
            "base_model": base,
            "architecture": (config.architectures or [type(self.model).__name__])[0],
            "method": f"[{self._paper['title']}](https://arxiv.org/abs/{self._paper['id']})"
            if args.recycle_ratio > 0
            else "GRPO",
            "dataset_name": dataset_name,
            "steps": self.state.global_step,
            "rollouts": args.generation_batch_size,
            "num_generations": self.num_generations,
            "recycle_ratio": args.recycle_ratio,
            "tasks": ", ".join(args.recycle_tasks),
            "learning_rate": args.learning_rate,
            "beta": args.beta,
            "temperature": args.temperature,
            "prompt_suffix": args.prompt_suffix.strip(),
            "prompt_suffix_repr": repr(args.prompt_suffix),
            "max_completion_length": args.max_completion_length,
            "pipeline": "image-text-to-text"
            if isinstance(self.processing_class, ProcessorMixin)
            else "text-generation",
            "adapter": adapter,
            "hub_model_id": self.hub_model_id,
            "folder": args.output_dir,
            "citation": self._paper["citation"],
            "figures": figures(self.state.log_history),
            "window": WINDOW,
            "versions": ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")),
        }
        data = ModelCardData(
            base_model=base, library_name="peft" if adapter else "transformers", tags=["generated_from_trainer", *tags]
        )
        return ModelCard.from_template(data, template_path=str(TEMPLATE), **settings)


def figures(history: list[dict[str, float]]) -> dict[str, float]:
    """Means of the last logs that have each metric."""
    means = {}
    for metric, name in FIGURES.items():
        values = [logs[metric] for logs in history if logs.get(metric) is not None][-WINDOW:]
        if values:
            means[name] = sum(values) / len(values)
    return means
