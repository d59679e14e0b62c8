"Games whose moves the judge's values choose: drawn as told, judged once, and the policy's again when they end."

import math

import chess
import numpy as np
import pytest
import torch

from grpo_chess.guided import UNIFORM, Guide, chooser, draw_valued
from grpo_chess.model import ChessTransformer, Policy
from grpo_chess.reward import Judge, RewardConfig, move_values, win_probability
from grpo_chess.sampler import SamplerConfig, draw, rollout
from small import QUEEN, SMALL, make, steps, weights

ALL = dict(moves="all", entropy_coef=0.0)
GAMES = dict(boards=4, group=1, plies=6)
STARTS = [chess.STARTING_FEN, QUEEN, "8/8/8/4k3/8/4K3/4P3/8 w - - 96 80", "6k1/5ppp/8/8/8/8/5PPP/R5K1 w - - 0 80"]

LOCKED = "k7/8/8/p1p1p1p1/P1P1P1P1/8/8/7K w - - 0 1"  # only the kings can move


class Counting(Judge):
    "A judge that remembers which positions it was asked about."

    def __init__(self):
        super().__init__(RewardConfig(judge="material"))
        self.seen = []

    def of_moves(self, fens, legal):
        self.seen += fens
        return super().of_moves(fens, legal)


def next_of(board):
    "The positions after each legal move."
    for move in board.legal_moves:
        after = board.copy()
        after.push(move)
        yield after


def play(judge, seed=0, step=0, first=0, starts=STARTS, **kw):
    cfg = SamplerConfig(**GAMES | kw)
    torch.manual_seed(0)
    guide = Guide(judge, cfg, seed, step, range(first, first + len(starts)))
    policy = Policy(ChessTransformer(SMALL).eval())
    return rollout(policy, [chess.Board(f) for f in starts], cfg, seed, step, first, choose=guide)


def test_moves_are_drawn_from_the_mixture():
    rng, scores = np.random.default_rng(0), np.array([[300, 250, -100, 20, 7777]])
    win = win_probability(scores[0, :4]).astype(float)
    for tau, uniform in ((0.02, 0.0), (0.02, 0.3), (0.1, 0.15)):
        p = np.exp(win / tau)
        p, n = (1 - uniform) * p / p.sum() + uniform / 4, 40_000
        value = win_probability(np.repeat(scores, n, 0))
        drawn = draw_valued(value, np.full(n, 4), np.full(n, tau), uniform, rng.random(n))
        assert np.abs(np.bincount(drawn, minlength=5) / n - [*p, 0]).max() < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("group", [1, 3])
def test_a_position_is_judged_once_and_every_ply_trains(group):
    judge = Counting()
    later = [b.fen() for once in next_of(chess.Board(LOCKED)) for b in next_of(once)]  # one is met at the second ply
    ro = play(judge, starts=[*STARTS, LOCKED, *later], boards=5 + len(later), group=group)
    assert {*ro.node[len(STARTS), :, 2].tolist()} <= {*ro.node[len(STARTS) + 1 :, :, 0].flatten().tolist()}
    assert len(judge.seen) == len({*judge.seen}) and ro.train.equal(ro.played) and ro.played[..., 0].all()
    asked, value = len(judge.seen), move_values(ro, judge)
    assert len(judge.seen) == asked
    ro.value = None
    again = move_values(ro, judge)
    rows = ro.node[..., :-1][ro.train].unique()
    assert torch.equal(value[rows], again[rows]) and {ro.fens[r] for r in rows} == {*judge.seen}
    assert ro.logp[rows].exp().sum(-1).allclose(torch.ones(len(rows)))  # the policy's, who did not choose


def test_the_best_move_is_played_but_for_the_random_plies():
    "A free queen is worth far more than tau in every game: only random plies leave it."
    ro = play(Judge(RewardConfig(judge="material")), starts=[QUEEN] * 4, group=500, plies=1)
    best = move_values(ro, Judge(RewardConfig(judge="material")))[0].argmax()
    moves = int((ro.legal[0] >= 0).sum())
    share = (ro.slot == best).float().mean().item()
    assert abs(share - (1 - UNIFORM + UNIFORM / moves)) < 0.03


def test_games_are_a_function_of_seed_step_and_board():
    whole, again, other = (play(Counting(), seed) for seed in (3, 3, 4))
    assert torch.equal(whole.slot, again.slot) and not torch.equal(whole.slot, other.slot)
    parts = [play(Counting(), 3, first=k, starts=STARTS[k : k + 2]) for k in (0, 2)]
    assert torch.equal(whole.slot, torch.cat([p.slot for p in parts]))


def test_a_run_is_guided_for_its_share_and_then_plays_itself():
    "Who chose is seen in the games: those of the policy are the ones that it plays without a guide."
    t = make(sampler=dict(group=1, guided=0.5), loss=ALL, steps=4)
    plain = make(sampler=dict(group=1), loss=ALL, steps=4)
    same = []
    for _ in range(4):
        plain.load_weights(t.weights())
        t.step(), plain.step()
        same.append(torch.equal(t.games.slot, plain.games.slot) and t.games.fens == plain.games.fens)
    assert same == [False, False, True, True]
    cfg = SamplerConfig(guided=0.5)
    judge = Judge(RewardConfig(judge="material"))
    assert isinstance(chooser(judge, cfg, 0, 0, range(4), 0.49), Guide) and chooser(judge, cfg, 0, 0, [0], 0.5) is draw


def test_a_guided_run_repeats_itself_and_learns():
    def run():
        loss = ALL | dict(surrogate="improved", scale="none", tau=0.1)
        t = make(sampler=dict(group=1, guided=1.0), loss=loss, steps=3)
        before = weights(t)
        return steps(t, 3), before, weights(t)

    (rows, before, after), (again, *_) = run(), run()
    assert rows == again and not torch.equal(before, after)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_a_share_is_between_0_and_1(wrong):
    with pytest.raises(ValueError, match="sampler.guided"):
        SamplerConfig(guided=wrong)


def test_sampled_moves_must_be_the_policy_s_own():
    with pytest.raises(ValueError, match="sampler.guided.*loss.moves = all"):
        make(sampler=dict(guided=0.5))


@pytest.mark.parametrize("beside", [dict(noise=0.25), dict(teacher_forcing=0.5), dict(learn="starter")], ids=str)
def test_a_guide_chooses_every_move(beside):
    SamplerConfig(**beside)
    with pytest.raises(ValueError, match="sampler.guided = 0.5 must be 0 beside"):
        SamplerConfig(guided=0.5, **beside)


def test_a_guide_needs_win_probabilities():
    with pytest.raises(ValueError, match="reward.scale = win"):
        play(Judge(RewardConfig(judge="material", scale="cp")))
