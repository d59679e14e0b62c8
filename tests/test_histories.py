"Logs of other trainers: what their names mean, what is said of those that mean nothing, and which file is read."
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from grpo_chess.doctor import as_html, as_markdown, diagnose, main
from grpo_chess.files import row_text
from grpo_chess.histories import HistoryError, as_history, near, read_history, resolve
from grpo_chess.history import from_rows
from grpo_chess.panel import FOREIGN
from grpo_chess.tracking import wait_for_end

DATA = Path(__file__).resolve().parent.parent / "nbs/data"

def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

def jsonl(rows): return "\n".join(json.dumps(row) for row in rows)

def steps_of(history, name): return history.columns[name][0].tolist()

# one run, two ways

STATE = [{"step": 10*(i+1), "reward": .1*i, "reward_std": .2, "kl": .01*i} for i in range(40)]
SENT = [{"_step": i, "_runtime": i, "train/global_step": 10*(i+1), "train/reward": .1*i, "train/reward_std": .2,
         "train/kl": .01*i} for i in range(40)]          # as W&B has it of the same run

def test_a_trl_run_is_the_same_history_from_its_file_and_from_wandb():
    file, sent = as_history(STATE, name="a"), as_history(SENT, name="b")
    assert set(file.columns) == set(sent.columns) == {"train/avg_reward", "reward_spread", "kl_reference"}
    for name in file.columns:
        assert [x.tolist() for x in file.columns[name]] == [x.tolist() for x in sent.columns[name]]
    assert sent.last_step == 400 and sent.unknown == []

def test_a_log_of_this_project_keeps_its_own_meaning_of_a_name():
    own = as_history([{"step": 0, "train/avg_reward": .1, "train/reward_std": .3, "reward_std_within": .2}])
    assert own.values("train/reward_std") == [.3] and own.values("reward_spread") == [.2]
    twice = as_history([{"_step": 0, "step": 7, "train/avg_reward": .1, "reward": .1, "train/reward_std": .3,
                         "reward_spread": .2, "reward_std": .2}])          # what W&B has of a run of this trainer
    assert twice.values("train/reward_std") == [.3] and twice.values("reward_spread") == [.2] and twice.last_step == 7

def test_a_checksum_that_looks_like_a_number_is_no_column(tmp_path):
    "Of 400 rows some have a checksum without a letter, or with one `e` between digits."
    (tmp_path/"metrics.jsonl").write_text("".join(row_text({"step": i, "entropy": 1. + i}) for i in range(400)))
    history = read_history(tmp_path/"metrics.jsonl")
    assert history.unknown == [] and len(history.values("entropy")) == 400

def test_a_row_without_a_step_belongs_to_the_step_before_it():
    history = as_history([{"train/global_step": 10, "loss": 1.}, {"eval_accuracy": .5},
                          {"train/global_step": 20, "loss": .5}])
    assert steps_of(history, "eval_score") == [10] and steps_of(history, "loss") == [10, 20]
    odd = as_history([{"step": "nan", "entropy": 1.}, {"step": 5, "entropy": 1.}, {"step": "inf", "entropy": 1.}])
    assert steps_of(odd, "entropy") == [0, 5]

def test_a_number_that_no_float_holds_or_whose_square_is_none_is_infinite(tmp_path):
    "Beyond 1e100 nothing is measured; an integer of JSON may have any length."
    big = [10**400, -10**400, 1e308, -1e308, "1e308", "9"*400, 1e100, math.nan]
    want = [math.inf, -math.inf, math.inf, -math.inf, math.inf, math.inf, 1e100, math.nan]
    rows = [{"step": i, "reward": x, "entropy": 1.} for i, x in enumerate(big)] + [{"step": 10**400, "entropy": 1.}]
    history = read_history(written(tmp_path / "x.jsonl", jsonl(rows)))
    np.testing.assert_array_equal(history.columns["train/avg_reward"][1], want)
    assert history.last_step == 7 and as_markdown(diagnose(history))
    direct = from_rows([dict(step=i, x=x) for i, x in enumerate(big[:4])])
    np.testing.assert_array_equal(direct.columns["x"][1], want[:4])

