"The experiment of nbs/experiments/headline.py: its judge says what the labels say, its arms are what they are called."
import sys

import chess
import numpy as np
import pytest
import torch

from test_population import FOLDER, experiment
from grpo_chess.board import encode
from grpo_chess.labels import Labels
from grpo_chess.model import ChessTransformer
from grpo_chess.reward import win_probability


@pytest.fixture(scope="module")
def headline():
    sys.path.append(str(FOLDER))                                         # where a script finds its neighbours
    yield experiment("headline")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def labels():
    "Two positions, White to move; every move has a score of its own."
    fens = ("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1", "r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3")
    tokens, legal = encode([chess.Board(f) for f in fens])
    known = [row[row >= 0] for row in legal]
    offset = np.cumsum([0, *map(len, known)])
    scores = np.random.default_rng(0).permutation(offset[-1])*20 - 300
    return Labels(tokens, offset, np.concatenate(known).astype(np.int16), scores.astype(np.int16))


def test_the_reward_of_a_move_is_what_its_label_says(headline, labels, monkeypatch):
    monkeypatch.setattr(headline, "BOARDS", 2)
    judge = headline.Labelled(labels)
    boards = judge.starts(np.array([1, 0]))(0, 0, 2)                     # in the order that is asked for
    for board, place in zip(boards, (1, 0)):
        win = win_probability(labels.scores[labels.offset[place]:labels.offset[place+1]])
        before = judge.values([headline.position_key(board)])[0]
        assert before == pytest.approx(win.max(), abs=1e-6)
        for action, w in zip(labels.actions[labels.offset[place]:], win):
            board.push(headline.action_to_move(int(action), chess.WHITE))
            assert 1 - judge.values([headline.position_key(board)])[0] == pytest.approx(w, abs=1e-6)
            board.pop()
    with pytest.raises(KeyError): judge.values([chess.Board().fen()])


def test_only_another_temperature_or_dropout_makes_a_wrong_ratio(headline, labels, monkeypatch, tmp_path):
    for name, value in dict(BOARDS=2, STEPS=1, EVERY=1).items(): monkeypatch.setattr(headline, name, value)
    runs = headline.Runs.__new__(headline.Runs)
    runs.folder, runs.known, runs.new, runs.exam = tmp_path, labels, labels, labels
    shape = headline.replace(headline.SHAPE, dropout=.1)
    monkeypatch.setattr(runs, "start", lambda seen, seed: ChessTransformer(shape), raising=False)
    torch.manual_seed(0)
    for scored, dropout, bonus in headline.ARMS:
        runs.run(100_000, scored, dropout, bonus, 0, 3e-4)
    rows = [r for f in tmp_path.glob("*.json") for r in headline.json.loads(f.read_text()) if r["step"]]
    assert len(rows) == 5
    for r in rows: assert (r["ratio_error"] > 1e-4) == (r["loss_temperature"] == 1 or r["dropout"] == 1)
