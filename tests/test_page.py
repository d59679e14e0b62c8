"report.html: one file, what report.md says, boards that can be stepped through, nothing asked of anybody."
import re
import shutil
import tempfile
import time
from dataclasses import replace

import chess
import pytest
from browser import CHROMIUM, DRIVER, MISSING

from grpo_chess.figures import data
from grpo_chess.matches import play_match
from grpo_chess.page import game_record, report_page, sample_games
from grpo_chess.panel import PANEL, read_metrics
from grpo_chess.players import random_openings, random_player

TEXT = ("# a run\n\nAll 4 steps were done.\n\n## What changed\n\n| | first | last |\n|---|---|---|\n"
        "| `entropy` | 2.500 | 1.400 |\n\n![panel](report.png)\n")

def matches(names=("new", "old"), titles=("sampling at T=1", "most likely move")):
    openings = random_openings(6, 0)
    return {t: play_match(random_player(k), random_player(9), openings, 40, names=names) for k, t in enumerate(titles)}

@pytest.fixture(scope="module")
def page(): return report_page("a run", TEXT, read_metrics(data("tiny_metrics.jsonl")), matches())

def test_the_page_says_what_the_report_says(page):
    words = re.sub(r"<[^>]+>", " ", page)
    for said in ("All 4 steps were done.", "What changed", "2.500", "1.400", "What the numbers mean",
                 "exact entropy of the behaviour policy"):
        assert said in words, said
    assert "report.png" not in page and page.count('class="plot"') == len(PANEL) and page.count('class="game"') == 4

def test_nothing_is_fetched(page):
    assert not re.findall(r"""(?:src|href|srcset|action)=["'](?!data:)""", page)
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|import\s*\(", page)
    assert "default-src 'none'" in page

@pytest.mark.parametrize("bad", ["</script><img src=x>", "<b>", "$title", "a & b", "|x|"])
def test_names_are_text(bad):
    page = report_page(bad, f"# {bad}\n", [], matches((bad, "old"), (bad,)))
    assert "<img" not in page and "<b>" not in page and page.count("</script>") == 2
    assert page.count('class="game"') == 4

def test_a_run_without_matches_or_rows_has_a_page():
    page = report_page("r", "# r\n\nFailed after 0 of 600 steps: x\n", [])
    assert "No match was played" in page and 'class="plot"' not in page

def test_rows_with_holes_are_drawn():
    assert report_page("r", "# r\n", [dict(step=0), dict(step=1, entropy=None)]).count('class="plot"') == len(PANEL)

@pytest.mark.filterwarnings("error")
def test_the_style_of_the_lessons_changes_nothing():
    "Their layout belongs to figures with subplots; a run in such a notebook must not print warnings."
    import matplotlib
    from grpo_chess.figures import STYLE
    with matplotlib.rc_context(STYLE): assert report_page("r", "# r\n", [dict(step=0)]).count('class="plot"') == 8

def test_the_sample_is_of_all_matches_and_other_openings():
    many = matches(titles=("a", "b", "c"))
    assert [title for title, *_ in sample_games(many)] == ["a", "b", "c", "a"]
    one = matches(titles=("a",))
    assert {game.a_white for *_, game in sample_games(one)} == {True, False}
    assert len({game.pair for *_, game in sample_games(one)}) == 4
    two = matches(titles=("a", "b"))
    for white in (True, False):       # where one match has games of one colour only, the other shows the other one
        cut = two | dict(a=replace(two["a"], games=[g for g in two["a"].games if g.a_white == white]))
        assert {game.a_white for *_, game in sample_games(cut, 2)} == {True, False}
    few = dict(a=play_match(random_player(0), random_player(1), random_openings(3, 0), 4))      # six games
    shown = [(game.pair, game.a_white) for *_, game in sample_games(few)]
    assert len({*shown}) == 4 and {pair for pair, _ in shown} == {0, 1, 2} and sum(white for _, white in shown) == 2
    assert len(sample_games(dict(a=play_match(random_player(0), random_player(1), random_openings(1, 0), 4)))) == 2

def test_a_record_is_the_game():
    for *_, game in sample_games(matches()):
        record, board = game_record(game.board, game.opening_plies), game.board.root()
        assert record["opening"] == 6 and record["fens"][0] == board.board_fen()
        for uci, san, fen in zip(record["ucis"], record["sans"], record["fens"][1:]):
            assert board.san(chess.Move.from_uci(uci)) == san
            board.push_uci(uci)
            assert board.board_fen() == fen
        assert board.board_fen() == game.board.board_fen()

# In a browser

@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options, folder = webdriver.ChromeOptions(), tempfile.mkdtemp()
    options.binary_location = CHROMIUM
    for arg in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
                "disable-component-update", f"user-data-dir={folder}"):
        options.add_argument(f"--{arg}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()
    shutil.rmtree(folder, ignore_errors=True)

def opened(browser, page, path, width, dark=False):
    scheme = [dict(name="prefers-color-scheme", value="dark" if dark else "light")]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=scheme))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            dict(width=width, height=900, deviceScaleFactor=1, mobile=False))
    path.write_text(page)
    browser.get_log("browser")
    browser.get(f"file://{path}")

MEN = ("return Object.fromEntries([...arguments[0].querySelectorAll('[data-at]')]"
       ".map(n => [n.dataset.at, n.dataset.piece]))")

@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.xdist_group("browser")
def test_games_are_stepped_through(browser, page, tmp_path):
    opened(browser, page, tmp_path/"report.html", 1200)
    figures = browser.find_elements("css selector", ".game")
    games = [game for *_, game in sample_games(matches())]
    assert len(figures) == len(games) == 4
    for figure, game in zip(figures, games):
        record = game_record(game.board)
        def placed(ply, record=record):
            board = chess.Board(record["fens"][ply] + " w - - 0 1")
            return {chess.square_name(k): p.symbol() for k, p in board.piece_map().items()}
        def press(label, figure=figure):
            next(b for b in figure.find_elements("css selector", "button") if b.text == label).click()
        assert browser.execute_script(MEN, figure) == placed(6)                  # where the opening ended
        press("›")
        assert browser.execute_script(MEN, figure) == placed(7)
        press("‹")
        press("»")
        assert browser.execute_script(MEN, figure) == placed(len(record["sans"]))
        figure.find_elements("css selector", ".gc-san")[1].click()
        assert browser.execute_script(MEN, figure) == placed(2) and "after 2 of" in figure.text
        press("«")
        assert browser.execute_script(MEN, figure) == placed(0)
    assert browser.get_log("browser") == []                                      # no error, nothing refused

@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_screen_and_a_theme(browser, page, tmp_path, width, dark):
    opened(browser, page, tmp_path/"report.html", width, dark)
    time.sleep(.1)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    style = "return getComputedStyle(document.body)."
    ink, paper = (browser.execute_script(style + c) for c in ("color", "backgroundColor"))
    light = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (ink, paper)]
    assert (light[0] > light[1] + 300) if dark else (light[1] > light[0] + 300)
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in requests)

@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_gain_is_seen_without_moving_the_table(browser, tmp_path, width):
    "What the shipped run's report begins with; at 390 its last column was off the screen."
    told = data("imitator_report.md").read_text()
    opened(browser, report_page("a run", told, []), tmp_path/"report.html", width)
    cells = browser.execute_script("return [...document.querySelectorAll('.text td:last-child')]"
                                   ".map(e => [e.innerText, e.getBoundingClientRect().right])")
    gains = [right for text, right in cells if re.match(r"[+-]\d+ \[", text)]
    assert len(gains) == 3 and max(gains) <= width
