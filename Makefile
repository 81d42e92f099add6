# Every target makes its own virtual environment when there is none. PYTHON is the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# 'make test FILE=tests/test_bism.py' runs one file, 'ARGS="-k name"' and the like go to pytest.
FILE ?=
ARGS ?=

.PHONY: demo test test-slow test-lowest test-newest smoke lint docs look release publish bench metrics clean
.DEFAULT_GOAL := test

# Tests keep their compiled programs outside the clone: right when there are none, two to ten times as fast when there are. Strings
# hash alike in every run because NumPyro lowers a model in the order of a set: else the same test would be another program. The
# folder is that of one kind of processor, for which the programs were compiled.
PROCESSOR := $(shell (grep -m 1 -e ^flags -e ^Features /proc/cpuinfo || sysctl -n machdep.cpu.brand_string) 2>/dev/null | cksum | cut -d ' ' -f 1)
XLA_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/numpyro_ebm/xla/$(PROCESSOR)
test test-slow test-lowest test-newest smoke: export PYTHONHASHSEED := 0
test test-slow test-lowest test-newest smoke: export JAX_COMPILATION_CACHE_DIR := $(XLA_CACHE)
test test-slow test-lowest test-newest smoke: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test test-slow test-lowest test-newest smoke: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1
# JAX 0.10.1 complains of every program that it reads from there.
test test-slow test-lowest test-newest smoke: export TF_CPP_MIN_LOG_LEVEL := 3
# Most tests compile longer than they run. Those of numbers that are the same bit for bit are compiled as for users (tests/conftest.py).
test test-lowest test-newest smoke: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1

# The programs that were used last are kept, about half a gigabyte. JAX's own bound reads the whole folder for each new one.
.PHONY: trim-cache
trim-cache:
	@mkdir -p $(XLA_CACHE) && cd $(XLA_CACHE) && ls -tu | tail -n +40001 | xargs rm -f

# One stamp per extra: installing is skipped while pyproject.toml is older than it.
$(VENV)/.installed-%: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install it, or run 'make PYTHON=/path/to/python3'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Run 'make PYTHON=/path/to/python3'."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is needed (on Debian: apt-get install python3-venv)."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/energy_prior_digits.py

test: $(VENV)/.installed-dev trim-cache
	$(PYTEST) $(or $(FILE),-n 2) $(ARGS)

test-slow: $(VENV)/.installed-dev trim-cache
	$(PYTEST) $(or $(FILE),-n 2) -m slow $(ARGS)

# A part of the tests, on the lowest versions that pyproject.toml declares and on the newest Python and packages there are.
test-lowest test-newest: test-%: trim-cache
	.ci/test_versions $*

# Every example and benchmark, made small.
smoke: $(VENV)/.installed-dev trim-cache
	printf '%s\n' examples/*.py benchmarks/*.py | BIN=$(BIN) xargs -P 2 -I {} .ci/smoke {}

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# How the code is built, in numbers, beside the packages that it is measured against.
metrics: $(VENV)/.installed-dev
	$(BIN)/python .ci/metrics.py

docs: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/sphinx-build -W --keep-going -q -j 2 -b html docs docs/_build/html
	@echo "The documentation is at docs/_build/html/index.html."

# Every page in a browser: what overflows, is missing or fails.
look: $(VENV)/.installed-look docs
	$(BIN)/python .ci/look.py

# The package as a release would be: built, checked, and installed in a clean environment. Nothing is uploaded.
release: $(VENV)/.installed-release
	$(BIN)/python .ci/release.py

# The documentation laid out as it is published, in TO, a checkout of the branch that holds it (CONTRIBUTING.md). Nothing is uploaded.
publish: docs
	$(BIN)/python .ci/publish.py $(or $(TO),$(error say where: make publish TO=FOLDER))

bench: $(VENV)/.installed-examples
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/choosing.py
	$(BIN)/python benchmarks/device.py
	$(BIN)/python benchmarks/negative_phase.py
	$(BIN)/python benchmarks/mode_weights.py
	$(BIN)/python benchmarks/particle_mmle.py
	$(BIN)/python benchmarks/score_objectives.py
	$(BIN)/python benchmarks/bism.py
	$(BIN)/python benchmarks/hypergradient_bias.py
	$(BIN)/python benchmarks/vages.py
	$(BIN)/python benchmarks/vages_bias.py
	$(BIN)/python benchmarks/bidvl.py
	$(BIN)/python benchmarks/ksd_test.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/report_table.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/fit.py --scaling --figure docs/_static/scaling.png
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest docs/_build
