# One word a task; each makes .venv and installs what it needs, once. `make help` lists them.
#
#   make demo WORKERS=4              variables can be set on the command line
#   make test PYTHON=python3.12
#   make test COVERAGE=1             also says which lines no test ran
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     a Linux machine without a GPU: 200 MB instead of GB

VENV        := .venv
BIN         := $(VENV)/bin
WORKERS     ?= 2
TORCH       := torch==2.13.0
TORCH_INDEX ?=
PYTEST_ARGS ?=
COVERAGE    ?=

# The first of these that runs and is new enough; PYTHON=... chooses another.
CANDIDATES  := python3 python3.11 python3.12 python3.13 python3.14 python
IS_NEW      := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON      ?= $(shell for one in $(CANDIDATES); do if $$one $(IS_NEW) >/dev/null 2>&1; then echo $$one; break; fi; done)

PIP         := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -c constraints.txt
# The processes that tests start read compiled sources, even where a machine's habit is to write none.
PYTEST      := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
TOOLS       := vllm llama_cpp diffusers mlx torchtune
QUICK       := not slow and not gpu and not browser $(foreach tool,$(TOOLS),and not $(tool))
PARALLEL    := -n $(WORKERS) --dist worksteal
COVERED     := $(if $(COVERAGE),--cov --cov-report=term:skip-covered)
BENCHES     := $(filter-out bench/__init__.py bench/common.py bench/numbers.py,$(wildcard bench/*.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all check format bench docs clean

help: ## what each word does
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

demo: $(VENV)/.demo ## fetch a real 135M model and data, fine-tune, merge, report: minutes, on two cores
	$(BIN)/gossamer fetch smollm2-135m reviews
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev ## the tests that need neither the real model nor a GPU
	$(PYTEST) $(PARALLEL) $(COVERED) -m "$(QUICK)"

test-all: $(VENV)/.dev ## every test that this machine can run
	@marks="slow or not slow"; \
	if ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	marks="($$marks) and not gpu"; echo "no CUDA device: tests marked gpu are left out"; fi; \
	for tool in $(TOOLS); do name=GOSSAMER_$$(echo $$tool | tr a-z A-Z); \
	if [ -z "$$(printenv $$name)" ]; then marks="($$marks) and not $$tool"; \
	echo "$$name names no interpreter or environment with $$tool: tests marked $$tool are left out"; fi; done; \
	set -x; $(PYTEST) $(PARALLEL) -m "$$marks"

check: $(VENV)/.dev ## lint, format, types and the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(PYTEST) $(PARALLEL) -m "$(QUICK)" tests/house

format: $(VENV)/.dev ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: $(VENV)/.bench ## measure; writes bench/results/*.json and docs/numbers.md
	@set -e; for file in $(BENCHES); do name=$$(basename $$file .py); echo "bench: $$name"; \
	$(BIN)/python -m bench.$$name --json bench/results/$$name.json; done
	$(BIN)/python -m bench.numbers

docs: $(VENV)/.lean ## regenerate the generated pages, check the links
	$(BIN)/python docs/build_pages.py

clean: ## remove the environment, caches and build leftovers; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. Each stamp is newer than the two files that say what to install; torch comes first so that
# nothing pulls another build of it.

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) $(IS_NEW) 2>/dev/null; then \
	echo "Gossamer needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
	echo "Install one and say which: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "Python could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.lean: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing gossamer into $(VENV): once, a few minutes"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) -e .
	@touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.lean
	@echo "installing what $* needs, once"
	@$(PIP) -e '.[$*]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@echo "installing what bench needs, once"
	@$(PIP) -e '.[bench]'
	@touch $@
