"From a rollout to the loss: precision, advantages of sampled and of all moves, micro-batches."
import math

import chess
import numpy as np
import pytest
import torch

from grpo_chess import batch
from grpo_chess.batch import choose_precision, make_fabric, micro_batches
from grpo_chess.board import action_to_move, encode
from grpo_chess.loss import group_advantage
from grpo_chess.panel import draw_panel
from grpo_chess.reward import material, step_rewards
from small import QUEEN, always, gradient, make

# Precision

def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(monkeypatch):
    for has, name in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(batch, "cpu_has_bf16", lambda has=has: has)
        assert make_fabric("auto", "cpu").strategy.precision.precision == name == choose_precision("auto", cuda=False)

def test_auto_on_a_gpu_is_bfloat16_or_else_float16(monkeypatch):
    for has, name in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose_precision("auto", cuda=True) == name

def test_a_precision_that_is_asked_for_is_taken():
    assert make_fabric("bf16-mixed", "cpu").strategy.precision.precision == "bf16-mixed"
    assert choose_precision("32-true", cuda=True) == "32-true" and choose_precision("16-mixed", cuda=True) == "16-mixed"
    with pytest.raises(ValueError, match="16-mixed needs a GPU"): make_fabric("16-mixed", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"): make_fabric("auto", "cuda")

# The step is the gradient of the formula

@pytest.mark.parametrize("noise", [0., .5])
def test_first_update_is_the_policy_gradient(noise):
    "On fresh games the loss's gradient is -Σ w A ∇log π, computed here from boards; w = π/μ under root noise."
    t = make(micro_batch=7, loss=dict(scale="none"), sampler=dict(noise=noise))
    played = t.play()
    ro = played.rollout
    adv = group_advantage(step_rewards(ro, t.judge), ro.train)
    assert ((ro.weight - 1).abs().max() > .1) == bool(noise)
    total = 0.
    for b in range(6):
        for g in range(4):
            board = t.starts(0, 0, 6)[b]
            for step, move in enumerate(ro.moves(b, g)):
                tokens, legal = map(torch.as_tensor, encode([board]))
                action = int(ro.legal[ro.node[b, g, step], ro.slot[b, g, step]])
                slot = legal[0].tolist().index(action)
                logp = t.model(tokens, legal).log_softmax(-1)[0, slot]
                total = total - ro.weight[b, g, step]*adv[b, g, step]*logp
                board.push(move)
    (total/ro.train.sum()).backward()
    by_hand = gradient(t).clone()
    t.optimizer.zero_grad()
    t.minibatch(played, list(range(6)))
    assert torch.allclose(gradient(t), by_hand, atol=1e-7, rtol=1e-3) and gradient(t).abs().max() > 1e-4

@pytest.mark.parametrize("noise", [0., .6])
def test_sampled_moves_converge_to_all_moves(noise):
    "One start, one ply, a large group: the sampled gradient is the exact one, up to noise, and π/μ undoes root noise."
    def of(group, moves, noise=0.):
        games = dict(boards=1, group=group, plies=1, noise=noise)
        t = make(loss=dict(moves=moves, scale="none"), starts=always(QUEEN), sampler=games)
        t.minibatch(t.play(), [0])
        return gradient(t)
    exact = of(1, "all")
    assert (of(4000, "sampled", noise) - exact).norm() < .1*exact.norm()
    assert (of(8, "sampled", noise) - exact).norm() > .1*exact.norm()

def move_value(judge, board):
    "Of the side that has just moved here."
    if board.is_checkmate(): return 1.
    if board.is_stalemate() or board.is_insufficient_material() or board.halfmove_clock >= 100: return .5
    return 1 - float(judge.scale.value(material([board.fen()]))[0])

def values_by_hand(t, ro):
    "Row -> value of each legal move, by pushing it, for the positions in which a ply trains."
    out = {}
    for r in ro.node[..., :-1][ro.train].unique().tolist():
        board = chess.Board(ro.fens[r])
        out[r] = []
        for a in ro.legal[r][ro.legal[r] >= 0].tolist():
            board.push(action_to_move(a, board.turn))
            out[r].append(move_value(t.judge, board))
            board.pop()
    return out

@pytest.mark.parametrize("scale", ["none", "std", "rms"])
def test_all_moves_give_the_policy_gradient(scale):
    "Against the formula, with values found by hand; games that meet a position twice count it twice."
    games = dict(boards=5, group=3, plies=4, temperature=1.3)
    t = make(sharpen=30., loss=dict(moves="all", scale=scale), sampler=games, micro_batch=7)
    played = t.play()
    t.minibatch(played, list(range(5)))
    ro = played.rollout
    value, variances, terms, regret = values_by_hand(t, ro), [], [], []
    for r in ro.node[..., :-1][ro.train].tolist():
        q = torch.tensor(value[r])
        pi = t.policy(t.model).dist(ro.tokens[r:r+1], ro.legal[r:r+1, :len(q)]).probs[0]
        adv = q - (pi.detach() @ q)
        variances.append(pi.detach() @ adv**2)
        terms.append(pi @ (adv/(variances[-1].sqrt() + 1e-4) if scale == "std" else adv))
        regret.append(max(value[r]) - float(ro.logp[r][:len(q)].exp() @ q))
    loss = -torch.stack(terms).mean()
    if scale == "rms": loss = loss/(torch.stack(variances).mean().sqrt() + 1e-4)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, t.params)])
    assert want.norm() > 1e-3 and (gradient(t) - want).norm() < 1e-4*want.norm()
    assert played.stats["expected_regret"] == pytest.approx(np.mean(regret), abs=1e-5)

