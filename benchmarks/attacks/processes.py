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


def same_labels(here, there):
    "Are the shards of two label sets equal, bit for bit?"
    shards = [p.name for p in there.glob("shard-*")]
    return bool(shards) and all((here / n).exists() and (here / n).read_bytes() == (there / n).read_bytes()
                                for n in shards)


def same_net(here, there):
    "Are the weights in two files equal? Their cards also say how many minutes they took."
    from safetensors.torch import load_file

    ours, theirs = load_file(here), load_file(there)
    return ours.keys() == theirs.keys() and all(ours[k].equal(v) for k, v in theirs.items())


def signals(tally, folder, n):
    "A signal at a random moment of train and its matches, label, supervised training, arena; then the work goes on."
    fresh(folder)
    label = label_set(folder / "labels")[:-1]
    rng, names, out = random.Random(5), ("SIGINT", "SIGTERM", "SIGHUP"), folder / "out"
    fit = ["train", "--labels", folder / "labels", *SUPERVISED, "--out"]
    new = dict(train=[*RUN, "--out", out, "--name", "x"], matches=[*LONG, "--out", out, "--name", "x"])
    works = dict(train=lambda: train(*(["--resume", out / "x"] if (out / "x").exists() else new["train"])),
                 matches=lambda: train(*new["matches"]),
                 label=lambda: pretrain("label", *label, out / "labels"),
                 pretrain=lambda: pretrain(*fit, out / "x.safetensors"),
                 arena=lambda: arena("--a", "tiny", "--b", "random", "--games", "64", "--json", out / "x.json"))
    same = dict(train=lambda: same_run(out / "x", folder / "whole"),
                label=lambda: same_labels(out / "labels", folder / "labels"),
                pretrain=lambda: same_net(out / "x.safetensors", folder / "fit.safetensors"))
    for whole in (lambda: train(*RUN, "--out", folder, "--name", "whole"),
                  lambda: pretrain(*fit, folder / "fit.safetensors")):
        assert forked(whole, folder).status == 0
    for k in range(n):
        fresh(out)
        what = list(works)[k % len(works)]
        pid, begun = begin(lambda w=works[what]: (out / "begun").touch() or w(), folder / ".signal"), time.monotonic()
        while not (out / "begun").exists():                 # before that the child is still the attack's
            time.sleep(.001)
        time.sleep(rng.random() * (6 if what in ("matches", "arena") else 2))
        below = children(pid)
        os.kill(pid, getattr(signal, names[k % 3]))
        found = end(pid, folder / ".signal", begun)
        orphans = left_over(below)
        said = found.err.strip().splitlines()[-1:] or [""]
        ended = found.status in (0, 130) or found.status in (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)
        held = ended and "Traceback" not in found.err and not orphans
        held = held and (found.status != 130 or said[0].startswith("stopped"))
        if what in same:
            held = held and forked(works[what], folder).status == 0 and same[what]()
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


TWO_RANKS = """import os, sys
sys.path[:0] = [{top!r}, {benchmarks!r}]
import grpo_chess.batch
from attacks.common import Disk
from grpo_chess.train import main
grpo_chess.batch.PATIENCE = 8
what, rank, at, *args = sys.argv[1:]
if rank != os.environ["RANK"] or what not in ("engine", "disk"):
    sys.exit(main(args))
if what == "engine":
    os.environ["STOCKFISH_PATH"] = "/nonexistent"
    sys.exit(main(args))
with Disk({folder!r}, int(at), "error"):
    sys.exit(main(args))
"""
RANKS = ("kill 0", "kill 1", "stop 0", "stop 1", "agent", "engine 0", "engine 1", "disk 0")   # rank 1 writes nothing


