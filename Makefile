# The two commands: `make mnist` trains, `make test` checks. Both begin with nothing but Python.
#
#   PYTHON=python3.12     the interpreter that makes the environment (3.11 or newer)
#   VENV=.venv            where the environment lives
#   TORCH_INDEX=URL       a package index to take torch from, such as one with CPU builds
#   PIP_ARGS="..."        further arguments for every pip install

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_ARGS ?=
THREADS ?= 1
TEST_WORKERS ?= auto
TEST_ARGS ?=
SOLVERS_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
TRAIN := $(BIN)/torchimplicit train mnist --threads $(THREADS)
CHECKED := src tests benchmarks examples

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help mnist test lint format format-check types test-quick tests bench bench-notebook bench-solvers precision distributed soak certificates mutants evidence jacobian-penalty examples examples-smoke examples-results hooks clean distclean

help: ## say what there is
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

# --- the environment: one stamp for each thing that is installed ------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: try make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.created
	@echo "installing torch"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.train: pyproject.toml $(VENV)/.torch
	@echo "installing torchimplicit[train]"
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "installing torchimplicit[train,dev,interop]"
	@$(PIP) --editable '.[train,dev,interop]'
	@touch $@ $(VENV)/.train

# --- training: a finished run is not repeated, an interrupted one goes on ---------------------------------------

mnist: runs/digits/picard/report.html runs/digits/newton/report.html ## train both layers of the notebook on 5,000 digits
	@echo
	@echo "Reports, to open in a browser:"
	@for report in $^; do echo "  $$report"; done
	@echo "To train again, remove runs/digits."

runs/digits/%/report.html: | $(VENV)/.train
	env -u TORCHIMPLICIT_DATA $(TRAIN) --layer $* --out $(@D) $(if $(wildcard $(@D)/config.json),--resume)

EVIDENCE := $(foreach layer,picard anderson newton,$(foreach seed,0 1 2,runs/evidence/$(layer)-$(seed)/report.html))

evidence: $(EVIDENCE) ## train on the full MNIST, seeds 0-2 (TORCHIMPLICIT_DATA names the folder with its IDX files)
	$(BIN)/python -m benchmarks.evidence runs/evidence

runs/evidence/%/report.html: | $(VENV)/.train
	@test -n "$$TORCHIMPLICIT_DATA" || { echo "set TORCHIMPLICIT_DATA to a folder with the four IDX files of MNIST"; exit 1; }
	$(TRAIN) --layer $(firstword $(subst -, ,$*)) --seed $(lastword $(subst -, ,$*)) --out $(@D) \
		$(if $(wildcard $(@D)/config.json),--resume)

jacobian-penalty: $(VENV)/.train ## train on the full MNIST with and without the Jacobian penalty (TORCHIMPLICIT_DATA as above)
	@test -n "$$TORCHIMPLICIT_DATA" || { echo "set TORCHIMPLICIT_DATA to a folder with the four IDX files of MNIST"; exit 1; }
	$(BIN)/python -m benchmarks.jacobian_penalty

$(VENV)/.bench: pyproject.toml $(VENV)/.torch
	@echo "installing torchimplicit[train,bench]"
	@$(PIP) --editable '.[train,bench]'
	@touch $@ $(VENV)/.train

# The status of a run with misses is 1; the report is written all the same.
bench: $(VENV)/.bench ## measure every row beside the peers into benchmarks/ (BENCH_ARGS="--quick 'torchdeq/*'" for some)
	$(BIN)/torchimplicit bench $(BENCH_ARGS) --out benchmarks

bench-solvers: $(VENV)/.bench ## run our solvers and the peers on the test problems (SOLVERS_ARGS=--quick for some)
	$(BIN)/python -m benchmarks.solver_table $(SOLVERS_ARGS)
	$(BIN)/python -m benchmarks.newton_krylov
	$(BIN)/python -m benchmarks.brackets
	$(BIN)/python -m benchmarks.default_solver
	$(BIN)/python -m benchmarks.adjoint_cost

bench-notebook: $(VENV)/.train ## measure memory and time against the notebook's own algorithms, one thread
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.speed_notebook

