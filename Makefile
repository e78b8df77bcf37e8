# Two commands on a fresh machine: `make quickstart` and `make test`. Both make and reuse .venv by themselves.
#
#   PYTHON=python3.12 make …     another Python (3.11 or later)
#   TEST_PROCESSES=8 make test        tests in more processes than two
#   PIP_ARGS="--index-url …" make …   options for pip, for instance an index with PyTorch's smaller CPU builds

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TEST_PROCESSES ?= 2
RUN := $(VENV)/bin/python
# On a CPU, training gives and takes gigabytes at every step; keeping them saves glibc the page faults.
QUIET_MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736

FAULTS := $(addprefix tests/test_,$(addsuffix .py,records untrusted crashes power_loss kill_storm damage remote_faults))

.PHONY: quickstart test test-fast faults lint types check bench study clean

quickstart: $(VENV)/.ready
	@echo "== quickstart: prepare, capture two teachers, train three students, compare (results in runs/quickstart)"
	$(QUIET_MALLOC) $(RUN) -m tailcache.scripts.quickstart

test: $(VENV)/.ready
	@echo "== tests: the whole suite, warnings are errors"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-fast: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "not slow"

faults: $(VENV)/.ready
	@echo "== faults: kills, failing calls, power cuts, damage, hostile caches; the counts are printed at the end"
	$(RUN) -m pytest $(FAULTS)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.ready
	$(RUN) -m mypy

check: lint types test

bench: $(VENV)/.ready
	$(RUN) -m tailcache.scripts.bench_capture
	$(RUN) -m tailcache.scripts.bench_reader
	$(RUN) -m tailcache.scripts.bench_storage
	$(RUN) -m tailcache.scripts.bench_head
	$(RUN) -m tailcache.scripts.bench_losses
	$(RUN) -m tailcache.scripts.bench_step
	$(RUN) -m tailcache.scripts.bench_fidelity

study: $(VENV)/.ready
	@echo "== study: a teacher, and students trained every way with three seeds; goes on where it was killed (results in runs/study-cpu)"
	$(QUIET_MALLOC) $(RUN) -m tailcache.scripts.study --document docs/study.md

$(VENV)/.ready: pyproject.toml scripts/make_venv.sh
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" sh scripts/make_venv.sh "$(VENV)"

clean:
	rm -rf $(VENV) build *.egg-info