@pytest.mark.parametrize("group", [1, 4])
def test_ratio_is_one_for_every_legal_move(group):
    games = dict(group=group, temperature=1.3)
    t = make(sharpen=30., loss=dict(moves="all"), sampler=games, minibatches=2, micro_batch=5)
    for _ in range(3):
        row = t.step()
        assert row["ratio_error"] < 1e-5 and abs(row["mean_ratio"] - 1) < .02
        assert row["plies"] == 18*group and row["advantage_std"] == pytest.approx(1, abs=.01)
    assert math.isnan(row["agreement_mean"]) == math.isnan(row["reward_spread"]) == (group == 1)
    titles = [ax.get_title(loc="left") for ax in draw_panel([row]).axes]
    assert ("regret of the policy" in titles) == ("reward spread" not in titles) == (group == 1)

# Micro-batches

@pytest.mark.parametrize("loss", [
    dict(), dict(ratio="trajectory", aggregate="trajectory"), dict(aggregate="constant", kl_coef=.1, entropy_coef=.1),
    dict(kl_to="reference", kl_coef=1., kl="k3"), dict(kl_to="reference", kl_coef=1.),
    dict(moves="all", kl_to="reference", kl_coef=1., entropy_coef=.1)])
def test_micro_batches_change_nothing(loss):
    grads = []
    for size in (1, 10_000):
        t = make(loss=loss, micro_batch=size)
        t.step()                                            # the second batch, so that policy and reference differ
        played = t.play()
        t.optimizer.zero_grad()
        t.minibatch(played, list(range(6)))
        grads.append(gradient(t))
    assert torch.allclose(*grads, atol=1e-7, rtol=1e-3)

def test_micro_batches_hold_everything_once_and_no_more_than_they_may():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes, most = rng.integers(0, 9, rng.integers(0, 12)).tolist(), int(rng.integers(1, 20))
        got = [sizes[rows] for rows in micro_batches(sizes, most)]
        assert sum(got, []) == sizes and all(p and (sum(p) <= most or len(p) == 1) for p in got)
        assert all(sum(a) + b[0] > most for a, b in zip(got, got[1:]))                 # none could have taken one more
