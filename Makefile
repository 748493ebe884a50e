# Two commands do everything from a fresh clone: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= python3
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint types docs clean

demo: .venv/.complete
	$(PY) examples/demo.py $(IMAGES)

test: .venv/.complete lint types
	$(PY) -m pytest -n 2

lint: .venv/.complete
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: .venv/.complete
	$(PY) -m mypy

docs: .venv/.complete
	$(PY) -m sphinx -q -W -b html docs docs/_build/html
	@echo docs/_build/html/index.html

.venv/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("patchlib needs Python 3.11 or newer; try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist docs/_build out