def test_a_log_with_checksums_is_refused_where_a_line_was_altered(tmp_path, capsys):
    "Other people's logs have none, and are read as they are."
    lines = [row_text({"step": i, "entropy": 1. + i, "kl_step": 9.}) for i in range(5)]
    log = tmp_path / "metrics.jsonl"
    for k, line in {2: lines[2].replace("9.0", "0.1"), 4: lines[4].replace("9.0", "0.1"), 1: '{"step": 1}\n'}.items():
        written(log, "".join([*lines[:k], line, *lines[k+1:], lines[0]*(k == 4)]))
        for source in (log, tmp_path):
            assert main([str(source)]) == 2
            said = capsys.readouterr().err
            assert f"metrics.jsonl, line {k+1}: not as it was written" in said and said.count("\n") == 1
    for last in (lines[4][:30], lines[4].replace("9.0", "0.1"), "\n"):       # torn: as read_metrics takes it
        written(log, "".join([*lines[:4], last]))
        assert read_history(tmp_path).last_step == 3 and read_history(log).unknown == []
    foreign = jsonl([{"step": 0, "entropy": 1., "note": ", crc"}, {"step": 1, "entropy": 2.}])
    assert read_history(written(log, foreign)).last_step == 1

# probabilities and their logarithms

def test_a_gap_of_probabilities_is_not_read_as_one_of_logarithms():
    rows = [{"training/global_step": i, "training/rollout_probs_diff_mean": .02, "training/rollout_probs_diff_max": .4,
             "actor/entropy": .5} for i in range(30)]
    history = as_history(rows)
    assert "prob_gap_mean" in history and "prob_gap_max" in history and "logp_gap_mean" not in history
    assert "not of their logarithms" in FOREIGN["prob_gap_mean"] and not diagnose(history).alarms
    assert resolve("sampling/sampling_logp_difference/mean")[0] == "logp_gap_mean"

# names

def test_capitals_and_spaces_do_not_hide_a_name():
    history = as_history([{"Step": 3, "Entropy": 2., "Loss": 1., "Reward": .5, "Clip Fraction": .1, "Epoch": 1}])
    assert set(history.columns) == {"entropy", "loss", "train/avg_reward", "clip_region"}
    assert steps_of(history, "loss") == [3] and history.unknown == []

