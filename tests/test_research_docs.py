"The ledger of the record's statements and the notebooks that decide them name each other; the documents are whole."
import ast
import csv
import re
from collections import Counter
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from nbconvert.filters.markdown_mistune import markdown2html_mistune

TOP = Path(__file__).resolve().parent.parent
DOCS = TOP/"research_docs"
VERDICTS = ("holds", "holds with correction", "wrong", "not checkable here")
STATUS = ("answered", "partly", "not answerable here")
# unchecked boxes of the five documents
BOXES = {"2026-01-18": 4, "2026-01-19": 5, "2026-01-29": 3, "2026-02-06": 4, "2026-02-07": 4}
METADATA = ("title", "date", "author", "git_commit", "git_branch", "uncommitted_changes", "files", "runs", "tools",
            "question", "tags")
SECTIONS = ("Summary", "Context", "Method", "Findings", "Analysis", "Recommendations", "Open questions")
DECIDES = re.compile(r"^# decides: (.+)$", re.M)
TEACHING = sorted((TOP/"nbs").glob("0[0-7]_*.ipynb"))      # the lesson: what decides a claim stands elsewhere

def load(name): return yaml.safe_load((DOCS/name).read_text())

@cache
def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]

def deciding_cells():
    "Claim id -> [(notebook, source of the cell)]."
    found = {}
    for path in sorted((TOP/"nbs").rglob("*.ipynb")):
        for cell in code_cells(path):
            for line in DECIDES.findall(cell.source):
                for claim in line.split():
                    found.setdefault(claim, []).append((str(path.relative_to(TOP)), cell.source))
    return found

def asserts(source):
    "Does the code hold an assert statement?"
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))

def functions_of(path):
    "Names of the functions that a Python file defines; none if there is no such file."
    if not path.exists(): return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}

def fields_missing(c):
    "What an entry of the ledger lacks, one line each."
    id, out = c["id"], []
    if not re.fullmatch(r"\d{4}-\d\d", id): out.append(f"{id!r} is no id")
    missing = [k for k in ("document", "section", "claim", "verdict") if not c.get(k)]
    if missing: out.append(f"{id} lacks {missing}")
    if c["verdict"] not in VERDICTS: out.append(f"{id}: {c['verdict']!r} is no verdict")
    if c["verdict"] in ("holds with correction", "wrong") and not c.get("correction"):
        out.append(f"{id} lacks its correction")
    return out

def undecided(c, cells):
    "Which of the places that are to decide an entry do not, one line each."
    id, by = c["id"], c.get("decided_by", [])
    if c["verdict"] == "not checkable here":
        return [] if c.get("reason") and not by else [f"{id} needs a reason, and nothing that decides it"]
    out = [] if by else [f"{id}: nothing decides it"]
    for place in by:
        path, _, function = place.partition("::")
        if function and function not in functions_of(TOP/path): out.append(f"{id}: there is no {place}")
        if not function and place not in [notebook for notebook, _ in cells.get(id, [])]:
            out.append(f"{id}: no cell of {place} says that it decides it")
    return out

def faults(claims, cells):
    "What does not fit between the ledger and the cells, one line each."
    known = {c["id"]: c for c in claims}
    out = [f"{id} stands {n} times" for id, n in Counter(c["id"] for c in claims).items() if n > 1]
    for c in claims: out += fields_missing(c) + undecided(c, cells)
    for id, places in cells.items():
        for notebook, source in places:
            if id not in known: out.append(f"{notebook} decides {id}, which is not in the ledger")
            elif notebook not in known[id].get("decided_by", []):
                out.append(f"{notebook} decides {id}, but the ledger does not name it")
            if not asserts(source): out.append(f"{notebook}: the cell that decides {id} asserts nothing")
    return out

def test_each_claim_is_decided_and_each_deciding_cell_is_in_the_ledger():
    claims = load("claims.yaml")
    assert len(claims) >= 100
    assert faults(claims, deciding_cells()) == []
    assert not [c["id"] for c in claims if "provisional" in c]

