"""Regret on two sets of held-out positions, from openings (data/heldout.jsonl) and from whole games (data/heldout_games.jsonl). Writes data/phases.csv.

    python nbs/experiments/phases.py NAME=WEIGHTS ...        # weights at their most likely move and sampling; NAME=depth:4 is the move that a search of this depth prefers

A row of the same name is replaced.
"""
import argparse

import numpy as np

from run import HERE, loses, number, read, write
from grpo_chess.arena import read_labels
from grpo_chess.engine import EngineConfig, EnginePool

FILE = HERE/"data/phases.csv"

def searched(depth, labels):
    "Regret of the choice of a search of all moves at this depth."
    with EnginePool(EngineConfig()) as pool: moves = pool.evaluate_moves([l.board.fen() for l in labels], depth=depth)
    return {"argmax": float(np.mean([l.loss[max(m, key=m.get)] for l, m in zip(labels, moves)]))}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="NAME=WEIGHTS")
    given = [w.partition("=")[::2] for w in parser.parse_args().weights]
    sets = {name: read_labels(HERE.parent/f"data/{file}.jsonl") for name, file in (("openings", "heldout"), ("games", "heldout_games"))}
    for name, what in given:
        row = dict(name=name)
        for kind, labels in sets.items():
            lost = searched(int(what.removeprefix("depth:")), labels) if what.startswith("depth:") else {how: r.mean for how, r in loses(what, labels).items()}
            row |= {f"{how}_{kind}": number(lost[how]) if how in lost else "" for how in ("sampling", "argmax")}
        write(FILE, [r for r in read(FILE) if r["name"] != name] + [row])
        print(row, flush=True)

if __name__ == "__main__": main()
