import dataclasses
import inspect
import json
from pathlib import Path

import chess
import chess.pgn
import pytest
import torch
import warm
from games import HEAD, MATE1, MATE2, fake_engine, match

from grpo_chess.arena import PRESETS, Arena, ArenaConfig, for_json, main, parse, protocol_of, run
from grpo_chess.board import position_key
from grpo_chess.matches import JudgeConfig, fit_ladder
from grpo_chess.model import ChessTransformer, ModelConfig, Policy, save_model
from grpo_chess.players import file_openings, load_player_model, policy_player, random_openings
from grpo_chess.settings import ConfigError, known_keys
from grpo_chess.stats import MIN_GAMES, SprtConfig

TOP = Path(__file__).resolve().parent.parent
POSITIONS = TOP/"nbs/data/positions.jsonl"
NO_JUDGE = JudgeConfig(on=False)

def quiet(*lines, sep=""): "Say nothing."


# Settings

@pytest.mark.parametrize("name, opponent", [("record", "stockfish:skill=2,ms=50"), ("standin", "weak:level=2")])
def test_presets_are_the_records_protocol(name, opponent):
    cfg = parse(["--preset", name])
    assert (cfg.b, cfg.games, cfg.opening_plies, cfg.max_plies, cfg.temperature) == (opponent, 64, 6, 400, 0)
    assert (cfg.claims, cfg.judge.on, cfg.floor) == (True, False, True)
    assert parse([f"--preset={name}", "--games", "128"]).games == 128 and set(PRESETS) == {"record", "standin"}

def test_settings_from_a_file(tmp_path):
    (tmp_path/"x.yaml").write_text("games: 32\njudge: {depth: 2}\nsprt: {'on': true}\n")
    cfg = parse(["--config", str(tmp_path/"x.yaml"), "--judge.every", "1"])
    assert (cfg.games, cfg.judge.depth, cfg.judge.every, cfg.sprt.on) == (32, 2, 1, True)

@pytest.mark.parametrize("argv, says", [
    (["--gmaes", "64"], "did you mean 'games'"), (["--games", "14"], f"at least {MIN_GAMES}"),
    (["--games", "33"], "even"), (["--preset", "recrd"], "there is no preset"), (["--temperature", "-1"], "at least 0"),
    (["--ladder", "9"], "ladder = 9"), (["--accelerator", "tpu"], "accelerator"), (["--sprt.elo0", "50"], "sprt.elo0"),
    (["--judge.depth", "0"], "judge.depth"), (["--games", "0", "--pgn", "x.pgn"], "pgn needs games"),
    (["--config", "none.yaml"], "none.yaml"), (["--games"], "games"), (["--temperature", ".inf"], "finite")])
def test_bad_settings(argv, says):
    with pytest.raises(ConfigError) as e: parse(argv)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit): parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in [*known_keys(ArenaConfig), "preset"]: assert f"--{key}" in text, key
    for cls in (ArenaConfig, JudgeConfig, SprtConfig):
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.default_factory): continue
            assert any(f"\n    {f.name}: " in (inspect.getdoc(c) or "") for c in cls.mro()), f.name


# The command as a user meets it

def command(*args, **env):
    return warm.command("grpo_chess.arena", *args, env=warm.ENV | env)

@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    save_model(ChessTransformer(ModelConfig(width=16, layers=1, heads=2)), tmp_path/"net.safetensors")
    return str(tmp_path/"net.safetensors")

def test_the_whole_command(tmp_path, net):
    (tmp_path/"p.csv").write_text(HEAD + MATE1 + MATE2)
    (tmp_path/"labels.jsonl").write_text("".join(POSITIONS.open().readlines()[:9]))
    done = command("--a", net, "--b", "weak:level=0", "--games", 16, "--max_plies", 30, "--judge.depth", 1,
                   "--ladder", 0, "--puzzles", tmp_path/"p.csv", "--regret", tmp_path/"labels.jsonl",
                   "--pgn", tmp_path/"out.pgn", "--json", tmp_path/"out.json")
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path/"out.json").read_text())
    assert out.keys() == {"config", "engine", "protocol", "match", "floor", "ladder", "regret", "puzzles"}
    assert out["config"]["games"] == 16 and "Stockfish" in out["engine"]
    assert out["match"]["games"] == 16 and sum(out["match"]["pentanomial"]) == 8
    assert [(f["a"], f["games"]) for f in out["floor"]] == [("random mover", 16), ("untrained", 16)]
    with (tmp_path/"out.pgn").open() as f: games = list(iter(lambda: chess.pgn.read_game(f), None))
    assert len(games) == 16 and not any(g.errors for g in games) and games[0].headers["Black"] == "weak:level=0"
    for words in ("score", "floor under the same protocol", "random mover", "untrained", "on the ladder", "regret",
                  "puzzles", "normalized Elo"): assert words in done.stdout, words
    assert not list(tmp_path.glob("*.tmp"))

def test_same_command_same_result(tmp_path, net):
    outs = []
    for k in range(2):
        cfg = ArenaConfig(a=net, b="weak:level=1", games=16, max_plies=20, temperature=1., floor=False,
                          judge=JudgeConfig(depth=1), pgn=str(tmp_path/f"{k}.pgn"))
        run(cfg, say=quiet)
        outs.append((tmp_path/f"{k}.pgn").read_text())
    assert outs[0] == outs[1]

def test_a_network_against_itself_is_half(net):
    cfg = ArenaConfig(a=net, b=net, games=16, max_plies=30, floor=False, judge=NO_JUDGE)
    r = run(cfg, say=quiet)["match"]
    assert r.score == .5 and set(r.pairs) == {.5}       # both play their most likely move: the colours cancel
    warm = run(dataclasses.replace(cfg, temperature=1.), say=quiet)["match"]
    assert any(x.board.move_stack != y.board.move_stack for x, y in zip(warm.games[::2], warm.games[1::2]))

