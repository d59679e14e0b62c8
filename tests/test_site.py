"What the site is built from; the build itself is `make docs`."

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

from grpo_chess.panel import METRICS

TOP = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("site_builder", TOP / ".ci/site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


def tags(source, outputs=(), **metadata):
    cell = nbformat.v4.new_code_cell(source, metadata=metadata, outputs=[*outputs])
    return site.for_site(cell).metadata["tags"], cell.source


@pytest.mark.parametrize("source, metadata, want", [
    ("#| export\nx = 1", {}, ([], "x = 1")),
    ("#| hide\nx = 1", {}, (["remove-cell"], "x = 1")),
    ("#| default_exp loss", {}, (["remove-cell"], "")),
    ("#| echo: false\nx", {}, (["remove-input"], "x")),
    ("# Solution 1\nx", dict(jupyter=dict(source_hidden=True)), (["hide-input"], "# Solution 1\nx")),
    ("# Colab: y", dict(tags=["colab"]), (["colab", "remove-cell"], "# Colab: y"))])
def test_directives_are_obeyed_and_gone(source, metadata, want):
    assert tags(source, **metadata) == want


def test_links_keep_their_meaning():
    text = "[a](03_loss.ipynb#What-is-it?) [b](../index.ipynb) [c](index.ipynb) [d](https://x.org/y.md)"
    said = site.links(text, Path("nbs/x.ipynb"))
    here = site.links("[e](#What-it-is) [g](../README.md#Start)", Path("nbs/x.ipynb"))
    assert here == "[e](#what-it-is) [g](../README.md#start)"
    assert said == "[a](03_loss.ipynb#what-is-it) [b](../index.ipynb) [c](../index.md) [d](https://x.org/y.md)"
    assert site.links("[f](index.ipynb)", Path("nbs/findings/x.ipynb")) == "[f](index.ipynb)"


def prose(path):
    "Markdown of a page."
    cells = nbformat.read(path, 4).cells if path.suffix == ".ipynb" else [{"source": path.read_text()}]
    return "\n\n".join(c["source"] for c in cells if c.get("cell_type", "markdown") == "markdown")


def pages_of_the_site():
    return [p for p in site.tracked() if p.suffix in (".ipynb", ".md") and site.kept(p.relative_to(TOP))]


def test_links_to_headings_lead_to_one():
    "On the site, within a page too; Sphinx says the same, but in a minute and only in `make docs`."
    def slug(title):
        plain = re.sub(r"\]\([^)]*\)", "", title).strip()
        return re.sub(r"[^\w -]", "", plain.lower()).replace(" ", "-")
    text = {p: site.links(prose(p), p.relative_to(TOP)) for p in pages_of_the_site()}
    headings = {p: {slug(title) for title in re.findall(r"^#+ (.+)$", t, re.M)} for p, t in text.items()}
    found = [(p, *link) for p, t in text.items() for link in re.findall(r"\]\((?!https?:)([^)\s#]*)#([^)\s]+)\)", t)]
    lost = [(p.name, to, name) for p, to, name in found
            if name not in headings.get((p.parent / to).resolve() if to else p, {name})]
    assert len(found) > 20 and any(not to for _, to, _ in found) and not lost


def test_what_pages_lead_to_is_on_the_site():
    "Each link to a file of the repository; Sphinx says the same, but in minutes and only in `make docs`."
    missing = []
    for path in pages_of_the_site():
        text = prose(path)
        for link in re.findall(r"\]\((?!https?:|#|mailto:|data:)([^)\s#]+)", text):
            to = (path.parent / link).resolve()
            if to.is_file() and not site.kept(to.relative_to(TOP)):
                missing.append((str(path.relative_to(TOP)), link))
    assert not missing


def test_the_glossary_is_a_list_of_every_metric():
    text = site.glossary()
    assert all(f"`{name}`\n: " in text for name in METRICS) and "Elsewhere: `reward`" in text


def test_a_table_that_is_not_drawn_as_one_ends_the_build_in_red():
    "myst-nb's default for what cells print knows no tables: they stood as raw pipes on the site, and no one looked."
    table = "| a | b |\n|---|:---:|\n| 1 | 2 |"
    assert site.raw_tables(f"<p>{table}</p>") == ["a table that is not drawn: |---|:---:|"]
    assert not site.raw_tables(f"<pre>{table}</pre><table><tr><td>1</td></tr></table><p>a --- b | c</p>")


def test_a_link_that_leads_nowhere_ends_the_build_in_red(tmp_path):
    "Sphinx looks at those of the text, and not at those of every output."
    (tmp_path / "a b.html").touch()
    html = '<a class="x" href="{}">y</a><img alt="" src="z.png?v=1"><a href="#here"></a><a href="https://x.org/q.html"></a>'
    assert not site.lost_links(html.format("a%20b.html#there").replace("z.png", "a b.html"), tmp_path)
    lost = site.lost_links(html.format("c.ipynb"), tmp_path)
    assert lost == ["a link that leads nowhere: c.ipynb", "a link that leads nowhere: z.png"]


def test_the_api_shows_shapes_and_units():
    text = site.api_page(TOP / "grpo_chess/model.py")
    assert "## MoveDist" in text and "# [N, 65] integer" in text and "### MoveDist.entropy" in text
    assert "[01_model.ipynb](../nbs/01_model.ipynb)" in text


def test_every_page_is_in_the_table_of_contents():
    pages = [str(p.relative_to(TOP).with_suffix("")) for p in (TOP / "nbs").rglob("*.ipynb")]
    text = site.index(sorted(p for p in pages if p != "nbs/index"))
    assert all(f"\n{p}\n" in text for p in pages if p != "nbs/index")
