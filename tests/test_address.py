"""Where the repository lives stands in settings.ini and nowhere else: a fork sets it there, types `make export`, and
badges, Colab cells and the package's own description follow."""

import re
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import nbformat
import pytest

TOP = Path(__file__).resolve().parent.parent
BADGED = re.compile(r"colab.research.google.com/github/([^\s)]+)/blob/([^/]+)/(\S+\.ipynb)")
EARLIER = "noamdwc/grpo_chess"  # the project that this one began from


def files(top):
    "Text of every file that git would keep, by its name."
    said = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP, capture_output=True, text=True)
    paths = [name for name in said.stdout.splitlines() if (top / name).is_file()]
    return {name: (top / name).read_bytes().decode("utf-8", "ignore") for name in paths}


def run(folder, *command):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    "A copy that somebody has made their own, as CONTRIBUTING.md says."
    folder = tmp_path_factory.mktemp("fork") / "copy"
    for name in files(TOP):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, folder / name)
    text = (folder / "settings.ini").read_text()
    for key, value in (("user", "some-body"), ("repo", "my-chess"), ("branch", "trunk")):
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.M)
        assert found == 1, f"{key} stands {found} times in settings.ini"
    (folder / "settings.ini").write_text(text)
    run(folder, ".ci/badges.py")
    return folder


def test_make_export_does_what_the_fork_needs():
    rule = re.search(r"^export:.*\n((?:\t.*\n)+)", (TOP / "Makefile").read_text(), re.M)
    assert ".ci/badges.py" in rule.group(1) and "nbdev_export" in rule.group(1)
    told = (TOP / "CONTRIBUTING.md").read_text()
    assert "`user`" in told and "make export" in told


def test_every_badge_and_cell_of_a_fork_leads_to_the_fork(fork):
    run(fork, ".ci/badges.py", "--check")
    for path in (fork / "nbs").rglob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for repository, branch, page in BADGED.findall(nb.cells[0].source):
            assert (repository, branch) == ("some-body/my-chess", "trunk") and (fork / page) == path
        for cell in nb.cells:
            if cell.get("id") == "colab":
                assert "-b trunk https://github.com/some-body/my-chess\n" in cell.source


def test_nothing_of_the_old_address_is_left(fork):
    "Other than badges, cells and nbdev's index, nothing changes; nothing names another place of this repository."
    before, after = files(TOP), files(fork)
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"settings.ini"} <= {n for n in before if n.endswith(".ipynb")}
    old = re.compile(r"github\.com/(?:github/)?[\w.-]+/grpo_chess|OWNER\.github|(?:github|com)/OWNER|example\.org")
    for name, text in after.items():
        if not name.startswith("tests/") and name != "grpo_chess/_modidx.py":  # the index is written from settings.ini
            found = {f for f in old.findall(text) if EARLIER not in f}
            assert not found, (name, found)


@pytest.mark.parametrize("mine", [False, True])
def test_the_package_names_an_address_only_if_there_is_one(fork, tmp_path, mine):
    source = fork if mine else TOP
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE"):
        shutil.copy(source / name, tmp_path / name)
    (tmp_path / "grpo_chess").mkdir()
    (tmp_path / "grpo_chess/__init__.py").write_text("")
    run(tmp_path, "setup.py", "-q", "egg_info")
    said = Parser().parsestr((tmp_path / "grpo_chess.egg-info/PKG-INFO").read_text()).get_all("Project-URL") or []
    unset = re.search(r"^user = OWNER$", (source / "settings.ini").read_text(), re.M)
    assert bool(said) != bool(unset)
    assert not mine or "Source, https://github.com/some-body/my-chess" in said
