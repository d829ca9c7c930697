# Needs make and Python 3.10 or newer, nothing else. `make help` lists the targets.

PYTHON        ?= python3
VENV          ?= .venv$(OTHER)
VENV_MINIMAL  ?= .venv-minimal$(OTHER)
TORCH_MINIMAL ?= torch==2.13.0
DEMO_FLAGS    ?=
EVALUATE_FLAGS ?=
ABLATIONS_FLAGS ?=
TEST_FLAGS    ?=
BENCH_FLAGS   ?=
CHECK_FLAGS   ?=
FAULTS_FLAGS  ?=
GPU_FLAGS     ?=
MUTANTS_FLAGS ?=
WORKERS       ?= 2
# Each with a release of torch, the oldest that is supported or the newest that was tried.
PYTHONS       ?= python3.10:2.11.0 python3.11:2.13.0 python3.12:2.11.0 python3.13:2.14.1 python3.14:2.14.1

# Every other Python has environments of its own: .venv-python3.13
OTHER       := $(addprefix -,$(filter-out python3,$(notdir $(PYTHON))))
RUN         := $(VENV)/bin/python
RUN_MINIMAL := $(VENV_MINIMAL)/bin/python
# Where pyenv keeps the Pythons, python3.13 is found only if that version is active: all are, the present one first.
export PYENV_VERSION := $(shell command -v pyenv >/dev/null && { pyenv version-name; pyenv versions --bare; } | paste -s -d :)

# A process interprets triton's kernels or compiles them, never both.
PYTEST      = $(RUN) -m pytest --numprocesses $(WORKERS)
COMPILED    = $(PYTEST) --dist loadfile --ignore tests/kernels/interpreted
INTERPRETED = TRITON_INTERPRET=1 $(PYTEST) --backend triton --hypothesis-profile
# Both commands are run, whatever becomes of the first. pytest's status 5 says that TEST_FLAGS has selected no test.
both = @$(1); first=$$?; $(2); case "$$first $$?" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo evaluate ablations check test test-slow test-all test-gpu test-minimal test-pythons mutants faults figures lint format bench bench-check gpu docs docs-check wheel clean

# Small batches on few cores: two OpenMP threads that wait for each other cost more than they bring.
demo evaluate ablations check test test-slow test-minimal mutants faults figures: export OMP_NUM_THREADS = 1
# Memory is kept instead of given back and asked for again: a tenth less processor time, by half the page faults.
check test test-slow test-minimal: export MALLOC_TRIM_THRESHOLD_ = 1000000000
check test test-slow test-minimal: export MALLOC_MMAP_THRESHOLD_ = 1000000000

help:  ## list the targets; times are those of two cores, without the first installation
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Settings, e.g. 'make demo PYTHON=python3.12 DEMO_FLAGS=\"--seed 1\"': PYTHON DEMO_FLAGS EVALUATE_FLAGS ABLATIONS_FLAGS TEST_FLAGS FAULTS_FLAGS BENCH_FLAGS CHECK_FLAGS GPU_FLAGS MUTANTS_FLAGS WORKERS"

demo: $(VENV)/.has-examples  ## pretrain on scikit-learn's digits and show what was learned (about a minute)
	$(RUN) examples/imagenet_pretrain.py $(DEMO_FLAGS)

evaluate: $(VENV)/.has-examples  ## pretrain with three seeds on the built-in data, and show what it is worth (twenty minutes)
	$(RUN) examples/evaluate_small.py $(EVALUATE_FLAGS)

ablations: $(VENV)/.has-ablations  ## the paper's ablations in miniature, beside its figures; interrupted, it goes on (twenty to thirty minutes)
	$(RUN) examples/ablations.py $(ABLATIONS_FLAGS)

check: $(VENV)/.has-check  ## the library's own tests (three minutes)
	$(PYTEST) --dist loadfile --ignore tests/examples --ignore tests/benches --ignore tests/kernels --ignore tests/mutants $(TEST_FLAGS)

test: $(VENV)/.has-test  ## all tests but the slow ones, kernels in triton's interpreter too (eight minutes)
	$(call both,$(COMPILED) $(TEST_FLAGS),$(INTERPRETED) interpreted tests/kernels/interpreted tests/test_laws_*.py $(TEST_FLAGS))

test-slow: $(VENV)/.has-test  ## whole training runs, inductor, other chips, more examples of the laws (eleven minutes)
	$(call both,$(COMPILED) -m slow $(TEST_FLAGS),$(INTERPRETED) interpreted-more tests/test_laws_*.py $(TEST_FLAGS))

test-all: $(VENV)/.has-test  ## both: every test that needs no GPU (twenty minutes)
	$(call both,$(MAKE) test,$(MAKE) test-slow)

# A machine with a GPU has its own torch, and often no network: nothing is installed, what is missing is left out. Every
# step is run, whatever became of the one before; an end after four minutes leaves the benches their time.
has        = $(shell $(PYTHON) -c 'import $(1)' 2>/dev/null && echo $(2))
GPU_PYTEST = $(PYTHON) -m pytest -o addopts= -q --no-header -p no:cacheprovider $(call has,xdist,--numprocesses 6) $(call has,pytest_timeout,--timeout 60)
GPU_LAWS   = $(GPU_PYTEST) tests/test_laws_*.py tests/test_gradients.py --device cuda --backend
SANITIZER  = compute-sanitizer --error-exitcode 9 --report-api-errors no

