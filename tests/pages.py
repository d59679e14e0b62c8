"What pages print, and whether it is what is stored; for the tests that run them."

import difflib
import re
from pathlib import Path

import nbformat

from grpo_chess.engine import engine_name

TOP = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
# `make test` runs these in the browser, if there is one
BROWSER = ("findings/", "00_figures", "00_lesson", "02_sampler", "03_loss")
MADE_WITH = "Stockfish 15.1"  # the engine of the stored outputs; another one gives other evaluations


def text_outputs(nb):
    "Printed text and plain results of every cell, without what may differ between machines."
    out = []
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        kept = [
            o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})
        ]  # .ci/clean.py leaves sliders out
        shown = [o.get("data", {}) for o in kept]
        texts = [
            (o.get("name"), o.get("text") or d.get("text/markdown") or d.get("text/html") or d.get("text/plain", ""))
            for o, d in zip(kept, shown)
        ]
        out.append("".join(re.sub(r"0x[0-9a-f]+", "0x", t) for stream, t in texts if stream != "stderr"))
    return out


def compare(path, fresh):
    "A page that has run must have printed what is stored of it."
    if "EnginePool" in path.read_text() and engine_name() != MADE_WITH:
        return  # it ran, with all its asserts; its numbers are another engine's
    for i, (then, now) in enumerate(zip(text_outputs(nbformat.read(path, 4)), text_outputs(fresh))):
        lines = "\n".join(difflib.unified_diff(then.split("\n"), now.split("\n"), "stored", "now", lineterm="", n=0))
        assert then == now, f"code cell {i} of {path.name} printed something else:\n{lines}"
