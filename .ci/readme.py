"""README.md is index.ipynb as Markdown, with paths as seen from the top folder and its pictures as files.
The findings' thumbnails come from the cells of the findings' pages that carry the tag `thumbnail`.
`python .ci/readme.py --check` only compares."""

import base64
import re
import sys
from pathlib import Path

import nbformat

TOP = Path(__file__).resolve().parent.parent
IMAGES = TOP / "nbs/images"


def pictures_of(cell):
    "The PNG pictures that a cell showed."
    return [base64.b64decode(o.data["image/png"]) for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


def thumbnails():
    "File name -> picture, of every finding that has one."
    out = {}
    for path in sorted((TOP / "nbs/findings").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if "thumbnail" in cell.metadata.get("tags", []):
                out |= {f"{path.stem}.png": p for p in pictures_of(cell)}
    return out


def output_text(cell, name, files):
    "What a code cell printed or showed: Markdown as it is, text in a fence, a picture as a file."
    parts = []
    for k, out in enumerate(cell.get("outputs", [])):
        shown = out.get("data", {})
        if "text/markdown" in shown:
            parts.append(shown["text/markdown"])
        elif "image/png" in shown:
            files[f"{name}_{k}.png"] = base64.b64decode(shown["image/png"])
            parts.append(f"![{cell.metadata.get('alt', 'figure')}](images/{name}_{k}.png)")
        elif "text" in out or "text/plain" in shown:
            parts.append("```\n" + (out.get("text") or shown["text/plain"]).rstrip() + "\n```")
    return parts


def readme(path, files):
    "The page as Markdown; folded cells show only their output."
    parts = []
    for i, cell in enumerate(nbformat.read(path, 4).cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            if not cell.metadata.get("jupyter", {}).get("source_hidden"):
                parts.append(f"```python\n{cell.source}\n```")
            parts += output_text(cell, f"index_{i}", files)
    text = "\n\n".join(parts) + "\n"
    text = re.sub(
        r"(\]\(|src=\")(?!https?:|#|\.\./)([^)\"]+)", r"\1nbs/\2", text
    )  # links and pictures beside the notebook
    return text.replace("](../", "](")


files = thumbnails()
text = readme(TOP / "nbs/index.ipynb", files)
stale = [n for n, b in files.items() if not (IMAGES / n).exists() or (IMAGES / n).read_bytes() != b]
if "--check" in sys.argv:
    if (TOP / "README.md").read_text() != text:
        sys.exit("README.md is not what nbs/index.ipynb says: run `make export`")
    sys.exit(
        f"these pictures in nbs/images are not what the pages show: {', '.join(stale)}: run `make export`"
        if stale
        else 0
    )
(TOP / "README.md").write_text(text)
IMAGES.mkdir(exist_ok=True)
for name in stale:
    (IMAGES / name).write_bytes(files[name])
