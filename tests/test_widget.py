"A game at the board and a group of siblings, without a browser: events, rules, one line for what cannot be."
import builtins

import chess
import pytest
import torch

from grpo_chess import load, play_board, view_group
from grpo_chess import widget as w
from grpo_chess.board import move_to_action
from grpo_chess.loss import group_advantage
from grpo_chess.model import Policy
from grpo_chess.players import ArenaError
from grpo_chess.reward import Judge, RewardConfig, step_rewards
from grpo_chess.sampler import SamplerConfig, rollout
from grpo_chess.widget import Table, group_record, handle, heat, new_game, siblings_here, still_group, thoughts, view

TINY = load("tiny")

def seat(**settings):
    table = Table(TINY, **settings)
    new_game(table, settings.get("human", chess.WHITE))
    return table

def do(table, kind, **values): handle(table, dict(kind=kind, **values))

def state(table):
    return table.board.fen(), list(table.board.move_stack), table.temperature, table.human, table.flipped

BAD = [None, 7, "move", [], {}, dict(kind="move"), dict(kind="move", uci=None), dict(kind="move", uci="e2e5"),
       dict(kind="move", uci="e7e5"), dict(kind="move", uci="e3e4"), dict(kind="move", uci="0000"), dict(kind="castle"),
       dict(kind="move", uci="e2e4"*1000), dict(kind="move", uci=["e2e4"]), dict(kind="undo"), dict(kind=["undo"]),
       dict(kind="temperature"), dict(kind="temperature", value="hot"), dict(kind="temperature", value=-1),
       dict(kind="temperature", value=float("nan")), dict(kind="temperature", value=True),
       dict(kind="temperature", value=1e9)]

@pytest.mark.parametrize("event", BAD, ids=lambda e: str(e)[:40])
def test_what_cannot_be_is_one_line_and_changes_nothing(event):
    table = seat()
    before = state(table)
    handle(table, event)
    assert state(table) == before and table.wrong
    assert table.message and "\n" not in table.message and len(table.message) < 120
    do(table, "move", uci="e2e4")
    assert len(table.board.move_stack) == 2 and not table.wrong

def test_a_policy_that_breaks_says_so():
    class Broken(torch.nn.Module):
        def forward(self, tokens, legal): raise RuntimeError("the weights\nare broken")
    table = Table(w.LoadedPolicy(Broken(), name="broken"), shown=False)
    do(table, "new", white=True)
    do(table, "move", uci="e2e4")
    assert table.wrong and table.message == "the weights are broken" and len(table.board.move_stack) == 1

def test_moves_are_drawn_at_the_temperature():
    "The share of the most likely answer is its probability; at 0 it is always played."
    table, counts = seat(temperature=.7), {}
    do(table, "move", uci="e2e4")
    answers = table.policy.at(.7).probabilities(after("e2e4"))
    for game in range(150):
        table.games = game
        do(table, "undo")
        do(table, "move", uci="e2e4")
        counts[table.board.peek()] = counts.get(table.board.peek(), 0) + 1
    best, share = next(iter(answers.items()))
    assert counts[best]/150 == pytest.approx(share, abs=.13)
    do(table, "temperature", value=0)
    for game in range(5):
        table.games = game
        do(table, "undo")
        do(table, "move", uci="e2e4")
        assert table.board.peek() == best

def after(*moves):
    board = chess.Board()
    for move in moves: board.push_uci(move)
    return board

@pytest.mark.parametrize("tau", [.2, 1., 2.])
def test_thoughts_are_the_policy_at_that_temperature(tau):
    table = seat(temperature=tau)
    expected = TINY.at(tau).probabilities(chess.Board())
    for move, p in thoughts(table): assert p == pytest.approx(expected[move])

def test_view_is_enough_to_draw():
    table = seat(start=chess.Board("4k3/8/8/8/8/8/4q3/4K3 w - - 0 1"), human=chess.WHITE)
    seen = view(table)
    assert seen["check"] == "e1" and seen["legal"] == ["e1e2"] and seen["last"] == ""
    table.shown = False
    assert view(table)["thoughts"] == []
    do(table, "move", uci="e1e2")
    assert "Draw" in table.message and view(table)["legal"] == []

def test_undo_after_the_end_and_as_black():
    table = seat(start=chess.Board("7k/5Q2/6K1/8/8/8/8/8 w - - 0 1"))
    do(table, "move", uci="f7g7")
    assert table.message == "Checkmate, 1-0."
    do(table, "undo")
    assert not table.board.move_stack
    black = seat(human=chess.BLACK)
    do(black, "move", uci="a7a6")
    assert len(black.board.move_stack) == 3
    do(black, "undo")
    assert len(black.board.move_stack) == 1 and black.board.turn == chess.BLACK

def test_a_game_that_ends_with_the_policys_move_says_so():
    class Mates(torch.nn.Module):
        def forward(self, tokens, legal):
            mate = move_to_action(chess.Move.from_uci("b3b1"), chess.BLACK)
            return torch.where(legal == mate, 9., 0.).masked_fill(legal < 0, -torch.inf)
    table = Table(w.LoadedPolicy(Mates(), name="net"), 0., start=chess.Board("k7/8/8/8/8/1r6/r7/6K1 w - - 0 1"))
    do(table, "new", white=True)
    do(table, "move", uci="g1f1")
    assert table.message == "net played Rb1# (100 %). Checkmate, 0-1." and not view(table)["legal"]

