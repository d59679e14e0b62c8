"A small sample of the attacks of benchmarks/faults.py, whose full numbers are in benchmarks/README.md."
import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
sys.path.append(str(TOP/"benchmarks"))
from attacks import PARTS, Tally, common, disk, inputs, processes  # noqa: E402
from faults import table  # noqa: E402

def made(make, tmp_path, n):
    "Attacks, of which none may have come through."
    tally = Tally()
    make(tally, tmp_path, n)
    assert not tally.failed and tally.made, tally.failed[:3]
    return tally

def test_damaged_inputs_are_refused_in_a_line(tmp_path): assert made(inputs.fuzz, tmp_path, 600).made > 600

def test_damaged_files_of_a_run_are_never_loaded(tmp_path): made(disk.flips_of_a_run, tmp_path/"x", 12)

def test_damaged_weights_are_never_loaded(tmp_path): made(disk.flips_of_weights, tmp_path/"x", 30)

def test_a_run_survives_kills_in_its_saves(tmp_path): made(disk.kills_in_saves, tmp_path/"x", 2)

def test_scores_survive_engines_that_die(tmp_path): made(processes.engines, tmp_path, 2000)

def test_nan_weights_are_refused(tmp_path): made(inputs.nan, tmp_path/"x", 2)

def test_a_number_that_cannot_be_is_refused(tmp_path, monkeypatch):
    few = [(cls, keys[::12]) for cls, keys in inputs.commands()]
    monkeypatch.setattr(inputs, "commands", lambda: few)
    made(inputs.numbers, tmp_path, 4)

def test_a_busy_machine_is_no_hang(tmp_path, monkeypatch):
    "A child may take twenty times what another one took here; one that takes longer is ended, and says so."
    monkeypatch.setattr(common, "LIMITS", dict(seconds=1, slowest=0.))
    assert common.forked(lambda: time.sleep(3), tmp_path).status == -14
    assert common.forked(lambda: time.sleep(.3), tmp_path).status == 0 and common.limit(0) >= 6
    assert common.forked(lambda: time.sleep(3), tmp_path).status == 0

def test_a_process_that_ends_late_is_no_orphan():
    late = subprocess.Popen(["sleep", "1"])
    assert processes.left_over([late.pid], .2) == [late.pid] and processes.left_over([late.pid], 20) == []
    late.wait()

def test_the_table_is_of_these_attacks():
    "Each row that is kept was made, and nothing came through."
    kept = json.loads((TOP/"benchmarks/faults.json").read_text())
    assert set(kept) <= set(PARTS)
    for name, row in kept.items(): assert row["made"] and not row["failed"], name
    assert table(kept) in (TOP/"benchmarks/README.md").read_text(), "print the table anew"

# Security: what no module does

def calls(tree):
    "Dotted names of everything that is called."
    return {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}

@pytest.mark.parametrize("path", sorted((TOP/"grpo_chess").glob("*.py")), ids=lambda p: p.stem)
def test_no_module_runs_what_a_file_says(path):
    "No pickle, no eval, no shell; torch reads data alone, and YAML comes through the reader without objects."
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
             for alias in node.names} | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for name, call in calls(tree).items():
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"), name
        assert words.get("shell", "False") == "False" and words.get("allow_pickle", "False") == "False", name
        if name == "torch.load": assert words.get("weights_only") == "True"
        if name == "yaml.load": assert ast.unparse(call.args[1]).endswith(("PlainLoader", "SafeLoader"))
