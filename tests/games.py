"What tests of matches share: scripted players, a judge of one line, and an engine that is none."
import stat

import chess

from grpo_chess.matches import Game, MatchResult

SCHOLARS = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7".split()         # White mates
SHUFFLE = "g1f3 g8f6 f3g1 f6g8".split()*30
FOOL = "f2f3 e7e5 g2g4 d8h4".split()                        # Black mates

HEAD = "PuzzleId,FEN,Moves,Rating,RatingDeviation,Popularity,NbPlays,Themes,GameUrl,OpeningTags\n"      # of puzzles
MATE1 = "m1,6k1/5ppp/8/3p4/8/8/R7/1R2K3 b - - 0 1,d5d4 a2a8,600,75,90,10,mateIn1,,\n"
MATE2 = "m2,8/8/8/8/7K/8/1PQ5/3k4 b - - 0 1,d1e1 h4g3 e1f1 c2f2,900,75,90,10,mateIn2,,\n"

class Judge:
    "Evaluates by a function of the board; remembers what it was asked."
    def __init__(self, cp):
        self.cp, self.asked, self.depths = cp, [], set()
    def evaluate(self, fens, depth=None):
        self.asked += fens
        self.depths.add(depth)
        return [self.cp(chess.Board(f)) for f in fens]

def white_is(cp): return lambda board: cp if board.turn else -cp      # side to move's view

def scripted(*lines):
    return lambda boards, games, ply: [chess.Move.from_uci(lines[g][ply]) for g in games]

def match(*games, names=("a", "b")):
    "A result from scores: one pair (as White, as Black) after the other."
    return MatchResult([Game(i//2, i % 2 == 0, chess.Board(), 0, s, "test") for i, s in enumerate(games)], names)

def moves(result): return [[m.uci() for m in g.board.move_stack] for g in result.games]

def fake_engine(path, answer):
    "A UCI engine that says hello and then does `answer` for each search."
    named = ("Threads", "Hash", "MultiPV", '"Skill Level"')
    options = "".join(f"echo option name {o} type spin; " for o in named)
    path.write_text(f"#!/bin/sh\nwhile read line; do case $line in uci) {options} echo uciok;; isready) echo readyok;; "
                    f"go*) {answer};; quit) exit;; esac; done\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)
