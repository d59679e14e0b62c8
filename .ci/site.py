"""The site, from the stored notebooks: python .ci/site.py [folder]   (default: _docs)
Nothing is executed and nothing is fetched. A link that leads nowhere is an error. MathJax comes from .ci/setup docs."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import nbformat

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
MATHJAX = Path(sys.prefix) / "share/mathjax/tex-svg.js"
SOURCE = TOP / "_proc/site"
KEPT = (".md", ".png", ".svg", ".yaml", ".csv", ".py", ".json", ".jsonl", ".sh", ".ini")
CONF = """project, author, language = "grpo_chess", "The grpo_chess authors", "en"
html_show_copyright = False
extensions, html_theme = ["myst_nb"], "furo"
html_title, html_static_path, html_copy_source = "grpo_chess", ["_static"], False
nb_execution_mode, nb_merge_streams = "off", True
nb_render_markdown_format = "myst"      # tables in outputs, and links that are looked at; the default has neither
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath", "deflist", "html_image"], 4
mathjax_path = "mathjax.js"
html_css_files = ["site.css"]
pygments_dark_style = "monokai"
suppress_warnings = ["misc.highlighting_failure", "mystnb.unknown_mime_type", "myst.header"]
"""
# Most lines of code fit where a screen is wide. A figure is drawn on white, a wide table scrolls by itself instead of
# widening the page, and the pictures of the first page's table keep a size at which they can be read.
CSS = """
div.cell_output img { background: #fff; border-radius: 4px; max-width: 100%; }
article td img { max-width: none; width: min(280px, 40vw) !important; background: #fff; }
article table { display: block; overflow-x: auto; width: max-content; max-width: 100%; }
div.cell_output pre, div.cell_input pre { overflow-x: auto; }
mjx-container { overflow-x: auto; overflow-y: hidden; max-width: 100%; }
dl dt { margin-top: .6em; }
div.highlight pre { font-size: .75rem; }
@media (min-width: 86em) { .content { width: calc(50vw + 7em); } }
@media (min-width: 97em) { .content { width: min(58em, calc(50vw + 8em)); } }
"""
PARTS = ("nbs", "research_docs", "benchmarks", "examples")


def tracked():
    "Files of the repository, as git knows them."
    said = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP, capture_output=True, text=True)
    return [TOP / name for name in said.stdout.splitlines() if (TOP / name).is_file()]


def for_site(cell):
    "A cell as readers of the site see it: nbdev's directives are obeyed and gone, folded code is folded."
    tags = cell.metadata.setdefault("tags", [])
    if cell.cell_type != "code":
        return cell
    found = re.findall(r"^#\s*\|\s*(\w+)(?::\s*(\S+))?.*\n?", cell.source, re.M)
    cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    words = {word for word, _ in found}
    if words & {"hide", "default_exp"} and "export" not in words and not (cell.outputs and "hide" not in words):
        tags.append("remove-cell")
    elif "colab" in tags or not (cell.source or cell.outputs):
        tags.append("remove-cell")
    elif ("echo", "false") in found:
        tags.append("remove-input")
    elif cell.metadata.get("jupyter", {}).get("source_hidden"):
        tags.append("hide-input")
    return cell


def links(text, inside):
    "Links as Sphinx knows them: headings by their slugs, and the first page, which is README here."
    def slug(found):
        return found.group(1) + "#" + re.sub(r"[^\w-]", "", found.group(2).lower())
    text = re.sub(r"(\]\((?:[^)\s#]*\.(?:ipynb|md))?)#([^)\s]+)", slug, text)
    text = re.sub(r"\[!\[Open In Colab\]\([^)]*\)\]", "[Open in Colab]", text)      # its picture is not on this machine
    up = "../" * (len(inside.parts) - 1)
    here = "index.ipynb" if inside.parent == Path("nbs") else f"{up}nbs/index.ipynb"
    return text.replace(f"]({here})", f"]({up}index.md)")


def write_page(path, to):
    "A page of the site."
    inside = path.relative_to(TOP)
    if path.suffix == ".md":
        to.write_text(links(path.read_text(), inside))
        return
    nb = nbformat.read(path, 4)
    nb.cells = [for_site(cell) for cell in nb.cells]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = links(cell.source, inside)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = links(output.data["text/markdown"], inside)
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, to)


def signature(node, lines):
    "The lines of a definition with their comments, which say shapes and units, and its docstring."
    text = ast.get_docstring(node) or ""
    body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    first = node.body[0].lineno if text else (body[0].lineno if body else node.end_lineno)
    same_line = first == node.lineno
    head = lines[node.lineno - 1 : node.lineno if same_line else first - 1]
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        head += [line for n in fields for line in lines[n.lineno - 1 : n.end_lineno]]
    return "\n".join(head).rstrip(), inspect.cleandoc(text)


def api_page(path):
    "A module's public names, in Markdown."
    source = path.read_text()
    tree, lines = ast.parse(source), source.splitlines()
    page = re.search(r"File to edit: \S*?(\w+\.ipynb)", source)
    parts = [f"# {path.stem}", ast.get_docstring(tree) or ""]
    if page:
        parts.append(f"Told in [{page.group(1)}](../nbs/{page.group(1)}).")
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        head, text = signature(node, lines)
        told = re.sub(r"^(\s*)(\w+): ", r"\1- `\2`: ", text.replace("Args:\n", "Settings:\n\n"), flags=re.M)
        parts += [f"## {node.name}", f"```python\n{head}\n```", inspect.cleandoc(told).replace("\n    -", "\n-")]
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        for method in methods if isinstance(node, ast.ClassDef) else []:
            head, text = signature(method, lines)
            parts += [f"### {node.name}.{method.name}", f"```python\n{inspect.cleandoc(head)}\n```", text]
    return "\n\n".join(p for p in parts if p) + "\n"


def glossary():
    "Every logged number, as a list."
    from grpo_chess.panel import METRICS, names_of
    parts = ["# Glossary of metrics", "What a run logs at every step, in `metrics.jsonl` and at W&B. "
             "[The panel](nbs/07_panel.ipynb) says which five to look at first."]
    for name, (meaning, *_) in METRICS.items():
        others = ", ".join(f"`{other}`" for other in names_of(name)[1:])
        told = (meaning if meaning.startswith("e^") else meaning[0].upper() + meaning[1:]) + "."
        parts.append(f"`{name}`\n: {told}" + (f" Elsewhere: {others}." if others else ""))
    return "\n\n".join(parts) + "\n"


def toctree(caption, entries):
    "A part of the table of contents."
    return "\n".join(["```{toctree}", ":maxdepth: 1", f":caption: {caption}", "", *entries, "```"])


def index(pages):
    "The first page: what README says, and the table of contents."
    def part(keep):
        return [p for p in pages if keep(p)]
    lesson = sorted(part(lambda p: re.match(r"nbs/0\d", p)), key=lambda p: (p != "nbs/00_lesson", p))
    runs = part(lambda p: re.match(r"nbs/(1\d|colab)", p))
    findings = ["nbs/findings/index", *part(lambda p: p.startswith("nbs/findings/") and not p.endswith("index"))]
    rest = part(lambda p: p.startswith("research_docs/") or p in ("CONTRIBUTING", "CHANGELOG") or p.startswith("bench"))
    text = links((TOP / "README.md").read_text(), Path("README.md"))
    return "\n\n".join([text, toctree("Lesson", lesson), toctree("Runs", runs), toctree("Findings", findings),
                        toctree("Experiments", part(lambda p: p.startswith("nbs/experiments/"))),
                        toctree("Reference", ["glossary", *part(lambda p: p.startswith("api/"))]),
                        toctree("Documents", rest)])


def kept(inside):
    "Is a file of the repository part of the site, as a page or as what pages lead to?"
    if len(inside.parts) == 1:
        return inside.suffix in (".md", ".ini")
    quoted = inside.suffix in (".ipynb", ".md") and inside.parts[:2] == ("nbs", "data")     # text that a page shows
    return inside.parts[0] in PARTS and inside.suffix in (".ipynb", *KEPT) and not quoted


def write_sources():
    "All that Sphinx reads, in a folder with the repository's own layout, so that links keep their meaning."
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = []
    for path in tracked():
        inside = path.relative_to(TOP)
        to, page = SOURCE / inside, path.suffix in (".ipynb", ".md")
        if inside == Path("nbs/index.ipynb") or not kept(inside):
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, to) if page else shutil.copy(path, to)
        if page and inside != Path("README.md"):
            pages.append(str(inside.with_suffix("")))
    (SOURCE / "api").mkdir()
    for path in sorted((TOP / "grpo_chess").glob("*.py")):
        if not path.stem.startswith("_"):
            (SOURCE / f"api/{path.stem}.md").write_text(api_page(path))
            pages.append(f"api/{path.stem}")
    (SOURCE / "glossary.md").write_text(glossary())
    (SOURCE / "README.md").unlink()
    (SOURCE / "index.md").write_text(index(sorted(set(pages))))
    (SOURCE / "_static").mkdir()
    (SOURCE / "_static/site.css").write_text(CSS)
    shutil.copy(MATHJAX, SOURCE / "_static/mathjax.js")
    (SOURCE / "conf.py").write_text(CONF)


def raw_tables(html):
    "Lines of a table that stand on a page as their Markdown, code aside."
    seen = re.sub(r"<(pre|script|code)\b.*?</\1>", "", html, flags=re.S)
    return [f"a table that is not drawn: {line[:80]}" for line in re.findall(r"^.*\|\s*:?-{3,}:?\s*\|.*$", seen, re.M)]


def lost_links(html, folder):
    "Links and pictures of a page in a folder that lead to no file of the site."
    found = re.findall(r"""<(?:a|img|link|script)\b[^>]*?\s(?:href|src)="([^"#?]+)""", html)
    local = {unquote(unescape(to)) for to in found if not re.match(r"\w+:|//", to)}
    return [f"a link that leads nowhere: {to}" for to in sorted(local) if not (folder / to).is_file()]


def main():
    "Build; 2 where something is missing, 1 where a page is not as it should be."
    if not MATHJAX.exists():
        print("error: MathJax is not here: type  .ci/setup docs  once, with a network", file=sys.stderr)
        return 2
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else TOP / "_docs"
    write_sources()
    built = SOURCE.parent / "site_html"         # myst-nb keeps files of its own beside what it builds
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "auto"]
    command += ["-d", SOURCE.parent / "doctrees", SOURCE, built]
    status = subprocess.run([*map(str, command)]).returncode
    wrong = []
    for page in built.rglob("*.html"):
        html = page.read_text()
        wrong += [f"{page.relative_to(built)}: {line}" for line in raw_tables(html) + lost_links(html, page.parent)]
    for line in sorted(wrong):
        print("error:", line, file=sys.stderr)
    if not status:
        shutil.copytree(built, out, dirs_exist_ok=True)
    return status or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
