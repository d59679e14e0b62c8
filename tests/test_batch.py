"From a rollout to the loss: precision, advantages of sampled and of all moves, micro-batches."
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import chess
import numpy as np
import pytest
import torch

from grpo_chess import batch
from grpo_chess.batch import choose_precision, make_fabric, micro_batches
from grpo_chess.board import action_to_move, encode
from grpo_chess.loss import group_advantage
from grpo_chess.model import ModelConfig, MoveDist
from grpo_chess.panel import draw_panel
from grpo_chess.reward import material, step_rewards
from grpo_chess.trainer import AblateConfig
from small import FABRIC, QUEEN, always, gradient, make

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

# Every core

@pytest.fixture
def cores():
    "torch as on a machine with so many cores, whatever this one has."
    def use(n):
        while batch._hands: batch._hands.pop().shutdown()
        torch.set_num_threads(n)
    yield use
    use(1)

@pytest.mark.parametrize("loss", [dict(), dict(moves="all", entropy_coef=.1), dict(kl_to="reference", kl_coef=1.)])
def test_parts_side_by_side_are_one_pass(cores, loss):
    "On three cores: the same scores, the same gradient up to rounding, the same budget; and the same bits every time."
    seen = []
    for n in (1, 3, 3):
        cores(n)
        t = make(loss=loss, sampler=dict(boards=6, group=8, plies=4), budget_every=1)
        rows = [t.step() for _ in range(2)]
        played = t.play()
        t.optimizer.zero_grad()
        t.minibatch(played, list(range(6)))
        seen.append((gradient(t), rows, played.rollout.logp))
        assert max(row["ratio_error"] for row in rows) < 1e-5
    (one, rows, logp), (three, others, other), (again, same, _) = seen
    assert len(logp) > 3*batch.PART and torch.allclose(logp, other, atol=1e-5)
    assert torch.allclose(one, three, atol=1e-6, rtol=1e-3) and torch.equal(three, again)
    for name in ("grad_policy", "grad_entropy", "cos_entropy_policy", "grad_norm", "loss"):
        assert rows[1][name] == pytest.approx(others[1][name], rel=1e-3, abs=1e-6, nan_ok=True)
        assert others[1][name] == same[1][name] or math.isnan(same[1][name])

def test_torch_keeps_to_the_quota_of_a_container(cores, monkeypatch):
    for quota, threads in ((8, 3), (2, 2)):
        cores(3)
        monkeypatch.setattr(batch, "usable_cores", lambda quota=quota: quota)
        make_fabric("32-true", "cpu")
        assert torch.get_num_threads() == threads

def test_memory_that_is_free_is_kept_until_it_is_released():
    "In a process of its own: 128 MB in pieces, every other of which is freed, between others that stay."
    code = ("from pathlib import Path\nfrom grpo_chess.batch import keep_memory, release_memory\n"
            "def held(): return int(Path('/proc/self/statm').read_text().split()[1])*4096/1e6\n"
            "keep_memory()\npieces = [b'x'*2**16 for _ in range(2000)]\n"
            "full = held()\ndel pieces[::2]\nfreed = held()\nrelease_memory()\nprint(full - freed, freed - held())\n")
    kept, given_back = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                                 check=True).stdout.split())
    assert kept < 5 and 50 < given_back < 80

def passes(t, cores, n, positions=96):
    "Sizes of the batches that reach the network, and the threads that torch uses there."
    cores(n)
    tokens, legal = map(torch.as_tensor, encode([chess.Board()]*positions))
    seen, forward = [], t.model.forward
    t.model.forward = lambda *x: seen.append((len(x[0]), torch.get_num_threads())) or forward(*x)
    with torch.no_grad(): t.policy(t.model).dist(tokens, legal)
    t.policy(t.model).dist(tokens, legal).logp[:, 0].sum().backward()
    return seen

def test_a_batch_is_cut_for_the_cores_and_a_small_one_is_not(cores):
    assert passes(make(), cores, 3) == 6*[(32, 1)] and passes(make(), cores, 1) == 2*[(96, 1)]
    assert passes(make(), cores, 3, 40) == 2*[(40, 1)] and passes(make(), cores, 8, 70) == 4*[(35, 1)]

def test_what_is_not_ours_or_draws_random_numbers_is_not_cut(cores):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1968))
        def forward(self, tokens, legal):
            return self.weight[legal.clamp_min(0).long()].masked_fill(legal < 0, -math.inf)
    assert passes(make(net=Own()), cores, 2) == 2*[(96, 2)]
    drops = make(model=ModelConfig(16, 1, 2, dropout=.1), ablate=AblateConfig(dropout=True))
    assert passes(drops, cores, 2) == 2*[(96, 2)]

@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_makes_its_own_threads(cores):
    t = make()
    passes(t, cores, 2)
    if not (pid := os.fork()):
        tokens, legal = map(torch.as_tensor, encode([chess.Board()]*80))
        torch.set_num_threads(1)                          # OpenMP's own threads do not live in a fork either
        batch.hands().submit(t.model, tokens, legal).result(30)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

def test_the_kl_of_a_step_is_measured_on_some_positions_of_many(monkeypatch):
    "All of a few; an eighth of more; 256 or so of very many."
    for count, asked in ((200, 200), (256, 256), (400, 50), (4096, 256)):
        tokens, legal = map(torch.as_tensor, encode([chess.Board()]*count))
        ro = SimpleNamespace(node=torch.arange(count + 1)[None, None], train=torch.ones(1, 1, count, dtype=torch.bool),
                             tokens=tokens, legal=legal, logp=torch.zeros(count, 20).log_softmax(-1))
        seen:list[int] = []
        def dist(tokens, legal, seen=seen, ro=ro):
            seen.append(len(tokens))
            return MoveDist(ro.logp[:len(tokens)])
        policy = SimpleNamespace(dist=dist)
        assert batch.movement(FABRIC, policy, ro)["kl_step"] == pytest.approx(0, abs=1e-6) and seen == [asked]
