"Fuzzed inputs of every kind that the package reads, and every number of every configuration."
import contextlib
import dataclasses
import io
import json
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

from .common import fresh, quiet

SECONDS, MEBIBYTES = 10, 1500        # that one input may take, and that all may add to this process
FEN = "r1bqkb1r/pppp1ppp/2n2n2/4p1N1/2B1P3/8/PPPP1PPP/RNBQK2R b KQkq - 5 4"
PGN = ('[Event "?"]\n[WhiteElo "2000"]\n[FEN "{fen}"]\n[SetUp "1"]\n[Result "*"]\n\n'
       "4... d5 5. exd5 {{a comment}} (5. O-O $1 -- 6. --) 5... Na5 6. Bb5+ *\n\n").format(fen=FEN)
ENGINE = (b"info depth 1 seldepth 1 multipv 1 score cp 31 nodes 20 pv e2e4\n"
          b"info depth 1 multipv 2 score mate 3 nodes 22 pv d2d4 d7d5\nbestmove e2e4 ponder e7e5\n")
WORDS = ["nan", "-inf", "9" * 400, "1e999", "-1", "0", "\x00", "\ufeff", "é" * 50, "../" * 30, "--", "0000", "e2e9",
         "[",
         "{" * 3000, "(" * 3000, "&a [*a]", "!!python/object/apply:os.system [x]", "<<: *a", '"', "'", "\n", "\r",
         "\t", "\u2028", "K" * 2000, "[Variant \"Atomic\"]", "[FEN \"x\"]", "%s%n", "$" * 500, ";",
         "18446744073709551616",
         "8/8/8/8/8/8/8/8 w - - 0 1", "1e400", "-0", "true", "null", "mate 0", "cp", "bestmove", "bestmove (none)"]
NUMBERS = ["0", "-1", "1e308", "-1e308", "nan", "-inf", "Infinity", "1e-320", "1e18", "9" * 400, "1,000", "null", '""']


def mutate(data, rng):
    "A text or bytes, damaged in one to four places: flipped, cut, doubled, with something strange put in for a number."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 30)]
        elif kind == 2:
            data[at:at] = rng.choice(WORDS).encode("utf-8", "surrogatepass")
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 200)] * rng.randint(1, 8)
        elif kind == 4:
            data[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 8))
        elif kind == 5 and (found := re.search(rb"-?\d+(\.\d+)?", data[at:])):
            data[at + found.start() : at + found.end()] = rng.choice(NUMBERS).encode()
        else:
            data = data[:at]
    return bytes(data)


def file(path, reader):
    "What reads data by way of a file of this name."
    def read(data):
        path.write_bytes(data)
        return reader(path)

    return read


def text(reader):
    "What reads data as text."
    return lambda data: reader(data.decode("utf-8", "replace"))


def converted(path, form="pgn"):
    "The labels that `convert` makes of a file of games."
    from grpo_chess.convert import READERS, ConvertConfig, as_labels, good_rows

    cfg = ConvertConfig(files=str(path), form=form, tolerate=1.)
    found = list(good_rows(READERS[form](path, cfg), 1., []))
    return as_labels(found) if found else None


def chess_readers(folder):
    "Positions, openings and games as text. What was read is used too: a position that is accepted can be played."
    from grpo_chess import load
    from grpo_chess.board import PositionError, encode
    from grpo_chess.labels import LabelError
    from grpo_chess.play import Engine, PlayConfig
    from grpo_chess.players import ArenaError, read_openings
    from grpo_chess.positions import read_positions

    def encoded(path):
        return encode(read_positions(path))

    def told(words):
        engine = Engine(PlayConfig(), lambda line: None)
        engine.policy, engine.prepared = policy, ("tiny", 0., False, 1, engine.chance)
        return [engine.handle(line) for line in (f"position {words}", "go")]

    fen, pgn, policy = FEN.encode(), PGN.encode(), load("tiny")
    return dict(
        fen=(fen, text(policy.move), (PositionError, ArenaError)),
        uci=(b"fen " + fen + b" moves d7d5 e4d5", text(told), ()),
        fens=(fen + b"\n", file(folder / "a.fen", encoded), PositionError),
        epd=(fen[:-4] + b' bm Nd5; hmvc 7; id "one";\n', file(folder / "a.epd", encoded), PositionError),
        pgn=(pgn, file(folder / "a.pgn", encoded), PositionError),
        openings=(b"1. e4 e5 2. Nf3 Nc6\nd2d4 d7d5\n", file(folder / "a.txt", read_openings), PositionError),
        convert=(pgn, file(folder / "b.pgn", converted), LabelError))


