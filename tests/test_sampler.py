"grpo_chess.sampler: ratio one, silent padding, runs that are functions of their seed, games replayed by python-chess."
import math
import random
from collections import Counter
from dataclasses import fields

import chess
import numpy as np
import pytest
import torch
from torch import nn

from grpo_chess.board import Terminal, encode, move_to_action, position_key, terminal
from grpo_chess.loss import LossConfig, clipped_surrogate, ratio_stats
from grpo_chess.model import ChessTransformer, ModelConfig, MoveDist, Policy
from grpo_chess.sampler import (NOISE_ALPHA, Positions, Rollout, SamplerConfig, action_agreement, agreement_stats,
                                expected_ratio_stats, pad_rows, policy_diversity, replay_logp, rollout, root_noise,
                                temperature_at, uniforms, within_spread)

KIWIPETE = "r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w KQkq - 0 1"
PROMOTES, BLACK = "8/P1k5/K7/8/8/8/8/8 w - - 0 1", "8/2p5/3p4/KP5r/1R3p1k/8/4P1P1/8 b - - 0 1"
NEAR = "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 98 80"                  # mate in one, or two plies to the fifty-move draw
BARE_KING = "4k3/8/8/8/8/8/3p4/4K3 w - - 0 1"                    # taking the pawn leaves two kings
STARTS = [chess.STARTING_FEN, KIWIPETE, PROMOTES, BLACK]
SMALL = ModelConfig(width=16, layers=2, heads=2)

class Peaked(nn.Module):
    "A stand-in for a trained network: scores with a gain, perhaps under bfloat16 autocast; keeps what it is asked."
    def __init__(self, cfg=SMALL, gain=60., bf16=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.gain, self.bf16, self.seen = ChessTransformer(cfg), gain, bf16, []
        with torch.no_grad():
            for block in self.net.blocks: block.bias.normal_()
        self.eval()
    def forward(self, tokens, legal):
        self.seen.append((tokens.clone(), legal.clone()))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16): return self.net(tokens, legal)*self.gain

class Uniform(nn.Module):
    def forward(self, tokens, legal): return torch.zeros(legal.shape).masked_fill(legal < 0, -math.inf)

def boards(*fens): return [chess.Board(f) for f in fens]

def cfg(**kw): return SamplerConfig(**(dict(boards=4, group=6, plies=8) | kw))

def first_move(fens): return [min(m.uci() for m in chess.Board(f).legal_moves) for f in fens]

def with_history(moves):
    "The initial position after some moves, with its move stack."
    b = chess.Board()
    for m in moves.split(): b.push_uci(m)
    return b

def check_game(ro, b, g, board):
    "One game of a rollout, replayed by python-chess on `board`."
    over, plies = False, ro.slot.shape[-1]
    for t in range(plies + 1):
        if over:
            assert ro.node[b, g, t] == -1 and ro.ended[b, g, t] == 0
            if t == plies: break
            assert not ro.played[b, g, t] and not ro.train[b, g, t]
            assert ro.slot[b, g, t] == 0 and ro.weight[b, g, t] == 1
            continue
        node = int(ro.node[b, g, t])
        assert ro.fens[node] == position_key(board) and ro.ended[b, g, t] == terminal(board)
        n, asked = int((ro.legal[node] >= 0).sum()), ro.logp[node] > -math.inf
        assert not asked[n:].any() and asked[:n].sum() in (0, n)
        if asked.any(): assert ro.logp[node].exp().sum() == pytest.approx(1, abs=1e-5)
        over = ro.ended[b, g, t] != 0
        if t == plies: break
        assert ro.played[b, g, t] == (not over)
        if over:
            assert not ro.train[b, g, t]
            continue
        move = ro.moves(b, g)[t]
        assert move in board.legal_moves and move_to_action(move, board.turn) == ro.legal[node, ro.slot[b, g, t]]
        board.push(move)

def check(ro, starts, c):
    "Everything that a rollout claims about its games; returns the final boards."
    B, G, T = len(starts), c.group, c.plies
    assert ro.node.shape == ro.ended.shape == (B, G, T+1)
    assert all(x.shape == (B, G, T) for x in (ro.slot, ro.played, ro.train, ro.weight))
    assert len(set(ro.fens)) == len(ro.fens) == len(ro.tokens) == len(ro.legal) == len(ro.logp)
    tokens, legal = encode([chess.Board(f) for f in ro.fens])
    assert (ro.tokens.numpy() == tokens).all() and (ro.legal.numpy() == legal).all()
    assert ro.legal.shape == ro.logp.shape
    out = []
    for b in range(B):
        for g in range(G):
            board = starts[b].copy()
            check_game(ro, b, g, board)
            plies = len(board.move_stack) - len(starts[b].move_stack)
            assert len(ro.moves(b, g)) == int(ro.played[b, g].sum()) == plies
            out.append(board)
    assert not (ro.train & ~ro.played).any()
    assert ro.action_logp().isfinite().all() and (ro.action_logp()[~ro.train] == 0).all()
    return out

def same(a, b):
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Rollout))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)

