"grpo_chess.loss against loops in plain Python floats, finite differences, and full enumeration over moves."
import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch

from grpo_chess import loss as L
from grpo_chess import preset
from grpo_chess.loss import (LossConfig, Plies, budget_of, cispo_surrogate, clip_fractions, clipped_surrogate,
                             effective_sample_size, gradient_budget, group_advantage, kl_estimate, loss_terms,
                             no_spread_share, ply_weights, ratio_stats, returns, reward_to_go, term_gradients,
                             weighted_terms)
from grpo_chess.model import MoveDist

TOP = Path(__file__).resolve().parent.parent
NAN, INF = math.nan, math.inf
GARBAGE = [NAN, INF, -INF, 1e30, -7.]

# ---------------------------------------------------------------- the oracle: one number at a time, no tensors

def slow_returns(reward, kind, discount):
    "R_t from the definition, as a sum over the rest of the game."
    T, out = len(reward), []
    for t in range(T):
        if kind == "step": out.append(reward[t])
        if kind == "to_go": out.append(sum((-discount)**(s-t)*reward[s] for s in range(t, T)))
        if kind == "trajectory": out.append((1 if t % 2 == 0 else -1)*sum((-discount)**s*reward[s] for s in range(T)))
    return out

def slow_advantage(credit, mask, baseline, scale, eps=1e-4):
    "credit, mask: [B][G][T] lists."
    B, G, T = len(credit), len(credit[0]), len(credit[0][0])
    adv = [[[0.]*T for _ in range(G)] for _ in range(B)]
    compared = []
    for b, t in itertools.product(range(B), range(T)):
        group = [g for g in range(G) if mask[b][g][t]]
        if len(group) < 2: continue
        mean = sum(credit[b][g][t] for g in group)/len(group)
        std = math.sqrt(sum((credit[b][g][t] - mean)**2 for g in group)/len(group))
        for g in group:
            others = [credit[b][h][t] for h in group if h != g]
            base = mean if baseline == "mean" else sum(others)/len(others)
            a = credit[b][g][t] - base
            adv[b][g][t] = a/(std + eps) if scale == "std" else a
            compared.append((b, g, t))
    if scale == "rms" and compared:
        rms = math.sqrt(sum(adv[b][g][t]**2 for b, g, t in compared)/len(compared))
        for b, g, t in compared: adv[b][g][t] /= rms + eps
    return adv

def softmax(z):
    top = max(z)
    e = [math.exp(x - top) for x in z]
    return [x/sum(e) for x in e]

def slow_weight(mask, how):
    "mask: [N][T]; the final weight of each ply."
    N, T, total = len(mask), len(mask[0]), sum(map(sum, mask))
    alive = sum(any(row) for row in mask)
    w = dict(ply=lambda n: 1/total, trajectory=lambda n: 1/alive/sum(mask[n]), constant=lambda n: 1/(N*T))[how]
    return [[w(n) if mask[n][t] else 0. for t in range(T)] for n in range(N)]

def slow_terms(cfg, z, z_held, z_old, z_ref, action, adv, weight, mask):
    "policy, kl, entropy of one trajectory; z: [T][moves] scores; z_held: the scores inside of a stopped gradient."
    plies = [t for t in range(len(mask)) if mask[t]]
    p, old, ref, held = ({t: softmax(s[t]) for t in plies} for s in (z, z_old, z_ref, z_held))
    def log_ratio(q): return {t: math.log(q[t][action[t]]/old[t][action[t]]) for t in plies}
    out = dict(policy=0., kl=0., entropy=0.)
    def ratio_at(t, q):
        lr = log_ratio(q)
        side = [lr[u] for u in plies if u % 2 == t % 2]                     # the plies of whoever moves at t
        return math.exp(lr[t] if cfg.ratio == "ply" else sum(side)/len(side))
    for t in plies:
        a, A, low, high = action[t], adv[t], 1-cfg.epsilon_low, 1+cfg.epsilon_high
        if cfg.surrogate == "cispo": policy = -min(ratio_at(t, held), high)*A*math.log(p[t][a])
        else:
            rho = ratio_at(t, p)
            clipped = low if rho < low else high if rho > high else rho
            free = min(rho, cfg.delta) if cfg.delta and A < 0 else rho
            policy = -min(free*A, clipped*A)
        moves = range(len(p[t]))
        if cfg.kl == "exact":
            kl = sum(old[t][i]*math.log(old[t][i]/p[t][i]) for i in moves) if cfg.kl_to == "old" else \
                 sum(p[t][i]*math.log(p[t][i]/ref[t][i]) for i in moves)
        else:
            # samples of x, distance to y
            x, y = (old[t][a], p[t][a]) if cfg.kl_to == "old" else (p[t][a], ref[t][a])
            kl = dict(k1=math.log(x/y), k2=math.log(x/y)**2/2, k3=y/x - 1 - math.log(y/x))[cfg.kl]
        entropy = -sum(q*math.log(q) for q in p[t]) if cfg.entropy == "exact" else -math.log(p[t][a])
        for k, v in dict(policy=policy, kl=kl, entropy=entropy).items(): out[k] += weight[t]*v
    out["total"] = out["policy"] + cfg.kl_coef*out["kl"] - cfg.entropy_coef*out["entropy"]
    return out

def slow_gradient(cfg, z, *rest, h=1e-5):
    "Central differences of the total by every score of one trajectory."
    out = [[0.]*len(row) for row in z]
    for t, row in enumerate(z):
        for i in range(len(row)):
            up, down = ([list(r) for r in z] for _ in range(2))
            up[t][i] += h
            down[t][i] -= h
            out[t][i] = (slow_terms(cfg, up, z, *rest)["total"] - slow_terms(cfg, down, z, *rest)["total"])/(2*h)
    return out

# ---------------------------------------------------------------- a ragged batch

MASK = torch.tensor([[[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]],        # whole, a teacher's plies left out, empty
                     [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]]).bool()  # ends early; a group of one at ply 2
B, G, T = MASK.shape
N, COUNT = B*G, [2, 3, 4, 1]                                             # legal moves at each ply; one at the last