def test_players_of_a_command_have_seeds_of_their_own(net):
    "At temperature 1: both sides differ, another seed differs, and a seed in the name is that seed."
    asked = [chess.Board()]*60, list(range(60)), 0
    def first_moves(side, named="", **kw):
        cfg = ArenaConfig(a=net + named, b=net, games=16, temperature=1., judge=NO_JUDGE, **kw)
        return getattr(Arena(cfg), side)(*asked)
    a = first_moves("a")
    assert a == first_moves("a") == policy_player(Policy(load_player_model(net)), seed=0)(*asked)
    assert a != first_moves("b") and a != first_moves("a", seed=1)
    assert first_moves("a", ":seed=9") == first_moves("a", ":seed=9", seed=1)
    assert len(set(first_moves("a", ":temperature=0"))) == 1 < len(set(a))

def test_openings_and_judge_of_a_command_are_those_that_it_names(net, monkeypatch, tmp_path):
    "Openings of its seed and length, and of its file in its seed's order; the judge's depth reaches the engine."
    def keys(boards): return [position_key(b) for b in boards]
    cfg = ArenaConfig(a=net, b="random", games=16, seed=5, opening_plies=3, judge=NO_JUDGE)
    assert keys(Arena(cfg).openings) == keys(random_openings(8, 5, 3)) != keys(random_openings(8, 0, 3))
    book = tmp_path/"book.txt"
    book.write_text("\n".join(" ".join(m.uci() for m in b.move_stack) for b in random_openings(12)))
    from_book = Arena(dataclasses.replace(cfg, openings=str(book))).openings
    assert keys(from_book) == keys(file_openings(book, 8, 5)) != keys(file_openings(book, 8, 0))
    depths = set()
    class Pool:
        def __init__(self, cfg): pass
        def close(self): pass
        def evaluate(self, fens, depth=None):
            depths.add(depth)
            return [0]*len(fens)
    monkeypatch.setattr("grpo_chess.arena.EnginePool", Pool)
    run(dataclasses.replace(cfg, judge=JudgeConfig(depth=3), max_plies=8, floor=False), say=quiet)
    assert depths == {3}

def test_floor_knows_the_shape_and_the_protocol(net):
    arena = Arena(ArenaConfig(a="random", b=net, games=16, judge=NO_JUDGE))
    assert arena.model.cfg.width == 16 and arena.pool is None
    assert arena.policy("untrained").model.cfg.width == 16 and protocol_of(arena)["claims"] is False
    for on in (True, False):
        arena = Arena(ArenaConfig(a=net, b="weak:level=0", games=16, judge=JudgeConfig(on=on)))
        assert arena.pool and protocol_of(arena)["judge"] is (arena.pool if on else None)
        arena.pool.close()

def test_sprt_by_command(net, capsys):
    found = run(ArenaConfig(a=net, b="weak:level=3", games=200, max_plies=60, judge=JudgeConfig(depth=1), floor=False,
                            sprt=SprtConfig(on=True, elo0=-100, elo1=0, batch=16)))
    assert found["sprt"].accepted == -100 and len(found["match"].games) < 200
    assert "Elo -100 accepted" in capsys.readouterr().out and for_json(found)["sprt"]["accepted"] == -100

@pytest.mark.parametrize("args, says", [
    (["--a", "none.safetensors"], "no weights at none.safetensors"), (["--a", "tinny"], "there is no player 'tinny'"),
    (["--games", "8"], "at least 16"), (["--a", "NET:preset=tiny"], "another shape"),
    (["--openings", "book.txt"], "book.txt, line 2: 'e4e5' cannot be played"),
    (["--openings", "short.txt"], "holds 1 different openings"), (["--puzzles", "bad.csv"], "bad.csv, line 2"),
    (["--regret", "bad.csv"], "bad.csv, line 2: it is not JSON"), (["--games", "0"], "nothing to measure"),
    (["--json", "no/folder/x.json"], "there is no folder"), (["--pgn", "."], "it is a folder"),
    (["--a", "tiny:preset=record"], "another shape"), (["--a", "tiny:temperature=-1"], "is a number from 0"),
    (["--opening_plies", "0"], "fewer than 8 openings"), (["--b", "stockfish:depth=0"], "one limit")])
def test_bad_input_is_one_line(tmp_path, net, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    for name, text in {"book.txt": "e2e4\ne2e4 e4e5\n", "short.txt": "e2e4\n", "bad.csv": "PuzzleId\nx,y\n"}.items():
        Path(name).write_text(text)
    small = ["--games", "16", "--floor", "false", "--judge.on", "false", "--max_plies", "4", "--b", "random"]
    given = [a.replace("NET", net) for a in args]
    status = main([*([] if "--a" in args else ["--a", net]), *small, *given])
    err = capsys.readouterr().err
    assert status == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1

def test_no_engine_no_result(tmp_path, net):
    for path in ("/no/such/stockfish", fake_engine(tmp_path/"fake", "exit 1")):
        done = command("--a", net, "--b", "weak:level=0", "--games", 16, "--max_plies", 6, "--engine.retries", 0,
                       "--engine.timeout", 2, "--json", tmp_path/"x.json", "--pgn", tmp_path/"x.pgn",
                       STOCKFISH_PATH=path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert "score" not in done.stdout and not list(tmp_path.glob("x.*"))

def test_results_without_end_become_null():
    out = for_json(dict(match=match(*[0]*16), ladder=fit_ladder({0: match(*[0]*16)})))
    assert out["match"]["elo"] is None and out["ladder"]["elo"] is None and json.dumps(out, allow_nan=False)
