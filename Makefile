# `make demo` shows the program, `make test` proves it. Both need only Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint install clean
install: .venv/installed

demo: install
	$(BIN)/python lora_example.py

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check

# Exact versions from constraints.txt; installed again only when what to install changes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv out
