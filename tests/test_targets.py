"Targets, measures and the order of batches, against plain Python and python-chess."
import math
from collections import Counter

import chess
import numpy as np
import pytest
import torch

from grpo_chess.board import encode, legal_actions, tokens
from grpo_chess.engine import MATE
from grpo_chess.labels import (ACTION_SPACE, UNKNOWN, LabelError, Labels, held_out, join, make_labels, read_shard,
                               read_tokens, write_manifest, write_shard)
from grpo_chess.model import MODELS, ChessTransformer, MoveDist, Policy
from grpo_chess.reward import win_probability
from grpo_chess.targets import (LabelBatch, Stream, best_targets, cross_entropy, measure, measure_labels, soft_targets,
                                spreads, to_batch, turn_round)
from made_up import folder_of, made_up, played

@pytest.fixture
def labels(tmp_path): return folder_of(tmp_path/"labels", 4)

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
        t = np.exp(win/.03)
        t /= t.sum()
        assert abs(m["loss"][i] + (t*np.log(p)).sum()) < 1e-4
        assert abs(m["regret"][i] - (p*(win.max() - win)).sum()) < 1e-5
        assert abs(m["entropy"][i] + (p*np.log(p)).sum()) < 1e-4
        assert abs(m["regret_greedy"][i] - (win.max() - win[p.argmax()])) < 1e-6
        assert m["accuracy"][i] == (win[p.argmax()] == win.max())
        assert m["top5"][i] == (win[np.argsort(-p)[:5]] == win.max()).any()

def test_padding_has_no_influence_on_loss_gradient_or_measures():
    torch.manual_seed(0)
    net, labels = ChessTransformer(MODELS["tiny"]), made_up(24)
    def grads(batch):
        net.zero_grad()
        dist = Policy(net).dist(batch.tokens, batch.legal)
        cross_entropy(dist, batch.target).mean().backward()
        return measure(dist, batch), torch.cat([p.grad.flatten() for p in net.parameters()])
    batch = to_batch(labels, np.arange(24))
    def pad(x, v):
        return torch.nn.functional.pad(x, (0, 30), value=v)
    wide = LabelBatch(batch.tokens, pad(batch.legal, -1), pad(batch.win, math.nan), pad(batch.target, 0.))
    (m, g), (n, h) = grads(batch), grads(wide)
    assert torch.allclose(g, h, atol=1e-7) and torch.isfinite(h).all()
    assert all(torch.allclose(m[k], n[k], atol=1e-6) for k in m)

def test_where_a_move_has_no_value_there_is_no_regret():
    labels = made_up(10)
    labels.scores[labels.offset[4]] = UNKNOWN
    m = measure(Policy(ChessTransformer(MODELS["tiny"]).eval()).dist(*(torch.as_tensor(x)
                                                                       for x in labels.rows(np.arange(10))[:2])),
                to_batch(labels, np.arange(10)))
    for name in ("regret", "regret_greedy"): assert m[name].isnan().nonzero().flatten().tolist() == [4]
    assert torch.isfinite(m["loss"]).all()
    assert math.isfinite(measure_labels(Policy(ChessTransformer(MODELS["tiny"]).eval()), labels)["regret"])

def test_the_mirror_is_python_chess_s():
    boards = [b for b in played(250, seed=5)
              if not b.castling_rights] + [chess.Board("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 2"),
                                           chess.Board("4k3/8/8/8/1pP5/8/8/4K3 b - c3 5 2")]
    assert len(boards) > 80 and any(b.has_legal_en_passant() for b in boards)
    def flip(b):
        m = b.transform(chess.flip_horizontal)
        m.turn, m.halfmove_clock = b.turn, b.halfmove_clock
        if b.ep_square is not None: m.ep_square = b.ep_square ^ 7
        return m
    (tok, legal), (tok2, legal2) = encode(boards), encode([flip(b) for b in boards])
    which = np.arange(len(boards)) % 2 == 0
    t, moves = turn_round(tok, legal, which)
    assert (t == np.where(which[:, None], tok2, tok)).all()
    assert (np.sort(moves) == np.sort(np.where(which[:, None], legal2, legal))).all()
    castling = [b for b in played(100, seed=6, plies=12) if b.castling_rights]
    tok, legal = encode(castling)
    assert all((x == y).all() for x, y in zip(turn_round(tok, legal, np.ones(len(castling), bool)), (tok, legal)))

