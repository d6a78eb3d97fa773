# make repro and make test each do their own set-up, in .venv. Everything else is plain dvc and pytest in there.

# The first Python on the path that is new enough; PYTHON=/some/python takes another.
FOUND = $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Recipes read both as variables of the shell, which runs nothing that is in them. They are taken as they were typed:
# make itself would run a $(shell ...) in them.
override export PYTHON := $(or $(value PYTHON),$(FOUND))
override export EXPERIMENTS := $(value EXPERIMENTS)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repository repro report play lint docs quick test

help:
	@echo 'make repro   set up, then run the pipeline on params.yaml and show what came out'
	@echo 'make report  one page about the results; EXPERIMENTS="a b" puts experiments side by side'
	@echo 'make play    a page to try the model on'
	@echo 'make quick   set up, then lint, check types and run the fast tests'
	@echo 'make test    the same with all tests'
	@echo 'make docs    the documentation as a site, in site/'
	@echo 'make setup   make .venv with the versions of requirements.lock'

setup: .venv/ready .venv/bin/encore .dvc/plots_template.html

PIP := $(BIN)/pip install --quiet --disable-pip-version-check
FAILED := echo 'encore: pip could not install it (see above); check the network and the disk, then run make again' >&2; exit 1

.venv/ready: requirements.lock
	@test -n "$$PYTHON" || { echo 'encore: no Python 3.11 or newer on the path; install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$$PYTHON" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("encore: %s is Python %d.%d; Encore needs 3.11 or newer: make PYTHON=/path/to/python3" % (sys.executable, *sys.version_info[:2]))'
	"$$PYTHON" -m venv --clear .venv
	@echo 'Installing requirements.lock into .venv; this takes some minutes the first time.'
	@$(PIP) -r requirements.lock && $(PIP) --no-deps --no-build-isolation -e . || { $(FAILED); }
	@touch $@

# An older .venv may lack the command.
.venv/bin/encore: | .venv/ready
	@$(PIP) --no-deps --no-build-isolation -e . || { $(FAILED); }

.dvc/plots_template.html: encore/report/plots_page.py encore/report/vega.py | .venv/ready
	@$(BIN)/python -m encore.report.plots_page && dvc config --local plots.html_template plots_template.html

repository:
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo 'encore: this folder is no git repository, which DVC needs: git clone it instead, or run here: git init && git add -A && git commit -m start' >&2; exit 1; }

repro: repository setup
	@python -m encore mend
	@dvc repro
	@python -m encore summary
	@python -m encore report

report: repository setup
	@set -f; python -m encore report -- $$EXPERIMENTS

.venv/play: .venv/ready requirements-dev.lock
	@echo 'Installing the playground; once.'
	@$(PIP) -c requirements.lock -c requirements-dev.lock gradio || { $(FAILED); }
	@touch $@

play: .venv/play
	@python -m encore play

.venv/dev: .venv/ready requirements-dev.lock
	@echo 'Installing requirements-dev.lock; once.'
	@$(PIP) -r requirements-dev.lock || { $(FAILED); }
	@touch $@

lint: .venv/dev
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

docs: .venv/dev
	zensical build --strict --clean

quick: lint
	pytest -n logical -m 'not slow'

# Three at a time where there are two cores, since some tests wait; a worker takes the next test when it is free, the
# slowest first.
test: lint docs
	pytest -n auto --dist worksteal