test-gpu:  ## the laws and tests/gpu on this machine's GPU, with the torch of PYTHON (four minutes)
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU here"'
	@export PYTHONPATH="$(CURDIR)" PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; end=$$(($$(date +%s) + 240)); failed=; \
	try() { echo "=== $$1"; left=$$((end - $$(date +%s))); \
		{ [ $$left -gt 0 ] && timeout -k 5 $$((left < $$2 ? left : $$2)) $$3; } || failed="$$failed, $$1"; }; \
	$(if $(call has,triton,yes),try "laws by Triton" 110 "$(GPU_LAWS) triton",echo "triton is not installed"); \
	try "laws in eager mode" 80 "$(GPU_LAWS) eager"; \
	try "tests/gpu" 120 "$(GPU_PYTEST) tests/gpu"; \
	if command -v compute-sanitizer >/dev/null; then \
		try "memcheck" 60 "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck $(PYTHON) tests/gpu/run_sanitizer.py"; \
		try "racecheck" 60 "$(SANITIZER) --tool racecheck $(PYTHON) tests/gpu/run_sanitizer.py"; \
	else echo "compute-sanitizer is not installed"; fi; \
	[ -z "$$failed" ] || { echo "FAILED$$failed"; exit 1; }

test-minimal: $(VENV_MINIMAL)/.has-test  ## the tests of library and benches without torchvision and triton (three minutes)
	$(RUN_MINIMAL) -m pytest --numprocesses $(WORKERS) --dist loadfile --ignore tests/examples --ignore tests/kernels $(TEST_FLAGS)

test-pythons:  ## test-minimal with every Python of PYTHONS that is here, each with its torch (seven minutes)
	@failed=; for each in $(PYTHONS); do python=$${each%:*}; \
		if ! $$python -c '' 2>/dev/null; then echo "left out: no $$python here"; continue; fi; \
		$(MAKE) test-minimal PYTHON=$$python TORCH_MINIMAL=torch==$${each##*:} || failed="$$failed $$python"; \
	done; [ -z "$$failed" ] || { echo "failed on$$failed"; exit 1; }

mutants: $(VENV)/.has-test  ## plant the bugs of tests/mutants, one at a time: the tests must notice (twenty minutes)
	$(RUN) tests/mutants/plant.py $(MUTANTS_FLAGS)

faults: $(VENV)/.has-test  ## injure the example's training runs in every way of its table, and count (under ten minutes)
	$(RUN) tests/faults/inject.py $(FAULTS_FLAGS)

figures: $(VENV)/.has-test  ## train detectors on shapes, from pretrained and from random features (three minutes)
	$(RUN) -m pytest -s -m figure tests/examples/test_example_detection_figure.py

lint: $(VENV)/.has-dev  ## check style, format and types (half a minute)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/.has-dev  ## repair what ruff can repair (a second)
	$(RUN) -m ruff check --fix-only
	$(RUN) -m ruff format

bench: $(VENV)/.has-bench  ## speed, memory and exactness against the others, on this CPU (eight minutes)
	$(RUN) benches/bench.py $(BENCH_FLAGS)

bench-check: $(VENV)/.has-bench  ## measure again, and name the ratios that are worse than the committed ones (seven minutes)
	$(RUN) benches/check.py $(CHECK_FLAGS)

gpu:  ## test and time the loss on this machine's GPU, with the torch of PYTHON (under eight minutes)
	$(call both,$(MAKE) test-gpu,PYTHONPATH="$(CURDIR)" $(PYTHON) benches/gpu.py $(GPU_FLAGS))

docs: $(VENV)/.has-docs  ## build the documentation as a site into build/docs: warnings are errors (half a minute)
	$(RUN) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "Open build/docs/index.html."

docs-check: $(VENV)/.has-test  ## the examples in the docstrings, and README's numbers against the results (half a minute)
	$(RUN) -m pytest barlow_loss
	$(RUN) benches/render.py --check
	$(RUN) examples/evaluate_small.py --check
	$(RUN) examples/ablations.py --check

wheel: $(VENV)/.has-dev  ## build the wheel and the source distribution into dist/ (half a minute)
	rm -rf dist
	$(RUN) -m build

clean:  ## remove the environments, what was built and the caches; runs/ stays (a second)
	rm -rf .venv .venv-* $(VENV) $(VENV_MINIMAL) dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is the last thing its recipe writes, so a half-finished installation is taken up again the next time.
# Groups of dependencies need pip 25.1.
$(VENV)/.has-examples: GROUPS = examples
$(VENV)/.has-ablations: GROUPS = examples integrations
$(VENV)/.has-test: GROUPS = examples integrations scale transfer test
$(VENV)/.has-check: GROUPS = test
$(VENV)/.has-dev: GROUPS = examples integrations scale transfer test dev
$(VENV)/.has-docs: GROUPS = docs
$(VENV)/.has-bench: GROUPS = examples bench

$(VENV)/.has-%: $(VENV)/.made pyproject.toml
	@echo "Installing barlow-loss for $(GROUPS) into $(VENV). The first time takes minutes: torch is large."
	$(RUN) -m pip install --quiet "pip>=25.1"
	$(RUN) -m pip install --editable . $(addprefix --group ,$(GROUPS))
	@touch $@

$(VENV_MINIMAL)/.has-test: $(VENV_MINIMAL)/.made pyproject.toml
	@echo "Installing barlow-loss for test and $(TORCH_MINIMAL) into $(VENV_MINIMAL)."
	$(RUN_MINIMAL) -m pip install --quiet "pip>=25.1"
	$(RUN_MINIMAL) -m pip install "$(TORCH_MINIMAL)" --editable . --group test
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
