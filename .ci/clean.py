"Take widgets out of stored notebooks: their ids differ from run to run, and the static figure above each of them stays."
import sys

import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"

for path in sys.argv[1:]:
    nb = nbformat.read(path, 4)
    before = nbformat.writes(nb)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    if nbformat.writes(nb) != before: nbformat.write(nb, path)