def all_moves(ro): return [ro.moves(b, g) for b in range(ro.node.shape[0]) for g in range(ro.node.shape[1])]

# ---------------------------------------------------------------- law 1

# Measured with torch 2.13 on a CPU, for this network and for `tiny`, where both passes run the same kernels: 0, to the
# last bit, in both precisions and for a position in batches of 1 to 64. Other machines may sum in another order, and
# then a few scores are wrong by units in their last place: 2^-23 of their size in float32; 2^-8 in bfloat16, but the
# mean stays small. Another attention kernel without than with a gradient moves nearly every score: at T = .5 by up to
# .11, .02 in the mean. A temperature wrong by 1.3 gives .4 to 1.5.
MEAN = 1e-3

def largest(scores, T, bf16):
    return (4*2**-8 if bf16 else 64*2**-23)*scores[scores > -math.inf].abs().max().item()/T

@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("T", [.5, 1., 1.3, 2.])
def test_ratio_one_and_kl_zero(T, bf16):
    "As the loss asks: all positions in one batch, with a gradient, through the same object."
    net = Peaked(ModelConfig(width=32, layers=2, heads=2, dropout=.3), bf16=bf16)
    policy = Policy(net, T)
    ro = rollout(policy, boards(*STARTS), cfg(plies=10), seed=1)
    rows = ro.node[..., :-1][ro.train].unique()
    limit = largest(net(ro.tokens[rows], ro.legal[rows]).detach(), T, bf16)
    again = replay_logp(policy, ro)
    assert again.requires_grad
    kl = MoveDist(ro.logp[rows]).kl(policy.dist(ro.tokens[rows], ro.legal[rows]))
    wrong = (replay_logp(policy.at(T*1.3), ro) - ro.action_logp())[ro.train]
    assert ro.temperature == T
    assert MoveDist(ro.logp[rows]).entropy().mean() > 1            # neither decided nor, at ln 30, uniform
    d = (again - ro.action_logp())[ro.train].abs()
    assert d.max() <= limit and d.mean() <= MEAN and kl.abs().max() <= limit and kl.mean() <= MEAN**2 + 1e-6
    assert wrong.abs().max() > 2*limit                             # what the tolerance must not hide

@pytest.mark.parametrize("kw", [dict(noise=.3), dict(teacher_forcing=.5), dict(learn="starter"),
                                dict(noise=.5, teacher_forcing=.3, learn="starter")], ids=str)
def test_ratio_one_with_everything_switched_on(kw):
    policy = Policy(Peaked(), 1.3)
    ro = rollout(policy, boards(*STARTS), cfg(**kw), seed=2, teacher=first_move)
    with torch.no_grad(): assert (replay_logp(policy, ro) - ro.action_logp()).abs().max() < 1e-4
    check(ro, boards(*STARTS), cfg(**kw))

def test_dropout_left_on_is_a_mismatch():
    "The switch is the module's mode: this is what `ablate.dropout` turns on, and nothing but `.eval()` turns off."
    net = Peaked(ModelConfig(width=16, layers=2, heads=2, dropout=.3)).train()
    ro = rollout(Policy(net), boards(*STARTS), cfg(), seed=1)
    with torch.no_grad(): assert (replay_logp(Policy(net), ro) - ro.action_logp()).abs().max() > .1

def test_replay_carries_a_gradient_and_only_of_plies_that_train():
    net = Peaked()
    ro = rollout(Policy(net), boards(*STARTS), cfg(learn="starter"), seed=1)
    logp = replay_logp(Policy(net), ro)
    assert logp.requires_grad and (logp[~ro.train] == 0).all()
    net.seen.clear()
    replay_logp(Policy(net), ro)
    wanted = {ro.fens[i] for i in ro.node[..., :-1][ro.train].unique().tolist()}
    assert len(net.seen) == 1 and len(net.seen[0][0]) == len(wanted)

# ---------------------------------------------------------------- laws 4 and 5

def test_games_are_legal_and_padding_is_empty():
    c, starts = cfg(group=12, plies=14), boards(*STARTS, NEAR)
    before = [b.copy() for b in starts]
    ro = rollout(Policy(Uniform()), starts, c, seed=3)
    final = check(ro, starts, c)
    assert starts == before and all(a.move_stack == b.move_stack for a, b in zip(starts, before))    # left alone
    assert not ro.played.all() and len({len(b.move_stack) for b in final}) > 2                       # ragged indeed

def asked_for(tokens, legal): return bytes(tokens.numpy()) + bytes(np.sort(legal[legal >= 0].numpy()))

def test_the_policy_is_asked_once_about_each_position_it_must_move_in():
    net, c = Peaked(gain=5.), cfg(group=10, plies=6)
    ro = rollout(Policy(net), boards(chess.STARTING_FEN, chess.STARTING_FEN, KIWIPETE, NEAR), c, seed=4)
    asked = Counter(asked_for(*pair) for batch in net.seen for pair in zip(*batch))
    rows = ro.node[..., :-1][ro.played].unique()
    assert asked == Counter(asked_for(ro.tokens[r], ro.legal[r]) for r in rows)
    assert (ro.logp[rows] > -math.inf).any(-1).all()
    assert len(net.seen) <= c.plies and sum(len(t) for t, _ in net.seen) == len(rows)
    rest = torch.ones(len(ro.fens), dtype=torch.bool)
    rest[rows] = False
    assert rest.any() and (ro.logp[rest] == -math.inf).all()

