# Every habit of this repository. Paths stay relative, so the folder may have a space in its name.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
UV := .bootstrap/bin/uv
PACKAGES := api workers backchannel
LOCKS := requirements.txt requirements-dev.txt requirements-bench.txt requirements-bootstrap.txt

# Bytecode is kept, whatever the shell says: to compile our own sources takes a process as long as
# all the rest of its start, and the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=

# The project itself goes in second, without network: hash mode refuses `-e .`.
define sync
$(UV) pip sync --quiet --require-hashes --compile-bytecode --python .venv $(1)
PYTHONPATH=.bootstrap $(UV) pip install --quiet --offline --no-deps --no-build-isolation \
	--python .venv --editable .
endef

.PHONY: help install run up test check chaos bench format docs lock clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="…" is passed on by run, up, test and lock; PYTHON=… chooses the interpreter.'

install: .venv/.runtime ## Install what Backchannel needs to run into .venv

run: .venv/.runtime ## Run the example prompts and watch them: make run ARGS="--in-order"
	$(BIN)/backchannel run examples/prompts.jsonl $(ARGS)

up: .venv/.runtime ## Start broker, API, worker and Flower in one terminal
	$(BIN)/backchannel up $(ARGS)

test: .venv/.dev ## Run the tests: make test ARGS="-k stream -n 0"
	$(BIN)/python -m pytest -n 2 $(ARGS)

chaos: .venv/.dev ## Break it on purpose and count what was promised: make chaos PROFILE=full
	$(BIN)/python -m chaos --profile $(or $(PROFILE),quick) $(ARGS)

bench: .venv/.bench ## Measure it beside a bare loop and the usual designs: make bench QUICK=1
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(ARGS)

check: .venv/.dev ## Format, lint, types, import arrows, unused dependencies, lock files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry $(PACKAGES)
	@if grep -nE '://|^-| @ |[ (]/' $(LOCKS); then echo 'A lock file carries an address or a path.' >&2; exit 1; fi

format: .venv/.dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.runtime ## Write docs/settings.md anew from the settings
	$(BIN)/python docs/generate.py

lock: .bootstrap/.done ## Write the lock files anew from pyproject.toml: make lock ARGS=--upgrade
	$(call compile,requirements.txt,pyproject.toml)
	$(call compile,requirements-dev.txt,pyproject.toml --group dev)
	$(call compile,requirements-bench.txt,pyproject.toml --group dev --group bench)
	$(call compile,requirements-bootstrap.txt,--group bootstrap)

define compile
$(UV) pip compile --quiet --universal --generate-hashes --no-header $(ARGS) --output-file $(1) $(2)
endef

clean: ## Remove environments and caches; your jobs in .backchannel stay
	rm -rf .venv .bootstrap dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(PACKAGES) tests chaos benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A plain Debian has no venv module and lets pip write into a --target only: uv does the rest.
.bootstrap/.done: requirements-bootstrap.txt
	@$(PYTHON) -c 'import sys; sys.exit("Backchannel needs Python 3.11 or newer: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	@echo 'Installing the installer (uv) into .bootstrap'
	@rm -rf .bootstrap
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --root-user-action=ignore \
		--require-hashes --target .bootstrap -r requirements-bootstrap.txt
	@touch $@

.venv/.made: .bootstrap/.done
	@$(UV) venv --quiet --clear --no-project --python "$$(command -v $(PYTHON))" .venv
	@touch $@

# The benchmarks' lock holds everything of the development lock, and that one everything of the
# runtime lock: once a larger one is in, it stays in.
largest = $(firstword $(foreach kind,bench dev,$(if $(wildcard .venv/.$(kind)),requirements-$(kind).txt)) $(1))

.venv/.runtime: .venv/.made requirements.txt pyproject.toml
	@echo 'Installing Backchannel into .venv'
	@$(call sync,$(call largest,requirements.txt))
	@touch $@

.venv/.dev: .venv/.made requirements-dev.txt pyproject.toml
	@echo 'Installing Backchannel and its development tools into .venv'
	@$(call sync,$(call largest,requirements-dev.txt))
	@touch .venv/.runtime $@

.venv/.bench: .venv/.made requirements-bench.txt pyproject.toml
	@echo 'Installing Backchannel and what it is compared with into .venv'
	@$(call sync,requirements-bench.txt)
	@touch .venv/.runtime .venv/.dev $@
