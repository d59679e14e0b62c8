"The doctor: histories of all forms, findings that are complete, checks on made-up runs, the command."
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from grpo_chess.doctor import (
    FORMATS, SUBJECTS, as_document, as_html, as_markdown, compare, compared_steps, comparison, diagnose, draw_findings,
    looked, main)
from grpo_chess.firststep import (
    KIND_OF, Numbers, fit_causes, normalised, numbers_of, prior_of, two_temperatures, typical_scores)
from grpo_chess.histories import HistoryError, as_history, read_history, resolve
from grpo_chess.history import CASES, CHECKS, Case, Finding, from_rows, in_order, onset, theil_sen
from grpo_chess.panel import FOREIGN, METRICS, names_of, read_metrics
from grpo_chess.tracking import wait_for_end
from grpo_chess.trainer import AblateConfig
from small import make

TOP = Path(__file__).resolve().parent.parent
DATA = TOP / "nbs" / "data"

def written(path, text):
    path.write_text(text)
    return path

def columns(history): return {name: values.tolist() for name, (_, values) in history.columns.items()}

# findings

@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kind_of_finding_has_cause_prescription_and_refutation(name):
    case = CASES[name]
    assert case.title and len(case.cause) > 20 and len(case.change) > 5 and len(case.refute) > 15
    Finding(name, "warning", .5, "x", (0, 1))

def test_a_warning_without_a_prescription_is_refused():
    CASES["silent"] = Case("silent", "something", "", "nothing")
    try:
        for severity in ("critical", "warning"):
            with pytest.raises(ValueError, match="what to change"): Finding("silent", severity, .5, "x", (0, 1))
        Finding("silent", "note", .5, "x", (0, 1))
    finally: del CASES["silent"]
    with pytest.raises(ValueError, match="none of"): Finding("lr_too_low", "grave", .5, "x", (0, 1))

def test_theil_sen_ignores_outliers_and_knows_what_it_does_not_know():
    t, x = np.arange(50.), np.arange(50.)*2
    x[::10] += 1000
    assert theil_sen(t, x).slope == pytest.approx(2, abs=.2) and theil_sen(t, x).rises
    assert not theil_sen(t[:2], x[:2]).rises and theil_sen(t[:2], x[:2]).high == math.inf
    assert theil_sen(t, np.ones(50)).low == theil_sen(t, np.ones(50)).high == 0

def finding(name, begins, certainty=.8, severity="warning"):
    return Finding(name, severity, certainty, "x", (begins, 100))

def order(*findings): return [f.name for f in in_order(findings)]

def test_a_cause_comes_before_what_follows_from_it():
    collapse = finding("entropy_collapse", 30, .95, "critical")
    assert order(collapse, finding("lr_too_high", 0)) == ["lr_too_high", "entropy_collapse"]
    assert order(collapse, finding("lr_too_high", 80)) == ["entropy_collapse", "lr_too_high"]       # it came later
    assert collapse.after == "" and in_order([collapse, finding("lr_too_high", 0)])[1].after == "lr_too_high"
    chain = [finding("bonus_dominates", 9, .9), finding("advantage_vanishes", 7, .85), finding("group_collapse", 5, .7)]
    assert order(*chain) == ["group_collapse", "advantage_vanishes", "bonus_dominates"]
    at_once = finding("group_collapse", 0, .8)
    assert order(at_once, finding("lr_too_high", 0, .9)) == ["group_collapse", "lr_too_high"]       # before any update

def test_notes_come_last_and_a_circle_has_an_end():
    circle = [finding("group_collapse", 5, .7), finding("entropy_collapse", 5, .8)]
    notes = [finding("budget_by_value", 0, .99, "note"), finding("ratio_is_one", 0, .99, "healthy")]
    assert order(*notes[::-1], *circle) == ["entropy_collapse", "group_collapse", "budget_by_value", "ratio_is_one"]

@pytest.mark.parametrize("name", sorted(CASES))
def test_what_a_case_leads_to_exists(name): assert set(CASES[name].leads_to) <= set(CASES) - {name}

def test_the_onset_is_where_most_of_what_follows_is_bad():
    t = np.arange(10.)
    assert onset(t, t >= 4) == 4 and onset(t, (t == 1) | (t > 6)) == 7 and onset(t, t < 0) == 9

# the first step

@pytest.mark.parametrize("gap", [.7, 1.2, 1.6])
@pytest.mark.parametrize("entropy", [1.2, 2.5])
def test_a_gap_is_found_where_the_entropies_are_known(gap, entropy):
    seen = numbers_of(two_temperatures(typical_scores(entropy), gap))
    best = fit_causes(seen)[0]
    assert best.cause == ("sharper" if gap > 1 else "flatter") and best.size == pytest.approx(gap, rel=.06)