def test_an_unknown_name_has_a_neighbour_and_a_way_out(tmp_path, capsys):
    rows = ({"approx_kl_v2": .1, "avg_return": i, "policy_ent": 2.} for i in range(9))
    log = written(tmp_path / "x.jsonl", jsonl(rows))
    assert [near(x) for x in ("approx_kl_v2", "avg_return", "policy_ent", "zzz")] == [
        "approx_kl", "reward", "entropy", ""]
    assert main([str(log)]) == 2
    said = capsys.readouterr().err
    assert "--names approx_kl=approx_kl_v2,reward=avg_return,entropy=policy_ent" in said and said.count("\n") == 1
    names = "reward=avg_return, entropy=policy_ent"
    for argv in ([str(log), "--names", names], [str(log), f"--names={names}"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "`policy_ent` as entropy" in out and "`avg_return` as train/avg_reward" in out
        assert "approx_kl=approx_kl_v2" in out.split("## Names that are not known")[1].split("##")[0]

def test_names_that_cannot_be_meant_are_refused_in_one_line(tmp_path, capsys):
    log = written(tmp_path / "x.jsonl", jsonl([{"avg_return": 1}]))
    for names, told in {"avg_return": "NAME=NAME_IN_THE_LOG", "rewrd=avg_return": "'reward'", "entropy=gone": "gone",
                        "zzz=avg_return": "entropy", "=x": "NAME=", "reward=": "NAME="}.items():
        assert main([str(log), "--names", names]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1, said

def test_a_name_that_is_given_goes_before_one_that_is_found():
    history = as_history([{"entropy": 1., "H": 2.}], names={"entropy": "H"})
    assert history.values("entropy") == [2.] and history.logged == {"entropy": "H"} and not history.unknown

# tables

TABLES = dict(semicolon="step;Entropy;reward\n0;2.5;0.1\n1;2.25;\n",
              tab="step\tentropy\treward\n0\t2.5\t0.1\n1\t2.25\t\n",
              comma="step;entropy;reward\n0;2,5;0,1\n1;2,25;\n", mark="\ufeffstep,entropy,reward\n0,2.5,.1\n1,2.25,\n")

@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_table_is_read_whatever_parts_its_columns(text, tmp_path):
    for name in ("x.csv", "x.tsv"):
        history = read_history(written(tmp_path / name, text))
        assert history.values("entropy").tolist() == [2.5, 2.25] and history.values("train/avg_reward").tolist() == [.1]
        assert history.unknown == [] and not history.counted

def test_tensorboard_is_refused_with_a_way_to_export(tmp_path):
    event = tmp_path / "logs/run1/events.out.tfevents.17.host"
    event.parent.mkdir(parents=True)
    event.write_bytes(b"\x18\x00\x00\x00\x00\x00\x00\x00\xa3\x7f")
    for source in (event, event.parent, tmp_path / "logs"):
        with pytest.raises(HistoryError, match="tbparse.*csv"): read_history(source)

def test_steps_that_were_counted_are_said_to_be_counted(tmp_path):
    rows = "".join(f"{i}000,{i+1}000,-.1\n" for i in range(9))
    log = written(tmp_path / "w.csv", "step_from,step_to,avg_reward\n" + rows)
    history = read_history(log)
    assert history.counted and "no step column: rows are counted" in as_markdown(diagnose(history))
    assert "no step column: rows are counted" in as_html(diagnose(history))
    told = read_history(log, names={"step": "step_to"})
    assert steps_of(told, "train/avg_reward")[0] == 1000 and not told.counted
    assert "no step column" not in as_markdown(diagnose(told)) and not from_rows([{"step": 0, "loss": 1.}]).counted

# several rows of a step, and several runs

def test_of_a_step_that_was_logged_twice_the_last_value_counts_and_that_is_said(tmp_path):
    "A run that was resumed repeats steps. An evaluation logs a step again too, in columns of its own."
    rows = [*(dict(step=i, reward=0., entropy=1.) for i in range(8)), *(dict(step=i, reward=1.) for i in range(5, 9))]
    history = read_history(written(tmp_path / "x.jsonl", jsonl(rows)))
    assert steps_of(history, "train/avg_reward") == [*range(9)] and steps_of(history, "entropy") == [*range(8)]
    assert history.values("train/avg_reward").tolist() == [0]*5 + [1]*4 and history.repeated == 3
    for text in (as_markdown(diagnose(history)), as_html(diagnose(history))):
        assert "3 steps were logged more than once: the last value counts" in text
    trl = as_history([{"step": 5, "reward": .1}, {"step": 5, "eval_reward": .2}])
    assert trl.repeated == 0 and "more than once" not in as_markdown(diagnose(trl))

@pytest.mark.parametrize("label", ["seed", "run", "Run ID", "name", "arm"])
def test_runs_below_each_other_in_one_table_are_not_mixed(label, tmp_path, capsys):
    rows = [(run, i, run + .01*i) for run in (3, 4) for i in range(9)]
    text = f"{label},step,reward\n" + "".join("{},{},{}\n".format(*row) for row in rows)
    lines = jsonl([{label: run, "step": i, "reward": x} for run, i, x in rows])
    for log in (written(tmp_path / "x.csv", text), written(tmp_path / "x.jsonl", lines)):
        assert main([str(log)]) == 2
        said = capsys.readouterr().err
        assert f"holds 2 runs (3, 4): name one as {log.name}#3" in said and said.count("\n") == 1
        assert read_history(f"{log}#4").values("train/avg_reward")[0] == 4 and read_history(f"{log}#3").repeated == 0
        with pytest.raises(HistoryError, match="2 runs"): read_history(f"{log}#5")

def test_what_parts_runs_may_be_several_settings_or_no_run_at_all(tmp_path):
    with pytest.raises(HistoryError, match=r"12 runs .*mismatch.csv#0.0001:1.3:0"): read_history(DATA / "mismatch.csv")
    one = read_history(f"{DATA / 'mismatch.csv'}#0.0001:1.3:0")
    assert one.repeated == 0 and one.values("entropy")[0] == 2.8
    names = written(tmp_path / "n.csv", "name,T,reward\na/b,1,2\nc#d,1,3\n")
    for run, reward in {"a/b": 2, "c#d": 3}.items():
        assert read_history(f"{names}#{run}", {"step": "T"}).values("train/avg_reward") == [reward]
    later = written(tmp_path / "l.csv", "run,step,reward\na,1,2\nb,2,3\n")       # sessions of one run
    assert steps_of(read_history(later), "train/avg_reward") == [1, 2]

def test_steps_may_have_their_thousands_apart(tmp_path):
    rows = "".join(f'"{100*i:,}",{i}\n' for i in range(30))
    history = read_history(written(tmp_path / "x.csv", "step,reward\n" + rows))
    assert steps_of(history, "train/avg_reward") == [100*i for i in range(30)]
    assert "reward_rises" in diagnose(history).names()

# which file

def at(path, seconds):
    os.utime(path, (seconds, seconds))
    return path

def test_the_file_that_was_read_is_named_and_the_others_are_listed(tmp_path):
    for k, name in enumerate(("old.jsonl", "new.jsonl")):
        at(written(tmp_path / name, jsonl([{"step": k, "loss": k}])), k)
    history = read_history(tmp_path)
    assert history.source == "new.jsonl" and history.others == ["old.jsonl"] and history.values("loss") == [1]
    for text in (as_markdown(diagnose(history)), as_html(diagnose(history))):
        assert "Read from" in text and "new.jsonl" in text and "not read, and there too" in text and "old.jsonl" in text
    alone = read_history(tmp_path / "old.jsonl")
    assert alone.source == "old.jsonl" and "not read" not in as_markdown(diagnose(alone))
    assert str(tmp_path) not in as_markdown(diagnose(alone))

def test_a_run_folder_with_wandb_in_it_is_read(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true").items(): monkeypatch.setenv(name, value)
    run = wandb.init(project="x", mode="offline", dir=tmp_path)
    for i in range(3): run.log({"train/reward": i, "train/global_step": 10*i})
    run.finish()
    wait_for_end(next((tmp_path / "wandb").glob("offline-run-*")), 60)
    history = read_history(tmp_path)
    assert history.last_step == 20 and history.source.startswith("wandb/") and not history.others

def test_one_of_several_runs_in_a_file_is_named_behind_it(tmp_path):
    six = DATA / "histories.json"
    with pytest.raises(HistoryError, match=r"6 runs \(A, B.*histories.json#A"): read_history(six)
    with pytest.raises(HistoryError, match="6 runs"): read_history(f"{six}#Z")
    run = read_history(f"{six}#B")
    assert run.name == "histories#B" and len(run.values("entropy")) == 100 and run.config
    two = written(tmp_path / "two.csv", "Step,a - entropy,b - entropy,b - entropy__MIN\n0,1,2,0\n")
    assert read_history(f"{two}#b").values("entropy") == [2] and read_history(f"{two}#a").values("entropy") == [1]
    with pytest.raises(HistoryError, match="two.csv#a"): read_history(two)
    one = written(tmp_path / "one.jsonl", '{"entropy": 1}')
    with pytest.raises(HistoryError, match="one run"): read_history(f"{one}#a")
    assert read_history(written(tmp_path / "a#b.jsonl", '{"entropy": 1}')).values("entropy") == [1]

def test_runs_of_an_export_may_have_dashes_in_their_names(tmp_path):
    one = written(tmp_path / "one.csv", "Step,lr - 1e-6 - train/reward,lr - 1e-6 - train/entropy\n0,.1,2\n")
    assert read_history(one).values("train/avg_reward") == [.1] and read_history(one).values("entropy") == [2]
    two = written(tmp_path / "two.csv", "Step,grpo - lr1 - entropy,grpo - lr2 - entropy\n0,1,2\n")
    with pytest.raises(HistoryError, match=r"2 runs \(grpo - lr1, grpo - lr2\)"): read_history(two)
    assert read_history(f"{two}#grpo - lr2").values("entropy") == [2]

def test_an_empty_log_is_passed_over_and_the_last_checkpoint_counts(tmp_path):
    written(tmp_path / "metrics.jsonl", "")
    for step, seconds in ((50, 9), (100, 5)):
        state = json.dumps({"log_history": [{"step": step, "loss": 1.}]})
        at(written(tmp_path / f"checkpoint-{step}/trainer_state.json", state), seconds)
    assert read_history(tmp_path).source == "checkpoint-100/trainer_state.json"
    (tmp_path / "alone").mkdir()
    with pytest.raises(HistoryError, match="no row"): read_history(written(tmp_path / "alone/metrics.jsonl", "").parent)

def test_a_folder_of_runs_names_them_and_no_name_is_no_folder(tmp_path, monkeypatch, capsys):
    for name in "ab": written(tmp_path / f"runs/{name}/metrics.jsonl", '{"step": 0, "loss": 1}')
    told = r"holds 2 runs \(a, b\): name one as .*runs/a$"
    with pytest.raises(HistoryError, match=told): read_history(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs/a")
    assert main([""]) == 2 and "name a run" in capsys.readouterr().err

def test_what_was_given_and_is_not_there_is_said_and_what_holds_text_is_not_read(tmp_path, capsys):
    log = written(tmp_path / "x.csv", "step,avg_reward,policy_entropy,reward\n" + "1,.1,high,.1\n"*3)
    assert main([str(log), "--names", "reward=nope"]) == 0
    said = capsys.readouterr().out
    assert "`nope` is not in it" in said and "policy_entropy" not in said
    assert main([str(log), "--names", "reward=avg_reward", "--format", "html"]) == 0
    assert "is not in it" not in capsys.readouterr().out

def test_of_many_unknown_names_some_are_shown(tmp_path):
    history = read_history(written(tmp_path / "x.jsonl", json.dumps({"loss": 1} | {f"x{i}": i for i in range(2000)})))
    told = as_markdown(diagnose(history))
    assert len(told) < 6000 and "and 1,976 more" in told

def test_a_share_in_per_cent_is_a_share():
    "A clip fraction of 12 was called two temperatures, with a certainty of 0.01."
    rows = [dict(step=i, clip_fraction=12 + i % 3, entropy=2.) for i in range(20)]
    history = as_history(rows)
    assert history.values("clip_region").max() == pytest.approx(.14) and history.per_cent == ["clip_fraction"]
    assert "`clip_fraction` was read as per cent" in as_markdown(diagnose(history))
    same = as_history([r | dict(clip_fraction=r["clip_fraction"]/100) for r in rows])
    assert not same.per_cent and diagnose(same).names() == diagnose(history).names()

def test_a_device_is_no_log():
    with pytest.raises(HistoryError, match="neither a file nor a folder"): read_history("/dev/zero")
