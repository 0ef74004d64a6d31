# Every command of the project; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Index for the CPU build of torch; empty means the default of pip.
TORCH_INDEX ?=
MINUTES ?= 5
KILL ?= 0
ROUND_KIND ?= delta
CORPUS ?=
STATE ?= demo-state
PORT ?= 0
QUICK ?= 0
PROCESSES ?= 2

.PHONY: help setup check test test-asan demo bench-kernels bench-train bench-codecs bench-generate bench-curves bench-learning bench-learning-1m bench-leases bench-fleet bench-load wheel lock vendor clean format

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | \
	    awk -F ':.*## ' '{ printf "  %-18s %s\n", $$1, $$2 }'

setup: $(VENV)/.built ## Make .venv, install what is needed, build the extension

$(VENV)/.installed: ci/requirements.lock ci/after-torch.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --require-hashes -r ci/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --require-hashes --no-deps -r ci/after-torch.lock
	touch $@

SOURCES := setup.py pyproject.toml $(wildcard bitnet_ext/*.pyx bitnet_ext/*.pxi bitnet_ext/kernels_*.[ch])
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --no-deps --editable .
	touch $@

check: setup ## Lint, types and import rules: ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Tests of one file share what takes long to set up, so they stay together. Files start
# in their order by name: those of real processes, which take longest, come early. A
# process that crashes would crash again, so it is not started again.
test: setup ## Run every test: PROCESSES=2
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder \
	    --max-worker-restart 0

test-asan: setup ## Run the kernels' tests under AddressSanitizer and UBSan (needs gcc)
	@$(BIN)/python -m tests.sanitised

demo: setup ## Train on this machine: MINUTES=5 KILL=1 CORPUS=folder STATE=folder
	@$(BIN)/bitnet-coordinator demo --minutes $(MINUTES) --state $(STATE) \
	    --port $(PORT) --round-kind $(ROUND_KIND) $(if $(filter 1,$(KILL)),--kill) \
	    $(if $(CORPUS),--corpus $(CORPUS))

BENCH_OPTIONS := $(if $(filter 1,$(QUICK)),--quick)

bench-kernels: setup ## Time the kernels next to torch: QUICK=1 for a minute's worth
	@$(BIN)/python -m tests.bench.bench_kernels $(BENCH_OPTIONS)

bench-train: setup ## Time whole training steps next to torch: QUICK=1
	@$(BIN)/python -m tests.bench.bench_train $(BENCH_OPTIONS)

bench-codecs: setup ## Time packing and codecs next to memcpy: QUICK=1
	@$(BIN)/python -m tests.bench.bench_codecs $(BENCH_OPTIONS)

bench-generate: setup ## Time tokens of a text next to llama.cpp and torch: QUICK=1
	@$(BIN)/python -m tests.bench.bench_generate $(BENCH_OPTIONS)

bench-curves: setup ## Compare losses of 300 steps with plain PyTorch's: QUICK=1 for 60
	@$(BIN)/python -m tests.bench.curves $(BENCH_OPTIONS)

# Results of single runs stay here, so that a study that was broken off goes on.
RESULTS ?= bench-learning
SEEDS ?=

bench-learning: setup ## Simulate a fleet next to one worker: SEEDS="100 101" CORPUS=folder QUICK=1
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.sim.bench_learning $(BENCH_OPTIONS) \
	    --seeds "$(SEEDS)" --corpus "$(CORPUS)" --results "$(RESULTS)"

bench-learning-1m: setup ## The same with 1.4 M parameters, for hours; goes on where it stopped
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.sim.bench_learning $(BENCH_OPTIONS) \
	    --large --seeds "$(SEEDS)" --corpus "$(CORPUS)" --results "$(RESULTS)"

bench-leases: setup ## Simulate leases, task sizes and verdicts of a fleet: QUICK=1
	@$(BIN)/python -m tests.sim.bench_leases $(BENCH_OPTIONS)

# Without MINUTES the benchmark takes its own default, not the demo's.
bench-fleet: setup ## Train with 1 and 2 workers next to plain loops: MINUTES=10 CORPUS=folder QUICK=1
	@$(BIN)/python -m tests.bench.bench_fleet $(BENCH_OPTIONS) \
	    $(if $(filter-out file,$(origin MINUTES)),--minutes $(MINUTES)) \
	    $(if $(CORPUS),--corpus $(CORPUS))

bench-load: setup ## Serve hundreds of workers that do not train: WORKERS="50 200" PRESETS=small QUICK=1
	@$(BIN)/python -m tests.bench.bench_load $(BENCH_OPTIONS) \
	    $(if $(WORKERS),--workers "$(WORKERS)") $(if $(PRESETS),--presets "$(PRESETS)")

wheel: setup ## Build the wheel into dist/
	bash ci/wheel.sh

lock: ## Write ci/requirements.lock anew (needs pip-tools)
	bash ci/lock.sh

vendor: ## Fetch the page's libraries anew into webui/vendor (needs npm)
	bash ci/vendor.sh

format: setup ## Format the Python code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built (not the demo's state)
	rm -rf $(VENV) build dist *.egg-info bitnet_ext/*.so
