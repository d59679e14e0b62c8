"""Steps of the preset `tiny`, now and at an older commit, in turn: plies a second, seconds, share of the cores.

    python benchmarks/steps.py --before 3f8397a                 # alternating runs of both, medians, ranges and ratios
    python benchmarks/steps.py --before 3f8397a --set trainer.micro_batch=64
    python benchmarks/steps.py                                  # this tree alone
    python benchmarks/steps.py --draw steps.csv steps.png
    python benchmarks/steps.py --sweep steps.csv            # time and memory against B, G, T, width, layers, engines

Every run is a process of its own that makes its first steps, which do not count, and then `--steps` more. `--set` holds
for this tree alone. CPU time is that of the process and of its engines.
"""
import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
FIRST = 3                   # steps that warm up

WORKER = r'''
import json, os, resource, sys, tempfile, time
from pathlib import Path
began = time.perf_counter()
from grpo_chess.config import preset
from grpo_chess.engine import EnginePool
from grpo_chess.train import run
from grpo_chess.trainer import Trainer
pools, rows, tick, first = [], [], os.sysconf("SC_CLK_TCK"), None

def used():
    "CPU seconds of this process, and of its engines."
    def of(pid):
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12]))/tick
    return time.process_time(), sum(of(pid) for pool in pools for pid in pool.pids())

import grpo_chess.sampler, grpo_chess.train, grpo_chess.trainer
spent = {}
def watched(owner, name, part):
    "Add the CPU time of a function to a part of the step."
    inner = getattr(owner, name)
    def outer(*args, **kw):
        before = time.process_time()
        try: return inner(*args, **kw)
        finally: spent[part] = spent.get(part, 0.) + time.process_time() - before
    setattr(owner, name, outer)
watched(grpo_chess.train, "start_positions", "starts")
watched(grpo_chess.sampler, "ask", "network")
watched(Trainer, "play", "playing")
watched(Trainer, "update", "updating")
watched(grpo_chess.trainer, "measure", "measuring")
start, step = EnginePool.__init__, Trainer.step
def remember(self, *args, **kw):
    start(self, *args, **kw)
    pools.append(self)
def timed(self):
    before, wall = used(), time.perf_counter()
    spent.clear()
    row = step(self)
    after = used()
    rows.append({k: v for k, v in row.items() if isinstance(v, (int, float))} | dict(
        wall=time.perf_counter() - wall, cpu=after[0] - before[0], engines=after[1] - before[1],
        at=time.perf_counter() - began, parts=dict(spent)))
    return row
EnginePool.__init__, Trainer.step = remember, timed
values = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as out:
    run(preset(values.pop("preset", "tiny"), **values, out=out, minutes=0, match=dict(games=0)), quiet=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10
print(json.dumps(dict(rows=rows, peak=peak)))
'''


