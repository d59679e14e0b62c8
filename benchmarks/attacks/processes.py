"Signals, two processes in one folder, torchrun, engines that die or freeze, strange surroundings, an hour of memory."
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from .common import MATCH, RUN, TOP, arena, begin, end, forked, fresh, pretrain, same_run, train
from .disk import SUPERVISED, label_set

LONG = [*RUN, *MATCH, "--match.games", "2000"]


def children(pid):
    "Process numbers below this one."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def left_over(pids, seconds=20):
    "Those of these processes that are still there after so many seconds; a busy machine ends them late."
    deadline = time.monotonic() + seconds
    while (left := [p for p in pids if Path(f"/proc/{p}/exe").exists()]) and time.monotonic() < deadline:
        time.sleep(.05)
    return left


def signals(tally, folder, n):
    "A signal at a random moment of train and its matches, label, supervised training, arena; then the work goes on."
    fresh(folder)
    label = label_set(folder / "labels")[:-1]
    rng, names = random.Random(5), ("SIGINT", "SIGTERM", "SIGHUP")
    assert forked(lambda: train(*RUN, "--out", folder, "--name", "whole"), folder).status == 0
    for k in range(n):
        out = fresh(folder / "out")
        works = dict(
            train=lambda o=out: train(*RUN, "--out", o, "--name", "x"),
            matches=lambda o=out: train(*LONG, "--out", o, "--name", "x"),
            label=lambda o=out: pretrain("label", *label, o / "labels"),
            pretrain=lambda o=out: pretrain("train", "--labels", folder / "labels", "--out", o / "x.safetensors",
                                            *SUPERVISED),
            arena=lambda o=out: arena("--a", "tiny", "--b", "random", "--games", "64", "--json", o / "x.json"))
        what = list(works)[k % len(works)]
        pid, begun = begin(works[what], folder / ".signal"), time.monotonic()
        time.sleep(rng.random() * (6 if what in ("matches", "arena") else 2))
        below = children(pid)
        os.kill(pid, getattr(signal, names[k % 3]))
        found = end(pid, folder / ".signal", begun)
        orphans = left_over(below)
        said = found.err.strip().splitlines()[-1:] or [""]
        ended = found.status in (0, 130) or found.status in (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)
        held = ended and "Traceback" not in found.err and not orphans
        held = held and (found.status != 130 or said[0].startswith("stopped"))
        if what == "train":
            again = ["--resume", out / "x"] if (out / "x").exists() else [*RUN, "--out", out, "--name", "x"]
            held = held and forked(lambda a=again: train(*a), folder).status == 0
            held = held and same_run(out / "x", folder / "whole")
        tally.note(f"{what} {found.status}")
        tally.add(held, (what, names[k % 3], orphans, found))


def pairs(tally, folder, n):
    "Two processes begin in one folder at once: one does the work, the other is refused in one line."
    fresh(folder)
    label = label_set(folder / "labels")[:-1]
    assert forked(lambda: train(*RUN, "--out", folder, "--name", "old"), folder).status == 0
    for k in range(n):
        out = fresh(folder / "out")
        shutil.copytree(folder / "old", out / "old")
        works = [lambda o=out: train(*RUN, "--trainer.steps", "60", "--out", o, "--name", "x"),
                 lambda o=out: train("--resume", o / "old", "--trainer.steps", "60"),
                 lambda o=out: pretrain("label", *label, o / "labels"),
                 lambda o=out: pretrain("train", "--labels", folder / "labels", "--out", o / "x.safetensors",
                                        *SUPERVISED, "--steps", "60")]
        begun = time.monotonic()
        pids = [begin(works[k % 4], folder / f".{i}") for i in range(2)]
        found = [end(pid, folder / f".{i}", begun) for i, pid in enumerate(pids)]
        held = sorted(f.status for f in found) == [0, 2] and any(f.refused for f in found)
        tally.add(held, (k % 4, found))


