"grpo_chess.model: the move distribution against plain sums, its sampling at the edges, and files that must be refused."
import errno
import json
import math
import random

import chess
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from grpo_chess.board import action_to_move, encode, position_key
from grpo_chess.model import (CACHED, MODELS, WEIGHTS, ChessTransformer, ModelConfig, MoveDist, NoLegalMove, Policy,
                              WeightsError, describe, forward_flops, freeze,
                              load_model, n_params, save_model)

MOST = chess.Board("R6R/3Q4/1Q4Q1/4Q3/2Q4Q/Q4Q2/pp1Q4/kBNN1KB1 w - - 0 1")          # 218 legal moves
ONE = chess.Board("7k/8/8/8/8/8/r7/7K w - - 0 1")                                    # one
MATE = chess.Board("rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3")  # none
KIWIPETE = chess.Board("r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w KQkq - 0 1")
SMALL = ModelConfig(width=16, layers=2, heads=2)

def lively(cfg=SMALL, seed=0, gain=40.):
    "A network whose scores differ as a trained one's do, and that uses every parameter."
    torch.manual_seed(seed)
    net = ChessTransformer(cfg).eval()
    with torch.no_grad():
        net.clock.normal_()
        net.head.target.weight.mul_(gain)
        net.head.promotion.weight.mul_(gain)
        for block in net.blocks: block.bias.normal_()
    return net

def batch(boards): return tuple(map(torch.as_tensor, encode(boards)))

def played(n, seed):
    r, out = random.Random(seed), []
    while len(out) < n:
        b = chess.Board()
        for _ in range(r.randrange(2, 120)):
            if b.is_game_over(): break
            b.push(r.choice(list(b.legal_moves)))
        if not b.is_game_over(): out.append(b)
    return out

BOARDS = [MOST, ONE, KIWIPETE, chess.Board(), *played(12, 0)]

# ---------------------------------------------------------------- exact sums

def test_entropy_and_kl_are_sums_over_moves():
    p, q = Policy(lively(seed=0), 1.3).dist(*batch(BOARDS)), Policy(lively(seed=1), .8).dist(*batch(BOARDS))
    entropy, kl = p.entropy(), p.kl(q)
    for i, board in enumerate(BOARDS):
        n = board.legal_moves.count()
        a, b = ([x.item() for x in d.logp[i, :n].double()] for d in (p, q))
        assert sum(map(math.exp, a)) == pytest.approx(1, abs=1e-5)
        assert entropy[i].item() == pytest.approx(-sum(math.exp(x)*x for x in a), abs=1e-5)
        assert kl[i].item() == pytest.approx(sum(math.exp(x)*(x-y) for x, y in zip(a, b)), rel=1e-4, abs=1e-5)
        assert (p.logp[i, n:] == -math.inf).all() and (p.probs[i, n:] == 0).all()
    assert (p.finite[~p.legal] == 0).all() and (p.kl(p) == 0).all() and (p.kl(q) > 0)[p.legal.sum(-1) > 1].all()
    assert entropy.min() >= 0 and (entropy <= p.legal.sum(-1).log() + 1e-5).all()

def test_exact_gradients():
    """d entropy/dz_i = -p_i (log p_i + H), d KL(p||q)/dz_i = p_i (log p_i - log q_i - KL), d KL(q||p)/dz_i = p_i - q_i;
    nothing on padding."""
    T, g = 1.7, torch.Generator().manual_seed(3)
    z = torch.randn(5, 9, generator=g, dtype=torch.float64)
    w = torch.randn(5, 9, generator=g, dtype=torch.float64)
    for i, n in enumerate((1, 2, 5, 8, 9)): z[i, n:] = w[i, n:] = -math.inf
    pad, q = z == -math.inf, MoveDist.from_logits(w)
    for f in ("entropy", "kl", "back"):
        x = z.clone().requires_grad_()
        d = MoveDist.from_logits(x, T)
        (d.entropy() if f == "entropy" else d.kl(q) if f == "kl" else q.kl(d)).sum().backward()
        p, lp, lq = d.probs.detach(), d.finite.detach(), q.finite
        want = dict(entropy=-p*(lp + d.entropy().detach()[:, None]), kl=p*(lp - lq - d.kl(q).detach()[:, None]),
                    back=p - q.probs)[f]/T
        torch.testing.assert_close(x.grad, want.masked_fill(pad, 0.), rtol=1e-10, atol=1e-12)
        assert x.grad[pad].count_nonzero() == 0