@pytest.mark.parametrize("harm", ["cell gone", "assert gone", "unknown id", "not named", "twice", "no correction",
                                  "no verdict", "no test", "no reason"])
def test_the_check_sees(harm):
    "Every way of coming apart is found."
    claims, cells = load("claims.yaml"), deciding_cells()
    victim = next(c for c in claims if c["verdict"] == "wrong" and c["id"] in cells)
    place, source = cells[victim["id"]][0]
    before = len(faults(claims, cells))
    if harm == "cell gone": del cells[victim["id"]]
    if harm == "assert gone": cells[victim["id"]][0] = place, "print()"
    if harm == "unknown id": cells["0999-01"] = [(place, source)]
    if harm == "not named": victim["decided_by"] = ["tests/test_research_docs.py::test_the_check_sees"]
    if harm == "twice": claims.append(dict(victim))
    if harm == "no correction": del victim["correction"]
    if harm == "no verdict": victim["verdict"] = "maybe"
    if harm == "no test": victim["decided_by"] = [*victim["decided_by"], "tests/test_research_docs.py::no_such_test"]
    if harm == "no reason": del next(c for c in claims if c["verdict"] == "not checkable here")["reason"]
    assert len(faults(claims, cells)) > before

def decided_in(nb):
    "The ids that a notebook's cells decide."
    lines = [line for c in nb.cells if c.cell_type == "code" for line in DECIDES.findall(c.source)]
    return [claim for line in lines for claim in line.split()]

@pytest.mark.parametrize("path", TEACHING, ids=lambda p: p.stem)
def test_teaching_pages_decide_nothing(path):
    "A reader of the lesson does not stumble over the ledger."
    assert decided_in(nbformat.read(path, 4)) == []

def test_open_questions_are_complete():
    questions = load("open_questions.yaml")
    assert len({q["id"] for q in questions}) == len(questions) == sum(BOXES.values()) == 20
    assert Counter(q["document"][:10] for q in questions) == BOXES
    for q in questions:
        assert q["status"] in STATUS and q["question"] and q["answer"], q["id"]
        assert q["status"] == "not answerable here" or (q["evidence"] and q["scale"]), q["id"]
        for place in q["evidence"]: assert (TOP/place).exists(), f"{q['id']}: there is no {place}"

def documents(): return sorted(p for p in DOCS.glob("20*.md"))

def test_there_is_a_document_for_every_finding():
    findings = [yaml.safe_load(p.read_text().split("---")[1])["finding"] for p in documents()]
    assert sorted(n for n in findings if n) == list(range(1, 10))                   # 0: a document of none of them

@pytest.mark.parametrize("path", [DOCS/"TEMPLATE.md", *documents()], ids=lambda p: p.stem)
def test_document_is_whole(path):
    "Metadata, sections, and no figure without the place that made it."
    _, head, body = path.read_text().split("---\n", 2)
    meta = yaml.safe_load(head)
    assert not [k for k in METADATA if k not in meta], f"{path.name} lacks metadata"
    assert meta["author"] == "grpo_chess authors"
    for section in SECTIONS: assert f"\n## {section}\n" in body, f"{path.name}: {section}"
    for f in meta["files"] if path.name != "TEMPLATE.md" else []: assert (TOP/f).exists(), f"{path.name} names {f}"

def printed(notebook):
    "All that a notebook's cells print or show as text."
    outs = [o for c in code_cells(notebook.resolve()) for o in c.outputs]
    def shown(o): return "\n".join(str(v) for k, v in o.get("data", {}).items() if k.startswith("text/"))
    return "\n".join(o.get("text") or shown(o) for o in outs)

@pytest.mark.parametrize("path", documents(), ids=lambda p: p.stem)
def test_figures_are_what_the_notebooks_print(path):
    "In a row of evidence, code type is text that the linked notebook prints today."
    rows = [r for r in path.read_text().splitlines() if r.startswith("|") and ".ipynb" in r]
    assert rows, "no evidence"
    for row in rows:
        what, figure, by = (x.strip() for x in row.strip("|").split("|"))
        text = printed(path.parent/re.search(r"\]\(([^)#]+\.ipynb)", by).group(1))
        spans = re.findall(r"`([^`]+)`", figure)
        assert spans, row
        for span in spans: assert span in text, f"{path.name}: {span!r} is not printed"

