# Every target makes its own virtual environment when there is none. PYTHON is the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow lint docs bench clean
.DEFAULT_GOAL := test

# One stamp per extra: installing is skipped while pyproject.toml is older than it.
$(VENV)/.installed-%: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install it, or run 'make PYTHON=/path/to/python3'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Run 'make PYTHON=/path/to/python3'."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is needed (on Debian: apt-get install python3-venv)."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/energy_prior_digits.py

test: $(VENV)/.installed-dev
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -n 2 --dist loadfile -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "The documentation is at docs/_build/html/index.html."

bench: $(VENV)/.installed-examples
	$(BIN)/python benchmarks/negative_phase.py
	$(BIN)/python benchmarks/particle_mmle.py
	$(BIN)/python benchmarks/score_objectives.py
	$(BIN)/python benchmarks/bism.py
	$(BIN)/python benchmarks/hypergradient_bias.py
	$(BIN)/python benchmarks/vages.py
	$(BIN)/python benchmarks/vages_bias.py
	$(BIN)/python benchmarks/bidvl.py
	$(BIN)/python benchmarks/ksd_test.py
	$(BIN)/python benchmarks/import_time.py

clean:
	rm -rf $(VENV) docs/_build