SEEN = "d2d4 d7d5 g1f3 g8f6 f3g1 f6g8".split()

def shuffled(**settings):
    "A game in which the policy's most likely move would bring back a position."
    table = seat(temperature=0., human=chess.BLACK, **settings)
    table.board = after(*SEEN)
    return table

def test_the_policy_repeats_no_position_of_the_game_unless_told_to():
    table, plain = shuffled(), shuffled(repeats=True)
    for t in (table, plain): w.answer(t)
    assert plain.board.peek().uci() == "g1f3" != table.board.peek().uci()
    second = [*TINY.probabilities(after(*SEEN))][1]
    assert table.board.peek() == second and "(100 %)" in table.message

def test_thoughts_leave_out_what_would_repeat():
    table = shuffled()
    assert [m.uci() for m, _ in thoughts(table)] != ["g1f3"]
    do(table, "temperature", value=1)
    assert "g1f3" not in [m.uci() for m, _ in thoughts(table)]
    table.repeats = True
    assert thoughts(table)[0][0].uci() == "g1f3"

def test_a_board_can_be_told_to_repeat():
    assert not play_board("tiny").table.repeats and play_board("tiny", repeats=True).table.repeats

WEIGHTS = [("tiny", .5), (TINY, 0.), (Policy(TINY.model, .3), .3), (load("untrained:preset=tiny", 1.), 1.)]

@pytest.mark.parametrize("weights, temperature", WEIGHTS, ids=["name", "loaded", "policy", "untrained"])
def test_any_weights(weights, temperature):
    game = play_board(weights)
    assert game.do("move", uci="e2e4").startswith(f"{game.table.policy.name} played")
    assert game.table.temperature == temperature and play_board(weights, 1.5).table.temperature == 1.5
    assert "1. e4" in game.pgn() and '[White "you"]' in game.pgn()

def test_a_run_that_is_not_there():
    with pytest.raises(ArenaError, match="there is no player"): play_board("nobody")
    with pytest.raises(ValueError, match="is not a position"): play_board("tiny", start="no position")
    with pytest.raises(w.EventError, match="from 0 to 2"): heat(seat(), 3)

def test_without_anywidget_a_line_says_what_to_do(monkeypatch, capsys):
    real = builtins.__import__
    def without(name, *args, **kw):
        if name == "anywidget": raise ImportError("no anywidget")
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, "__import__", without)
    w.widget_class.cache_clear()
    try: game = play_board("tiny")
    finally: w.widget_class.cache_clear()
    assert "pip install anywidget" in capsys.readouterr().out and game.widget is None
    assert "played" in game.do("move", uci="e2e4")

# Groups

def a_group(plies=3, fen=chess.STARTING_FEN, group=4, learn="both"):
    cfg = SamplerConfig(boards=2, group=group, plies=plies, learn=learn)
    ro = rollout(TINY.at(1.), [chess.Board(fen)]*2, cfg, seed=1)
    reward = step_rewards(ro, Judge(RewardConfig(judge="material")))
    return ro, reward, group_advantage(reward, ro.train)

def test_the_record_is_the_rollout():
    ro, reward, adv = a_group()
    ratio = torch.rand(ro.train.shape)
    record = group_record(ro, reward, adv, ratio, board=1)
    for g, game in enumerate(record["games"]):
        assert game["ucis"] == [m.uci() for m in ro.moves(1, g)]
        for name, x in dict(reward=reward, advantage=adv, ratio=ratio).items():
            assert game[name] == pytest.approx(x[1, g].tolist(), abs=1e-5)
        for t in range(4): assert game["fens"][t] == ro.fens[ro.node[1, g, t]].split()[0]
    assert record["mean"] == pytest.approx(reward[1].mean(0).tolist(), abs=1e-5)
    for t in range(3):
        for g in range(4):
            same = [k for k in range(4) if ro.node[1, k, t] == ro.node[1, g, t]]
            assert siblings_here(record, g, t) == same

def test_plies_that_do_not_train_count_for_nothing():
    record = group_record(*a_group(learn="starter"))
    assert record["mean"][1] is None and not any(g["train"][1] for g in record["games"]) and still_group(record)

def test_games_that_end_early_have_a_picture():
    ro, reward, adv = a_group(4, "7k/8/6KQ/8/8/8/8/8 b - - 0 1")
    assert len(still_group(group_record(ro, reward, adv))) > 1000

def test_what_does_not_fit_is_said():
    ro, reward, adv = a_group()
    with pytest.raises(ValueError, match=r"reward has the shape \[2, 4, 2\], and the rollout \[2, 4, 3\]"):
        group_record(ro, reward[..., :2], adv)
    with pytest.raises(ValueError, match="there is no group 2"): group_record(ro, reward, adv, board=2)
    shown = view_group(ro, reward, adv)
    with pytest.raises(ValueError, match="siblings 0 to 3 and plies 0 to 3"): shown.go(0, 4)
    shown.go(3, 3)
    assert shown.widget is None or (shown.widget.sibling, shown.widget.ply) == (3, 3)