def test_temperature_divides_the_scores():
    net = lively()
    tok, legal = batch(BOARDS)
    z = net(tok, legal).detach()
    for T in (.3, 1., 2.5):
        want = torch.stack([torch.cat([(row[row > -math.inf]/T).softmax(-1),
                                       torch.zeros(int((row == -math.inf).sum()))]) for row in z])
        torch.testing.assert_close(Policy(net, T).dist(tok, legal).probs, want)
    assert Policy(net).at(.3).temperature == .3 and Policy(net).at(.3).model is net
    for T in (0., -1., math.nan):
        with pytest.raises(ValueError, match="temperature"): Policy(net, T)

def test_an_infinite_temperature_is_refused():
    "It would turn padding into NaN: -inf/inf."
    with pytest.raises(ValueError, match="temperature"): Policy(lively(), math.inf)

def test_log_prob_argmax_reshape():
    d = Policy(lively()).dist(*batch(BOARDS[:6]))
    slot = d.argmax()
    assert [row[s].item() for row, s in zip(d.logp, slot)] == d.log_prob(slot).tolist()
    assert d.log_prob(slot).tolist() == d.logp.max(-1).values.tolist()
    r = d.reshape((2, 3, -1))
    assert r.entropy().shape == (2, 3) and torch.equal(r.log_prob(slot.reshape(2, 3)).flatten(), d.log_prob(slot))

# ---------------------------------------------------------------- legal sets

def test_one_and_218_moves():
    d = Policy(lively()).dist(*batch([MOST, ONE]))
    assert d.legal.sum(-1).tolist() == [218, 1] and d.probs[1, 0] == 1 and d.entropy()[1] == 0 and d.logp[1, 0] == 0
    assert d.sample(torch.tensor([.999999, .999999])).tolist()[1] == 0

@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_position_without_moves_is_named(place):
    boards = [chess.Board(), KIWIPETE]
    boards.insert(place, MATE)
    with pytest.raises(NoLegalMove) as e: Policy(lively()).dist(*batch(boards))
    assert MATE.board_fen() in str(e.value)

def test_describe_is_the_position_from_the_movers_side():
    for board in [KIWIPETE, chess.Board(), *played(40, 2)]:
        seen = board if board.turn else board.mirror()
        want = chess.Board(position_key(seen))
        assert chess.Board(describe(torch.as_tensor(encode([board])[0])[0])) == want

def test_a_mirrored_position_is_the_same_to_the_policy():
    p = Policy(lively())
    for board in BOARDS:
        a, b = (p.dist(*batch([x])).logp[0] for x in (board, board.mirror()))
        assert torch.equal(a, b)
        la, lb = (encode([x])[1][0] for x in (board, board.mirror()))
        def flip(m):
            return chess.Move(m.from_square ^ 56, m.to_square ^ 56, m.promotion)
        assert [flip(action_to_move(int(i), board.turn)) for i in la] == [action_to_move(int(i), not board.turn)
                                                                          for i in lb]

