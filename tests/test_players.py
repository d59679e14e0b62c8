import math
import random
from collections import Counter

import chess
import numpy as np
import pytest
import torch

from grpo_chess.board import PositionError, encode, move_to_action, position_key, terminal
from grpo_chess.engine import MATE
from grpo_chess.matches import play_match
from grpo_chess.model import MODELS, ChessTransformer, ModelConfig, Policy, WeightsError, save_model
from grpo_chess.players import (
    KINDS, ArenaError, comes_back, draws, engine_player, engine_units, file_openings, game_text, describe_player,
    load_player_model,
    policy_player, random_openings, random_player, read_name, read_openings, skill_pick,
    split_names, weak_engine_player)

def test_openings():
    some = random_openings(40, seed=2, plies=6)
    assert len({position_key(b) for b in some}) == 40 and not any(map(terminal, some))
    assert {len(b.move_stack) for b in some} == {6} and all(b.root() == chess.Board() for b in some)
    assert [b.fen() for b in random_openings(15, seed=2, plies=6)] == [b.fen() for b in some[:15]]
    assert not {b.fen() for b in random_openings(40, seed=3, plies=6)} & {b.fen() for b in some}
    assert len(random_openings(20, plies=1)) == 20
    with pytest.raises(ValueError, match="fewer than 21 openings"): random_openings(21, plies=1)

def test_policy_player_is_the_policy(policy):
    "Frequencies of the first move against exact probabilities, at the policy's temperature and without its dropout."
    policy.model.train()
    board, n = chess.Board(), 4000
    played = policy_player(policy, seed=5)([board]*n, list(range(n)), 0)
    assert policy.model.training
    policy.model.eval()
    tokens, legal = map(torch.as_tensor, encode([board]))
    probs = policy.dist(tokens, legal).probs[0].detach().numpy()
    freq = np.array([sum(move_to_action(m, True) == a for m in played) for a in legal[0].tolist()])/n
    assert np.abs(freq - probs).max() < 4*math.sqrt(.25*probs.max()*4/n)
    best = policy_player(policy, greedy=True)([board, board], [0, 1], 0)
    assert best[0] == best[1] and move_to_action(best[0], True) == legal[0, probs.argmax()]

class Likes(torch.nn.Module):
    "White's moves that it likes, in this order, and all others less."
    def __init__(self, *moves):
        super().__init__()
        self.likes = [move_to_action(chess.Move.from_uci(m), True) for m in moves]

    def forward(self, tokens, legal):
        score = torch.zeros(legal.shape)
        for k, action in enumerate(self.likes): score[legal == action] = 9. - k
        return score.masked_fill(legal < 0, -torch.inf)

def test_a_policy_that_is_told_the_game_does_not_repeat_it():
    board = chess.Board("7k/8/8/8/8/8/8/R3K3 w - - 0 1")
    for move in ("a1a2", "h8h7", "a2a1", "h7h8"): board.push_uci(move)
    assert board.is_repetition(2)
    def play(likes, repeats):
        return policy_player(Policy(likes), greedy=True, repeats=repeats)([board], [0], 4)[0].uci()
    likes = Likes("a1a2", "a1a3")
    before = board.fen(), len(board.move_stack)
    assert play(likes, True) == "a1a2"                       # after which the position of the second ply is back
    assert play(likes, False) == "a1a3" and (board.fen(), len(board.move_stack)) == before
    assert play(Likes("a1a4", "a1a2"), False) == "a1a4"       # new: nothing changes

def test_where_every_move_repeats_the_likeliest_is_played():
    board = chess.Board("8/8/8/8/8/6k1/8/7K w - - 0 1")      # one legal move in the corner
    for move in ("h1g1", "g3h3", "g1h1", "h3g3"): board.push_uci(move)
    assert [m.uci() for m in board.legal_moves] == ["h1g1"]
    assert policy_player(Policy(Likes()), greedy=True, repeats=False)([board], [0], 4)[0].uci() == "h1g1"

def back_and_forth():
    "A rook went out and came back: after a1a2 a position of the game is there again."
    board = chess.Board("7k/8/8/8/8/8/8/R3K3 w - - 0 1")
    for move in ("a1a2", "h8h7", "a2a1", "h7h8"): board.push_uci(move)
    return board

def test_at_a_temperature_too_no_drawn_move_repeats():
    board, like = back_and_forth(), Policy(Likes("a1a2", "a1a3"), 5.)
    def often(repeats):
        moves = policy_player(like, seed=1, repeats=repeats)([board]*600, list(range(600)), 4)
        return {m: sum(x.uci() == m for x in moves)/600 for m in ("a1a2", "a1a3", "e1f1")}
    plain, told = often(True), often(False)
    assert plain["a1a2"] > .15 and told["a1a2"] == 0
    for move in ("a1a3", "e1f1"):                   # the others share what it leaves, in the same proportion
        assert abs(told[move] - plain[move]/(1 - plain["a1a2"])) < .07 and told[move] > plain[move]

