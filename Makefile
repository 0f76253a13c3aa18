# The front door.  `make` alone tells what there is.
SHELL = /bin/bash
PYTHON ?= python3
BIN = .venv/bin
RUN_ARGS =
RACK = qemu

help:                ## tell what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: run-$(RACK)      ## all the set-up, then the main job; ONCE=1: the whole round, and exit; MACHINES=2; RACK=simulated

run-qemu: .venv/done system-run
	@$(BIN)/python tools/demo.py $(if $(ONCE),--once) $(if $(MACHINES),--machines $(MACHINES)) $(RUN_ARGS)

run-simulated: .venv/done
	@$(BIN)/python tools/demo_simulated.py $(if $(ONCE),--once) $(if $(MACHINES),--machines $(MACHINES)) $(RUN_ARGS)

test: .venv/done system check  ## all the set-up, then every test
	$(BIN)/pytest tests/unit tests/property tests/contract tests/scenario -n 2 --dist worksteal
	$(BIN)/pytest tests/e2e

check: .venv/done system-test  ## style, types, shell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck nodepool/agent/*.sh tools/fake-image-create tools/system-packages .ci/run

bench: .venv/done system  ## measure; each row with the command that measured it
	$(BIN)/python tests/bench/bench.py

doc: .venv/done      ## draw the pictures from the tables
	$(BIN)/python tools/draw_lifecycles.py doc/lifecycle.svg

system system-run system-test: .venv/done
	@tools/system-packages $(BIN)/bindep $(if $(filter system-run,$@),run,$(if $(filter system-test,$@),test,run test))

.venv/done: requirements.txt test-requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nodepool needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || { echo "no venv: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing Python packages into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r test-requirements.txt -e .
	@touch $@

clean:               ## remove what was built and kept (var/, .venv)
	rm -rf var .venv build *.egg-info

.PHONY: help run run-qemu run-simulated test check bench doc clean system system-run system-test
