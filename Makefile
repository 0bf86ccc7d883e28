# Every target does its own set-up: a virtual environment in .venv and, where that is allowed, missing system packages.
# PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
SKIALITH_CHAOS_ROUNDS ?= 20
SKIALITH_CHAOS_SECONDS ?= 3600
# The tests wait more than they compute, and each process has servers of its own.
TEST_PROCESSES ?= 3

export PYTHON
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
COMPILED := skialith._fastpath skialith._rows skialith.wal._link skialith.wal._promise skialith.wal._protocol skialith.wal._waiting skialith.wal._wire
SOURCES := pyproject.toml setup.py $(wildcard skialith/*.p[yx][xd] skialith/wal/*.p[yx][xd]) scripts/setup.sh

.DEFAULT_GOAL := help
.PHONY: help demo test test-store store-url lint chaos chaos-long asan bench clean

help:  ## say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.ready-demo  ## kill an agent in the middle of a step, resume it, and count what is left (needs no database)
	@$(BIN)/skialith demo

test: .venv/.ready-dev  ## run every test, with a short run of the chaos tests
	@$(PYTEST) -n $(TEST_PROCESSES) --dist worksteal

test-store: store-url .venv/.ready-dev  ## run the store's tests on SKIALITH_TEST_DATABASE_URL (MySQL, TiDB, ...), whose Skialith tables they drop
	@$(PYTEST) $(addprefix tests/conformance/test_,store.py store_graphs.py lists.py steps.py processes.py) -k mysql

store-url:
	@test -n "$$SKIALITH_TEST_DATABASE_URL" || \
		{ echo "test-store: set SKIALITH_TEST_DATABASE_URL=mysql://user:password@host:port/database to a database of its own" >&2; exit 2; }

lint: .venv/.ready-dev  ## check style, types, import directions and the compiled modules' stubs
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import-linter"
	@$(BIN)/lint-imports --no-cache
	@echo "==> stubtest"
	@$(BIN)/python -m mypy.stubtest $(COMPILED) --mypy-config-file pyproject.toml

chaos: .venv/.ready-dev asan  ## run the chaos tests SKIALITH_CHAOS_ROUNDS times (default 20); each prints its SKIALITH_CHAOS_SEED
	@SKIALITH_CHAOS_ROUNDS=$(SKIALITH_CHAOS_ROUNDS) $(PYTEST) -m chaos -rA --timeout 3600

chaos-long: .venv/.ready-dev  ## one hour (SKIALITH_CHAOS_SECONDS) of mixed load with a fault every two seconds, judged once a minute
	@SKIALITH_CHAOS_SECONDS=$(SKIALITH_CHAOS_SECONDS) $(PYTEST) tests/chaos/test_endurance.py -s

bench: .venv/.ready-bench  ## measure everything beside its floor or ceiling: tables, JSON and a chart (SKIALITH_BENCH_SCALE=0.2 for a short look)
	@mkdir -p .benchmarks
	@$(PYTEST) bench --benchmark-json=.benchmarks/bench.json --chart=.benchmarks/bench.svg

asan: .venv/.ready-dev  ## run the fuzz tests on modules that are compiled with the address and undefined-behaviour sanitizers
	@SKIALITH_CHAOS_ROUNDS=$(SKIALITH_CHAOS_ROUNDS) scripts/asan.sh

clean:  ## remove what was built, .venv included; data in .skialith stays
	@echo "==> removing .venv, builds and caches"
	@rm -rf .venv build dist skialith.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache \
		sdk/typescript/node_modules sdk/typescript/dist sdk/typescript/build
	@rm -f skialith/*.c skialith/wal/*.c skialith/*.so skialith/wal/*.so
	@rm -rf sdk/typescript/node_modules sdk/typescript/dist sdk/typescript/build
	@find skialith tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready-demo: $(SOURCES)
	@scripts/setup.sh demo

.venv/.ready-dev: $(SOURCES)
	@scripts/setup.sh dev

.venv/.ready-bench: $(SOURCES)
	@scripts/setup.sh bench
