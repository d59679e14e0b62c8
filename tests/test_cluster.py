"One interface, three places, the same tests: engines here, engines of a Ray cluster, and what engines said once."
import gc
import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import chess
import numpy as np
import pytest

from grpo_chess import cluster
from grpo_chess.board import PositionError
from grpo_chess.cluster import MOST, ray_chunk, read_recording, share_out
from grpo_chess.engine import EngineConfig, EngineError, EnginePool, engine_name, judge_name
from grpo_chess.players import engine_player, weak_engine_player
from grpo_chess.reward import Judge, RewardConfig
from test_engine import FENS, MATED, NO_KING, STALEMATE, START, until

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed: .ci/setup ray")
WHERE = ["local", "recorded", pytest.param("ray", marks=needs_ray)]
BOARDS = [chess.Board(f) for f in FENS[:40]]
GAMES = list(range(40))

# What is asked of every kind of engines; each answer must be the same, bit for bit.
QUESTIONS = dict(
    scores=lambda p: p.evaluate(FENS),
    trusted=lambda p: p.evaluate(FENS[:50], depth=2, trusted=True),
    nodes=lambda p: p.evaluate(FENS[:20], nodes=500),
    moves=lambda p: p.evaluate_moves(FENS[:60], depth=1),
    moves_deep=lambda p: p.evaluate_moves(FENS[:10], depth=3, trusted=True),
    best=lambda p: p.best_moves(FENS[:40]),
    over=lambda p: (p.evaluate([MATED, STALEMATE, START, MATED]), p.evaluate_moves([STALEMATE, MATED])),
    nothing=lambda p: (p.evaluate([]), p.evaluate_moves([]), p.best_moves([])),
    many=lambda p: [f.result(60) for f in [p.submit(FENS[k::3]) for k in range(3)]],
    player=lambda p: engine_player(p, depth=2)(BOARDS, GAMES, 0),
    weak=lambda p: weak_engine_player(p, level=0, seed=3)(BOARDS, GAMES, 0),
    judge=lambda p: Judge(RewardConfig(depth=2), p).values(FENS),
)


def plain(x):
    "Arrays with their type, so that equal means equal bit for bit."
    if isinstance(x, np.ndarray):
        return x.dtype.str, x.shape, x.tobytes()
    if isinstance(x, dict):
        return [*x.items()]
    return [plain(y) for y in x] if isinstance(x, (list, tuple)) else (type(x), x)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    "Answers of one local engine, and the file in which they were recorded."
    file = tmp_path_factory.mktemp("recording") / "said.jsonl.gz"
    with EnginePool(EngineConfig(processes=1, where=f"record:{file}")) as pool:
        answers = {name: plain(ask(pool)) for name, ask in QUESTIONS.items()}
    return answers, file


@pytest.fixture(scope="module")
def small_cluster():
    "A cluster of this test process: two cores for engines."
    try:
        connected = cluster.connect("ray")
    except EngineError as e:
        if "timed out during startup" not in str(e):
            raise
        pytest.skip(f"this machine is too busy for Ray: {e}")
    yield connected
    connected.shutdown()


@pytest.fixture(params=WHERE)
def somewhere(request, truth):
    "A pool, wherever its engines are."
    if request.param == "ray":
        request.getfixturevalue("small_cluster")
    where = f"recorded:{truth[1]}" if request.param == "recorded" else request.param
    with EnginePool(EngineConfig(processes=2, where=where)) as pool:
        yield pool
    gc.collect()


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_same_answers_wherever_the_engines_are(somewhere, truth, name):
    assert plain(QUESTIONS[name](somewhere)) == truth[0][name]


def test_all_at_once_from_many_threads(somewhere, truth):
    got = {}

    def ask(name):
        got[name] = plain(QUESTIONS[name](somewhere))

    threads = [threading.Thread(target=ask, args=(name,)) for name in QUESTIONS]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert got == truth[0] and somewhere.restarts == 0


def test_what_callers_see(somewhere):
    assert somewhere.asked == 0 and somewhere.name == engine_name()
    future = somewhere.submit(FENS)
    assert isinstance(future, Future) and future.result(60).dtype == np.int32
    assert somewhere.asked == len(FENS) and somewhere.processes >= 1
    assert judge_name(somewhere.cfg) == engine_name()


