"What Colab runs, as far as it runs without Colab."

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat

TOP = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("badges", TOP / ".ci/badges.py")
badges = importlib.util.module_from_spec(spec)
spec.loader.exec_module(badges)


def in_ipython(code, folder):
    "What a notebook's cells print, one process for all of them."
    script = "from IPython.core.interactiveshell import InteractiveShell as S; import sys, os\ns = S.instance()\n"
    script += f"for _ in range(2): s.run_cell({code!r}).raise_error()\nprint('ends in', os.getcwd())"
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)


def test_the_folded_cell_fetches_the_repository_once_and_goes_to_the_page(tmp_path):
    name, origin = badges.settings()["repo"], tmp_path / "origin" / badges.settings()["repo"]
    (origin / ".ci").mkdir(parents=True)
    (origin / "nbs/findings").mkdir(parents=True)
    (origin / "nbs/findings/x").write_text("")
    (origin / ".ci/colab").write_text('echo installed >> "$(dirname "$0")/../../log"\n')
    for command in (["init", "-q", "-b", badges.settings()["branch"]], ["add", "."],
                    ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    s, content = badges.settings(), tmp_path / "content"
    content.mkdir()
    cell = badges.source(TOP / "nbs/findings/clip_fraction.ipynb")
    for here, there in (('"google.colab" in str(get_ipython())', "True"), ("/content", str(content)),
                        (f"https://github.com/{s['user']}/{s['repo']}", f"file://{origin}")):
        assert here in cell
        cell = cell.replace(here, there)
    said = in_ipython(cell, tmp_path)
    assert f"ends in {content}/{name}/nbs/findings" in said.stdout, said.stdout + said.stderr
    assert (content / "log").read_text() == "installed\n" * 2


def test_the_folded_cell_does_nothing_elsewhere(tmp_path):
    said = in_ipython(badges.source(TOP / "nbs/03_loss.ipynb"), tmp_path)
    assert said.stdout.strip() == f"ends in {tmp_path}" and not [*tmp_path.iterdir()]


def test_every_page_has_the_same_cell():
    for path in badges.PAGES:
        cells = [c for c in nbformat.read(path, 4).cells if c.get("id") == badges.CELL]
        assert [c.source for c in cells] == [badges.source(path)], path