# The order of batches

def test_an_epoch_shows_every_position_once_and_resumes_anywhere(labels):
    for window in (64, 130, 10_000):
        stream = Stream(labels, 32, 7, 1, window)
        got, states = [], []
        for _ in range(18):
            states.append(stream.state())
            found, i = stream.next()
            got.append(found.tokens[i])
        every = np.concatenate([read_tokens(labels/n) for n in stream.rows])
        def key(x):
            return sorted(t.tobytes() for t in x)
        for epoch in range(3): assert key(np.concatenate(got[6*epoch:6*epoch + 6])) == key(every)
        assert not (np.concatenate(got[:6]) == np.concatenate(got[6:12])).all()
        for k in (0, 1, 5, 6, 11):
            other = Stream(labels, 32, 7, 1, window)
            other.load_state(states[k])
            for t in got[k:]:
                found, i = other.next()
                assert (found.tokens[i] == t).all()

def test_positions_without_spread_are_shown_less(labels):
    every = join([read_shard(labels/n) for n in Stream(labels, 64, 0).rows])
    by_hand = np.array([win.max() - win.mean() for i in range(len(every))
                        for win in [win_probability(every.scores[every.offset[i]:every.offset[i + 1]]).astype(float)]])
    assert spreads(every) == pytest.approx(by_hand, abs=1e-6)
    spread_by = dict(zip([t.tobytes() for t in every.tokens], by_hand))
    stream, shown, where = Stream(labels, 16, 0, spread=1.), Counter[bytes](), []
    while stream.epoch < 200:
        where.append(stream.state())
        found, index = stream.next()
        shown.update(t.tobytes() for t in found.tokens[index])
    chance, seen = (np.array(x) for x in zip(*[(s, shown[t]/200) for t, s in spread_by.items()]))
    assert chance.max() - chance.min() > .2 and np.abs(seen - chance).mean() < .05       # a batch's rest is left out
    other = Stream(labels, 16, 0, spread=1.)
    other.load_state(where[50])
    for k in (50, 51, 52): assert other.state() == where[k] and len(other.next()[1])
    sure = Stream(labels, 16, 0, spread=1e-9)
    sure.next()
    assert len(sure.order) == (by_hand > 0).sum()
    with pytest.raises(LabelError, match="no label has a spread near 1000"): Stream(labels, 8, 0, spread=1e9).next()

def test_the_spread_is_that_of_the_known_moves():
    labels = Labels(np.zeros((2, 65), np.uint8), np.array([0, 3, 5]), np.zeros(5, np.int16),
                    np.array([0, UNKNOWN, 0, UNKNOWN, UNKNOWN], np.int16))
    assert spreads(labels)[0] == 0 and np.isnan(spreads(labels)[1])

def test_new_shards_join_at_the_next_epoch(labels):
    stream = Stream(labels, 64, 0)
    stream.next()
    write_shard(labels/"shard-00009.parquet", made_up(64, 77), dict(seed=0))
    write_manifest(labels, dict(seed=0, action_space=ACTION_SPACE))
    stream.next()
    assert len(stream.rows) == 3 and stream.epoch == 0
    stream.next()
    assert len(stream.rows) == 4 and stream.epoch == 1
    (labels/"shard-00002.parquet").unlink()
    with pytest.raises(LabelError, match="shard-00002.parquet"): [stream.next() for _ in range(4)]

def test_what_is_held_out_is_not_trained_on(labels):
    twin = read_shard(labels/"shard-00000.parquet").take(np.arange(30))
    write_shard(labels/"shard-00002.parquet", twin, dict(seed=0))
    write_manifest(labels, dict(seed=0, action_space=ACTION_SPACE))
    stream = Stream(labels, 8, 0)
    held = held_out(labels, 1, 1000, [labels/n for n in stream.rows])
    train_on = {t.tobytes() for n in stream.rows for t in read_tokens(labels/n)}
    assert 20 < len(held) <= 34 and not train_on & {t.tobytes() for t in held.tokens}
    assert len(held_out(labels, 1, 5)) == 5
    with pytest.raises(LabelError, match="also trained on"): held_out(labels, 1, 1000, [labels/"shard-00000.parquet"])