def test_a_position_met_again_at_a_later_ply_is_not_asked_again():
    start, later, sizes = chess.Board(), with_history("e2e4 e7e5"), []
    policy = line(start, "e2e4", "e7e5", "g1f3", "b8c6", "f1b5")
    policy.model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    ro = rollout(policy, [start, later], SamplerConfig(group=2, plies=2))
    assert sizes == [2, 2] and ro.node[0, 0, 2] == ro.node[1, 0, 0]        # the second game starts where the other is
    sizes.clear()
    rollout(policy, [start, later], SamplerConfig(group=2, plies=3))
    assert sizes == [2, 2, 1]                                              # at ply 2 only one position is new

def test_same_seed_same_rollout():
    def run(seed=5, step=7, first=0):
        torch.manual_seed(random.randrange(10**6))                         # hidden generators must not matter
        np.random.seed(random.randrange(10**6))
        c = cfg(noise=.2, teacher_forcing=.4)
        return rollout(Policy(Peaked(), 1.3), boards(*STARTS), c, seed, step, first, teacher=first_move)
    base = run()
    assert same(base, run())
    for other in (run(seed=6), run(step=8), run(first=1)):
        assert other.fens != base.fens and (base.weight != other.weight).any()
        assert all_moves(base) != all_moves(other)