REAL = [      # first steps of the real trainer: clip, KL, mean ratio, ESS, entropy gap, entropy; samples
    ("two_temperatures", (.0185, .00257, 1.0012, .9969, -.0341, 2.090), 216),        # 1.15, few moves undecided
    ("two_temperatures", (.118, .0082, 1., .985, -.113, 2.86), 1e6),                 # 1.15, all moves
    ("truncated_sampling", (0., .1443, 1., 0., .416, 2.434), 1e6),                   # top-p 0.85 with a floor
    ("truncated_sampling", (.583, .2247, 1., 0., .537, 1.215), 1e6),                 # 0.7
    ("truncated_sampling", (0., .094, .911, .999, .19, 1.90), 216),                  # sampled moves
    ("ratio_noise", (.692, .13, 1., .77, .0093, 2.81), 1e6),
    ("ratio_noise", (.704, .37, 1.106, .49, -.013, 1.46), 216),
    ("rounding", (0., 7.4e-6, .9996, 1., -2.3e-5, 2.18), 216),
]

@pytest.mark.parametrize("kind, numbers, samples", REAL)
def test_first_steps_of_the_trainer_show_their_cause(kind, numbers, samples):
    seen = Numbers(*numbers[:4], entropy_gap=numbers[4], entropy=numbers[5])
    fits = fit_causes(seen, samples, prior=prior_of({"sampler.temperature": 1.}, fit_causes(seen, samples)))
    assert KIND_OF[fits[0].cause] == kind and fits[0].weight > .5
    if kind == "two_temperatures": assert fits[0].size == pytest.approx(1.15, abs=.06)

def test_a_clip_range_beyond_1_and_positions_that_are_decided_give_numbers():
    "A probability of 0 in floating point, a ratio of 1e300: no warning and no NaN."
    told = numbers_of(two_temperatures(typical_scores(.3, uneven=2.5), .4), (1.5, 9.))
    assert told.clip_low == 0 and all(map(math.isfinite, vars(told).values()))

def test_what_the_configuration_says_decides_where_the_numbers_cannot():
    seen = Numbers(.556, .046, 1.012, entropy=2.816)
    free = fit_causes(seen)
    at = {said: fit_causes(seen, prior=prior_of(config, free))[0].cause for said, config in
          dict(tau=dict(rollout_temperature=1.3), dropout={"dropout": .1, "rollout_temperature": 1.}).items()}
    assert at == dict(tau="sharper", dropout="noise")

def test_two_temperatures_that_are_known_to_be_equal_are_no_cause():
    seen, both = Numbers(.27, .015, 1.005, entropy=2.8), dict(rollout_temperature=1.3, loss_temperature=1.3, dropout=.1)
    free = fit_causes(seen)
    assert fit_causes(seen, prior=prior_of(both, free))[0].cause == "noise"
    forgot = Numbers(.556, .046, 1.012, entropy=2.816)
    known = prior_of(both | dict(loss_temperature=1., dropout=0.), fit_causes(forgot))
    assert fit_causes(forgot, prior=known)[0].cause == "sharper"

def test_ratios_outside_of_the_range_are_no_fault_where_nothing_clips():
    "Learning towards the improved policy has no clip: replayed positions have ratios far from 1."
    def names(binding):
        return diagnose(from_rows([dict(step=i, clip_region=.55*(i > 0), clip_binding=binding*(i > 0), ratio_error=0.,
                                        entropy=2.) for i in range(50)])).names()
    assert "clip_fraction" not in names(0.) and "clip_fraction" in names(.4)

def test_several_updates_a_step_are_no_fault_and_a_large_clip_fraction_is():
    def log(clip): return from_rows([{"step": i, "clip_region": clip, "entropy": 2.} for i in range(50)])
    small, large = diagnose(log(.1)), diagnose(log(.4))
    assert not small.alarms and "ratio_unknown" in small.names() and large.alarms[0].title.startswith("wrong ratio")
    exact = diagnose(from_rows([dict(step=i, ratio_error=.05, approx_kl=.0005, entropy=2.) for i in range(9)]))
    assert exact.alarms                      # measured before any update