class Case:
    "Random scores under the new, old and reference policy, with moves drawn at random."
    def __init__(self, seed):
        r = random.Random(seed)
        def scores(s): return [[[r.gauss(0, s) for _ in range(COUNT[t])] for t in range(T)] for _ in range(N)]
        self.new, self.old, self.ref = scores(.7), scores(.7), scores(.7)
        self.action = [[r.randrange(COUNT[t]) for t in range(T)] for _ in range(N)]
        self.adv = [[r.gauss(0, 1) for _ in range(T)] for _ in range(N)]
        self.mask = MASK.flatten(0, 1).tolist()
    def tensor(self, scores):
        out = torch.full((N, T, max(COUNT)), -INF, dtype=torch.float64)
        for n, t in itertools.product(range(N), range(T)):
            out[n, t, :COUNT[t]] = torch.tensor(scores[n][t], dtype=torch.float64)
        return out
    def plies(self, how, garbage=0., adv=None):
        "The leaf and what the loss gets; `garbage` stands wherever no ply trains."
        z = self.tensor(self.new).requires_grad_()
        new, old, ref = (MoveDist.from_logits(x) for x in (z, self.tensor(self.old), self.tensor(self.ref)))
        a, mask = torch.tensor(self.action), MASK.flatten(0, 1)
        def poison(x): return torch.where(mask, x, garbage)
        w, n = ply_weights(mask, how)
        adv = torch.tensor(self.adv, dtype=torch.float64) if adv is None else adv
        rest = adv, old.log_prob(a), new.log_prob(a), new.entropy(), old.kl(new), ref.log_prob(a), new.kl(ref)
        return z, Plies(mask, w.double()/n, *map(poison, rest))
    def slow(self, cfg, how):
        weight = slow_weight(self.mask, how)
        total = dict.fromkeys(("policy", "kl", "entropy", "total"), 0.)
        grad = torch.zeros(N, T, max(COUNT), dtype=torch.float64)
        for n in range(N):
            rest = self.old[n], self.ref[n], self.action[n], self.adv[n], weight[n], self.mask[n]
            for k, v in slow_terms(cfg, self.new[n], self.new[n], *rest).items(): total[k] += v
            for t, row in enumerate(slow_gradient(cfg, self.new[n], *rest)): grad[n, t, :len(row)] = torch.tensor(row)
        return total, grad

def agree(cfg, case, garbage):
    z, x = case.plies(cfg.aggregate, garbage)
    terms = loss_terms(x, cfg)
    terms["total"].backward()
    want, grad = case.slow(cfg, cfg.aggregate)
    for k, v in want.items(): assert terms[k].item() == pytest.approx(v, rel=1e-6, abs=2e-8), (k, cfg)
    torch.testing.assert_close(z.grad, grad, rtol=1e-5, atol=1e-8, msg=lambda m: f"{cfg}\n{m}")
    assert z.grad[~x.mask].count_nonzero() == 0

SURROGATES = [dict(ratio=r, surrogate=s, **e) for r in ("ply", "trajectory") for s in ("ppo", "cispo") for e in (
    {}, dict(epsilon_low=.1, epsilon_high=.28), dict(epsilon_low=.5, epsilon_high=.02),
    dict(epsilon_low=0., epsilon_high=0.),
    dict(epsilon_low=1., epsilon_high=100.), dict(delta=1.5), dict(epsilon_low=.3, epsilon_high=.1, delta=1.2))]
PENALTIES = [dict(kl=k, kl_to=to, entropy=e) for k in ("k1", "k2", "k3", "exact") for to in ("old", "reference")
             for e in ("exact", "sampled")]

@pytest.mark.parametrize("how", ["ply", "trajectory", "constant"])
@pytest.mark.parametrize("kw", SURROGATES, ids=lambda kw: "-".join(map(str, kw.values())))
def test_surrogate(kw, how):
    for seed in range(3): agree(LossConfig(aggregate=how, **kw), Case(seed), GARBAGE[seed])

@pytest.mark.parametrize("how", ["ply", "trajectory", "constant"])
@pytest.mark.parametrize("kw", PENALTIES, ids=lambda kw: "-".join(kw.values()))
def test_penalties(kw, how):
    for i, (ratio, surrogate) in enumerate(itertools.product(("ply", "trajectory"), ("ppo", "cispo"))):
        cfg = LossConfig(aggregate=how, ratio=ratio, surrogate=surrogate, kl_coef=.7, entropy_coef=.3, **kw)
        agree(cfg, Case(10+i), GARBAGE[i])

def test_the_cases_reach_every_corner_of_the_clip():
    "Both signs of the advantage on both sides of the band, at both levels: else the tests above would prove little."
    for level in ("ply", "trajectory"):
        corners = set()
        for seed in range(3):
            _, x = Case(seed).plies("ply")
            lr = torch.where(x.mask, x.logp_new - x.logp_old, 0.).detach()
            if level == "trajectory": lr = L.trajectory_log_ratio(lr, x.mask)
            rho = lr.exp()[x.mask]
            a = x.adv[x.mask] > 0
            corners |= set(zip((rho < .8).tolist(), (rho > 1.2).tolist(), a.tolist()))
            if level == "ply": corners |= {"above delta"} if ((rho > 1.5) & ~a).any() else set()
        assert len(corners) >= 6

# ---------------------------------------------------------------- padding

@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_padding_is_silent_to_the_last_bit(garbage):
    "The whole product of settings: value and gradient are the same bits whatever stands outside of the mask."
    case = Case(5)
    for ratio, surrogate, kw in itertools.product(("ply", "trajectory"), ("ppo", "cispo"), PENALTIES):
        cfg = LossConfig(ratio=ratio, surrogate=surrogate, kl_coef=.7, entropy_coef=.3, delta=1.5, **kw)
        grads, values = [], []
        for g in (0., garbage):
            _, x = case.plies("trajectory", g)
            with_gradient = x.logp_new, x.entropy, x.kl_old, x.kl_ref
            leaves = [v.detach().clone().requires_grad_() for v in with_gradient]       # garbage in the leaf itself
            x.logp_new, x.entropy, x.kl_old, x.kl_ref = leaves
            terms = loss_terms(x, cfg)
            terms["total"].backward()
            values.append([v.item() for v in terms.values()])
            grads.append([v.grad for v in leaves])
        assert values[0] == values[1], cfg
        for a, b in zip(*grads): assert (a is None and b is None) or torch.equal(a, b), cfg

def test_weights_outside_of_the_mask_are_padding_too():
    "`Plies` promises: anything may stand outside of the mask."
    for garbage in GARBAGE:
        _, x = Case(5).plies("ply")
        want = loss_terms(x, LossConfig())
        x.weight = torch.where(x.mask, x.weight, garbage)
        x.logp_new = x.logp_new.detach().requires_grad_()
        got = loss_terms(x, LossConfig())
        got["total"].backward()
        assert all(got[k] == want[k] for k in want), garbage
        assert x.logp_new.grad.isfinite().all() and x.logp_new.grad[~x.mask].count_nonzero() == 0

def test_a_batch_without_any_ply():
    mask, z = torch.zeros(3, 2, dtype=torch.bool), torch.full((3, 2), NAN)
    lp = z.clone().requires_grad_()
    for how in ("ply", "trajectory", "constant"):
        w, n = ply_weights(mask, how)
        for kw in SURROGATES:
            terms = loss_terms(Plies(mask, w/max(n, 1), z, z, lp, z, z), LossConfig(**kw))
            terms["total"].backward()
            assert terms["total"] == 0 and lp.grad.count_nonzero() == 0
            lp.grad = None
    stats = ratio_stats(z, z, z, mask, LossConfig())
    assert stats == dict(clip_region=0, clip_binding=0, clip_binding_low=0, clip_binding_high=0, mean_ratio=0, ess=1,
                         approx_kl=0, max_log_ratio=0)

