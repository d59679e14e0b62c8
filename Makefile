# make train   trains a small policy against Stockfish and reports what changed (ARGS="--preset record ..." for more)
# make test    runs all tests and all notebooks
# make export  after editing a notebook: clean it, export the library, refresh the README
# All make .venv (PYTHON=python3.12 chooses the interpreter), install what constraints.txt pins and find or install Stockfish, once.

SHELL := /bin/bash
PY := .venv/bin/python
export PYTHON
# threads that wait should not spin: costs nothing on an idle machine, and a third of the time on a busy one
export OMP_WAIT_POLICY ?= passive
ARGS ?=

.PHONY: train test export engine

train: .venv/.ready engine
	$(PY) -m grpo_chess.train $(ARGS)

test: .venv/.ready engine
	$(PY) -m pytest tests $(ARGS)

export: .venv/.ready
	for f in nbs/*.ipynb nbs/experiments/*.ipynb; do .venv/bin/nbdev_clean --fname $$f; done
	$(PY) .ci/clean.py nbs/*.ipynb nbs/experiments/*.ipynb
	.venv/bin/nbdev_export
	$(PY) .ci/readme.py

# The interpreter of .venv counts as a source, so that an environment broken by an upgrade is made anew.
.venv/.ready: constraints.txt settings.ini setup.py $(wildcard .venv/bin/python)
	@.ci/setup env
	@touch $@

engine: .venv/.ready
	@.ci/setup engine