@pytest.mark.parametrize("kw", [{}, dict(noise=.3), dict(teacher_forcing=.5), dict(learn="starter")], ids=str)
@pytest.mark.parametrize("cut", [[1, 3], [2, 2], [1, 1, 1, 1], [3, 1]], ids=str)
def test_a_batch_may_be_cut_anywhere(cut, kw):
    c, starts = cfg(plies=6, **kw), boards(*STARTS)
    whole, first = rollout(Policy(Peaked()), starts, c, 9, 2, teacher=first_move), 0
    for n in cut:
        part = rollout(Policy(Peaked()), starts[first:first+n], c, 9, 2, first, teacher=first_move)
        for b in range(n):
            assert [whole.moves(first+b, g) for g in range(6)] == [part.moves(b, g) for g in range(6)]
            for name in ("slot", "played", "train", "ended"):
                assert torch.equal(getattr(whole, name)[first+b], getattr(part, name)[b])
            torch.testing.assert_close(whole.action_logp()[first+b], part.action_logp()[b], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(whole.weight[first+b], part.weight[b], rtol=1e-4, atol=1e-5)
        first += n

def test_siblings_and_boards_have_their_own_numbers():
    index, shape = list(range(6)), (5, 7)
    u = uniforms(0, 0, index, shape)
    assert u.shape == (6, 5, 7) and len(np.unique(u)) == u.size
    assert (u >= 0).all() and (u < 1).all() and abs(u.mean() - .5) < .1
    for other in (uniforms(0, 0, index, shape, purpose=1), uniforms(1, 0, index, shape), uniforms(0, 1, index, shape)):
        assert not np.isin(u, other).any()
    assert (uniforms(0, 0, [2, 3], shape) == u[2:4]).all()                 # a board's numbers are its own
    same_start = rollout(Policy(Uniform()), [chess.Board()]*3, cfg(plies=4), seed=0)
    assert len(set(map(tuple, all_moves(same_start)))) == 18

def chi_square(seen, want):
    "Chi-square over the cells with more than five expected, and the largest that chance should give."
    keep = want > 5
    return ((seen - want)**2/want)[keep].sum().item(), int(keep.sum()) + 3.1*math.sqrt(2*int(keep.sum())) + 6

def test_moves_are_drawn_as_often_as_the_policy_says():
    "2,000 games of one ply, against the recorded probabilities."
    policy = Policy(Peaked(gain=20.), 1.5)
    ro = rollout(policy, [chess.Board()]*20, SamplerConfig(group=100, plies=1), seed=11)
    want = ro.logp[0].exp().double()*2000
    seen = torch.bincount(ro.slot.flatten(), minlength=len(want)).double()
    chi, limit = chi_square(seen, want)
    assert (want > 5).sum() > 8 and chi < limit

def test_a_recorded_distribution_is_the_policys_own():
    policy = Policy(Peaked(), .7)
    ro = rollout(policy, boards(*STARTS), cfg(), seed=1)
    for r in ro.node[..., :-1][ro.played].unique().tolist():
        with torch.no_grad(): want = policy.dist(*map(torch.as_tensor, encode([chess.Board(ro.fens[r])]))).logp[0]
        torch.testing.assert_close(ro.logp[r, :len(want)], want, rtol=1e-4, atol=1e-4)

# ---------------------------------------------------------------- how games end

class Line(nn.Module):
    "Plays fixed lines: by tokens of the position, the moves that are wanted."
    def __init__(self, book):
        super().__init__()
        self.book = book
    def forward(self, tokens, legal):
        out = torch.full(legal.shape, -1e4).masked_fill(legal < 0, -math.inf)
        for row, position, actions in zip(out, tokens, legal):
            row[torch.isin(actions, torch.tensor(self.book[bytes(position.numpy())]))] = 0.
        return out

def line(start, *moves):
    "The policy that plays this line from this start, and nothing else."
    book, b = {}, start.copy()
    for m in moves:
        book.setdefault(bytes(encode([b])[0][0]), []).append(move_to_action(chess.Move.from_uci(m), b.turn))
        b.push_uci(m)
    return Policy(Line(book))

ENDS = [
    ("6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 1", "a1a8", Terminal.CHECKMATE),
    ("r5k1/5ppp/8/8/8/8/5PPP/6K1 b - - 0 1", "a8a1", Terminal.CHECKMATE),
    ("7k/8/6K1/5Q2/8/8/8/8 w - - 0 1", "f5f7", Terminal.STALEMATE),
    (BARE_KING, "e1d2", Terminal.INSUFFICIENT),
    ("6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 99 80", "a1b1", Terminal.FIFTY),
    ("6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 99 80", "a1a8", Terminal.CHECKMATE)]

@pytest.mark.parametrize("fen, move, kind", ENDS, ids=str)
def test_every_kind_of_end(fen, move, kind):
    start, c = chess.Board(fen), SamplerConfig(group=3, plies=4)
    ro = rollout(line(start, move), [start], c)
    check(ro, [start], c)
    assert (ro.ended[0, :, 1] == kind).all() and ro.played.sum(-1).tolist() == [[1]*3]
    assert (ro.node[0, :, 2:] == -1).all()

SHUFFLE = "g1f3 g8f6 f3g1 f6g8"

def test_repetition_counts_the_starts_own_history():
    start = with_history(f"{SHUFFLE} g1f3 g8f6 f3g1")                      # one move from the third time
    c = SamplerConfig(group=3, plies=5)
    ro = rollout(line(start, "f6g8"), [start], c)
    check(ro, [start], c)
    assert (ro.ended[0, :, 1] == Terminal.REPETITION).all() and (ro.played.sum(-1) == 1).all()
    bare = chess.Board(start.fen())                                        # the same position without its history
    ro = rollout(line(bare, "f6g8", "e2e4"), [bare], SamplerConfig(group=2, plies=2))
    assert (ro.ended == 0).all() and ro.played.all()

def test_a_repetition_inside_of_a_rollout():
    start, c = chess.Board(), SamplerConfig(group=2, plies=12)
    ro = rollout(line(start, *SHUFFLE.split()*2), [start], c)
    final = check(ro, [start], c)
    assert (ro.played.sum(-1) == 8).all() and (ro.ended[0, :, 8] == Terminal.REPETITION).all()
    assert final[0].is_repetition(3)
    assert len(ro.fens) == 9                                               # the clock is part of the position

def test_a_position_may_be_the_end_of_one_game_and_not_of_another():
    "The same row of the table, by history a draw in one game and open in the other; the judge must hear of it."
    old, told = with_history(f"{SHUFFLE} g1f3 g8f6 f3g1"), []
    new = chess.Board(old.fen())
    for starts in ([old, new], [new, old]):
        told.clear()
        c = SamplerConfig(group=2, plies=2)
        ro = rollout(line(new, "f6g8", "e2e4"), starts, c, on_new=told.extend)
        check(ro, starts, c)
        k = 0 if starts[0] is old else 1
        assert (ro.ended[k, :, 1] == Terminal.REPETITION).all() and (ro.ended[1-k] == 0).all()
        assert ro.node[0, 0, 1] == ro.node[1, 0, 1]
        assert ro.played[1-k].all() and not ro.played[k, :, 1].any()
        assert ro.fens[ro.node[0, 0, 1]] in told

def test_the_judge_is_told_of_every_open_position_once_and_of_no_end():
    told, c = [], SamplerConfig(group=12, plies=8)
    ro = rollout(Policy(Uniform()), boards(*STARTS, NEAR, BARE_KING), c, seed=1, on_new=told.extend)
    def fens(mask): return {ro.fens[i] for i in ro.node[mask].tolist()}
    unfinished, over = fens((ro.ended == 0) & (ro.node >= 0)), fens(ro.ended > 0)
    assert len(told) == len(set(told)) and unfinished <= set(told)
    assert not set(told) & (over - fens(ro.ended == Terminal.REPETITION))
    assert len(over) > 3

@pytest.mark.parametrize("learn, share", [("both", 0.), ("starter", 0.), ("both", .5)])
def test_positions_where_the_policy_learns_are_told_before_it_is_asked(learn, share):
    "Each once, all of those that train and no other; and the games are the same as without."
    told, known = [], []
    class Asked(Uniform):
        def forward(self, tokens, legal):
            known.append(len(told))
            return super().forward(tokens, legal)
    c = SamplerConfig(group=5, plies=6, learn=learn, teacher_forcing=share)
    starts, teacher = boards(*STARTS, NEAR), (lambda fens: [next(iter(chess.Board(f).legal_moves)).uci() for f in fens])
    ro = rollout(Policy(Asked()), starts, c, seed=2, teacher=teacher, on_turn=told.extend)
    assert sorted(told) == sorted(ro.fens[r] for r in ro.node[..., :-1][ro.train].unique().tolist())
    assert known[0] == len(STARTS) + 1 and known[-1] == len(told)
    plain = rollout(Policy(Uniform()), starts, c, seed=2, teacher=teacher)
    assert torch.equal(plain.node, ro.node) and torch.equal(plain.logp, ro.logp)

FINISHED = ["rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3", "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1",
            "4k3/8/8/8/8/8/8/4K3 w - - 0 1", "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 100 80"]

@pytest.mark.parametrize("fen", FINISHED)
def test_a_finished_start_raises_before_anything_is_played(fen):
    net = Peaked()
    with pytest.raises(ValueError, match="finished") as e:
        rollout(Policy(net), boards(chess.STARTING_FEN, fen), cfg(), on_new=None)
    assert chess.Board(fen).board_fen() in str(e.value) and not net.seen

def test_a_start_that_its_history_has_finished_raises():
    with pytest.raises(ValueError, match="finished"):
        rollout(Policy(Peaked()), [with_history(f"{SHUFFLE} {SHUFFLE}")], cfg())

ILLEGAL = {"no king": "rnbq1bnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w - - 0 1",
           "king can be taken": "4k3/4Q3/8/8/8/8/8/4K3 w - - 0 1",
           "pawn on the last rank": "P3k3/8/8/8/8/8/8/4K2R w - - 0 1",
           "two kings": "kk6/8/8/8/8/8/8/K6R w - - 0 1", "empty": "8/8/8/8/8/8/8/8 w - - 0 1"}

@pytest.mark.parametrize("fen", ILLEGAL.values(), ids=ILLEGAL)
def test_an_illegal_start_raises(fen):
    net, told = Peaked(), []
    with pytest.raises(ValueError): rollout(Policy(net), boards(chess.STARTING_FEN, fen), cfg(), on_new=told.extend)
    assert not net.seen and not told                                       # Stockfish dies of such positions

# ---------------------------------------------------------------- the teacher, and who learns

@pytest.mark.parametrize("learn", ["both", "starter"])
@pytest.mark.parametrize("share", [.5, 1.])
def test_teacher_forcing(share, learn):
    asked = []
    def teacher(fens):
        assert len(set(fens)) == len(fens)
        asked.extend(fens)
        return first_move(fens)
    c, starts = cfg(group=20, teacher_forcing=share, learn=learn), boards(*STARTS)
    ro = rollout(Policy(Peaked(gain=5.)), starts, c, seed=3, teacher=teacher)
    check(ro, starts, c)
    forced, teachers = uniforms(3, 0, [0, 1, 2, 3], (20, 8), purpose=1) < share, 0
    for b in range(4):
        for g in range(20):
            for t, move in enumerate(ro.moves(b, g)):
                taught = t % 2 == 1 and forced[b, g, t]
                teachers += taught
                assert bool(ro.train[b, g, t]) == (t % 2 == 0 or (learn == "both" and not taught))
                if not taught: continue
                fen = ro.fens[ro.node[b, g, t]]
                assert [move.uci()] == first_move([fen]) and fen in asked
    assert teachers > 50 and ro.train[..., ::2].equal(ro.played[..., ::2])
    if share == 1: assert not ro.train[..., 1::2].any()

def test_the_teacher_does_not_change_the_policys_own_numbers():
    "The random numbers of moves and of forcing are apart: first plies agree with and without a teacher."
    def play(share):
        return rollout(Policy(Peaked()), boards(*STARTS), cfg(teacher_forcing=share), seed=3, teacher=first_move)
    a, b = play(0.), play(1.)
    assert torch.equal(a.slot[..., 0], b.slot[..., 0]) and not torch.equal(a.slot[..., 1], b.slot[..., 1])

@pytest.mark.parametrize("answer", ["a1a1", "e7e4", "0000", "huh"])
def test_a_teachers_illegal_move_raises(answer):
    with pytest.raises((ValueError, IndexError, KeyError)):
        rollout(Policy(Uniform()), [chess.Board()], cfg(teacher_forcing=1.), teacher=lambda fens: [answer]*len(fens))

def test_a_missing_teacher_raises():
    with pytest.raises(ValueError, match="teacher"):
        rollout(Policy(Uniform()), [chess.Board()], cfg(teacher_forcing=.1))
    with pytest.raises(KeyError):
        rollout(Policy(Uniform()), [chess.Board()], cfg(teacher_forcing=1.), teacher=lambda fens: first_move(fens)[:-1])

def test_learn_starter():
    starts = boards(*STARTS)
    ro = rollout(Policy(Peaked()), starts, cfg(learn="starter"), seed=3)
    both = rollout(Policy(Peaked()), starts, cfg(), seed=3)
    values = {f.name: getattr(both, f.name) for f in fields(Rollout)}
    assert same(ro, Rollout(**values | dict(train=ro.train)))              # the same games
    assert torch.equal(ro.train, ro.played & (torch.arange(8) % 2 == 0)) and torch.equal(both.train, both.played)

# ---------------------------------------------------------------- root noise

def mixtures(ro, noise, seed, step):
    "π and the mixture μ of each board from its formula, in float64."
    for b in range(len(ro.node)):
        pi = ro.logp[ro.node[b, 0, 0]].double().exp().numpy()
        pi = pi[pi > 0]
        eta = np.random.default_rng([seed, step, b, 2]).dirichlet([NOISE_ALPHA]*len(pi))
        yield pi, (1-noise)*pi + noise*eta

@pytest.mark.parametrize("noise", [.25, .5, .9])
def test_root_noise_weights_are_pi_over_mu(noise):
    c = cfg(group=64, plies=3, noise=noise)
    ro = rollout(Policy(Peaked(gain=10.)), boards(*STARTS), c, seed=5, step=3)
    check(ro, boards(*STARTS), c)
    seen = set()
    for b, (pi, mu) in enumerate(mixtures(ro, noise, 5, 3)):
        seen.add(tuple(mu.round(6)))
        for g, slot in enumerate(ro.slot[b, :, 0].tolist()):
            assert ro.weight[b, g, 0].item() == pytest.approx(pi[slot]/mu[slot], rel=1e-4)
        assert (ro.action_logp()[b, :, 0] == ro.logp[ro.node[b, 0, 0]][ro.slot[b, :, 0]]).all()   # π is recorded, not μ
        assert (mu*(pi/mu)).sum() == pytest.approx(1, abs=1e-5)
    assert (ro.weight[..., 1:] == 1).all() and ro.weight.max() <= 1/(1-noise) + 1e-4
    assert len(seen) == 4

def test_root_noise_draws_follow_mu_and_weights_undo_it():
    c = SamplerConfig(group=3000, plies=1, noise=.5)
    ro = rollout(Policy(Peaked(gain=10.)), boards(chess.STARTING_FEN, KIWIPETE), c, seed=8)
    for b, (pi, mu) in enumerate(mixtures(ro, .5, 8, 0)):
        slot, weight = ro.slot[b, :, 0].numpy(), ro.weight[b, :, 0].numpy()
        seen = np.bincount(slot, minlength=len(mu))
        chi, limit = chi_square(seen, mu*3000)
        assert (mu*3000 > 5).sum() > 5 and chi < limit
        assert ((seen - pi*3000)**2/np.maximum(pi*3000, 5)).sum() > 3*chi  # and surely not π
        f = np.cos(np.arange(len(pi)))                                     # E_mu[w f] = E_pi[f]
        assert abs((weight*f[slot]).mean() - (pi*f).sum()) < 4*(weight*f[slot]).std()/math.sqrt(3000)

@pytest.mark.parametrize("alpha", [.05, .3, 10.])
def test_root_noise_formula(alpha):
    logp = np.log(np.array([.7, .2, .1 - 1e-9, 1e-9]))
    got = np.exp(root_noise(logp, np.random.default_rng(1), .25, alpha))
    want = .75*np.exp(logp) + .25*np.random.default_rng(1).dirichlet([alpha]*4)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-29)
    assert np.isfinite(root_noise(np.array([0., -1e4]), np.random.default_rng(1), .25, alpha)).all()

