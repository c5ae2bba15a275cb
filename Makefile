# make demo        train a small real model and see it get better (about 7 minutes on 2 cores)
# make test        the test suite, as CI runs it
# make test-full   also the tests that take long
# make kernels     compile the CUDA kernels for every architecture (needs nvcc, no GPU) into build/kernels
# make setup       only the virtual environment; make lint: only the checks of the text
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
MODEL := smollm2-135m-instruct
ARGS ?=
INSTALLED := $(VENV)/.installed
NVCC ?= nvcc
ARCHITECTURES := 80 90 100
KERNELS ?= build/kernels

CUBINS := $(foreach kernel,move gae,$(ARCHITECTURES:%=$(KERNELS)/$(kernel).sm_%.cubin))
# Two processes, each with files of its own (their set-ups are made once), in the order of their names: the
# long files lie in the middle. More cores: make test ARGS='-n 8'.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

COMPILE = $(NVCC) -cubin -std=c++20 -O3 -Werror all-warnings

.PHONY: help setup model demo kernels lint test test-full clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

setup: $(INSTALLED)

# The extension is rebuilt with it when a kernel changes; everything else is found in place.
$(INSTALLED): setup.py requirements/constraints.txt scripts/setup.sh scripts/torch.sh $(wildcard csrc/*)
	scripts/setup.sh $(VENV)
	@touch $@

model: setup
	$(BIN)/realflow models fetch $(MODEL)

demo: model
	$(BIN)/python experiments/demo/demo.py $(ARGS)

kernels: $(CUBINS)

$(KERNELS)/move.sm_%.cubin: csrc/move.cu $(wildcard csrc/*.h)
	@mkdir -p $(KERNELS)
	$(COMPILE) -arch=sm_$* -o $@ $<

$(KERNELS)/gae.sm_%.cubin: csrc/gae.cu $(wildcard csrc/*.h)
	@mkdir -p $(KERNELS)
	$(COMPILE) -arch=sm_$* -o $@ $<

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint model
	$(BIN)/python -m pytest -q $(SPREAD) $(ARGS)

test-full: lint model
	$(BIN)/python -m pytest -q -m "full or not full" $(ARGS)

clean:
	rm -rf build dist *.egg-info realflow/_C*.so .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