def test_pieces_add_up_to_the_whole():
    "Weights with the whole batch's count: the loss of two halves is the loss, and so is the gradient."
    for how in ("ply", "trajectory", "constant"):
        for kw in SURROGATES[::3]:
            cfg = LossConfig(aggregate=how, kl_coef=.7, kl="k3", entropy_coef=.1, **kw)
            z, x = Case(2).plies(how)
            loss_terms(x, cfg)["total"].backward()
            y, x2 = Case(2).plies(how)
            for part in (slice(0, 2), slice(2, 6)):
                piece = Plies(**{k: v[part] for k, v in vars(x2).items()})
                loss_terms(piece, cfg)["total"].backward(retain_graph=True)
            torch.testing.assert_close(z.grad, y.grad, rtol=1e-12, atol=1e-14)

# ---------------------------------------------------------------- advantages

def random_rewards(seed, scale=1.):
    r = random.Random(seed)
    return [[[r.gauss(0, scale) for _ in range(T)] for _ in range(G)] for _ in range(B)]

@pytest.mark.parametrize("kind, discount", [("step", 1.), ("step", .5), ("to_go", 1.), ("to_go", .9), ("to_go", 0.),
                                            ("trajectory", 1.), ("trajectory", .9)])
def test_returns(kind, discount):
    reward = random_rewards(1)
    want = [[slow_returns(row, kind, discount) for row in board] for board in reward]
    got = returns(torch.tensor(reward, dtype=torch.float64), kind, discount)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("scale", ["none", "std", "rms"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("kind", ["step", "to_go", "trajectory"])
def test_advantage(kind, baseline, scale):
    for seed, garbage in enumerate(GARBAGE):
        size = 10.**(2*seed-4)                                            # from far below eps to far above
        reward = random_rewards(seed, size)
        credit = [[slow_returns(row, kind, .95) for row in board] for board in reward]
        want = torch.tensor(slow_advantage(credit, MASK.tolist(), baseline, scale), dtype=torch.float64)
        fast = returns(torch.tensor(reward, dtype=torch.float64), kind, .95)
        got = group_advantage(torch.where(MASK, fast, garbage), MASK, baseline, scale)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12*size)
        assert (got[~MASK] == 0).all() and got[1, 1, 2] == 0              # padding; a group of one
        single = group_advantage(torch.where(MASK, fast, garbage).float(), MASK, baseline, scale)
        torch.testing.assert_close(single.double(), want, rtol=1e-3, atol=1e-5*size)

@pytest.mark.parametrize("scale", ["none", "std", "rms"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_advantage_of_nothing(baseline, scale):
    "No ply, groups of one, groups without spread, one game that differs in its last bit: finite, mostly 0."
    credit = torch.rand(2, 3, 4)
    assert group_advantage(credit*NAN, torch.zeros(2, 3, 4, dtype=torch.bool), baseline, scale).count_nonzero() == 0
    one = torch.zeros(2, 3, 4, dtype=torch.bool)
    one[:, 1] = True
    assert group_advantage(credit, one, baseline, scale).count_nonzero() == 0
    whole = torch.ones(2, 3, 4, dtype=torch.bool)
    assert group_advantage(torch.full((2, 3, 4), .1), whole, baseline, scale).abs().max() < 1e-3
    close = torch.full((2, 3, 4), .1)
    close[0, 0, 0] = torch.nextafter(torch.tensor(.1), torch.tensor(1.))
    assert group_advantage(close, whole, baseline, scale).abs().max() < 1e-3

@pytest.mark.parametrize("baseline, scale", list(itertools.product(("mean", "loo"), ("none", "std", "rms"))))
def test_advantages_of_a_group_sum_to_zero_and_boards_do_not_mix(baseline, scale):
    credit = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(1)) < .8
    adv = group_advantage(credit, mask, baseline, scale)
    assert adv.sum(1).abs().max() < 1e-9
    shifted = credit + torch.randn(4, 1, 3, dtype=torch.float64)          # what all siblings share is no advantage
    torch.testing.assert_close(group_advantage(shifted, mask, baseline, scale), adv, rtol=1e-6, atol=1e-9)
    order = torch.tensor([2, 0, 3, 1])
    got = group_advantage(credit[order], mask[order], baseline, scale)
    torch.testing.assert_close(got, adv[order], rtol=1e-12, atol=1e-12)

def test_no_spread_share():
    r = random.Random(3)
    for _ in range(50):
        credit = [[[r.choice([0., 0., .5]) for _ in range(T)] for _ in range(G)] for _ in range(B)]
        mask = [[[r.random() < .7 for _ in range(T)] for _ in range(G)] for _ in range(B)]
        groups = [[credit[b][g][t] for g in range(G) if mask[b][g][t]] for b in range(B) for t in range(T)]
        groups = [x for x in groups if len(x) > 1]
        want = sum(len(set(x)) == 1 for x in groups)/max(1, len(groups))
        for garbage in GARBAGE:
            c = torch.where(torch.tensor(mask), torch.tensor(credit), garbage)
            assert no_spread_share(c, torch.tensor(mask)) == pytest.approx(want)

def test_ply_weights():
    r = random.Random(4)
    for _ in range(30):
        mask = [[r.random() < .5 for _ in range(4)] for _ in range(5)]
        if not any(map(any, mask)): continue
        for how in ("ply", "trajectory", "constant"):
            w, n = ply_weights(torch.tensor(mask), how)
            want = torch.tensor(slow_weight(mask, how), dtype=torch.float64)
            torch.testing.assert_close(w.double()/n, want, rtol=1e-6, atol=0)
            assert how == "constant" or (w/n).sum().item() == pytest.approx(1)

# ---------------------------------------------------------------- the clip

def test_delta_is_a_ceiling_only_where_the_advantage_is_negative():
    rho = torch.linspace(.05, 3, 60, dtype=torch.float64)
    for delta in (1.05, 1.3, 2.):
        good = torch.ones(60)
        assert torch.equal(clipped_surrogate(rho, good, .2, .2, delta), clipped_surrogate(rho, good, .2, .2)), delta
        down = clipped_surrogate(rho, -torch.ones(60), .2, .2, delta)
        assert down.max() <= max(delta, 1.2) + 1e-9 and down.min() >= .8

@pytest.mark.parametrize("delta", [.5, 1., 1.1])
def test_a_delta_inside_of_the_band_is_refused_or_harmless(delta):
    "At ratio 1 every ply must have its gradient; a ceiling at or below it would stop learning without a word."
    try: cfg = LossConfig(delta=delta)
    except ValueError: return
    for A in (1., -1.):
        lp = torch.zeros(1, 1, requires_grad=True)
        one = torch.ones(1, 1)
        loss_terms(Plies(one.bool(), one, A*one, lp.detach(), lp, one, one), cfg)["total"].backward()
        assert lp.grad.item() == pytest.approx(-A), (delta, A)

@pytest.mark.parametrize("low, high", [(.2, .2), (.1, .28), (0., 0.), (1., 100.)])
def test_clip_fractions(low, high):
    r = random.Random(7)
    for _ in range(20):
        rho = [math.exp(r.gauss(0, .4)) for _ in range(12)]
        adv = [r.choice([-1., 0., 1.])*r.random() for _ in range(12)]
        mask = [r.random() < .7 for _ in range(12)]
        n = max(1, sum(mask))
        inside = [(p, a) for p, a, m in zip(rho, adv, mask) if m]
        want = dict(clip_region=sum(p < 1-low or p > 1+high for p, a in inside)/n,
                    clip_binding_low=sum(p < 1-low and a < 0 for p, a in inside)/n,
                    clip_binding_high=sum(p > 1+high and a > 0 for p, a in inside)/n)
        want["clip_binding"] = want["clip_binding_low"] + want["clip_binding_high"]
        m = torch.tensor(mask)
        for g in GARBAGE:
            dirty = (torch.where(m, torch.tensor(v), g) for v in (rho, adv))
            got = clip_fractions(*dirty, m, low, high)
            assert got == pytest.approx(want, abs=1e-6)

def lost_gradient(x, cfg):
    "Share of plies whose own term has no gradient although its advantage is not 0, term by term."
    lost = 0
    for n, t in x.mask.nonzero().tolist():
        y = Plies(**{k: v.detach() for k, v in vars(x).items()})
        y.weight = torch.zeros_like(x.weight)
        y.weight[n, t] = 1.        # this ply's term alone
        y.logp_new = y.logp_new.requires_grad_()
        loss_terms(y, cfg)["policy"].backward()
        lost += bool(y.adv[n, t] != 0 and y.logp_new.grad[n].count_nonzero() == 0)
    return lost/int(x.mask.sum())

@pytest.mark.parametrize("kw", [{}, dict(epsilon_low=.1, epsilon_high=.28), dict(delta=1.5), dict(ratio="trajectory"),
                                dict(ratio="trajectory", delta=1.3), dict(surrogate="cispo")],
                         ids=lambda kw: "-".join(map(str, kw.values())) or "ppo")
def test_clip_binding_is_the_share_that_lost_its_gradient(kw):
    cfg, seen = LossConfig(**kw), 0.
    for seed in range(6):
        _, x = Case(seed).plies("ply", NAN)
        want = lost_gradient(x, cfg)
        seen += want
        got = ratio_stats(x.logp_new.detach(), x.logp_old, x.adv, x.mask, cfg)["clip_binding"]
        assert got == pytest.approx(want, abs=1e-6)
    assert seen > 0 or cfg.surrogate == "cispo"

def test_ratio_stats():
    for seed in range(5):
        case = Case(seed)
        cfg = LossConfig(epsilon_low=.1, epsilon_high=.3)
        for garbage in GARBAGE:
            _, x = case.plies("ply", garbage)
            got = ratio_stats(x.logp_new.detach(), x.logp_old, x.adv, x.mask, cfg)
            lr = [math.log(softmax(case.new[n][t])[case.action[n][t]]/softmax(case.old[n][t])[case.action[n][t]])
                  for n in range(N) for t in range(T) if case.mask[n][t]]
            A = [case.adv[n][t] for n in range(N) for t in range(T) if case.mask[n][t]]
            rho, k = [math.exp(v) for v in lr], len(lr)
            low, high = [v < .9 for v in rho], [v > 1.3 for v in rho]
            want = dict(clip_region=(sum(low)+sum(high))/k, mean_ratio=sum(rho)/k,
                        ess=sum(rho)**2/k/sum(v*v for v in rho), approx_kl=-sum(lr)/k,
                        max_log_ratio=max(map(abs, lr)), clip_binding_low=sum(v and a < 0 for v, a in zip(low, A))/k,
                        clip_binding_high=sum(v and a > 0 for v, a in zip(high, A))/k)
            want["clip_binding"] = want["clip_binding_low"] + want["clip_binding_high"]
            assert got == pytest.approx(want, abs=1e-6)

def test_weights_count_as_repetitions():
    "A weight of 3 is three equal entries; 0 is none, and outside of the mask anything may stand."
    for seed in range(5):
        _, x = Case(seed).plies("ply", NAN)
        times = torch.randint(0, 4, x.mask.shape, generator=torch.Generator().manual_seed(seed))
        times[x.mask.nonzero()[0].tolist()[0], x.mask.nonzero()[0].tolist()[1]] = 2            # something counts
        flat = {k: v.detach()[x.mask].repeat_interleave(times[x.mask]) for k, v in vars(x).items()}
        for cfg in (LossConfig(epsilon_low=.1, epsilon_high=.3), LossConfig(delta=1.5), LossConfig(surrogate="cispo")):
            want = ratio_stats(flat["logp_new"], flat["logp_old"], flat["adv"], flat["mask"], cfg)
            got = ratio_stats(x.logp_new.detach(), x.logp_old, x.adv, x.mask, cfg, torch.where(x.mask, times*.7, NAN))
            want.pop("max_log_ratio")
            got.pop("max_log_ratio")                                # the largest is the largest, whatever it weighs
            assert got == pytest.approx(want, abs=1e-6)

@pytest.mark.parametrize("kw", [dict(returns="to_go"), dict(baseline="loo"), dict(ratio="trajectory"),
                                dict(aggregate="constant")])
def test_all_moves_refuse_what_needs_played_ones(kw):
    with pytest.raises(ValueError, match=f"loss.{next(iter(kw))} .*moves = all"): LossConfig(moves="all", **kw)

def test_effective_sample_size():
    every = torch.ones(4, dtype=torch.bool)
    assert effective_sample_size(torch.full((4,), 3.), every) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([1., 0., 0., 0.]), every) == pytest.approx(1/4)
    first_two = torch.tensor([True, True, False, False])
    assert effective_sample_size(torch.tensor([1., 2., NAN, INF]), first_two) == pytest.approx(9/10)

# ---------------------------------------------------------------- law 6: exact is the judge

P_OLD = torch.tensor([.4, .3, .2, .1], dtype=torch.float64)
Z_NEW = torch.tensor([.3, -.9, .8, .1], dtype=torch.float64)
Z_REF = torch.tensor([-.5, .4, .2, 1.1], dtype=torch.float64)

def expect(z, old, ref=None, adv=None, **kw):
    "Exact expectation of each term over moves drawn from `old`: each move once, weighted by its probability."
    n = len(old)
    new, was = MoveDist(z.log_softmax(-1)[None]), MoveDist(old.log()[None])
    def col(v): return v.reshape(n, 1)
    def rep(v): return v.expand(n, 1)
    ones = torch.ones(n, 1, dtype=torch.float64)
    x = Plies(ones.bool(), col(old), ones*0 if adv is None else col(adv), col(old.log()), col(z.log_softmax(-1)),
              rep(new.entropy()), rep(was.kl(new)))
    if ref is not None:
        base = MoveDist(ref.log_softmax(-1)[None])
        x.logp_ref, x.kl_ref = col(base.logp[0]), rep(new.kl(base))
    return loss_terms(x, LossConfig(**kw))

def value_and_grad(f, z):
    z = z.clone().requires_grad_()
    y = f(z)
    return y.item(), torch.autograd.grad(y, z, allow_unused=True)[0]

def KL(p, q): return (p*(p.log() - q.log())).sum()
def soft(z): return z.softmax(-1)
def close(a, b, **kw): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-12, **kw)