# ---------------------------------------------------------------- measures of the group

def slow_agreement(ro):
    out = []
    for b in range(len(ro.node)):
        for t in range(ro.slot.shape[-1]):
            games = [g for g in range(ro.node.shape[1]) if ro.train[b, g, t]]
            actions = [int(ro.legal[ro.node[b, g, t], ro.slot[b, g, t]]) for g in games]
            if len(actions) > 1: out.append(Counter(actions).most_common(1)[0][1]/len(actions))
    return out

def full_row(ro, b, g, t):
    "Probabilities of all 1968 actions in the position of one game."
    row, r = np.zeros(1968), ro.node[b, g, t]
    for action, logp in zip(ro.legal[r].tolist(), ro.logp[r].tolist()):
        if action >= 0: row[action] = math.exp(logp)
    return row

def slow_diversity(ro, floor, max_boards):
    pair, centre = [], []
    for b in range(min(max_boards, len(ro.node))):
        for t in range(ro.slot.shape[-1]):
            P = [full_row(ro, b, g, t) for g in range(ro.node.shape[1]) if ro.train[b, g, t]]
            if len(P) < 2: continue
            Q = [(1-floor)*p + floor/1968 for p in P]
            pair.append(np.mean([(p*np.log(p/q)).sum() for p in Q for q in Q if p is not q]))
            m = np.mean(P, 0)
            centre.append(np.mean([(p[p > 0]*np.log(p[p > 0]/m[p > 0])).sum() for p in P]))
    return dict(pairwise_kl=np.mean(pair), kl_to_mean=np.mean(centre))