def test_what_is_refused(somewhere):
    for ask in (somewhere.evaluate, somewhere.evaluate_moves, somewhere.best_moves):
        with pytest.raises(PositionError, match="black has no king"):
            ask([START, NO_KING])
        with pytest.raises(TypeError):
            ask(START)
        with pytest.raises(ValueError):
            ask([START], depth=0)
    assert somewhere.asked == 0
    assert len(somewhere.evaluate(FENS)) == len(FENS)


def test_a_line_break_is_refused(somewhere):
    with pytest.raises((PositionError, EngineError), match="line break|no answer"):
        somewhere.evaluate([START + "\nquit"], trusted=True)
    assert len(somewhere.evaluate(FENS)) == len(FENS)


def test_closed_is_closed(somewhere):
    somewhere.evaluate(FENS)
    start = time.monotonic()
    somewhere.close()
    assert time.monotonic() - start < 4
    with pytest.raises(EngineError, match="closed"):
        somewhere.evaluate(FENS)
    somewhere.close()


@needs_ray
def test_an_actor_of_ray_that_is_killed_while_it_works(small_cluster, truth):
    with EnginePool(EngineConfig(where="ray", processes=2)) as pool:
        once = pool.evaluate(FENS)
        assert plain(once) == truth[0]["scores"]
        future, courier = pool.submit(FENS * 20), pool._desk.threads[0]
        assert until(lambda: courier.sent, 5)
        small_cluster.kill(courier.actor)
        assert plain(future.result(60)) == plain(np.tile(once, 20)) and pool.restarts == 1


# --- recordings ----------------------------------------------------------------------------------


def test_a_recording_refuses_what_it_does_not_know(truth):
    with EnginePool(EngineConfig(where=f"recorded:{truth[1]}")) as pool:
        for ask, what in (
            (lambda: pool.evaluate([START, FENS[0]], depth=9), "`go depth 9`"),
            (lambda: pool.evaluate(["8/8/8/8/8/8/8/K1k5 w - - 0 1"]), "K1k5"),
        ):
            with pytest.raises(EngineError) as e:
                ask()
            assert what in str(e.value) and "record:FILE" in str(e.value) and "\n" not in str(e.value)
        assert len(pool.evaluate(FENS)) == len(FENS)


def test_a_damaged_recording(truth, tmp_path):
    import gzip

    whole = gzip.decompress(truth[1].read_bytes()).decode()
    bad = dict(
        missing=None,
        empty=b"",
        text=b"hello",
        cut=truth[1].read_bytes()[:500],
        no_name=b'{"format": 1}\n',
        rows=b'{"engine": "x"}\n[1]\n',
    )
    for name, data in bad.items():
        file = tmp_path / f"{name}{'.gz' if name == 'cut' else ''}"
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(EngineError, match=name) as e:
            EnginePool(EngineConfig(where=f"recorded:{file}"))
        assert "\n" not in str(e.value)
    lies = tmp_path / "lies"
    lies.write_text(whole.replace(" score cp ", " score elo "))
    with EnginePool(EngineConfig(where=f"recorded:{lies}")) as pool, pytest.raises(EngineError, match="damaged at"):
        pool.evaluate(FENS)


def test_a_recording_is_written_whole_or_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(OSError):
        EnginePool(EngineConfig(where=f"record:{tmp_path}/no/such/folder/file"))
    file = tmp_path / "said.jsonl"
    pool = EnginePool(EngineConfig(processes=2, where=f"record:{file}"))
    pool.evaluate(FENS[:7] * 2)
    del pool
    gc.collect()
    assert until(lambda: len(file.read_text().splitlines()) == 8)
    name, said = read_recording(file)
    assert name == engine_name() and len(said) == 7 and [json.loads(q)[0] for q in said] == ["depth 4"] * 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="one process"):
        EnginePool(EngineConfig(where=f"record:{file}"))


# --- where ---------------------------------------------------------------------------------------


