# `make demo` and `make test` first, `make benchmark` and `make report` for numbers. All make .venv once and keep it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SANITIZED := build/sanitized

.PHONY: demo train-tiny test lint benchmark report sanitize clean

demo: $(VENV)/installed
	$(BIN)/memkernel demo --dtype float32

train-tiny: $(VENV)/installed
	$(BIN)/python -m memkernel.training build/tiny

test: $(VENV)/installed
	$(BIN)/python -m pytest

benchmark: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark

report: $(VENV)/installed
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The CPU kernels under AddressSanitizer and UBSan: a copy of the package, built for that alone.
sanitize: $(VENV)/installed
	rm -rf $(SANITIZED)
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" LDFLAGS="-fsanitize=address,undefined" \
	    $(BIN)/python -m pip install -q --no-deps --target $(SANITIZED) .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    $(BIN)/python -m pytest -q -o pythonpath="$(SANITIZED) ." tests/test_native.py

$(VENV)/installed: pyproject.toml setup.py build_backend.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "memkernel needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch  # first, or the build fetches another one for its headers
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
