# `make demo` and `make test` first, `make benchmark` and `make report` for numbers. All make .venv once and keep it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint benchmark report clean

demo: $(VENV)/installed
	$(BIN)/memkernel demo README.md NOTES.md CONTRIBUTING.md

test: $(VENV)/installed
	$(BIN)/python -m pytest

benchmark: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark

report: $(VENV)/installed
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "memkernel needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
