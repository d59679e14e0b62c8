"Labels, targets, other people's data and supervised training: what the notebook shows on one case, on many; and every way in which a file can be wrong."
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chess
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import grpo_chess.pretrain as pretrain
from grpo_chess.arena import ArenaError
from grpo_chess.board import ACTIONS, action_to_move, encode, legal_actions, position_key, tokens
from grpo_chess.engine import MATE, EngineConfig, EngineError, EnginePool
from grpo_chess.model import MODELS, ChessTransformer, MoveDist, Policy, WeightsError, load_model, pretrained, save_model
from grpo_chess.pretrain import (UNKNOWN, Batch, ConvertConfig, EvaluateConfig, LabelConfig, LabelError, Pretrainer, Stream, TrainConfig, UsageError, best_targets,
                                 convert, cross_entropy, evaluate, held_out, join, label, make_labels, make_shard, measure, measure_labels, read_manifest, read_shard,
                                 resume_run, soft_targets, to_batch, train, turn_round, write_shard)
from grpo_chess.reward import MOVE_NAMES, arrange, win_probability
from grpo_chess.settings import known_keys
from grpo_chess.trainer import CheckpointError, read_metrics

TOP = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
FIELDS = ("tokens", "offset", "actions", "scores")
same = lambda a, b: all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)

def cli(*argv, **kw): return subprocess.run([sys.executable, "-m", "grpo_chess.pretrain", *map(str, argv)], env=ENV, capture_output=True, text=True, timeout=300, **kw)

def played(n, seed=0, plies=80):
    "Boards reached by random play, none finished."
    rng, out = random.Random(seed), []
    while len(out) < n:
        b = chess.Board()
        for _ in range(rng.randrange(plies)):
            if b.is_game_over(): break
            b.push(rng.choice(list(b.legal_moves)))
        if not b.is_game_over(): out.append(b)
    return out

def made_up(n, seed=0):
    "Labels without an engine: captures are good, and the rest is chance."
    boards, rng = played(n, seed), np.random.default_rng(seed)
    legal = [legal_actions(b) for b in boards]
    value = lambda b, a: int(rng.integers(-50, 50)) + 300*b.is_capture(action_to_move(a, b.turn))
    return make_labels(tokens(boards), legal, [[value(b, a) for a in l] for b, l in zip(boards, legal)])

def folder_of(path, shards, rows=64, seed=0):
    "A folder of made-up labels."
    path.mkdir()
    for k in range(shards): write_shard(path/f"shard-{k:05}.parquet", made_up(rows, seed + k), dict(seed=seed))
    pretrain.write_manifest(path, dict(seed=seed, action_space=pretrain.ACTION_SPACE))
    return path

@pytest.fixture(scope="module")
def pool():
    with EnginePool(EngineConfig(processes=1)) as p: yield p

@pytest.fixture
def labels(tmp_path): return folder_of(tmp_path/"labels", 4)

TINY = dict(batch=32, warmup=1, precision="32-true", accelerator="cpu", eval_positions=40)
def config(labels, tmp_path, **kw): return TrainConfig(**(TINY | dict(labels=str(labels), out=str(tmp_path/"net.safetensors")) | kw))

# Labels

def test_every_legal_move_has_the_value_that_the_engine_gives_it(pool):
    shard = make_shard(pool, LabelConfig(rows=300, games=32, seed=3), 0)
    half = pretrain.SelfPlay(LabelConfig(rows=300, games=32, seed=3), np.random.Generator(np.random.PCG64([3, 0])))      # the games with which the shard begins
    boards = {tokens([b])[0].tobytes(): b for b, _, _ in half.games}
    found = [(i, boards[t.tobytes()]) for i, t in enumerate(shard.tokens) if t.tobytes() in boards]
    assert len(found) >= 16
    for i, b in found:
        answer = pool.evaluate_moves([position_key(b)], depth=1)[0]
        at = slice(shard.offset[i], shard.offset[i + 1])
        assert shard.actions[at].tolist() == legal_actions(b)
        assert shard.scores[at].tolist() == [answer[MOVE_NAMES[b.turn][a]] for a in shard.actions[at]]

def test_a_shard_depends_on_seed_and_number_alone(pool):
    cfg = LabelConfig(rows=150, games=32, seed=1)
    a, b = make_shard(pool, cfg, 1), make_shard(pool, cfg, 2)
    assert same(make_shard(pool, dataclasses.replace(cfg, positions=9, part="1/7", out="elsewhere"), 1), a)
    assert not same(a, b) and not same(a, make_shard(pool, dataclasses.replace(cfg, seed=2), 1))
    with EnginePool(EngineConfig(processes=3)) as other: assert same(make_shard(other, cfg, 1), a)

