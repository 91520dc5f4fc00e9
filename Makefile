# Needs Python (3.10 to 3.13) and make. `make PYTHON=python3.12 test` takes another interpreter.
PYTHON ?= python3.11
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-hostile test-transformers lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) -m hydrasurgery.cli demo $(ARGS)

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

# Broken files, kills and full disks, the slow ones too: for every night rather than every change.
test-hostile: $(VENV)/installed
	$(RUN) -m pytest -n 2 -m "slow or not slow" tests/hostile tests/test_fast_runs.py $(ARGS)

# transformers' own tests of models, on hybrids beside their teachers; fetched from PyPI, in minutes.
test-transformers: $(VENV)/installed
	$(RUN) -m pip install -q -c constraints.txt parameterized setuptools wheel
	$(RUN) -m tests.transformers_suite -n 2 $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -p hydrasurgery

clean:
	rm -rf $(VENV) build dist *.egg-info .transformers-tests
