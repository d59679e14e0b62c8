"The notebooks are the source: they run, they say what they said, and the library is what they export."

import json
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import nbformat
import pytest
import warm
from browser import MISSING
from nbclient import NotebookClient
from pages import BROWSER, TOP, WIDGET, compare

NOTEBOOKS = sorted((TOP / "nbs").rglob("*.ipynb"))


def name_of(path):
    return path.stem


# Runs after the last cell of a page that has sliders: each one is set as a reader sets it, and the picture in its
# own output must change.
MOVE_SLIDERS = """
import ipywidgets
if "EXPLORERS" not in globals(): from grpo_chess.figures import EXPLORERS
def _ends(w):
    if hasattr(w, "options"): return [w._options_full[0][1], w._options_full[-1][1]]
    return [False, True] if isinstance(w, ipywidgets.Checkbox) else [w.min, w.max]
def _boxes_inside(w): return [w, *(x for child in getattr(w, "children", ()) for x in _boxes_inside(child))]
def _move(figure, explorer):            # in a function, so that no name of the page is lost
    assert explorer.image in _boxes_inside(explorer.box), f"figure {figure} is not in what is shown"
    for name, control in explorer.controls.items():
        assert control in _boxes_inside(explorer.box), f"slider {name} is not in what is shown"
        start, pictures = control.value, set()
        for value in _ends(control):
            control.value = value
            pictures.add(explorer.image.value)
        control.value = start
        assert len(pictures) == 2, f"figure {figure}: moving {name} changes nothing"
assert EXPLORERS, "this page calls explore(...) but shows no slider"
for _figure, _explorer in enumerate(EXPLORERS): _move(_figure, _explorer)
"""


# A page is run once: where there is a browser test_browser runs some, and compares what they print too.
RUN = [p for p in NOTEBOOKS if MISSING or p.stem == "index" or not any(b in str(p.relative_to(TOP)) for b in BROWSER)]


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_runs_and_repeats_its_outputs(path):
    """A process of its own runs the page from top to bottom and prints what is stored; its sliders move.

    Lessons are started in the top folder here, and in their own by nbdev_test; other pages in their own.
    """
    folder = TOP if path.parent.name == "nbs" else path.parent
    fresh = nbformat.read(path, 4)
    assert "interactive(" not in path.read_text(), (
        "use grpo_chess.figures.explore: interactive(...) draws nothing in a browser"
    )
    if "explore(" in path.read_text():
        fresh.cells.append(nbformat.v4.new_code_cell(MOVE_SLIDERS))
    os.environ |= {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}  # two tests at a time: a thread each
    where = {"metadata": {"path": str(folder)}}
    with warm.kernels():  # which have torch, and nothing of grpo_chess
        NotebookClient(fresh, timeout=600, kernel_name="python3", resources=where).execute()
    compare(path, fresh)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_is_fit_to_be_stored(path):
    "Small, with ids, without errors, without paths of a machine."
    nb = nbformat.read(path, 4)
    assert path.stat().st_size < 250_000
    assert all(c.get("id") for c in nb.cells) and nb.cells[0].source.startswith("# ")
    outputs = json.dumps([c.get("outputs", []) for c in nb.cells if c.cell_type == "code"])
    assert '"output_type": "error"' not in outputs
    assert WIDGET not in outputs and "widgets" not in nb.metadata, "a widget is stored: run `make export`"
    assert not re.search(r"/(home|root|work|tmp|usr|Users)/", re.sub(r'"image/png": "[^"]*"', "", outputs)), (
        "a path of this machine is stored"
    )
    ran = [
        c
        for c in nb.cells
        if c.cell_type == "code" and re.search(r"^\s*print\(", c.source, re.M) and not c.source.startswith("#|")
    ]
    assert all(c.outputs for c in ran), "a cell prints but has no stored output: run the notebook"


def test_library_is_what_the_notebooks_export(tmp_path):
    "Exporting into an empty folder gives every module, byte for byte, and no module has lost its notebook."
    pytest.importorskip("nbdev", reason="no nbdev here; constraints.txt has the one that exports")
    lib = str(tmp_path / "grpo_chess")
    script = f"from nbdev.export import nb_export; import sys; [nb_export(p, lib_path={lib!r}) for p in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", script, *map(str, NOTEBOOKS)], cwd=TOP, check=True)
    exported = {p.name: p.read_text() for p in (tmp_path / "grpo_chess").glob("*.py")}
    here = {
        p.name: p.read_text() for p in (TOP / "grpo_chess").glob("*.py") if p.name not in ("__init__.py", "_modidx.py")
    }
    exported = {k: v for k, v in exported.items() if k in here or k not in ("__init__.py", "_modidx.py")}

    def clean(text):
        return re.sub(r"(# %% |File to edit: )\S*?(\w+\.ipynb)", r"\1\2", text)

    assert {k: clean(v) for k, v in here.items()} == {k: clean(v) for k, v in exported.items()}


def test_exported_code_stands_alone():
    "No exported cell leans on one that is not exported; nothing imports upwards, or in a circle."
    subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "F", "--no-cache", "grpo_chess"], cwd=TOP, check=True
    )
    number = {m.group(1): p.stem[:2] for p in NOTEBOOKS if (m := re.search(r"default_exp (\w+)", p.read_text()))}
    uses = {m: set(re.findall(r"^from \.(\w+) import", (TOP / f"grpo_chess/{m}.py").read_text(), re.M)) for m in number}
    for module, used in uses.items():
        assert all(number[u] <= number[module] for u in used), f"{module} imports {used}"
    list(TopologicalSorter(uses).static_order())  # CycleError names a circle


def test_readme_is_the_index():
    subprocess.run([sys.executable, ".ci/readme.py", "--check"], cwd=TOP, check=True)
