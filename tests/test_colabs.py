"""Notebooks of colabs/: what is committed is whole and small, and each runs top to bottom."""

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tools import run_colabs

NAMES = ("analyze", "indicators_in_your_jax_code", "train_winft", "verify")
REPOSITORY = "https://colab.research.google.com/github/vit-interact/vit_interact"
# Where notebooks are executed, and what an installation is called.
HERE = re.compile(r"/(tmp|home|root|work|opt|usr|var|Users|private)/|site-packages")
MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)

each = pytest.mark.parametrize("name", NAMES)


def read(path):
    return json.loads(path.read_text("utf-8"))


def committed(name):
    return read(run_colabs.COLABS / f"{name}.ipynb")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(value):
    """nbformat has texts as lists of lines, too."""
    return value if isinstance(value, str) else "".join(value)


def check_outputs(notebook):
    """Everything ran once, in order, and nothing failed or warned."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[0]["outputs"] == []
    pictures = 0
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result", "display_data"), output
            assert output.get("name") != "stderr", text(output["text"])
            data = output.get("data", {"text/plain": output.get("text")})
            pictures += "image/png" in data
            assert {"image/png", "text/plain"}.issuperset(data)
            said = text(data["text/plain"])
            assert not re.search("Warning|Traceback", said), said
            assert not HERE.search(said), said
            assert len(json.dumps(output)) < 200_000
    assert pictures >= 1


def test_all_notebooks_are_known():
    assert tuple(run_colabs.notebooks([])) == tuple(
        run_colabs.COLABS / f"{name}.ipynb" for name in NAMES
    )
    with pytest.raises(ValueError, match="nothing: no such notebook; there are analyze, "):
        run_colabs.notebooks(["verify", "nothing"])


@each
def test_notebooks_are_valid(name):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(run_colabs.COLABS / f"{name}.ipynb", as_version=4))


@each
def test_title_and_badge(name):
    first = committed(name)["cells"][0]
    assert first["cell_type"] == "markdown"
    said = text(first["source"])
    assert said.startswith("# ")
    (target,) = re.findall(r"\[!\[Open In Colab\]\([^)]+\)\]\(([^)]+)\)", said)
    assert target == f"{REPOSITORY}/blob/main/colabs/{name}.ipynb"


def test_all_install_from_the_same_place():
    (first,) = {text(code_cells(committed(name))[0]["source"]) for name in NAMES}
    assert 'SOURCE = os.environ.get("VIT_INTERACT_SOURCE", "git+https://github.com/' in first
    assert "%pip install" in first and "git clone" not in first
    # The package is here already, so nothing is installed; a magic would be a syntax error.
    exec(MAGIC.sub(r'\1raise AssertionError("installs")', first), {})


@each
def test_cells_compile_and_say_why(name):
    cells = committed(name)["cells"]
    for before, cell in itertools.pairwise(cells):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown", text(cell["source"])
            compile(MAGIC.sub(r"\1pass", text(cell["source"])), name, "exec")


@each
def test_what_is_committed_is_small_and_clean(name):
    notebook = committed(name)
    check_outputs(notebook)
    assert (run_colabs.COLABS / f"{name}.ipynb").stat().st_size < run_colabs.MOST_BYTES
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


def test_strip_leaves_what_a_reader_sees():
    v4 = pytest.importorskip("nbformat.v4")
    view = {run_colabs.WIDGET: {"model_id": "1"}, "text/plain": "Viewer(_css='...')"}
    cells = [v4.new_code_cell("install"), v4.new_markdown_cell("why"), v4.new_code_cell("view")]
    cells[0].outputs = [v4.new_output("stream", text="Collecting")]
    cells[2].metadata = {"execution": {}}
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c")]
    cells[2].outputs = [v4.new_output("stream", name=n, text=t) for n, t in pieces]
    cells[2].outputs.append(v4.new_output("execute_result", data=view, metadata={"x": 1}))
    stripped = run_colabs.strip(v4.new_notebook(cells=cells, metadata={"widgets": {}}))
    assert stripped.cells[0].outputs == [] and stripped.cells[2].metadata == {}
    out, err, shown = stripped.cells[2].outputs
    assert (out.text, err.text) == ("ab", "c")
    assert shown.metadata == {} and list(shown.data) == ["text/plain"]
    assert "run the cell" in shown.data["text/plain"]
    assert "widgets" not in stripped.metadata


@pytest.mark.slow
@each
def test_runs_top_to_bottom(name, tmp_path):
    for package in ("nbclient", "ipykernel", "anywidget"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    # In a process of its own: what jupyter warns of is not ours, and XLA runs as people run it.
    others = ("XLA_FLAGS", "VIT_INTERACT_SOURCE")
    environment = {key: value for key, value in os.environ.items() if key not in others}
    command = [sys.executable, "tools/run_colabs.py", "--out", str(tmp_path), name]
    done = subprocess.run(
        command, cwd=run_colabs.COLABS.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    check_outputs(read(tmp_path / f"{name}.ipynb"))


@pytest.mark.slow
def test_first_cell_installs_the_wheel_just_built(tmp_path):
    """As in Colab: a kernel without the package, whose other packages are there already."""
    for package in ("nbclient", "ipykernel", "anywidget"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    root = run_colabs.COLABS.parent
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, root]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("vit_interact-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Packages of this Python, but not those that .pth files in there lead to: no vit_interact.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    where = "import vit_interact; print(vit_interact.__file__)"
    environment = {**os.environ, "VIT_INTERACT_SOURCE": str(wheel)}
    for name in ("PYTHONPATH", "XLA_FLAGS"):
        environment.pop(name, None)
    call = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True)
    assert call([python, "-c", where]).returncode != 0
    tool = root / "tools" / "run_colabs.py"
    done = call([python, tool, "--out", tmp_path / "ran", "analyze"], text=True)
    assert done.returncode == 0, done.stderr
    check_outputs(read(tmp_path / "ran" / "analyze.ipynb"))
    assert str(site) in call([python, "-c", where], text=True).stdout
