# `make demo` shows the program, `make test` proves it (docs/tests.md). Both need only Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin
# Two processes; the tests of a file stay together, since they share what their fixtures computed.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-recipes lint gpu bench-peers install clean
install: .venv/installed

demo: install
	$(BIN)/python lora_example.py

# Everything but the long tests of the recipes.
test: install
	$(PYTEST) -m 'not recipes'

test-recipes: install
	$(PYTEST) tests/recipes

lint: install
	$(BIN)/ruff check
	$(BIN)/mypy --no-error-summary

# Eight minutes on a CUDA machine (docs/benchmarks.md), with .venv if it is there, else with a Python that has torch.
gpu:
	@python=$(PYTHON); if [ -x $(BIN)/python ]; then python=$(BIN)/python; fi; \
	if ! $$python -c 'import torch' 2>/dev/null; then $(MAKE) install && python=$(BIN)/python || exit 1; fi; \
	$$python -m bench.gpu

# One step in ours, diffusers and OpenVINO, which has an environment of its own. OPTIONS="--former PATH" adds an earlier state.
OPTIONS ?=
bench-peers: install .venv-peers/installed
	$(BIN)/python -m bench.openvino --full $(OPTIONS)

.venv-peers/installed: bench/peers.txt constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r bench/peers.txt
	touch $@

# Exact versions from constraints.txt; installed again only when what to install changes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-peers out
