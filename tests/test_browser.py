"""Pages in a real browser: they run and print what is stored, nothing is broken to look at, and every slider redraws
its figure, by keyboard and by mouse."""

import os
from functools import partial

import pytest
from browser import MISSING, TOP, Lab
from pages import BROWSER, compare

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.xdist_group("browser")]
PAGES = sorted(str(p.relative_to(TOP)) for p in (TOP / "nbs").rglob("*.ipynb") if "explore(" in p.read_text())
if not os.environ.get("ALL_PAGES"):  # `make test-browser` looks at every page that has a slider
    PAGES = [p for p in PAGES if any(part in p for part in BROWSER)]


@pytest.fixture(scope="module")
def lab():
    with Lab() as lab:
        yield lab


def roomier(handle):
    "The direction in which a slider has more room, and the other: at an end nothing can follow."
    low, now, high = (handle.get_attribute(f"aria-value{end}") for end in ("min", "now", "max"))
    return (-1, 1) if now and float(now) - float(low) > float(high) - float(now) else (1, -1)


def move(lab, picture, handle, how):
    "Seconds until the picture followed; tries both directions."
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def by_keyboard(sign):
        handle.send_keys(Keys.ARROW_RIGHT if sign > 0 else Keys.ARROW_LEFT)

    def by_mouse(sign):
        ActionChains(lab.browser).drag_and_drop_by_offset(handle, 150 * sign, 0).perform()

    for sign in roomier(handle):
        act = partial(by_keyboard if how == "keyboard" else by_mouse, sign)
        for seconds in (1.0, 1.0, 1.0, 1.0, 3.0) if how == "keyboard" else (3.0,):
            waited = lab.changed(picture, act, seconds=seconds)
            if waited is not None:
                return waited
    return None


def step_through(lab, viewer):
    "What a group of siblings says after a click on its button."
    lab.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", viewer)
    next(b for b in viewer.find_elements("css selector", "button") if b.text == "›").click()
    return viewer.find_element("css selector", ".gc-where").text[:10]


@pytest.mark.parametrize("page", PAGES)
def test_page_runs_and_its_sliders_redraw(lab, page, capsys):
    wrong = lab.run(page)
    assert not wrong, f"{page} in a browser: {wrong}"
    compare(TOP / page, lab.page())
    for viewer in lab.browser.find_elements("css selector", ".gc"):
        assert step_through(lab, viewer) == "after 1 of", f"{page}: a group of siblings does not step"
    figures = lab.figures()
    assert figures, f"{page} shows no live figure"
    for i, (picture, handles) in enumerate(figures):
        assert handles, f"{page}, live figure {i}: no slider"
        for k, handle in enumerate(handles):
            for how in ("keyboard", "mouse"):
                waited = move(lab, picture, handle, how)
                assert waited is not None, (
                    f"{page}, live figure {i}, slider {k}: moving it by {how} changes nothing that is seen"
                )
                with capsys.disabled():
                    print(f"{page}: figure {i}, slider {k}, {how}: {1000 * waited:.0f} ms")
    lab.close_page()
