"""The example notebook runs, and the outputs committed with it are what it prints."""

import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.newest_only

NOTEBOOK = Path(__file__).parents[1] / "examples" / "step_by_step.ipynb"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The notebook as committed and as a fresh kernel executes it, in a folder that is not the repository."""
    committed = nbformat.read(NOTEBOOK, as_version=4)
    fresh = copy.deepcopy(committed)
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return committed, fresh


def printed(cell):
    """What a cell shows as text."""
    shown = [output.get("text") or output["data"]["text/plain"] for output in cell.outputs]
    return "".join(shown)


def displayed(notebook, mime):
    """What its cells show in a richer form than text."""
    return [o.data[mime] for cell in notebook.cells for o in cell.get("outputs", ()) if mime in o.get("data", {})]


def test_every_code_cell_was_committed_with_its_output(runs):
    committed, _ = runs
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_committed_outputs_are_what_the_cells_print(runs):
    compared = 0
    for old, new in zip(*(notebook.cells for notebook in runs), strict=True):
        # A cell tagged so prints times, versions or the machine's own numbers.
        if old.cell_type == "code" and "varies" not in old.metadata.get("tags", []):
            assert printed(new) == printed(old), old.source
            compared += 1
    assert compared >= 4


def test_it_shows_a_plot_and_a_result(runs):
    for notebook in runs:
        (plot,), (result,) = displayed(notebook, "image/svg+xml"), displayed(notebook, "text/html")
        assert plot.rstrip().endswith("</svg>") and "after ' is'" in plot and len(plot) < 30_000
        assert "dog sled." in result and "34 new tokens" in result


def test_no_special_token_is_printed_as_text(runs):
    for cell in runs[0].cells:
        for special in ("<start_of_image>", "<end_of_turn>", "<unused"):
            assert special not in str(cell.get("outputs", "")) + cell.source
