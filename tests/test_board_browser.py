"""The board in a real browser: moves by click and by drag, the answer, arrows, temperature, undo, flip, a new game,
promotion, and a group of siblings; what is compared is what stands on the screen."""

import os
import re
import time

import chess
import pytest
from browser import BADGE, MISSING, TOP, Lab

pytest.importorskip("anywidget", reason="no anywidget here: pip install anywidget")
pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING),
              pytest.mark.skipif(not os.environ.get("ALL_PAGES"), reason="make test-browser plays on the board"),
              pytest.mark.xdist_group("browser")]
PAGE = "nbs/12_widget.ipynb"

SEEN = """
const root = arguments[0], text = (s) => root.querySelector(s)?.innerText ?? "";
const men = {};
root.querySelectorAll("[data-at]").forEach(n => men[n.dataset.at] = n.dataset.piece);
return {men, arrows: [...root.querySelectorAll("[data-arrow]")].map(n => n.dataset.arrow),
        message: text(".gc-message"), wrong: !!root.querySelector(".gc-wrong"), moves: text(".gc-moves"),
        bars: [...root.querySelectorAll(".gc-thought")].map(n => n.innerText.split("\\n").join(" ")),
        targets: [...root.querySelectorAll("[data-target]")].map(n => n.dataset.target),
        where: text(".gc-where"), rows: [...root.querySelectorAll(".gc-table tbody tr")].map(
          n => [...n.cells].map(c => c.innerText)), now: root.querySelector(".gc-table tr.gc-now")?.dataset.game,
        mean: [...root.querySelectorAll(".gc-table tfoot td")].map(c => c.innerText)};
"""


AGAIN = """
const done = arguments[arguments.length - 1];
window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => done('ran'), (e) => done('failed: ' + e));
"""


@pytest.fixture(scope="module")
def lab():
    """The page, run twice: while a kernel is new, ipywidgets asks it for the widgets that it has, and on a busy machine
    a widget that is made meanwhile is made twice in the browser; the one that is seen then hears nothing more."""
    with Lab() as lab:
        wrong = lab.run(PAGE)
        assert not wrong, f"{PAGE} in a browser: {wrong}"
        assert lab.browser.execute_async_script(AGAIN) == "ran"
        time.sleep(1.0)
        yield lab


class Screen:
    "One board on the page, as a person sees and uses it."

    def __init__(self, lab, root):
        self.lab, self.root, self.browser = lab, root, lab.browser
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", root)

    def seen(self):
        return self.browser.execute_script(SEEN, self.root)

    def wait(self, holds, seconds=20):
        "What is seen as soon as something holds."
        end = time.monotonic() + seconds
        while not holds(seen := self.seen()):
            assert time.monotonic() < end, f"still on the screen: {seen}"
            time.sleep(0.02)
        return seen

    def square(self, name):
        return self.root.find_element("css selector", f'[data-square="{name}"]')

    def click(self, *squares):
        for name in squares:
            self.square(name).click()

    def drag(self, start, end):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).drag_and_drop(self.square(start), self.square(end)).perform()

    def press(self, label):
        next(b for b in self.root.find_elements("css selector", "button") if b.text == label).click()

    def new(self):
        "A new game that is certainly new: first with the other colour."
        self.press("as Black")
        self.wait(lambda s: " played " in s["message"] and len(s["moves"].split()) == 2)
        self.press("new game")
        return self.wait(lambda s: s["message"] == "You play White.")


def placed(board):
    return {chess.square_name(k): p.symbol() for k, p in board.piece_map().items()}


def answered(board, men):
    "The legal answer that makes this position of what was played."
    for move in board.legal_moves:
        board.push(move)
        found = placed(board) == men
        board.pop()
        if found:
            return move
    raise AssertionError(f"no legal move leads from {board.fen()} to {men}")


@pytest.fixture
def play(lab):
    roots = [r for r in lab.browser.find_elements("css selector", ".gc") if r.find_elements("css selector", "input")]
    screen = Screen(lab, roots[0])
    screen.new()
    return screen


@pytest.fixture
def group(lab):
    roots = [r for r in lab.browser.find_elements("css selector", ".gc") if r.find_elements("css selector", "table")]
    return Screen(lab, roots[0])


START = "r1bqkb1r/pppp1ppp/2n2n2/4p3/2B1P3/5N2/PPPP1PPP/RNBQK2R w KQkq - 4 4"


