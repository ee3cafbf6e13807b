# Needs make and Python >= 3.11, nothing else; every target does its own set-up in .venv.
SHELL := /bin/bash
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: help install demo test faults check format sample-model screenshots clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

install: .venv/installed  ## set up .venv with everything

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "moescope needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	@touch $@

demo: install  ## profile the bundled model and open the dashboard; ARGS=--no-dashboard ends after the summary
	@$(BIN)/python -P -m app.cli demo $(ARGS)

test: install  ## run all tests, three at a time (some wait for a browser); those that need a browser are skipped where there is none
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -P -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

faults: install  ## kill what writes files, 200 times each, and see that nothing is lost; ARGS='--kills 40 --only collect'
	@$(BIN)/python -m tests.faults $(ARGS)

check: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases docs/examples/*.py

format: install  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sample-model: install  ## train the sample model again (Debian 12; hours); its texts and weights are replaced
	$(BIN)/python -P -m sample_data.prepare --out build/sample-data
	OMP_WAIT_POLICY=passive MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
	    MALLOC_TOP_PAD_=268435456 $(BIN)/python -P -m sample_data.train --data build/sample-data --out sample_data/model
	$(BIN)/python -P -m sample_data.evaluate --data build/sample-data
	rm -f sample_data/runs/sample*.duckdb
	$(BIN)/moescope collect sample_data/model --data sample_data/texts/*.jsonl --tokens 108k --dtype float32 \
	    --level routing,activations,attention,similarity,errors,lookahead,predictions \
	    --router-scores 16 --scores-every 12 \
	    --store sample_data/runs --name sample
	rm -rf sample_data/runs/sample.evaluations
	$(BIN)/moescope sweep sample_data/model --data sample_data/texts/*.jsonl --dtype float32 --tokens 20k --all \
	    --contrast-rank 1,2,3,4 --contrast-beta 0.25,0.5,1 --rerouting-sequences 14 \
	    --store sample_data/runs --against sample

screenshots: install  ## shoot every page, light and dark, into docs/screenshots (needs Chromium)
	$(BIN)/python -P -m app.cli demo --no-dashboard --store build/screenshots
	$(BIN)/python -m tests.browser.screenshots --store build/screenshots --run sample --out docs/screenshots

clean:  ## remove .venv and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build
