# `make demo` and `make test` do all set-up; a second run sets up nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready

.PHONY: setup demo test test-oldest lint types clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vwt needs Python 3.11 or newer; name one with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,plots]'
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest

# What constraints-oldest.txt names is installed as it says there, everything else as in constraints.txt.
$(OLDEST_READY): pyproject.toml constraints.txt constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vwt needs Python 3.11 or newer; name one with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(OLDEST)
	awk -F== 'NR == FNR { oldest[$$1] } NR == FNR || !($$1 in oldest)' constraints-oldest.txt constraints.txt \
		> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[dev,plots]'
	$(OLDEST)/bin/python -m pip uninstall --quiet --yes torchao  # it needs a newer torch, and transformers imports it
	@touch $@

test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) demo
