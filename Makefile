# make app: the page, on http://127.0.0.1:7860    make test: the tests
# Each makes .venv and installs what it needs. Versions are those that the tests
# passed with; CONSTRAINTS= takes the newest.

PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: app test lint bench

app: .venv/app
	.venv/bin/python app.py

test: .venv/test
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/app
	$(PIP) -e ".[bench]"
	.venv/bin/python benchmarks/fidelity.py
	.venv/bin/python benchmarks/ablation.py

.venv/app: requirements.txt pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/test: .venv/app
	$(PIP) -e ".[test]"
	touch $@
