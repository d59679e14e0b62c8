"""A badge that opens the page on Colab, and a folded cell that makes it run there, on every lesson and finding.
Owner, name and branch of the repository stand in settings.ini and nowhere else: `make export` brings them here.
`python .ci/badges.py --check` only compares."""

import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted(p for f in (".", "findings") for p in (TOP / "nbs" / f).glob("*.ipynb") if p.stem != "index")
IMAGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
CELL = "colab"  # id and tag of the folded cell


def settings():
    "The settings of the repository."
    parser = ConfigParser(delimiters=["="])
    parser.read(TOP / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def badge(path):
    "The line that opens a page on Colab."
    s, inside = settings(), path.relative_to(TOP).as_posix()
    return f"{IMAGE}(https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{inside})"


def source(path):
    "The cell that makes a page run on Colab, and does nothing elsewhere."
    s, folder = settings(), path.parent.relative_to(TOP).as_posix()
    return f"""# Colab: fetch the repository and install what this page needs; elsewhere this does nothing
if "google.colab" in str(get_ipython()):
    import os
    %cd -q /content
    ![ -e {s["repo"]} ] || git clone -q --depth 1 -b {s["branch"]} https://github.com/{s["user"]}/{s["repo"]}
    if not os.path.exists("{s["repo"]}"):
        raise SystemExit("github.com/{s["user"]}/{s["repo"]} cannot be fetched. In a copy of your own, "
                         "set user in settings.ini, then type: make export")
    !bash {s["repo"]}/.ci/colab
    %cd -q {s["repo"]}/{folder}"""


def with_badge(path):
    "The page with its badge under the title and the cell before its first code."
    nb = nbformat.read(path, 4)
    lines = [line for line in nb.cells[0].source.splitlines() if not line.startswith(IMAGE)]
    nb.cells[0].source = "\n".join(lines).rstrip() + "\n\n" + badge(path)
    nb.cells = [c for c in nb.cells if c.get("id") != CELL]
    folded = {"jupyter": {"source_hidden": True}, "tags": [CELL]}
    cell = nbformat.v4.new_code_cell(source(path), id=CELL, metadata=folded)
    nb.cells.insert(next(i for i, c in enumerate(nb.cells) if c.cell_type == "code"), cell)
    return nb


if __name__ == "__main__":
    stale = [p for p in PAGES if nbformat.writes(with_badge(p)) != nbformat.writes(nbformat.read(p, 4))]
    if "--check" in sys.argv:
        sys.exit(f"run python .ci/badges.py: {', '.join(p.stem for p in stale)}" if stale else 0)
    for path in stale:
        nbformat.write(with_badge(path), path)