@pytest.mark.parametrize("kind", ["k1", "k3", "exact"])
def test_kl_to_the_old_policy_is_unbiased_in_value_and_gradient(kind):
    got = value_and_grad(lambda z: expect(z, P_OLD, kl=kind)["kl"], Z_NEW)
    want = value_and_grad(lambda z: KL(P_OLD, soft(z)), Z_NEW)
    close(got[0], want[0])
    close(got[1], want[1])

def test_k2_to_the_old_policy_is_biased_and_how():
    got = value_and_grad(lambda z: expect(z, P_OLD, kl="k2")["kl"], Z_NEW)
    log_ratio = Z_NEW.log_softmax(-1) - P_OLD.log()
    close(got[0], (P_OLD*log_ratio**2/2).sum().item())
    close(got[1], value_and_grad(lambda z: (P_OLD*log_ratio*z.log_softmax(-1)).sum(), Z_NEW)[1])
    assert abs(got[0] - KL(P_OLD, soft(Z_NEW))) > 1e-3

def test_kl_to_the_reference_on_policy():
    "Values: k1 and k3 are unbiased. Gradients: k1's is 0, k2's that of KL(new || ref), k3's that of KL(ref || new)."
    old, ref = soft(Z_NEW), soft(Z_REF)
    exact = value_and_grad(lambda z: KL(soft(z), ref), Z_NEW)
    reverse = value_and_grad(lambda z: KL(ref, soft(z)), Z_NEW)
    def of(kind): return value_and_grad(lambda z: expect(z, old, Z_REF, kl=kind, kl_to="reference")["kl"], Z_NEW)
    run = {kind: of(kind) for kind in ("k1", "k2", "k3", "exact")}
    for k in ("k1", "k3", "exact"): close(run[k][0], exact[0])
    close(run["exact"][1], exact[1])
    close(run["k2"][1], exact[1])
    close(run["k3"][1], reverse[1])
    assert run["k1"][1].abs().max() < 1e-15 and exact[1].abs().max() > .1

