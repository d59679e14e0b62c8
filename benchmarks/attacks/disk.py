"Kills, flipped bits and full disks."
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

from .common import DEFAULT, MATCH, RUN, Disk, begin, counted, end, forked, fresh, pretrain, quiet, same_run, train


def chosen(numbers, most, seed=0):
    "At most so many of them, spread at random."
    numbers = list(numbers)
    return numbers if len(numbers) <= most else sorted(random.Random(seed).sample(numbers, most))


def finish(folder, args, where):
    "The same command again, or the run resumed where its folder is there already."
    again = ["--resume", folder] if Path(folder).exists() else args
    return forked(lambda: train(*again), where)


def kills_in_saves(tally, folder, n):
    "SIGKILL before, in and after every call to the disk of a run: no run is lost, the resumed one is the same run."
    args = [*RUN, "--out", folder / "runs", "--name", "x"]
    fresh(folder)
    whole = fresh(folder / "whole")
    assert forked(lambda: train(*RUN, "--out", whole, "--name", "x"), folder).status == 0
    names = counted(lambda: train(*args), folder / "runs", "saves")
    shutil.rmtree(folder / "runs")
    tally.note("calls to the disk in a run of 6 steps and 3 checkpoints", len(names))
    plan = [(k, kind) for k in range(1, len(names) + 1) for kind in ("before", "after")]
    plan += [(k, "in") for k, name in enumerate(names, 1) if name == "write"]
    for k, kind in chosen(plan, n):
        shutil.rmtree(folder / "runs", ignore_errors=True)

        def child(k=k, kind=kind):
            with Disk(folder / "runs", k, kind):
                return train(*args)

        first = forked(child, folder)
        second = finish(folder / "runs/x", args, folder)
        held = first.status == -signal.SIGKILL and second.status == 0 and same_run(folder / "runs/x", whole / "x")
        tally.add(held, (k, kind, names[k - 1], first.status, second))


def kills_any_time(tally, folder, n, settings=RUN, seconds=None):
    "SIGKILL at random moments, several in each run: weights and metrics as if nothing had been."
    fresh(folder)
    rng = random.Random(1)
    started = time.monotonic()
    assert (done := forked(lambda: train(*settings, "--out", folder, "--name", "whole"), folder, 300)).status == 0, done
    whole = seconds or time.monotonic() - started
    left, name = n, 0
    while left > 0:
        args, run = [*settings, "--out", folder, "--name", f"k{name}"], folder / f"k{name}"
        for _ in range(5):
            again = ["--resume", run] if run.exists() else args
            log, begun = folder / ".killed", time.monotonic()
            pid = begin(lambda again=again: train(*again), log)
            time.sleep(rng.random() * whole)
            os.kill(pid, signal.SIGKILL)
            killed = end(pid, log, begun).status == -signal.SIGKILL
            tally.note("kills that came before the end", int(killed))
            left -= killed
        last = finish(run, args, folder)
        tally.add(last.status == 0 and same_run(run, folder / "whole"), (name, last))
        shutil.rmtree(run, ignore_errors=True)
        name += 1


