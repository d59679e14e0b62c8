"""Keep a run's report and history for the index page: python .ci/keep.py runs/NAME"""
import json
import math
import sys
from pathlib import Path

from grpo_chess.train import REPORT
from grpo_chess.trainer import PANEL, read_metrics

run, data = Path(sys.argv[1]), Path(__file__).resolve().parent.parent/"nbs/data"
columns = {"step", "seconds", "plies", *REPORT, *(k for _, keys in PANEL for k in keys)}
short = lambda v: float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else v
rows = [{k: short(v) for k, v in row.items() if k in columns} for row in read_metrics(run/"metrics.jsonl")]
(data/"tiny_metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
(data/"tiny_report.md").write_text((run/"report.md").read_text())
