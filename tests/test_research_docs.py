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

TOP = Path(__file__).resolve().parent.parent
DOCS = TOP/"research_docs"
VERDICTS = ("holds", "holds with correction", "wrong", "not checkable here")
STATUS = ("answered", "partly", "not answerable here")
BOXES = {"2026-01-18": 4, "2026-01-19": 5, "2026-01-29": 3, "2026-02-06": 4, "2026-02-07": 4}      # unchecked boxes of the five documents
METADATA = ("title", "date", "author", "git_commit", "git_branch", "uncommitted_changes", "files", "runs", "tools", "question", "tags")
DECIDES = re.compile(r"^# decides: (.+)$", re.M)
TEACHING = sorted((TOP/"nbs").glob("0[0-7]_*.ipynb"))      # the lesson: what decides a claim stands in findings, experiments or the arena
MOVING = {"nbs/02_sampler.ipynb", "nbs/03_loss.ipynb", "nbs/05_reward.ipynb", "nbs/07_trainer.ipynb"}      # still hold cells that have moved

def load(name): return yaml.safe_load((DOCS/name).read_text())

@cache
def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]

def deciding_cells():
    "Claim id -> [(notebook, source of the cell)]."
    found = {}
    for path in sorted((TOP/"nbs").rglob("*.ipynb")):
        for cell in code_cells(path):
            for line in DECIDES.findall(cell.source):
                for claim in line.split(): found.setdefault(claim, []).append((str(path.relative_to(TOP)), cell.source))
    return found

def asserts(source):
    "Does the code hold an assert statement?"
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))

def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)} if path.exists() else set()

def faults(claims, cells):
    "What does not fit between the ledger and the cells, one line each."
    out, known = [], {c["id"]: c for c in claims}
    for id, n in Counter(c["id"] for c in claims).items():
        if n > 1: out.append(f"{id} stands {n} times")
    for c in claims:
        id, by = c["id"], c.get("decided_by", [])
        if not re.fullmatch(r"\d{4}-\d\d", id): out.append(f"{id!r} is no id")
        if missing := [k for k in ("document", "section", "claim", "verdict") if not c.get(k)]: out.append(f"{id} lacks {missing}")
        if c["verdict"] not in VERDICTS: out.append(f"{id}: {c['verdict']!r} is no verdict")
        if c["verdict"] in ("holds with correction", "wrong") and not c.get("correction"): out.append(f"{id} lacks its correction")
        if c["verdict"] == "not checkable here":
            if not c.get("reason") or by: out.append(f"{id} needs a reason, and nothing that decides it")
            continue
        if not by: out.append(f"{id}: nothing decides it")
        for place in by:
            if "::" in place:
                path, function = place.split("::")
                if function not in functions_of(TOP/path): out.append(f"{id}: there is no {place}")
            elif place not in [notebook for notebook, _ in cells.get(id, [])]: out.append(f"{id}: no cell of {place} says that it decides it")
    for id, places in cells.items():
        for notebook, source in places:
            if id not in known: out.append(f"{notebook} decides {id}, which is not in the ledger")
            elif notebook not in known[id].get("decided_by", []) and notebook not in MOVING: out.append(f"{notebook} decides {id}, but the ledger does not name it")
            if not asserts(source): out.append(f"{notebook}: the cell that decides {id} asserts nothing")
    return out

def test_each_claim_is_decided_and_each_deciding_cell_is_in_the_ledger():
    claims = load("claims.yaml")
    assert len(claims) >= 100
    assert faults(claims, deciding_cells()) == []
    assert not [c["id"] for c in claims if "provisional" in c]

@pytest.mark.parametrize("harm", ["cell gone", "assert gone", "unknown id", "not named", "twice", "no correction", "no verdict", "no test", "no reason"])
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

@pytest.mark.parametrize("path", [p for p in TEACHING if f"nbs/{p.name}" not in MOVING], ids=lambda p: p.stem)
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
    for section in ("Summary", "Context", "Method", "Findings", "Analysis", "Recommendations", "Open questions"): assert f"\n## {section}\n" in body, f"{path.name}: {section}"
    for f in meta["files"] if path.name != "TEMPLATE.md" else []: assert (TOP/f).exists(), f"{path.name} names {f}"

def printed(notebook):
    "All that a notebook's cells print or show as text."
    outs = [o for c in code_cells(notebook.resolve()) for o in c.outputs]
    return "\n".join(o.get("text") or "\n".join(str(v) for k, v in o.get("data", {}).items() if k.startswith("text/")) for o in outs)

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
    for status, n in Counter(q["status"] for q in load("open_questions.yaml")).items(): assert re.search(rf"^{status}: {n}$", shown, re.M), status
