"A process of the tests that is forked begins as a new interpreter does."

import json
import os

import nbformat
import pytest
import warm
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ASK = """
import json, os, sys
ours = [name for name in sys.modules if name.split(".")[0] in ("grpo_chess", "warm", "pytest", "conftest")]
print(json.dumps(dict(ours=ours, name=__name__, args=sys.argv[1:], cwd=os.getcwd(), x=os.environ.get("X"),
                      names=len(os.environ), tests=[p for p in sys.path if p.endswith("tests")])))
print("and this", file=sys.stderr)
sys.exit(3)
"""


def test_it_has_its_own_words_and_nothing_of_the_tests(tmp_path, monkeypatch):
    (tmp_path / "ask.py").write_text(ASK)
    monkeypatch.setenv("X", "of the tests")
    done = warm.command("ask", "--a", 1, env={"X": "its own", "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr == "and this\n"
    assert json.loads(done.stdout) == dict(ours=[], name="__main__", args=["--a", "1"], cwd=str(tmp_path), x="its own",
                                           names=2, tests=[])


def test_an_error_ends_it_with_its_traceback(tmp_path):
    (tmp_path / "fails.py").write_text("1/0")
    done = warm.command("fails", cwd=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and not done.stdout


def test_it_can_be_killed(tmp_path):
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(1000)")
    process = warm.begin("sleeps", folder=tmp_path, cwd=tmp_path)
    process.kill()
    process.join(30)
    assert process.exitcode == -9


def cells(*sources):
    "A page of these cells."
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_a_kernel_has_torch_and_nothing_of_ours_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(warm.TOP))
    page = cells("import os, sys; print('torch' in sys.modules, 'grpo_chess' in sys.modules, os.getcwd())",
                 "from matplotlib import pyplot as plt; import grpo_chess; plt.plot([1, 2]); plt.show()", "1/0")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"), warm.kernels():
        NotebookClient(page, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert page.cells[0].outputs[0].text == f"True False {tmp_path}\n"
    assert "image/png" in page.cells[1].outputs[-1].data


def test_a_kernel_ends_when_it_is_told_to():
    with warm.kernels():
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
        pid = manager.provisioner.pid
        manager.shutdown_kernel(now=True)
    with pytest.raises(ProcessLookupError): os.kill(pid, 0)