def kills(tally, folder, n):
    "All kills of training: in every call, at any time, and of the default preset."
    kills_in_saves(tally, folder / "saves", n)
    kills_any_time(tally, folder / "any", max(2, n // 2))
    kills_any_time(tally, folder / "default", max(1, n // 20), DEFAULT)


SUPERVISED = ["--steps", "6", "--eval_every", "2", "--batch", "16", "--eval_positions", "40", "--warmup", "2",
              "--accelerator", "cpu"]


def label_set(folder):
    "Three shards of labels, made by the engine."
    out = ["--positions", "180", "--rows", "60", "--games", "16", "--engine.processes", "1", "--out", folder]
    assert (done := forked(lambda: pretrain("label", *out), Path(folder).parent)).status == 0, done
    return out


def damages(data, rng):
    "A way to damage a file: what it holds then, and a word for it."
    kind = rng.choice(["bit"] * 12 + ["cut", "empty", "page", "longer"])
    if kind == "cut":
        return data[: rng.randrange(len(data))], kind
    if kind in ("empty", "longer"):
        return (b"" if kind == "empty" else data + rng.randbytes(rng.randint(1, 50))), kind
    bad = bytearray(data)
    at = rng.randrange(len(data))
    if kind == "page":
        bad[at : at + 4096] = bytes(len(bad[at : at + 4096]))
    else:
        bad[at] ^= 1 << rng.randrange(8)
    return bytes(bad), kind


def run_state(run):
    "All that a resumed run would start from, read as the command reads it; None where it is refused in one line."
    from grpo_chess.config import from_values, read_settings
    from grpo_chess.settings import FileError
    from grpo_chess.train import USER_ERRORS, ConfigError, Own, initial_model, make_trainer, read_identity, resume_from
    from grpo_chess.train import Log, start_fabric

    try:
        cfg = from_values(read_settings(run))
        known, fabric = read_identity(run), start_fabric(cfg, "")
        start = initial_model(cfg, None, str(run))
        begun = [p.clone() for p in start.parameters()]
        trainer = make_trainer(cfg, fabric, start, None, Own())
        resume_from(trainer, run)
        log = Log(run, cfg, trainer.done)
        log.close()
        rows = [{k: v for k, v in r.items() if "seconds" not in k} for r in log.history()]
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        return known, begun, trainer.done, weights, str(trainer.state()["optimizer"]), rows
    except (ConfigError, FileError, *USER_ERRORS) as e:
        assert len(str(e).splitlines()) == 1
        return None


def same_state(found, good):
    "Is what was read the newest state, or the one before it, with no row that is not the run's own?"
    if found is None:
        return True
    import torch

    for other in good:
        same = found[0] == other[0] and found[2] == other[2] and found[4] == other[4]
        same = same and all(torch.equal(a, b) for i in (1, 3) for a, b in zip(found[i], other[i]))
        if same and all(row in other[5] for row in found[5]):
            return True
    return False


def flips_of_a_run(tally, folder, n):
    "Every file that a resumed run reads."
    fresh(folder)
    assert forked(lambda: train(*RUN, "--trainer.ema", ".5", "--out", folder, "--name", "x"), folder).status == 0
    run, copy, rng = folder / "x", folder / "copy", random.Random(2)
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix not in (".md", ".png", ".html")]
    files = [p for p in files if p.name != "model.safetensors" or p.parent != run]
    good = [run_state(shutil.copytree(run, folder / "good"))]
    shutil.rmtree(folder / "good/checkpoint/000006")
    good.append(run_state(folder / "good"))
    for i in range(n):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        file = copy / files[i % len(files)].relative_to(run)
        data = file.read_bytes()
        bad, kind = damages(data, rng)
        if bad == data:
            continue
        file.write_bytes(bad)
        found = quiet(lambda: run_state(copy))
        tally.note("refused" if found is None else "the checkpoint before" if found[2] < 6 else "went on")
        aside = found is None or any(copy.rglob("*.damaged")) or file.suffix in (".yaml", ".json", ".jsonl")
        aside = aside or file.parent.name == "000004" and found[2] == 6     # not read while the newest is whole
        tally.add(same_state(found, good) and aside, (file.relative_to(copy), kind, found and found[2]))


def flips_of_labels(tally, folder, n):
    "Every file of a label set: the training refuses it, and the labelling makes it again as it was."
    fresh(folder)
    label_set(folder / "labels")
    rng, copy = random.Random(3), folder / "copy"
    from grpo_chess.labels import LabelError, check_shards, held_out, set_damage_aside

    files = sorted(p.name for p in (folder / "labels").iterdir())
    for i in range(n):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "labels", copy)
        file = copy / files[i % len(files)]
        data = file.read_bytes()
        bad, kind = damages(data, rng)
        if bad == data:
            continue
        file.write_bytes(bad)
        try:
            check_shards(copy)
            held_out(copy, 0, 1000)
            refused = False
        except LabelError as e:
            refused = len(str(e).splitlines()) == 1
        quiet(lambda: set_damage_aside(copy))
        tally.add(refused and not file.exists() and any(copy.glob("*.damaged")), (file.name, kind, refused))


def flips_of_weights(tally, folder, n):
    "The weights of the package, and those that a run leaves."
    from grpo_chess.model import WEIGHTS, WeightsError, load_model

    fresh(folder)
    data, rng = (WEIGHTS / "tiny.safetensors").read_bytes(), random.Random(4)
    for _ in range(n):
        bad, kind = damages(data, rng)
        if rng.random() < .3:           # the header is small, and a flip there is the most dangerous
            bad = bytearray(data)
            bad[(at := rng.randrange(3000))] ^= 1 << rng.randrange(8)
            bad, kind = bytes(bad), f"header {at}"
        if bad == data:
            continue
        (folder / "x.safetensors").write_bytes(bad)
        try:
            load_model(folder / "x.safetensors")
            held = False
        except WeightsError as e:
            held = len(str(e).splitlines()) == 1
        tally.add(held, kind)


def flips(tally, folder, n):
    "All files that are read again: of a run, of a label set, of the package."
    flips_of_run, labels = n * 2 // 5, n // 5
    flips_of_a_run(tally, folder / "run", flips_of_run)
    flips_of_labels(tally, folder / "labels", labels)
    flips_of_weights(tally, folder / "weights", n - flips_of_run - labels)


def goes_on(tally, folder, name, work, again, whole, n):
    "A call to the disk fails, and all after it: one line and exit status 2; with room again the work comes to its end."
    names = counted(work, folder / "out", name)
    for k in chosen(range(1, len(names) + 1), n, seed=len(names)):
        shutil.rmtree(folder / "out", ignore_errors=True)
        if name == "pretrain":
            (folder / "out").mkdir()            # this command makes no folder
        error = random.Random(k).choice([errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])

        def child(k=k, error=error):
            with Disk(folder / "out", k, "error", error):
                return work()

        first, second = forked(child, folder), forked(again, folder)
        held = first.refused and second.status == 0 and whole()
        tally.add(held, (name, k, names[k - 1], os.strerror(error), first, second))


def full_disk(tally, folder, n):
    "Every call of train, label and supervised training fails once."
    fresh(folder)
    args, whole = [*RUN, *MATCH], folder / "whole"
    assert forked(lambda: train(*args, "--out", folder, "--name", "whole"), folder).status == 0
    new = [*args, "--out", folder / "out", "--name", "x"]

    def again():
        return train(*(["--resume", folder / "out/x"] if (folder / "out/x").exists() else new))

    goes_on(tally, folder, "train", lambda: train(*new), again, lambda: same_run(folder / "out/x", whole), n // 2)
    label = label_set(folder / "labels")[:-1]
    shards = {p.name: p.read_bytes() for p in (folder / "labels").iterdir()}

    def labels():
        return pretrain("label", *label, folder / "out/labels")

    def same():
        return all((folder / "out/labels" / name).read_bytes() == data for name, data in shards.items())

    goes_on(tally, folder, "label", labels, labels, same, n // 4)
    out = folder / "out/net.safetensors"

    out.parent.mkdir(exist_ok=True)

    def fit():
        return pretrain("train", "--labels", folder / "labels", "--out", out, *SUPERVISED)

    goes_on(tally, folder, "pretrain", fit, fit, out.exists, n // 4)


def missing_and_read_only(tally, folder, n):
    "A folder that goes away during a run, and one that nobody may write to."
    fresh(folder)
    for k in range(n):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        pid = begin(lambda: train(*RUN, "--trainer.steps", "100000", "--out", folder / "runs", "--name", "x"),
                    folder / ".gone")
        begun = time.monotonic()
        while not (folder / "runs/x/metrics.jsonl").exists() and time.monotonic() < begun + 60:
            time.sleep(.02)
        time.sleep(.1 * k)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        found = end(pid, folder / ".gone", begun)
        tally.add(found.refused, ("folder gone", found))
    for work in (lambda: train(*RUN, "--out", "/proc/none", "--name", "x"),
                 lambda: pretrain("label", "--out", "/proc/none", "--positions", "10")):
        found = forked(work, folder)
        tally.add(found.refused, ("read-only", found))


def full(tally, folder, n):
    "Disk full, folder gone, read-only."
    full_disk(tally, folder / "full", n)
    missing_and_read_only(tally, folder / "gone", max(1, n // 30))
