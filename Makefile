PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
BIN = $(VENV)/bin
SEED ?= 0
# Installed first, since other packages would pull in another build. Set it to the build that fits your machine.
TORCH ?= torch==2.13.0
# Each test runs on one thread: a process a core, a file in one process.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

.PHONY: install install-bench demo test test-all campaign lint format bench bench-gate aot clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
	@echo "installed: call $(BIN)/fastgrpo, or activate the environment first: . $(BIN)/activate"

# TRL and what it takes to run it beside us; torchvision would break this project's own environment on a CPU torch.
install-bench: $(BENCH_VENV)/.installed

$(BENCH_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH_VENV)/bin/python -m pip install --quiet $(TORCH)
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BENCH_VENV)/bin/python -m pip install --quiet --no-deps torchvision==0.28.0
	touch $@

demo: install
	$(BIN)/fastgrpo demo --seed $(SEED)

test: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-all: install
	$(BIN)/python -m pytest $(PARALLEL)

# Kills, damaged files, full disks, dying ranks, schedules, a soak: some 40 minutes; CAMPAIGN_KILLS=48 makes it shorter.
CAMPAIGN ?= runs/campaign.json
CAMPAIGN_KILLS ?= 180
campaign: install
	rm -f $(CAMPAIGN)
	CAMPAIGN=$(CAMPAIGN) CAMPAIGN_KILLS=$(CAMPAIGN_KILLS) CAMPAIGN_SEED=$(SEED) \
	  $(BIN)/python -m pytest tests/campaign tests/fastgrpo/sampler/test_schedules.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# `make bench BENCH_FLAGS=--benchmark-autosave`, and after a change `make bench BENCH_FLAGS=--benchmark-compare`.
bench: install
	$(BIN)/python -m pytest bench --benchmark-only $(BENCH_FLAGS)

# Fails where our time against the reference's, both of this run, has grown beyond what bench/gate.py tolerates.
bench-gate: install
	mkdir -p runs
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json runs/bench.json $(BENCH_FLAGS)
	$(BIN)/python bench/gate.py runs/bench.json

# Registers, spills and tensor cores of every kernel, compiled for GPUs that need not be there.
aot: install
	$(BIN)/python bench/aot.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