NOWHERE = ["", "Ray", "ray:", "ray:host", "ray://", "ray://host", "recorded", "recorded:", "http://x:1", "ray:x:y"]


@pytest.mark.parametrize("bad", NOWHERE)
def test_places_that_are_none(bad):
    with pytest.raises(ValueError, match="engine.where"):
        EngineConfig(where=bad)


def test_without_ray_one_line_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(cluster, "import_module", missing)
    with pytest.raises(EngineError, match=r"needs Ray: pip install 'grpo_chess\[ray\]'"):
        EnginePool(EngineConfig(where="ray"))


@pytest.mark.parametrize(
    "cores, wanted, world, sizes",
    [
        ([16, 16], 0, 1, [4] * 8),
        ([0, 2, 2], 0, 1, [2, 2]),
        ([8], 0, 2, [4]),
        ([3, 5], 0, 1, [3, 3]),
        ([64] * 4, 250, 1, [4] * 62 + [2]),
        ([64] * 4, 3, 1, [3]),
        ([2], 0, 8, [1]),
        ([4], 0, 2, [2]),
        ([], 6, 1, [4, 2]),
        ([1, 64], 5, 1, [1] * 5),
    ],
)
def test_engines_are_shared_out(cores, wanted, world, sizes):
    assert share_out(cores, wanted, world) == sizes


def test_a_cluster_without_cores():
    with pytest.raises(EngineError, match="no node of the Ray cluster has a core"):
        share_out([0], 0)


def test_chunks_for_other_machines():
    assert ray_chunk(10_000, None, 4, False) == 50 and ray_chunk(10, None, 4, False) == 10
    assert ray_chunk(10_000, 1e-4, 4, False) == MOST == ray_chunk(10_000, 1e-4, 1, True)
    assert ray_chunk(400, 1e-4, 4, False) == 100 and ray_chunk(80, 1e-3, 4, False) == 10
    assert ray_chunk(7, 1e-4, 4, True) == 7
    assert ray_chunk(10_000, .01, 4, False) == 40 and ray_chunk(10_000, 100., 4, False) == 1
    left, taken = 5000, []
    while left:
        taken.append(ray_chunk(left, 1e-4, 3, False))
        left -= taken[-1]
    assert taken == sorted(taken, reverse=True) and sum(taken) == 5000


# --- couriers, with a Ray that is none: threads in place of actors, and faults on demand ---------------


class Fault(Exception):
    "What Ray would say of a lost actor."


class StandIn:
    "As much of Ray as the couriers use; `faults` maps the number of an actor to what is wrong with it."

    class exceptions:
        class RayTaskError(Exception):
            def __init__(self, cause):
                super().__init__(str(cause))
                self.cause = cause

    def __init__(self, faults=None, cores=(2, 2)):
        self.faults, self.cores, self.born, self.chunks, self.lock = faults or {}, cores, 0, [], threading.Lock()

    def nodes(self):
        return [dict(Alive=True, Resources=dict(CPU=n)) for n in self.cores]

    def remote(self, cls):
        return self

    def options(self, **place):
        return SimpleNamespace(remote=self.start)

    def start(self, cfg):
        with self.lock:
            k, self.born = self.born, self.born + 1
        actor = SimpleNamespace(host=cluster.Host(cfg), dead=False, seen=0, fault=self.faults.get(k, lambda n: None))
        actor.ready = SimpleNamespace(remote=lambda: self.later(actor, actor.host.ready))
        actor.answer = SimpleNamespace(remote=lambda *a: self.later(actor, actor.host.answer, *a))
        return actor

    def later(self, actor, method, *args):
        future = Future()

        def work():
            try:
                with self.lock:
                    n, actor.seen = actor.seen, actor.seen + 1
                    if n:
                        self.chunks.append(args[0].count("\n") + 1)
                wrong = None if actor.dead else actor.fault(n)
                if actor.dead or wrong == "dies":
                    actor.dead = True
                    raise Fault("the actor died\nunexpectedly")
                if wrong == "hangs":
                    return
                found = method(*args)
                future.set_result(wrong(found) if callable(wrong) else found)
            except Fault as e:
                future.set_exception(e)
            except Exception as e:
                future.set_exception(self.exceptions.RayTaskError(e))

        threading.Thread(target=work, daemon=True).start()
        return future

    def wait(self, futures, timeout):
        until(futures[0].done, timeout)
        return [f for f in futures if f.done()], [f for f in futures if not f.done()]

    def get(self, future):
        return future.result(0)

    def kill(self, actor):
        actor.dead = True
        if pool := getattr(actor.host, "pool", None):
            pool.close()


