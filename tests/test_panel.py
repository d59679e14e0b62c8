"The log and the instrument panel."
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from grpo_chess.panel import METRICS, column, draw_panel, read_metrics
from small import make

TOP = Path(__file__).resolve().parent.parent

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")

def titles(rows): return [ax.get_title(loc="left") for ax in draw_panel(rows).axes]

def test_every_column_is_explained_and_drawn():
    t = make()
    rows = [t.step() for _ in range(2)]
    assert set(rows[0]) == set(METRICS) and all(len(meaning) == 2 for meaning in METRICS.values())
    json.dumps(rows[0])
    fig = draw_panel(rows + [{**rows[1], "ratio_error": None, "entropy": None}], "x")
    assert len(fig.axes) == 8 and all(ax.lines for ax in fig.axes)

def test_the_panel_shows_gradients_where_there_are_some_and_says_where_there_are_none():
    t = make(loss=dict(entropy_coef=.1), budget_every=2)
    rows = [t.step() for _ in range(3)]
    ax = draw_panel(rows).axes[7]
    assert ax.get_title(loc="left") == "gradient norms" and [list(line.get_xdata()) for line in ax.lines] == [[0, 2]]*2
    assert [line.get_label() for line in ax.lines] == ["grad_policy", "grad_entropy"]      # there is no KL term
    assert ax.lines[0].get_ydata()[1] == rows[2]["grad_policy"]
    assert ax.lines[0].get_marker() == "o" and draw_panel(rows[:1]).axes[7].lines[0].get_marker() == "o"
    old = [{k: v for k, v in r.items() if not k.startswith(("grad_", "cos_"))} for r in rows]
    missing = [r | dict(grad_policy=None, grad_kl=None, grad_entropy=None) for r in rows]
    for unmeasured in (old, missing):
        ax = draw_panel(unmeasured).axes[7]
        assert not ax.lines and [text.get_text() for text in ax.texts] == ["not measured"]

def test_the_panel_shows_where_the_clip_acts():
    plain, clipped = make(), make(epochs=4, lr=1e-2, sharpen=30.)
    rows = [plain.step() for _ in range(2)]
    assert "clip fraction (never acts)" in titles(rows)
    rows.append(clipped.step())
    assert rows[-1]["clip_binding"] > 0 and "clip acts in 1/3 steps" in titles(rows)
    small = [r | dict(clip_region=min(r["clip_region"], .002), clip_binding=min(r["clip_binding"], .001)) for r in rows]
    assert draw_panel(small).axes[4].get_ylim()[1] < .004                  # a thousandth is seen too

def test_a_long_log_is_drawn_with_its_mean():
    rows = [dict(step=i, entropy=float(i % 2)) for i in range(40)]
    pale, bold = draw_panel(rows).axes[1].lines
    assert len(pale.get_xdata()) == 40 and list(bold.get_xdata()) == list(range(9, 40))
    assert np.allclose(bold.get_ydata(), .5)

def test_an_empty_log_has_a_panel(): assert len(draw_panel([]).axes) == 8

def test_a_torn_last_line_is_dropped_and_any_other_is_named(tmp_path):
    path = tmp_path/"metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert column(read_metrics(path), "step").tolist() == [0, 1]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"): read_metrics(path)

def test_what_is_kept_of_a_run_has_all_that_the_panel_draws(tmp_path):
    "The script that keeps runs for the front page."
    t = make(loss=dict(entropy_coef=.1), budget_every=1)
    rows, run = [t.step() for _ in range(2)], tmp_path/"runs/a"
    for folder in (run, tmp_path/".ci", tmp_path/"nbs/data"): folder.mkdir(parents=True)
    (run/"metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run/"report.md").write_text("# a\n\ntext\n- a match\n")
    (run/"config.yaml").write_text(yaml.safe_dump(dict(seed=3)))
    (tmp_path/".ci/keep.py").write_text((TOP/".ci/keep.py").read_text())
    command, env = [sys.executable, tmp_path/".ci/keep.py", "a", run], os.environ | {"PYTHONPATH": str(TOP)}
    subprocess.run(command, check=True, env=env)
    kept = read_metrics(tmp_path/"nbs/data/a_metrics.jsonl")
    lines = [[len(ax.lines) for ax in draw_panel(log).axes] for log in (kept, rows)]
    assert titles(kept) == titles(rows) and lines[0] == lines[1]
    assert kept[1]["grad_entropy"] == pytest.approx(rows[1]["grad_entropy"], rel=1e-4)
    assert (tmp_path/"nbs/data/a_seeds.md").read_text() == "- seed 3, a match\n"
