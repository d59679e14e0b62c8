"""What `pip install` brings: the files, the commands and what the package says of itself."""

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import grpo_chess

TOP = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "wandb", "build", "dist", "*.egg-info", "__pycache__", "nbs", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy, so that nothing is left behind here; without the network."
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(TOP, folder / "source", ignore=NOT_COPIED)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


def part(wheel, ending):
    "The text of the one file of the wheel whose name ends like this."
    with zipfile.ZipFile(wheel) as files:
        (name,) = [n for n in files.namelist() if n.endswith(ending)]
        return files.read(name).decode()


def test_has_every_file_of_the_package(wheel):
    "Modules, configurations, weights, the mark that it has types: what git knows below grpo_chess, and no more."
    known = subprocess.run(["git", "ls-files", "grpo_chess"], cwd=TOP, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(wheel) as files:
        names = {n for n in files.namelist() if ".dist-info/" not in n}
    assert names == {*known.stdout.split()}
    for name in ("py.typed", "configs/tiny.yaml", "weights/tiny.safetensors", "play.py"):
        assert f"grpo_chess/{name}" in names
    assert wheel.stat().st_size < 16 << 20


def test_says_what_it_is(wheel):
    said = Parser().parsestr(part(wheel, ".dist-info/METADATA"))
    assert (said["Name"], said["Version"]) == ("grpo_chess", grpo_chess.__version__)
    assert said["License"] == "GPL-3.0-or-later" or said["License-Expression"] == "GPL-3.0-or-later"
    assert said["Requires-Python"] == ">=3.11" and said.get_payload().startswith("# grpo_chess")
    assert {*said.get_all("Provides-Extra")} == {"dev", "wandb", "notebooks", "docs", "ray"}
    assert part(wheel, "LICENSE").lstrip().startswith("GNU GENERAL PUBLIC LICENSE")
    needed = [Requirement(text) for text in said.get_all("Requires-Dist")]
    bare = {r.name for r in needed if r.marker is None}
    assert {"torch", "chess", "numpy"} < bare and not {"wandb", "nbdev", "jupyterlab", "sphinx"} & bare
    assert all(r.specifier for r in needed if r.marker is None), "a dependency without a lower bound"


def test_dev_is_all_extras(wheel):
    needed = [Requirement(t) for t in Parser().parsestr(part(wheel, ".dist-info/METADATA")).get_all("Requires-Dist")]

    def of(extra):
        return {r.name for r in needed if r.marker and r.marker.evaluate({"extra": extra})}

    assert of("wandb") == {"wandb"} and of("notebooks") and of("docs")
    assert of("wandb") | of("notebooks") | of("docs") <= of("dev") and "pytest" in of("dev")
    assert of("ray") == {"ray"} and "ray" not in of("dev")  # large, and for few: .ci/setup ray


def test_every_command_line_is_a_script(wheel):
    "Each module that `python -m` runs, and no other; each has a `main` that can be called."
    scripts = ConfigParser()
    scripts.read_string(part(wheel, ".dist-info/entry_points.txt"))
    lines = dict(scripts["console_scripts"])
    runs = {p.stem for p in (TOP / "grpo_chess").glob("*.py") if re.search(r"^if __name__ == ", p.read_text(), re.M)}
    assert {name.removeprefix("grpo-") for name in lines} == runs >= {"train", "arena", "pretrain", "play"}
    for name, target in lines.items():
        module, _, function = target.partition(":")
        assert name == f"grpo-{module.partition('.')[2]}" and callable(getattr(import_module(module), function))


def test_the_wheel_works_on_its_own(wheel, tmp_path):
    "Unpacked elsewhere, started elsewhere: its modules, its weights, its configurations."
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """import grpo_chess, pathlib
from grpo_chess import load, presets, preset
assert pathlib.Path(grpo_chess.__file__).parts[-3] == "site", grpo_chess.__file__
print(load("tiny").move("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"), *sorted(presets()))"""
    env = dict(PYTHONPATH=str(tmp_path / "site"), PATH="", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"tiny", "scratch"} < {*done.stdout.split()[1:]}


def test_what_is_installed_here_is_within_the_bounds(wheel):
    "And pinned: constraints.txt names every direct dependency, once."
    lines = [line.split("==") for line in (TOP / "constraints.txt").read_text().split() if "==" in line]
    pinned = {name.lower().replace("_", "-"): version for name, version in lines}
    assert len(pinned) == len(lines)
    for text in Parser().parsestr(part(wheel, ".dist-info/METADATA")).get_all("Requires-Dist"):
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": "dev"}):
            continue
        name = needed.name.lower().replace("_", "-")
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        assert needed.specifier.contains(pinned[name]), f"{text}: constraints.txt has {pinned[name]}"
        if "==" in str(needed.specifier) and not find_spec("nbdev"):  # what exports pages is not here, as on Colab
            continue
        assert needed.specifier.contains(metadata.version(name)), f"{text}: {metadata.version(name)} is installed"


def test_the_changelog_knows_the_version():
    text = (TOP / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(grpo_chess.__version__)}\b", text, re.M)
