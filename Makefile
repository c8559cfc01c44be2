# Every target works on a machine that has only Python 3.11+ and make: it builds its own .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test lint dashboard lab docs calibrations clean

setup: $(VENV)/.ready

# torch comes first and alone, pinned: a CPU build serves, and an open range would fetch gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Workbench needs Python 3.11 or later; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.notebook: $(VENV)/.ready
	$(PIP) --editable '.[notebook]'
	touch $@

$(VENV)/.dashboard: $(VENV)/.ready
	$(PIP) --editable '.[dashboard]'
	touch $@

demo: setup
	$(BIN)/workbench demo

test: setup $(VENV)/.notebook $(VENV)/.dashboard
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.notebook $(VENV)/.dashboard
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

dashboard: $(VENV)/.dashboard
	$(BIN)/workbench dashboard

lab: $(VENV)/.notebook
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

# The notebooks as they look once they have run. It takes Chromium and, for the last one, its model (README, Notebooks).
docs: $(VENV)/.notebook
	$(BIN)/python docs/render.py

# What calibrated methods know of the built-in models; the files are part of the package.
calibrations: setup
	$(BIN)/python -m workbench.experiments.calibrate

clean:
	rm -rf $(VENV) build *.egg-info
