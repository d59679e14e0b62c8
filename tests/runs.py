"Small runs of the command, for its tests."
import os
import subprocess
import sys
from pathlib import Path

from grpo_chess.panel import read_metrics

TOP = Path(__file__).resolve().parent.parent
NET = ["--model.width", "32", "--model.layers", "2", "--model.heads", "2"]
TINY = ["--preset", "scratch", *NET, "--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0",
        "--sampler.boards", "4", "--sampler.group", "4", "--sampler.plies", "2", "--trainer.steps", "4",
        "--trainer.checkpoint_every", "2", "--accelerator", "cpu"]
MATCH = ["--match.adjudicate", "false", "--match.games", "8", "--match.max_plies", "30"]
ENV = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")

def long(args=TINY, steps=100_000):
    "The same run, with more steps than it will make."
    at = args.index("--trainer.steps") + 1
    return [*args[:at], str(steps), *args[at + 1:]]

def start(*args, **env):
    return subprocess.Popen([sys.executable, "-m", "grpo_chess.train", *map(str, args)], env=ENV | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def command(*args, **env):
    process = start(*args, **env)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

def untimed(path):
    return [{k: v for k, v in r.items() if "seconds" not in k and k != "judged"} for r in read_metrics(path)]