def test_where_nothing_repeats_the_same_moves_are_drawn():
    boards = [chess.Board(), chess.Board("7k/8/8/8/8/8/8/R3K3 w - - 40 60")]
    for greedy in (True, False):
        plain, told = (policy_player(Policy(Likes(), 1.), greedy, 3, repeats=repeats)(boards*50, list(range(100)), 4)
                       for repeats in (True, False))
        assert plain == told

def test_what_comes_back_is_what_the_rules_count():
    "In a game that goes in circles: against python-chess, move by move."
    rng, board, back = random.Random(0), chess.Board("n1k5/8/8/8/8/8/8/N1K4R w - - 3 9"), 0
    for _ in range(60):
        moves = list(board.legal_moves)
        for move in moves:
            after = board.copy()
            after.push(move)
            assert comes_back(board, move) == after.is_repetition(2)
            back += after.is_repetition(2)
        board.push(rng.choice([m for m in moves if not board.is_zeroing(m)][:2]))
    assert back > 20

@pytest.mark.parametrize("text, says", [
    ("tiny:repeats=2", "repeats is 0 or 1"), ("tiny:repeats=no", "is not a number")])
def test_repeats_is_off_or_on(text, says):
    with pytest.raises(ArenaError, match=says): read_name(text)
    assert read_name("tiny:repeats=0")[1] == dict(repeats=0)

def test_draws_are_uniform_and_unrelated():
    u = np.stack([draws(s, range(500), p) for s in (0, 1) for p in range(8)])
    assert abs(u.mean() - .5) < .01 and abs(u.std() - 12**-.5) < .01 and u.min() >= 0 and u.max() < 1
    c = np.corrcoef(u) - np.eye(16)
    assert np.abs(c).max() < .2 and len(np.unique(u)) == u.size
    assert draws(-1, [3], 2) != draws(1, [3], 2)

def test_engine_player_errs_with_skill(pool):
    boards = random_openings(60, plies=10)
    best = engine_player(pool, depth=1)(boards, list(range(60)), 0)
    weak = engine_player(pool, depth=1, skill=0)(boards, list(range(60)), 0)
    assert all(m in b.legal_moves for m, b in zip(best + weak, boards*2))
    assert sum(a != b for a, b in zip(best, weak)) > 10

def test_game_text_is_the_game():
    "Position and moves lead to the same board with the same repetitions, from random games."
    for r in play_match(random_player(3), random_player(4), random_openings(6, plies=9), max_plies=60).games:
        board = r.board.copy()
        while board.move_stack:
            fen, _, moves = game_text(board).partition(" moves ")
            back = chess.Board(fen)
            for uci in moves.split(): back.push_uci(uci)
            assert back.epd() == board.epd() and back.halfmove_clock == board.halfmove_clock
            assert [back.is_repetition(n) for n in (2, 3)] == [board.is_repetition(n) for n in (2, 3)]
            board.pop()

def test_an_engine_that_is_winning_does_not_repeat(pool):
    "Its best move would bring a position for the third time: without the game it plays it, with the game another one."
    def back(m): return chess.Move(m.to_square, m.from_square)
    now = chess.Board("8/8/3k4/8/8/1R6/1Q6/K7 w - - 0 1")
    best = engine_player(pool, depth=4)([now], [0], 0)[0]
    after = now.copy(stack=False)
    after.push(best)
    for reply in after.legal_moves:
        game = chess.Board(after.fen())
        for move in [reply, back(best), back(reply), best, reply, back(best), back(reply)]:
            if not game.is_legal(move): break
            game.push(move)
        else: break
    assert game.epd() == now.epd() and game.is_repetition(2) and not game.is_repetition(3)
    assert game_text(game).count("moves") == 1 and engine_player(pool, depth=4)([game], [0], 0)[0] != best
    assert weak_engine_player(pool, 3)([game], [0], 0)[0] != best

@pytest.mark.parametrize("limits", [dict(depth=0), dict(depth=2, nodes=5), dict(ms=0), dict(nodes=-1)])
def test_engine_limits(pool, limits):
    with pytest.raises(ArenaError, match="one limit"): engine_player(pool, **limits)

def test_engine_levels(pool):
    for level in (-1, 20):
        with pytest.raises(ArenaError, match="must be 0 to 19"): weak_engine_player(pool, level)
    with pytest.raises(ArenaError, match="must be 0 to 20"): engine_player(pool, skill=21)

def test_engine_plays_for_milliseconds(pool):
    boards = random_openings(3, plies=8)
    assert all(m in b.legal_moves for m, b in zip(engine_player(pool, ms=5, skill=2)(boards, [0, 1, 2], 0), boards))

