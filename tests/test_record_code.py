"benchmarks/record.py without the code that it measures: what it says then, and the tables that it makes."
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
sys.path.append(str(TOP/"benchmarks"))
import record  # noqa: E402


def test_a_missing_clone_is_one_line_that_says_how_to_get_it(tmp_path):
    there = tmp_path/"there"
    done = subprocess.run([sys.executable, TOP/"benchmarks/record.py", there], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    for word in (f"git clone --recurse-submodules https://github.com/noamdwc/grpo_chess {there}",
                 f"git -C {there} checkout {record.COMMIT}", "pip install pytorch_lightning jaxtyping jax datasets"):
        assert word in done.stderr


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    "A submodule that was not fetched, then a package that is not installed, then nothing."
    monkeypatch.setattr(record, "find_spec", lambda name: name != "jax" or None)
    (tmp_path/"src/grpo_logic").mkdir(parents=True)
    (tmp_path/"src/grpo_logic/model.py").touch()
    assert " lack searchless_chess/src/tokenizer.py: " in record.missing(tmp_path)
    (tmp_path/"searchless_chess/src").mkdir(parents=True)
    (tmp_path/"searchless_chess/src/tokenizer.py").touch()
    assert " lack jax: " in record.missing(tmp_path)
    monkeypatch.setattr(record, "find_spec", lambda name: True)
    assert record.missing(tmp_path) == ""


def test_our_side_makes_a_step_and_tells_its_parts():
    "In small, and without a clone; what it watches is there."
    start = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
    command = [sys.executable, TOP/"benchmarks/record.py", "nowhere", "--worker", "32-true both"]
    done = subprocess.run([*command, "--group=2", "--plies=2"], input=json.dumps([start]*2) + "\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert set(row) == {"play", "update", "measure", "step", "kl_step", "positions", "peak"}
    assert row["step"]["cpu"] > row["update"]["cpu"] > row["kl_step"]["cpu"] > 0 and 1 < row["positions"] <= 6


def a_round(step, play, update, **more):
    "One round of one side: CPU seconds of its parts, twice as many of wall time."
    parts = dict(step=step, play=play, update=update, **more)
    return {key: dict(cpu=x, wall=2*x, engines=0.) for key, x in parts.items()}


@pytest.fixture
def found():
    "Three rounds, in which our float32 takes a third and our bfloat16 a tenth; no `both` was measured."
    theirs = [a_round(30., 10., 20.), a_round(33., 10., 23.), a_round(36., 10., 26.)]
    slow, fast = ([a_round(k*row["step"]["cpu"], 4*k, row["update"]["cpu"]*k, measure=.5, kl_step=k) | dict(peak=peak)
                   for row in theirs] for k, peak in ((1/3, .72), (.1, .5)))
    return {record.THEIRS: theirs, "32-true starter": slow, "bf16-mixed starter": fast}


def test_the_table_of_seconds_has_medians_and_ranges_of_what_was_measured(found):
    cpu, wall = (record.seconds_table(found, kind) for kind in ("cpu", "wall"))
    assert cpu.splitlines()[:3] == [
        "| CPU seconds | theirs | 32-true starter | bf16-mixed starter |", "|---|---|---|---|",
        "| a step | 33.00 (30.00–36.00) | 11.00 (10.00–12.00) | 3.30 (3.00–3.60) |"]
    assert "| measuring |  | 0.50 (0.50–0.50) |" in cpu and "| a step | 66.00 (60.00–72.00) |" in wall
    assert len({line.count("|") for line in cpu.splitlines()}) == 1


def test_the_table_of_ratios_compares_round_by_round_and_says_what_is_reached(found):
    said = record.ratio_table(found)
    assert "| 32-true starter: a step | 3.00 (3.00–3.00) | 2, reached |" in said
    assert "| 32-true starter: playing and judging | 7.50 (7.50–7.50) | 6, reached |" in said
    assert "| bf16-mixed starter: updating | 10.00 (10.00–10.00) |  |" in said
    assert "without `kl_step` | 3.09 (3.09–3.10) |" in said                     # 33/(11 - 1/3)
    assert "product | 0.72 (0.72–0.72) | 0.7, reached |" in said
    assert "product | 0.50 (0.50–0.50) | 0.7, missed |" in said and "both" not in said


def test_the_clock_adds_up_what_parts_use():
    clock = record.Clock(list)

    class Owner:
        def work(self, n): return sum(range(n))
    clock.watch(Owner, "work", "play")
    assert Owner().work(10**5) == Owner().work(10**5) == sum(range(10**5))
    assert clock.spent["play"]["cpu"] > 0 and clock.spent["play"]["engines"] == 0
    assert clock.spent["play"]["wall"] >= .9*clock.spent["play"]["cpu"]


def test_the_page_says_where_the_code_is():
    text = (TOP/"benchmarks/README.md").read_text()
    assert record.SOURCE in text and record.COMMIT in text and "benchmarks/record.py" in text
