"A process of the tests that is forked begins as a new interpreter does."

import json

import warm

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