def test_on_policy_the_sampled_entropy_bonus_and_k1_push_nowhere():
    old = soft(Z_NEW)
    def of(term, **kw): return value_and_grad(lambda z: expect(z, old, **kw)[term], Z_NEW)
    for kind in ("k1", "k2", "k3", "exact"): assert of("kl", kl=kind)[1].abs().max() < 1e-15, kind
    assert of("entropy", entropy="sampled")[1].abs().max() < 1e-15
    value, grad = value_and_grad(lambda z: expect(z, old, entropy="sampled")["entropy"], Z_NEW)
    close(value, -(old*old.log()).sum().item())                            # the number is right, the gradient is not
    exact = value_and_grad(lambda z: expect(z, old, entropy="exact")["entropy"], Z_NEW)
    close(exact[0], value)
    close(exact[1], value_and_grad(lambda z: -(soft(z)*z.log_softmax(-1)).sum(), Z_NEW)[1])
    assert exact[1].abs().max() > .05

def test_off_policy_the_sampled_entropy_bonus_is_a_kl_penalty():
    got = value_and_grad(lambda z: expect(z, P_OLD, entropy="sampled")["entropy"], Z_NEW)
    close(got[0], KL(P_OLD, soft(Z_NEW)).item() - (P_OLD*P_OLD.log()).sum().item())
    close(got[1], value_and_grad(lambda z: KL(P_OLD, soft(z)), Z_NEW)[1])

@pytest.mark.parametrize("how", ["ppo", "cispo"])
def test_policy_gradient_is_the_all_move_gradient(how):
    "Unclipped, the surrogate's expected gradient off policy is that of the expected reward; so is its value (PPO)."
    reward = torch.tensor([.5, -1., .2, 2.], dtype=torch.float64)
    wide = dict(surrogate=how, epsilon_low=1., epsilon_high=100.)
    got = value_and_grad(lambda z: expect(z, P_OLD, adv=reward, **wide)["policy"], Z_NEW)
    want = value_and_grad(lambda z: -(soft(z)*reward).sum(), Z_NEW)
    close(got[1], want[1])
    if how == "ppo": close(got[0], want[0])

def test_on_policy_the_clip_does_not_matter():
    reward = torch.tensor([.5, -1., .2, 2.], dtype=torch.float64)
    want = value_and_grad(lambda z: -(soft(z)*reward).sum(), Z_NEW)[1]
    def of(**kw): return value_and_grad(lambda z: expect(z, soft(Z_NEW), adv=reward, **kw)["policy"], Z_NEW)[1]
    for kw in SURROGATES:
        if kw.get("epsilon_high") != 0: close(of(**kw), want)              # no band at all has half of the subgradient

def test_clipped_gradient_is_the_sum_over_moves_inside():
    reward = torch.tensor([.5, -1., .2, 2.], dtype=torch.float64)
    rho = soft(Z_NEW)/P_OLD
    inside = ~(((rho > 1.2) & (reward > 0)) | ((rho < .8) & (reward < 0)))
    assert 0 < inside.sum() < 4
    got = value_and_grad(lambda z: expect(z, P_OLD, adv=reward)["policy"], Z_NEW)[1]
    close(got, value_and_grad(lambda z: -(soft(z)*reward*inside).sum(), Z_NEW)[1])

def test_statistics_are_expectations_over_moves():
    "Ten samples in exact proportion to the old policy: clip mass, mean ratio, ESS and approx_kl are their exact sums."
    a = torch.tensor([0]*4 + [1]*3 + [2]*2 + [3])
    new = soft(Z_NEW)
    rho = new/P_OLD
    got = ratio_stats(new.log()[a], P_OLD.log()[a], torch.ones(10), torch.ones(10, dtype=torch.bool), LossConfig())
    assert got["clip_region"] == pytest.approx((P_OLD*((rho - 1).abs() > .2)).sum().item())
    assert got["clip_binding_high"] == got["clip_binding"] == pytest.approx((P_OLD*(rho > 1.2)).sum().item())
    assert got["mean_ratio"] == pytest.approx(1) and got["approx_kl"] == pytest.approx(KL(P_OLD, new).item())
    assert got["ess"] == pytest.approx(1/(new**2/P_OLD).sum().item())

# ---------------------------------------------------------------- the budget of the gradient

BUDGETS = [dict(kl=k, kl_to=to, entropy=e) for k, to, e in (
    ("k1", "old", "sampled"), ("k3", "old", "exact"), ("exact", "old", "sampled"), ("exact", "reference", "exact"))]