def one_run(tree, values, cores=""):
    "Rows of a run of the package in `tree`, and its peak memory in MiB."
    pin = ["taskset", "-c", cores] if cores else []
    env = os.environ | dict(PYTHONPATH=str(tree))
    done = subprocess.run([*pin, sys.executable, "-c", WORKER, json.dumps(values)], env=env, cwd=tree,
                          capture_output=True, text=True)
    if done.returncode: sys.exit(f"{tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(found, cores):
    "Means over the steps that count: seconds a step of each part, plies a second of wall and of CPU time."
    rows = found["rows"][FIRST:]
    wall, plies = (sum(r[k] for r in rows) for k in ("wall", "plies"))
    cpu, engines = (sum(r[k] for r in rows) for k in ("cpu", "engines"))
    n = len(rows)
    return dict(plies_s=plies/wall, plies_cpu_s=plies/(cpu + engines), step=wall/n,
                play=sum(r["seconds_play"] for r in rows)/n, update=sum(r["seconds_update"] for r in rows)/n,
                cpu=cpu/n, engines=engines/n, share=(cpu + engines)/wall/cores, first=found["rows"][0]["at"],
                peak=found["peak"])


NAMES = dict(plies_s="plies/s", plies_cpu_s="plies per CPU second", step="seconds a step",
             play="seconds playing, judging", update="seconds updating", cpu="CPU s a step, Python and network",
             engines="CPU s a step, engines",
             share="share of the cores", first="seconds to the first step's end", peak="peak memory, MiB")


PARTS = {"start positions": ("starts",), "network, playing": ("network",), "rules, drawing, reading": ("playing",),
         "network and loss, updating": ("updating",), "measuring": ("measuring",)}


def parts_of(found):
    "CPU seconds a step of each part: of the process, and of the engines."
    rows = found["rows"][FIRST:]
    mean = {k: statistics.mean(r["parts"][k] for r in rows) for k in rows[0]["parts"]}
    mean["playing"] -= mean["network"] + mean["starts"]
    return {name: mean[keys[0]] for name, keys in PARTS.items()} | {
        "engines": statistics.mean(r["engines"] for r in rows)}


def spread(values):
    "Median and range."
    values = sorted(values)
    return f"{statistics.median(values):,.3g} ({values[0]:,.3g}–{values[-1]:,.3g})"


def same_results(a, b):
    "How far the rows of two runs are apart: in the first step, whose games are the same, and over all."
    out = []
    for name in ("loss", "entropy", "expected_regret"):
        first = abs(a["rows"][0][name] - b["rows"][0][name])
        mean = [statistics.mean(r[name] for r in x["rows"]) for x in (a, b)]
        out.append(f"{name} {first:.1g} in the first step, means {mean[0]:.4f} and {mean[1]:.4f}")
    return "; ".join(out)


def compare(before, values, now_values, rounds, cores, steps):
    "Alternating runs of an older commit and of this tree."
    old = Path(tempfile.mkdtemp())/"before"
    subprocess.run(["git", "-C", str(TOP), "worktree", "add", "--detach", "-f", str(old), before], check=True,
                   capture_output=True)
    size = {"trainer.steps": steps + FIRST}
    try:
        found = [(one_run(old, values | size, cores), one_run(TOP, values | size | now_values, cores))
                 for _ in range(rounds)]
    finally:
        subprocess.run(["git", "-C", str(TOP), "worktree", "remove", "--force", str(old)], capture_output=True)
        shutil.rmtree(old.parent, ignore_errors=True)
    n = len(cores.split(",")) if cores else len(os.sched_getaffinity(0))
    pairs = [[summary(x, n) for x in pair] for pair in found]
    print(f"{rounds} rounds of {steps} steps, {n} cores; medians and ranges\n")
    print(f"| | {before} | now | ratio |\n|---|---|---|---|")
    for key, name in NAMES.items():
        a, b = ([pair[i][key] for pair in pairs] for i in (0, 1))
        print(f"| {name} | {spread(a)} | {spread(b)} | {spread([y/x for x, y in zip(a, b)])} |")
    print(f"\nResults apart by: {same_results(*found[0])}\n", flush=True)
    print(f"| CPU s a step | {before} | now |\n|---|---|---|")
    made = [[parts_of(x) for x in pair] for pair in found]
    for name in made[0][0]: print(f"| {name} | {' | '.join(spread([m[i][name] for m in made]) for i in (0, 1))} |")


def alone(values, rounds, cores, steps):
    "This tree alone."
    n = len(cores.split(",")) if cores else len(os.sched_getaffinity(0))
    found = [summary(one_run(TOP, values | {"trainer.steps": steps + FIRST}, cores), n) for _ in range(rounds)]
    for key, name in NAMES.items(): print(f"{name:40} {spread([x[key] for x in found])}")


SWEEPS = {
    "sampler.boards": (8, 16, 32), "sampler.group": (1, 2, 4), "sampler.plies": (16, 32, 64),
    "model.width": (48, 96, 192), "model.layers": (2, 4, 8), "engine.processes": (1, 2, 4),
}
DEFAULT = {"sampler.boards": 16, "sampler.group": 1, "sampler.plies": 32, "model.width": 96, "model.layers": 4,
           "engine.processes": 2}


def sweep(path, steps, cores):
    "A row for each value of each setting, the others at their defaults; written as it goes."
    n = len(os.sched_getaffinity(0))
    with open(path, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["setting", "value", "plies", *NAMES, *(parts := [*PARTS, "engines alone"])])
        known:dict = {}
        for name, value in itertools.chain.from_iterable(((k, v) for v in vs) for k, vs in SWEEPS.items()):
            key = "default" if value == DEFAULT[name] else (name, value)
            if key not in known:
                known[key] = one_run(TOP, {"init": "", name: value, "trainer.steps": steps + FIRST}, cores)
            found = known[key]
            row = summary(found, n) | dict(zip(parts, parts_of(found).values()))
            plies = statistics.mean(r["plies"] for r in found["rows"][FIRST:])
            out.writerow([name, value, round(plies), *(f"{row[k]:.4g}" for k in (*NAMES, *parts))])
            file.flush()
            print(name, value, f"{row['step']:.3f} s a step, {row['peak']:.0f} MiB", flush=True)


def draw(path, picture):
    "What a default step is made of, and how time and memory grow with each setting, from the file of a sweep."
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = list(csv.DictReader(open(path)))
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    fig = plt.figure(figsize=(9, 7.2), layout="constrained")
    top, grid = fig.subfigures(2, 1, height_ratios=(1, 3))
    ax, left = top.subplots(), 0.
    usual = next(r for r in rows if int(r["value"]) == DEFAULT[r["setting"]])
    parts = {name: float(usual[name]) for name in (*PARTS, "engines alone")}
    for k, (name, seconds) in enumerate(parts.items()):
        ax.barh(0, seconds, .7, left=left, color=f"C{k}")
        said = f"{name.removesuffix(' alone')}\n{seconds/sum(parts.values()):.0%}"
        ax.text(left + seconds/2, (.75, -.75)[k % 2], said, ha="center", va="center", color=f"C{k}")
        left += seconds
    ax.set(yticks=[], ylim=(-1.1, 1.1), xlabel="CPU seconds", title="What a step of the default run is made of")
    ax.spines["left"].set_visible(False)
    for ax, (name, values) in zip(grid.subplots(2, 3).flat, SWEEPS.items()):
        chosen, twin = [r for r in rows if r["setting"] == name], ax.twinx()
        for key, colour in (("cpu", "C0"), ("engines", "C3")):
            ax.plot(values, [float(r[key]) for r in chosen], "o-", color=colour)
        twin.plot(values, [float(r["peak"]) for r in chosen], "s:", color="0.5")
        twin.spines["right"].set_visible(True)
        ax.set(xlabel=name, xticks=values, ylim=(0, None))
        twin.set_ylim(0, 1.1*max(float(r["peak"]) for r in rows))
    grid.supylabel("CPU seconds a step: Python and network (blue), engines (red)")
    grid.text(1.0, .5, "peak memory, MiB (grey)", rotation=90, va="center", ha="left")
    fig.savefig(picture, dpi=130, bbox_inches="tight")


def setting(text):
    "key=value, the value as JSON where it is JSON."
    key, _, value = text.partition("=")
    try: return key, json.loads(value)
    except ValueError: return key, value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="an older commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cores", default="", help="pin to these, as taskset writes them: 0,1")
    parser.add_argument("--both", nargs="*", default=[], help="settings of both, key=value")
    parser.add_argument("--set", nargs="*", default=[], help="settings of this tree alone, key=value")
    parser.add_argument("--sweep", help="file to write")
    parser.add_argument("--draw", nargs=2, metavar=("CSV", "PNG"), help="draw the file of a sweep")
    args = parser.parse_args()
    both, now = (dict(map(setting, x)) for x in (args.both, args.set))
    if args.draw: draw(*args.draw)
    elif args.sweep: sweep(args.sweep, args.steps, args.cores)
    elif args.before: compare(args.before, both, now, args.rounds, args.cores, args.steps)
    else: alone(both | now, args.rounds, args.cores, args.steps)


if __name__ == "__main__": main()
