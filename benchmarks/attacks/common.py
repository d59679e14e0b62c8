"What all attacks share: commands in forked children, small runs to attack, and a way to break each call to the disk."
import contextlib
import errno
import io
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent.parent
NET = ["--model.width", "32", "--model.layers", "2", "--model.heads", "2"]
RUN = ["--preset", "scratch", *NET, "--reward.judge", "material", "--positions.window_cp", "0", "--match.games", "0",
       "--sampler.boards", "4", "--sampler.group", "4", "--sampler.plies", "2", "--trainer.steps", "6",
       "--trainer.checkpoint_every", "2", "--accelerator", "cpu"]
DEFAULT = ["--sampler.boards", "4", "--sampler.plies", "4", "--trainer.steps", "6", "--trainer.checkpoint_every", "2",
           "--match.games", "0", "--engine.processes", "1", "--minutes", "0"]
MATCH = ["--match.adjudicate", "false", "--match.games", "8", "--match.max_plies", "20"]


@dataclass
class Outcome:
    "What became of a forked child: its exit status (minus the signal that killed it) and what it said."

    status: int
    out: str
    err: str
    seconds: float

    @property
    def clean(self):
        "At most one line beside warnings of others, and no traceback."
        return "Traceback" not in self.err + self.out and self.status in (0, 2, 3, 130)

    @property
    def refused(self):
        "Exit status 2 and one line that says error."
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.clean and self.status == 2 and len(lines) == 1


@dataclass
class Tally:
    "How many attacks were made, what came of them, and the first that did not hold."

    made: int = 0
    failed: list = field(default_factory=list)
    said: dict = field(default_factory=dict)

    def add(self, held, what):
        "One attack more."
        self.made += 1
        if not held:
            self.failed.append(str(what)[:600])
            print("  NOT HELD:", str(what)[:600], flush=True)

    def note(self, key, n=1):
        "Count something to tell of."
        self.said[key] = self.said.get(key, 0) + n


LIMITS = dict(seconds=120., slowest=0.)     # of a child; and the longest that a child took to come to its end


def limit(seconds):
    "When a child counts as hung: at least so many seconds, and twenty times what one took here that came to its end."
    return int(max(seconds or LIMITS["seconds"], 20 * LIMITS["slowest"]))


def in_child(work, log, seconds):
    "The child's side of a fork: `work()` with its output in files, never returning."
    try:
        os.setsid()
        with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w", 1), os.fdopen(os.dup(2), "w", 1)
        signal.alarm(seconds)
        status = work()
        sys.stdout.flush()
    except SystemExit as e:
        status = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(status or 0)


def begin(work, log, seconds=0):
    "Fork a child that does `work()`; its process number."
    seconds = limit(seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        in_child(work, log, seconds)
    return pid


def end(pid, log, started):
    "Wait for a child, end what it left of its session, and say what became of it."
    _, raw = os.waitpid(pid, 0)
    texts = [Path(f"{log}.{name}").read_text("utf-8", "replace") for name in ("out", "err")]
    found = Outcome(os.waitstatus_to_exitcode(raw), *texts, time.monotonic() - started)
    if found.status == 0:
        LIMITS["slowest"] = max(LIMITS["slowest"], found.seconds)
    return found


def forked(work, folder, seconds=0):
    "Do `work()` in a forked child and wait: an Outcome. SIGALRM (-14) means that it hung."
    log, started = Path(folder) / f".said{random.randrange(10**9)}", time.monotonic()
    found = end(begin(work, log, seconds), log, started)
    for name in ("out", "err"):
        Path(f"{log}.{name}").unlink()
    return found


def train(*args):
    "The training command."
    from grpo_chess.train import main

    return main([str(a) for a in args])


def pretrain(*args):
    "The commands of supervised training."
    from grpo_chess.pretrain import main

    return main([str(a) for a in args])


def arena(*args):
    "The arena."
    from grpo_chess.arena import main

    return main([str(a) for a in args])


def untimed(folder):
    "Rows of a log without what the clock says."
    from grpo_chess.panel import read_metrics

    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if "seconds" not in k and k not in ("judged", "minutes")} for r in rows]


def same_run(folder, whole):
    "Are weights and metrics of two runs equal, bit for bit?"
    files = [Path(f) / "model.safetensors" for f in (folder, whole)]
    if not all(f.exists() for f in files):
        return False
    return files[0].read_bytes() == files[1].read_bytes() and untimed(folder) == untimed(whole)


CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "truncate", "ftruncate")


class Disk:
    "Every call to the disk below a folder, counted; one of them fails, or kills this process before, in or after it."

    def __init__(self, folder, at=0, kind="count", error=errno.ENOSPC):
        self.folder, self.at, self.kind, self.error = str(folder), at, kind, error
        self.count, self.handles, self.names = 0, set(), []

    def ours(self, name, args):
        "Does this call change something below the folder?"
        first = args[0] if args else None
        if name in ("write", "fsync", "ftruncate"):
            return first in self.handles
        if not isinstance(first, (str, os.PathLike)):
            return name in ("unlink", "rmdir") and bool(self.handles)
        inside = os.fspath(first).startswith(self.folder)
        return inside and not (name == "open" and not (args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))

    def strike(self, name, call, args, kw):
        "The call that was chosen."
        if self.kind == "error":
            raise OSError(self.error, os.strerror(self.error))
        if self.kind == "in" and name == "write":
            call(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
        if self.kind == "after":
            with contextlib.suppress(OSError):          # such as a folder that is there already
                call(*args, **kw)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, name):
        "The call, watched."
        call = getattr(os, name)

        def watched(*args, **kw):
            if self.ours(name, args):
                self.count += 1
                self.names.append(name)
                if self.count == self.at or (self.kind == "error" and self.at and self.count > self.at):
                    self.strike(name, call, args, kw)
            result = call(*args, **kw)
            if name == "open" and os.fspath(args[0]).startswith(self.folder):
                self.handles.add(result)
            return result

        return watched

    def __enter__(self):
        self.old = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self.wrap(name))
        return self

    def __exit__(self, *error):
        for name, call in self.old.items():
            setattr(os, name, call)


def counted(work, folder, name):
    "How many calls to the disk `work()` makes: told by a child through a file."
    where = Path(folder).parent / f"{name}.count"

    def child():
        with Disk(folder) as disk:
            status = work()
        where.write_text(" ".join(disk.names))
        return status

    found = forked(child, Path(folder).parent)
    assert found.status == 0, found
    return where.read_text().split()


def fresh(path):
    "An empty folder."
    shutil.rmtree(path, ignore_errors=True)
    Path(path).mkdir(parents=True)
    return Path(path)


def quiet(work):
    "Do something without its output."
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()