def slow_budget(cfg, case, garbage=0.):
    "Each term by itself: a fresh graph, a loss with the other terms taken out, plain sums over its gradient's numbers."
    def gradient(name):
        z, x = case.plies(cfg.aggregate, garbage)
        terms = loss_terms(x, cfg)
        weight = dict(policy=1., kl=cfg.kl_coef, entropy=-cfg.entropy_coef)
        (weight[name]*terms[name]).backward()
        return z.grad.flatten().tolist()
    g = {k: gradient(k) for k in ("policy", "kl", "entropy")}
    def dot(a, b): return sum(x*y for x, y in zip(g[a], g[b]))
    def cos(a, b): return dot(a, b)/math.sqrt(dot(a, a)*dot(b, b))
    return {f"grad_{k}": math.sqrt(dot(k, k)) for k in g} | dict(
        cos_kl_policy=cos("kl", "policy"), cos_entropy_policy=cos("entropy", "policy"),
        cos_kl_entropy=cos("kl", "entropy"))

@pytest.mark.parametrize("how", ["ply", "trajectory", "constant"])
@pytest.mark.parametrize("kw", BUDGETS, ids=lambda kw: "-".join(kw.values()))
def test_gradient_budget(kw, how):
    for seed, garbage in enumerate(GARBAGE[:3]):
        cfg, case = LossConfig(aggregate=how, kl_coef=.7, entropy_coef=.3, **kw), Case(20+seed)
        z, x = case.plies(how, garbage)
        got = gradient_budget(weighted_terms(loss_terms(x, cfg), cfg), [z])
        assert got == pytest.approx(slow_budget(cfg, case), rel=1e-9, abs=1e-12)

@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_a_padded_ply_has_no_part_in_the_budget(garbage):
    "To the last bit, and to the leaf: whatever stands outside of the mask, its own gradient is 0."
    for kw in BUDGETS:
        cfg, got = LossConfig(kl_coef=.7, entropy_coef=.3, **kw), []
        for g in (0., garbage):
            _, x = Case(5).plies("ply", g)
            leaves = [v.detach().clone().requires_grad_() for v in (x.logp_new, x.entropy, x.kl_old, x.kl_ref)]
            x.logp_new, x.entropy, x.kl_old, x.kl_ref = leaves
            terms = weighted_terms(loss_terms(x, cfg), cfg)
            grads = term_gradients(terms, leaves)
            got.append((budget_of(grads), grads))
            for v in grads.values(): assert v.reshape(4, *x.mask.shape)[:, ~x.mask].count_nonzero() == 0
        assert got[0][0] == got[1][0] and all(torch.equal(got[0][1][k], got[1][1][k]) for k in grads), kw

def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()

def net_terms(net, rows, total, cfg):
    "The weighted terms of one-ply games; weights are divided by the whole batch's count."
    data = torch.Generator().manual_seed(1)
    features = torch.randn(12, 3, generator=data, dtype=torch.float64)
    action = torch.randint(0, 4, (12, 1), generator=data)
    adv = torch.randn(12, 1, generator=data, dtype=torch.float64)
    old = MoveDist(torch.randn(12, 1, 4, generator=data, dtype=torch.float64).log_softmax(-1))
    new = MoveDist(net(features)[:, None].log_softmax(-1))
    one = torch.ones(12, 1, dtype=torch.float64)
    x = Plies(one.bool(), one/total, adv, old.log_prob(action), new.log_prob(action), new.entropy(), old.kl(new))
    some = Plies(**{k: None if v is None else v[rows] for k, v in vars(x).items()})
    return weighted_terms(loss_terms(some, cfg), cfg)

def test_the_budget_leaves_graph_and_gradients_alone_and_its_parts_are_the_whole():
    cfg, net = LossConfig(kl_coef=.5, entropy_coef=.2), small_net()
    params = list(net.parameters())
    terms = net_terms(net, slice(None), 12, cfg)
    grads = term_gradients(terms, params)
    assert all(p.grad is None for p in params)
    sum(terms.values()).backward()                                          # the graph is still there
    whole = torch.cat([p.grad.flatten() for p in params])
    torch.testing.assert_close(sum(grads.values()), whole, rtol=1e-12, atol=1e-15)
    assert gradient_budget(net_terms(net, slice(None), 12, cfg), params) == budget_of(grads)
    pieces = [term_gradients(net_terms(net, rows, 12, cfg), params) for rows in (slice(0, 5), slice(5, 12))]
    for k, v in grads.items(): torch.testing.assert_close(pieces[0][k] + pieces[1][k], v, rtol=1e-12, atol=1e-15)

def test_the_budget_of_what_is_frozen_missing_or_constant():
    net = small_net()
    cfg = LossConfig(kl_coef=.5, entropy_coef=.2)
    every = term_gradients(net_terms(net, slice(None), 12, cfg), list(net.parameters()))
    for p in net[0].parameters(): p.requires_grad_(False)
    some = term_gradients(net_terms(net, slice(None), 12, cfg), list(net.parameters()))
    for k in every: assert torch.equal(every[k][20:], some[k])                # the first layer has 20 numbers
    policy = net_terms(net, slice(None), 12, LossConfig())
    assert set(policy) == {"policy"}                                          # no coefficient, no backward pass
    for extra in ({}, dict(kl=torch.tensor(.3), entropy=torch.tensor(-1.))):  # left out, or constants
        b = gradient_budget(policy | extra, list(net.parameters()))
        assert b["grad_policy"] > 0 == b["grad_kl"] == b["grad_entropy"]
        assert all(math.isnan(b[k]) for k in b if k.startswith("cos"))
    assert set(budget_of({})) == {"grad_policy", "grad_kl", "grad_entropy",
                                  "cos_kl_policy", "cos_entropy_policy", "cos_kl_entropy"}

def test_weighted_terms_add_up_to_the_total():
    for kl_coef, entropy_coef in itertools.product((0., .7), (0., .3, -.3)):
        cfg = LossConfig(kl_coef=kl_coef, entropy_coef=entropy_coef)
        _, x = Case(3).plies("ply")
        terms = loss_terms(x, cfg)
        parts = weighted_terms(terms, cfg)
        assert set(parts) == {"policy"} | ({"kl"} if kl_coef else set()) | ({"entropy"} if entropy_coef else set())
        assert sum(v.item() for v in parts.values()) == pytest.approx(terms["total"].item(), rel=1e-12)

def test_equal_coefficients_of_k1_and_the_sampled_bonus_leave_the_policy_alone():
    "On any batch, at any distance from the old policy, to the last bit; unequal ones leave their difference."
    for seed, how in itertools.product(range(4), ("ply", "trajectory", "constant")):
        cfg = LossConfig(aggregate=how, kl_coef=.1, kl="k1", entropy_coef=.1, entropy="sampled")
        z, x = Case(seed).plies(how)
        g = term_gradients(weighted_terms(loss_terms(x, cfg), cfg), [z])
        b = budget_of(g)
        assert (g["kl"] + g["entropy"]).count_nonzero() == 0 and b["grad_kl"] == b["grad_entropy"] > 0
        assert b["cos_kl_entropy"] == pytest.approx(-1)
        off = LossConfig(aggregate=how, kl_coef=.4, kl="k1", entropy_coef=.1, entropy="sampled")
        assert gradient_budget(weighted_terms(loss_terms(x, off), off), [z])["grad_kl"] == pytest.approx(4*b["grad_kl"])

