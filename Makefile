# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own .venv when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `make test EXTRAS=dev,integrations` also installs PyTorch and what is built on it, and runs their tests.
EXTRAS ?= dev
comma := ,
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))
PYTEST := $(BIN)/python -m pytest --dist loadscope --no-loadscope-reorder
# In several processes: few tests use more than one core. What they compile is small and runs seldom: to optimize it
# takes longer than it saves. The slow tests compile as users do.
FAST_TESTS := XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(PYTEST) --numprocesses auto --maxprocesses 4

.PHONY: setup demo test test-slow test-lowest lint docs coverage release-check bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(READY)
	$(BIN)/metatrain run configs/demo.yaml --out runs/demo
	$(BIN)/metatrain evaluate runs/demo/optimizer configs/demo.yaml --horizons 10,30,100 --out runs/demo/evaluation

test: $(READY)
	$(FAST_TESTS)

# In two: those that start clusters, which kill processes and wait for what happens, and beside them the others.
test-slow: $(READY)
	$(PYTEST) -m slow --numprocesses 2

# With the lowest versions that pyproject.toml allows, in an environment of its own: what people install and import.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest tests/l3rs/io tests/l3rs/test_hostile_checkpoints.py tests/l3rs/test_imports.py \
		tests/l3rs/test_without_jax.py tests/l3rs/optimizer tests/l3rs/test_guard.py tests/l3rs/test_layers.py \
		tests/l3rs/baselines tests/metatrain/test_rollout.py tests/metatrain/test_trainer.py

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install -qq uv
	VIRTUAL_ENV=$(LOWEST) $(LOWEST)/bin/uv pip install --quiet --resolution lowest-direct --editable '.[dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site; its pages need no network. Every link within it is followed.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tools/site/check_links.py build/site

# What share of the lines of l3rs, tasks and metatrain the fast tests run, also in processes that they start.
coverage:
	$(MAKE) setup EXTRAS=$(EXTRAS),release
	$(FAST_TESTS) --cov --cov-report=term --cov-report=html:build/coverage

# Builds the last commit, installs it with every Python that is here, and uses it; `make release-check ARGS=--help`.
release-check:
	$(MAKE) setup EXTRAS=$(EXTRAS),release
	$(BIN)/python -m tools.release_check $(ARGS)

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf runs/demo .cache
