"The experiments' histories: nothing is lost when a part of them is made anew."

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parent.parent
RUN = TOP / "nbs/experiments/run.py"


def load_run():
    spec = importlib.util.spec_from_file_location("run_alone", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    "run.py on a plan of two arms and two seeds; a run is a number that grows."
    module = load_run()
    (tmp_path / "data").mkdir()
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({"small": dict(question="?", seeds=[0, 1], arms={"b, c": [], "a": []})}, sort_keys=False)
    )
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "TOP", tmp_path)
    made = []

    def one(name, arm, args, seed, x, weights):
        made.append((arm, seed))
        row = dict(arm=arm, seed=seed, number=len(made))
        return [row, row], [row], []

    monkeypatch.setattr(module, "one", one)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["run.py", *args])
        module.main()
        return [
            (r["arm"], int(r["seed"]), int(r["number"]))
            for r in csv.DictReader((tmp_path / "data/small_end.csv").open())
        ], len(made)

    return run


def test_rows_stand_in_the_order_of_the_plan(experiment):
    experiment("small", "a")
    assert experiment("small") == ([("b, c", 0, 3), ("b, c", 1, 4), ("a", 0, 1), ("a", 1, 2)], 4)
    assert experiment("small")[1] == 4  # what is there is not made again


def test_again_replaces_what_was_named_and_nothing_else(experiment):
    experiment("small")
    assert experiment("small", "a", "--again")[0] == [("b, c", 0, 1), ("b, c", 1, 2), ("a", 0, 5), ("a", 1, 6)]
    assert [n for *_, n in experiment("small", "--again")[0]] == [7, 8, 9, 10]


def test_an_unknown_arm_is_an_error_that_names_those_there_are(experiment):
    with pytest.raises(SystemExit, match="small has no arm 'd'; it has 'b, c', 'a'"):
        experiment("small", "d")


@pytest.mark.parametrize(
    "x, file",
    [
        ({}, "positions.jsonl"),
        (dict(every=5), "heldout.jsonl"),
        (dict(every=5, labels="heldout_openings.jsonl"), "heldout_openings.jsonl"),
    ],
)
def test_regret_is_taken_on_the_positions_that_the_plan_names(monkeypatch, x, file):
    run, asked = load_run(), []

    class Enough(Exception):
        pass

    def stop(path):
        asked.append(path)
        raise Enough

    monkeypatch.setattr(run, "read_labels", stop)
    with pytest.raises(Enough):
        run.one("n", "a", [], 0, dict(keep=[], **x), "")
    assert asked == [TOP / "nbs/data" / file] and asked[0].exists()


def test_what_a_checkpoint_is_worth_is_its_average_where_it_has_one(tmp_path):
    run = load_run()
    (tmp_path / "model.safetensors").touch()
    assert run.result(tmp_path).name == "model.safetensors"
    (tmp_path / "average.safetensors").touch()
    assert run.result(tmp_path).name == "average.safetensors"


@pytest.mark.parametrize("script", sorted(p.name for p in RUN.parent.glob("*.py")))
def test_every_script_still_loads_and_says_what_it_needs(script, tmp_path):
    "Most of them run for an hour, and no notebook runs them: they must not fall behind the package."
    needs = script in ("grid.py", "heldout.py", "seen.py", "starts.py", "strength.py", "supervised.py")
    name = "__main__" if needs else "loaded"
    load = (
        f"import sys, runpy; sys.path.insert(0, {str(RUN.parent)!r}); sys.argv = [{script!r}]; "
        f"runpy.run_path({str(RUN.parent / script)!r}, run_name={name!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", load],
        env=os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr and (
        done.returncode,
        "the following arguments are required" in done.stderr,
    ) == ((2, True) if needs else (0, False)), done.stderr


# the doctor's tables


@pytest.fixture
def scripts(monkeypatch):
    "The doctor's scripts as modules."
    monkeypatch.syspath_prepend(str(RUN.parent))
    return importlib.import_module("doctor"), importlib.import_module("histories")


def stored(name):
    return list(csv.DictReader((RUN.parent / f"data/{name}.csv").open()))


def test_the_table_of_planted_faults_has_every_run_and_reaches_its_aims(scripts):
    doctor, rows = scripts[0], stored("doctor")
    assert sorted(r["run"] for r in rows) == sorted(doctor.plan())
    unseen = [r for r in rows if r["split"] == "unseen"]
    faulty, healthy = ([r for r in unseen if (r["fault"] == "healthy") == h] for h in (False, True))
    assert len({r["fault"] for r in faulty}) >= 14 and len(healthy) >= 80
    same = dict(no_spread="constant_reward")  # it is planted as a reward that never changes
    for right in (lambda r: r["named"] == "1", lambda r: r["first"] in (r["fault"], same.get(r["fault"]))):
        assert sum(map(right, faulty)) >= 0.95 * len(faulty)
    assert sum(bool(r["looks"]) or r["named"] == "0" for r in healthy) <= 0.05 * len(healthy)


def test_settings_that_were_judged_were_not_tuned_on(scripts):
    doctor, histories = scripts
    for fault, (tuned, unseen) in doctor.FAULTS.items():
        assert not [x for x in unseen if x in tuned] and len(unseen) >= len(tuned), fault
    used = [settings for _, _, settings, _ in doctor.plan().values()]
    for _, x in histories.SIX.values():
        assert not any(x.items() <= y.items() for y in used), x


@pytest.mark.parametrize("name", ["two_temperatures-unseen-1", "lr_too_high-unseen-0", "not_a_number-tuned-2"])
def test_a_planted_run_made_anew_gets_the_verdict_that_is_stored(scripts, name, tmp_path, monkeypatch):
    doctor = scripts[0]
    monkeypatch.setattr(doctor, "LIGHT", doctor.table())
    doctor.make_run(name, doctor.plan()[name], tmp_path)
    made, kept = doctor.verdict(tmp_path / f"{name}.json.gz"), next(r for r in stored("doctor") if r["run"] == name)
    assert {k: str(made[k]) for k in ("fault", "split", "settings", "first", "named")} == {
        k: kept[k] for k in ("fault", "split", "settings", "first", "named")
    }


def test_the_record_is_judged_as_its_table_says_and_as_the_ledger_does(scripts):
    rows = stored("doctor_record")
    assert [{k: str(v) for k, v in scripts[1].judged(r["run"]).items()} for r in rows] == rows
    assert {r["run"] for r in rows} == {r["run_id"] for r in scripts[1].published("runs")}
    assert all(r["agrees"] == "yes" for r in rows)
    claims = {c["id"] for c in yaml.safe_load((TOP / "research_docs/claims.yaml").read_text())}
    assert {c for r in rows for c in r["claims"].split()} <= claims


def test_other_doctors_are_beside_ours_on_every_run(scripts):
    rows = stored("doctor_others")
    assert {r["source"] for r in rows} == {"grpo_chess", "rldoctor", "rlprobe"}
    assert {r["run"].removesuffix(" 0") for r in rows if r["source"] == "grpo_chess"} >= set(scripts[0].FAULTS)