def test_a_bonus_on_moves_of_a_flatter_policy_sharpens():
    "Sampled at 1.3, evaluated at 1: a step for the sampled bonus lowers the entropy, k1 and the exact bonus raise it."
    z = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    def slope(row, term, **kw): return value_and_grad(lambda v: expect(v, soft(row/1.3), **kw)[term], row)[1]
    for row in z:
        H = value_and_grad(lambda v: -(soft(v)*v.log_softmax(-1)).sum(), row)[1]
        bonus, k1 = slope(row, "entropy", entropy="sampled"), slope(row, "kl", kl="k1")
        assert bonus @ H < 0 < slope(row, "entropy", entropy="exact") @ H and -k1 @ H > 0

def test_coin_flip_advantages_push_a_clipped_policy_back():
    "Advantages of +1 and -1 at random: no push on average without a clip; with it a step back to the behaviour policy."
    z = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))*2
    def push(row, old, **kw):
        def policy(v, A): return expect(v, old, adv=A*torch.ones(6, dtype=torch.float64), **kw)["policy"]
        return value_and_grad(lambda v: (policy(v, 1.) + policy(v, -1.))/2, row)[1]
    def way_back(row, old): return value_and_grad(lambda v: KL(old, soft(v)), row)[1]
    for row in z:
        old = soft(row/1.5)
        assert push(row, old, epsilon_low=1., epsilon_high=100.).abs().max() < 1e-12
        if ((soft(row)/old - 1).abs() > .2).any(): assert push(row, old) @ way_back(row, old) > 0

# A game of two plies: three moves at the root (the third ends the game), two answers to each of the others
ROOT = torch.tensor([.2, -.4, .5], dtype=torch.float64)
ANSWER = torch.tensor([[.1, .6], [-.3, .3]], dtype=torch.float64)
FIRST, SECOND = [.3, -.6, .9], [[.7, -.2], [-1.1, .4]]                     # step rewards, mover's view
GAMES = [(0, 0), (0, 1), (1, 0), (1, 1), (2, None)]

def enumerate_groups(n, kind, baseline):
    "Exact expected gradient by (ROOT, ANSWER) over every group of n games, and per-game probability of reaching ply 2."
    root, answer = ROOT.clone().requires_grad_(), ANSWER.clone().requires_grad_()
    lp0, lp1 = root.log_softmax(-1), answer.log_softmax(-1)
    p = [(lp0[a].exp()*(lp1[a, b].exp() if b is not None else 1.)).item() for a, b in GAMES]
    total = 0.
    for group in itertools.product(range(len(GAMES)), repeat=n):
        games = [GAMES[i] for i in group]
        reward = [[FIRST[a], SECOND[a][b] if b is not None else 0.] for a, b in games]
        reward = torch.tensor([reward], dtype=torch.float64)
        mask = torch.tensor([[[True, b is not None] for _, b in games]])
        adv = group_advantage(returns(reward, kind), mask, baseline)[0]
        nothing = torch.tensor(NAN).double()
        logp = torch.stack([torch.stack([lp0[a], lp1[a, b] if b is not None else nothing]) for a, b in games])
        w = torch.full(mask[0].shape, 1./n, dtype=torch.float64)           # the sum over plies, the mean over games
        zero = torch.zeros_like(adv)
        term = loss_terms(Plies(mask[0], w, adv, logp.detach(), logp, zero, zero), LossConfig())["policy"]
        total = total + math.prod(p[i] for i in group)*term
    return torch.autograd.grad(total, (root, answer))

def exact_gradient():
    "Of the negated expected result, by the starter's choice and, with the other sign, by the answers."
    root, answer = ROOT.clone().requires_grad_(), ANSWER.clone().requires_grad_()
    p0, p1 = root.softmax(-1), answer.softmax(-1)
    def second(a, b): return (1., 0.) if b is None else (p1[a, b], SECOND[a][b])      # probability and reward
    J = sum(p0[a]*second(a, b)[0]*(FIRST[a] - second(a, b)[1]) for a, b in GAMES)
    g_root, g_answer = torch.autograd.grad(J, (root, answer))
    return -g_root, g_answer

@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", ["to_go", "trajectory"])
def test_leave_one_out_is_unbiased(n, kind):
    "By full enumeration of groups. A game alone at a ply has no sibling: there, and only there, the gradient shrinks."
    got, want = enumerate_groups(n, kind, "loo"), exact_gradient()
    close(got[0], want[0])
    company = 1 - ROOT.softmax(-1)[2].item()**(n-1)                        # some sibling goes on too
    close(got[1], want[1]*company)
    assert got[1].abs().max() > .01

@pytest.mark.parametrize("n", [2, 3])
def test_the_group_mean_shrinks_the_gradient_by_a_factor(n):
    got, want = enumerate_groups(n, "to_go", "mean"), exact_gradient()
    close(got[0], want[0]*(n-1)/n)

# ---------------------------------------------------------------- small cases and refusals

def test_rewards_of_the_other_side_are_losses():
    r = torch.tensor([[[1., 3., 0., 2.]]])
    assert reward_to_go(r, .5)[0, 0].tolist() == [1 - .5*3 + 0 - .125*2, 3 - 0 + .25*2, 0 - .5*2, 2]
    assert returns(r, "trajectory")[0, 0].tolist() == [-4, 4, -4, 4]

