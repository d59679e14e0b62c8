"""How many positions a second one process can have judged, by engines that cost nothing: stand-ins of a known rate.

    python benchmarks/wide.py                       # 16 stand-ins, at the rate of a real engine and without a limit
    python benchmarks/wide.py --engines 2 4 8 16 32 --rate 2800

A stand-in reads questions like an engine, sleeps for as long as a real one would search, and says what Stockfish said
of one position, word for word. So the machine that this runs on needs no sixteen cores: what is measured is our own
process, its CPU time a position, and how near it comes to the engines' limit.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from grpo_chess.engine import EngineConfig, EnginePool
from grpo_chess.uci import EngineProcess, find_engine, greet

FEN = "r1bq1rk1/pp2bppp/2n1pn2/2pp4/3P1B2/2PBPN2/PP1N1PPP/R2QK2R w KQ - 0 1"      # 51 legal moves: a wide one

STAND_IN = '''#!{python} -IS
import os, time
OPTIONS = b"".join(b"option name %s type x\\n" % name for name in (b"Threads", b"Hash", b"MultiPV", b"Skill Level"))
SCORE, MOVES, PACE = {score!r}, {moves!r}, {pace!r}
heard, answer, due = b"", SCORE, 0.
while data := os.read(0, 1 << 20):
    cut = (heard + data).rfind(b"\\n") + 1
    text, heard = (heard + data)[:cut], (heard + data)[cut:]
    if text.startswith(b"uci\\n"): os.write(1, b"id name stand-in\\n" + OPTIONS + b"uciok\\n")
    if b"MultiPV value 256" in text: answer = MOVES
    elif b"MultiPV value 1\\n" in text: answer = SCORE
    if n := text.count(b"\\ngo "):
        due = max(due, time.monotonic()) + n*PACE
        if (left := due - time.monotonic()) > 0: time.sleep(left)
        os.write(1, answer*n)
    if b"isready\\n" in text: os.write(1, b"readyok\\n")
'''


def recorded(go, options):
    "What Stockfish says of the position."
    engine = EngineProcess(find_engine())
    try:
        greet(engine, 10)
        heard = engine.ask(f"{options}ucinewgame\nposition fen {FEN}\ngo {go}\n".encode(), b"bestmove ", 1, 10)
    finally: engine.stop()
    return heard.lstrip(b"\n")


def stand_in(folder, rate):
    "An executable that answers `rate` positions a second, or as many as it can."
    path = Path(folder)/f"stand-in-{rate}"
    score, moves = recorded("depth 4", ""), recorded("depth 1", "setoption name MultiPV value 256\n")
    path.write_text(STAND_IN.format(python=sys.executable, score=score, moves=moves, pace=1/rate if rate else 0))
    path.chmod(0o755)
    return str(path)


def measure(path, engines, positions, moves, rounds=5):
    "Positions a second and this process's CPU µs a position: medians."
    fens = [FEN.removesuffix("1") + str(n + 1) for n in range(positions)]
    with EnginePool(EngineConfig(path=path, processes=engines)) as pool:
        ask = pool.evaluate_moves if moves else pool.evaluate
        ask(fens[:64*engines], depth=4, trusted=True)
        took = []
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            ask(fens, depth=4, trusted=True)
            took.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (statistics.median(x) for x in zip(*took))
    return positions/wall, 1e6*cpu/positions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[16])
    parser.add_argument("--rate", type=int, default=2800, help="positions a second of one engine")
    parser.add_argument("--positions", type=int, default=20_000)
    args = parser.parse_args()
    print("| engines | each makes | question | positions/s | of the engines' limit | our CPU µs a position |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for rate in (args.rate, 0):
            path = stand_in(folder, rate)
            for engines in args.engines:
                for moves in (False, True):
                    found, cpu = measure(path, engines, args.positions, moves)
                    limit = f"{found/rate/engines:.0%}" if rate else ""
                    question = "all moves" if moves else "score"
                    print(f"| {engines} | {rate or 'all it can'} | {question} | {found:,.0f} | {limit} | {cpu:.0f} |",
                          flush=True)
    print(f"\n{os.cpu_count()} cores here, on which the stand-ins run too.")


if __name__ == "__main__": main()
