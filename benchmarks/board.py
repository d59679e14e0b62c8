"""What a position costs, next to python-chess in the same process.

usage: python benchmarks/board.py [number of positions]
"""

import random
import sys
import time

import chess

from grpo_chess.board import encode, legal_actions, position_key, terminal, tokens


def random_boards(n, stack, plies=80, seed=0):
    "n positions of random games, with their histories or without."
    rng, boards, board = random.Random(seed), [], chess.Board()
    while len(boards) < n:
        moves = list(board.legal_moves)
        if not moves or board.ply() >= plies:
            board = chess.Board()
            continue
        board.push(rng.choice(moves))
        boards.append(board.copy(stack=stack))
    return boards


def best(f, n, repeats=5):
    "Microseconds a position, best of `repeats`."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / n


def main(n):
    boards, played = random_boards(n, False), random_boards(2000, True)
    few = boards[:5000]

    def each(f, xs):
        return best(lambda: [f(b) for b in xs], len(xs))

    start = time.perf_counter()
    encode(boards)
    first = 1e6 * (time.perf_counter() - start) / n
    rows = [
        (
            "legal_actions",
            each(legal_actions, few),
            "list(board.legal_moves)",
            each(lambda b: list(b.legal_moves), few),
        ),
        ("position_key", each(position_key, few), "board.fen()", each(lambda b: b.fen(), few)),
        (
            "tokens, in batches",
            best(lambda: tokens(few), len(few)),
            "board.piece_map()",
            each(lambda b: b.piece_map(), few),
        ),
        ("encode, in batches", best(lambda: encode(few), len(few)), "legal_moves + piece_map", None),
        (
            "terminal, moves counted",
            each(lambda b: terminal(b, 1), played),
            "is_game_over()",
            each(lambda b: b.is_game_over(), played),
        ),
        (
            "terminal",
            each(terminal, played),
            "is_game_over(claim_draw=True)",
            each(lambda b: b.is_game_over(claim_draw=True), played[:500]),
        ),
    ]
    rows[3] = (*rows[3][:3], rows[0][3] + rows[2][3])
    print("| grpo_chess.board | µs | python-chess | µs | times faster |\n|---|---|---|---|---|")
    for name, ours, other, theirs in rows:
        print(f"| {name} | {ours:.1f} | {other} | {theirs:.1f} | {theirs / ours:.1f} |")
    print(f"\n{n:,} positions through `encode`, caches empty: {first:.1f} µs each, {n * first / 1e6:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