def test_engine_units():
    assert [engine_units(c) for c in (0, 1, -1, 100, -100)] == [0, 5, -5, 362, -362]
    assert [engine_units(c) for c in (MATE - 1, MATE - 2)] == [MATE - 1, MATE - 3]
    assert [engine_units(c) for c in (1 - MATE, -MATE)] == [2 - MATE, -MATE]

def rule_of_skill(scores, level, r):
    "The published rule in whole numbers; r: four whole random numbers below the weakness. The last of equals wins."
    weakness, top = 120 - 2*level, scores[0]
    delta, best, played = min(top - scores[-1], 126), -10**9, None
    for i, s in enumerate(scores):
        push = (weakness*(top - s) + delta*r[i])//128
        if s + push >= best: best, played = s + push, i
    return played

def test_skill_pick_follows_the_rule():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        level, n = int(rng.integers(0, 20)), int(rng.integers(1, 7))
        some = rng.choice([*range(-400, 400, 20), MATE - 1, MATE - 2, 3 - MATE], n)
        codes = sorted((int(c) for c in some), reverse=True)
        u = rng.random(4)
        names = [f"move{k}" for k in range(n)]
        want = rule_of_skill([engine_units(c) for c in codes[:4]], level, [int(x*(120 - 2*level)) for x in u])
        assert skill_pick(dict(zip(names, codes)), level, u) == names[want]

def test_seeded_skill_is_the_engines_own(pool):
    "Frequencies over many positions against Stockfish's own skill 2: chi-square within six standard deviations."
    boards, n = random_openings(40, seed=3, plies=14), 40
    asked = [b for b in boards for _ in range(n)]
    players = engine_player(pool, skill=2), weak_engine_player(pool, 2)
    own, ours = (player(asked, list(range(len(asked))), 0) for player in players)
    chi2 = dof = 0
    for k in range(len(boards)):
        a, b = Counter(own[n*k:n*k + n]), Counter(ours[n*k:n*k + n])
        chi2 += sum((a[m] - b[m])**2/(a[m] + b[m]) for m in a | b)
        dof += len(a | b) - 1
    assert chi2 < dof + 6*math.sqrt(2*dof)

LINES = ["e2e4 e7e5 g1f3", "e2e4 c7c5 g1f3 d7d6 f1b5 b8d7 e1g1", "d2d4 d7d5"]
BOOK = {"a.txt": f"# a comment\n1. e4 e5 2. Nf3\n\n{LINES[1]} 1-0\n1.d4 d5\n",
        "a.pgn": """[Event "x"]

1. e4 e5 2. Nf3 *

[Event "y"]

1. e4 c5 2. Nf3 d6 3. Bb5+ Nd7 4. O-O *

1. d4 d5 *
"""}

@pytest.mark.parametrize("name", BOOK)
def test_books_of_lines(tmp_path, name):
    (tmp_path/name).write_text(BOOK[name])
    boards = read_openings(tmp_path/name)
    assert [" ".join(m.uci() for m in b.move_stack) for b in boards] == LINES

def test_books_of_positions(tmp_path):
    fens = [b.fen() for b in random_openings(5)]
    (tmp_path/"a.fen").write_text("\n".join([*fens, fens[0]]))
    assert [position_key(b) for b in read_openings(tmp_path/"a.fen")] == [position_key(chess.Board(f)) for f in fens]
    (tmp_path/"a.epd").write_text("\n".join(" ".join(f.split()[:4]) + ' id "x";' for f in fens))
    assert len(read_openings(tmp_path/"a.epd")) == 5

@pytest.mark.parametrize("name, text, says", [
    ("a.txt", "e2e4\ne2e4 e2e4\n", "a.txt, line 2: 'e2e4' cannot be played"),
    ("a.txt", "1. e4 Qh9\n", "a.txt, line 1: 'Qh9'"), ("a.fen", "8/8\n", "a.fen, line 1"),
    ("a.pgn", "1. e4 e5 2. Ke3 *\n", "a.pgn, line 1"), ("a.txt", "f3 e5 g4 Qh4#\n", "opening 1 is a finished game"),
    ("a.doc", "e4", "must end in"), ("none.txt", None, "there is no file")])
def test_bad_books(tmp_path, name, text, says):
    if text is not None: (tmp_path/name).write_text(text)
    with pytest.raises(PositionError) as e: read_openings(tmp_path/name)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_openings_of_a_file_in_a_seeds_order(tmp_path):
    (tmp_path/"a.txt").write_text("\n".join(" ".join(m.uci() for m in b.move_stack) for b in random_openings(12)))
    def pick(n, seed): return [position_key(b) for b in file_openings(tmp_path/"a.txt", n, seed)]
    assert pick(5, 1) == pick(12, 1)[:5] != pick(5, 2) and len(set(pick(12, 3))) == 12
    with pytest.raises(ArenaError, match="holds 12 different openings, and 13 are needed"): pick(13, 0)