@pytest.mark.parametrize("kw", [{}, dict(learn="starter"), dict(teacher_forcing=.5)], ids=str)
def test_agreement_and_diversity_against_loops(kw):
    starts, c = boards(*STARTS, NEAR), cfg(group=5, plies=5, **kw)
    ro = rollout(Policy(Peaked(gain=30.)), starts, c, seed=6, teacher=first_move)
    want = slow_agreement(ro)
    assert action_agreement(ro).tolist() == pytest.approx(want) and len(set(want)) > 3
    stats = dict(agreement_mean=np.mean(want), agreement_p90=np.quantile(want, .9))
    assert agreement_stats(ro) == pytest.approx(stats, rel=1e-5)
    for floor, most in ((1e-3, 8), (.1, 2)):
        assert policy_diversity(ro, floor, most) == pytest.approx(slow_diversity(ro, floor, most), rel=1e-3, abs=2e-5)

@pytest.mark.parametrize("floor", [0., -.1, 1.1, math.nan])
def test_diversity_refuses_a_floor_that_leaves_the_kl_infinite(floor):
    ro = rollout(Policy(Peaked()), [chess.Board()], SamplerConfig(group=2, plies=2))
    with pytest.raises(ValueError, match="floor"): policy_diversity(ro, floor)

def test_measures_of_a_collapsed_group():
    start = chess.Board()
    ro = rollout(line(start, "e2e4", "e7e5", "g1f3"), [start]*2, SamplerConfig(group=4, plies=3))
    assert (action_agreement(ro) == 1).all() and agreement_stats(ro) == dict(agreement_mean=1, agreement_p90=1)
    assert policy_diversity(ro) == pytest.approx(dict(pairwise_kl=0, kl_to_mean=0), abs=1e-5)
    assert within_spread(torch.tensor([[1., 1., 4.], [2., 2., 2.]])).tolist() == pytest.approx([math.sqrt(2), 0])

