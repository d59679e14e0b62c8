"""One training step of the earlier project's code beside one of ours: playing and judging, updating.

    python benchmarks/record.py THERE                             # its code lies in the folder THERE, or it says how to
    taskset -c 1 python benchmarks/record.py THERE --rounds 5     # get it; on a machine with other work, on one core

Both get the same start positions, B=2 G=16 T=16, a network of about 5.7 million parameters (256 wide, 4 layers, 8
heads, 2048 in between), depth 4, AdamW or Adam, as many threads. Each is a process that makes its steps in turn with
the others, and its first does not count (`--warmup`). Theirs computes all plies and trains those of the side that
began; so does ours with `starter`, and with `both` it trains on the plies of both sides. No logger, progress bar or
checkpoint on either side. CPU seconds are those of the process and of its engines.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path

SOURCE, COMMIT = "https://github.com/noamdwc/grpo_chess", "62e64e8"
NEEDS = ("pytorch_lightning", "jaxtyping", "jax", "datasets")
THEIRS, OURS = "theirs", ("32-true starter", "bf16-mixed starter", "32-true both", "bf16-mixed both")
PARTS = dict(step="a step", play="playing and judging", update="updating", measure="measuring")
TARGETS = {"step": dict.fromkeys(OURS, 2.) | dict.fromkeys(OURS[1::2], 6.), "play": dict.fromkeys(OURS[::2], 6.)}
PEAK = .7           # of the matrix product, wanted of the update


def missing(path):
    "One line that says how to get the code, or an empty one."
    files = ("src/grpo_logic/model.py", "searchless_chess/src/tokenizer.py")
    absent = [name for name in files if not (path/name).is_file()] or [name for name in NEEDS if not find_spec(name)]
    if not absent: return ""
    return (f"{path} and this Python lack {', '.join(absent)}: git clone --recurse-submodules {SOURCE} {path} && "
            f"git -C {path} checkout {COMMIT} && pip install {' '.join(NEEDS)}")


class Clock:
    "CPU seconds, of the process and of its engines, and wall seconds of the named parts of a step."
    def __init__(self, pids):       # gives the process ids of the engines, which may start late
        self.pids, self.spent, self.tick = pids, {}, os.sysconf("SC_CLK_TCK")

    def now(self):
        "What has been used until now."
        words = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.pids()]
        engines = sum(int(w[11]) + int(w[12]) for w in words)/self.tick
        return dict(cpu=time.process_time() + engines, engines=engines, wall=time.perf_counter())

    @contextmanager
    def part(self, name):
        "Add what is used in here to a part."
        before = self.now()
        yield
        after, total = self.now(), self.spent.setdefault(name, dict.fromkeys(before, 0.))
        for key in after: total[key] += after[key] - before[key]

    def watch(self, owner, name, part):
        "Add what a function uses to a part."
        inner = getattr(owner, name)

        @wraps(inner)
        def outer(*args, **kw):
            with self.part(part): return inner(*args, **kw)
        setattr(owner, name, outer)

    def tell(self, **more):
        "Write the parts of a step as one line, and begin anew."
        print(json.dumps(self.spent | more), flush=True)
        self.spent = {}


class Starts:
    "Batches of start positions, each as it is asked for: one line of standard input."
    def __len__(self): return 10**6

    def __iter__(self): return map(json.loads, iter(sys.stdin.readline, ""))


def their_steps(args):
    "Steps of their trainer, as its tests run them; their optimizer and loss are their defaults."
    sys.path.insert(0, str(args.path.resolve()))
    import pytorch_lightning
    from src.chess import rewards
    from src.chess.stockfish import StockfishConfig, StockfishManager
    from src.grpo_logic import model, sampling
    from src.models import ChessTransformerConfig

    from grpo_chess.engine import find_engine
    engine = StockfishManager.get_engine(rewards._get_reward_engine_name(), StockfishConfig(path=find_engine()))
    clock, cls = Clock(lambda: [engine.transport.get_pid()]), model.GRPOChessTransformer
    clock.watch(model, "sample_trajectories_batched", "play")
    for name in ("evaluate_board", "reward_board"): clock.watch(sampling, name, "judge")
    clock.watch(cls, "training_step", "step")
    inner = cls.training_step

    @wraps(inner)
    def told(*args, **kw):
        inner(*args, **kw)
        step, play = clock.spent["step"], clock.spent["play"]
        clock.tell(update={key: step[key] - play[key] for key in step})
    cls.training_step = told
    config = model.GRPOConfig(num_trajectories=args.group, trajectory_depth=args.plies, eval_every_n_epochs=10**9)
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(cls(ChessTransformerConfig(), config), Starts())
    StockfishManager.close_all()


def product_rate(precision, n=2048, repeats=4):
    "Operations a CPU second of a square matrix product."
    import torch
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
    a @ b
    before = time.process_time()
    for _ in range(repeats): a @ b
    return repeats*2*n**3/(time.process_time() - before)


def our_steps(args):
    "Steps of our trainer: one update a step, no measurement of the loss's terms (by default every tenth step has one)."
    import chess
    import torch

    from grpo_chess import batch, trainer
    from grpo_chess.config import preset
    from grpo_chess.engine import EngineConfig, EnginePool
    from grpo_chess.model import ChessTransformer, forward_flops
    from grpo_chess.reward import Judge
    precision, learn = args.worker.split()
    torch.manual_seed(0)
    cfg = preset("record", sampler=dict(boards=args.boards, group=args.group, plies=args.plies, learn=learn),
                 trainer=dict(minibatches=1, budget_every=0))
    fabric = batch.make_fabric(precision, "cpu")
    with EnginePool(EngineConfig(processes=args.threads)) as pool:
        clock = Clock(pool.pids)
        for owner, name, part in ((trainer.Trainer, "play", "play"), (trainer.Trainer, "update", "update"),
                                  (trainer.Trainer, "step", "step"), (trainer, "measure", "measure"),
                                  (batch, "movement", "kl_step")): clock.watch(owner, name, part)
        boards = []
        ours = trainer.Trainer(fabric, ChessTransformer(cfg.model), lambda *_: boards, Judge(cfg.reward, pool),
                               cfg.sampler, cfg.loss, cfg.trainer)
        for fens in Starts():
            boards[:] = map(chess.Board, fens)
            ours.step()
            ro = ours.games
            positions = len(ro.node[..., :-1][ro.train].unique())
            flops = 3*forward_flops(cfg.model)*positions
            clock.tell(positions=positions, peak=flops/clock.spent["update"]["cpu"]/product_rate(precision))


def spread(values, unit=""):
    "Median and range."
    values = sorted(values)
    return f"{statistics.median(values):.2f}{unit} ({values[0]:.2f}–{values[-1]:.2f})"


def seconds_table(found, kind):
    "CPU or wall seconds of each part, of both sides: medians and ranges over the rounds."
    sides = [THEIRS, *(name for name in OURS if name in found)]
    lines = [f"| {dict(cpu='CPU seconds', wall='wall seconds')[kind]} | {' | '.join(sides)} |",
             "|---"*(len(sides) + 1) + "|"]
    for key, name in PARTS.items():
        cells = [spread([row[key][kind] for row in found[s]]) if key in found[s][0] else "" for s in sides]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def without_kl(row):
    "CPU seconds of a step of ours without the number `kl_step`."
    return row["step"]["cpu"] - row["kl_step"]["cpu"]


def ratio_table(found):
    "Their CPU seconds by ours, round by round; what is wanted, and whether it is reached."
    lines = ["| their CPU seconds / ours | ratio | target |", "|---|---|---|"]
    for side in (s for s in OURS if s in found):
        for key in ("step", "play", "update"):
            ratios = [a[key]["cpu"]/b[key]["cpu"] for a, b in zip(found[THEIRS], found[side])]
            target = TARGETS.get(key, {}).get(side)
            said = "" if target is None else f"{target:g}, {verdict(statistics.median(ratios), target)}"
            lines.append(f"| {side}: {PARTS[key]} | {spread(ratios)} | {said} |")
        ratios = [a["step"]["cpu"]/without_kl(b) for a, b in zip(found[THEIRS], found[side])]
        lines.append(f"| {side}: a step without `kl_step` | {spread(ratios)} | |")
        peaks = [row["peak"] for row in found[side]]
        lines.append(f"| {side}: the update's share of this core's matrix product | {spread(peaks)} | {PEAK:g}, "
                     f"{verdict(statistics.median(peaks), PEAK)} |")
    return "\n".join(lines)


def verdict(value, target): return "reached" if value >= target else "missed"


class Side:
    "A process that makes a step whenever it is given start positions."
    def __init__(self, args, name):
        sizes = [f"--{key}={getattr(args, key)}" for key in ("boards", "group", "plies", "threads")]
        env = os.environ | dict(OMP_NUM_THREADS=str(args.threads), PYTHONWARNINGS="ignore")
        self.name, self.process = name, subprocess.Popen(
            [sys.executable, __file__, str(args.path), "--worker", name, *sizes], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def step(self, fens):
        "The parts of one step."
        self.process.stdin.write(json.dumps(fens) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"): return json.loads(line)
        sys.exit(f"{self.name} has ended with status {self.process.wait()}; what it said stands above")

    def close(self):
        "End it."
        self.process.stdin.close()
        self.process.wait()


def compare(args):
    "Rounds of all sides; the tables."
    from grpo_chess.positions import PositionsConfig, start_positions
    names = [THEIRS, *args.ours]
    sides, found = {}, {name: [] for name in names}
    for r in range(args.warmup + args.rounds):
        fens = [b.fen() for b in start_positions(args.boards, PositionsConfig(window_cp=0), 0, r)]
        for name in names:
            if r == 0: sides[name] = Side(args, name)            # its imports are over before the next begins
            row = sides[name].step(fens)
            if r < args.warmup: continue
            found[name].append(row)
            if args.keep: args.keep.write_text(json.dumps(found))
    for side in sides.values(): side.close()
    where = f"{args.threads} thread{'s'*(args.threads > 1)}"
    print(f"B={args.boards} G={args.group} T={args.plies}, {where}, {args.rounds} rounds, medians and ranges\n")
    for text in (seconds_table(found, "cpu"), seconds_table(found, "wall"), ratio_table(found)): print(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a clone of their code")
    for name, size in dict(boards=2, group=16, plies=16, threads=1, rounds=5, warmup=1).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--ours", nargs="+", default=list(OURS), choices=OURS, help="what is compared with theirs")
    parser.add_argument("--keep", type=Path, help="file for every round's figures, JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker not in OURS and (line := missing(args.path)):
        print(line, file=sys.stderr)
        sys.exit(2)
    {None: compare, THEIRS: their_steps}.get(args.worker, our_steps)(args)


if __name__ == "__main__": main()
