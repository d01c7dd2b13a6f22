# Every target does its own set-up: a fresh checkout needs nothing before `make demo` or `make test`.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/local/sbin:/usr/sbin:/sbin

READY := $(VENV)/.ready
SCRIPTS := tests/conftest.py tests/demo tests/bench
CHEAP := $(wildcard tests/unit tests/contract tests/models)
# With live guests, which promise to stand still for no longer than a second or two: two files at a time, and nothing else.
GUESTS := $(shell grep -lE 'guest_kit|GuestKit' -r tests/integration tests/fault --include='test_*.py' | sort)
REAL := $(filter-out $(GUESTS),$(shell find tests/integration tests/fault -name 'test_*.py' | sort))

.DEFAULT_GOAL := help
.PHONY: help venv system demo test check bench lock format clean

help:
	@echo "make demo     mirror a qcow2 disk to an NBD server and a file, change a part, mirror that part"
	@echo "make test     everything that must pass before a change lands"
	@echo "make check    lint, types, import arrows"
	@echo "make bench    measure against nbdcopy, qemu-img, s5cmd, rclone and cp; writes docs/bench"
	@echo "make format   let ruff format and fix"
	@echo "make lock     renew requirements.lock after a change in pyproject.toml (UPGRADE=1: newest versions)"
	@echo "make venv     the virtual environment alone;  make system  the system packages alone"

# The stamp is as new as the lock and the project file it was made from.
$(READY): requirements.lock pyproject.toml config/setup.sh
	@config/setup.sh venv $(VENV)
	@touch $@

venv: $(READY)

# Not stamped: looking for a dozen programs takes milliseconds, and a stamp would not see one go away.
system:
	@config/setup.sh system

check: $(READY)
	ruff check .
	ruff format --check .
	mypy
	mypy --explicit-package-bases $(SCRIPTS)
	lint-imports

# Cheap tests first. The others mostly wait, each file for servers of its own.
test: check system
	pytest -n 2 $(CHEAP)
	pytest -n 3 --dist loadfile $(REAL)
	pytest -n 2 --dist loadfile --durations=10 $(GUESTS)

demo: $(READY) system
	python -m tests.demo.run

bench: $(READY)
	@config/setup.sh bench
	python -m tests.bench.run $(BENCH_OPTIONS)

format: $(READY)
	ruff format .
	ruff check --fix .

# No index, host or path of the machine that made it may appear in the lock.
lock: $(READY)
	pip-compile --quiet $(if $(UPGRADE),--upgrade) --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	    --generate-hashes --allow-unsafe --strip-extras --extra=dev --extra=bench \
	    --output-file=requirements.lock pyproject.toml
	sed -i -e '/^--/d' requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
