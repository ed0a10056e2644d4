"""The README.md of a trained model: what was trained on what, with the run's figures, and how to use it."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import ProcessorMixin

TEMPLATE = Path(__file__).parent / "model_card.md"
WINDOW = 10  # logs
FIGURES = {
    "policy/accuracy": "answers right",
    "judge/pointwise/balanced_accuracy": "pointwise verdicts right, balanced",
    "judge/pairwise/accuracy": "pairwise verdicts right",
    "reflection/fix_rate": "wrong answers fixed",
}


class SparkModelCard:
    """A mixin of GRPOTrainer: TRL's card is about chat models, and names the base model None where it is a folder."""

    _tag_names = ("trl", "spark")

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
        data = ModelCardData(
            base_model=base, library_name="peft" if adapter else "transformers", tags=["generated_from_trainer", *tags]
        )
        return ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            args=args,
            model_name=model_name or Path(args.output_dir).name,
            base_model=base,
            architecture=(config.architectures or [type(self.model).__name__])[0],
            dataset_name=dataset_name,
            steps=self.state.global_step,
            sees=isinstance(self.processing_class, ProcessorMixin),
            adapter=adapter,
            address=self.hub_model_id or args.output_dir,
            figures=figures(self.state.log_history),
            window=WINDOW,
            versions=", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")),
        )


def figures(history: list[dict[str, float]]) -> dict[str, float]:
    """Means of the last logs that have each metric."""
    means = {}
    for metric, name in FIGURES.items():
        values = [logs[metric] for logs in history if logs.get(metric) is not None][-WINDOW:]
        if values:
            means[name] = sum(values) / len(values)
    return means