def test_where_the_numbers_cannot_decide_both_causes_are_named():
    once = dict(ppo_steps=1)                # update a step
    d = diagnose(from_rows([dict(step=i, clip_region=.42, approx_kl=.045, entropy=2.1) for i in range(9)], once))
    assert {*d.alarms[0].title.split(" or ")} == {"two temperatures", "noise in the ratio"}
    assert "cannot tell" in d.alarms[0].says
    assert "temperature 1" in d.alarms[0].change and "dropout to 0" in d.alarms[0].change
    rows = [dict(step=i, clip_region=.42, approx_kl=.045, entropy=2.1, entropy_gap=0.) for i in range(9)]
    sure, several = diagnose(from_rows(rows, once)), diagnose(from_rows(rows))
    assert sure.alarms[0].title == "noise in the ratio"
    assert several.alarms[0].title == "noise in the ratio or too large updates"

def test_a_run_of_this_trainer_with_two_temperatures_is_named_and_one_without_is_not():
    runs = [make(sharpen=40., ablate=ablate, loss=dict(entropy_coef=.01))
            for ablate in (None, AblateConfig(loss_temperature=.7))]
    good, bad = (diagnose(from_rows([t.step() for _ in range(4)])) for t in runs)
    assert bad.alarms[0].name == "two_temperatures" and not [f for f in good.alarms if f.name in (
        "two_temperatures", "ratio_noise", "rounding", "truncated_sampling", "stale_policy")]

# histories

def test_names_of_other_trainers_are_known_and_none_means_two_things():
    for name, column in {"clip_ratio/region_mean": "clip_binding", "actor/ppo_kl": "approx_kl", "kl": "kl_reference",
                         "frac_reward_zero_std": "no_spread", "mean_kl_divergence": "approx_kl",
                         "eval_stockfish/score": "eval_score", "train/reward": "train/avg_reward"}.items():
        found = resolve(name)
        assert found and found[0] == column, name
    named = [name for column in METRICS | FOREIGN for name in names_of(column)]
    assert len(named) == len(set(named))

def test_what_was_not_measured_is_left_out_and_nan_is_kept():
    history = from_rows([dict(step=0, loss=1., entropy=None), dict(step=5, loss=math.nan, guard="x", on=True)])
    assert list(history.columns) == ["loss"] and list(history.columns["loss"][0]) == [0, 5]
    assert diagnose(history).names() == ["not_a_number"]