def test_padding_changes_nothing():
    "Wider padding, other rows beside it, another order of the moves: the same distribution, and the same gradient."
    net = lively()
    tok, legal = batch(BOARDS)
    alone = [Policy(net).dist(*batch([b])).logp[0] for b in BOARDS]
    wide = torch.nn.functional.pad(legal, (0, 30), value=-1)
    d, e = Policy(net).dist(tok, legal), Policy(net).dist(tok, wide)
    torch.testing.assert_close(d.entropy(), e.entropy(), rtol=1e-5, atol=1e-6)
    for i, a in enumerate(alone):
        torch.testing.assert_close(d.logp[i, :len(a)], a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(e.logp[i, :len(a)], a, rtol=1e-5, atol=1e-5)
    back = Policy(net).dist(tok[2:3], legal[2:3, :48].flip(1)).logp[0].flip(0)
    torch.testing.assert_close(back, d.logp[2, :48], rtol=1e-5, atol=1e-5)
    grads = []
    for moves in (legal, wide):
        net.zero_grad()
        Policy(net).dist(tok, moves).entropy().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-4*grads[0].norm()

@pytest.mark.parametrize("n", [0, 1, CACHED, CACHED+1, 3*CACHED-5])
def test_large_batches_in_parts(n):
    "Without gradients a batch of any size passes in parts; the distribution is that of one pass, row by row."
    net, seen = lively(), []
    net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    tok, legal = (x[torch.arange(n) % len(BOARDS)] for x in batch(BOARDS))
    whole = Policy(net).dist(tok, legal)
    with torch.no_grad(): parts = Policy(net).dist(tok, legal)
    assert seen[0] == n and sum(seen[1:]) == n and max(seen[1:]) <= CACHED and len(seen) == 1 + max(1, -(-n//CACHED))
    torch.testing.assert_close(parts.logp, whole.logp.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(parts.legal, whole.legal)

def test_any_leading_shape():
    "[..., 65] and [..., L]: a grid, a list, one position."
    p = Policy(lively())
    tok, legal = batch(BOARDS[:6])
    flat = p.dist(tok, legal)
    assert torch.equal(p.dist(tok.reshape(2, 3, 65), legal.reshape(2, 3, -1)).logp.flatten(0, 1), flat.logp)
    torch.testing.assert_close(p.dist(tok[0], legal[0]).logp, flat.logp[0])

def test_scores_follow_the_squares_and_the_promotion():
    "The head by hand: <source(from), target(to)>/sqrt(d), and the promotion's own score where a pawn promotes."
    net = lively()
    board = chess.Board("1n5k/P7/8/8/8/8/8/K7 w - - 0 1")
    x = torch.randn(1, 64, 16)
    legal = torch.as_tensor(encode([board])[1]).long()
    got = net.head(x, legal)[0]
    h = net.head
    y = h.norm(x)[0]
    s, t, pr = h.source(y), h.target(y), h.promotion(y)
    for a, score in zip(legal[0].tolist(), got):
        m = action_to_move(a, True)
        want = s[m.from_square] @ t[m.to_square]/4 + (pr[m.to_square, m.promotion-1] if m.promotion else 0.)
        torch.testing.assert_close(score, want, rtol=1e-5, atol=1e-5)
    assert sum(action_to_move(a, True).promotion is not None for a in legal[0].tolist()) == 8

def test_every_part_of_the_position_counts():
    "Clock, castling right, en passant and a piece each change the distribution."
    p = Policy(lively())
    def differs(a, b):
        da, db = (dict(zip(encode([chess.Board(f)])[1][0].tolist(), p.dist(*batch([chess.Board(f)])).logp[0].tolist()))
                  for f in (a, b))
        return any(abs(da[k] - db[k]) > 1e-4 for k in da.keys() & db.keys())
    assert differs("4k3/8/8/8/8/8/4P3/R3K3 w Q - 0 1", "4k3/8/8/8/8/8/4P3/R3K3 w Q - 60 40")
    assert differs("4k3/8/8/8/8/8/4P3/R3K3 w Q - 0 1", "4k3/8/8/8/8/8/4P3/R3K3 w - - 0 1")
    assert differs("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 1", "4k3/8/8/3pP3/8/8/8/4K3 w - - 0 1")
    assert differs("r3k3/8/8/8/8/8/4P3/R3K3 w q - 0 1", "r3k3/8/8/8/8/8/4P3/R3K3 w - - 0 1")

# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize("term", ["entropy", "kl", "back", "logp"])
def test_gradients_are_finite(term):
    "With 1, 218 and padded moves in one batch, scores of ±1e4, and probabilities that underflow to 0."
    net = lively(gain=3e4)
    tok, legal = batch(BOARDS)
    q = MoveDist(Policy(lively(seed=1)).dist(tok, legal).logp.detach())
    d = Policy(net).dist(tok, legal)
    assert (d.probs == 0)[d.legal].any()
    x = dict(entropy=d.entropy, kl=lambda: d.kl(q), back=lambda: q.kl(d), logp=lambda: d.log_prob(d.argmax()))[term]()
    assert x.isfinite().all()
    x.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

def test_every_parameter_has_a_gradient():
    net, promotion = lively(), chess.Board("1n5k/P7/8/8/8/8/8/K7 w - - 0 1")
    Policy(net).dist(*batch([*BOARDS, promotion])).logp.clamp_min(-50.).pow(2).sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []

@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_recording_a_gradient_changes_no_score(bf16):
    "The sampler asks without a gradient, the loss with one: kernels may be picked by that, and bfloat16 would show it."
    net = lively(ModelConfig(width=32, layers=2, heads=2))
    out = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out.append(net(*batch(BOARDS)).detach())
    assert (out[0] - out[1])[out[0] > -math.inf].abs().max() < 1e-6*out[0].abs()[out[0] > -math.inf].max()

# ---------------------------------------------------------------- sampling

def test_sample_at_the_edges():
    "A slot holds [F(i-1), F(i)): exact with powers of two, and never a padded or impossible move."
    p = torch.tensor([0., .25, .5, 0., .25, 0., 0.])
    legal = torch.tensor([True]*6 + [False])
    # slots 0, 3 and 5: legal, of probability 0
    d = MoveDist(torch.where(legal, p.log().clamp_min(-1e5), -math.inf))
    def below(x):
        return math.nextafter(x, 0.)
    for u, slot in [(0., 1), (below(.25), 1), (.25, 2), (below(.75), 2), (.75, 4), (below(1.), 4)]:
        assert d.sample(torch.tensor(u, dtype=torch.float64)).item() == slot, u
    # a number rounded up to 1 still finds a legal move
    assert d.sample(torch.tensor(1.)).item() < 6
    many = d.reshape((1, -1)).logp.expand(10_001, -1)
    drawn = MoveDist(many).sample(torch.linspace(0, 1, 10_001, dtype=torch.float64).clamp_max(below(1.)))
    assert set(drawn.tolist()) == {1, 2, 4} and (drawn.diff() >= 0).all()

def test_sample_is_the_slow_search():
    d = Policy(lively()).dist(*batch(BOARDS))
    r = np.random.default_rng(0)
    for _ in range(20):
        u = r.random(len(BOARDS))
        got = d.sample(torch.as_tensor(u)).tolist()
        for row, x, slot in zip(d.probs.double(), u, got):
            acc, total = 0., math.fsum(row.tolist())
            for want, p in enumerate(row.tolist()):
                acc += p
                if acc > x*total: break
            assert slot == want

def test_sample_next_to_every_edge():
    "218 equal moves, and numbers 1e-9 to either side of each edge: single precision could not tell them apart."
    d = MoveDist.from_logits(torch.zeros(1, 218))
    p = d.probs[0, 0].double().item()
    edges = torch.arange(1, 218, dtype=torch.float64)/218
    # the sum is not 1, and need not be
    assert abs(218*p - 1) > 1e-9
    for side, want in ((-1e-9, range(217)), (1e-9, range(1, 218))):
        assert MoveDist(d.logp.expand(217, -1)).sample(edges + side).tolist() == list(want)

def test_sample_frequencies():
    "Chi-square of 40,000 draws over about 20 moves: below the 99.9 % point."
    d = Policy(lively(), 2.).dist(*batch([chess.Board()]))
    n = 40_000
    u = torch.as_tensor(np.random.default_rng(1).random(n))
    seen = torch.bincount(MoveDist(d.logp.expand(n, -1)).sample(u), minlength=20).double()
    want = d.probs[0].double()*n
    keep = want > 5
    chi, dof = ((seen - want)**2/want)[keep].sum().item(), int(keep.sum()) - 1
    assert dof > 5 and chi < dof + 3.1*math.sqrt(2*dof) + 6

# ---------------------------------------------------------------- presets, freezing, cost

@pytest.mark.parametrize("name", MODELS)
def test_presets_fit_into_16_mb(name, tmp_path):
    net = ChessTransformer(MODELS[name])
    save_model(net, tmp_path/"w.safetensors", half=True)
    assert (tmp_path/"w.safetensors").stat().st_size <= 16e6
    if name == "base": assert 5e6 <= n_params(net) <= 9e6
    if name == "record": assert (net.cfg.width, net.cfg.layers, net.cfg.heads) == (256, 4, 8)

def test_dropout_is_off_by_default():
    assert ModelConfig().dropout == 0 and all(c.dropout == 0 for c in MODELS.values())
    torch.manual_seed(0)
    net = ChessTransformer(SMALL).train()
    tok, legal = batch(BOARDS)
    assert torch.equal(net(tok, legal), net(tok, legal)) and torch.equal(net(tok, legal), net.eval()(tok, legal))
    drop = ChessTransformer(ModelConfig(width=16, layers=2, heads=2, dropout=.3))
    assert not torch.equal(drop(tok, legal), drop(tok, legal))
    assert torch.equal(drop.eval()(tok, legal), drop(tok, legal))

@pytest.mark.parametrize("kw", [dict(width=0), dict(layers=0), dict(heads=0), dict(heads=5), dict(ffn_ratio=0.),
                                dict(dropout=1.), dict(dropout=-.1)], ids=str)
def test_config_refuses(kw):
    with pytest.raises(ValueError): ModelConfig(**kw)

def test_freeze():
    for k in range(3):
        net = freeze(lively(), k)
        before = {n: p.clone() for n, p in net.named_parameters()}
        opt = torch.optim.AdamW(net.parameters(), lr=.1, weight_decay=.1)
        Policy(net).dist(*batch(BOARDS)).logp.clamp_min(-50.).pow(2).sum().backward()
        opt.step()
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
        frozen = {n for n, p in net.named_parameters() if k and (not n.startswith(("blocks.", "head.")))
                  or n.startswith(tuple(f"blocks.{i}." for i in range(k)))}
        assert moved.isdisjoint(frozen)
        assert n_params(net) - n_params(net, trainable=True) == sum(before[n].numel() for n in frozen)
        assert {n for n in before if n.startswith("head.source")} <= moved
    for k in (-1, 3):
        with pytest.raises(ValueError, match="freeze"): freeze(lively(), k)

@pytest.mark.parametrize("cfg", [SMALL, MODELS["tiny"], ModelConfig(width=32, layers=3, heads=4, ffn_ratio=1.5)],
                         ids=str)
def test_flops_are_counted_right(cfg):
    "Hooks count every linear layer as it runs; attention's two products and the head's table are added by hand."
    net, total = ChessTransformer(cfg), [0]
    for m in net.modules():
        # 5 outputs a square: not counted
        if isinstance(m, torch.nn.Linear) and m is not net.head.promotion:
            m.register_forward_hook(lambda m, x, y: total.__setitem__(0, total[0] + 2*x[0].numel()*m.out_features))
    net(*batch([chess.Board()]))
    by_hand = total[0] + cfg.layers*2*2*64*64*cfg.width + 2*64*64*cfg.width
    assert forward_flops(cfg) == by_hand

# ---------------------------------------------------------------- files

def test_round_trip(tmp_path):
    net = lively(ModelConfig(width=16, layers=2, heads=2, dropout=.2))
    path = tmp_path/"a.safetensors"
    save_model(net, path, note="hello")
    again = load_model(path)
    assert not again.training and again.cfg == net.cfg
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    # dropout is no shape
    assert load_model(str(path), ModelConfig(width=16, layers=2, heads=2, dropout=.5)).cfg.dropout == .5
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    save_model(lively(seed=1), path)
    assert not torch.equal(load_model(path).square, net.square)             # written over
    tok, legal = batch(BOARDS)
    save_model(net, path, half=True)
    small = load_model(path)
    assert next(small.parameters()).dtype == torch.float32
    assert (small(tok, legal) - net(tok, legal))[legal >= 0].abs().max() < .05*net(tok, legal)[legal >= 0].abs().max()

def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/"a.safetensors"
    save_model(lively(), path)
    before = path.read_bytes()
    def full(handle): raise OSError(errno.ENOSPC, "disk full")
    monkeypatch.setattr("grpo_chess.files.os.fsync", full)
    with pytest.raises(OSError, match="disk full"): save_model(lively(seed=1), path)
    assert path.read_bytes() == before

def state(net): return {k: v.contiguous() for k, v in net.state_dict().items()}
def shape(net, **kw): return {"config": json.dumps(dict(width=16, layers=2, heads=2, ffn_ratio=2., dropout=0.) | kw)}

def without(net, name):
    s = state(net)
    del s[name]
    return s

BAD = dict(
    missing=lambda p, net: None,
    empty=lambda p, net: p.write_bytes(b""),
    text=lambda p, net: p.write_text("weights, honest"),
    pickle=lambda p, net: torch.save(net.state_dict(), p),
    truncated=lambda p, net: (save_model(net, p), p.write_bytes(p.read_bytes()[:-100])),
    cut_header=lambda p, net: (save_model(net, p), p.write_bytes(p.read_bytes()[:20])),
    folder=lambda p, net: p.mkdir(),
    no_header=lambda p, net: save_file(state(net), p),
    other_header=lambda p, net: save_file(state(net), p, metadata={"format": "pt"}),
    header_not_json=lambda p, net: save_file(state(net), p, metadata={"config": "width 16"}),
    header_no_dict=lambda p, net: save_file(state(net), p, metadata={"config": "[16, 2, 2]"}),
    unknown_field=lambda p, net: save_file(state(net), p, metadata=shape(net, rope=True)),
    impossible_shape=lambda p, net: save_file(state(net), p, metadata=shape(net, heads=3)),
    other_shape=lambda p, net: save_file(state(net), p, metadata=shape(net, layers=3)),
    other_width=lambda p, net: save_file(state(net), p, metadata=shape(net, width=32)),
    lost_tensor=lambda p, net: save_file(without(net, "clock"), p, metadata=shape(net)),
    extra_tensor=lambda p, net: save_file(state(net) | dict(more=torch.zeros(2)), p, metadata=shape(net)))

@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_by_name(kind, tmp_path):
    path = tmp_path/"bad.safetensors"
    BAD[kind](path, lively())
    with pytest.raises(WeightsError, match="bad.safetensors") as e: load_model(path)
    assert "\n" not in str(e.value)                                                          # one line

def test_another_shape_than_wanted_is_refused(tmp_path):
    save_model(lively(), tmp_path/"a.safetensors")
    for cfg in (MODELS["tiny"], ModelConfig(width=16, layers=2, heads=4),
                ModelConfig(width=16, layers=2, heads=2, ffn_ratio=3.)):
        with pytest.raises(WeightsError, match="another shape"): load_model(tmp_path/"a.safetensors", cfg)

def test_the_free_text_cannot_hide_the_shape(tmp_path):
    try: save_model(lively(), tmp_path/"a.safetensors", config="mine")
    except (TypeError, ValueError): return
    assert load_model(tmp_path/"a.safetensors").cfg == SMALL

# ---------------------------------------------------------------- finite

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad, tmp_path):
    "One number in one tensor is enough, for the file that is read and for the file that would be written."
    path, net = tmp_path/"bad.safetensors", lively()
    save_model(net, tmp_path/"good.safetensors")
    with torch.no_grad(): net.blocks[1].bias[0, 5, 5] = bad
    save_file(state(net), path, metadata=shape(net))
    with pytest.raises(WeightsError, match="bad.safetensors.*blocks.1.bias") as e: load_model(path)
    assert "\n" not in str(e.value)
    before = (tmp_path/"good.safetensors").read_bytes()
    with pytest.raises(WeightsError, match="good.safetensors.*blocks.1.bias"):
        save_model(net, tmp_path/"good.safetensors")
    assert (tmp_path/"good.safetensors").read_bytes() == before

def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    net = lively()
    with torch.no_grad(): net.square[3, 3] = 1e6
    save_model(net, tmp_path/"whole.safetensors")
    with pytest.raises(WeightsError, match="square"): save_model(net, tmp_path/"half.safetensors", half=True)
    assert not (tmp_path/"half.safetensors").exists()

def test_a_score_that_is_not_a_number_is_seen_in_every_measure():
    "It was taken for padding: entropy 0, KL 0, loss 0."
    scores = torch.tensor([[1., math.nan, 2., -math.inf], [1., math.inf, 2., -math.inf], [1., 3., 2., -math.inf]])
    d, slot = MoveDist.from_logits(scores), torch.zeros(3, dtype=torch.long)
    for measured in (d.entropy(), d.kl(d), d.finite.sum(-1), d.log_prob(slot)):
        assert measured.isnan().tolist() == [True, True, False]

# ---------------------------------------------------------------- half precision

def test_scores_leave_the_head_in_float32():
    "Under bfloat16 two scores near 8 that differ by less than 1/32 were one number: the head's products are float32."
    net, head = lively(), {}
    net.head.source.register_forward_hook(lambda m, x, y: head.update(source=y))
    net.head.target.register_forward_hook(lambda m, x, y: head.update(target=y))
    tok, legal = batch(BOARDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): scores = net(tok, legal)
    assert scores.dtype == torch.float32 and head["source"].dtype == torch.bfloat16
    known = scores[legal >= 0]
    # rounded to half precision none differs
    assert (known.bfloat16().float() != known).float().mean() > .9
    table = head["source"].float() @ head["target"].float().transpose(1, 2)/math.sqrt(16)
    plain = legal[1, :1].long()                                                            # a king's move, no promotion
    torch.testing.assert_close(scores[1, :1], table[1].flatten()[net.head.pair[plain]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda p: p.stem)
def test_the_package_s_weights_know_their_checksums(path, tmp_path):
    "Any flipped bit of a file is found: in its header every so-manyth byte is tried, and some in the rest."
    data = path.read_bytes()
    for at in [*range(0, 1200, 23), *range(1200, len(data), len(data)//20)]:
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        (tmp_path/"x.safetensors").write_bytes(bad)
        with pytest.raises(WeightsError) as e: load_model(tmp_path/"x.safetensors")
        assert "\n" not in str(e.value)
