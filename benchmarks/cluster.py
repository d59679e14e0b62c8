"""A Ray cluster of several nodes on one machine: what happens when nodes die, and what a position costs.

    python benchmarks/cluster.py kill        # 12,000 positions, a node killed and another one unplugged in the middle
    python benchmarks/cluster.py cost        # CPU and bytes a position beside the local pool, for several chunk sizes

Each node lives in a network namespace of its own, with an address and a cable (a veth pair to one bridge), so that the
kernel counts what crosses the wire. This needs root, `ip`, Ray (.ci/setup ray) and about 3 GB of memory. The results go
to nbs/data/cluster_kill.txt and nbs/data/cluster_cost.json. Only processes of these namespaces are ended.
"""
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import chess
import psutil

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
from grpo_chess import cluster  # noqa: E402
from grpo_chess.board import position_key  # noqa: E402
from grpo_chess.engine import EngineConfig, EnginePool  # noqa: E402

NET, HEAD, CORES = "10.77.0.", "10.77.0.1", 2
RAY = str(Path(sys.executable).parent/"ray")
DATA = TOP/"nbs/data"
TOKEN = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)       # who does not know it is no node of ours


def played(n, seed=0):
    "`n` different positions from random games."
    rng, seen = random.Random(seed), {}
    while len(seen) < n:
        board = chess.Board()
        while not board.is_game_over() and board.ply() < 120:
            board.push(rng.choice(list(board.legal_moves)))
            if board.ply() > 4 and not board.is_game_over(): seen[position_key(board)] = None
    return list(seen)[:n]


# --- nodes ------------------------------------------------------------------------------------------

def around(**more):
    "The environment of a node: a proxy for the web would be asked for the other nodes too."
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = dict(PYTHONPATH=str(TOP), OMP_NUM_THREADS="1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN,
               RAY_raylet_start_wait_time_s="60")        # a busy machine
    return env | own | more


def ip(*words): subprocess.run(["ip", *words], check=True)


def name_of(k): return f"grpo{k}"


def pids(k):
    "Processes of node `k`."
    said = subprocess.run(["ip", "netns", "pids", name_of(k)], capture_output=True, text=True).stdout
    return [int(p) for p in said.split()]


def plug(k):
    "A namespace with one cable to the bridge."
    ip("netns", "add", name_of(k))
    ip("link", "add", f"veth{k}", "type", "veth", "peer", "name", "eth0", "netns", name_of(k))
    ip("link", "set", f"veth{k}", "netns", "grposwitch")
    ip("-n", "grposwitch", "link", "set", f"veth{k}", "master", "br0", "up")
    ip("-n", name_of(k), "addr", "add", f"{NET}{k + 1}/24", "dev", "eth0")
    ip("-n", name_of(k), "link", "set", "eth0", "up")
    ip("-n", name_of(k), "link", "set", "lo", "up")


def start(k, cores):
    "Ray on node `k`; node 0 is the head."
    where = ["--head", "--port=6379", "--include-dashboard=false"] if k == 0 else [f"--address={HEAD}:6379"]
    command = ["ip", "netns", "exec", name_of(k), RAY, "start", *where, f"--node-ip-address={NET}{k + 1}",
               f"--num-cpus={cores}", "--object-store-memory=100000000", "--disable-usage-stats"]
    for _ in range(5):          # on a busy machine Ray's own patience may end before its processes have started
        done = subprocess.run(command, env=around(), capture_output=True, text=True)
        if not done.returncode: return
        kill(k)
    raise SystemExit(f"node {k} does not start:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")


def kill(k):
    "SIGKILL to everything on node `k`."
    found = pids(k)
    for pid in found:
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    return len(found)


def traffic(k):
    "Bytes that have crossed the cable of node `k`."
    folder = Path("/sys/class/net/eth0/statistics")
    said = subprocess.run(["ip", "netns", "exec", name_of(k), "cat", folder/"rx_bytes", folder/"tx_bytes"],
                          capture_output=True, text=True, check=True).stdout
    return sum(map(int, said.split()))


@contextlib.contextmanager
def nodes(n):
    "A head without engines, and `n` nodes with some; all of it is gone afterwards."
    try:
        ip("netns", "add", "grposwitch")
        ip("-n", "grposwitch", "link", "add", "br0", "type", "bridge")
        ip("-n", "grposwitch", "link", "set", "br0", "up")
        for k in range(n + 1): plug(k)
        for k in range(n + 1): start(k, CORES if k else 0)
        yield
    finally:
        for k in range(n + 2):
            kill(k)
            subprocess.run(["ip", "netns", "del", name_of(k)], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "netns", "del", "grposwitch"], stderr=subprocess.DEVNULL)


def inside(command):
    "Run this script again on the head, where the cluster can be reached."
    words = ["ip", "netns", "exec", name_of(0), sys.executable, __file__, command]
    subprocess.run(words, check=True, env=around(RAY_ADDRESS=f"{HEAD}:6379"))


# --- nodes die --------------------------------------------------------------------------------------

class Transcript:
    "Lines with the seconds since the start, printed and kept."
    def __init__(self): self.start, self.lines = time.monotonic(), []

    def __call__(self, text):
        self.lines.append(f"{time.monotonic() - self.start:5.1f} s  {text}")
        print(self.lines[-1], flush=True)


