"""Merge an adapter and the model it was trained on into one, which transformers and vLLM load like any other.

python -m training.merge runs/vl_3b_lora [--output runs/vl_3b_lora/merged]
"""

from pathlib import Path

from data.cli import Parser, refuse


def merged(adapter: str, dtype: str = "auto"):
    """(model, processor), the adapter's weights added to the base model's.

    Raises OSError, ValueError where the adapter, or the model that it names, can't be loaded.
    """
    import transformers
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model_class = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
    model = PeftModel.from_pretrained(model_class.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload(), transformers.AutoProcessor.from_pretrained(adapter)


def merge(adapter: str, output: str) -> None:
    """Save the merged weights (safetensors, in the base model's precision) and the processor in `output`."""
    for part in merged(adapter):
        part.save_pretrained(output)


def main() -> None:
    parser = Parser(__doc__, prog="training.merge")
    parser.add_argument("adapter", help="what training with use_peft saved: a run's folder or one of its checkpoints")
    parser.add_argument("--output", help="default: merged, in the adapter's folder")
    args = parser.parse_args()
    output = args.output or str(Path(args.adapter) / "merged")
    try:
        merge(args.adapter, output)
    except (OSError, ValueError) as error:
        raise SystemExit(refuse("training.merge", error)) from None
    print(f"saved {output}")


if __name__ == "__main__":
    main()
