"Small runs of the command, for its tests."
import os
import subprocess
import sys
from pathlib import Path

import warm
from browser import free_port

from grpo_chess.panel import read_metrics

TOP = Path(__file__).resolve().parent.parent
NET = ["--model.width", "32", "--model.layers", "2", "--model.heads", "2"]
TINY = ["--preset", "scratch", *NET, "--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0",
        "--sampler.boards", "4", "--sampler.group", "4", "--sampler.plies", "2", "--trainer.steps", "4",
        "--trainer.checkpoint_every", "2", "--accelerator", "cpu"]
MATCH = ["--match.adjudicate", "false", "--match.games", "8", "--match.max_plies", "30", "--match.rules_plies", "30"]
ENV = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")

def long(args=TINY, steps=100_000):
    "The same run, with more steps than it will make."
    at = args.index("--trainer.steps") + 1
    return [*args[:at], str(steps), *args[at + 1:]]

def start(*args, **env):
    return subprocess.Popen([sys.executable, "-m", "grpo_chess.train", *map(str, args)], env=ENV | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def command(*args, **env): return warm.command("grpo_chess.train", *args, env=ENV | env)

def ranks(n, *args, folder):
    "Processes of one run to their end, with the environment that torchrun gives them; test_train has torchrun itself."
    shared = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, GROUP_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(),
                  TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT=0, TORCHELASTIC_MAX_RESTARTS=0)
    def rank(k):
        env = ENV | {name: str(v) for name, v in (shared | dict(RANK=k, LOCAL_RANK=k)).items()}
        return warm.begin("grpo_chess.train", *args, env=env, folder=folder)
    processes = [rank(k) for k in range(n)]
    for process in processes: process.join(300)
    said = [(folder/name).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(args, [p.exitcode for p in processes], *said)

def untimed(path):
    return [{k: v for k, v in r.items() if "seconds" not in k and k != "judged"} for r in read_metrics(path)]