@pytest.mark.parametrize("how", ["click", "drag"])
def test_a_move_is_answered(play, how):
    if how == "click":
        play.click("d2")
        assert set(play.seen()["targets"]) == {"d3", "d4"}
        play.click("d4")
    else:
        play.drag("d2", "d4")
    seen = play.wait(lambda s: " played " in s["message"] and len(s["moves"].split()) == 3)
    board = chess.Board(START)
    board.push_uci("d2d4")
    reply = answered(board, seen["men"])
    assert board.san(reply) in seen["message"] and board.san(reply) in seen["moves"]
    assert seen["moves"].startswith("4. d4") and not seen["targets"]


def test_arrows_are_legal_and_their_shares_are_listed(play):
    seen, board = play.seen(), chess.Board(START)
    assert len(seen["arrows"]) == len(seen["bars"]) == 5
    for uci, bar in zip(seen["arrows"], seen["bars"]):
        assert bar.startswith(board.san(chess.Move.from_uci(uci)))
    shares = [float(bar.split()[-2]) for bar in seen["bars"]]
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] and sum(shares) <= 100.5
    tick = play.root.find_element("css selector", "input[type=checkbox]")
    tick.click()
    play.wait(lambda s: not s["arrows"] and not s["bars"])
    tick.click()
    assert play.wait(lambda s: s["arrows"])["arrows"] == seen["arrows"]


def test_the_slider_changes_what_the_policy_thinks(play):
    from selenium.webdriver.common.keys import Keys

    slider = play.root.find_element("css selector", "input[type=range]")

    def share(seen):
        return float(seen["bars"][0].split()[-2])

    before = play.seen()
    for _ in range(8):
        slider.send_keys(Keys.ARROW_RIGHT)
    hot = play.wait(lambda s: "Temperature 0.9" in s["message"])
    assert share(hot) < share(before)
    slider.send_keys(Keys.HOME)
    cold = play.wait(lambda s: "the most likely move" in s["message"])
    assert len(cold["arrows"]) == 1 and cold["arrows"][0] == before["arrows"][0] and share(cold) == 100
    for _ in range(10):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert play.wait(lambda s: "Temperature 0.5" in s["message"])["bars"] == before["bars"]


def test_undo_takes_back_a_move_and_its_answer(play):
    start = play.seen()
    play.click("d2", "d4")
    first = play.wait(lambda s: " played " in s["message"] and len(s["moves"].split()) == 3)
    play.press("undo")
    back = play.wait(lambda s: s["message"] == "Taken back.")
    assert back["men"] == start["men"] and back["moves"] == ""
    play.drag("d2", "d4")
    again = play.wait(lambda s: len(s["moves"].split()) == 3)
    assert again["men"] == first["men"] and again["message"] == first["message"]      # the same numbers are drawn


def test_flip_turns_the_board_and_moves_still_work(play):
    def above(name):
        return play.square(name).rect["y"]

    assert above("e8") < above("e1")
    play.press("flip")
    play.wait(lambda s: above("e8") > above("e1"))
    play.drag("d2", "d4")
    seen = play.wait(lambda s: len(s["moves"].split()) == 3)
    assert seen["moves"].startswith("4. d4") and "d2" not in seen["men"]
    play.press("flip")
    play.wait(lambda s: above("e8") < above("e1"))


def test_a_new_game_with_the_other_colour(play):
    play.press("as Black")
    seen = play.wait(lambda s: "played" in s["message"])
    assert len(seen["moves"].split()) == 2 and answered(chess.Board(START), seen["men"])
    play.click("a7", "a6")
    play.wait(lambda s: len(s["moves"].split()) == 5)
    play.new()
    assert play.seen()["men"] == placed(chess.Board(START))


def test_what_is_not_legal_is_said_in_a_line_and_nothing_is_lost(play):
    before = play.seen()
    play.drag("d2", "e5")
    seen = play.wait(lambda s: s["wrong"])
    assert seen["message"] == "d2e5 is not a legal move of the pawn here." and seen["men"] == before["men"]
    play.click("h8", "h3")                                          # the other side's rook: nothing is even chosen
    assert play.seen()["men"] == before["men"]
    play.click("d2", "d4")
    assert not play.wait(lambda s: len(s["moves"].split()) == 3)["wrong"]


