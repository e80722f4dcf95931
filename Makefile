# Everything a user or CI needs; each target makes .venv first when it is missing.
# PYTHON picks the interpreter, WORKERS how many processes share the tests.

PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OF_NUMBERS := tests/attribution tests/evaluation tests/circuits tests/patching tests/result/test_rounding.py

.PHONY: demo test test-cpu test-matrix bench results check catalogue notebooks tutorials docs dist bundled format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## the main job on bundled models: prints, a picture and a page in out/
	$(BIN)/gatedlens demo --model gatedlens/mamba-moby --out out
	$(BIN)/gatedlens compare --out out

test: $(STAMP)  ## every test, the slow ones last
	$(BIN)/python -m pytest -n $(WORKERS)

# The orders of scores hang on the methods: the architectures of the papers show it, and Mamba-2.
test-cpu: $(STAMP)  ## what computes scores and orders once more, without the processor's own vector instructions
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n $(WORKERS) --cases papers $(OF_NUMBERS)

check: $(STAMP)  ## format, lint, types, catalogue, notebooks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m gatedlens.catalogue --check
	$(BIN)/python -m website.notebooks --check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

catalogue: $(STAMP)  ## write hooks/ from the rows
	$(BIN)/python -m gatedlens.catalogue

notebooks: $(STAMP)  ## write tutorials/*.ipynb from tutorials/*.py
	$(BIN)/python -m website.notebooks

tutorials: $(STAMP)  ## run every tutorial as a notebook; those that have not changed are kept
	$(BIN)/python -m website.notebooks --run

docs: tutorials  ## the site in out/site, offline, with the tutorials' outputs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html"

dist: $(STAMP)  ## wheel and sdist in dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

bench: $(STAMP)  ## ratios against transformers and TransformerLens, in one run
	$(BIN)/python -m benchmarks.run

results: $(STAMP)  ## the table of attribution methods in docs/results.md (minutes)
	$(BIN)/python -m benchmarks.results

bundled: $(STAMP)  ## train the bundled models anew (minutes)
	$(BIN)/python -m gatedlens.bundled.make all

test-matrix: $(STAMP)  ## the parity tests with the oldest transformers that we support
	test -x .venv-old/bin/python || $(PYTHON) -m venv .venv-old
	.venv-old/bin/pip install --quiet --disable-pip-version-check -c constraints-old.txt -e '.[test]'
	.venv-old/bin/python -m pytest -n $(WORKERS) -m "not slow"

clean:
	rm -rf $(VENV) .venv-old out .pytest_cache .ruff_cache .mypy_cache .hypothesis
