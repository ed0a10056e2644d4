"""spark_colab.ipynb as a reader runs it, cell by cell, with a small model in its parameter cell."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "spark_colab.ipynb"
PARAMETERS = """\
INSTALL, IMAGES, STEPS, QUESTIONS, OUTPUT = False, False, 2, 12, {output!r}
MODEL, DATASET, CONFIG, MODEL_SETTINGS = "models/digits", "digits", None, {{}}
TRAINING = {{
    "per_device_train_batch_size": 48, "num_generations": 4, "max_completion_length": 32, "max_prompt_length": 256,
    "learning_rate": 1e-4, "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
}}
MAX_TOKENS, BATCH = 48, 64
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_holds_no_outputs_and_every_cell_is_explained(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown"] + ["markdown", "code"] * (len(kinds) // 2)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        else:
            assert cell.source.count(".") >= 2  # two sentences of why


def test_it_trains_an_adapter_measures_its_judge_and_shows_the_report(notebook, tmp_path, monkeypatch):
    notebook = nbformat.from_dict(notebook)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = PARAMETERS.format(output=str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")  # the notebook finds the code by itself
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells if "outputs" in cell]
    questions, before, step, training, after = said[2:7]
    assert "8,000 training rows, 12 held-out questions" in questions
    assert "responses to judge" in before and "Judging one response" in before
    assert "=== reflection\n" in step and ", label " in step and step.count("--- the model wrote") >= 2
    for file in ("adapter_model.safetensors", "README.md", "metrics.jsonl"):
        assert file in training and (tmp_path / file).exists()
    assert "step 2/2" in training and "Triton" not in step and "tokenizer has new" not in step
    assert "before" in after and "after" in after and "Judging one response" in after
    (shown,) = notebook.cells[-1].outputs
    assert "SPARK run report" in shown.data["text/html"] and "<iframe sandbox" in shown.data["text/html"]