def settings_readers(folder):
    "Configurations, command lines and names of players."
    from grpo_chess.config import Config
    from grpo_chess.players import ArenaError, read_name
    from grpo_chess.settings import ConfigError, known_keys, parse_settings, read_yaml

    def command(line):
        words = line.split(" ")
        if {"-h", "--help", "--print_config"} & {w.partition("=")[0] for w in words}:
            return None
        return quiet(lambda: parse_settings(Config, words, "train"))

    known = known_keys(Config)
    yaml_text = b"seed: 3\nsampler: {boards: 4, plies: 8}\nloss:\n  entropy_coef: 0.1\nname: x\n"
    words = b"--sampler.boards 4 --loss.scale rms --minutes=3 --name x"
    return dict(
        yaml=(yaml_text, file(folder / "a.yaml", lambda p: read_yaml(p, known)), ConfigError),
        command=(words, text(command), (ConfigError, SystemExit)),
        player=(b"stockfish:skill=2,depth=3", text(read_name), ArenaError))


def line_readers(folder):
    "Files of one record a line: labels, logs, puzzles."
    from grpo_chess.files import FileError, open_json, trim_log
    from grpo_chess.measures import read_labels, read_puzzles
    from grpo_chess.players import ArenaError

    label = json.dumps(dict(fen="7k/8/8/8/8/8/r7/7K w - - 0 1", moves=dict(h1g1=-900))).encode()
    rows = b'{"step": 0, "loss": 0.5, "crc": "00000000"}\n{"step": 1}\n'
    puzzle = b"8,r6k/pp2r2p/4Rp1Q/3p4/8/1N1P2R1/PqP2bPP/7K b - - 0 24,f2g3 e6e7 b2b1 b3c1 b1c1 h6c1,1913,75,94\n"
    return dict(
        labels=(label * 2, file(folder / "a.jsonl", read_labels), ArenaError),
        metrics=(rows, file(folder / "m.jsonl", lambda p: trim_log(p, 2, 2)), FileError),
        puzzles=(puzzle, file(folder / "a.csv", read_puzzles), ArenaError),
        json=(b'{"engine": "x", "own": []}', open_json, (ValueError, RecursionError)))


