"""Keep runs of a preset for the index page: python .ci/keep.py PRESET runs/SEED0 runs/SEED1 ...  The first one's
report and history, and the match lines of all."""

import json
import math
import sys
from pathlib import Path

import yaml

from grpo_chess.report import REPORT
from grpo_chess.panel import PANEL, read_metrics

name, runs, data = sys.argv[1], [Path(p) for p in sys.argv[2:]], Path(__file__).resolve().parent.parent / "nbs/data"
drawn = [k for _, keys in PANEL for k in keys]  # the gradients too
columns = {"step", "seconds", "plies", "lr", "updates", *REPORT, *drawn}


def short(v):
    return float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else v


rows = [{k: short(v) for k, v in row.items() if k in columns} for row in read_metrics(runs[0] / "metrics.jsonl")]
(data / f"{name}_metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
(data / f"{name}_report.md").write_text(f"# {name}\n" + (runs[0] / "report.md").read_text().partition("\n")[2])
lines = []
for run in runs:
    seed = yaml.safe_load((run / "config.yaml").read_text())["seed"]
    lines += [
        line.replace("- ", f"- seed {seed}, ", 1)
        for line in (run / "report.md").read_text().splitlines()
        if line.startswith("- ")
    ]
(data / f"{name}_seeds.md").write_text("\n".join(lines) + "\n")
