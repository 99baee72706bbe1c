"""`recipes/quickstart.ipynb`: runs from top to bottom offline, and what is committed came from one clean run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "recipes" / "quickstart.ipynb"
SMALL = "STEPS = 2\nEVAL_TOKENS = 1024\nCALIBRATION_SEQUENCES = 4"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(cell):
    """Everything a cell shows: text as it is, HTML of what has it."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        shown.append(output.get("text") or data.get("text/html") or data.get("text/plain") or "")
    return "\n".join(shown)


@pytest.fixture(scope="module")
def executed():
    """The notebook after a run with a few steps."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert {line.split(" = ")[0] for line in SMALL.splitlines()} == {
        line.split(" = ")[0] for line in parameters.source.splitlines() if not line.startswith("#")
    }
    parameters.source = SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


def test_the_notebook_runs(executed):
    shown = "\n".join(outputs_of(cell) for cell in code_cells(executed))
    for part in (
        "42 layers quantized",
        "predicted file:",
        "GPTQ: output error",
        "codes equal: True, scales equal: True, in 42 layers",
        "held-out KL by step:",
        "def read_lines(path):",
    ):
        assert part in shown, part


def test_bars_and_tables_render(executed):
    cells = {cell.source: outputs_of(cell) for cell in code_cells(executed)}
    (trained,) = [shown for source, shown in cells.items() if "llmqat.finetune(" in source]
    assert '<progress value="2" max="2"' in trained
    assert "of codes flipped" in trained
    (table,) = [shown for source, shown in cells.items() if "llmqat.scoreboard(" in source]
    assert table.count("<pre") == 1
    for part in ("perplexity", "packed file, kernel op", "llama, int4, 1,024 test tokens"):
        assert part in table


def test_committed_outputs_are_of_one_clean_run():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in cell.outputs)
    assert all(cell.outputs for cell in cells if "print(" in cell.source)
