"A model, a reward and start positions of one's own, and the front door."
import copy
import math
import os
import signal
import subprocess
import sys

import chess
import numpy as np
import pytest
import torch
from runs import ENV, TOP
from safetensors.torch import load_file
from torch import nn

import grpo_chess
from grpo_chess import load, match, preset, run, train
from grpo_chess.board import PositionError, encode
from grpo_chess.engine import EngineError, find_engine
from grpo_chess.front import named_player
from grpo_chess.model import MODELS, ChessTransformer, Policy, load_model, save_model
from grpo_chess.own import OwnJudge, check_model, check_positions, check_reward
from grpo_chess.players import ArenaError
from grpo_chess.reward import Judge, RewardConfig, material, win_probability
from grpo_chess.settings import ConfigError
from grpo_chess.train import RunError

pytestmark = pytest.mark.usefixtures("quick_pictures")

MATE_IN_ONE = "6k1/5ppp/8/8/8/8/8/R5K1 w - - 0 1"

class Table(nn.Module):
    "A score for every action, whatever the position."
    def __init__(self):
        super().__init__()
        self.scores = nn.Embedding(1968, 1)
    def forward(self, tokens, legal):
        return self.scores(legal.long().clamp_min(0))[..., 0].masked_fill(legal < 0, -torch.inf)

def by_material(boards): return win_probability(material([b.fen() for b in boards]))

def small(out, name="own", **changes):
    settings = dict(
        out=str(out), name=name, minutes=0, accelerator="cpu", match=dict(games=0, adjudicate=False),
        positions=dict(window_cp=0), sampler=dict(boards=4, group=4, plies=2),
        trainer=dict(steps=3, minibatches=1, precision="32-true", checkpoint_every=2))
    return preset("scratch", **settings | changes)

# A reward

def test_material_of_ones_own_is_material():
    "The same run as with the judge that counts material: values of positions and of moves."
    mine, theirs = OwnJudge(by_material), Judge(RewardConfig(judge="material"))
    fens = [chess.STARTING_FEN, MATE_IN_ONE, "k7/8/8/1Q6/8/8/8/K7 w - - 0 1"]         # Qb6 is stalemate
    boards = [chess.Board(fen) for fen in fens]
    assert mine.values(fens).tolist() == theirs.values(fens).tolist() and mine.asked == theirs.asked == 3
    legal = torch.as_tensor(encode(boards)[1])
    assert torch.allclose(mine.of_moves(fens, legal), theirs.of_moves(fens, legal), atol=1e-6)
    assert mine.of_moves(fens, legal)[1].max() == 1 and .5 in mine.of_moves(fens, legal)[2].tolist()

@pytest.mark.parametrize("moves", ["sampled", "all"])
def test_a_run_with_material_of_ones_own_is_the_run_with_material(moves, tmp_path):
    loss = dict(moves=moves)
    mine = run(small(tmp_path, "mine", loss=loss), quiet=True, reward=by_material)
    theirs = run(small(tmp_path, "theirs", loss=loss, reward=dict(judge="material")), quiet=True)
    assert [r["loss"] for r in mine.rows] == pytest.approx([r["loss"] for r in theirs.rows], abs=1e-4)
    assert "its own function by_material" in mine.text

def remembers():
    seen = []
    def value(boards):
        seen.append(boards)
        return [min(1., .1*len(seen))]*len(boards)
    return value

@pytest.mark.parametrize("value, says", [
    (lambda boards: [.5], "not one for each"), (lambda boards: [[.5]]*len(boards), "not one for each"),
    (lambda boards: [2.]*len(boards), "no win probability"), (lambda boards: [-.1]*len(boards), "no win probability"),
    (lambda boards: [math.nan]*len(boards), "no win probability"), (lambda boards: "x", "no numbers"),
    (lambda boards: None, "not one for each"), (remembers(), "function of the position"), (3, "no function")])
