# Everything runs in .venv, made on first use. `make PYTHON=/path/to/python3.12 test` picks another interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test lint types bench-pass clean

demo: .venv/installed
	$(BIN)/triton-convbn demo

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy triton_convbn kernels perf

# Milliseconds that the pass takes for each pair, up to 2,000 pairs.
bench-pass: .venv/installed
	$(BIN)/python -m triton_convbn.perf.pass_cost

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .mypy_cache .ruff_cache
