# make run         set up and train the default model
# make test        set up, lint and test
# make lint        ruff and mypy
# make docs        build the documentation into build/site, in strict mode
# make docs-serve  show the documentation at http://127.0.0.1:8000
# make lock        resolve requirements.lock again
# make browser     test the pages of explain and report in Chromium, a minute (Debian: apt install chromium)
# make hostile     attack the commands with bad command lines, files and environments, 15 minutes
# make kills       kill runs at random moments, 15 minutes (ARGS="--kills 0 --layouts": compare layouts)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The accelerator to install JAX for; ACCELERATOR=cpu overrides it.
ACCELERATOR ?= $(shell \
	if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | cut -d . -f 1); \
		if [ "$$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi; \
	elif ls /dev/accel[0-9]* >/dev/null 2>&1 || ls /dev/vfio/[0-9]* >/dev/null 2>&1; then echo tpu; \
	else echo cpu; fi)
EXTRAS := $(if $(filter cpu,$(ACCELERATOR)),dev,dev,$(ACCELERATOR))
STAMP := $(VENV)/.installed-$(ACCELERATOR)
# Compiled below, on all cores; pip would compile one file after another.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c requirements.lock
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# To test reading its files: the build for CPUs, because PyPI's brings CUDA libraries other than JAX's.
TORCH ?= torch==2.13.0+cpu

.PHONY: run test lint docs docs-serve lock browser hostile kills

run: $(STAMP)
	$(BIN)/python -m structvit_jax train --config=moving_digits $(ARGS)

test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs=2 lint $(VENV)/.torch
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

browser: $(STAMP)
	$(PIP) "playwright>=1.50"
	$(BIN)/python tests/tools/browser.py $(ARGS)

hostile: $(VENV)/.torch
	$(BIN)/python tests/tools/hostile.py $(ARGS)

kills: $(STAMP)
	$(BIN)/python tests/tools/kills.py $(ARGS)

$(STAMP): requirements.txt requirements.lock pyproject.toml
	@echo "installing structvit_jax and its requirements for: $(ACCELERATOR)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[$(EXTRAS)]"
	@$(COMPILE)
	@touch $@

$(VENV)/.torch: $(STAMP)
	$(PIP) --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu $(TORCH)
	@$(COMPILE)
	@touch $@

lock: requirements.txt pyproject.toml
	uv pip compile --quiet --universal --upgrade --python-version 3.11 pyproject.toml \
		--extra dev --extra docs --extra beam --extra gcs --extra cuda12 --extra cuda13 --extra tpu \
		--custom-compile-command "make lock" -o requirements.lock