precision: $(VENV)/.train ## compare the accuracy of float32, bf16 and fp16 on the full MNIST (TORCHIMPLICIT_DATA as above)
	$(BIN)/python -m benchmarks.precision

distributed: $(VENV)/.train ## compare the speed of two processes and of one on the full MNIST; needs two quiet cores
	$(BIN)/python -m benchmarks.distributed

soak: $(VENV)/.train ## train 20,000 steps with rate spikes, NaN inputs and kills
	$(BIN)/python -m benchmarks.soak

certificates: $(VENV)/.train ## compare what layers claim with 1,000 random instances of each (15 minutes)
	$(BIN)/python -m benchmarks.certificates

mutants: $(VENV)/.train $(VENV)/.dev ## put mistakes into copies of the derivative engine: the tests must notice each
	$(BIN)/python -m benchmarks.mutants

# --- examples: what each takes on one quiet core is behind it; residual_deq --name fashion needs data of its own -----

EXAMPLE := $(BIN)/python -m examples

examples: $(VENV)/.dev ## run all examples as they are recorded, three hours (TORCHIMPLICIT_DATA as above)
	@test -n "$$TORCHIMPLICIT_DATA" || { echo "set TORCHIMPLICIT_DATA to a folder with the four IDX files of MNIST"; exit 1; }
	env -u TORCHIMPLICIT_DATA $(EXAMPLE).tutorial                       # 2 minutes
	env -u TORCHIMPLICIT_DATA $(EXAMPLE).deblur --test-images 100       # 5 minutes
	env -u TORCHIMPLICIT_DATA $(EXAMPLE).lightning_mnist                # 20 seconds
	$(EXAMPLE).residual_deq                                             # 45 minutes
	$(EXAMPLE).backward_pareto                                          # 30 minutes
	$(EXAMPLE).backward_pareto --twin                                   # 90 seconds
	$(EXAMPLE).mondeq fc                                                # 5 minutes
	$(EXAMPLE).mondeq fc --twin                                         # 2 minutes
	$(EXAMPLE).mondeq conv                                              # 20 minutes
	$(EXAMPLE).mondeq conv --twin                                       # 5 minutes
	$(EXAMPLE).certified                                                # 10 minutes
	$(EXAMPLE).certified --twin                                         # 30 seconds
	$(EXAMPLE).graph_chains                                             # 20 minutes
	$(EXAMPLE).parity --seeds 0 1 2 3 4                                 # 7 minutes
	$(EXAMPLE).copy_memory                                              # 20 minutes
	$(EXAMPLE).copy_memory --twin                                       # 40 seconds
	$(EXAMPLE).bratu                                                    # 1 minute
	$(EXAMPLE).market                                                   # 15 seconds
	$(EXAMPLE).results_table

examples-smoke: $(VENV)/.dev ## run every example in a reduced setting and check its figure, three minutes on one core
	env -u TORCHIMPLICIT_DATA $(BIN)/python -m pytest --verbose --durations=0 --numprocesses $(TEST_WORKERS) --maxprocesses 8 \
		tests/test_examples.py

examples-results: $(VENV)/.train ## write examples/RESULTS.md from the recorded results
	$(EXAMPLE).results_table

# --- checks -----------------------------------------------------------------------------------------------------

test: lint format-check types tests ## lint, format, types and all tests

lint: $(VENV)/.dev ## find mistakes that can be seen without running
	$(BIN)/ruff check $(CHECKED)

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check $(CHECKED)

format: $(VENV)/.dev ## put the source in its standard form
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

types: $(VENV)/.dev ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(VENV)/.dev
	$(BIN)/python -m pytest --quiet --numprocesses $(TEST_WORKERS) --maxprocesses 8 $(TEST_ARGS)

test-quick: $(VENV)/.dev ## the tests without the slow ones
	$(BIN)/python -m pytest --quiet --numprocesses $(TEST_WORKERS) --maxprocesses 8 -m 'not slow' $(TEST_ARGS)

hooks: $(VENV)/.dev ## have git run the quick checks before each commit
	@$(PIP) pre-commit
	$(BIN)/pre-commit install

# --- tidying: runs/ is never touched ----------------------------------------------------------------------------

clean: ## remove caches and what was built
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and the environment
	rm -rf $(VENV)