def test_killed_labelling_goes_on_to_the_same_bytes(tmp_path):
    args = ["label", "--positions", 500, "--rows", 100, "--games", 16, "--seed", 4, "--engine.processes", 1]
    assert cli(*args, "--out", tmp_path/"whole").returncode == 0
    broken = subprocess.Popen([sys.executable, "-m", "grpo_chess.pretrain", *map(str, args), "--out", str(tmp_path/"broken")], env=ENV, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while time.time() < until and not list((tmp_path/"broken").glob("shard-*.parquet")): time.sleep(.02)
    broken.send_signal(signal.SIGKILL); broken.wait()
    (tmp_path/"broken"/"shard-00004.parquet.tmp").write_bytes(b"half of it")
    assert cli(*args, "--out", tmp_path/"broken").returncode == 0
    files = lambda name: {p.name: p.read_bytes() for p in (tmp_path/name).iterdir()}
    assert files("whole") == files("broken") and len(files("whole")) == 6

def test_two_machines_share_the_work(tmp_path):
    cfg = LabelConfig(positions=400, rows=100, games=32, out=str(tmp_path/"one"), engine=EngineConfig(processes=1))
    label(cfg, quiet=True)
    for k in range(2): label(dataclasses.replace(cfg, out=str(tmp_path/f"m{k}"), part=f"{k}/2"), quiet=True)
    assert [s["name"] for s in read_manifest(tmp_path/"m1")["shards"]] == ["shard-00001.parquet", "shard-00003.parquet"]
    for p in (tmp_path/"m1").glob("*.parquet"): p.rename(tmp_path/"m0"/p.name)
    manifest = label(dataclasses.replace(cfg, out=str(tmp_path/"m0")), quiet=True)     # adopts them, and makes nothing
    assert manifest == read_manifest(tmp_path/"one") and manifest["rows_in_all"] == 400
    with pytest.raises(LabelError, match="seed = 0; here seed = 1"): label(dataclasses.replace(cfg, out=str(tmp_path/"m0"), seed=1), quiet=True)

def test_a_missing_or_strange_answer_stops_the_labelling():
    board = chess.Board(); legal = legal_actions(board); answer = {m.uci(): 0 for m in board.legal_moves}
    assert arrange(answer, legal, board) == [0]*20
    for wrong in ({k: v for k, v in answer.items() if k != "e2e4"}, {("e2e5" if k == "e2e4" else k): v for k, v in answer.items()}):
        with pytest.raises(EngineError, match="e2e4"): arrange(wrong, legal, board)

def test_moves_are_drawn_from_the_mixture():
    rng, scores = np.random.default_rng(0), np.array([[300, 250, -100, 20, 7777]])
    win = win_probability(scores[0, :4]).astype(float)
    for tau, uniform in ((.02, 0.), (.02, .3), (.1, .15)):
        p = np.exp(win/tau); p = (1 - uniform)*p/p.sum() + uniform/4
        n = 40_000
        drawn = pretrain.draw_moves(np.repeat(scores, n, 0), np.full(n, 4), np.full(n, tau), uniform, rng.random(n))
        assert np.abs(np.bincount(drawn, minlength=5)/n - [*p, 0]).max() < 4*.5/math.sqrt(n)

# Shards

def test_shards_come_back_as_they_were(tmp_path):
    whole = made_up(50)
    soft = dataclasses.replace(whole, probs=np.concatenate([np.full(c, 1/c, np.float32) for c in np.diff(whole.offset)]))
    for name, x in (("a", whole), ("b", soft), ("one", whole.take(np.array([7])))):
        write_shard(tmp_path/name, x, dict(seed=1))
        back = read_shard(tmp_path/name)
        assert same(x, back) and (x.probs is None) == (back.probs is None)
    assert same(join([whole.take(np.arange(20)), whole.take(np.arange(20, 50))]), whole)
    with pytest.raises(LabelError, match="with and without"): join([whole, soft])

@pytest.mark.parametrize("cut", [1, 8, 100, .5, .99])
def test_a_shard_cut_short_is_refused_by_name(tmp_path, cut):
    write_shard(tmp_path/"x.parquet", made_up(40), {})
    data = (tmp_path/"x.parquet").read_bytes()
    (tmp_path/"x.parquet").write_bytes(data[:-cut] if cut >= 1 else data[:int(len(data)*(1 - cut))])
    with pytest.raises(LabelError, match="x.parquet is no whole Parquet file"): read_shard(tmp_path/"x.parquet")

def test_other_damage_is_refused_with_its_row(tmp_path, monkeypatch):
    good = made_up(40); at = int(good.offset[17])
    def refused(match, **change):
        write_shard(tmp_path/"x.parquet", dataclasses.replace(good, **change), {})
        with pytest.raises(LabelError, match=match): read_shard(tmp_path/"x.parquet")
    def changed(name, i, v): x = getattr(good, name).copy(); x[i] = v; return {name: x}
    refused("row 17: a move", **changed("actions", at, 1968))
    refused("row 17: a move", **changed("actions", at, -1))
    refused("row 17: a score", **changed("scores", at, 32001))
    refused("row 17: a token", **changed("tokens", (17, 3), 16))
    refused("row 17: no move with a score", **changed("scores", slice(at, int(good.offset[18])), UNKNOWN))
    probs = np.concatenate([np.full(c, 1/c, np.float32) for c in np.diff(good.offset)]); probs[at] += .1
    refused("row 17: probabilities", probs=probs)
    write_shard(tmp_path/"x.parquet", good, {})
    with pytest.raises(LabelError, match="has 40 rows; its manifest says 41"): read_shard(tmp_path/"x.parquet", 41)
    pq.write_table(pa.table(dict(a=[1])), tmp_path/"y.parquet")
    with pytest.raises(LabelError, match="y.parquet is not one of our"): read_shard(tmp_path/"y.parquet")
    monkeypatch.setattr(pretrain, "ACTION_SPACE", "another")
    with pytest.raises(LabelError, match="x.parquet is written in another action space"): read_shard(tmp_path/"x.parquet")
    (tmp_path/"manifest.json").write_text('{"shards": [], "action_space": "1"}')
    with pytest.raises(LabelError, match="manifest.json belongs to another"): read_manifest(tmp_path)

def test_bits_that_flip_do_not_pass(tmp_path):
    write_shard(tmp_path/"x.parquet", made_up(40), {})
    data = (tmp_path/"x.parquet").read_bytes(); good = read_shard(tmp_path/"x.parquet")
    for at in range(100, len(data) - 900, len(data)//25):
        flipped = bytearray(data); flipped[at] ^= 4
        (tmp_path/"y.parquet").write_bytes(flipped)
        try: assert same(read_shard(tmp_path/"y.parquet"), good)
        except LabelError as e: assert "y.parquet" in str(e)

# Targets and measures

def test_targets_of_three_moves_by_hand():
    win = torch.tensor([[.6, .6, .3, math.nan]])
    z = 2 + math.exp(-.3/.1)
    assert torch.allclose(soft_targets(win, .1), torch.tensor([[1/z, 1/z, math.exp(-3)/z, 0]]))
    assert best_targets(win).tolist() == [[.5, .5, 0, 0]]
    boards = [chess.Board("7k/8/8/8/8/8/8/K7 w - - 0 1")]
    scores = [[MATE - 3, UNKNOWN, 40]]
    labels = make_labels(tokens(boards), [legal_actions(boards[0])], scores)
    b = to_batch(labels, np.array([0]), tau=.2)
    assert b.win[0, 0] == 1 and b.win[0, 1].isnan() and b.target[0, 1] == 0
    assert abs(b.target[0, 2] - 1/(1 + math.exp((1 - win_probability(40))/.2))) < 1e-6
    assert to_batch(labels, np.array([0]), "best").target.tolist() == [[1, 0, 0]]

def test_measures_against_plain_python():
    labels, rng = made_up(60), torch.Generator().manual_seed(0)
    batch = to_batch(labels, np.arange(60))
    dist = MoveDist.from_logits(torch.randn(batch.legal.shape, generator=rng).masked_fill(batch.legal < 0, -torch.inf))
    m = measure(dist, batch)
    for i in range(60):
        at = slice(labels.offset[i], labels.offset[i + 1])
        win, p = win_probability(labels.scores[at]).astype(float), dist.probs[i, :at.stop - at.start].double().numpy()
        t = np.exp(win/.03); t /= t.sum()
        assert abs(m["loss"][i] + (t*np.log(p)).sum()) < 1e-4 and abs(m["regret"][i] - (p*(win.max() - win)).sum()) < 1e-5
        assert abs(m["entropy"][i] + (p*np.log(p)).sum()) < 1e-4 and abs(m["regret_greedy"][i] - (win.max() - win[p.argmax()])) < 1e-6
        assert m["accuracy"][i] == (win[p.argmax()] == win.max()) and m["top5"][i] == (win[np.argsort(-p)[:5]] == win.max()).any()

def test_padding_has_no_influence_on_loss_gradient_or_measures():
    torch.manual_seed(0)
    net, labels = ChessTransformer(MODELS["tiny"]), made_up(24)
    def grads(batch):
        net.zero_grad(); dist = Policy(net).dist(batch.tokens, batch.legal)
        cross_entropy(dist, batch.target).mean().backward()
        return measure(dist, batch), torch.cat([p.grad.flatten() for p in net.parameters()])
    batch = to_batch(labels, np.arange(24))
    pad = lambda x, v: torch.nn.functional.pad(x, (0, 30), value=v)
    wide = Batch(batch.tokens, pad(batch.legal, -1), pad(batch.win, math.nan), pad(batch.target, 0.))
    (m, g), (n, h) = grads(batch), grads(wide)
    assert torch.allclose(g, h, atol=1e-7) and torch.isfinite(h).all()
    assert all(torch.allclose(m[k], n[k], atol=1e-6) for k in m)

def test_where_a_move_has_no_value_there_is_no_regret():
    labels = made_up(10)
    labels.scores[labels.offset[4]] = UNKNOWN
    m = measure(Policy(ChessTransformer(MODELS["tiny"]).eval()).dist(*(torch.as_tensor(x) for x in labels.rows(np.arange(10))[:2])), to_batch(labels, np.arange(10)))
    assert m["regret"].isnan().nonzero().flatten().tolist() == [4] == m["regret_greedy"].isnan().nonzero().flatten().tolist()
    assert torch.isfinite(m["loss"]).all()
    assert math.isfinite(measure_labels(Policy(ChessTransformer(MODELS["tiny"]).eval()), labels)["regret"])

def test_the_mirror_is_python_chess_s():
    boards = [b for b in played(250, seed=5) if not b.castling_rights] + [chess.Board("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 2"), chess.Board("4k3/8/8/8/1pP5/8/8/4K3 b - c3 5 2")]
    assert len(boards) > 80 and any(b.has_legal_en_passant() for b in boards)
    def flip(b):
        m = b.transform(chess.flip_horizontal); m.turn, m.halfmove_clock = b.turn, b.halfmove_clock
        if b.ep_square is not None: m.ep_square = b.ep_square ^ 7
        return m
    (tok, legal), (tok2, legal2) = encode(boards), encode([flip(b) for b in boards])
    which = np.arange(len(boards)) % 2 == 0
    t, l = turn_round(tok, legal, which)
    assert (t == np.where(which[:, None], tok2, tok)).all() and (np.sort(l) == np.sort(np.where(which[:, None], legal2, legal))).all()
    castling = [b for b in played(100, seed=6, plies=12) if b.castling_rights]
    tok, legal = encode(castling)
    assert all((x == y).all() for x, y in zip(turn_round(tok, legal, np.ones(len(castling), bool)), (tok, legal)))

# The order of batches

def test_an_epoch_shows_every_position_once_and_resumes_anywhere(labels):
    for window in (64, 130, 10_000):
        def fresh(): return Stream(labels, 32, 7, 1, window)
        stream = fresh()
        got, states = [], []
        for _ in range(18): states.append(stream.state()); l, i = stream.next(); got.append(l.tokens[i])
        every = np.concatenate([pretrain.read_tokens(labels/n) for n in stream.rows])
        key = lambda x: sorted(t.tobytes() for t in x)
        for epoch in range(3): assert key(np.concatenate(got[6*epoch:6*epoch + 6])) == key(every)
        assert not (np.concatenate(got[:6]) == np.concatenate(got[6:12])).all()
        for k in (0, 1, 5, 6, 11):
            other = fresh(); other.load_state(states[k])
            for t in got[k:]: l, i = other.next(); assert (l.tokens[i] == t).all()

def test_new_shards_join_at_the_next_epoch(labels):
    stream = Stream(labels, 64, 0)
    stream.next()
    write_shard(labels/"shard-00009.parquet", made_up(64, 77), dict(seed=0)); pretrain.write_manifest(labels, dict(seed=0, action_space=pretrain.ACTION_SPACE))
    stream.next(); assert len(stream.rows) == 3 and stream.epoch == 0
    stream.next(); assert len(stream.rows) == 4 and stream.epoch == 1
    (labels/"shard-00002.parquet").unlink()
    with pytest.raises(LabelError, match="shard-00002.parquet"): [stream.next() for _ in range(4)]

def test_what_is_held_out_is_not_trained_on(labels):
    twin = read_shard(labels/"shard-00000.parquet").take(np.arange(30))
    write_shard(labels/"shard-00002.parquet", twin, dict(seed=0)); pretrain.write_manifest(labels, dict(seed=0, action_space=pretrain.ACTION_SPACE))
    stream = Stream(labels, 8, 0)
    held = held_out(labels, 1, 1000, [labels/n for n in stream.rows])
    train_on = {t.tobytes() for n in stream.rows for t in pretrain.read_tokens(labels/n)}
    assert 20 < len(held) <= 34 and not train_on & {t.tobytes() for t in held.tokens}
    assert len(held_out(labels, 1, 5)) == 5
    with pytest.raises(LabelError, match="also trained on"): held_out(labels, 1, 1000, [labels/"shard-00000.parquet"])

# Training

def weights(path): return torch.cat([p.flatten() for p in pretrain.load_model(path).parameters()])
def rows_of(path): return [{k: v for k, v in r.items() if k != "minutes"} for r in read_metrics(path)]

def test_a_run_stopped_by_a_signal_ends_like_one_that_was_not(labels, tmp_path, capsys):
    args = lambda out: list(map(str, ["train", "--labels", labels, "--out", tmp_path/out, "--steps", 24, "--batch", 8, "--eval_every", 8, "--eval_positions", 20, "--ema", .9, "--mirror", "true",
                                      "--precision", "32-true", "--accelerator", "cpu", "--warmup", 2]))
    assert pretrain.main(args("whole.safetensors")) == 0
    run = subprocess.Popen([sys.executable, "-m", "grpo_chess.pretrain", *args("broken.safetensors")], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in run.stdout:
        if line.startswith("step"): break
    run.send_signal(signal.SIGTERM)
    said = run.stdout.read(); assert run.wait() == 0 and "stopped by a signal" in said
    assert not (tmp_path/"broken.safetensors").exists()
    capsys.readouterr()
    assert pretrain.main(args("broken.safetensors")) == 0 and "going on after step" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path/"whole.safetensors"), weights(tmp_path/"broken.safetensors"))
    assert rows_of(tmp_path/"whole"/"metrics.jsonl") == rows_of(tmp_path/"broken"/"metrics.jsonl")
    assert pretrain.main(args("broken.safetensors")) == 0 and "\nstep" not in capsys.readouterr().out       # finished: nothing to do

def test_the_same_settings_give_the_same_weights_and_another_seed_does_not(labels, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(labels, tmp_path, out=str(tmp_path/f"{name}.safetensors"), steps=3, seed=seed), quiet=True)
        runs.append(weights(tmp_path/f"{name}.safetensors"))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

def test_micro_batches_change_nothing_but_rounding(labels, tmp_path):
    grads = []
    for micro in (32, 7):
        t = Pretrainer(config(labels, tmp_path, micro=micro, steps=2, grad_clip=0.)); t.optimizer.step = lambda *a, **k: None
        loss = t.step()["loss"]; grads.append((loss, torch.cat([p.grad.flatten() for p in t.model.parameters()])))
    assert abs(grads[0][0] - grads[1][0]) < 1e-5 and torch.allclose(grads[0][1], grads[1][1], atol=1e-6)

def test_it_learns_and_keeps_the_best(labels, tmp_path):
    cfg = config(labels, tmp_path, steps=45, eval_every=15, lr=3e-3)
    start = measure_labels(Policy(Pretrainer(cfg).model.eval()), read_shard(labels/"shard-00001.parquet"))
    train(cfg, quiet=True)
    after = measure_labels(Policy(pretrain.load_model(cfg.out)), read_shard(labels/"shard-00001.parquet"))
    assert after["loss"] < start["loss"] - .05
    rows = read_metrics(cfg.folder/"metrics.jsonl")
    best = min(rows, key=lambda r: r["regret_greedy"])
    from safetensors import safe_open
    with safe_open(cfg.out, "pt") as f: about = f.metadata()
    assert json.loads(about["measured"]) == best and json.loads(about["labels"])["seed"] == 0 and json.loads(about["trained"])["lr"] == 3e-3
    assert Path(cfg.out).stat().st_size < 1e6

def test_a_checkpoint_of_something_else_is_refused(labels, tmp_path):
    cfg = config(labels, tmp_path, steps=4, eval_every=2)
    train(cfg, quiet=True)
    folder = cfg.folder/"checkpoint"
    with pytest.raises(WeightsError, match=r"checkpoint.00000002.model.safetensors holds another shape"): train(dataclasses.replace(cfg, model="record", steps=6), quiet=True)
    with pytest.raises(UsageError, match="lr = 0.002 .here 0.1."): train(dataclasses.replace(cfg, lr=.1, steps=6), quiet=True)
    newest = folder/"00000004"/"state.pt"; newest.write_bytes(newest.read_bytes()[:500])
    t = Pretrainer(cfg); resume_run(t, folder); assert t.done == 2               # the one before it is whole
    older = folder/"00000002"/"state.pt"; older.write_bytes(b"")
    with pytest.raises(CheckpointError, match="00000002/state.pt cannot be read"): resume_run(Pretrainer(cfg), folder)
    save_model(ChessTransformer(MODELS["record"]), tmp_path/"big.safetensors")
    with pytest.raises(WeightsError, match="big.safetensors holds another shape"): Pretrainer(dataclasses.replace(cfg, init=str(tmp_path/"big.safetensors")))

def test_another_folder_can_be_held_out(labels, tmp_path):
    other = folder_of(tmp_path/"other", 1, seed=50)
    cfg = config(labels, tmp_path, steps=2, heldout=str(other))
    t = Pretrainer(cfg); assert len(t.stream.rows) == 4
    assert math.isfinite(train(cfg, quiet=True)["regret"])

# Other people's data

PGN = '[Event "?"]\n[WhiteElo "2000"]\n[BlackElo "1000"]\n[Result "0-1"]\n\n1. f3 e5 2. g4 Qh4# 0-1\n\n'
def converted(tmp_path, name="out", **kw):
    convert(ConvertConfig(**(dict(out=str(tmp_path/name)) | kw)), quiet=True)
    return [read_shard(tmp_path/name/s["name"], s["rows"]) for s in read_manifest(tmp_path/name)["shards"]]
def moves_of(l, i=0): return {ACTIONS[a]: x for a, x in zip(l.actions[l.offset[i]:l.offset[i + 1]], (l.probs if l.probs is not None else l.scores)[l.offset[i]:l.offset[i + 1]].tolist())}

def test_pgn_plain_and_compressed(tmp_path):
    (tmp_path/"g.pgn").write_text(PGN*3)
    with pa.CompressedOutputStream(str(tmp_path/"z.pgn.zst"), "zstd") as f: f.write((PGN*3).encode())
    a, = converted(tmp_path, "a", files=str(tmp_path/"g.pgn")); b, = converted(tmp_path, "b", files=str(tmp_path/"z.pgn.zst"))
    assert same(a, b) and (a.probs == b.probs).all() and len(a) == 12
    board = chess.Board(); board.push_uci("f2f3")
    assert (a.tokens[1] == tokens([board])[0]).all() and {m for m, p in moves_of(a, 1).items() if p} == {"e2e4"}       # e7e5, from Black's side
    white, = converted(tmp_path, "c", files=str(tmp_path/"g.pgn"), min_elo=1500); assert len(white) == 6
    late, = converted(tmp_path, "d", files=str(tmp_path/"g.pgn"), skip_plies=3); assert len(late) == 3
    shards = converted(tmp_path, "e", files=str(tmp_path/"*g.pgn"), rows=5, positions=11); assert [len(s) for s in shards] == [5, 5, 1]
    data = (tmp_path/"z.pgn.zst").read_bytes(); (tmp_path/"z.pgn.zst").write_bytes(data[:len(data)//2])
    with pytest.raises(LabelError, match="z.pgn.zst"): converted(tmp_path, "f", files=str(tmp_path/"z.pgn.zst"))
    assert not (tmp_path/"f"/"manifest.json").exists()

@pytest.mark.parametrize("text, match", [(PGN + PGN.replace("Qh4", "Qh5"), "line 14: illegal san"), (PGN + PGN.replace(" 0-1\n", "\n"), "cut short"),
                                         (PGN + '[Variant "Atomic"]\n\n1. e4 e5 1-0\n', "Atomic"), (PGN + '[FEN "8/8/8/8/8/8/8/K7 w - - 0 1"]\n\n1. Ka2 1-0\n', "no legal position")])
def test_bad_games_are_named_or_counted(tmp_path, text, match):
    (tmp_path/"g.pgn").write_text(text)
    with pytest.raises(LabelError, match=match) as e: converted(tmp_path, files=str(tmp_path/"g.pgn"))
    assert "g.pgn, game that ends on line" in str(e.value)
    ok, = converted(tmp_path, files=str(tmp_path/"g.pgn"), tolerate=.5); assert len(ok) == 4

def test_lichess_games(tmp_path):
    table = dict(Event=["x"]*3, Site=["y"]*3, Result=["0-1"]*3, WhiteElo=pa.array([1800, None, 1200], pa.int16()), BlackElo=pa.array([1500, 2500, 1300], pa.int16()), UTCDate=["2024.01.01"]*3,
                 movetext=["1. e4 { [%eval 0.18] [%clk 0:03:00] } 1... e5 { [%eval 0.2] } 0-1", "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. O-O 1/2-1/2", "1. d4 0-1"])
    pq.write_table(pa.table(table), tmp_path/"train-00000.parquet")
    a, = converted(tmp_path, "a", files=str(tmp_path/"*.parquet")); assert len(a) == 10
    assert {m for m, p in moves_of(a, 8).items() if p} == {"e1g1"}
    b, = converted(tmp_path, "b", files=str(tmp_path/"*.parquet"), min_elo=1700); assert len(b) == 1 + 3
    pq.write_table(pa.table(table | dict(movetext=["1. e4 0-1", "1. e5 0-1", None])), tmp_path/"bad.parquet")
    with pytest.raises(LabelError, match="bad.parquet, row 1: illegal san"): converted(tmp_path, "c", files=str(tmp_path/"bad.parquet"))
    pq.write_table(pa.table({k: v for k, v in table.items() if k != "BlackElo"}), tmp_path/"less.parquet")
    with pytest.raises(LabelError, match="less.parquet has no column BlackElo"): converted(tmp_path, "d", files=str(tmp_path/"less.parquet"))
    data = (tmp_path/"train-00000.parquet").read_bytes(); (tmp_path/"cut.parquet").write_bytes(data[:-20])
    with pytest.raises(LabelError, match="cut.parquet"): converted(tmp_path, "e", files=str(tmp_path/"cut.parquet"), form="games")

EVALS = [("r3k2r/8/8/8/8/8/8/4K3 b kq -", "e8h8 e1e2", 40, 900, -700, None), ("r3k2r/8/8/8/8/8/8/4K3 b kq -", "e8c8", 40, 900, None, -7), ("r3k2r/8/8/8/8/8/8/4K3 b kq -", "a8a1", 22, 90000, 0, None),
         ("4k3/8/8/8/8/8/4P3/4K3 w - -", "e2e4 e8e7", 30, 100, 250, None), ("4k3/8/8/8/8/8/4P3/4K3 w - -", "e1d2", 30, 100, None, 12)]
def evals_table(rows): return pa.table(dict(zip(("fen", "line", "depth", "knodes", "cp", "mate"), (list(c) for c in zip(*rows)))))

def test_lichess_evaluations(tmp_path):
    pq.write_table(evals_table(EVALS), tmp_path/"data_0000.parquet")
    a, = converted(tmp_path, files=str(tmp_path/"*.parquet"))
    assert len(a) == 2 and a.probs is None
    assert {m: s for m, s in moves_of(a, 0).items() if s != UNKNOWN} == {"e1g1": 700, "e1c1": MATE - 7}       # from White's view to the mover's; the shallow analysis is left out
    assert {m: s for m, s in moves_of(a, 1).items() if s != UNKNOWN} == {"e2e4": 250, "e1d2": MATE - 12}
    batch = to_batch(a, np.arange(2)); assert torch.allclose(batch.target.sum(-1), torch.ones(2)) and (batch.target[batch.win.isnan()] == 0).all()
    b, = converted(tmp_path, "b", files=str(tmp_path/"*.parquet"), min_depth=35); assert len(b) == 1

@pytest.mark.parametrize("row, match", [((EVALS[0][0], "e8e5", 40, 900, 1, None), "row 3: e8e5 is no legal move"), ((EVALS[0][0], "e8c8", 40, 900, 1, 2), "exactly one"), (("what", "e8c8", 40, 900, 1, None), "row 3: 'what 0 1' is not a position"),
                                        ((EVALS[0][0], "", 40, 900, 1, None), "row 3"), ((EVALS[0][0], None, 40, 900, 1, None), "row 3: a value is missing"), ((EVALS[0][0], "e8c8", 40, 900, None, 0), "exactly one")])
def test_bad_evaluations_are_named(tmp_path, row, match):
    pq.write_table(evals_table([*EVALS[3:], EVALS[3], row]), tmp_path/"x.parquet")
    with pytest.raises(LabelError, match=match) as e: converted(tmp_path, files=str(tmp_path/"x.parquet"))
    assert "x.parquet, row 3" in str(e.value)

def soft_table(boards, moves, probs):
    names = sorted(ACTIONS)
    array = lambda b: [0 if (p := b.piece_at(s)) is None else p.piece_type + 6*(not p.color) for s in range(64)]
    castling = lambda b: sum(bit for bit, (c, side) in zip((8, 4, 2, 1), ((True, "king"), (True, "queen"), (False, "king"), (False, "queen"))) if getattr(b, f"has_{side}side_castling_rights")(c))
    pad = lambda x, v: x + [v]*(8 - len(x))
    schema = pa.schema([("board_array", pa.list_(pa.int8(), 64)), ("turn", pa.int8()), ("castling", pa.int8()), ("ep_square", pa.int8()), ("move_idx", pa.int64()), ("cp", pa.int32()), ("mate", pa.int32()),
                        ("soft_indices", pa.list_(pa.int64(), 8)), ("soft_probs", pa.list_(pa.float32(), 8)), ("label_depth", pa.int16()), ("phase", pa.int8()), ("source", pa.int8()), ("cache_name", pa.string())])
    return pa.table([[array(b) for b in boards], [int(not b.turn) for b in boards], [castling(b) for b in boards], [b.ep_square if b.ep_square is not None else -1 for b in boards], [names.index(m[0]) for m in moves],
                     [0]*len(boards), [0]*len(boards), [pad([names.index(u) for u in m], -1) for m in moves], [pad(p, 0.) for p in probs], [30]*len(boards), [1]*len(boards), [1]*len(boards), ["c"]*len(boards)], schema=schema)

def test_soft_labels(tmp_path):
    boards = played(200, seed=9, plies=60)
    castles = chess.Board("r3k2r/pppppppp/8/8/8/8/PPPPPPPP/R3K2R b KQkq - 0 1")
    for b in boards: b.halfmove_clock = 0                                       # this form does not know it
    for b in boards: b.ep_square = b.ep_square if b.has_legal_en_passant() else None
    rng = random.Random(0)
    moves = [[m.uci() for m in rng.sample(list(b.legal_moves), min(3, b.legal_moves.count()))] for b in boards] + [["e8h8", "e8g8", "e8a8"]]
    probs = [[1.], [.6, .4], [.5, .3, .2]]
    probs = [probs[len(m) - 1] for m in moves]
    pq.write_table(soft_table([*boards, castles], moves, probs), tmp_path/"data-00000.parquet")
    a, = converted(tmp_path, files=str(tmp_path/"*.parquet"))
    assert (a.tokens == tokens([*boards, castles])).all() and (a.scores == UNKNOWN).all()
    for i, (b, ms, ps) in enumerate(zip(boards, moves, probs)):
        real = {ACTIONS[MOVE_NAMES[b.turn].index(u)]: p for u, p in zip(ms, ps)}
        assert {m: round(p, 5) for m, p in moves_of(a, i).items() if p} == {m: round(p, 5) for m, p in real.items()}
    assert {m: round(p, 5) for m, p in moves_of(a, len(boards)).items() if p} == {"e1g1": .8, "e1c1": .2}            # castling in both spellings
    names = sorted(ACTIONS)
    for column, value, match in (("soft_probs", [[.5] + [0.]*7], "add up"), ("soft_indices", [[names.index("a1a8")] + [-1]*7], "no legal move"), ("soft_indices", [[1968] + [-1]*7], "move number 1968"), ("board_array", [[0]*64], "no pieces"),
                                 ("soft_probs", [None], "row 0")):
        t = soft_table([chess.Board()], [["e2e4"]], [[1.]]); k = t.schema.get_field_index(column)
        pq.write_table(t.set_column(k, t.schema.field(k), pa.array(value, t.schema.field(k).type)), tmp_path/"bad.parquet")
        with pytest.raises(LabelError, match=match) as e: converted(tmp_path, "bad", files=str(tmp_path/"bad.parquet"))
        assert "bad.parquet, row 0" in str(e.value)

def test_train_on_other_people_s_data(tmp_path):
    (tmp_path/"g.pgn").write_text(PGN*20)
    converted(tmp_path, files=str(tmp_path/"g.pgn"), rows=20)
    with pytest.raises(LabelError, match="also trained on"): train(config(tmp_path/"out", tmp_path, steps=1), quiet=True)       # the same game twenty times
    labels = folder_of(tmp_path/"mine", 1)
    row = train(config(tmp_path/"out", tmp_path, steps=8, lr=5e-3, heldout=str(labels)), quiet=True)
    net = Policy(pretrain.load_model(tmp_path/"net.safetensors"))
    assert math.isfinite(row["regret"]) and measure_labels(net, read_shard(tmp_path/"out"/"shard-00000.parquet"))["loss"] < 3

def test_convert_takes_the_whole_or_nothing(tmp_path):
    (tmp_path/"g.pgn").write_text(PGN*3); (tmp_path/"e.parquet").write_bytes(b"PAR1")
    converted(tmp_path, files=str(tmp_path/"g.pgn"))
    with pytest.raises(LabelError, match="already holds labels"): converted(tmp_path, files=str(tmp_path/"g.pgn"))
    with pytest.raises(LabelError, match="neither PGN nor"): converted(tmp_path, "b", files=str(tmp_path/"e.parquet"))
    with pytest.raises(LabelError, match="there is no file"): converted(tmp_path, "b", files=str(tmp_path/"no*.pgn"))
    with pytest.raises(LabelError, match="passes the filters"): converted(tmp_path, "b", files=str(tmp_path/"g.pgn"), min_elo=3000)
    pq.write_table(evals_table(EVALS), tmp_path/"f.parquet"); (tmp_path/"e.parquet").unlink(); pq.write_table(soft_table([chess.Board()], [["e2e4"]], [[1.]]), tmp_path/"e.parquet")
    with pytest.raises(LabelError, match="several forms"): converted(tmp_path, "b", files=str(tmp_path/"*.parquet"))

# Command line

@pytest.mark.parametrize("argv", [[], ["lable"], ["label", "--dept", "1"], ["label", "--depth", "0"], ["label", "--games", "3"], ["train", "--tau", "0"], ["train", "--out", "x.pt"], ["train", "--labels", "nowhere"],
                                  ["train", "--model", "huge"], ["evaluate", "--weights", "no.safetensors"], ["evaluate", "--games", "3"], ["convert", "--form", "what"], ["label", "--out", "/proc/no/such"]])
def test_wrong_arguments_are_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")

def test_help_names_every_setting(capsys):
    def said(*argv):
        with pytest.raises(SystemExit) as e: pretrain.main([*argv, "--help"])
        assert not e.value.code
        return capsys.readouterr().out
    assert all(c in said() for c in pretrain.COMMANDS)
    for command, (cls, _) in pretrain.COMMANDS.items():
        text = said(command)
        assert all(f"--{k}" in text for k in known_keys(cls))

def test_the_module_runs(tmp_path):
    r = cli("train", "--labels", "nowhere", cwd=tmp_path)
    assert r.returncode == 2 and "error: nowhere is no folder of labels" in r.stderr and "Traceback" not in r.stderr

def test_a_run_starts_from_the_package_weights_by_name(labels, tmp_path):
    cfg = config(labels, tmp_path, model="tiny", init="tiny")
    assert all(torch.equal(a, b) for a, b in zip(Pretrainer(cfg).model.parameters(), pretrained("tiny").parameters()))

def test_evaluate_does_not_measure_what_was_trained_on(labels, tmp_path):
    "Positions of the held-out shard that stand in another one too do not count, and a file that cannot be written is found out first."
    train(config(labels, tmp_path, steps=2), quiet=True)
    shards, net = [labels/s["name"] for s in read_manifest(labels)["shards"]], str(tmp_path/"net.safetensors")
    new = held_out(labels, 1, 1000, shards[1:]); assert len(new) < len(held_out(labels, 1, 1000))
    got = evaluate(EvaluateConfig(weights=net, games=0, labels=str(labels), positions=1000), quiet=True)["measured"]
    assert got == measure_labels(Policy(load_model(net)), new)
    with pytest.raises(ArenaError, match="there is no folder"): evaluate(EvaluateConfig(weights=net, games=0, labels=str(labels), card=str(tmp_path/"no/net.md")), quiet=True)

def test_evaluate_writes_scores_with_their_intervals(labels, tmp_path):
    train(config(labels, tmp_path, steps=2, tau=.05), quiet=True)
    out = evaluate(EvaluateConfig(weights=str(tmp_path/"net.safetensors"), games=2, max_plies=6, labels=str(labels), positions=20, out=str(tmp_path/"e.json"), card=str(tmp_path/"net.md"),
                                  engine=EngineConfig(processes=1)), quiet=True)
    card = (tmp_path/"net.md").read_text()
    assert all(x in card for x in ("# net", "tau 0.05", "2 steps, 64 positions", f"| regret | {out['measured']['regret']:.4f} |", "| untrained, argmax | Stockfish depth 1 | 2 |"))
    assert json.loads((tmp_path/"e.json").read_text())["measured"] == out["measured"] and len(out["matches"]) == 8 + 2*3
    assert [r["player"] for r in out["ratings"]] == ["net, argmax", "untrained, argmax"] and all(f"{r['player']}: {r['rating']}" in card for r in out["ratings"])
    for m in out["matches"]: assert m["interval"][0] <= m["score"] <= m["interval"][1] and m["games"] == 2

def test_muon_moves_the_matrices_of_the_blocks_and_adamw_all_else(labels, tmp_path):
    "Muon's step is as long as its rate in its strongest direction; AdamW's first step moves every entry by the rate. Both follow one schedule, each from its own rate."
    t = Pretrainer(config(labels, tmp_path, optimizer="muon", lr=1e-3, muon_lr=.05, weight_decay=0., warmup=1, grad_clip=0., ema=0.))
    before = {k: v.clone() for k, v in t.model.state_dict().items()}; t.step()
    share = pretrain.lr_share(0, 0., 1)
    moved = {k: v - before[k] for k, v in t.model.state_dict().items()}
    assert share == .5 and sorted({g["lr"] for g in t.optimizer.param_groups}) == pytest.approx([.5e-3, .025])
    for name, x in moved.items():
        if name.startswith("blocks") and x.dim() == 2:
            s = torch.linalg.svdvals(x); assert 5e-3 < s[0] < .1, name       # orthogonalised: about the rate, however large the matrix; AdamW's at this rate is ten times longer
        elif x.abs().max() > 0: assert x.abs().max() < .6e-3, name
    assert any(moved[k].abs().max() > 1e-4 for k in moved if not k.startswith("blocks"))

def test_the_card_gives_the_commands_that_make_the_weights_again():
    "Every setting that is not the default is there, and the command line takes them."
    made = dict(rows_in_all=650_000, depth=1, seed=3, games=256)
    lines = pretrain.recipe(made, dataclasses.asdict(TrainConfig(steps=1200, seed=4, lr=1e-3)))
    label, train = (pretrain.parse(l.split()[3:])[1] for l in lines)
    assert (label.positions, label.depth, label.seed, label.out) == (650_000, 1, 3, train.labels)
    assert dataclasses.replace(train, out=TrainConfig.out) == TrainConfig(steps=1200, seed=4, lr=1e-3)
    assert len(pretrain.recipe(dict(source="a.pgn"), {})) == 1                  # labels from elsewhere cannot be made again by us
