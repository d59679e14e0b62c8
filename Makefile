# make train   trains a small policy against Stockfish and reports what changed (ARGS="--preset record ..." for more)
# make test    runs all tests and all notebooks
# make test-browser  opens the pages in JupyterLab and a headless Chromium and moves every slider; installs Chromium if there is none
# make test-gui  plays against the engine in xboard on a virtual screen; installs xboard and the screen if there are none
# make docs    builds the site in _docs from the stored notebooks; nothing is executed, and after the first time nothing is fetched
# make export  after editing a notebook: clean it, export the library, refresh the README
# All make .venv (PYTHON=python3.12 chooses the interpreter), install what constraints.txt pins and find or install Stockfish, once.

SHELL := /bin/bash
PY := .venv/bin/python
export PYTHON
# Threads that wait spin for a moment, then sleep. Seconds a step of the default run on two cores, idle and beside one busy process:
# libgomp's own choice 1.0 and 34, no spinning (OMP_WAIT_POLICY=passive) 1.3 to 1.7 and 1.6, this 1.1 to 1.3 and 2.0.
# The package and the environment set it too (grpo_chess/__init__.py, .ci/setup): here it is for whatever make starts.
export GOMP_SPINCOUNT ?= 1000
ARGS ?=

.PHONY: train test test-browser test-gui docs export engine browser gui

train: .venv/.ready engine
	$(PY) -m grpo_chess.train $(ARGS)

test: .venv/.ready engine
	$(PY) -m pytest tests $(ARGS)

test-browser: .venv/.ready engine browser
	ALL_PAGES=1 $(PY) -m pytest tests/test_browser.py tests/test_board_browser.py tests/test_live_browser.py -n 0 $(ARGS)

test-gui: .venv/.ready gui
	$(PY) -m pytest tests/test_gui.py -n 0 -rs $(ARGS)

docs: .venv/.ready
	@.ci/setup docs
	$(PY) .ci/site.py _docs

export: .venv/.ready
	$(PY) .ci/badges.py
	for f in nbs/*.ipynb nbs/*/*.ipynb; do .venv/bin/nbdev_clean --fname $$f; done
	$(PY) .ci/clean.py nbs/*.ipynb nbs/*/*.ipynb
	.venv/bin/nbdev_export
	$(PY) .ci/readme.py

# The interpreter of .venv counts as a source, so that an environment broken by an upgrade is made anew.
.venv/.ready: constraints.txt settings.ini setup.py .ci/setup $(wildcard .venv/bin/python)
	@.ci/setup env
	@touch $@

engine: .venv/.ready
	@.ci/setup engine

browser:
	@.ci/setup browser

gui:
	@.ci/setup gui
