VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Options: PYTHON chooses the interpreter of `setup`, ARGS go to `run` and `bench`, TESTARGS to `test`.
ARGS ?=
TESTARGS ?=
export PYTHON

.PHONY: gpu-check help setup setup-dali run test lint bench
.DEFAULT_GOAL := help

help:
	@echo 'make setup   install all that is needed into $(VENV); does nothing when it is up to date'
	@echo 'make setup-dali   the same, then the optional loader DALI (290 MB)'
	@echo 'make run     see E-SSL work in a few minutes: convert, pretrain, evaluate, report (ARGS=...)'
	@echo 'make test    the tests (TESTARGS=...)'
	@echo 'make lint    ruff and mypy'
	@echo 'make gpu-check   on a machine with a GPU: its tests and benchmarks, as one record'
	@echo 'make bench   how fast each room of a run is here, what limits it (ARGS=...), and the loaders beside their peers'

setup: $(READY)

$(READY): pyproject.toml constraints.txt tools/setup.sh tools/ffcv/opencv4.pc tools/ffcv/opencv2/opencv.hpp
	@tools/setup.sh

setup-dali: $(READY)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt nvidia-dali-cuda130

run: $(READY)
	@$(BIN)/fast-essl demo $(ARGS)

# A process a core, each with whole files, so that what a file's tests share is made once.
test: $(READY)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTARGS)

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/fast-essl bench all $(ARGS)
	@$(BIN)/python benchmarks/peers.py

gpu-check: $(READY)
	@$(BIN)/python benchmarks/gpu_check.py
