"""Make stored pages the same from run to run: widgets go (their ids differ, and the static figure above each of
them stays),
what a kernel sent in several pieces is one piece, cells that a reader of the lesson need not see are folded, and
pictures
are kept in 128 colours, which is a third of their weight."""

import base64
import io
import sys

import nbformat
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"

FOLDED = ("#| hide", "#| default_exp", "#| echo: false", "# Solution", "# Check", "# Colab")  # how a folded cell begins


def joined(outputs):
    "Outputs, with neighbouring pieces of the same stream put together."
    out = []
    for o in outputs:
        if out and o.output_type == out[-1].output_type == "stream" and o.name == out[-1].name:
            out[-1].text += o.text
        else:
            out.append(o)
    return out


def lighter(output):
    "An output whose picture has a palette; one that has it already is left as it is."
    png = output.get("data", {}).get("image/png")
    if png is None:
        return output
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode != "P":
        small = io.BytesIO()
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


for path in sys.argv[1:]:
    nb = nbformat.read(path, 4)
    before = nbformat.writes(nb)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.source.startswith(FOLDED):
            cell.metadata.setdefault("jupyter", {})["source_hidden"] = True
        if cell.cell_type == "code":
            cell.outputs = joined(lighter(o) for o in cell.outputs if WIDGET not in o.get("data", {}))
    if nbformat.writes(nb) != before:
        nbformat.write(nb, path)
