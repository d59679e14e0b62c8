"What Colab runs, as far as it runs without Colab."

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import nbformat
import pytest
import warm

from grpo_chess.config import preset
from grpo_chess.front import begin_or_resume
from grpo_chess.panel import read_metrics
from grpo_chess.settings import ConfigError

TOP = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("quick_pictures")
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


def test_a_repository_that_cannot_be_fetched_is_said_in_a_line(tmp_path):
    cell = badges.source(TOP / "nbs/03_loss.ipynb").replace('"google.colab" in str(get_ipython())', "True")
    cell = cell.replace("/content", str(tmp_path)).replace("https://github.com", "file:///nowhere")
    said = in_ipython(cell, tmp_path)
    assert "ends in" not in said.stdout and "set user in settings.ini, then type: make export" in said.stdout
    assert "grpo_chess/.ci/colab" not in said.stdout + said.stderr and not [*tmp_path.iterdir()]


def test_the_folded_cell_does_nothing_elsewhere(tmp_path):
    said = in_ipython(badges.source(TOP / "nbs/03_loss.ipynb"), tmp_path)
    assert said.stdout.strip() == f"ends in {tmp_path}" and not [*tmp_path.iterdir()]


def test_every_page_has_the_same_cell():
    for path in badges.PAGES:
        cells = [c for c in nbformat.read(path, 4).cells if c.get("id") == badges.CELL]
        assert [c.source for c in cells] == [badges.source(path)], path


# A run that is begun and resumed by running the same cell again

def small(out, **changes):
    return preset("scratch", **dict(reward=dict(judge="material"), positions=dict(window_cp=0), accelerator="cpu",
                                    model=dict(width=32, layers=2, heads=2), match=dict(games=0), out=str(out),
                                    name="n", sampler=dict(boards=4, group=4, plies=2),
                                    trainer=dict(steps=4, checkpoint_every=2)) | changes)


def test_the_same_cell_begins_a_run_and_goes_on_with_it(tmp_path):
    short = small(tmp_path, trainer=dict(steps=2, checkpoint_every=2))
    first = begin_or_resume(short, quiet=True)
    again = begin_or_resume(small(tmp_path), quiet=True)
    assert first.folder == again.folder and [r["step"] for r in again.rows] == [0, 1, 2, 3]


def test_another_run_is_refused_and_one_that_hardly_began_begins_again(tmp_path):
    with pytest.raises(ConfigError, match="needs a name"):
        begin_or_resume(small(tmp_path, name=""))
    begin_or_resume(small(tmp_path), quiet=True)
    with pytest.raises(ConfigError, match=r"n began with seed = 0, and this is 1: choose another name"):
        begin_or_resume(small(tmp_path, seed=1), quiet=True)
    shutil.rmtree(tmp_path / "n/checkpoint")
    (tmp_path / "n/metrics.jsonl").write_text("")
    assert len(begin_or_resume(small(tmp_path), quiet=True).rows) == 4


# The whole page, cell by cell, in a stand-in: google.colab is a stub, and a folder is Drive

STAND_IN = '''
import os, signal, sys, types
from pathlib import Path
import nbformat
from IPython.core.interactiveshell import InteractiveShell

content, page, secret = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
colab = types.ModuleType("google.colab")
def mount(path):
    (Path(path)/"MyDrive").mkdir(parents=True, exist_ok=True)
def get(name):
    if secret == "none": raise KeyError(name)
    return secret
colab.drive = types.SimpleNamespace(mount=mount)
colab.output = types.SimpleNamespace(enable_custom_widget_manager=lambda: print("widgets enabled"))
colab.userdata = types.SimpleNamespace(get=get)
sys.modules |= {"google": types.ModuleType("google"), "google.colab": colab}

class Shell(InteractiveShell):
    def __str__(self): return "<google.colab._shell.Shell object>"

TOY = {"reward.judge": "material", "positions.window_cp": 0, "match.games": 0, "accelerator": "cpu",
       "sampler.boards": 4, "sampler.plies": 2, "trainer.steps": 8, "trainer.precision": "32-true"}
shell = Shell.instance()
os.chdir(content)
for cell in nbformat.read(page, 4).cells:
    if cell.cell_type != "code" or cell.id == "colab": continue
    source = cell.source.replace("/content", str(content)).replace("CHANGES = {}", f"CHANGES = {TOY} | {sys.argv[4]}")
    source = source.replace('"weak:level=0"', '"random"').replace("GAMES = 200", "GAMES = 20")
    result = shell.run_cell(source)
    if result.error_in_exec or result.error_before_exec:
        print("CELL FAILED:", result.error_in_exec or result.error_before_exec, file=sys.stderr)
        sys.exit(1)
print("PAGE DONE", shell.user_ns["result"].why)
'''


