"""Processes that need not import torch anew: forked from a server that has, and otherwise like `python -m module`.

A start costs some 20 ms instead of three seconds. The server imports libraries only and nothing of grpo_chess. What a
test says about the start of a process itself (a signal, a kill, torchrun, an environment) it says with subprocess."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
LIBRARIES = ["torch", "torch.distributed", "lightning_fabric", "matplotlib.figure", "IPython", "chess.pgn",
             "yaml"]
PATH = [p for p in sys.path if p and Path(p).resolve() not in (TOP, TOP / "tests")]     # as an interpreter begins
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


def _begin(argv, env, cwd, out, err):
    "Make the forked process what a new interpreter would be."
    import matplotlib
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[:] = argv
    sys.path[:] = [p for p in env.get("PYTHONPATH", "").split(":") if p] + PATH
    sys.modules.pop("warm", None)
    if backend := env.get("MPLBACKEND"): matplotlib.rcParams["backend"] = backend       # else read when it is imported
    for name, stream, number in ((out, sys.stdout, 1), (err, sys.stderr, 2)):
        if name is None: continue
        stream.flush()
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)


def _module(name, *args):
    "What `python -m name` does."
    _begin(*args)
    sys.path.insert(0, os.getcwd())
    try: runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally: atexit._run_exitfuncs()


def _start(target, *args):
    "A process of the server; whether the server starts with this one or before, it has one thread."
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    process = server.Process(target=target, args=args)
    try: process.start()
    finally:
        if before is None: del os.environ["OMP_NUM_THREADS"]
        else: os.environ["OMP_NUM_THREADS"] = before
    return process


def begin(module, *args, folder, env=ENV, cwd=None):
    "`python -m module args`; what it says goes to files named out and err in a folder."
    files = [str(folder / name) for name in ("out", "err")]
    return _start(_module, module, [module, *map(str, args)], dict(env), str(cwd or os.getcwd()), *files)


def command(module, *args, timeout=300, **where):
    "The same, to its end: exit status and what it said, as subprocess.run has them."
    with tempfile.TemporaryDirectory() as name:
        process = begin(module, *args, folder=Path(name), **where)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired([module, *args], timeout)
        said = [Path(name, stream).read_text() for stream in ("out", "err")]
        return subprocess.CompletedProcess([module, *args], process.exitcode, *said)