def test_a_group_of_one_has_nothing_to_agree_with():
    ro = rollout(Policy(Peaked()), [chess.Board()], SamplerConfig(group=1, plies=3))
    assert len(action_agreement(ro)) == 0 and agreement_stats(ro) == dict(agreement_mean=1, agreement_p90=1)
    assert policy_diversity(ro) == dict(pairwise_kl=0, kl_to_mean=0)

# ---------------------------------------------------------------- the ratio as exact sums

def two_policies(n=5, most=7, seed=0, T=(1.3, 1.)):
    "Ragged positions, scores and advantages; one position with a single move."
    g = torch.Generator().manual_seed(seed)
    counts = [1, *torch.randint(2, most+1, (n-1,), generator=g).tolist()]
    z, adv = torch.randn(n, most, generator=g)*2, torch.randn(n, most, generator=g)
    for i, c in enumerate(counts): z[i, c:] = -math.inf
    return counts, z, adv, MoveDist.from_logits(z, T[0]), MoveDist.from_logits(z, T[1])

def gradient_is_zero(ratio, A, epsilon):
    "The loss's own gradient is the judge of what the clip binds."
    x = torch.tensor(ratio, requires_grad=True)
    clipped_surrogate(x, torch.tensor(A), epsilon, epsilon).backward()
    return x.grad.item() == 0

@pytest.mark.parametrize("epsilon", [.2, .05])
def test_expected_ratio_stats_against_a_loop(epsilon):
    counts, z, adv, old, new = two_policies()
    rows, logs = [], []
    for i, c in enumerate(counts):
        for a in range(c):
            p, q = (math.exp(z[i, a].item()/T)/sum(math.exp(x/T) for x in z[i, :c].tolist()) for T in (1.3, 1.))
            r, A, w = q/p, adv[i, a].item(), p/len(counts)
            logs.append(abs(math.log(r)))
            rows.append(dict(clip_region=w*(abs(r-1) > epsilon), clip_binding=w*gradient_is_zero(r, A, epsilon),
                             mean_ratio=w*r, ess=w*r*r, approx_kl=-w*math.log(r), entropy=-w*math.log(q)))
    want = {key: sum(row[key] for row in rows) for key in rows[0]}
    want |= dict(ess=1/want["ess"], max_log_ratio=max(logs))
    got = expected_ratio_stats(old, new, adv, epsilon)
    assert got == pytest.approx(want, rel=1e-5) and got["mean_ratio"] == pytest.approx(1, abs=1e-6)
    assert 0 < got["clip_binding"] < got["clip_region"]
    assert got["approx_kl"] == pytest.approx(old.kl(new).mean().item(), rel=1e-4)
    del got["clip_binding"]
    assert expected_ratio_stats(old, new, epsilon=epsilon) == got