@pytest.fixture
def stand_in(monkeypatch):
    "A pool whose cluster has these faults."
    pools = []

    def make(faults=None, cores=(2, 2), **cfg):
        ray = StandIn(faults, cores)
        monkeypatch.setattr(cluster, "connect", lambda where: ray)
        monkeypatch.setattr(cluster, "judge_name", lambda cfg: engine_name())
        pools.append(EnginePool(EngineConfig(where="ray", **cfg)))
        return pools[-1], ray

    yield make
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("name", QUESTIONS)
def test_couriers_carry_every_question(stand_in, truth, name):
    pool, ray = stand_in()
    assert plain(QUESTIONS[name](pool)) == truth[0][name] and pool.restarts == 0
    assert sum(ray.chunks) <= pool.asked and pool.processes == 2


FAULTS = dict(
    one_dies=({0: lambda n: "dies" if n == 2 else None}, 1),
    both_die_in_turn=({0: lambda n: "dies" if n == 1 else None, 1: lambda n: "dies" if n == 2 else None}, 2),
    dies_before_it_is_ready=({0: lambda n: "dies"}, 1),
    answers_too_little=({0: lambda n: (lambda found: (found[0][:-1], found[1])) if n == 1 else None}, 1),
    hangs=({0: lambda n: "hangs" if n == 1 else None}, 1),
)


@pytest.mark.parametrize("how", FAULTS)
def test_what_a_lost_actor_had_is_asked_again(stand_in, truth, how):
    faults, restarts = FAULTS[how]
    pool, _ = stand_in(faults, timeout=2.0)
    assert plain(pool.submit(FENS).result(30)) == truth[0]["scores"]
    assert plain(pool.submit_moves(FENS[:60], depth=1).result(30)) == truth[0]["moves"]

    def asked_again():
        "A fault waits for a chunk of its own actor, and a quicker one may take them all: so ask until it came."
        assert plain(pool.submit(FENS).result(30)) == truth[0]["scores"]
        return pool.restarts == restarts

    assert pool.restarts <= restarts and (how == "hangs" or until(asked_again, 30))
    assert not pool._desk.tries


def test_a_chunk_that_kills_every_actor_ends_in_an_error(stand_in):
    poison = {k: lambda n: "dies" if n else None for k in range(99)}
    pool, ray = stand_in(poison, retries=1)
    with pytest.raises(EngineError, match="2 actors of the Ray cluster were lost at or near position") as e:
        pool.evaluate(FENS)
    assert "\n" not in str(e.value) and "the actor died" in str(e.value)


def test_actors_that_never_start_end_in_an_error(stand_in):
    pool, _ = stand_in({k: lambda n: "dies" for k in range(99)}, retries=2)
    with pytest.raises(EngineError, match="no actor starts: the actor died"):
        pool.evaluate(FENS)
    pool, _ = stand_in({k: lambda n: "hangs" for k in range(99)}, timeout=1.0)
    with pytest.raises(EngineError, match="no actor of the Ray cluster was ready within 1 s"):
        pool.evaluate(FENS)


def test_another_engine_or_package_on_a_node_is_refused(stand_in):
    other = {1: lambda n: (lambda found: ("Otherfish 3", *found[1:])) if n == 0 else None}
    pool, _ = stand_in(other)
    with pytest.raises(EngineError, match="others .*: they would evaluate differently"):
        for _ in range(50):
            pool.evaluate(FENS)
    old = {k: lambda n: (lambda found: (found[0], "0.0.9", found[2])) for k in range(9)}
    pool, _ = stand_in(old)
    with pytest.raises(EngineError, match="has grpo_chess 0.0.9"):
        pool.evaluate(FENS)