def test_a_run_folder_a_trainer_state_verl_csv_and_console_are_read(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    written(run / "metrics.jsonl", '{"step": 0, "entropy": 2.0}\n{"step": 1, "entr')
    written(run / "config.yaml", "sampler: {temperature: 1.3}\n")
    assert read_history(run).config == {"sampler.temperature": 1.3} and columns(read_history(run)) == {"entropy": [2.]}
    trl = tmp_path / "checkpoint-5"
    trl.mkdir()
    log = [dict(step=1, entropy=.5, kl=.1, odd_one=3), dict(step=2, entropy=.4, eval_loss=1.)]
    written(trl / "trainer_state.json", json.dumps(dict(global_step=5, log_history=log)))
    assert columns(read_history(tmp_path / "checkpoint-5")) == {"entropy": [.5, .4], "kl_reference": [.1]}
    assert read_history(trl).unknown == ["eval_loss", "odd_one"]
    verl = written(tmp_path / "v.jsonl", '{"step": 3, "data": {"actor/entropy": 0.4, "actor/grad_norm": 1}}\n')
    assert columns(read_history(verl)) == {"entropy": [.4], "grad_norm": [1.]}
    console = written(tmp_path / "log.txt", "noise\n(pid) step:4 - actor/entropy:0.25 - actor/lr:np.float64(1e-6)\n")
    assert columns(read_history(console)) == {"entropy": [.25], "lr": [1e-6]}
    table = written(tmp_path / "w.csv", '"Step","a - entropy","a - entropy__MIN"\n0,2,1\n1,NaN,\n')
    assert columns(read_history(table))["entropy"][0] == 2 and math.isnan(columns(read_history(table))["entropy"][1])

def test_an_offline_run_of_wandb_is_read_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true").items():
        monkeypatch.setenv(name, value)
    config = dict(rollout_temperature=1.3, loss=dict(kl="k1"))
    run = wandb.init(project="x", config=config, mode="offline", dir=tmp_path)
    for step in range(3): run.log({"mean_clip_fraction": .5 + step/100, "actor/ppo_kl": .04, "strange": 1})
    run.finish()
    wait_for_end(next((tmp_path / "wandb").glob("offline-run-*")), 60)
    history = read_history(tmp_path / "wandb")
    assert columns(history) == {"clip_region": [.5, .51, .52], "approx_kl": [.04]*3} and history.unknown == ["strange"]
    assert history.config["rollout_temperature"] == 1.3 and history.config["loss.kl"] == "k1"

BAD = {"a.jsonl": "[1]", "b.json": '{"log_history": 3}', "c.json": "{", "d.csv": "x,y\n1,2", "e.txt": "hello",
       "f.jsonl": "", "g.json": "["*100_000, "h.csv": "\x00", "i.jsonl": '{"step": 1, "entropy": "much"}'}

@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_said_in_one_line(name, tmp_path, capsys):
    path = written(tmp_path / name, BAD[name])
    with pytest.raises(HistoryError): read_history(path)
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and name in said

# the doctor

def test_the_default_run_and_the_sampled_run_have_no_alarm():
    for name in ("imitator_metrics.jsonl", "tiny_metrics.jsonl", "scratch_metrics.jsonl"):
        assert diagnose(read_history(DATA / name)).alarms == []

def test_a_run_of_trl_without_spread_is_named_and_the_mended_one_is_not():
    exact, partial = (diagnose(read_history(DATA / f"trl_{name}.json")) for name in ("exact", "partial"))
    assert exact.alarms[0].name == "no_spread" and not partial.alarms
    assert "in `frac_reward_zero_std` (no_spread)" in as_markdown(exact)
    assert "frac_reward_zero_std (no_spread)" in comparison(exact, partial)

def test_checks_that_cannot_look_say_what_they_lack():
    d = diagnose(from_rows([dict(step=i, entropy=2.) for i in range(30)]))
    assert d.asked + len(d.skipped) == len(CHECKS) and "expected_regret" in d.skipped["sharpening"]
    assert "| sharpening | expected_regret, start_regret |" in as_markdown(d)

def fallen(): return from_rows([dict(step=i, entropy=2.5*.97**i, odd=1) for i in range(200)], name="a <run>")

def test_a_reward_that_stopped_rising_is_told_from_one_that_is_noisy():
    rng, t = np.random.default_rng(0), np.arange(300)
    def run(reward): return from_rows([{"step": int(i), "entropy": 2.5*.985**i, "train/avg_reward": r}
                                       for i, r in zip(t, reward + .02*rng.standard_normal(300))])
    alarmed = [diagnose(run(x)).names()[:1] == ["entropy_collapse"] for x in (0*t, np.minimum(t, 100)/100, t/300)]
    assert alarmed == [True, True, False]

def test_a_certainty_that_was_earned_is_no_group_collapse():
    "All siblings play the move that is best: regret has gone from 0.08 to 0.003."
    def run(end): return from_rows([dict(step=i, agreement_mean=min(.3 + i/50, .97), expected_regret=end + .08*.9**i,
                                         entropy=3*.95**i) for i in range(100)])
    assert "group_collapse" not in diagnose(run(.003)).names() and "group_collapse" in diagnose(run(.05)).names()

def test_groups_without_spread_whose_siblings_are_nearly_all_alike_have_collapsed():
    def run(same): return from_rows([dict(step=i, agreement_mean=same, no_spread=.97) for i in range(30)])
    assert diagnose(run(.88)).names()[:2] == ["group_collapse", "no_spread"]
    assert "group_collapse" not in diagnose(run(.6)).names() and diagnose(run(.6)).alarms[0].name == "no_spread"

def test_half_of_the_groups_without_spread_are_a_note_while_the_reward_rises():
    def run(slope, share): return from_rows([{"step": i, "agreement_mean": .7, "no_spread": share, "train/avg_reward":
                                              slope*i + .001*(i % 3)} for i in range(60)])
    assert [f.severity for f in diagnose(run(.01, .6)).findings if f.name == "no_spread"] == ["note"]
    assert "no_spread" in [f.name for x in (run(0., .6), run(.01, .95)) for f in diagnose(x).alarms[:1]]

def test_steps_that_lose_are_a_wrong_direction_and_no_collapse():
    "The regret hides it in its scatter; a learning rate that overshoots now and then is something else."
    rng = np.random.default_rng(0)
    def names(lost):
        gains = np.where(rng.random(100) < lost, -1, 1)*rng.random(100)/1000
        regret = .1 + .02*rng.standard_normal(100)
        rows = [dict(step=i, entropy=2.5*.97**i, expected_regret=r, gain_step=g)
                for i, (r, g) in enumerate(zip(regret, gains))]
        return [f.name for f in diagnose(from_rows(rows)).alarms]
    assert names(1.) == names(.9) == ["reward_falls", "entropy_collapse"]
    assert names(.5) == names(0.) == ["entropy_collapse"]

def test_a_report_says_how_names_were_read_and_what_a_missing_column_holds():
    history = as_history([{"step": i, "clip_ratio/region_mean": .05, "kl": .1, "odd": 1} for i in range(9)])
    assert history.logged == {"clip_binding": "clip_ratio/region_mean", "kl_reference": "kl"}
    for text in (as_markdown(diagnose(history)), as_html(diagnose(history))):
        assert "clip_ratio/region_mean" in text and "standard deviation of the advantages" in text and "odd" in text

def test_all_forms_say_the_same():
    d = diagnose(fallen())
    assert d.alarms[0].name == "entropy_collapse"
    for text in (as_markdown(d), as_html(d), as_document(d, "2026-01-01")):
        assert "entropy collapse" in text and d.alarms[0].change.split(";")[0] in text
    assert "<run>" not in as_html(d) and "base64" in as_html(d) and set(FORMATS) == {"markdown", "html", "document"}
    head = as_document(d, "2026-01-01").split("---")[1]
    assert all(f"{key}:" in head for key in ("title", "date", "git_commit", "runs", "question"))

def test_a_page_has_a_picture_for_each_alarm_and_no_table_of_nothing():
    page = as_html(diagnose(fallen()))
    assert page.count("<section") == len(diagnose(fallen()).findings) and page.count("data:image/png") >= 1
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    whole = diagnose(fallen())
    whole.skipped = {}
    assert "Checks that were skipped" not in as_html(whole) + as_markdown(whole)

def test_two_runs_are_compared_with_an_interval():
    rng = np.random.default_rng(0)
    def run(mean, tau): return from_rows([dict(step=i, entropy=mean + .1*rng.standard_normal(), grad_norm=rng.random())
                                          for i in range(300)], {"sampler.temperature": tau, "seed": 1})
    settings, changes = compare(run(2., 1.), run(2.5, 1.3))
    assert settings == {"sampler.temperature": (1., 1.3)}
    assert {c.column: c.counts for c in changes} == dict(entropy=True, grad_norm=False)

def test_runs_of_different_length_are_compared_where_both_have_steps(capsys, tmp_path):
    def run(n, start=0, name="x"): return from_rows([dict(step=start + i, entropy=float(start + i)) for i in range(n)],
                                                    name=name)
    change, = compare(run(100), run(300))[1]
    assert change.first == change.second and not change.counts          # the same run, watched for longer
    told = compared_steps(run(100, name="a"), run(300, name="b"))
    assert "a ends at step 99" in told and "b at step 299" in told and "up to step 99" in told
    other = from_rows([dict(step=i, entropy=1.) for i in range(9)], {"lr": 1})
    short = comparison(diagnose(run(9, name="a")), diagnose(other))
    assert "| lr | not known | 1 |" in short and "| not known |" in short.splitlines()[-3]
    assert "share no step" in compared_steps(run(9), run(9, 50)) and compare(run(9), run(9, 50))[1][0].second > 50
    assert "ends at" not in compared_steps(run(9), run(9))
    logs = [written(tmp_path / f"{n}.jsonl", "\n".join(json.dumps(dict(step=i, entropy=2.5*.97**i)) for i in range(n)))
            for n in (100, 200)]
    assert main([*map(str, logs), "--compare"]) == 0
    said = capsys.readouterr().out
    assert said.index("100: One alarm: entropy collapse.") < said.index("200: ") < said.index("| column | 100 | 200 |")

def test_the_command_writes_and_fails_where_it_is_asked_to(tmp_path, capsys):
    rows = (json.dumps(dict(step=i, entropy=2.5*.97**i)) for i in range(200))
    log = written(tmp_path / "x.jsonl", "\n".join(rows))
    assert main([str(log)]) == 0 and "# Diagnosis of x" in capsys.readouterr().out
    assert main([str(log), "--fail-on", "critical"]) == 1 and "entropy collapse" in capsys.readouterr().err
    assert main([str(DATA / "tiny_metrics.jsonl"), "--fail-on=warning"]) == 0
    for argv in (["--compare", "true"], ["--compare"]): assert main([str(log), str(log), *argv]) == 0
    for bad in ([], [str(log), "--compare"], [str(log), "--format", "word"], [str(log), "--fail-on", "bad"],
                [str(log), "--temperature", "nan"], [str(log), "--colour", "red"], [str(log), "--format"]):
        assert main(bad) == 2
        assert capsys.readouterr().err.count("\n") == 1

def test_the_suffix_of_the_output_decides_the_format_and_the_files_are_named(tmp_path, capsys):
    log = written(tmp_path / "x.jsonl", "\n".join(json.dumps(dict(step=i, entropy=2.5*.97**i)) for i in range(200)))
    for argv, files, begins in ((["r.html"], ["r.html"], "<!doctype html>"), (["r.md"], ["r.md", "r.png"], "# Diag"),
                                (["q.html", "--format", "md"], ["q.html", "q.png"], "# Diag"),
                                (["d.md", "--format", "document"], ["d.md"], "---\ntitle"),
                                (["c.html", str(log), "--compare"], ["c.html"], "<!doctype html>")):
        assert main([str(log), "--output", str(tmp_path / argv[0]), *argv[1:]]) == 0
        said = capsys.readouterr().out
        assert said.startswith("wrote ") and said.count("\n") == 1
        assert all(str(tmp_path / name) in said and (tmp_path / name).exists() for name in files)
        assert (tmp_path / argv[0]).read_text().startswith(begins)
    for name, told in {"gone/r.md": "no folder", "r.pdf": ".html", ".": "folder"}.items():
        assert main([str(log), "--output", str(tmp_path / name)]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "gone").exists()

def module(*words, **how):
    "The command as a process, from the package of these tests."
    env = os.environ | dict(PYTHONPATH=str(TOP))
    return subprocess.run([sys.executable, "-m", "grpo_chess.doctor", *map(str, words)], env=env, text=True, **how)

def test_a_report_that_cannot_be_printed_is_said():
    with open("/dev/full", "w") as out:
        done = module(DATA / "tiny_metrics.jsonl", stdout=out, stderr=subprocess.PIPE)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1

def test_an_output_that_is_the_terminal_is_printed(tmp_path):
    with (tmp_path / "f").open("w") as out:
        print("before", file=out, flush=True)
        assert module(DATA / "tiny_metrics.jsonl", "--output", "/dev/stdout", stdout=out).returncode == 0
    assert (tmp_path / "f").read_text().startswith("before\n# Diagnosis of tiny_metrics\n")
    assert "wrote" not in (tmp_path / "f").read_text() and not Path("/dev/stdout.png").exists()

def test_the_command_of_a_document_can_be_run_and_its_head_is_yaml(tmp_path, capsys):
    log = written(tmp_path / 'a "b" c.jsonl', "\n".join(json.dumps(dict(step=i, odd=2.5*.97**i)) for i in range(200)))
    argv = [str(log), "--names", "entropy=odd", "--format", "document"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text.split("---")[1])["runs"] == ['a "b" c']
    command = re.search(r"`python -m grpo_chess.doctor (.*?)`", text)[1]
    assert shlex.split(command) == argv
    unnamed = as_document(diagnose(read_history(log, dict(entropy="odd"))))
    assert "doctor 'a \"b\" c.jsonl'`" in unnamed

def test_options_stand_anywhere_and_formats_have_their_short_names(tmp_path, capsys):
    log = str(written(tmp_path / "x.jsonl", "\n".join(json.dumps(dict(step=i, entropy=2.)) for i in range(20))))
    assert main(["--format", "html", log]) == 0 and capsys.readouterr().out.startswith("<!doctype html>")
    assert main(["--compare", log, log]) == 0 and " against " in capsys.readouterr().out
    assert main([log, "--format", "md"]) == 0 and capsys.readouterr().out.startswith("# Diagnosis")
    assert main([log, "--html"]) == 2 and "--format html" in capsys.readouterr().err

def test_no_alarm_says_at_once_what_was_not_judged():
    few = as_markdown(diagnose(from_rows([dict(step=i, entropy=2.) for i in range(30)])))
    top = few.split("\n\n")[1]
    assert top.startswith("**No alarm.**") and f"of {len(CHECKS)} checks could look (1 column, 30 rows, " in top
    assert "Not judged: the ratio before the first update" in top and "sharpening" in top and "evaluations" in top
    assert "entropy," not in top.split("Not judged")[1].replace("entropy monitor", "")
    all_seen = diagnose(from_rows([dict(step=i, entropy=2.) for i in range(30)]))
    all_seen.skipped = {}
    assert "Not judged" not in looked(all_seen)
    named = [name for checks in SUBJECTS.values() for name in checks]
    assert len(named) == len(set(named)) and {*named} <= {c.name for c in CHECKS}

def test_a_finding_speaks_of_the_names_in_the_log():
    d = diagnose(as_history([{"step": i, "kl": 1e-9, "policy/entropy": 2.} for i in range(30)], name="x"))
    assert [f.name for f in d.alarms] == ["lr_too_low"]
    assert "in `kl` (kl_reference)" in as_markdown(d) and "<code>kl</code> (kl_reference)" in as_html(d)
    assert draw_findings(d).axes[0].get_ylabel() == "kl\n(kl_reference)"
    broken = diagnose(as_history([{"step": i, "objective/kl": 0. if i < 3 else math.nan} for i in range(6)]))
    assert "`objective/kl` (kl_reference) is not finite" in as_markdown(broken)

def test_what_could_not_be_read_comes_before_what_was_skipped():
    d = diagnose(as_history([{"step": i, "kl": 1e-9, "avg_return": 1} for i in range(30)]))
    for text in (as_markdown(d), as_html(d)):
        places = [text.index(x) for x in ("certainty", "Names that are not known", "How names were read",
                                          "Checks that were skipped", "What these columns hold")]
        assert places == sorted(places) and "--names reward=avg_return" in text
    assert "<details><summary>Checks that were skipped" in as_html(d)
    assert "1 columns" not in as_markdown(d) + as_html(d)

@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_is_no_log(device, capsys):
    assert main([device]) == 2
    said = capsys.readouterr().err
    assert f"{device} is a device or a pipe" in said and said.count("\n") == 1

def test_the_command_runs_as_a_module(tmp_path):
    done = module(DATA / "scratch_metrics.jsonl", cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and "No alarm." in done.stdout and not done.stderr

def test_rows_of_the_default_run_keep_their_names():
    rows = read_metrics(DATA / "tiny_metrics.jsonl")
    assert as_history(rows).unknown == []

# What attackers sent

def words(sampler, loss, tokens=1000, positions=500, seed=11):
    "The numbers of a first step over a vocabulary: scores of a long tail, sampled and scored at two temperatures."
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((positions, tokens))*np.exp(.5*rng.standard_normal((positions, 1)))*2.2
    numbers = numbers_of((normalised(scores/sampler), normalised(scores/loss)))
    return dict(clip_region=numbers.clip, approx_kl=numbers.kl, mean_ratio=numbers.mean_ratio, entropy=numbers.entropy)

@pytest.mark.parametrize("sampler", [.7, 1.3, 1.8])
def test_a_temperature_that_the_settings_name_is_not_held_against_a_temperature(sampler):
    "Words have longer tails than made-up moves, so the size that fits is off: noise came first then, in 27 of 27 runs."
    rows = [dict(step=i, **words(sampler, 1., seed=11 + i)) for i in range(4)]
    d = diagnose(from_rows(rows, dict(num_iterations=1, temperature=sampler)))
    assert d.findings[0].name == "two_temperatures"

def test_where_two_sides_fit_as_well_both_are_named():
    made = numbers_of(two_temperatures(typical_scores(3.9), 1.5))
    rows = [dict(step=i, approx_kl=made.kl, entropy=made.entropy) for i in range(4)]
    top = diagnose(from_rows(rows, dict(num_iterations=1))).findings[0]
    assert top.name == "two_temperatures"
    assert "the loss is hotter" in top.says and ", or as well the loss is colder" in top.says

@pytest.mark.parametrize("entropy", [[0.]*200, [-.01*i for i in range(200)], [-1.]*200, [1e-5]*200])
def test_an_entropy_that_is_none_is_no_collapse(entropy):
    rows = [dict(step=i, entropy=x, **{"train/avg_reward": .01*(i % 7)}) for i, x in enumerate(entropy)]
    assert not {"entropy_collapse", "slow_collapse"} & {f.name for f in diagnose(from_rows(rows)).findings}

def test_a_policy_that_has_learned_all_that_there_was_may_be_certain():
    rng = np.random.default_rng(0)
    t = np.minimum(np.arange(300)/150, 1)
    columns = {"train/avg_reward": np.clip(.2 + .76*t + .01*rng.standard_normal(300), 0, 1), "entropy": .6 - .5*t}
    rows = [dict(step=i, **{k: float(v[i]) for k, v in columns.items()}) for i in range(300)]
    assert not diagnose(from_rows(rows)).alarms
    poor = [r | {"train/avg_reward": r["train/avg_reward"]/2} for r in rows]
    assert "entropy_collapse" in {f.name for f in diagnose(from_rows(poor)).alarms}

def test_no_reference_policy_is_no_rate_that_is_too_low():
    rows = [dict(step=i, kl_reference=0., entropy=2., **{"train/avg_reward": .01*i}) for i in range(60)]
    assert not diagnose(from_rows(rows)).alarms

def finite_but(column, bad, n=60):
    "A sound run but for some steps of a column."
    return [dict(step=i, entropy=2., loss=.1, grad_norm=1., approx_kl=.01) | ({column: bad[i]} if i in bad else {})
            for i in range(n)]

def test_what_was_not_logged_in_every_step_is_no_overflow():
    nan, inf = math.nan, math.inf
    for bad in ({0: nan}, {i: nan for i in range(60) if i % 10}):
        assert "not_a_number" not in {f.name for f in diagnose(from_rows(finite_but("approx_kl", bad))).findings}
    scaled, = (f for f in diagnose(from_rows(finite_but("grad_norm", {10: inf}))).findings if f.name == "not_a_number")
    assert not scaled.alarms and "loss scaler" in scaled.says
    for bad in ({i: nan for i in range(40, 60)}, {59: inf}):
        assert "not_a_number" in {f.name for f in diagnose(from_rows(finite_but("grad_norm", bad))).alarms}

@pytest.mark.parametrize("every", [2, 4, 8])
def test_games_of_earlier_weights_are_seen_by_a_kl_too(every):
    rows = [dict(step=i, approx_kl=.02*(i % every), clip_region=.05*(i % every), entropy=2.) for i in range(64)]
    for config in (dict(num_iterations=1), {}):
        assert diagnose(from_rows(rows, config)).findings[0].name == "stale_policy"
    warm = [dict(step=i, approx_kl=0. if i < 5 else .02, entropy=2.) for i in range(64)]
    assert "stale_policy" not in {f.name for f in diagnose(from_rows(warm)).findings}

def test_engines_that_agree_hide_no_clip():
    config = dict(num_iterations=1)
    for gap in (1e-3, 1e-2):
        rows = [dict(step=i, clip_region=.2, logp_gap_mean=gap, is_ratio_mean=1., entropy=1.5) for i in range(40)]
        said = diagnose(from_rows(rows, config))
        assert said.alarms and "usual_gap" not in {f.name for f in said.findings}
    sound = diagnose(from_rows([r | dict(clip_region=0.) for r in rows], config))
    assert "usual_gap" in {f.name for f in sound.findings} and not sound.alarms

def test_an_entropy_beyond_all_reason_is_no_traceback():
    for column in ([1e18]*5 + [.1]*40, [.1]*5 + [1e18]*40):
        diagnose(from_rows([dict(step=i, entropy=x, **{"train/avg_reward": .1}) for i, x in enumerate(column)]))

def two_programs(column, first, last, steps=60, **others):
    "A run whose sampler and trainer go from one gap to another, and that learns nothing else wrong."
    rng = np.random.default_rng(5)
    return from_rows([dict(step=i, **{column: (first + (last - first)*i/(steps - 1))*rng.uniform(.9, 1.1)},
                           grad_norm=rng.uniform(.9, 1.1), entropy=1.5, **others) for i in range(steps)])

@pytest.mark.parametrize("column, first, last", [
    ("kl_engines", .001, .2), ("logp_gap_mean", .01, .3), ("prob_gap_mean", .004, .08), ("prob_gap_mean", .09, .1)])
def test_programs_that_are_two_policies_are_no_matter_of_the_learning_rate(column, first, last):
    d = diagnose(two_programs(column, first, last))
    assert d.alarms[0].name == "engines_apart", d.names()
    assert not {"lr_too_high", "divergence"} & set(d.names())
    assert "A lower learning rate changes nothing" in d.alarms[0].change

@pytest.mark.parametrize("column, first, last", [
    ("kl_engines", .001, .02), ("logp_gap_mean", .06, .08), ("logp_gap_mean", .01, .05), ("prob_gap_mean", .01, .03)])
def test_programs_that_round_differently_are_not_held_against_a_run(column, first, last):
    assert "engines_apart" not in diagnose(two_programs(column, first, last)).names()

def sampled_ratios(cap, noise=.5, seed=11):
    "What TRL logs of two programs whose scores differ by noise, importance ratios cut off at `cap`."
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((200, 300))*np.exp(.5*rng.standard_normal((200, 1)))*2.2
    sampler, trainer = normalised(scores), normalised(scores + noise*rng.standard_normal(scores.shape))
    taken = (rng.random((200, 40, 1)) > np.exp(sampler).cumsum(1)[:, None]).sum(2).clip(max=299)
    gap = np.take_along_axis(trainer - sampler, taken, 1)
    ratio = np.minimum(np.exp(gap), cap)
    return dict(logp_gap_mean=abs(gap).mean(), is_ratio_mean=ratio.mean(), is_ratio_max=ratio.max(), entropy=3.5)

def test_importance_ratios_that_were_cut_off_do_not_change_the_cause():
    free, capped = ([dict(step=i, **sampled_ratios(cap, seed=11 + i)) for i in range(4)] for cap in (1e9, 2.))
    assert capped[0]["is_ratio_mean"] < free[0]["is_ratio_mean"] - .01
    first, second = (diagnose(from_rows(rows)).findings[0] for rows in (free, capped))
    assert first.name == second.name and abs(first.evidence["size"] - second.evidence["size"]) < .05
    assert "mean ratio" in first.says and "mean ratio" not in second.says
