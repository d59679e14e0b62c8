"""The form of the pages: a lesson is one sitting and has its frame, a finding ends with its box."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted((TOP / "nbs").rglob("*.ipynb"))
LESSONS = [p for p in PAGES if p.parent.name == "nbs" and re.match(r"0\d|11|12_play", p.name)]
FINDINGS = [p for p in PAGES if p.parent.name == "findings" and p.stem != "index"]
FOLDED = re.compile(r"#\| hide|#\| default_exp|#\| echo: false|# Solution|# Check|# Colab")


def name_of(path):
    return str(path.relative_to(TOP / "nbs"))


def markdown(nb):
    return [c.source for c in nb.cells if c.cell_type == "markdown"]


def test_every_lesson_is_one_sitting():
    said = subprocess.run([sys.executable, ".ci/pages.py", "--check"], cwd=TOP, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("\n| ") == len(PAGES)


@pytest.mark.parametrize("path", LESSONS, ids=name_of)
def test_a_lesson_has_its_frame(path):
    "Why, what one learns, needs and how long, before any import; recap, tried exercises and where next after the last."
    nb = nbformat.read(path, 4)
    first_import = next(
        i for i, c in enumerate(nb.cells) if c.cell_type == "code" and re.search(r"^(import|from) ", c.source, re.M)
    )
    opening = "\n".join(c.source for c in nb.cells[:first_import] if c.cell_type == "markdown").lower()
    for word in ("**why", "will learn", "need", "minutes"):
        assert word in opening, f"{word!r} is not said before the first import"
    assert any("pipeline(" in c.source for c in nb.cells if c.cell_type == "code"), "no picture of the pipeline"
    text = "\n".join(markdown(nb))
    for heading in ("Recap", "Exercises", "Where next"):
        assert re.search(rf"^(#+ |\*\*){heading}", text, re.M), f"no {heading!r}"
    solutions = [c.source for c in nb.cells if c.cell_type == "code" and c.source.startswith("# Solution")]
    asked = len(re.findall(r"^\d\. ", text[text.rindex("Exercises") :], re.M))
    assert len(solutions) >= 2 and asked == len(solutions), f"{asked} exercises, {len(solutions)} solutions"
    assert all("assert" in s or "print(" in s for s in solutions), "a solution shows nothing"


@pytest.mark.parametrize("path", FINDINGS, ids=name_of)
def test_a_finding_ends_with_its_box(path):
    text = "\n".join(markdown(nbformat.read(path, 4)))
    for word in ("the law", "the check", "what was measured here", "what others measured", "minutes"):
        assert word in text.lower(), f"no {word!r}"
    assert "explore(" in path.read_text(), "no slider"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_is_not_for_reading_is_folded(path):
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == "code" and FOLDED.match(c.source):
            assert c.metadata.get("jupyter", {}).get("source_hidden"), c.source[:60]


def test_every_lesson_and_finding_opens_on_colab():
    said = subprocess.run([sys.executable, ".ci/badges.py", "--check"], cwd=TOP, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for path in LESSONS + FINDINGS:
        nb = nbformat.read(path, 4)
        first = next(c for c in nb.cells if c.cell_type == "code")
        assert "colab-badge.svg" in nb.cells[0].source and name_of(path) in nb.cells[0].source
        assert first.id == "colab" and not first.outputs
        assert first.source.splitlines()[1].startswith('if "google.colab"')


def test_the_first_page_names_every_lesson():
    text = "\n".join(markdown(nbformat.read(TOP / "nbs/00_lesson.ipynb", 4)))
    missing = [p.name for p in LESSONS if f"]({p.name})" not in text and p.stem != "00_lesson"]
    assert not missing, missing


def test_thumbnails_of_the_readme_are_wide_enough_to_read():
    "A picture alone in its column shrinks to nothing beside text on a narrow screen, so its words stand below it."
    text = (TOP / "README.md").read_text()
    cells = [cell for row in text.splitlines() if row.startswith("|") for cell in row.split("|") if "<img" in cell]
    assert len(cells) == 4
    for cell in cells:
        width, words = re.search(r'width="(\d+)"[^>]*><br>(.*)', cell).groups()
        assert int(width) >= 300 and len(words.split()) > 15


def test_the_pythons_of_the_readme_are_those_of_the_package():
    told = re.search(r"with Python (.*) and `make`", (TOP / "README.md").read_text())[1]
    declared = re.search(r'\("3", (.*)\)\)', (TOP / "setup.py").read_text())[1]
    assert re.findall(r"3\.\d+", told) == re.findall(r"3\.\d+", declared)


def shell_blocks(text):
    return re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("path", [*PAGES, TOP / "README.md", TOP / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_commands_can_be_copied(path):
    "A shell reads each block, and no option begins a command: a line that goes on in the next ends with a backslash."
    texts = markdown(nbformat.read(path, 4)) if path.suffix == ".ipynb" else [path.read_text()]
    for block in (b for text in texts for b in shell_blocks(text)):
        read = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert read.returncode == 0, f"{block}\n{read.stderr}"
        joined = block.replace("\\\n", " ")
        assert not re.search(r"^\s*-", joined, re.M), block
