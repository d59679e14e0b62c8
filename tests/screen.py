"""A screen that nobody sees, and xboard on it, played with a mouse. `make test-gui` installs what this needs."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PATH = os.environ.get("PATH", "") + ":/usr/games:/usr/local/games"
NEEDS = ("Xvfb", "xboard", "polyglot", "xdotool", "import")
ENGINE = f"{sys.executable} -m grpo_chess.play"
SQUARE, A1 = 50, (27, 464)      # pixels of a square of `-size 49`, and the middle of a1 in xboard's window


def missing():
    "What the tests on a screen would need and this machine lacks."
    return [name for name in NEEDS if not shutil.which(name, path=PATH)]


def wait_for(true, seconds, what):
    "What `true()` gives once it is true; AssertionError after some seconds."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen in {seconds} s")


class Screen:
    "A virtual screen; what is started on it ends with it."

    def __init__(self, folder):
        self.folder, self.children = folder, []
        self.env = os.environ | dict(PATH=PATH, HOME=str(folder), PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")

    def __enter__(self):
        reads, writes = os.pipe()
        server = ["Xvfb", "-displayfd", str(writes), "-screen", "0", "1000x490x24", "-nolisten", "tcp"]
        self.children.append(subprocess.Popen(server, env=self.env, pass_fds=(writes,), stderr=subprocess.DEVNULL))
        os.close(writes)
        with os.fdopen(reads) as display:
            self.env["DISPLAY"] = f":{display.readline().strip()}"
        return self

    def __exit__(self, *error):
        for child in reversed(self.children):
            child.terminate()
            child.wait(10)

    def start(self, *words):
        "Start a program on the screen."
        with (self.folder / "said.txt").open("w") as said:
            self.children.append(subprocess.Popen(list(map(str, words)), env=self.env, stdout=said, stderr=said))
        return self.children[-1]

    def xdotool(self, *words):
        done = subprocess.run(["xdotool", *map(str, words)], env=self.env, capture_output=True, text=True)
        return done.stdout.split()

    def window(self, title, seconds=30):
        "The window with this title, once there is one."
        find = ("search", "--onlyvisible", "--name", title)
        return wait_for(lambda: self.xdotool(*find), seconds, f"a window {title!r}")[0]

    def picture(self, path):
        "The whole screen as a PNG of 64 colours."
        few = ("+dither", "-colors", "64", f"png8:{path}")
        subprocess.run(["import", "-window", "root", *few], env=self.env, check=True)


class Xboard:
    "xboard with the engine, through polyglot, which translates UCI."

    def __init__(self, screen, *words, second=""):
        self.screen, self.log = screen, screen.folder / "polyglot.log"
        adapter = f'polyglot -noini -log true -lf {self.log} -ec "%fcp" -ed "%fd"'
        players = ["-fcp", ENGINE, "-fUCI", *(["-scp", second, "-sUCI"] if second else [])]
        look = ["-size", 49, "-showCoords", "true", "-animateMoving", "false", "-soundProgram", ""]
        self.process = screen.start("xboard", *players, "-adapterCommand", adapter, *look, *words)

    def heard(self, pattern):
        "What of the log of polyglot matches."
        return re.findall(pattern, self.log.read_text(errors="replace") if self.log.exists() else "")

    def play(self, window, move):
        "Click on a square, and on another."
        for square in (move[:2], move[2:]):
            x, y = A1[0] + SQUARE * (ord(square[0]) - ord("a")), A1[1] - SQUARE * (int(square[1]) - 1)
            self.screen.xdotool("mousemove", "--window", window, x, y, "click", 1)
            time.sleep(0.3)
