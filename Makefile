# Everything happens in a virtual environment under .venv; nothing outside the checkout is touched
# but pip's and the compiler's caches.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The release that the tests are run with. Any torch that pyproject.toml allows will do.
TORCH := torch==2.13.0

.PHONY: demo test lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml runtime/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ./runtime --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python examples/smollm2_demo.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .ruff_cache
