# Everything a person or CI does with this repository. `make help` lists it.
# Works with the make of macOS (GNU Make 3.81) and any POSIX shell.

PYTHON ?= python3
VENV ?= .venv
INTEROP_VENV ?= $(VENV)/interop
# The index of PyTorch's CPU builds, for a Linux machine without a GPU; empty: pip's default.
TORCH_INDEX ?=
WORKLOAD ?= single
PROMPT ?= Once upon a time
ARGS ?=

STAGES := $(shell sed -n 's/^name = "\(.*\)"/\1/p' stages.toml)
NEWEST := $(lastword $(STAGES))
empty :=
comma := ,
SOURCES := $(subst $(empty) $(empty),$(comma),$(STAGES))
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
PY := $(VENV)/bin/python
START := $(shell date +%s)
COVERAGE_MIN := 85

# One thread a process: two test workers share two cores, and tensors are small.
PYTEST := OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 $(PY) -m pytest tests -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-deep lint format coverage notebooks docs api interop bench clean install install-test install-dev

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=python3.12  VENV=folder  TORCH_INDEX=url (PyTorch's CPU index)  ARGS='more arguments'"

demo: install ## set up everything, and let the newest stage tell a story
	@echo; echo "$(NEWEST), on the embedded model:"; echo
	@$(PY) -m folovllm generate "$(PROMPT)" --stream --max-tokens 200 $(ARGS)
	@$(call goodbye)

test: install-test ## the same environment with the test extras, then all tests
	$(PYTEST) $(ARGS)
	@$(call goodbye)

test-quick: install-test ## tests of the newest stage only
	$(PYTEST) --milestone $(firstword $(subst _, ,$(NEWEST))) $(ARGS)
	@$(call goodbye)

test-deep: install-test ## all tests, with far more examples for the property-based ones
	$(PYTEST) --deep $(ARGS)

lint: install-dev ## ruff, formatting, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy folovllm $(STAGES) tests

format: install-dev ## rewrite the code as ruff would have it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

coverage: install-dev ## line coverage of every stage; fails below 85 %
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(PY) -m coverage run --source=$(SOURCES) -m pytest tests -q -n 2 $(ARGS)
	$(PY) -m coverage combine -q
	@failed=; for stage in $(STAGES); do \
	    echo; $(PY) -m coverage report --include="$$stage/*" --skip-covered --show-missing --fail-under=$(COVERAGE_MIN) \
	        || failed="$$failed $$stage"; \
	done; if [ -n "$$failed" ]; then echo "below $(COVERAGE_MIN) %:$$failed"; exit 1; fi

notebooks: install-test ## execute every notebook in place (ARGS=--check: without writing)
	$(PY) -m folovllm.bench.notebooks $(ARGS)

docs: install ## every stage beside the one before it, as pages: docs/site/index.html
	@mkdir -p docs/site
	@echo '<!doctype html><meta charset="utf-8"><title>FoloVLLM, stage by stage</title><h1>Stage by stage</h1><ol>' \
	    > docs/site/index.html
	@set -e; old=; for new in $(STAGES); do \
	    if [ -n "$$old" ]; then \
	        $(PY) -m folovllm diff $$old $$new --html docs/site/$$new.html | head -1; \
	        echo "<li><a href='$$new.html'>$$old and $$new</a></li>" >> docs/site/index.html; \
	    fi; old=$$new; done

api: install ## write docs/api from the docstrings of the newest stage
	$(PY) -m folovllm.bench.apidocs $(ARGS)

interop: ## exchange quantised checkpoints with gptqmodel, in an environment of its own (0.4 GB beside PyTorch)
	$(PYTHON) -m venv $(INTEROP_VENV)
	[ -z "$(TORCH_INDEX)" ] || $(INTEROP_VENV)/bin/pip install --quiet --index-url "$(TORCH_INDEX)" torch==2.13.0
	$(INTEROP_VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23 .
	echo torch==2.13.0 > $(INTEROP_VENV)/constraints.txt
	$(INTEROP_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(INTEROP_VENV)/constraints.txt gptqmodel==7.6.0
	$(INTEROP_VENV)/bin/python tests/integration/gptqmodel_interop.py --json docs/results/interop_m7.json $(ARGS)

bench: install ## time a workload on the newest stage: WORKLOAD=single
	$(PY) -m folovllm.bench.run --workload $(WORKLOAD) $(ARGS)

clean: ## remove caches and build output; the environment and results stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage .coverage.*
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment -------------------------------------------------------------------------------------------------
# A stamp for each set of extras, so that only a changed pyproject.toml installs again.

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	@$(call install,.)
	@touch $@

$(VENV)/.installed-test: pyproject.toml
	@$(call install,.[test])
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml
	@$(call install,.[dev])
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

# $(1): what pip installs, as `.[test]`. A venv that was left half-made (Debian without python3-venv) is made again.
define install
set -e; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { echo "FoloVLLM needs Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }; \
$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
    || { echo "That was python -m venv $(VENV); on Debian and Ubuntu it needs: apt install python3-venv"; exit 1; }; \
echo "Setting up $(VENV), with pip. About to download, unless it is there already:"; \
if [ -n "$(TORCH_INDEX)" ]; then echo "  PyTorch from $(TORCH_INDEX): 0.2 GB (0.8 GB on disk) if that is a CPU index"; \
elif [ "$$(uname -s)" = Linux ]; then \
    echo "  PyTorch: with CUDA, pip's default on Linux, about 3 GB (7 GB on disk); a CPU build 0.2 GB (0.8 GB on disk)."; \
    echo "    No NVIDIA GPU? Stop here and name the index of PyTorch's CPU builds: make TORCH_INDEX=... (see README.md)"; \
else echo "  PyTorch: about 0.1 GB (0.4 GB on disk)"; fi; \
echo "  transformers and other packages: about $(if $(findstring [,$(1)),130 MB$(comma) and on Linux triton: 0.25 GB (1 GB on disk),60 MB)"; \
quiet=$$([ -t 1 ] || echo --quiet); \
[ -z "$(TORCH_INDEX)" ] || $(PY) -m pip install $$quiet --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
$(PY) -m pip install $$quiet --disable-pip-version-check -e "$(1)"
endef

define goodbye
echo; echo "Took $$(( $$(date +%s) - $(START) )) s. To work in this environment:  source $(VENV)/bin/activate"
endef
