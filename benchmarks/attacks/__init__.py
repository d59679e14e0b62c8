"Attacks on the commands of the package; `python benchmarks/faults.py` makes them."
from collections.abc import Callable
from dataclasses import dataclass

from . import disk, inputs, processes
from .common import Tally  # noqa: F401


@dataclass
class Part:
    "A row of the table: how it is made, how often, what is tried, and what must hold."

    make: Callable
    n: int
    what: str
    must: str


PARTS = dict(
    kills=Part(disk.kills, 200, "SIGKILL in every call to the disk, at any time, and of the default preset",
               "weights and metrics equal to the uninterrupted run"),
    flips=Part(disk.flips, 1500, "bits flipped, truncation, zero length, zeroed pages in each file that is read",
               "detected, never loaded; the last good one is used, the bad one set aside"),
    full=Part(disk.full, 240, "disk full, folder gone, read-only, at every call",
              "one line, exit 2, goes on when there is room"),
    nan=Part(inputs.nan, 60, "weights with NaN or infinity in every command", "refused; never a drawn game"),
    fuzz=Part(inputs.fuzz, 110_000, "FEN, EPD, PGN, YAML, JSONL, CSV, Parquet, UCI, safetensors, names, commands",
              "no traceback, hang or unbounded memory"),
    numbers=Part(inputs.numbers, 15, "nan, inf, negative, huge, empty for every number of every command",
                 "refused in one line"),
    signals=Part(processes.signals, 100, "SIGTERM, SIGHUP, SIGINT in train, matches, label, pretrain, arena",
                 "saved, reported, resumable, no orphan"),
    pairs=Part(processes.pairs, 40, "two processes in one run folder or label folder",
               "the second refused in one line"),
    engines=Part(processes.engines, 100_000, "engines killed and frozen during evaluations",
                 "none lost, altered or invented"),
    torchrun=Part(processes.torchrun, 16,
                  "each of two ranks killed, stopped, without its engine, on a full disk; the agent killed",
                  "no hang, no orphan, resumable"),
    surroundings=Part(processes.surroundings, 12,
                      "ASCII, no HOME, closed or full output, few handles, little memory, a clock that jumps",
                      "works, or one line"),
    memory=Part(processes.memory, 3600, "seconds of training, and beside it of matches",
                "memory, handles, children flat: the slope's interval includes 0"),
)