def note_losses(desk, say):
    "Say it when a lost actor's positions are given back."
    give_back = desk.give_back

    def noted(job, i, j, error):
        say(f"an actor is lost ({type(error).__name__}): its {j - i} positions go back into the queue")
        give_back(job, i, j, error)
    desk.give_back = noted


def answered(futures): return f"{sum(f.done() for f in futures)*500:,}"


def wait_for(futures, n):
    while sum(f.done() for f in futures) < n: time.sleep(.01)


def kill_run(fens, say):
    "Ask everything of the cluster, and break it meanwhile."
    with EnginePool(EngineConfig(where="ray", timeout=10.)) as pool:
        pool.evaluate(fens[:200], trusted=True)
        hosts = [n["NodeManagerAddress"] for n in pool._desk.ray.nodes() if n["Resources"].get("CPU")]
        say(f"{len(hosts)} nodes with {CORES} cores each ({', '.join(sorted(hosts))}), {pool.processes} actors, "
            f"engines: {pool.name}")
        note_losses(pool._desk, say)
        futures = [pool.submit(fens[k:k+500], trusted=True) for k in range(0, len(fens), 500)]
        say(f"{len(fens):,} positions are asked at depth 4")
        wait_for(futures, 6)
        say(f"{answered(futures)} are answered; node {NET}3 is killed: SIGKILL to {kill(2)} processes")
        wait_for(futures, 11)
        say(f"{answered(futures)} are answered; the cable of node {NET}4 is pulled")
        ip("-n", name_of(3), "link", "set", "eth0", "down")
        wait_for(futures, 16)
        say(f"{answered(futures)} are answered; a new node {NET}5 joins")
        start(4, CORES)
        out = [score for f in futures for score in f.result().tolist()]
        say(f"all {len(out):,} are answered; actors started again: {pool.restarts}")
        again = pool.evaluate(fens[:3000], trusted=True).tolist()
        say(f"3,000 of them are asked once more, and answered; actors at work: {pool._desk.alive}")
    return out, again


def kill_inside():
    fens, say = played(12_000), Transcript()
    out, again = kill_run(fens, say)
    with EnginePool() as pool: truth = pool.evaluate(fens, trusted=True).tolist()
    altered = sum(a != b for a, b in zip(out, truth)) + sum(a != b for a, b in zip(again, truth))
    say(f"beside a local pool: {len(fens) - len(out)} lost, {altered} altered, {max(0, len(out) - len(fens))} invented")
    (DATA/"cluster_kill.txt").write_text("\n".join(say.lines) + "\n")
    assert out == truth and again == truth[:3000]


# --- what a position costs ---------------------------------------------------------------------------

SIZES = 10, 30, 100, 300, 1000, 3000


def actors():
    "The processes of all actors."
    found = [psutil.Process(p) for k in range(1, 4) for p in pids(k) if psutil.pid_exists(p)]
    return [p for p in found if "ray::Host" in " ".join(p.cmdline())]


def counters(remote):
    "CPU seconds of this process, bytes on its cable, CPU seconds of all actors, and the time."
    wire = traffic(0) if remote else 0
    return time.process_time(), wire, sum(sum(p.cpu_times()[:2]) for p in remote), time.perf_counter()


def measure(ask, n, remote):
    "Microseconds of CPU and bytes on the wire, a position; the least of three rounds of each."
    rounds = []
    for _ in range(3):
        before = counters(remote)
        ask()
        rounds.append([(b - a)/n for a, b in zip(before, counters(remote))])
    cpu, wire, actor, seconds = map(min, zip(*rounds))
    return dict(cpu_us=round(1e6*cpu, 2), bytes=round(wire, 1), actor_us=round(1e6*actor, 1), per_s=round(1/seconds))


def questions(pool, fens):
    "The two questions of a training run, and of how many positions: a score, and the score of every move."
    third = fens[:len(fens)//3]
    return dict(scores=(lambda: pool.evaluate(fens, depth=1, trusted=True), len(fens)),
                moves=(lambda: pool.evaluate_moves(third, depth=1, trusted=True), len(third)))


def cost_rows(pool, fens, where, chunk, remote):
    "What both questions cost."
    rows = [dict(where=where, what=what, chunk=chunk) | measure(*asked, remote)
            for what, asked in questions(pool, fens).items()]
    print(*rows, sep="\n", flush=True)
    return rows


def cost_inside():
    fens, rows = played(6000), []
    with EnginePool(EngineConfig(where="ray")) as pool:
        pool.evaluate(fens[:300])
        idle, remote = traffic(0), actors()
        time.sleep(10)
        idle = (traffic(0) - idle)/10
        for size in SIZES:
            cluster.ray_chunk = lambda left, pace, actors, followed, size=size: min(left, size)
            rows += cost_rows(pool, fens, "ray", size, remote)
    with EnginePool() as pool: rows += cost_rows(pool, fens, "local", 0, [])
    moves = sum(chess.Board(f).legal_moves.count() for f in fens)/len(fens)
    about = dict(idle_bytes_s=round(idle), fen_bytes=round(sum(map(len, fens))/len(fens), 1), moves=round(moves, 1))
    (DATA/"cluster_cost.json").write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "kill_inside": kill_inside()
    elif what == "cost_inside": cost_inside()
    elif what in ("kill", "cost"):
        with nodes(3):
            if what == "kill": plug(4)
            inside(f"{what}_inside")
    else: print(__doc__)
