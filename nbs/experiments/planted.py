"""A small trainer of one-move games for runs by the hundred: real positions, a tiny network, this project's own
advantages, loss, ratio statistics and gradient budget. `doctor.py` plants faults in it."""

import math
import time

import numpy as np
import torch
from torch import nn

from grpo_chess.firststep import keep_top
from grpo_chess.guards import multiplicative_kl
from grpo_chess.loss import (
    LossConfig,
    Plies,
    budget_of,
    group_advantage,
    loss_terms,
    no_spread_share,
    ply_weights,
    ratio_stats,
    term_gradients,
    weighted_terms,
)
from grpo_chess.model import MoveDist
from grpo_chess.sampler import uniforms


class Net(nn.Module):
    "Scores of the legal moves from random features of a position."

    def __init__(self, width, layers, dropout, features=48, actions=1968):
        super().__init__()
        sizes = [features] + [width] * layers
        body = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.Tanh(), nn.Dropout(dropout))]
        self.body, self.head = nn.Sequential(*body), nn.Linear(sizes[-1], actions)
        self.sharp = 1.0

    def forward(self, x, legal):
        scores = self.sharp * self.head(self.body(x)).gather(-1, legal.clamp_min(0))
        return scores.masked_fill(legal < 0, -torch.inf)


class Light:
    "A run; `step` makes one step and returns the columns that the real trainer logs."

    def __init__(self, legal, value, x, seed):
        torch.manual_seed(seed)
        self.x, self.legal, self.value, self.seed, self.done = x, legal, value, seed, 0
        self.features = torch.randn(len(legal), 48, generator=torch.Generator().manual_seed(7))
        self.net = Net(x.get("width", 24), x.get("layers", 1), x.get("dropout", 0.0))
        self.net.sharp = x.get("sharpen", 40) / 10
        self.net.train("dropout" in x)
        self.tau, self.boards, self.group = x.get("tau", 1.0), 12, 6
        cancel, target = x.get("cancel", 0.0), x.get("target", 0.0)
        self.loss = LossConfig(
            moves=x.get("mode", "sampled"),
            entropy_coef=cancel or x.get("bonus", 0.003),
            kl_coef=cancel or (0.001 if target else 0.0),
            kl="k1" if cancel else "exact",
            entropy="sampled" if cancel else "exact",
        )
        self.target, self.kl_coef, self.collapsed = target, self.loss.kl_coef, 0
        self.lr = 1e-12 if "sharper" in x else x.get("lr", 1e-4) * 20
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.lr, weight_decay=0.0)
        self.behaviour = self.net.state_dict()
        self.table = None
        if "sharper" in x or x.get("learned"):
            self.learn_first()
        if "sharper" in x or x.get("curve"):
            self.table = self.tempered()

    def scores(self, rows):
        return self.net(self.features[rows], self.legal[rows])

    def learn_first(self, steps=150):
        "A start that knows something: supervised training on soft targets."
        target = (self.value / 0.05).softmax(-1)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        for _ in range(steps):
            logp = MoveDist.from_logits(self.scores(torch.arange(len(self.legal)))).finite
            optimizer.zero_grad()
            (-(target * logp).sum(-1).mean()).backward()
            optimizer.step()

    def tempered(self):
        "Entropy and regret of the start at several temperatures."
        out, rows = [], torch.arange(len(self.legal))
        with torch.no_grad():
            for tau in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0):
                dist = MoveDist.from_logits(self.scores(rows), tau)
                regret = self.value.amax(-1) - (dist.probs * self.value.nan_to_num(neginf=0.0)).sum(-1)
                out.append((dist.entropy().mean().item(), regret.mean().item()))
        return out

    @torch.no_grad()
    def sampled_from(self, rows):
        "The behaviour policy of these positions, with what is wrong with it."
        now = {k: v.clone() for k, v in self.net.state_dict().items()}
        if self.done % self.x.get("sync", 1) == 0:
            self.behaviour = now
        self.net.load_state_dict(self.behaviour)
        dist = MoveDist.from_logits(self.scores(rows), self.tau)
        self.net.load_state_dict(now)
        if "keep" in self.x:
            kept = torch.as_tensor(keep_top(dist.logp.double().numpy(), self.x["keep"])).float()
            dist = MoveDist(torch.where(dist.legal, kept.clamp_min(-60.0), -torch.inf))
        if self.x.get("rounded"):
            rough = dist.logp.nan_to_num(neginf=-1e4).to(torch.bfloat16).float()
            dist = MoveDist.from_logits(torch.where(dist.legal, rough, -torch.inf))
        return dist

    def judged(self, value, times=1):
        "Rewards with the judge's noise."
        rng = np.random.default_rng([self.seed, self.done, times])
        return value + self.x.get("noise", 0.0) * torch.as_tensor(rng.standard_normal(value.shape)).float()

    def worth(self, rows, legal):
        "Value of each legal move, 0 elsewhere."
        value = 0.5 + self.x.get("shrink", 1.0) * (self.value[rows].nan_to_num(neginf=0.0) - 0.5)
        return torch.where(legal, value, 0.0)

    def games(self, rows, old):
        "What the loss needs of the games, and what is logged of them."
        value = self.worth(rows, old.legal)
        u = torch.as_tensor(uniforms(self.seed, self.done, list(range(self.boards)), (self.group,)))
        slot = torch.stack([old.sample(u[:, g]) for g in range(self.group)], 1)  # [B, G]
        reward = self.judged(value.gather(1, slot))
        best = value.masked_fill(~old.legal, -torch.inf).amax(-1)
        stats = {
            "agreement_mean": float(np.mean([np.bincount(r).max() / self.group for r in slot.numpy()])),
            "reward_spread": reward.std(1).mean().item(),
            "plies": self.boards * self.group,
            "train/avg_reward": (reward - value.sum(1, keepdim=True) / old.legal.sum(1, keepdim=True)).mean().item(),
        }
        if "noise" in self.x:
            stats["reward_noise"] = ((reward - self.judged(value.gather(1, slot), 2)).std() / 2**0.5).item()
        if self.loss.moves == "all":
            adv = value - (old.probs * value).sum(-1, keepdim=True)
            adv = adv / ((old.probs * adv**2).sum(-1).mean() ** 0.5 + 1e-4)
            spread = best - value.masked_fill(~old.legal, torch.inf).amin(-1)
            stats |= {
                "expected_regret": (best - (old.probs * value).sum(-1)).mean().item(),
                "no_spread": (spread <= 1e-9).float().mean().item(),
                "advantage_std": (old.probs * adv**2).sum(-1).mean().item() ** 0.5,
                "train/avg_reward": (value.gather(1, slot) - best[:, None]).mean().item(),
            }
        else:
            mask = torch.ones(self.boards, self.group, 1, dtype=torch.bool)
            adv = group_advantage(reward[..., None], mask, self.loss.baseline, self.loss.scale)[..., 0]
            stats |= {"no_spread": no_spread_share(reward[..., None], mask), "advantage_std": adv.std().item()}
        times = self.x.get("times", 1.0)
        stats["advantage_std"] *= abs(times)
        if self.table:
            x, y = np.array(sorted(self.table)).T
            stats["start_regret"] = float(np.interp(old.entropy().mean().item(), x, y))
        return slot, adv * times, stats

    def plies(self, rows, old, slot, adv):
        "The tensors of the loss, for the policy as it is now."
        now = MoveDist.from_logits(self.scores(rows), self.tau / self.x.get("gap", 1.0))
        entropy, kl = now.entropy()[:, None], old.kl(now)[:, None]
        if self.loss.moves == "all":
            mask = old.logp > -50  # a move that the sampler cannot draw has no weight
            weight = torch.where(mask, old.probs, 0.0) / len(rows)
            return now, Plies(mask, weight, torch.where(mask, adv, 0.0), old.finite, now.finite, entropy, kl)
        mask = torch.ones(len(rows), self.group, dtype=torch.bool)
        weight, count = ply_weights(mask)
        shape = mask.shape
        before, new = (d.logp.gather(1, slot) for d in (old, now))
        return now, Plies(mask, weight / count, adv, before, new, entropy.expand(shape), kl.expand(shape))

    def step(self):
        "Play, compare, update, measure."
        start = time.process_time()
        rng = np.random.default_rng([self.seed, self.done])
        rows = torch.as_tensor(rng.choice(len(self.legal), self.boards, replace=False))
        old = self.sampled_from(rows)
        slot, adv, stats = self.games(rows, old)
        parts = torch.arange(self.boards).chunk(self.x.get("minibatches", 1))
        self.loss.kl_coef = self.kl_coef
        updates = [self.update(rows[p], MoveDist(old.logp[p]), slot[p], adv[p]) for p in parts]
        row = {k: float(np.mean([u[k] for u in updates])) for k in updates[0]}
        row |= {k: updates[0][k] for k in ("entropy_gap",)} | dict(ratio_error=updates[0]["max_log_ratio"])
        if "sharper" in self.x:
            self.net.sharp *= self.x["sharper"]
        with torch.no_grad():
            after = MoveDist.from_logits(self.scores(rows), self.tau)
        row |= stats | dict(step=self.done, entropy=old.entropy().mean().item(), kl_step=old.kl(after).mean().item())
        if self.loss.moves == "all":
            row["gain_step"] = ((after.probs - old.probs) * self.worth(rows, old.legal)).sum(-1).mean().item()
        row |= dict(entropy_coef=self.loss.entropy_coef, kl_coef=self.kl_coef, lr=self.lr, temperature=self.tau)
        self.collapsed = self.collapsed + 1 if row["entropy"] < self.x.get("floor", 0.0) else 0
        row |= dict(collapsed=self.collapsed, seconds=time.process_time() - start)
        if self.target:
            row["kl_ratio"] = row["kl_step"] / self.target
            self.kl_coef = multiplicative_kl(self.kl_coef, row["kl_step"], self.target, high=self.x.get("top", 0.1))
        self.done += 1
        return row

    def update(self, rows, old, slot, adv):
        "One update, and what it shows."
        now, plies = self.plies(rows, old, slot, adv)
        terms, params = loss_terms(plies, self.loss), list(self.net.parameters())
        measured = budget_of(term_gradients(weighted_terms(terms, self.loss), params)) if self.done % 5 == 0 else {}
        self.optimizer.zero_grad()
        terms["total"].backward()
        norm = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
        share = plies.weight if self.loss.moves == "all" else None
        seen = ratio_stats(plies.logp_new.detach(), plies.logp_old, plies.adv, plies.mask, self.loss, share)
        self.optimizer.step()
        terms = {k: v.item() for k, v in terms.items()}
        if not math.isfinite(terms["total"]):
            raise FloatingPointError
        return (
            dict(
                loss=terms["total"],
                ppo_loss=terms["policy"],
                kl_term=self.loss.kl_coef * terms["kl"],
                entropy_term=-self.loss.entropy_coef * terms["entropy"],
                kl_exact=old.kl(now).mean().item(),
                grad_norm=norm,
                entropy_gap=(now.entropy() - old.entropy()).mean().item(),
            )
            | seen
            | measured
        )
