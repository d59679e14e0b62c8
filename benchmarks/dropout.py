"""What dropout does to the ratio of PPO: networks trained with dropout 0.1, measured while they learn.

    python -m grpo_chess.pretrain label --positions 150000 --out labels
    python benchmarks/dropout.py --labels labels --out dropout.json        # about 40 minutes of one core

Three kinds of network, three seeds each:
  tiny     the package's network, from random weights; target: the engine's best move, label smoothing 0.1, as in the
           record
  tuned    the same from weights that were trained without dropout (--init); soft targets softmax(win probability/0.03)
  pooled   the trunk of `tuned` under a head like the record's: mean over the squares, then one small network for all
           1968 actions; target as `tiny`
At every mark two passes of the same weights over the positions of nbs/data/positions.jsonl, dropout on, at temperature
1.3, the temperature of the record's runs. The figures are sums over the legal moves, not samples. After training once
more with the scores multiplied until the entropy is the record's. Also: compiled against eager.
"""
import argparse
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import chess
import numpy as np
import torch
from torch import nn

from grpo_chess.board import encode
from grpo_chess.model import MODELS, ChessTransformer, MoveDist, load_model, pretrained
from grpo_chess.labels import join, read_shard
from grpo_chess.reward import win_probability
from grpo_chess.sampler import expected_ratio_stats

TOP = Path(__file__).resolve().parent.parent
KINDS = dict(
    pooled=dict(steps=480, batch=128, lr=2e-3), tuned=dict(steps=160, batch=128, lr=5e-4),
    tiny=dict(steps=600, batch=128, lr=2e-3))
MARKS = (0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1)
OPTIMIZER = ("AdamW, weight decay 0.01, 100 steps of warm-up, then linear to 0; bfloat16 autocast; "
             "gradient norm at most 1")


class Pooled(nn.Module):
    "A head like the record's on the package's trunk."
    def __init__(self, trunk, hidden=256):
        super().__init__()
        self.trunk, self.norm = trunk, nn.LayerNorm(trunk.cfg.width)
        self.head = nn.Sequential(nn.Linear(trunk.cfg.width, hidden), nn.ReLU(), nn.Linear(hidden, 1968))

    def forward(self, tokens, legal):
        t, legal = self.trunk, legal.long()
        x = t.piece(tokens[:, :64].long()) + t.square + tokens[:, 64, None, None]/100*t.clock
        for block in t.blocks: x = block(x)
        return self.head(self.norm(x).mean(1)).gather(1, legal.clamp_min(0)).float().masked_fill(legal < 0, -torch.inf)


def make(kind, init):
    net = ChessTransformer(replace(MODELS["tiny"], dropout=.1))
    if kind != "tiny": net.load_state_dict(init.state_dict())
    return Pooled(net) if kind == "pooled" else net


@torch.no_grad()
def measure(net, tokens, legal, gain=1., T=1.3, pairs=2):
    """Two passes of the same weights with dropout, scores times `gain`.

    `spread` is the standard deviation of a position's scores without dropout."""
    net.eval()
    spread = torch.stack([z[row >= 0].std() for z, row in zip(net(tokens, legal)*gain, legal)]).mean().item()
    net.train()
    torch.manual_seed(0)
    rows = []
    for _ in range(pairs):
        a, b = (MoveDist.from_logits(net(tokens, legal)*gain, T) for _ in range(2))
        x = expected_ratio_stats(a, b)
        square = (a.probs*(b.finite - a.finite)**2).sum(-1).mean().item()
        kept = {k: x[k] for k in ("clip_region", "approx_kl", "mean_ratio", "entropy")}
        rows.append(kept | dict(sigma=math.sqrt(square - x["approx_kl"]**2)))
    return dict(spread=spread) | {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}


def sharpened(net, where, entropy=2.80):
    "The same with the scores multiplied until the entropy is what the record's run logged at its first step."
    low, high = .5, 8.
    for _ in range(10):
        gain = (low*high)**.5
        low, high = (gain, high) if measure(net, *where, gain, pairs=1)["entropy"] > entropy else (low, gain)
    return dict(gain=gain, **measure(net, *where, gain))


