"Learning again from judged positions, and learning towards the improved policy."

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from grpo_chess.doctor import diagnose
from grpo_chess.guards import GuardConfig
from grpo_chess.history import from_rows
from grpo_chess.improved import LARGEST, improved_policy, improved_terms
from grpo_chess.live import progress_text
from grpo_chess.loss import LossConfig
from grpo_chess.replay import Judged, Replay, judged_of, spread_of
from grpo_chess.settings import ConfigError
from small import QUEEN, always, make, steps, weights

ALL = dict(moves="all", entropy_coef=0.)
IMPROVED = ALL | dict(surrogate="improved", scale="none", tau=.1)


def judged(n, seed, width=5):
    rng = torch.Generator().manual_seed(seed)
    legal = torch.randint(0, 1968, (n, width), generator=rng).short()
    legal[:, width - seed % 3 :] = -1
    logp = torch.randn(n, width, generator=rng).masked_fill(legal < 0, -torch.inf).log_softmax(-1)
    adv = torch.where(legal >= 0, torch.rand(n, width), 0.)
    return Judged(torch.full((n, 65), seed, dtype=torch.uint8), legal, logp, adv)


def test_the_memory_keeps_the_newest_steps_and_draws_each_position_once():
    replay = Replay(window=10)
    for k in range(1, 6): replay.add(judged(4, k, width=3 + k))
    assert len(replay) == 8 and [int(p.tokens[0, 0]) for p in replay.parts] == [4, 5]
    drawn = replay.draw(8, np.random.default_rng(0))
    assert sorted(drawn.tokens[:, 0].tolist()) == [4]*4 + [5]*4
    both = {int(t[0]): (legal[legal >= 0].tolist(), adv[legal >= 0].tolist())
            for t, legal, adv in zip(drawn.tokens, drawn.legal, drawn.adv)}
    for part in replay.parts:
        names = [(x[x >= 0].tolist(), a[x >= 0].tolist()) for x, a in zip(part.legal, part.adv)]
        assert both[int(part.tokens[0, 0])] in names
    assert drawn.logp.exp().sum(-1).allclose(torch.ones(8)) and not drawn.adv[drawn.legal < 0].any()


def test_a_memory_smaller_than_a_step_keeps_that_step():
    replay = Replay(window=2)
    replay.add(judged(4, 1))
    assert len(replay) == 4 and len(replay.draw(100, np.random.default_rng(0))) == 4


@pytest.mark.parametrize("loss", [ALL, IMPROVED])
def test_a_resumed_run_with_replay_is_the_run_that_never_stopped(loss):
    whole, first, second = (make(loss=loss, replay=2, replay_batch=16) for _ in range(3))
    rows = steps(whole, 6)
    steps(first, 3)
    second.load_state(first.state())
    assert steps(second, 3) == rows[3:]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second)))


def test_replay_adds_updates_on_which_the_clip_acts():
    plain, again = steps(make(loss=ALL, lr=3e-3), 6), steps(make(loss=ALL, lr=3e-3, replay=4, replay_batch=32), 6)
    assert all(row["updates"] == 1 and row["clip_region"] == 0 for row in plain)
    assert all(row["updates"] == 5 for row in again) and again[-1]["clip_region"] > .05
    assert all(row["ratio_error"] < 1e-5 for row in again)              # law 1 is about the games of the step itself


def test_a_run_that_collects_first_moves_nothing_until_then():
    t = make(loss=ALL, lr=3e-3, replay=4, replay_batch=32, collect=.375, steps=8)
    begun, rows = weights(t), steps(t, 3)
    assert torch.equal(begun, weights(t)) and not any(r["lr"] for r in rows) and len(t.replay.parts) == 3
    assert all(r["kl_step"] == 0 and r["loss"] == r["loss"] for r in rows)          # measured, and not moved
    assert not t.optimizer.state                            # nor are gradients of rate 0 remembered as a direction
    assert all(p.grad is None for p in t.params) and not any("grad_norm" in r for r in rows)      # none is taken
    assert not any(r["updates"] or r["guard"] for r in rows) and "memory" in progress_text(rows[0])
    later = steps(t, 5)
    assert "memory" not in progress_text(later[0]) and later[0]["lr"] > 0
    for region, binding in ((0., 0.), (.5, .2), (.5, 0.)):      # in the last nothing clips
        told = progress_text(later[0] | dict(clip_region=region, clip_binding=binding))
        assert ("clip" in told) == (binding > 0 or not region)
    assert later[0]["updates"] == 5 and not torch.equal(begun, weights(t))
    assert later[0]["lr"] == max(r["lr"] for r in later)                            # the schedule begins after it
    many = [row | {"step": 3*k + row["step"]} for k in range(9) for row in rows]
    assert not diagnose(from_rows(many)).alarms