def struck(agent, what, run):
    "Kill or stop what is meant once there is a checkpoint; the processes that were below the agent."
    begun, own_fault = time.monotonic(), what.startswith(("engine", "disk"))
    below = []
    while agent.poll() is None and time.monotonic() < begun + 120:
        below = children(agent.pid) or below
        if not own_fault and (run / "checkpoint").exists():
            break
        time.sleep(.1)
    if own_fault or agent.poll() is not None:
        return below
    ranks = sorted(p for p in below if b"run.py" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(agent.pid if what == "agent" else ranks[int(what[-1])],
            signal.SIGSTOP if what.startswith("stop") else signal.SIGKILL)
    return below


def torchrun(tally, folder, n):
    "Two ranks: each is killed, stopped, has no engine, the disk is full, the agent is killed. The run goes on later."
    fresh(folder)
    script = folder / "run.py"
    script.write_text(TWO_RANKS.format(top=str(TOP), benchmarks=str(TOP / "benchmarks"), folder=str(folder)))
    env = os.environ | dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    for k in range(n):
        what, run = RANKS[k % len(RANKS)], folder / f"x{k}"
        judge = ["--reward.judge", "engine", "--engine.processes", "1"] if what.startswith("engine") else []
        args = [*RUN, *judge, "--trainer.steps", "100000", "--out", str(folder), "--name", run.name]
        agent = subprocess.Popen([*launch, *f"{what} -".split()[:2], str(10 + 7 * k), *args], env=env, text=True,
                                 stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        below = struck(agent, what, run)
        deadline = time.monotonic() + 90
        while any(Path(f"/proc/{p}/exe").exists() for p in [agent.pid, *below]) and time.monotonic() < deadline:
            agent.poll()
            time.sleep(.2)
        left = [p for p in below if Path(f"/proc/{p}/exe").exists()]
        for p in left:
            os.kill(p, signal.SIGKILL)
        agent.kill()
        err = agent.communicate()[1]
        go_on = ["--resume", run] if run.exists() else args
        again = forked(lambda a=go_on: train(*a, "--trainer.steps", "3"), folder)
        ours = [line for line in err.splitlines() if "grpo_chess" in line and "File" in line]
        said = not what.startswith(("engine", "disk")) or err.count("\nerror: ") + err.startswith("error: ") == 2
        tally.note(what)
        tally.add(said and not left and again.status == 0 and not ours, (what, left, again, ours[:2], err[-1500:]))


CLOCK = """import time
true = time.time
time.time = lambda: true() + (0., 3600., -86400., 3e9)[int(5*time.monotonic()) % 4]
"""


def clock_that_jumps(tally, folder):
    "Five times a second the clock goes an hour on, a day back, a century on: the same weights and labels come of it."
    (fresh(folder / "jumps") / "sitecustomize.py").write_text(CLOCK)
    (folder / "true").mkdir()
    label, ends = label_set(folder / "labels")[:-1], []
    works = [["train", *RUN, *MATCH, "--reward.judge", "engine", "--engine.processes", "1", "--name", "x"],
             ["pretrain", "label", *label, "out"],
             ["pretrain", "train", "--labels", folder / "labels", *SUPERVISED, "--out", "net.safetensors"]]
    for where in (folder / "jumps", folder / "true"):
        env = os.environ | dict(PYTHONPATH=f"{where}:{TOP}", OMP_NUM_THREADS="1")
        for command, *args in works:
            ends.append(subprocess.run([sys.executable, "-m", f"grpo_chess.{command}", *map(str, args)], env=env,
                                       cwd=where, capture_output=True, text=True, timeout=300))
    tally.note("a clock that jumps in train, label, pretrain")
    here, there = folder / "jumps", folder / "true"
    held = (not any(f.returncode for f in ends) and same_run(here / "runs/x", there / "runs/x")
            and same_labels(here / "out", there / "out")
            and same_net(here / "net.safetensors", there / "net.safetensors"))
    tally.add(held, [f.stderr[-300:] for f in ends])


def in_strange_surroundings(tally, folder, n):
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


def surroundings(tally, folder, n):
    "Strange surroundings, and a clock that jumps."
    in_strange_surroundings(tally, folder / "around", n)
    clock_that_jumps(tally, folder / "clock")


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