class Data:
    "Batches of labelled positions: tokens, legal actions, win probability of each (0 on padding)."
    def __init__(self, folder): self.labels = join([read_shard(p) for p in sorted(Path(folder).glob("*.parquet"))])

    def __len__(self): return len(self.labels)

    def __call__(self, index):
        tokens, legal, scores, _ = self.labels.rows(index.numpy())
        value = np.where(legal >= 0, win_probability(scores), 0.)
        return torch.as_tensor(tokens), torch.as_tensor(legal), torch.as_tensor(value, dtype=torch.float32)


@torch.no_grad()
def regret(net, tokens, legal, value):
    "Win probability lost against the best move when the move is drawn at temperature 1, without dropout."
    net.eval()
    p = net(tokens, legal).softmax(-1)
    net.train()
    return (value.amax(-1) - (p*value).sum(-1)).mean().item()


def targets(kind, legal, value):
    value = value.masked_fill(legal < 0, -9.)
    if kind == "tuned": return (value/.03).softmax(-1)
    best = torch.zeros_like(value).scatter(1, value.argmax(-1, keepdim=True), 1.)
    return .9*best + .1*(legal >= 0)/(legal >= 0).sum(-1, keepdim=True)


def rounded(row): return {k: round(x, 4) for k, x in row.items()}


def train(kind, seed, data, init, where, steps, batch, lr):
    "One network from its start to its end, measured at every mark and once more with its scores multiplied."
    torch.manual_seed(seed)
    net, rows = make(kind, init).train(), []
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=.01)
    held, marks, start = torch.arange(256), [int(m*steps) for m in MARKS], time.process_time()
    for step in range(steps + 1):
        if step in marks:
            state = torch.get_rng_state()                                    # measuring must not change the training
            rows.append(dict(step=step, regret=regret(net, *data(held)), **measure(net, *where)))
            torch.set_rng_state(state)
            print(kind, seed, rounded(rows[-1]), f"{time.process_time() - start:.0f} s", flush=True)
        if step == steps: break
        for g in opt.param_groups: g["lr"] = lr*min(1, (step+1)/100)*(1 - step/steps)
        tokens, legal, value = data(torch.randint(len(held), len(data), (batch,)))
        with torch.autocast("cpu", torch.bfloat16): z = net(tokens, legal)
        loss = -(targets(kind, legal, value)*z.log_softmax(-1).masked_fill(legal < 0, 0.)).sum(-1).mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
    return dict(kind=kind, seed=seed, steps=steps, batch=batch, lr=lr, rows=[rounded(row) for row in rows],
                sharpened=rounded(sharpened(net, where)))


@torch.no_grad()
def compiled(net, tokens, legal):
    "max |log ratio| and clip_region of torch.compile against eager."
    fast, out = torch.compile(net), {}
    for name, half in (("float32", False), ("bfloat16", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            x = expected_ratio_stats(*(MoveDist.from_logits(f(tokens, legal)) for f in (net, fast)))
        out[name] = {k: float(f"{x[k]:.1e}") for k in ("max_log_ratio", "clip_region")}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", required=True, help="folder from `python -m grpo_chess.pretrain label`")
    parser.add_argument("--out", default="dropout.json")
    parser.add_argument("--init", default="", help="weights of a tiny network; empty takes the package's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    init = (load_model(args.init, MODELS["tiny"]) if args.init else pretrained("tiny")).eval()
    fens = [json.loads(line)["fen"] for line in (TOP/"nbs/data/positions.jsonl").read_text().splitlines()[1:]]
    where = tuple(map(torch.as_tensor, encode([chess.Board(f) for f in fens])))
    data = Data(args.labels)
    runs = [train(kind, seed, data, init, where, **KINDS[kind]) for kind in args.kinds for seed in range(args.seeds)]
    about = dict(made_by="benchmarks/dropout.py", labels=len(data), optimizer=OPTIMIZER)
    text = json.dumps(about | dict(compiled=compiled(init, *where), runs=runs))
    Path(args.out).write_text(re.sub(r'(?=\{"(step|kind)")', "\n", text) + "\n")          # a line a row


if __name__ == "__main__": main()
