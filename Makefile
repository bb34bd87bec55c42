# The verbs. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup land run quarantine audit lineage airflow serve gate release tune manifest test check bench constraints clean
SHELL := /bin/bash -o pipefail

VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# uv looks for wheels on disk only where it is told to; then it and pip behave alike.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTHON ?= python3

help: ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' \
		| while IFS='|' read -r verb text; do printf '  make %-12s %s\n' "$$verb" "$$text"; done

setup: $(READY) ## make .venv from constraints.txt (the other verbs do it when needed)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
		"setup: error: $(PYTHON) is Python %d.%d; expected 3.11, 3.12 or 3.13: make PYTHON=python3.13" % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --compile-bytecode \
		-c constraints.txt -e '.[airflow,serve,dev]'
	@touch $@

land: $(READY) ## copy raw files to S3, checked, where fetch finds them: SOURCE=folder TO=s3://…
	@python -m pipelines.ingest.land "$$SOURCE" "$$TO"

run: $(READY) ## take the flights from raw files to a registered, watched bundle
	@python -m pipelines.run

quarantine: $(READY) ## show the rows that broke an expectation, and which
	@python -m pipelines.ingest.quarantine

audit: $(READY) ## run every stage in two clean clones: which files or fields differ?
	@python -m pipelines.audit

airflow: $(READY) ## start Airflow on this checkout, and MLflow; Ctrl-C stops both
	@python -m pipelines.orchestrate.local

serve: $(READY) ## serve the champion behind Envoy and print how to ask it; Ctrl-C stops it
	@python -m pipelines.deploy.up

gate: $(READY) ## compare the bundle just made with the champion; a release wants its verdict
	@python -m pipelines.deploy.gate

release: $(READY) ## let the challenger take over beside `make serve`, step by step, judged
	@python -m pipelines.deploy.release

tune: $(READY) ## seek better values of fit on the validation rows; a winner is a commit
	@python -m pipelines.train.tune

lineage: $(READY) ## draw what the bundle was made of, back to the raw files
	@python -m pipelines.lineage

manifest: $(READY) ## write dags/manifest.json from dvc.yaml and params.yaml
	@python -m pipelines.orchestrate.graph

test: $(READY) ## run the tests that need no network and no Java; with Java, those too
	@pytest

check: $(READY) ## format, lint, types, import rules: reads only
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	@python -m pipelines.orchestrate.graph --check

bench: $(READY) ## measure speed, orchestration, quality over seeds, the same lock in two clones
	@python benchmarks/tasks.py
	@python benchmarks/bench.py

constraints: $(READY) ## resolve constraints.txt anew from pyproject.toml
	uv pip compile --quiet --upgrade --python-version 3.11 --all-extras --no-header --no-annotate \
		pyproject.toml \
		| grep -vE '^(nvidia|cuda|triton)' | sed -E 's/\+cpu$$//' > constraints.new
	mv constraints.new constraints.txt

clean: ## remove what was made: data, models, reports, state and .venv; what git tracks stays
	rm -rf data models reports .state $(VENV) .dvc/cache .dvc/tmp