def test_a_reward_that_does_not_fit_is_one_line_and_no_folder(value, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as e: run(small(tmp_path), quiet=True, reward=value)
    assert len(str(e.value).splitlines()) == 1 and not [*tmp_path.iterdir()]

def test_a_reward_that_fails_later_stops_the_run_with_a_report(tmp_path):
    def value(boards): return [.5]*len(boards) if len(boards) < 3 else [math.nan]*len(boards)
    with pytest.raises(ConfigError, match="no win probability"): run(small(tmp_path), quiet=True, reward=value)
    assert "Failed after 0 of 3 steps" in (tmp_path/"own/report.md").read_text()

# A model

def test_a_model_of_ones_own_learns_is_kept_and_is_resumed(tmp_path):
    torch.manual_seed(0)
    net, begin = Table(), {}
    begin = {k: v.clone() for k, v in net.state_dict().items()}
    cfg = small(tmp_path, loss=dict(entropy_coef=.3), match=dict(games=16, max_plies=4, adjudicate=False))
    result = run(cfg, quiet=True, model=net, reward=by_material)
    kept, start = (load_file(tmp_path/f"own/{name}.safetensors") for name in ("model", "start"))
    assert torch.equal(start["scores.weight"], begin["scores.weight"])
    assert torch.equal(kept["scores.weight"], net.state_dict()["scores.weight"])
    assert not torch.equal(kept["scores.weight"], begin["scores.weight"]) and result.model is not None
    assert {m.names for m in result.matches.values()} == {("new", "old")} and len(result.matches) == 2
    assert "the network that the run was given" in result.text and max(r["ratio_error"] for r in result.rows) < 1e-5
    again = run(resume=tmp_path/"own", quiet=True, model=Table(), reward=by_material)    # whatever it is given
    assert torch.equal(again.model.state_dict()["scores.weight"], kept["scores.weight"])
    more = dict(model=Table(), reward=by_material, positions=[chess.Board()])
    for other in (dict(model=Table()), dict(reward=by_material), {}, more):
        with pytest.raises(RunError, match="model, reward of its caller's own"):
            run(resume=tmp_path/"own", quiet=True, **other)

def test_a_resumed_run_of_ones_own_equals_the_one_that_was_never_stopped(tmp_path, monkeypatch):
    own, net = dict(reward=by_material, positions=[chess.STARTING_FEN]), Table()
    whole = run(small(tmp_path, "whole"), quiet=True, model=copy.deepcopy(net), **own)
    class Interrupted(train.Trainer):
        def step(self):
            if self.done == 1: signal.raise_signal(signal.SIGINT)
            return super().step()
    with monkeypatch.context() as m:
        m.setattr(train, "Trainer", Interrupted)
        assert run(small(tmp_path, "parts"), quiet=True, model=copy.deepcopy(net), **own).status == 130
    again = run(resume=tmp_path/"parts", quiet=True, model=Table(), **own)
    assert [r["loss"] for r in again.rows] == [r["loss"] for r in whole.rows] and len(again.rows) == 3
    assert torch.equal(again.model.scores.weight, whole.model.scores.weight)

class Wrong(Table):
    def __init__(self, how):
        super().__init__()
        self.how = how
    def forward(self, tokens, legal):
        return self.how(super().forward(tokens, legal))

def refuse(scores): raise RuntimeError("two\nlines")

@pytest.mark.parametrize("model, says", [
    (Wrong(lambda s: s.clamp_min(-9.)), "masked_fill"), (Wrong(lambda s: s[:, :3]), r"returned \[2, 3\]"),
    (Wrong(lambda s: s*math.nan), "NaN"), (Wrong(lambda s: (s, s)), "returned tuple"),
    (Wrong(refuse), "raised RuntimeError"),
    (nn.Identity(), "nothing that trains"), (Table().requires_grad_(False), "nothing that trains"),
    ("tiny", "no torch.nn.Module"), (nn.Linear(3, 3), "raised TypeError")])
def test_a_model_that_does_not_fit_is_one_line_and_no_folder(model, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as e: run(small(tmp_path), quiet=True, model=model)
    assert len(str(e.value).splitlines()) == 1 and not [*tmp_path.iterdir()]

@pytest.mark.parametrize("setting, says", [
    (dict(freeze=1), "trainer.freeze"), (dict(head_lr=.1), "head_lr"), (dict(muon_lr=.1), "muon_lr")])
def test_settings_that_a_model_of_ones_own_cannot_have(setting, says, tmp_path):
    cfg = small(tmp_path, trainer=setting | dict(steps=1, minibatches=1))
    with pytest.raises(ConfigError, match=says): run(cfg, quiet=True, model=Table())

def test_the_packages_own_model_passes():
    check_model(ChessTransformer(MODELS["tiny"]))

# Positions

def test_positions_of_ones_own_are_where_the_games_begin(tmp_path):
    fens = [MATE_IN_ONE, "k7/8/8/8/8/8/8/KQ6 w - - 0 1"]
    seen = set()
    def value(boards):
        seen.update(b.fen() for b in boards)
        return [.5]*len(boards)
    run(small(tmp_path), quiet=True, positions=fens, reward=value)
    assert set(fens) < seen
    games = seen - {chess.STARTING_FEN}                              # from the check of the reward
    assert games and all(chess.Board(fen).occupied.bit_count() <= 6 for fen in games)

def test_a_list_is_drawn_from_by_number():
    boards = [chess.Board(MATE_IN_ONE), chess.Board()]
    starts = check_positions(boards, seed=3)
    assert [b.fen() for b in starts(1, 0, 8)] == [b.fen() for b in [*starts(1, 0, 3), *starts(1, 3, 5)]]
    assert {b.fen() for b in starts(1, 0, 20)} == {b.fen() for b in boards}
    assert [b.fen() for b in starts(1, 0, 20)] != [b.fen() for b in check_positions(boards, seed=4)(1, 0, 20)]
    for board in starts(1, 0, 20): board.clear()
    assert boards[0].fen() == MATE_IN_ONE                                      # each game has its own copy

@pytest.mark.parametrize("positions, says", [
    (["8/8/8/8/8/8/8/K1k5 w - - 0 1"], "the game is over"), ([], "empty"), ("games.pgn", "positions.file"),
    (["no position"], "no position"), ([3], "not a text"), (lambda step, first, n: [], "0 boards for step 0"),
    (lambda step, first, n: [chess.Board("8/8/8/8/8/8/8/K1k5 w - - 0 1")]*n, "the game is over")])
def test_positions_that_do_not_fit_are_one_line_and_no_folder(positions, says, tmp_path):
    with pytest.raises((ConfigError, PositionError), match=says) as e:
        run(small(tmp_path, reward=dict(judge="material")), quiet=True, positions=positions)
    assert len(str(e.value).splitlines()) == 1 and not [*tmp_path.iterdir()]

def test_a_run_of_ones_own_needs_no_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("STOCKFISH_PATH", "/nowhere")
    own = dict(reward=by_material, positions=[chess.STARTING_FEN])
    cfg = small(tmp_path, positions=dict(window_cp=200), reward=dict(judge="engine"))
    assert len(run(cfg, quiet=True, **own).rows) == 3
    with pytest.raises(EngineError): run(small(tmp_path, "b", reward=dict(judge="engine")), quiet=True)

# The front door

def test_the_front_door_is_light_and_names_what_it_has():
    code = ("import sys, os\nimport grpo_chess\nassert 'torch' not in sys.modules and 'chess' not in sys.modules\n"
            "print(os.environ['GOMP_SPINCOUNT'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'],\n"
            "      [n for n in dir(grpo_chess) if not n.startswith('_')])\n"
            "from grpo_chess import preset, run, load, match\n")
    env = {k: v for k, v in ENV.items() if not k.startswith(("GOMP_", "ONEDNN_"))}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.startswith("1000 256 ") and all(f"'{n}'" in said for n in ("preset", "run", "load", "match"))
    env |= dict(GOMP_SPINCOUNT="7", ONEDNN_PRIMITIVE_CACHE_CAPACITY="99")     # set by hand
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.startswith("7 99 ")
    with pytest.raises(AttributeError, match="front door has preset"): grpo_chess.trian

def test_the_environment_that_make_builds_sets_it_before_torch_is_loaded(tmp_path):
    "What .ci/setup writes, read by a fresh Python that imports torch first."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path/"v"], check=True)
    threads = (TOP/".ci/setup").read_text()
    threads = threads[threads.index("threads() {"):]
    script = f"py={tmp_path}/v/bin/python\n{threads[:threads.index(chr(10) + '}') + 2]}\nthreads"
    subprocess.run(["bash", "-c", script], check=True)
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    asks = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    out = subprocess.run([tmp_path/"v/bin/python", "-c", asks], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1000"

def test_a_loaded_policy_moves_and_says_what_it_thinks():
    policy = load("tiny")
    assert isinstance(policy, Policy) and policy.greedy and policy.move(MATE_IN_ONE) == chess.Move.from_uci("a1a8")
    board = chess.Board()
    probs = policy.probabilities(board)
    assert set(probs) == set(board.legal_moves) and sum(probs.values()) == pytest.approx(1, abs=1e-5)
    assert policy.move(board) == next(iter(probs)) == policy.move(board.fen()) and board == chess.Board()
    hot = load("tiny", temperature=1.)
    moves = [hot.move(board, seed) for seed in range(200)]
    assert moves == [hot.move(board, seed) for seed in range(200)]                          # a seed is a move
    favourite = next(iter(probs))
    assert abs(moves.count(favourite)/200 - probs[favourite]) < .12

def test_load_reads_files_and_folders_of_runs(tmp_path):
    net = ChessTransformer(MODELS["tiny"])
    (tmp_path/"run").mkdir()
    save_model(net, tmp_path/"run/model.safetensors")
    for name in (tmp_path/"run", str(tmp_path/"run/model.safetensors")):
        assert all(torch.equal(a, b) for a, b in zip(load(name).model.parameters(), net.parameters()))

@pytest.mark.parametrize("call, says", [
    (lambda: load("nobody"), "there is no player 'nobody'"), (lambda: load("random"), "no weights"),
    (lambda: load("tiny", -1), "temperature = -1"), (lambda: load("tiny", math.nan), "temperature = nan"),
    (lambda: load("none.safetensors"), "no weights at"),
    (lambda: load_model("tinny"), "no weights at tinny; with the package come imitator and tiny"),
    (lambda: load("tiny").move("x"), "not a position"),
    (lambda: load("tiny").move("7k/5Q2/6K1/8/8/8/8/8 b - - 0 1"), "the game is over"),
    (lambda: match("tiny", "random", games=7), "games = 7"), (lambda: match("tiny", "nobody", games=20), "nobody")])
def test_the_front_door_says_in_one_line_what_cannot_be(call, says):
    with pytest.raises((ArenaError, ValueError), match=says) as e: call()
    assert len(str(e.value).splitlines()) == 1

def test_a_match_is_the_arenas_match_and_shows_itself():
    from grpo_chess.matches import play_match
    from grpo_chess.players import policy_player, random_openings, random_player
    got = match(load("tiny"), "random", games=20, seed=3, max_plies=60)
    players = policy_player(load("tiny"), True, 6), random_player(7)
    same = play_match(*players, random_openings(10, 3), 60)
    assert [g.board.fen() for g in got.games] == [g.board.fen() for g in same.games]
    shown = got._repr_markdown_()
    assert f"| | 20 | {got.wins}, {got.draws}, {got.losses} | {got.score:.3f} [" in shown and "by the rules" in shown
    assert got.names == ("tiny", "random")

def test_players_of_a_match_are_names_policies_and_functions():
    def first_move(boards, games, ply): return [next(iter(b.legal_moves)) for b in boards]
    net = ChessTransformer(MODELS["tiny"]).eval()
    names = "untrained:seed=1", "tiny:temperature=1", "weak:level=1", "stockfish:depth=1"
    players = [(first_move, "first_move"), (Policy(net, 2.), "policy at T=2"), (load("tiny"), "tiny")]
    for player, name in [*players, *zip(names, names)]:
        assert match(player, "random", games=16, max_plies=6).names == (name, "random")

def test_a_named_player_is_the_arenas(monkeypatch):
    "Its errors too: with errs=1 each move is random, with errs=0 none. Another engine plays, and ends with the match."
    from grpo_chess import front
    from grpo_chess.players import OtherEngine
    closed = []
    class Spied(OtherEngine):
        def close(self):
            closed.append(self)
            super().close()
    monkeypatch.setattr("grpo_chess.players.OtherEngine", Spied)
    def moves(name):
        return [g.board.move_stack for g in front.match("random", name, games=16, max_plies=8, seed=2).games]
    assert moves("weak:level=1,errs=0") == moves("weak:level=1") != moves("weak:level=1,errs=1")
    assert not closed and moves(f"engine:path={find_engine()},depth=1") and len(closed) == 1

def test_an_adjudicated_match_asks_an_engine():
    result = match("tiny", "random", games=16, max_plies=40, adjudicate=True, engine=dict(processes=1))
    assert "adjudicated" in result.reasons and "adjudicated at depth 4" in result._repr_markdown_()

def test_a_value_is_seen_as_numbers_of_any_kind():
    for kind in (list, tuple, np.array, torch.tensor):
        assert check_reward(lambda boards, kind=kind: kind([.5]*len(boards)))

def test_a_loaded_policy_can_be_told_to_repeat_nothing():
    "By the moves of a board; a FEN has none. And a player that a match knows by its name."
    game = chess.Board()
    for word in "d2d4 d7d5 g1f3 g8f6 f3g1 f6g8".split(): game.push_uci(word)
    plain, told, repeat = load("tiny"), load("tiny", repeats=False), chess.Move.from_uci("g1f3")
    second = [*plain.probabilities(game)][1]
    assert plain.move(game) == told.move(game.fen()) == repeat and told.move(game) == second
    shares = told.probabilities(game)
    assert repeat not in shares and sum(shares.values()) == pytest.approx(1)
    assert shares[second] == pytest.approx(plain.probabilities(game)[second]/(1 - plain.probabilities(game)[repeat]))
    for player, move in (("tiny", repeat), ("tiny:repeats=0", second), (told, second)):
        assert named_player(player, None, 0, [])[1]([game], [0], 6) == [move]
