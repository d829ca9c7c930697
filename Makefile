# Needs make and Python 3.10 or newer, nothing else. `make help` lists the targets.

PYTHON        ?= python3
VENV          ?= .venv
VENV_MINIMAL  ?= .venv-minimal
TORCH_MINIMAL ?= torch==2.13.0
DEMO_FLAGS    ?=
EVALUATE_FLAGS ?=
TEST_FLAGS    ?=
BENCH_FLAGS   ?=
CHECK_FLAGS   ?=
FAULTS_FLAGS  ?=
GPU_FLAGS     ?=
WORKERS       ?= 2

RUN         := $(VENV)/bin/python
RUN_MINIMAL := $(VENV_MINIMAL)/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo evaluate test test-minimal faults figures lint format bench bench-check gpu wheel clean

# Small batches on few cores: two OpenMP threads that wait for each other cost more than they bring.
demo evaluate test test-minimal faults figures: export OMP_NUM_THREADS = 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Settings, e.g. 'make demo PYTHON=python3.12 DEMO_FLAGS=\"--seed 1\"': PYTHON DEMO_FLAGS EVALUATE_FLAGS TEST_FLAGS FAULTS_FLAGS BENCH_FLAGS CHECK_FLAGS GPU_FLAGS WORKERS"

demo: $(VENV)/.has-examples  ## pretrain on scikit-learn's digits and show what was learned (about a minute)
	$(RUN) examples/imagenet_pretrain.py $(DEMO_FLAGS)

evaluate: $(VENV)/.has-examples  ## pretrain with three seeds on the built-in data, and show what it is worth (a quarter of an hour)
	$(RUN) examples/evaluate_small.py $(EVALUATE_FLAGS)

# A process interprets triton's kernels or compiles them, never both.
test: $(VENV)/.has-test  ## run all tests
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --ignore tests/kernels/interpreted $(TEST_FLAGS)
	TRITON_INTERPRET=1 $(RUN) -m pytest --numprocesses $(WORKERS) --backend triton --hypothesis-profile interpreted \
		tests/kernels/interpreted tests/test_laws_*.py

test-minimal: $(VENV_MINIMAL)/.has-test  ## run the tests on an older torch, without torchvision and triton
	$(RUN_MINIMAL) -m pytest --numprocesses $(WORKERS) --dist loadfile --ignore tests/examples --ignore tests/kernels $(TEST_FLAGS)

faults: $(VENV)/.has-test  ## injure the example's training runs in every way of its table, and count (under ten minutes)
	$(RUN) tests/faults/inject.py $(FAULTS_FLAGS)

figures: $(VENV)/.has-test  ## train detectors on shapes, from pretrained and from random features (three minutes)
	$(RUN) -m pytest -s -m figure tests/examples/test_example_detection_figure.py

lint: $(VENV)/.has-dev  ## check style, format and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/.has-dev  ## repair what ruff can repair
	$(RUN) -m ruff check --fix-only
	$(RUN) -m ruff format

bench: $(VENV)/.has-bench  ## speed, memory and exactness against the others, on this CPU (ten minutes)
	$(RUN) benches/bench.py $(BENCH_FLAGS)

bench-check: $(VENV)/.has-bench  ## measure again, and name the ratios that are worse than the committed ones
	$(RUN) benches/check.py $(CHECK_FLAGS)

# A machine with a GPU has its own torch, and often no network: nothing is installed.
gpu:  ## test and time the loss on this machine's GPU, with the torch of PYTHON (under eight minutes)
	@PYTHONPATH="$(CURDIR)" $(PYTHON) benches/gpu_steps.py $(GPU_FLAGS)

wheel: $(VENV)/.has-dev  ## build the wheel and the source distribution into dist/
	rm -rf dist
	$(RUN) -m build

clean:  ## remove the environments, what was built and the caches; runs/ stays
	rm -rf $(VENV) $(VENV_MINIMAL) dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is the last thing its recipe writes, so a half-finished installation is taken up again the next time.
$(VENV)/.has-examples: EXTRAS = examples
$(VENV)/.has-test: EXTRAS = examples,scale,transfer,test
$(VENV)/.has-dev: EXTRAS = examples,scale,transfer,test,dev
$(VENV)/.has-bench: EXTRAS = examples,bench

$(VENV)/.has-%: $(VENV)/.made pyproject.toml
	@echo "Installing barlow-loss[$(EXTRAS)] into $(VENV). The first time takes minutes: torch is large."
	$(RUN) -m pip install --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV_MINIMAL)/.has-test: $(VENV_MINIMAL)/.made pyproject.toml
	@echo "Installing barlow-loss[test] and $(TORCH_MINIMAL) into $(VENV_MINIMAL)."
	$(RUN_MINIMAL) -m pip install "$(TORCH_MINIMAL)" --editable ".[test]"
	$(RUN_MINIMAL) -m pip uninstall --yes triton torchvision
	@touch $@

$(VENV)/.made $(VENV_MINIMAL)/.made:
	@$(PYTHON) -c '' 2>/dev/null || { echo "No '$(PYTHON)' here. Install Python 3.10 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "barlow-loss needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(@D)
	@touch $@
