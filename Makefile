# On a machine with Python 3.11: `make run` takes the profile to the Model Registry, `make test` runs
# the tests. Both set up .venv first and find it ready the next time. `make help` lists the rest.

PROFILE    ?= smollm2-135m
EXPERIMENT ?= phi3-mlflow
# More for `mlflow run`, as in: make run ARGS="-P force=all"
ARGS       ?=
# More for pytest, as in: make test PYTEST="tests/project -x"
PYTEST     ?=
# The fast tests run in so many processes; of the slow ones, each has the machine to itself.
WORKERS    ?= 2

MLFLOW_TRACKING_URI     ?= sqlite:///$(CURDIR)/mlflow.db
MLFLOW_DISABLE_TELEMETRY ?= true
ORT_DISABLE_TELEMETRY   ?= 1
export MLFLOW_TRACKING_URI MLFLOW_DISABLE_TELEMETRY ORT_DISABLE_TELEMETRY

# `mlflow run --env-manager local` takes the `python` that is first on the PATH.
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

# A Python 3.11 of the machine, not .venv's: it is what makes .venv.
PYTHON ?=
SETUP   = python="$$(PYTHON='$(PYTHON)' sh tools/find_python.sh)" && "$$python" tools/setup_venv.py

.DEFAULT_GOAL := help
.PHONY: help run retrain test check soak lint setup setup-dev generate lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

run: setup  ## the whole pipeline on PROFILE (default smollm2-135m), through `mlflow run`
	@mlflow run . -e main --env-manager local --experiment-name "$(EXPERIMENT)" \
		-P profile="$(PROFILE)" $(ARGS)

retrain: setup  ## fine-tune on the rows in examples/tickets/rows, and promote what is better for it
	@mlflow run . -e main --env-manager local --experiment-name "$(EXPERIMENT)" \
		-P profile=smollm2-135m-tickets $(ARGS)

test: lint  ## everything: checks, generated files, all tests, what the fast ones cover
	@python tools/generate.py --check
ifeq ($(PYTEST),)
	@python -m pytest -n $(WORKERS) -m "not slow" -q --cov --cov-report=term
	@python -m pytest -m slow --durations=25
else
	@python -m pytest $(PYTEST)
endif

check: lint  ## what takes some minutes: checks and the fast tests
	@python tools/generate.py --check
	@python -m pytest -n $(WORKERS) -m "not slow" -q $(PYTEST)

soak: setup-dev  ## half an hour of kills at random moments, and what they leave (nothing)
	@python benchmarks/soak_kills.py

lint: setup-dev
	@ruff check .
	@ruff format --check .
	@codespell
	@lint-imports --no-logo
	@mypy

setup:  ## .venv with what the pipeline needs, and nothing else done
	@$(SETUP) runtime

setup-dev:  ## .venv with what the tests and the checks need, too
	@$(SETUP) dev

generate: setup-dev  ## write MLproject and the generated parts of the documents again
	@python tools/generate.py

# What installs .venv reads the lock, so a lock that fell behind must not stop it: any uv will do.
lock: | $(VENV)/bin/uv  ## resolve conda.yaml and requirements/ again and write the constraints files
	@python tools/lock.py $(if $(UPGRADE),--upgrade)

$(VENV)/bin/uv:
	@$(SETUP) dev

clean:  ## remove .venv and the tools' caches; mlflow.db, mlruns and the step cache stay
	rm -rf .venv .venv.lock .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