def test_positions_without_spread_are_not_kept():
    plain = ALL | dict(scale="none")                                    # whose advantages are in units of the reward
    every, wide = (make(loss=plain, replay=2, replay_batch=16, replay_spread=spread) for spread in (0., .2))
    rows = [steps(t, 3) for t in (every, wide)]
    assert rows[0][0]["plies"] == rows[1][0]["plies"]                   # the games of the step itself are learned from
    a, b = every.replay.parts[0], wide.replay.parts[0]
    gap = torch.tensor([float((adv[m >= 0]).max() - adv[m >= 0].mean()) for adv, m in zip(a.adv, a.legal)])
    kept = {t.numpy().tobytes() for t in b.tokens}
    here = torch.tensor([t.numpy().tobytes() in kept for t in a.tokens])
    assert here[gap >= .2].all() and not here[gap <= 1e-6].any() and 0 < (gap >= .2).sum() < len(b) < (gap > 0).sum()
    assert wide.replay.draw(1000, np.random.default_rng(0)).adv.shape[0] == len(wide.replay)
    again = make(loss=plain, replay=2, replay_batch=16, replay_spread=.2)
    again.load_state(copy.deepcopy(wide.state()))
    assert steps(again, 1) == steps(wide, 1)


def test_a_position_is_kept_by_the_chance_of_its_spread():
    t = make(loss=ALL, replay=1)
    batch = t.play()
    every, rng = judged_of(batch), np.random.default_rng(0)
    rows = batch.rollout.node[..., :-1][batch.rollout.train].unique()
    chance = (spread_of(batch.value[rows], batch.rollout.legal[rows])/.5).clamp(max=1)
    seen = Counter(t.numpy().tobytes() for _ in range(400) for t in judged_of(batch, .5, rng).tokens)
    share = torch.tensor([seen[t.numpy().tobytes()]/400 for t in every.tokens])
    assert (share - chance).abs().max() < .12 and ((chance > .1) & (chance < .9)).sum() > 3


def test_a_spread_that_nothing_has_is_said():
    with pytest.raises(ConfigError, match="replay_spread = 1000000.0: lower it"):
        make(loss=ALL, replay=2, replay_batch=16, replay_spread=1e6).step()
    with pytest.raises(ValueError, match="replay_spread = -1"): make(loss=ALL, replay=2, replay_spread=-1.)


def test_a_controller_waits_until_something_can_move():
    guard = GuardConfig(kl_controller="proportional", target_kl=.02)
    t = make(loss=ALL | dict(kl_coef=.05), guard=guard, lr=3e-3, replay=2, replay_batch=32, collect=.5, steps=8)
    assert {row["kl_coef"] for row in steps(t, 5)} == {.05} and steps(t, 2)[-1]["kl_coef"] != .05


@pytest.mark.parametrize("wrong", [dict(collect=.5), dict(collect=1., replay=1), dict(collect=-.1, replay=1)])
def test_collecting_needs_a_memory_and_an_end(wrong):
    with pytest.raises(ValueError, match="trainer.collect"): make(loss=ALL, **wrong)


def test_replay_needs_the_values_of_all_moves():
    with pytest.raises(ValueError, match="loss.moves = all"): make(replay=1)


SAMPLED = dict(surrogate="improved", scale="none", tau=.1)


@pytest.mark.parametrize("loss", [IMPROVED, IMPROVED | dict(prior=0.), SAMPLED])
def test_learns_to_take_the_queen(loss):
    games = dict(boards=4, group=1 if "moves" in loss else 8, plies=1)
    t = make(starts=always(QUEEN), loss=loss, lr=3e-3, sampler=games)
    rows = steps(t, 40)
    assert np.mean([r["train/avg_reward"] for r in rows[-5:]]) > np.mean([r["train/avg_reward"] for r in rows[:5]])


def test_the_improved_policy_is_the_best_one_for_its_price():
    torch.manual_seed(1)
    logp, adv, mask, tau = torch.randn(6).log_softmax(-1), torch.randn(6), torch.ones(6, dtype=torch.bool), .7
    best = improved_policy(logp, adv, mask, tau)

    def worth(p): return (p @ adv - tau*(p*(p.log() - logp)).sum()).item()
    assert max(worth(torch.randn(6).softmax(-1)) for _ in range(2000)) < worth(best)
    assert torch.allclose(improved_policy(logp, adv, mask, tau, prior=0.), (adv/tau).softmax(-1))


def test_sampled_improvement_is_right_on_average_up_to_the_cut():
    torch.manual_seed(2)
    z, adv, mask = torch.randn(5), torch.randn(5)*.3, torch.ones(5, dtype=torch.bool)
    old, tau = z.log_softmax(-1), .5

    def gradient(all_moves):
        def term(z):
            parts = (z.log_softmax(-1), old, adv, mask, old.exp())
            return improved_terms(*(x[None] for x in parts), tau, 1., all_moves)
        return torch.autograd.functional.jacobian(term, z)
    exact, mean = gradient(True), gradient(False)
    z_sum = (old.exp()*(adv/tau).exp()).sum()
    assert (adv/tau).exp().max() < LARGEST and torch.allclose(exact, mean/z_sum, atol=1e-6)


@pytest.mark.parametrize("bad", [dict(tau=0.), dict(tau=-1.), dict(prior=2.), dict(tau=float("nan"))])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"loss.{next(iter(bad))}"): LossConfig(**(ALL | bad))
