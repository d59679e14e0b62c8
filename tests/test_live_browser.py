"""A run in a page of JupyterLab: its panel redraws itself in one place while the run goes on, and its bar moves."""

import os
import time

import nbformat
import pytest
from browser import MISSING, Lab

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.skipif(not os.environ.get("ALL_PAGES"), reason="make test-browser looks at a run"),
    pytest.mark.xdist_group("browser"),
]
RUN = """
from grpo_chess import preset, run
cfg = preset("tiny")
cfg.trainer.steps, cfg.sampler.boards, cfg.sampler.plies, cfg.match.games = 400, 4, 8, 0
cfg.reward.judge, cfg.minutes, cfg.name = "material", 0.6, "seen"
outcome = run(cfg)
"""
SEEN = """
const images = [...document.querySelectorAll('.jp-OutputArea-output img')];
const text = [...document.querySelectorAll('.jp-OutputArea-output')].map(n => n.innerText).join('\\n');
const tables = [...document.querySelectorAll('.jp-OutputArea-output table')].map(n => n.rows.length);
const red = document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]').length;
return {red: red, tables: tables, pictures: images.map(n => n.src), text: text, ran: window.ran};
"""


@pytest.fixture(scope="module")
def lab():
    with Lab() as lab:
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (RUN.strip(), "outcome")])
        page.metadata["kernelspec"] = dict(name="python3", display_name="python3")
        nbformat.write(page, lab.folder / "nbs/seen.ipynb")
        yield lab


def test_a_run_draws_its_panel_while_it_goes_on(lab):
    lab.begin("nbs/seen.ipynb")
    during, bars, most, begun, now = [], set(), 0, time.monotonic(), {"ran": False}
    while not now["ran"] and time.monotonic() - begun < 180:
        now = lab.browser.execute_script(SEEN)
        most = max(most, len(now["pictures"]))
        if now["pictures"] and not now["ran"]:
            during += [p for p in now["pictures"] if p not in during]
        bars |= {line for line in now["text"].splitlines() if "step" in line and "%|" in line}
        time.sleep(0.3)
    if folder := os.environ.get("SCREENSHOTS"):
        lab.browser.save_screenshot(f"{folder}/live.png")
    assert now["ran"], now["text"][-2000:]
    assert "Traceback" not in now["text"], now["text"][-2000:]
    assert len(during) >= 2, f"{len(during)} pictures were seen while the run went on"
    assert most == 1, f"{most} pictures at once: the panel does not redraw itself in its place"
    assert len(bars) >= 3 and any("to the time limit" in bar for bar in bars), bars
    assert not now["red"], "something is written in red"
    assert now["text"].count("%|") == 1, "more than one bar is seen"
    assert now["tables"] and now["tables"][0] > 5, "the report is not shown at the end"
    assert "| expected" not in now["text"].replace("`", ""), "a table that is not a table"