@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.stem)
def test_no_dead_links(path):
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not link.startswith("http"): assert (path.parent/link).exists(), f"{path.name} links to {link}"

def headings(notebook):
    "The anchors of a page, as JupyterLab makes them."
    texts = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "markdown"]
    found = [h.strip().replace(" ", "-") for text in texts for h in re.findall(r"^#+ (.+)$", text, re.M)]
    return {*found, *(h.replace("`", "") for h in found)}

@pytest.mark.parametrize("path", sorted((TOP/"nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_pages_link_to_what_is_there(path):
    "Files and headings that a page links to exist."
    texts = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for link in (link for link in links if not link.startswith("http")):
        name, _, heading = link.partition("#")
        target = (path.parent/name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        if heading and target.suffix == ".ipynb": assert heading in headings(target), f"{path.name} links to {link}"

def test_index_names_every_document():
    index = (DOCS/"README.md").read_text()
    assert not [p.name for p in documents() if p.name not in index]

def test_ids_in_documents_exist():
    known = {c["id"] for c in load("claims.yaml")} | {q["id"] for q in load("open_questions.yaml")}
    for path in documents():
        named = set(re.findall(r"\bQ?0[12]\d\d-\d{1,2}\b", path.read_text().split("---\n", 2)[2]))
        assert named <= known, f"{path.name}: {named - known}"

def test_run_tables_are_described_and_rectangular():
    described = (DOCS/"runs/README.md").read_text()
    for path in (DOCS/"runs").glob("*.csv"):
        rows = list(csv.reader(path.open()))
        assert path.name in described and len({len(r) for r in rows}) == 1 and len(rows) > 1, path.name

def test_notebook_counts_are_the_ledger_s():
    "The ledger page shows the counts of today's files."
    shown = printed(TOP/"nbs/experiments/ledger.ipynb")
    counts = Counter(c["verdict"] for c in load("claims.yaml"))
    for verdict, n in counts.items(): assert re.search(rf"^{verdict}: {n}$", shown, re.M), verdict
    for status, n in Counter(q["status"] for q in load("open_questions.yaml")).items():
        assert re.search(rf"^{status}: {n}$", shown, re.M), status

def rows_meant(markdown):
    "Rows of tables as the text has them, headers included: lines that begin with a bar, but for rulers."
    text = re.sub(r"```.*?```", "", markdown, flags=re.S)
    lines = [line.strip() for line in text.splitlines() if line.lstrip().startswith("|")]
    return sum(not re.fullmatch(r"[|\s:]*-[|\s:-]*", line) for line in lines)

def rows_shown(markdown):
    "Rows of tables as nbconvert and nbviewer render them."
    return markdown2html_mistune(markdown).count("<tr>")

def markdown_of(notebook):
    "Every Markdown text that a reader of a page sees: its cells, and what its code showed."
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown": yield cell.source
        else: yield from (o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {}))

@pytest.mark.parametrize("path", sorted((TOP/"nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_tables_are_tables(path):
    "One cell with a bare bar turns a whole table into a paragraph."
    for text in markdown_of(path): assert rows_shown(text) == rows_meant(text), text[:300]

def test_every_statement_has_its_row():
    "All statements and open questions are rows of the ledger page's tables."
    total = sum(map(rows_shown, markdown_of(TOP/"nbs/experiments/ledger.ipynb")))
    claims, questions = load("claims.yaml"), load("open_questions.yaml")
    documents = len({c["document"] for c in claims})
    assert total == len(claims) + documents + (documents + 1) + len(questions) + 1      # with the tables' headers

def test_a_bare_bar_is_seen():
    table = "| a | b |\n|---|---|\n| x | {} |\n| y | z |\n"
    assert rows_shown(table.format("KL(p \\|\\| q)")) == rows_meant(table.format("KL(p \\|\\| q)")) == 3
    assert rows_shown(table.format("KL(p || q)")) != rows_meant(table.format("KL(p || q)"))