RUN_CELL = """
const done = arguments[arguments.length - 1], page = window.jupyterapp.shell.currentWidget;
const future = page.sessionContext.session.kernel.requestExecute({code: arguments[0]});
future.done.then((reply) => done(reply.content.status), (e) => done(String(e)));
"""


def kernel(lab, code, seconds=20):
    "Run code in the page's kernel; where it fails, again, until it holds what the screen has told it."
    end = time.monotonic() + seconds
    while (said := lab.browser.execute_async_script(RUN_CELL, code)) != "ok":
        assert time.monotonic() < end, f"{said}: {code}"
        time.sleep(0.05)


def test_a_pawn_becomes_what_is_chosen(lab, play):
    "The same game is put on another position from Python; the choice stands on the board, four pieces."
    code = (
        "import chess; from grpo_chess.widget import new_game; before = game.table.start\n"
        "game.table.start = chess.Board('7k/P7/8/8/8/8/8/K7 w - - 0 1'); new_game(game.table, True)"
    )
    kernel(lab, code)
    play.wait(lambda s: s["men"] == {"h8": "k", "a7": "P", "a1": "K"})
    play.click("a7", "a8")
    offers = play.root.find_elements("css selector", "[data-promotion]")
    assert [o.get_attribute("data-promotion") for o in offers] == ["a7a8q", "a7a8r", "a7a8b", "a7a8n"]
    assert len({o.rect["y"] for o in offers}) == 4 and play.seen()["men"]["a7"] == "P"
    offers[3].click()
    seen = play.wait(lambda s: s["men"].get("a8") == "N")
    assert "a7" not in seen["men"]
    kernel(lab, "game.table.start = before; new_game(game.table, True)")
    play.wait(lambda s: s["men"] == placed(chess.Board(START)))


def test_a_group_is_stepped_through(group):
    seen = group.seen()
    assert len(seen["rows"]) == 8 and seen["now"] == "0" and seen["where"] == "after 0 of 4 plies"
    rewards, advantages = ([float(row[k].replace("−", "-")) for row in seen["rows"]] for k in (2, 4))
    mean = float(seen["mean"][1])
    assert mean == pytest.approx(sum(rewards) / 8, abs=1e-3)
    for r, a in zip(rewards, advantages):
        assert a == pytest.approx(r - mean, abs=2e-3)
    assert len(seen["arrows"]) == 8 and "all siblings stand here" in seen["message"]
    group.press("›")
    after_one = group.wait(lambda s: s["where"] == "after 1 of 4 plies")
    assert after_one["men"] != seen["men"] and len(after_one["arrows"]) < 8
    assert re.search(r"ply 1: \d of 8 siblings stand here", after_one["message"])
    group.root.find_elements("css selector", ".gc-table tbody tr")[3].click()
    other = group.wait(lambda s: s["now"] == "3")
    assert other["where"] == "after 1 of 4 plies" and other["moves"] != after_one["moves"]
    group.press("»")
    end = group.wait(lambda s: s["where"] == "after 4 of 4 plies")
    assert not end["arrows"] and end["message"] == "after the last ply"
    group.press("«")
    assert group.wait(lambda s: s["where"] == "after 0 of 4 plies")["men"] == seen["men"]


def test_the_kernel_and_the_screen_follow_each_other(lab, group):
    group.press("«")
    group.wait(lambda s: s["where"] == "after 0 of 4 plies")
    kernel(lab, f"assert (group.widget.sibling, group.widget.ply) == ({group.seen()['now']}, 0)")
    kernel(lab, "group.go(5, 2)")
    group.wait(lambda s: s["now"] == "5" and s["where"] == "after 2 of 4 plies")
    group.press("‹")
    group.wait(lambda s: s["where"] == "after 1 of 4 plies")
    kernel(lab, "assert (group.widget.sibling, group.widget.ply) == (5, 1)")
    kernel(lab, "group.go(0, 0)")
    group.wait(lambda s: s["now"] == "0" and s["where"] == "after 0 of 4 plies")


def test_nothing_is_asked_of_anybody_else(lab):
    "Every request of the page went to the JupyterLab it came from, but for the badge at its top."
    asked = set(lab.browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)"))
    assert asked and not [a for a in asked - {BADGE} if not a.startswith((lab.url, "data:", "blob:"))]
    assert "http" not in (TOP / "grpo_chess/web/board.js").read_text().replace("http://www.w3.org/2000/svg", "")
