"""What waiting threads cost beside a busy process: python benchmarks/threads.py [SECONDS]

Forward and backward passes of `tiny` on all cores, each with one process that does nothing but count beside them:
with the number of spins that libgomp chooses itself, with the one that the package sets (grpo_chess/__init__.py),
and with none."""

import os
import subprocess
import sys

BUSY = "while True: pass"
WORK = """
import sys, time, torch
from grpo_chess.board import encode
from grpo_chess.model import MODELS, ChessTransformer
import chess
torch.manual_seed(0)
model, (tokens, legal) = ChessTransformer(MODELS["tiny"]), map(torch.as_tensor, encode([chess.Board()]*128))
end, done, start = time.perf_counter() + float(sys.argv[1]), 0, None
while time.perf_counter() < end:
    model(tokens, legal).logsumexp(-1).sum().backward()
    done += 1
    start = start or time.perf_counter()      # the first pass warms up
print((time.perf_counter() - start)/max(1, done - 1) if done > 1 else float("nan"))
"""


def seconds_a_pass(spins: str | None, budget: float, busy: int) -> float:
    "Seconds of one forward and backward pass; nan if none came to its end after the first."
    env = os.environ | dict(GOMP_SPINCOUNT=spins)
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        return float(
            subprocess.run(
                [sys.executable, "-c", WORK, str(budget)], env=env, capture_output=True, text=True, check=True
            ).stdout
        )
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    for name, spins in {"libgomp's own": "300000", "the package's": "1000", "none": "0"}.items():
        alone, beside = (seconds_a_pass(spins, budget, busy) for busy in (0, 1))
        print(
            f"{name:14} GOMP_SPINCOUNT={spins:7} {alone:7.3f} s a pass alone, {beside:7.3f} s beside a busy process",
            flush=True,
        )