def test_names():
    assert read_name("tiny") == ("tiny", {})
    assert read_name("stockfish:skill=2,ms=50") == ("stockfish", dict(skill=2, ms=50))
    assert read_name("a:b/x.safetensors:temperature=.5,seed=3") == ("a:b/x.safetensors", dict(temperature=.5, seed=3))
    for bad in ("stockfish:temperature=1", "weak:level=x", "tiny:preset=huge", "random:=", "tiny:warm=1"):
        with pytest.raises(ArenaError, match="player"): read_name(bad)

def test_several_names():
    assert split_names(" weak:level=1  tiny ") == ["weak:level=1", "tiny"] and split_names("") == []
    assert split_names(r"engine:path=C:\eng\sf.exe '' #1") == [r"engine:path=C:\eng\sf.exe", "#1"]
    quoted, = split_names("engine:path='/my engines/x',depth=1")
    assert read_name(quoted) == ("engine", dict(path="/my engines/x", depth=1))
    with pytest.raises(ArenaError, match="a quote begins and does not end"): split_names("engine:path='/my engines")

def test_names_in_words():
    "Every kind of player that a report may name; no folder of whoever ran it."
    words = {"weak:level=3,errs=0.15": "Stockfish at level 3 of its rule for weak play, 15% of its moves at random",
             "weak": "Stockfish at level 0 of its rule for weak play",
             "weak:errs=0.125": "Stockfish at level 0 of its rule for weak play, 12.5% of its moves at random",
             "stockfish:skill=2,depth=3": "Stockfish at skill level 2, search of depth 3",
             "engine:path=/home/me/gnuchessu,nodes=9,errs=0.5":
                 "gnuchessu, search of 9 nodes, 50% of its moves at random",
             "random": "random moves", "tiny:repeats=0": "tiny:repeats=0"}
    assert {name: describe_player(name) for name in words} == words
    assert {read_name(name)[0] for name in words} >= set(KINDS) - {"untrained"}

def test_models_by_name(tmp_path):
    torch.manual_seed(0)
    net = ChessTransformer(ModelConfig(width=16, layers=1, heads=2))
    (tmp_path/"run").mkdir()
    save_model(net, tmp_path/"run/model.safetensors")
    for name in (tmp_path/"run", tmp_path/"run/model.safetensors"): assert load_player_model(str(name)).cfg == net.cfg
    with pytest.raises(WeightsError, match="another shape"): load_player_model(f"{tmp_path}/run:preset=tiny")
    with pytest.raises(WeightsError, match="no weights at"): load_player_model(f"{tmp_path}/none.safetensors")
    with pytest.raises(ArenaError, match="no player 'tinny'"): load_player_model("tinny")
    assert load_player_model("untrained", net).cfg == net.cfg and load_player_model("random") is None
    assert load_player_model("untrained:preset=record").cfg == MODELS["record"]
    first, second, again = (load_player_model(f"untrained:seed={s}", net).head.source.weight for s in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)

@pytest.mark.parametrize("line", ["1. e4 -- 2. d4", "e2e4 0000", "e4 Z0", "e4 @@@@"])
def test_a_null_move_is_no_opening(tmp_path, line):
    "python-chess passes the turn, and an engine sees another position than the board."
    (tmp_path/"n.txt").write_text(line + "\n")
    with pytest.raises(PositionError, match="cannot be played"): read_openings(tmp_path/"n.txt")

@pytest.mark.parametrize("text", ["random", "weak:level=0", "weak:level=0,errs=0.25", "stockfish:depth=1"])
def test_a_player_without_weights_is_found_by_its_name(text, pool):
    "Errors are those of `erring_player`, with the seed of the name or of the caller."
    from grpo_chess.players import erring_player, other_player
    boards, games = random_openings(60, seed=4), list(range(60))
    sound = dict(random=random_player(7), stockfish=engine_player(pool, depth=1)).get(
        text.partition(":")[0], weak_engine_player(pool, 0, 7))
    if "errs" in text: sound = erring_player(sound, .25, 7)
    played = other_player(text, pool, [], 7)(boards, games, 3)
    assert played == sound(boards, games, 3)
    if text.startswith("weak"): assert other_player(text + ",seed=7", pool, [], 1)(boards, games, 3) == played

@pytest.mark.parametrize("text, says", [
    ("tiny", "no player without weights"), ("untrained", "no player without weights"), ("weak:level=2", "an engine"),
    ("stockfish:depth=1", "an engine"), ("engine:depth=1", "its path"), ("weak:errs=2", "share")])
def test_other_players_say_what_they_lack(text, says, pool):
    from grpo_chess.players import other_player
    with pytest.raises(ArenaError, match=says): other_player(text, pool if "errs" in text else None, [])
