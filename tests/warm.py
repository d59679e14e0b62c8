"""Processes that need not import torch anew: forked from a server that has, and otherwise like `python -m module`, or
like the kernels that Jupyter starts.

A start costs some 20 ms instead of three seconds. The server imports libraries only and nothing of grpo_chess. What a
test says about the start of a process itself (a signal, a kill, torchrun, an environment) it says with subprocess."""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
LIBRARIES = ["torch", "torch.distributed", "lightning_fabric", "matplotlib.pyplot", "IPython", "chess.pgn",
             "yaml", "ipykernel.kernelapp", "ipywidgets", "safetensors.torch"]
PATH = [p for p in sys.path if p and Path(p).resolve() not in (TOP, TOP / "tests")]     # as an interpreter begins
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


def _begin(argv, env, cwd, out, err):
    "Make the forked process what a new interpreter would be."
    import matplotlib
    gc.freeze()                             # a collection would touch, and so copy, all that the server has loaded
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


def _kernel(*args):
    "What `python -m ipykernel_launcher` does."
    import matplotlib
    from ipykernel import kernelapp
    os.setsid()                                         # what ends a kernel is sent to its group
    _begin(*args)
    sys.argv.append(f"--IPKernelApp.parent_handle={os.getppid()}")      # it ends with the server
    matplotlib.rcParams["backend"] = os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    kernelapp.launch_new_instance()


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


class Kernel:
    "What jupyter_client asks of a process."
    stdin = stdout = stderr = None

    def __init__(self, command, env=None, cwd=None, **_):
        argv = command[command.index("ipykernel_launcher"):]
        self.process = _start(_kernel, argv, dict(env or os.environ), str(cwd or os.getcwd()), None, None)
        self.pid = self.process.pid
        while self.process.is_alive() and os.getpgid(self.pid) != self.pid: time.sleep(.001)

    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.process.exitcode
    def wait(self, timeout=None): self.process.join(timeout)
    def send_signal(self, number): os.kill(self.pid, number)
    def kill(self): self.process.kill()
    def terminate(self): self.process.terminate()


@contextmanager
def kernels():
    "Inside of this, Jupyter's kernels come from the server."
    from jupyter_client.provisioning import local_provisioner
    launch = local_provisioner.launch_kernel
    local_provisioner.launch_kernel = Kernel
    try: yield
    finally: local_provisioner.launch_kernel = launch