def engines(tally, folder, n):
    "Engines killed and frozen while they evaluate: every score is the one that an undisturbed engine gives."
    import numpy as np

    from grpo_chess.board import position_key
    from grpo_chess.engine import EngineConfig, EnginePool
    from grpo_chess.positions import random_position

    rng = random.Random(6)
    fens = [position_key(random_position(rng, phase)) for phase in ("opening", "middlegame", "endgame")
            for _ in range(max(10, min(700, n // 100)))]
    with EnginePool(EngineConfig(processes=2)) as pool:
        truth = pool.evaluate(fens, depth=1)
    stop, done = threading.Event(), 0
    with EnginePool(EngineConfig(processes=2, timeout=2., retries=1000)) as pool:

        def disturb():
            wild = random.Random(7)
            while not stop.wait(.05 + wild.random()):
                for pid in wild.sample(pool.pids(), min(1, len(pool.pids()))):
                    number = wild.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
                    try:
                        os.kill(pid, number)
                        tally.note("killed" if number == signal.SIGKILL else "frozen")
                    except ProcessLookupError:
                        pass

        thread = threading.Thread(target=disturb, daemon=True)
        thread.start()
        while done < n:
            scores = pool.evaluate(fens, depth=1)
            wrong = int((scores != truth).sum()) + abs(len(scores) - len(truth))
            done += len(fens)
            tally.made += len(fens) - 1
            tally.add(not np.any(wrong), f"{wrong} of {len(fens)} scores differ")
        stop.set()
        thread.join()
        tally.note("engines started again", pool.restarts)


def torchrun(tally, folder, n):
    "Two ranks: each is killed and stopped, and the agent is killed. Nothing hangs, nobody is left, the run goes on."
    fresh(folder)
    script = folder / "run.py"
    script.write_text("import datetime, sys, torch.distributed as d, grpo_chess.batch as b\nb.PATIENCE = 8\n"
                      "from grpo_chess.train import main\nsys.exit(main())\n")
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    steps = [*RUN, "--trainer.steps", "100000"]
    for k in range(n):
        what, run = ("kill 0", "kill 1", "stop 0", "stop 1", "agent")[k % 5], folder / f"x{k}"
        agent = subprocess.Popen([*launch, *steps, "--out", str(folder), "--name", run.name], env=env, text=True,
                                 stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        while not (run / "checkpoint").exists() and time.monotonic() < begun + 120 and agent.poll() is None:
            time.sleep(.1)
        below = children(agent.pid)
        ranks = [p for p in below if b"run.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        victim = agent.pid if what == "agent" else sorted(ranks)[int(what[-1])]
        os.kill(victim, signal.SIGSTOP if what.startswith("stop") else signal.SIGKILL)
        deadline = time.monotonic() + 90
        while any(Path(f"/proc/{p}/exe").exists() for p in [agent.pid, *below]) and time.monotonic() < deadline:
            agent.poll()
            time.sleep(.2)
        left = [p for p in below if Path(f"/proc/{p}/exe").exists()]
        for p in left:
            os.kill(p, signal.SIGKILL)
        agent.kill()
        err = agent.communicate()[1]
        again = forked(lambda r=run: train("--resume", r, "--trainer.steps", "3"), folder)
        ours = [line for line in err.splitlines() if "grpo_chess" in line and "File" in line]
        tally.note(what)
        tally.add(not left and again.status == 0 and not ours, (what, left, again.status, ours[:2], err[-300:]))


def surroundings(tally, folder, n):
    "ASCII, no home, closed and full output, few file handles, a small address space: it works, or says one line."
    fresh(folder)
    base = [sys.executable, "-m", "grpo_chess.train", *RUN, *MATCH, "--trainer.steps", "2", "--out", str(folder)]
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    bare = {k: v for k, v in env.items() if k not in ("HOME", "LANG", "LC_ALL")}
    ways = {"LANG=C, ASCII": (bare | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"), "", ""),
            "no HOME": (bare, "", ""), "a HOME that is not there": (env | dict(HOME="/nonexistent"), "", ""),
            "stdout closed": (env, "", ">&-"), "all closed": (env, "", "<&- >&- 2>&-"),
            "stdout full": (env, "", "> /dev/full"), "a reader that goes": (env, "", "| head -1"),
            "12 file handles": (env, "ulimit -n 12;", ""), "24 file handles": (env, "ulimit -n 24;", ""),
            "64 file handles": (env, "ulimit -n 64;", ""), "files of 100 kB": (env, "trap '' XFSZ; ulimit -f 100;", ""),
            "4 GB of memory": (env, "ulimit -v 4000000;", "")}
    for k, (what, (around, before, behind)) in list(enumerate(ways.items()))[:n]:
        shell = f'{before} "$0" "$@" --name w{k} {behind}; exit ${{PIPESTATUS[0]}}'
        found = subprocess.run(["bash", "-c", shell, *base], env=around, capture_output=True, text=True, timeout=300)
        ours = "grpo_chess/" in found.stderr and "Traceback" in found.stderr
        tally.note(f"{what} {found.returncode}")
        tally.add(found.returncode in (0, 2) and not ours, (what, found.returncode, found.stderr[-500:]))


def slope(seconds, values):
    "Least-squares slope an hour and its 95 % interval, by the means of ten blocks: neighbours are alike."
    import numpy as np

    x, y = (np.array([part.mean() for part in np.array_split(np.array(v, float), 10)]) for v in (seconds, values))
    x = (x - x.mean()) / 3600
    b = (x * y).sum() / (x * x).sum()
    rest = y - y.mean() - b * x
    half = 2.31 * (rest @ rest / 8 / (x * x).sum()) ** .5
    return b, b - half, b + half


def watched(pids, seconds):
    "Rows of time, MiB, file handles and children of each process, some four hundred in so many seconds."
    begun, seen = time.monotonic(), {pid: [] for pid in pids}
    while (now := time.monotonic() - begun) < seconds:
        for pid, rows in seen.items():
            status = Path(f"/proc/{pid}/status").read_text()
            mib = int(status.partition("VmRSS:")[2].split()[0]) / 1024
            rows.append((now, mib, len(os.listdir(f"/proc/{pid}/fd")), len(children(pid))))
        time.sleep(max(.2, seconds / 400))
    return seen


def match_after_match(folder):
    "Matches of 64 games in one process, until a signal ends one; a line for each."
    while not (status := arena("--a", "tiny", "--b", "random", "--games", "64", "--json", folder / "x.json")):
        with (folder / "matches").open("a") as f:
            f.write("one\n")
    return status


def memory(tally, folder, n):
    "So many seconds of training, and beside it of matches: memory, handles and children of each process."
    fresh(folder)
    steps = ["--trainer.steps", "100000000", "--minutes", str(n / 60 + 60), "--trainer.checkpoint_every", "10"]
    args = [*RUN, *steps, "--sampler.boards", "16", "--sampler.plies", "16"]    # its caches are full after fifty steps
    works = dict(training=lambda: train(*args, "--out", folder, "--name", "x"),
                 matches=lambda: match_after_match(folder))
    pids = {name: begin(work, folder / f".{name}", 10**6) for name, work in works.items()}
    begun = time.monotonic()
    seen = watched(pids.values(), n)
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    tally.note("seconds", n)
    for name, log in dict(training="x/metrics.jsonl", matches="matches").items():
        found, rows = end(pids[name], folder / f".{name}", begun), seen[pids[name]]
        late = [row for row in rows if row[0] > n / 5]                  # after the caches are full
        unit = "steps" if name == "training" else "matches of 64 games"
        tally.note(unit, sum(1 for _ in (folder / log).open()))
        for k, what in ((1, "MiB"), (2, "handles"), (3, "children")):
            b, low, high = slope([r[0] for r in late], [r[k] for r in late])
            tally.said[f"{what} an hour of {name}"] = f"{b:+.1f} [{low:+.1f}, {high:+.1f}]"
            tally.add(low <= 0 <= high or abs(b) < 1e-9, (name, what, b, low, high))
        tally.add(found.status == 130, found)