def test_kl_estimates_by_hand():
    p, q = torch.tensor(.5).log(), torch.tensor(.25).log()
    assert kl_estimate(p, q, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(p, q, "k2").item() == pytest.approx(math.log(2)**2/2)
    assert kl_estimate(p, q, "k3").item() == pytest.approx(.5 - 1 + math.log(2))

@pytest.mark.parametrize("kw", [
    dict(returns="all"), dict(baseline="none"), dict(scale="max"), dict(ratio="token"), dict(surrogate="reinforce"),
    dict(aggregate="mean"), dict(kl="k4"), dict(kl_to="new"), dict(entropy="k1"), dict(discount=1.1),
    dict(discount=-.1), dict(epsilon_low=1.1), dict(epsilon_low=-.1), dict(epsilon_high=-.1), dict(delta=-1.),
    dict(kl_coef=-1.), dict(entropy_coef=NAN), dict(discount=NAN), dict(epsilon_high=INF)], ids=str)
def test_config_refuses(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): LossConfig(**kw)

def test_a_result_moves_both_sides_whatever_the_level_of_the_ratio():
    "On-policy, ply and trajectory ratios give a side the same gradient for its result: the sides must not cancel."
    torch.manual_seed(0)
    reward, mask = torch.randn(3, 4, 6), torch.rand(3, 4, 6) < .7
    adv = returns(torch.where(mask, reward, 0.), "trajectory").flatten(0, 1)
    grads = []
    for level in ("ply", "trajectory"):
        lp = torch.full((12, 6), -1.5, requires_grad=True)
        m = mask.flatten(0, 1)
        w, n = ply_weights(m)
        zero = torch.zeros(12, 6)
        loss_terms(Plies(m, w/n, adv, lp.detach().clone(), lp, zero, zero), LossConfig(ratio=level))["total"].backward()
        side = [torch.where(m, lp.grad, 0.)[:, k::2].sum(1) for k in (0, 1)]      # what each side's plies get together
        grads.append(torch.stack(side))
    assert torch.allclose(*grads, atol=1e-7) and grads[1].abs().max() > .01

def test_advantages_of_three_games_by_hand():
    credit = torch.tensor([[[1.], [2.], [6.]]])
    every = torch.ones_like(credit, dtype=torch.bool)
    assert group_advantage(credit, every).flatten().tolist() == [-2, -1, 3]
    assert group_advantage(credit, every, "loo").flatten().tolist() == [-3, -1.5, 4.5]
    std, rms = (group_advantage(credit, every, scale=scale) for scale in ("std", "rms"))
    assert std.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(std, rms, atol=1e-5)                              # for a single group they are one

def test_delta_caps_a_bad_move_by_hand():
    for delta, slope in ((None, 1.), (1.4, 0.)):
        rho = torch.tensor(1.5, requires_grad=True)
        clipped_surrogate(rho, torch.tensor(-1.), delta=delta).backward()
        assert rho.grad.item() == slope

def test_cispo_weighs_and_loses_nothing():
    logp = torch.tensor([.1, .5], requires_grad=True)                       # of the new policy; the old one's is 0
    cispo_surrogate(logp.exp(), logp, torch.ones(2)).sum().backward()
    torch.testing.assert_close(-logp.grad, torch.tensor([math.exp(.1), 1.2]))      # the second is weighted 1.2

def test_on_policy_all_surrogates_are_the_policy_gradient():
    "With ratio 1 the gradient is -A ∇log π whatever ε is; PPO, CISPO and GSPO differ once the policy has moved."
    torch.manual_seed(1)
    scores, adv = torch.randn(4, 3), torch.randn(4, 1)*torch.tensor([1., -1., 1.])       # a result, seen by both sides
    mask, zero = torch.ones(4, 3).bool(), torch.zeros(4, 3)
    def gradient(**kw):
        logp = scores.clone().requires_grad_()
        plies = Plies(mask, torch.full((4, 3), 1/12), adv, scores, logp, zero, zero)
        loss_terms(plies, LossConfig(**kw))["total"].backward()
        return logp.grad
    torch.testing.assert_close(gradient(), -adv/12)
    for kw in (dict(surrogate="cispo"), dict(ratio="trajectory"), dict(epsilon_low=.01, epsilon_high=.01)):
        torch.testing.assert_close(gradient(**kw), gradient())

def two_plies(pad):
    "Ratios 1 and 1.5, advantages -1 and 2; the third ply is padding."
    def row(a, b): return torch.tensor([[a, b, pad]])
    logp = row(-1., -1. + math.log(1.5)).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    return logp, Plies(mask, row(.5, .5), row(-1., 2.), row(-1., -1.), logp, row(1., 1.), row(.1, .2))

@pytest.mark.parametrize("pad", [0., *GARBAGE], ids=str)
def test_two_plies_by_hand(pad):
    logp, x = two_plies(pad)
    terms = loss_terms(x, LossConfig(kl="k1", entropy="sampled"))           # the terms of the record's runs
    terms["policy"].backward()
    assert terms["policy"].item() == pytest.approx(-.7) and logp.grad.tolist() == [[.5, 0., 0.]]
    mean_log = math.log(1.5)/2
    assert terms["kl"].item() == pytest.approx(-mean_log) and terms["entropy"].item() == pytest.approx(1 - mean_log)
    stats = ratio_stats(logp.detach(), x.logp_old, x.adv, x.mask, LossConfig())
    assert stats["clip_region"] == .5 and stats["clip_binding_high"] == .5 and stats["clip_binding_low"] == 0
    assert stats["mean_ratio"] == pytest.approx(1.25) and stats["max_log_ratio"] == pytest.approx(math.log(1.5))
    assert stats["approx_kl"] == pytest.approx(-mean_log)                   # no KL is negative; an estimate may be

def test_budget_by_hand():
    w = torch.zeros(2, requires_grad=True)
    assert gradient_budget(dict(policy=2*w[0], kl=3*w[1], entropy=-3*w[1]), [w]) == dict(
        grad_policy=2, grad_kl=3, grad_entropy=3, cos_kl_policy=0, cos_entropy_policy=0, cos_kl_entropy=-1)

def test_all_moves_are_the_exact_gradient():
    "Eight positions of 30 moves: weighed by their probabilities, all of them leave no error; sampled groups do."
    torch.manual_seed(0)
    logits, worth = torch.randn(8, 30, requires_grad=True), torch.rand(8, 30)
    exact, = torch.autograd.grad(-(logits.softmax(-1)*worth).sum(-1).mean(), logits)
    pi, zero = logits.detach().softmax(-1), torch.zeros(8, 30)
    adv = worth - (pi*worth).sum(-1, keepdim=True)
    plies = Plies(torch.ones_like(adv).bool(), pi/8, adv, pi.log(), logits.log_softmax(-1), zero, zero)
    got, = torch.autograd.grad(loss_terms(plies, LossConfig(moves="all"))["policy"], logits)
    assert (got - exact).norm() < 1e-6*exact.norm()

def test_unknown_kl_estimates_and_a_missing_reference_are_errors():
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match="k4"): kl_estimate(zero, zero, "k4")
    _, x = two_plies(0.)
    for kind in ("exact", "k3"):
        with pytest.raises(ValueError, match="kl_to = reference"):
            loss_terms(x, LossConfig(kl=kind, kl_to="reference", kl_coef=.1))

def test_the_page_names_the_defaults_that_runs_have():
    "The table at the end of 03_loss: fields of LossConfig, and the entropy coefficient of the preset `tiny`."
    page = (TOP/"nbs/03_loss.ipynb").read_text()
    default = preset("tiny")
    begins, ends = re.search(r"the preset `tiny` begins at ([\d.]+) and ends at ([\d.]+)\|", page).groups()
    assert (default.loss.entropy_coef, default.trainer.entropy_end) == (float(begins), float(ends))
    cfg = LossConfig()
    assert (cfg.kl, cfg.entropy, cfg.kl_coef, cfg.entropy_coef) == ("exact", "exact", 0, 0)
    assert (cfg.scale, cfg.baseline, cfg.epsilon_low, cfg.epsilon_high) == ("rms", "mean", .2, .2)
    assert default.loss.moves == "all" and default.trainer.epochs*default.trainer.minibatches == 1
