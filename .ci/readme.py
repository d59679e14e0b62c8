"README.md is index.ipynb as Markdown, with paths as seen from the top folder. `python .ci/readme.py --check` only compares."
import re
import sys
from pathlib import Path

import nbformat

TOP = Path(__file__).resolve().parent.parent

def output_text(cell):
    "What a code cell printed or showed: Markdown as it is, text in a fence."
    parts = []
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "text/markdown" in data: parts.append(data["text/markdown"])
        elif "text" in out or "text/plain" in data: parts.append("```\n" + (out.get("text") or data["text/plain"]).rstrip() + "\n```")
    return parts

def readme(path):
    "The page as Markdown; hidden cells show only their output."
    parts = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.source.startswith("#| hide\n") or cell.source.startswith("#| default_exp"): continue
        else:
            if not cell.source.startswith("#| echo: false"): parts.append(f"```python\n{cell.source}\n```")
            parts += output_text(cell)
    text = "\n\n".join(parts) + "\n"
    text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text)      # links and pictures beside the notebook
    return text.replace("](../", "](")

text = readme(TOP/"nbs/index.ipynb")
if "--check" in sys.argv: sys.exit(0 if (TOP/"README.md").read_text() == text else "README.md is not what nbs/index.ipynb says: run `make export`")
(TOP/"README.md").write_text(text)
