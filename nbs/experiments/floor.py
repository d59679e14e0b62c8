"""What players without knowledge score against Stockfish's skill 2, and what that depends on. Writes ../data/floor.csv.

    python nbs/experiments/floor.py            # rows that are not there yet
    python nbs/experiments/floor.py --again    # all of them, about an hour on 2 cores

Everything but the rows against `clock`, where Stockfish takes its random numbers from the clock, comes out the same
again.
Columns: player and its seed; opponent (`seeded` is the arena's own skill 2, `clock` Stockfish's); does it know the
moves of the game;
draws by `claim` (python-chess's claim_draw, the record's rule) or by the `rules`; an engine that adjudicates;
results by how the games ended; and in how many
of the claimed draws the player with the claim was the opponent; p0..p4: pairs with 0, 1/2, 1, 1 1/2, 2 points.
"""

import csv
import sys
from pathlib import Path

import chess
import numpy as np
import torch
from torch import nn

from grpo_chess.board import ACTIONS, position_key
from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.matches import play_match
from grpo_chess.model import MODELS, ChessTransformer, Policy
from grpo_chess.players import (
    Overlapped,
    best_scores,
    draws,
    engine_player,
    policy_player,
    random_openings,
    random_player,
    skill_pick,
    weak_engine_player,
)

FILE = Path(__file__).resolve().parent.parent / "data/floor.csv"
INDEX = {uci: k for k, uci in enumerate(ACTIONS)}
KEY = ["player", "seed", "opponent", "history", "draws", "judge"]
ENDS = ["checkmate", "claimed", "repetition", "stalemate", "insufficient", "fifty", "adjudicated", "max_plies"]


def best_of(scores):
    "A player from scores of all actions: boards -> [N, 1968]; it plays its best legal move."

    def play(boards, games, ply):
        rows = scores(boards)
        return [max(b.legal_moves, key=lambda m: row[INDEX[m.uci()]]) for b, row in zip(boards, rows)]

    return play


def order_player(seed):
    "One fixed order of all moves, whatever the position."
    order = np.random.default_rng(seed).permutation(len(ACTIONS))
    return best_of(lambda boards: [order] * len(boards))


class TextNet(nn.Module):
    """A network in the manner of the record's: PyTorch's own encoder over the characters of the FEN, mean over
    them, one score for each of 1968 moves. 256 wide, 4 layers, 8 heads."""

    def __init__(self):
        super().__init__()
        self.letter, self.place = nn.Embedding(128, 256), nn.Parameter(torch.randn(1, 96, 256))
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(256, 8, batch_first=True), 4, enable_nested_tensor=False
        )
        self.head = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, len(ACTIONS)))

    def forward(self, fens):
        codes = torch.zeros(len(fens), max(map(len, fens)), dtype=torch.long)
        for row, fen in zip(codes, fens):
            row[: len(fen)] = torch.tensor(list(fen.encode()))
        real = codes > 0
        x = self.body(self.letter(codes) + self.place[:, : codes.shape[1]], src_key_padding_mask=~real)
        return self.head((x * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def text_player(seed):
    torch.manual_seed(seed)
    net = TextNet().eval()

    @torch.inference_mode()
    def scores(boards):
        return torch.cat([net([b.fen() for b in boards[i : i + 32]]) for i in range(0, len(boards), 32)]).tolist()

    return best_of(scores)


def untrained(preset, greedy=True):
    def make(seed):
        torch.manual_seed(seed)
        return policy_player(Policy(ChessTransformer(MODELS[preset])), greedy, seed)

    return make


PLAYERS = {
    "random mover": random_player,
    "fixed order of moves": order_player,
    "untrained tiny, argmax": untrained("tiny"),
    "untrained text network, argmax": text_player,
    "untrained tiny, sampling": untrained("tiny", False),
}


def forgetful(pool, level):
    "The seeded skill level without the moves of the game."

    def begin(boards, games, ply):
        future, u = (
            pool.submit_go(map(position_key, boards), f"depth {1 + level}", best_scores, MultiPV=4),
            np.stack([draws(0, games, ply, s) for s in range(4)], 1),
        )
        return lambda: [chess.Move.from_uci(skill_pick(s, level, r)) for s, r in zip(pool.wait(future), u)]

    return Overlapped(begin)


def jobs():
    "(player, seed, opponent, knows the game, rule of draws, judge, games)"
    random, order, tiny, text, loose = PLAYERS
    for seed in range(2):
        yield "seeded skill 2", seed, "clock, depth 3", True, "rules", False, 384
    for seed in range(2):
        yield "seeded skill 0", seed, "clock 0, depth 1", True, "rules", False, 384
    for player in (random, order, tiny):
        for seed in range(8):
            for rule in ("claim", "rules"):
                yield player, seed, "seeded", True, rule, False, 256
    for seed in range(4):
        for player in (random, order, tiny, text):
            yield player, seed, "clock, 50 ms", True, "claim", False, 64
        yield text, seed, "seeded", True, "claim", False, 256
        for player in (order, tiny):
            for rule in ("claim", "rules"):
                yield player, seed, "seeded", False, rule, False, 256
        for player in (random, tiny):
            yield player, seed, "seeded", True, "claim", True, 256
        yield loose, seed, "seeded", True, "claim", False, 256
    for seed in range(2):
        yield text, seed, "seeded", True, "rules", False, 256


def opponent(pool, name, history):
    "The player of a name."
    if name == "seeded":
        return weak_engine_player(pool, 2) if history else forgetful(pool, 2)
    return {
        "clock, 50 ms": engine_player(pool, skill=2, ms=50),
        "clock, depth 3": engine_player(pool, skill=2),
        "clock 0, depth 1": engine_player(pool, skill=0),
    }[name]


def row(pool, player, seed, opposing, history, rule, judge, games):
    "Play one match."
    a = weak_engine_player(pool, int(player[-1]), seed) if player.startswith("seeded") else PLAYERS[player](seed)
    r = play_match(
        a,
        opponent(pool, opposing, history),
        random_openings(games // 2, seed=100 + seed),
        max_plies=400,
        claims=rule == "claim",
        judge=pool if judge else None,
    )
    theirs = sum(g.reason == "claimed" and not g.a_moves for g in r.games)
    return dict(zip(KEY, (player, seed, opposing, int(history), rule, int(judge)))) | dict(
        games=games,
        wins=r.wins,
        drawn=r.draws,
        plies=round(np.mean([len(g.board.move_stack) for g in r.games])),
        **{k: r.reasons.get(k, 0) for k in ENDS},
        opponents_claim=theirs,
        **{f"p{k}": n for k, n in enumerate(r.pentanomial)},
    )


def main():
    torch.set_num_threads(1)
    rows = list(csv.DictReader(FILE.open())) if FILE.exists() and "--again" not in sys.argv else []
    done = {tuple(r[k] for k in KEY) for r in rows}
    with EnginePool(EngineConfig()) as pool:
        for *key, games in jobs():
            if tuple(str(int(k)) if isinstance(k, bool) else str(k) for k in key) in done:
                continue
            rows.append(row(pool, *key, games))
            tmp = FILE.with_suffix(".tmp")
            with tmp.open("w", newline="") as f:
                out = csv.DictWriter(f, list(rows[-1]), lineterminator="\n")
                out.writeheader()
                out.writerows(rows)
            tmp.replace(FILE)
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
