# `make demo` and `make test` do all set-up; a second run sets up nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready
# Processes that tests run in, the seed of `make test-random` and `make fuzz`, and damaged files of the latter.
JOBS ?= 2
MUTATIONS ?= 10000
MINUTES ?= 60
TIMES ?= 20
SEED := $(or $(SEED),$(shell date +%s))
PYTEST := -m pytest -n $(JOBS) --dist worksteal

# What `make bench-quick` runs; its time does not depend on weights.
MODEL ?= vit_tiny_patch16_224
IMAGES ?= ../shared/data/eval

.PHONY: setup demo test test-all test-random test-fresh test-oldest fuzz soak lint types docs bench-quick clean

# $(call install,FOLDER,CONSTRAINTS): a virtual environment with vwt and all that its tests need
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "vwt needs Python 3.11 or newer; name one with make PYTHON=..."; exit 2; }
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet -c $(2) -e '.[dev]'
endef

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)
	@touch $@

# What constraints-oldest.txt names is installed as it says there, everything else as in constraints.txt.
$(OLDEST_READY): pyproject.toml constraints.txt constraints-oldest.txt
	mkdir -p $(OLDEST)
	awk -F== 'NR == FNR { oldest[$$1] } NR == FNR || !($$1 in oldest)' constraints-oldest.txt constraints.txt \
		> $(OLDEST)/constraints.txt
	$(call install,$(OLDEST),$(OLDEST)/constraints.txt)
	$(OLDEST)/bin/python -m pip uninstall --quiet --yes torchao  # it needs a newer torch, and transformers imports it
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

# Every capability, on one case or a few; `test-all` adds the matrices of models, spaces and precisions, builds that are
# killed, and compilers.
test: $(READY)
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: $(READY)
	$(BIN)/python $(PYTEST) $(ARGS)

# Properties on many examples, others at each run; SEED=... repeats one.
test-random: $(READY)
	@echo "seed $(SEED)"
	$(BIN)/python $(PYTEST) -m hypothesis --hypothesis-profile=random --hypothesis-seed=$(SEED)

# `make test` TIMES times in a row, each time in another order and with other seeds; it stops where one fails.
test-fresh: $(READY)
	for seed in $$(seq $(SEED) $$(($(SEED) + $(TIMES) - 1))); do \
		VWT_TEST_SEED=$$seed PYTHONHASHSEED=$$((seed % 4294967296)) $(BIN)/python $(PYTEST) -m "not slow" \
			-p tests.shuffled --hypothesis-profile=fresh --hypothesis-seed=$$seed || exit 1; \
	done

# Damaged codebooks, plans, schedules, profiles, notes and results; `tests/fuzz.py` says what must become of them.
fuzz: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m tests.fuzz --mutations $(MUTATIONS) --seed $(SEED)

# Mixed calls of several threads; SOAK=... hands options on, such as --checkpoint FILE.
soak: $(READY)
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(SOAK)

test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python $(PYTEST) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# From nothing each time, so that every warning is seen. Nothing is fetched.
docs: $(DOCS_READY)
	rm -rf docs/_build docs/api
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# A row for each runtime and precision that is installed, in under five minutes on two cores.
bench-quick: $(READY)
	$(BIN)/python benchmarks/latency.py --model $(MODEL) --random-weights --data $(IMAGES) --images 5 --runs 6 --quiet \
		--runtime all

clean:
	rm -rf $(VENV) $(OLDEST) demo docs/_build docs/api
