# Two commands for newcomers; everything else is a task of pyproject.toml (`.venv/bin/poe`).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BASE ?= smollm2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test install install-dev

demo: install ## Two tenants fine-tune two adapters on one base, then sample from both.
	$(BIN)/treadle demo --base $(BASE) $(DEMO_ARGS)

test: install-dev ## Everything that CI runs.
	$(BIN)/poe check
	$(BIN)/poe test

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# torch comes first and alone, so that nothing else chooses it; the lock files are complete, so nothing is resolved.
$(VENV)/.installed: pyproject.toml deploy/requirements.lock
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps -r deploy/requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed deploy/requirements-dev.lock
	$(BIN)/pip install --quiet --no-deps -r deploy/requirements-dev.lock
	touch $@
