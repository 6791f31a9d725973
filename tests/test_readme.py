"""The README's Python runs as it stands, on embedded photographs."""

import pathlib
import re
import shutil

import pytest

import vit_interact as vi

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_block_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, sample in zip(("cat.jpg", "dog.png"), vi.sample_images(2), strict=True):
        shutil.copyfile(sample.path, name)
    names: dict = {}
    exec(code, names)
    assert names["windows"].shape == (2, 256, 4)


def test_pictures_links_and_headings_are_there():
    """In the README, the change log and all of docs."""
    root = README.parent
    dead = []
    for page in (README, root / "CHANGELOG.md", *(root / "docs").glob("*.md")):
        targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8"))
        for target in targets:
            path, _, heading = target.partition("#")
            other = page.parent / path if path else page
            if not other.exists() or (heading and heading not in headings(other)):
                dead.append(f"{page.name}: {target}")
    assert dead == []
    assert "](docs/" in README.read_text("utf-8")


def headings(page: pathlib.Path) -> set[str]:
    """Headings as links name them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.slow
def test_statistics_example_runs():
    text = (README.parent / "docs" / "statistics.md").read_text("utf-8")
    store, survey = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(survey, names)
    assert names["statistics"]["attention_spread"].mean.shape == (12,)
    compile(store, "store", "exec")  # its names are those of tests/survey


@pytest.mark.slow
def test_verification_example_runs():
    text = (README.parent / "docs" / "verification.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["inside"].shape == names["without"].shape == (2, 10)
    assert 0 < float(names["area"].mean()) < 1
