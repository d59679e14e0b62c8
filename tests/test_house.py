"""The house's rules for code and types, as ruff.toml and mypy.ini have them."""

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def said(*command):
    "Exit status and output of a tool, run in the top folder."
    run = subprocess.run([sys.executable, "-m", *command], cwd=TOP, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_code_keeps_the_rules():
    status, text = said("ruff", "check", "--no-cache", "--output-format", "concise", ".")
    assert status == 0, text[-3000:]


def test_package_has_types():
    status, text = said("mypy", "--cache-dir=/dev/null")
    assert status == 0, text[-3000:]


def test_modules_have_one_purpose():
    "No exported module above 520 lines."
    long = {p.name: n for p in (TOP / "grpo_chess").glob("*.py") if (n := len(p.read_text().splitlines())) > 520}
    assert set(long) <= {"_modidx.py"}, long
