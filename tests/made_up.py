"Labels without an engine, for the tests of everything that reads them."
import os
import random
from pathlib import Path

import chess
import numpy as np
import warm

from grpo_chess.board import action_to_move, legal_actions, tokens
from grpo_chess.labels import ACTION_SPACE, make_labels, write_manifest, write_shard

TOP = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
FIELDS = ("tokens", "offset", "actions", "scores")

def same(a, b):
    "Whether two sets of labels are equal, but for their probabilities."
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)

def cli(*argv, **where): return warm.command("grpo_chess.pretrain", *argv, env=ENV, **where)

def played(n, seed=0, plies=80):
    "Boards reached by random play, none finished."
    rng, out = random.Random(seed), []
    while len(out) < n:
        b = chess.Board()
        for _ in range(rng.randrange(plies)):
            if b.is_game_over(): break
            b.push(rng.choice(list(b.legal_moves)))
        if not b.is_game_over(): out.append(b)
    return out

def made_up(n, seed=0):
    "Labels without an engine: captures are good, and the rest is chance."
    boards, rng = played(n, seed), np.random.default_rng(seed)
    legal = [legal_actions(b) for b in boards]
    def value(b, a):
        return int(rng.integers(-50, 50)) + 300*b.is_capture(action_to_move(a, b.turn))
    return make_labels(tokens(boards), legal, [[value(b, a) for a in actions] for b, actions in zip(boards, legal)])

def folder_of(path, shards, rows=64, seed=0):
    "A folder of made-up labels."
    path.mkdir()
    for k in range(shards): write_shard(path/f"shard-{k:05}.parquet", made_up(rows, seed + k), dict(seed=seed))
    write_manifest(path, dict(seed=seed, action_space=ACTION_SPACE))
    return path