def test_a_node_without_an_engine_says_so(stand_in, monkeypatch):
    pool, _ = stand_in(path="/no/such/engine")
    with pytest.raises(EngineError, match="on a node of the Ray cluster: no engine at '/no/such/engine'"):
        pool.evaluate(FENS)


def test_back_pressure(stand_in, monkeypatch):
    "No actor ever has more than two chunks."
    most = []

    class Watched(cluster._Courier):
        def send(self, chunk):
            super().send(chunk)
            most.append(len(self.sent))

    monkeypatch.setattr(cluster, "_Courier", Watched)
    monkeypatch.setattr(cluster, "MOST", 10)
    pool, ray = stand_in()
    pool.evaluate(FENS)
    pool.evaluate(FENS * 3, depth=2)
    assert max(most) == cluster.OPEN == 2 and len(ray.chunks) > 20 and sum(ray.chunks) == 4 * len(FENS)


def test_a_fork_leaves_the_cluster_behind(stand_in):
    pool, _ = stand_in()
    pool._desk.forget()
    with pytest.raises(EngineError, match="closed"):
        pool.evaluate(FENS)


# --- examples ------------------------------------------------------------------------------------

TOP = Path(__file__).resolve().parent.parent
SHIMS = dict(  # programs of a SLURM machine, which write down what they are asked to do
    scontrol='printf "%s\\n" gpu0 cpu1 cpu2',
    srun='echo "srun $*" >> "$LOG"; echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE" >> "$LOG"; '
    'case "$*" in *--block*) sleep 5;; *) sleep 1;; esac',
)


def slurm(tmp_path, *args, **env):
    "What the batch script starts, line by line, and how it ends."
    for name, body in SHIMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    env = os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", LOG=str(log), SLURM_JOB_NODELIST="x", SLURM_CPUS_PER_TASK="64"
    ) | env
    command = ["bash", str(TOP / "examples/slurm.sh"), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done, sorted(log.read_text().splitlines())


def test_the_batch_script_starts_what_it_says(tmp_path):
    done, lines = slurm(tmp_path, "--preset", "record", RANKS="2")
    assert done.returncode == 0, done.stderr
    one = "srun --overlap --nodes=1 --ntasks=1 --nodelist"
    assert lines == sorted(
        [
            f"{one}=gpu0 ray start --head --node-ip-address=gpu0 --port=6379 --num-cpus=0 --include-dashboard=false "
            "--block",
            f"{one}=cpu1 ray start --address=gpu0:6379 --num-cpus=64 --block",
            f"{one}=cpu2 ray start --address=gpu0:6379 --num-cpus=64 --block",
            f"{one}=gpu0 torchrun --nproc-per-node 2 -m grpo_chess.train --engine.where ray:gpu0:6379 "
            "--engine.processes 64 --engine.timeout 120 --preset record",
            *["token 64 token"] * 4,
        ]
    )
    from grpo_chess.config import parse

    words = next(line for line in lines if "torchrun" in line).partition("grpo_chess.train ")[2].split()
    cfg, _ = parse(words)
    assert cfg.engine.where == "ray:gpu0:6379" and cfg.engine.processes == 64


def test_the_batch_script_refuses_to_run_without_engines(tmp_path):
    done, lines = slurm(tmp_path, SLURM_CPUS_PER_TASK="0")
    assert done.returncode == 2 and "at least two" in done.stderr and not lines


@pytest.mark.parametrize("tool", ["bash -n", "shellcheck"])
def test_the_batch_script_is_a_script(tool):
    if not shutil.which(tool.split()[0]):
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([*tool.split(), str(TOP / "examples/slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_description_of_a_cluster():
    import yaml

    found = yaml.safe_load((TOP / "examples/ray-cluster.yaml").read_text())
    head, worker = found["head_start_ray_commands"][-1], found["worker_start_ray_commands"][-1]
    assert "--num-cpus=0" in head and "--address=$RAY_HEAD_IP:6379" in worker
    assert all("RAY_AUTH_MODE=token" in s and "--disable-usage-stats" in s for s in (head, worker))
    if not find_spec("ray"):
        pytest.skip("Ray is not installed, which has the schema: .ci/setup ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(found))
