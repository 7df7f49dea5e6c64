# Everything happens in a virtual environment under .venv; nothing outside the checkout is touched
# but pip's and the compilers' caches.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The release that the tests are run with. Any torch that pyproject.toml allows will do.
TORCH := torch==2.13.0

# Processes that share the tests.
JOBS := 2

# How long `make fuzz` tries, and which mutants: others every day.
FUZZ_SECONDS := 300
FUZZ_SEED := $(shell expr $$(date +%s) / 86400)

.PHONY: demo test fuzz sanitize lint docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/smollm2_demo.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

fuzz: $(VENV)/.installed-dev
	RUST_BACKTRACE=0 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --keep fuzz-failures

sanitize: $(VENV)/.installed-dev
	$(BIN)/python -m tests.kernels.sanitize

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference of the Python API, as HTML.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m tools.reference build/docs

$(VENV)/.installed: pyproject.toml runtime/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --editable ./runtime --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ./runtime --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache
