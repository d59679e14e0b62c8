# make train   trains a small policy against Stockfish and reports what changed (ARGS="--preset record ..." for more)
# make test    runs all tests and all notebooks
# Both make .venv, install what is pinned in constraints.txt and find or install Stockfish, once.

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
# python3 if it is 3.11 or newer, else the first other one that is
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
ARGS ?=

.PHONY: train test engine export
.DELETE_ON_ERROR:

train: $(VENV)/.ready engine
	$(PY) -m grpo_chess.train $(ARGS)

test: $(VENV)/.ready engine
	$(PY) -m pytest tests $(ARGS)

# After editing a notebook: clean it, export the library, refresh the README.
export: $(VENV)/.ready
	cd nbs && for f in *.ipynb; do ../$(VENV)/bin/nbdev_clean --fname $$f; done
	$(VENV)/bin/nbdev_export
	$(PY) .ci/readme.py

$(VENV)/.ready: constraints.txt settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "grpo_chess needs Python 3.11 or newer. On Debian or Ubuntu type:  sudo apt-get install python3 python3-venv"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python cannot make virtual environments here. On Debian or Ubuntu type:  sudo apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV), once; this takes some minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	@# Without a GPU the CPU build of torch saves gigabytes; uv knows where it is kept. Where that fails, pip takes what it finds.
	@if nvidia-smi -L >/dev/null 2>&1; then $(PY) -m pip install --quiet -c constraints.txt torch; else \
	  $(PY) -m pip install --quiet uv && UV_HTTP_TIMEOUT=30 UV_HTTP_RETRIES=0 $(VENV)/bin/uv pip install --quiet --python $(PY) --torch-backend cpu -c constraints.txt torch 2>/dev/null \
	  || $(PY) -m pip install --quiet -c constraints.txt torch; fi
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Finds an engine as the package does, or installs the system's; says what to type where it may not.
engine: $(VENV)/.ready
	@$(PY) -c "from grpo_chess.engine import find_engine; find_engine()" 2>/dev/null || { \
	  echo "no Stockfish found; installing the system's package"; \
	  if ! command -v apt-get >/dev/null; then echo "Install Stockfish (for example:  brew install stockfish), or set STOCKFISH_PATH to its binary."; exit 1; \
	  elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq stockfish; \
	  elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo apt-get install -y -qq stockfish; \
	  else echo "I may not install it. Type:  sudo apt-get install stockfish"; exit 1; fi; } >&2
	@$(PY) -c "from grpo_chess.engine import find_engine; find_engine()"
