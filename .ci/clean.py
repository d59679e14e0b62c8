"""Make stored outputs the same from run to run: widgets go (their ids differ, and the static figure above each of them stays),
and what a kernel sent in several pieces is one piece."""
import sys

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"

def joined(outputs):
    "Outputs, with neighbouring pieces of the same stream put together."
    out = []
    for o in outputs:
        if out and o.output_type == out[-1].output_type == "stream" and o.name == out[-1].name: out[-1].text += o.text
        else: out.append(o)
    return out

for path in sys.argv[1:]:
    nb = nbformat.read(path, 4)
    before = nbformat.writes(nb)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = joined(o for o in cell.outputs if WIDGET not in o.get("data", {}))
    if nbformat.writes(nb) != before: nbformat.write(nb, path)
