"""How long each page is to read: `python .ci/pages.py` prints a table; with --check it exits 1 where a lesson is
more than one sitting.

Minutes are an estimate: 200 words, 20 lines of code or 4 pictures a minute."""

import sys
from pathlib import Path

import nbformat

TOP = Path(__file__).resolve().parent.parent
FOLDED = "source_hidden"
LESSONS = ("00", "01", "02", "03", "04", "05", "06", "07", "08")
CELLS, WORDS, LONGEST, STEP = 60, 2000, 40, 60  # of a lesson; of a cell, and of the one that is a whole training step


def lines_of(cell):
    "Lines of code, without directives and empty lines."
    return [s for s in cell.source.splitlines() if s.strip() and not s.startswith("#|")]


def measure(path):
    "Cells, words, code lines that are not folded, pictures, longest cell and minutes of a page."
    cells = [c for c in nbformat.read(path, 4).cells if "colab" not in c.metadata.get("tags", [])]  # for a machine
    code = [c for c in cells if c.cell_type == "code"]
    seen = [c for c in code if not c.metadata.get("jupyter", {}).get(FOLDED)]
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    words = len([w for line in text.splitlines() if "colab-badge" not in line for w in line.split()])
    lines = sum(len(lines_of(c)) for c in seen)
    pictures = sum("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    return dict(
        cells=len(cells),
        words=words,
        lines=lines,
        pictures=pictures,
        longest=max(len(c.source.splitlines()) for c in code),
        minutes=words / 200 + lines / 20 + pictures / 4,
    )


def too_long(path, m):
    "What a lesson has too much of, in words; empty if nothing."
    out = [f"a cell of {m['longest']} lines"] if m["longest"] > (STEP if path.stem == "07_trainer" else LONGEST) else []
    if path.parent.name == "nbs" and path.name.startswith(LESSONS):
        out += [f"{m['cells']} cells"] * (m["cells"] > CELLS) + [f"{m['words']} words"] * (m["words"] > WORDS)
    return out


if __name__ == "__main__":
    print("| page | cells | words | lines of code | pictures | longest cell | minutes |\n|---|---|---|---|---|---|---|")
    long = []
    for path in sorted((TOP / "nbs").rglob("*.ipynb")):
        m, name = measure(path), str(path.relative_to(TOP / "nbs").with_suffix(""))
        print(
            f"| {name} | {m['cells']} | {m['words']} | {m['lines']} | {m['pictures']} | {m['longest']} "
            f"| {m['minutes']:.0f} |"
        )
        long += [f"{name}: {x}" for x in too_long(path, m)]
    if long:
        print("\nmore than one sitting, or a wall: " + "; ".join(long), file=sys.stderr)
    sys.exit(bool(long) and "--check" in sys.argv)
