"""The notebook is valid, keeps no outputs, and all of its code runs."""

import re
import shlex

import nbclient
import nbformat
import pytest

from domino_jax.config_flags import parse_config
from tests.runs.small_embedded import SMALL


@pytest.fixture
def path(repository):
    return repository / "notebooks" / "domino_jax.ipynb"


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    for cell in code_cells(notebook):
        compile(cell.source, "cell", "exec")  # plain Python: no shell or magic lines


def test_the_address_is_one_variable_at_the_top(notebook):
    first, *others = code_cells(notebook)
    assert "REPOSITORY = " in first.source
    assert not any("REPOSITORY =" in cell.source or "http" in cell.source for cell in others)


def test_flags_that_the_text_suggests_are_taken_by_every_cell(notebook, repository):
    """The cell of the curves parses them as a configuration."""
    first = code_cells(notebook)[0].source
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    texts += [line for line in first.splitlines() if line.startswith("#")]
    flags = re.findall(r"--[\w.-]+(?:=[^\s\"`]+)?", "\n".join(texts))
    assert flags
    parse_config([f"--config={repository / 'configs' / 'tiny.py'}", *flags])


@pytest.mark.slow
def test_every_cell_runs(path, notebook, tmp_path, monkeypatch):
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    monkeypatch.setenv("DOMINO_NOTEBOOK_FLAGS", shlex.join([*small, f"--config.output_dir={tmp_path}"]))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel shows figures inline, as Jupyter does
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    _, _, train, curves, decode = code_cells(notebook)
    said = "".join(output.text for output in train.outputs)
    assert "train the drafter: 0/6" in said and "drafters: " in said and "# Run tiny" in said
    assert any("image/png" in output.get("data", {}) for output in curves.outputs)
    (page,) = [output.data["text/html"] for output in decode.outputs if "text/html" in output.get("data", {})]
    assert 'title="target"' in page and page.count("<span") > 4
    assert (tmp_path / "tiny" / "draft" / "README.md").exists()