def log_readers(folder):
    "Logs of this and other trainers, read by the doctor to the end of its report. (To fit a clip fraction is slow.)"
    from grpo_chess.doctor import as_markdown, diagnose
    from grpo_chess.files import row_text
    from grpo_chess.histories import HistoryError, read_history

    rows = [dict(step=8 * i, reward=.1 * i, entropy=1. - .05 * i, kl=.001 * i, grad_norm=.3, learning_rate=1e-6,
                 advantage_std=1. - .01 * i, response_length=300 - 9 * i, eval_score=.5, eval_games=20)
            for i in range(16)]
    console = [" - ".join(f"{name}:{x}" for name, x in row.items()) for row in rows]
    table = [",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))]
    logs = {"csv": "\n".join(table), "txt": "\n".join(console), "json": json.dumps(dict(log_history=rows)),
            "jsonl": "\n".join(map(json.dumps, rows)), "own.jsonl": "".join(map(row_text, rows))}

    def doctor(path):
        return as_markdown(diagnose(read_history(path)))

    return {f"doctor {end}": (log.encode(), file(folder / f"log.{end}", doctor), HistoryError)
            for end, log in logs.items()}


def engine_readers():
    "What an engine says: a score, the best moves, the move it plays."
    from grpo_chess.engine import Job, PositionError, _read_best, _read_moves, _read_score, _strict
    from grpo_chess.uci import EngineError, EngineFault

    def answer(read):
        def understand(data):
            job = Job([FEN.replace(" b ", " w ")], "depth 1", _strict(read), list, {})
            return job.understand(0, 1, b"\n" + data)

        return ENGINE, understand, (EngineFault, EngineError, PositionError)

    return dict(score=answer(_read_score), moves=answer(_read_moves), best=answer(_read_best))


def weights_readers(folder):
    "Weights: a network as small as can be, and the beginning of the package's."
    from safetensors.torch import save

    from grpo_chess.model import MODELS, WEIGHTS, ChessTransformer, WeightsError, load_model

    small = dict(width=8, layers=1, heads=1)
    state = ChessTransformer(dataclasses.replace(MODELS["tiny"], **small)).state_dict()
    saved = save(state, dict(config=json.dumps(dict(small, ffn_ratio=2., dropout=0.))))
    shipped = (WEIGHTS / "tiny.safetensors").read_bytes()[:60_000]
    return dict(
        safetensors=(saved, file(folder / "a.safetensors", load_model), WeightsError),
        shipped=(shipped, file(folder / "b.safetensors", load_model), WeightsError))


def label_readers(folder):
    "A set of labels and other people's games, as Parquet."
    from grpo_chess.labels import LabelError, read_manifest, read_shard

    shard, manifest, foreign = examples(folder)
    return dict(
        manifest=(manifest, file(folder / "manifest.json", lambda p: read_manifest(p.parent)), LabelError),
        shard=(shard, file(folder / "a.parquet", read_shard), LabelError),
        games=(foreign, file(folder / "b.parquet", lambda p: converted(p, "games")), LabelError))


def readers(folder):
    "Name -> example, what reads it, and the errors of one line that it may raise."
    return (chess_readers(folder) | settings_readers(folder) | line_readers(folder) | log_readers(folder)
            | engine_readers() | weights_readers(folder) | label_readers(folder))


def examples(folder):
    "A shard of labels, its manifest, and a Parquet file of other people's games."
    import chess
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from grpo_chess.board import legal_actions, tokens
    from grpo_chess.labels import make_labels, write_manifest, write_shard

    boards = [chess.Board(), chess.Board(FEN)]
    legal = [legal_actions(b) for b in boards]
    made = make_labels(tokens(boards), legal, [list(np.arange(len(x)) * 10) for x in legal])
    inner = fresh(folder / "set")
    write_shard(inner / "shard-00000.parquet", made, dict(seed=1))
    write_manifest(inner, dict(action_space=__import__("grpo_chess.labels").labels.ACTION_SPACE))
    pq.write_table(pa.table(dict(movetext=["1. e4 e5 *", "1. d4 -- *"], WhiteElo=[2000, None], BlackElo=[1, 2])),
                   folder / "games.parquet")
    out = [p.read_bytes() for p in (inner / "shard-00000.parquet", inner / "manifest.json", folder / "games.parquet")]
    shutil.rmtree(inner)
    return out


SLOW = dict(shard=.02, games=.02, safetensors=.3, shipped=.1, command=.02, convert=.5, yaml=.6)     # share of a number


class Hung(BaseException):
    "An input that took too long."


def one(read, data, errors):
    "What came of one input: '' if it was read or refused in a line, else what is wrong."
    try:
        read(data)
    except errors:
        return ""                       # the commands print such an error as one line
    except Hung:
        return "hung"
    except BaseException as e:
        import traceback

        return "".join(traceback.format_exception(e)[-3:])[-500:]
    return ""


def fuzz(tally, folder, n):
    "At least so many damaged inputs, shared by all readers."
    def hung(*args):
        raise Hung

    table, old = readers(folder), signal.signal(signal.SIGALRM, hung)
    weight = {name: SLOW.get(name, 1.) for name in table}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = set()
    for name, (example, read, errors) in table.items():
        rng, begun = random.Random(name), time.monotonic()
        count = round(n * weight[name] / sum(weight.values())) + 1
        for _ in range(count):
            data = mutate(example, rng)
            signal.alarm(SECONDS)
            with contextlib.redirect_stderr(io.StringIO()):
                wrong = one(read, data, errors)
            signal.alarm(0)
            if wrong and (name, wrong[-120:]) in seen:
                tally.made += 1
                continue
            seen.add((name, wrong[-120:]))
            tally.add(not wrong, (name, data[:150], wrong))
        tally.note(name, count)
        print(f"  {name}: {count:,} in {time.monotonic() - begun:.0f} s", flush=True)
    signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    tally.note("MiB that the process grew by", round(grown))
    tally.add(grown < MEBIBYTES, f"grew by {grown:.0f} MiB")


WRONG = ["nan", "inf", "-inf", "-1", "-1000000", "-1e308", "1e308", "9" * 19, "9" * 30, "1e400", "", "[]", "{}", "0x",
         "1e-320"]
MAY_BE_NEGATIVE = ("trainer.entropy_end", "ladder", "sprt.elo0", "sprt.elo1", "loss.entropy_coef")
MAY_BE_TINY = ("1e-320",)


def commands():
    "Name -> settings class, and its numbers."
    from grpo_chess.arena import ArenaConfig
    from grpo_chess.config import Config
    from grpo_chess.convert import ConvertConfig
    from grpo_chess.labels import LabelConfig
    from grpo_chess.pretrain import EvaluateConfig
    from grpo_chess.settings import flatten
    from grpo_chess.supervised import TrainConfig

    for cls in (Config, ArenaConfig, LabelConfig, ConvertConfig, TrainConfig, EvaluateConfig):
        values = flatten(dataclasses.asdict(cls()))
        yield cls, [k for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]


def numbers(tally, folder, n):
    "Every number of every command, as NaN, infinity, negative and huge: refused in one line before anything begins."
    from grpo_chess.settings import ConfigError, parse_settings

    for cls, keys in commands():
        for key in keys:
            for value in WRONG[:n]:
                negative = value in ("-1", "-1000000") and key in MAY_BE_NEGATIVE
                try:
                    parse_settings(cls, [f"--{key}={value}"], "x")
                    held = negative or value in MAY_BE_TINY
                except ConfigError as e:
                    held = len(str(e).splitlines()) == 1
                tally.add(held, (cls.__name__, key, value))


def poisoned(folder):
    "Weights with one NaN, one infinity, and one so large that nothing is left of the others."
    import torch
    from safetensors.torch import save

    from grpo_chess.model import WEIGHTS, read_tensors

    info, state = read_tensors(WEIGHTS / "tiny.safetensors")
    for k, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        for name in list(state)[k :: max(1, len(state) // 3)]:
            worse = {key: x.clone() for key, x in state.items()}
            worse[name].view(-1)[-1] = bad
            path = Path(folder) / f"{k}-{name}.safetensors"
            path.write_bytes(save(worse, info))
            yield path


def nan(tally, folder, n):
    "Weights that are not finite, in every command that takes weights: one line, exit 2, nothing measured or played."
    from .common import arena, forked, pretrain, train
    from .disk import label_set

    fresh(folder)
    label_set(folder / "labels")
    positions = [str(Path(__file__).resolve().parents[2] / "nbs/data/positions.jsonl")]
    done = 0
    for path in poisoned(folder):
        run = fresh(folder / "a-run")
        shutil.copy(path, run / "model.safetensors")
        tried = {
            "train --init": lambda p=path: train("--init", p, "--out", folder / "no", "--match.games", 2),
            "arena --a": lambda p=path: arena("--a", p, "--b", "random", "--games", 8, "--floor", "false"),
            "arena --a run": lambda p=run: arena("--a", p, "--b", "random", "--games", 8, "--floor", "false"),
            "arena --b": lambda p=path: arena("--a", "tiny", "--b", f"{p}:temperature=1", "--games", 8),
            "arena --regret": lambda p=path: arena("--a", p, "--games", 0, "--regret", *positions),
            "evaluate": lambda p=path: pretrain("evaluate", "--weights", p, "--games", 2),
            "pretrain train --init": lambda p=path: pretrain(
                "train", "--labels", folder / "labels", "--init", p, "--out", folder / "x.safetensors")}
        for what, work in tried.items():
            if done >= n:
                return
            done += 1
            found = forked(work, folder)
            left = (folder / "no").exists() or (folder / "x.safetensors").exists()
            tally.add(found.refused and not left and not found.out.strip(), (what, path.name, found))