def test_expected_ratio_stats_is_what_a_log_converges_to():
    "Against the sampled statistics of the loss, on many draws."
    _, z, adv, old, new = two_policies(n=6, seed=3)
    n = 40_000
    u = torch.as_tensor(uniforms(0, 0, list(range(6)), (n,)))
    slot = torch.stack([MoveDist(o.expand(n, -1)).sample(x) for o, x in zip(old.logp, u)])           # [6, n]
    logp, logp_old, advantage = (x.gather(1, slot) for x in (new.logp, old.logp, adv))
    sampled = ratio_stats(logp, logp_old, advantage, torch.ones(6, n, dtype=torch.bool), LossConfig())
    exact = expected_ratio_stats(old, new, adv)
    for key in ("clip_region", "clip_binding", "mean_ratio", "approx_kl", "ess"):
        assert sampled[key] == pytest.approx(exact[key], abs=.01), key
    assert -logp.mean().item() == pytest.approx(exact["entropy"], abs=.02)
    assert sampled["max_log_ratio"] <= exact["max_log_ratio"] + 1e-6

def test_expected_ratio_stats_limits():
    _, z, adv, old, new = two_policies()
    equal = expected_ratio_stats(old, old, adv)
    assert equal.pop("entropy") == pytest.approx(old.entropy().mean().item(), rel=1e-5)
    assert equal == dict(clip_region=0, clip_binding=0, mean_ratio=pytest.approx(1), ess=pytest.approx(1), approx_kl=0,
                         max_log_ratio=0)
    padded = [MoveDist(nn.functional.pad(d.logp, (0, 3), value=-math.inf)) for d in (old, new)]      # padding is silent
    got = expected_ratio_stats(*padded, nn.functional.pad(adv, (0, 3), value=9.))
    assert got == pytest.approx(expected_ratio_stats(old, new, adv))
    torch.manual_seed(1)                                      # any two policies: mean ratio 1, whatever else
    other = MoveDist.from_logits(torch.where(z > -math.inf, torch.randn_like(z)*4, z))
    far = expected_ratio_stats(old, other)
    assert far["mean_ratio"] == pytest.approx(1, abs=1e-5) and far["clip_region"] > .3 and far["ess"] < .5

@pytest.mark.parametrize("T", [(1.3, 1.), (1., 1.3), (.7, 2.)], ids=str)
def test_two_temperatures_bias_the_gradient_only_by_the_clip(T):
    "Unclipped, the expected gradient of the surrogate is the on-policy one of the loss's temperature; clipped, not."
    _, z, adv, old, _ = two_policies(n=20, seed=5, T=T)
    def gradient(epsilon, on_policy=False):
        x = z.clone().requires_grad_()
        new = MoveDist.from_logits(x, T[1])
        behaviour = MoveDist(new.logp.detach()) if on_policy else old
        ratio = (new.finite - behaviour.finite).exp()
        total = (behaviour.probs*clipped_surrogate(ratio, adv, epsilon, epsilon)).sum()
        return torch.autograd.grad(total, x)[0].nan_to_num(0.)
    exact = gradient(math.inf, on_policy=True)
    assert torch.allclose(gradient(math.inf), exact, atol=1e-5)
    assert torch.allclose(gradient(.2, on_policy=True), exact, atol=1e-5)
    assert (gradient(.2) - exact).norm() > .1*exact.norm()

# ---------------------------------------------------------------- settings

def test_schedule():
    c = SamplerConfig(temperature=1.5, temperature_end=.5)
    assert [temperature_at(c, x) for x in (0., .25, .5, 1.)] == pytest.approx([1.5, 1.25, 1., .5])
    assert {temperature_at(SamplerConfig(temperature=1.3), x) for x in (0., .3, 1.)} == {1.3}
    assert temperature_at(SamplerConfig(temperature=.5, temperature_end=2.), 1.) == 2

REFUSED = [dict(boards=0), dict(group=0), dict(plies=0), dict(learn="white"), dict(temperature=0.),
           dict(temperature=-1.), dict(temperature_end=-1.), dict(teacher_forcing=1.1), dict(teacher_forcing=-.1),
           dict(noise=1.), dict(noise=-.1), dict(noise=math.nan), dict(teacher_depth=0), dict(temperature=math.nan),
           dict(temperature_end=math.nan)]

@pytest.mark.parametrize("kw", REFUSED, ids=str)
def test_config_refuses(kw):
    name, value = next(iter(kw.items()))
    with pytest.raises(ValueError, match=rf"sampler\.{name} = {value!r} must be"): SamplerConfig(**kw)

def test_broken_weights_are_named():
    class Broken(nn.Module):
        def forward(self, tokens, legal): return torch.full(legal.shape, math.nan)
    with pytest.raises(FloatingPointError, match="NaN"): rollout(Policy(Broken()), [chess.Board()], cfg())

def test_the_table_of_positions():
    table, b, later = Positions(), chess.Board(), with_history("e2e4")
    assert table.add([b, b, later]) == ([0, 0, 1], [0, 1]) and table.add([later, b]) == ([1, 0], [])
    other = chess.Board()
    other.fullmove_number = 30
    assert table.add([other]) == ([0], [])                                 # the move number is no part of the position
    assert len(table) == 2 and [len(row) for row in table.legal] == [20, 20] and table.logp == [None, None]

def test_padded_rows():
    rows = [np.array([1, 2]), np.array([]), np.array([3])]
    assert pad_rows(rows, -1, np.int16).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert pad_rows([np.array([])], 0, float).shape == (1, 1) and pad_rows(rows, 0, float, width=4).shape == (3, 4)