def begin_on_colab(content, changes="{}"):
    "A process that runs the page, and where it writes what it says."
    content.mkdir(exist_ok=True)
    folder = content.parent / f"session{len([*content.parent.glob('session*')])}"
    folder.mkdir()
    (folder / "stand_in.py").write_text(STAND_IN)
    env = warm.ENV | dict(PYTHONPATH=f"{TOP}:{folder}", MPLBACKEND="Agg")
    args = content, TOP / "nbs/colab.ipynb", "none", changes
    return warm.begin("stand_in", *args, folder=folder, env=env), folder


def on_colab(content, changes="{}"):
    "What the page said, to its end."
    process, folder = begin_on_colab(content, changes)
    process.join(500)
    assert process.exitcode is not None, "the page did not end"
    return [(folder / stream).read_text() for stream in ("out", "err")]


def rows_of(content):
    path = content / "drive/MyDrive/grpo_chess/runs/first/metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [{k: v for k, v in r.items() if "seconds" not in k and k != "judged"} for r in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    content = tmp_path_factory.mktemp("colab") / "content"
    out, err = on_colab(content)
    assert "PAGE DONE All 8 steps were done." in out, out + err
    assert "widgets enabled" in out and "no GPU; the run first has the preset tiny" in out
    return rows_of(content)


def test_a_session_that_is_killed_goes_on_when_all_cells_run_again(tmp_path, unbroken):
    content = tmp_path / "content"
    session, _ = begin_on_colab(content, changes='{"trainer.checkpoint_every": 2}')
    until = time.monotonic() + 300
    while len(rows_of(content)) < 5 and session.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    session.kill()
    session.join()
    assert 5 <= len(rows_of(content)) < 8, "it was not killed in the middle"
    out, err = on_colab(content, changes='{"trainer.checkpoint_every": 2}')
    assert "PAGE DONE All 8 steps were done." in out, out + err
    assert rows_of(content) == unbroken
    drive = content / "drive/MyDrive/grpo_chess/runs/first"
    assert {"report.md", "report.png", "model.safetensors", "config.yaml"} <= {p.name for p in drive.iterdir()}


def test_a_drive_that_vanished_costs_one_line_and_nothing_else(tmp_path, unbroken):
    content = tmp_path / "content"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom grpo_chess import train\nreal, calls = train.save_checkpoint, []\n"
        "def save(*args):\n    calls.append(1)\n    if len(calls) < 3: return real(*args)\n"
        "    raise OSError(107, 'Transport endpoint is not connected')\ntrain.save_checkpoint = save\n")
    gone = 'exec(open("%s").read()) or {"trainer.checkpoint_every": 2}' % (tmp_path / "sitecustomize.py")
    out, err = on_colab(content, changes=f"({gone})")
    said = " ".join((out + err).split())
    assert "cannot be reached (Transport endpoint is not connected). Nothing that was saved is lost: run all" in said
    assert "PAGE DONE" not in out and "Traceback" not in said and len(rows_of(content)) >= 4
    out, err = on_colab(content, changes='{"trainer.checkpoint_every": 2}')
    assert "PAGE DONE" in out and rows_of(content) == unbroken


def test_the_key_of_w_and_b_comes_from_colabs_secrets(tmp_path):
    page = nbformat.read(TOP / "nbs/colab.ipynb", 4)
    cell = next(c.source for c in page.cells if "userdata" in c.source)
    assert cell.startswith("if TRACK and ON_COLAB:")
    for secret, key, said in (("k" * 40, "k" * 40, ""), ("none", None, "is tracked offline")):
        env = {}

        def get(name, secret=secret):
            if secret == "none":
                raise KeyError(name)
            return secret
        module = types.SimpleNamespace(userdata=types.SimpleNamespace(get=get))
        fake = types.SimpleNamespace(environ=env)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setitem(sys.modules, "google.colab", module)
            exec(cell, dict(TRACK=True, ON_COLAB=True, os=fake))
        assert env.get("WANDB_API_KEY") == key and said in out.getvalue()
