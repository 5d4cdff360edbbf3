# `make train` and `make test` are all that a newcomer needs; see `make help`.
SHELL := /bin/bash

VENV_ROOT ?= .venv
SETS := $(or $(SETS),$(shell tools/sets.sh))
SET ?= $(firstword $(SETS))
ARGS ?=
PYTEST_ARGS ?=
VENV := $(VENV_ROOT)/$(SET)
export PYTHON VENV_ROOT PYTEST_ARGS

.PHONY: help train test setup lint lock clean

help:
	@echo 'make train  set up, then train on Atari with a live view'
	@echo 'make test   set up, then tests on all sets, lint and types beside them'
	@echo 'make setup  set up alone: the virtual environment $(VENV)'
	@echo 'make lint   style and types alone'
	@echo 'make lock   pin the newest packages that setup.py and requirements/ allow'
	@echo 'make clean  remove the virtual environments and caches; runs/ stays'
	@echo
	@echo 'Variables:'
	@echo '  SET=cluster|latest   pinned set for train, setup, lint (now: $(SET));'
	@echo '                       cluster: Reverb, Python 3.11 alone; latest: the newest JAX'
	@echo '  SETS="..."           sets for test (now: $(SETS))'
	@echo '  PYTHON=...           interpreter to build with (default: the newest that fits)'
	@echo '  ARGS="..."           flags of train; ARGS="--help" lists them'
	@echo '  PYTEST_ARGS="..."    arguments of pytest, such as tests/vtrace_test.py'

train: setup
	@exec "$(VENV)/bin/python" -m impala_jax train $(ARGS)

test:
	@tools/run_tests.sh $(SETS)

setup:
	@tools/setup_venv.sh $(SET)

lint: setup
	@tools/lint.sh "$(VENV)/bin"

COMPILE := $(VENV_ROOT)/uv/bin/uv pip compile setup.py --upgrade --python-version 3.11 \
  --quiet --no-annotate --custom-compile-command 'make lock' \
  $(addprefix --extra=,atari dev doom gymnasium plots tls video)

# Run `make test` before you commit what it writes.
lock:
	tools/setup_venv.sh uv
	$(COMPILE) --extra=reverb --constraints=requirements/constraints.txt \
	  --output-file=requirements/cluster.txt
	$(COMPILE) --universal --output-file=requirements/latest.txt

clean:
	rm -rf $(foreach name,uv cluster latest,$(VENV_ROOT)/$(name){,.log}) $(VENV_ROOT)/.lock
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./$(VENV_ROOT) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
