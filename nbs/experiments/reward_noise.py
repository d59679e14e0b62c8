"""Evaluations of real positions and of random moves from them, by depth: clean, and warm in two orders.

    python nbs/experiments/reward_noise.py [OUT]

writes nbs/data/reward_noise.csv, which nbs/findings/reward_noise.ipynb and nbs/05_reward.ipynb draw. Some six minutes
on one core; the same file every time with the same engine. A line is a position: number of the parent in
nbs/data/positions.jsonl (from 0), the move that was played there (empty: the parent itself), score codes at depths 1 to
12 of an engine that starts afresh (c1 ... c12), and of one that keeps its history, asked in two orders (a1, b1 ...).
"""
import csv
import json
import random
import sys
from pathlib import Path

import chess

from grpo_chess.board import position_key
from grpo_chess.engine import EngineConfig, EnginePool, engine_name

DATA = Path(__file__).resolve().parent.parent/"data"
DEPTHS, WARM = range(1, 13), (1, 2, 4, 6, 8)
PARENTS, MOVES, SEED = 128, 8, 0        # random moves are played from every second position

def positions():
    "Rows (parent, move, FEN): all stored positions, then random moves from half of them; none that ends the game."
    lines = (DATA/"positions.jsonl").read_text().splitlines()[1:]
    rng, fens = random.Random(SEED), [json.loads(line)["fen"] for line in lines]
    rows = [(k, "", fen) for k, fen in enumerate(fens)]
    for k in range(0, 2*PARENTS, 2):
        board = chess.Board(fens[k])
        moves = sorted(m.uci() for m in board.legal_moves)
        for move in rng.sample(moves, min(MOVES, len(moves))):
            child = board.copy()
            child.push_uci(move)
            if any(child.legal_moves) and not child.is_insufficient_material():
                rows.append((k, move, position_key(child)))
    return rows

def scores(fens, depth, order=None):
    "Score codes by one engine: clean, or warm when an order of asking is given."
    with EnginePool(EngineConfig(processes=1, deterministic=order is None)) as pool:
        if order is None: return pool.evaluate(fens, depth=depth).tolist()
        said = dict(zip(order, pool.evaluate([fens[k] for k in order], depth=depth).tolist()))
    return [said[k] for k in range(len(fens))]

def main(out=DATA/"reward_noise.csv"):
    rows = positions()
    fens = [fen for *_, fen in rows]
    columns = {f"c{d}": scores(fens, d) for d in DEPTHS}
    for name, seed in (("a", 1), ("b", 2)):
        order = random.Random(seed).sample(range(len(fens)), len(fens))
        for d in WARM: columns[f"{name}{d}"] = scores(fens, d, order)
    with open(out, "w", newline="") as f:
        f.write(f"# {engine_name()}, hash 1 MB, seed {SEED}: made by nbs/experiments/reward_noise.py\n")
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["position", "move", *columns])
        table.writerows([k, move, *values] for (k, move, _), values in zip(rows, zip(*columns.values())))

if __name__ == "__main__": main(*sys.argv[1:])
