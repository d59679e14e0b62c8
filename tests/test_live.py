"What is seen while a run goes on: a bar that knows the limit, a panel that is redrawn in a notebook."
import io
import math

import nbformat
import pytest
from nbclient import NotebookClient
from runs import TINY, TOP, command, long

from grpo_chess import live
from grpo_chess.figures import data
from grpo_chess.live import COST, LivePanel, TimeBar, remaining, share
from grpo_chess.panel import read_metrics

ROWS = read_metrics(data("tiny_metrics.jsonl"))

def bar(done=100, n=120, took=20., begun=0., limit=math.inf, now=100., steps=600):
    "A bar whose clocks stand."
    made = TimeBar(steps, done, begun, limit, file=io.StringIO(), ncols=100)
    made._time, made.clock, made.n = lambda: made.start_t + took, lambda: now, n
    text = str(made)
    made.close()
    return text

@pytest.mark.parametrize("limit, says, part", [
    (math.inf, "120/600 [00:20<08:00, ", 20), (1e6, "<08:00, ", 20), (400., "<05:00 to the time limit, ", 25),
    (100., "<00:00 to the time limit, ", 100), (50., "<00:00 to the time limit, ", 100)])
def test_what_is_left_is_the_smaller_of_two(limit, says, part):
    assert says in bar(limit=limit) and bar(limit=limit).strip().startswith(f"{part}%|")

def test_a_bar_without_a_rate_promises_nothing():
    assert "<?" in bar(n=100, took=0.) and "<05:00 to the time limit" in bar(n=100, took=0., limit=400.)

def test_a_resumed_run_counts_what_was_done_and_spent():
    text = bar(done=300, n=310, took=10., begun=-500., now=100., limit=400.)
    assert "310/600" in text and "<04:50, " in text and text.strip().startswith("67%|")

def test_share_and_remaining_have_limits():
    assert share(0, 600, 0., math.inf) == 0 and share(700, 600, 0., math.inf) == 1 and share(1, 0, 0., 0.) == 1
    assert remaining(600, 600, 1., math.inf) == (0., False) and remaining(0, 600, None, math.inf)[0] == math.inf

def test_a_run_with_a_limit_says_so(tmp_path):
    done = command(*long(TINY), "--out", tmp_path, "--name", "a", "--minutes", "0.15")
    assert done.returncode == 0 and "to the time limit" in done.stderr and "Stopped by its time limit" in done.stdout
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("100%|") and "/100000 [" in last and "entropy=" in last

# The panel

def test_looking_costs_a_twentieth(monkeypatch):
    "A picture that takes ten seconds is followed by two hundred without one."
    clock, drawn = [0.], []
    def draw(rows, title):
        clock[0] += 10
        drawn.append(len(rows))
        return b""
    class Handle:
        def update(self, picture): pass
    monkeypatch.setattr(live, "panel_png", draw)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    panel = LivePanel("r", True)
    panel.handle = Handle()
    for n in range(1, 1000):
        clock[0] += 1
        panel.show(ROWS[:1]*n)
    assert len(drawn)*10 <= COST*clock[0] + 10 and len(drawn) > 4
    before = len(drawn)
    panel.show(ROWS, last=True)
    assert len(drawn) == before + 1

def test_a_terminal_has_no_panel(monkeypatch):
    monkeypatch.setattr(live, "panel_png", lambda *_: pytest.fail("drawn"))
    assert not live.in_notebook()
    LivePanel("r", live.in_notebook()).show(ROWS, last=True)
    LivePanel("r", True).show([], last=True)

CODE = """
from grpo_chess import preset, run
small = dict(reward=dict(judge="material"), positions=dict(window_cp=0), match=dict(games=0), accelerator="cpu",
             sampler=dict(boards=4, plies=4), trainer=dict(steps=6, precision="32-true"))
result = run(preset("tiny", out={out!r}, name={name!r}, **small), quiet={quiet})
"""

def outputs(tmp_path, quiet):
    cell = nbformat.v4.new_code_cell(CODE.format(out=str(tmp_path), name=f"r{quiet}", quiet=quiet))
    nb = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(nb, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(TOP)))).execute()
    return nb.cells[0].outputs

def test_a_run_in_a_notebook_shows_its_panel_once(tmp_path):
    shown = outputs(tmp_path, False)
    assert sum("image/png" in o.get("data", {}) for o in shown) == 1
    bars = [o.data["text/plain"] for o in shown if "%|" in o.get("data", {}).get("text/plain", "")]
    assert len(bars) == 1 and "6/6" in bars[0]                          # one line, and it has reached the end
    assert not any(o.get("name") == "stderr" for o in shown), "something is written in red"
    assert not outputs(tmp_path, True)
