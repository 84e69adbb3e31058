# Each target sets up .venv by itself, on a machine with Python 3.11 to 3.13, make and git.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PORT ?= 8000
TIME ?= 60
PART ?= similarity

.PHONY: help book serve test check lab bench assignments grade paper notebook pins clean

help:
	@echo "make book         build the book to _build/html"
	@echo "make serve        serve it on localhost"
	@echo "make test         run every test: modules, notebooks, assignments, the book in a browser"
	@echo "make check        test only what changed since HEAD"
	@echo "make lab          open JupyterLab on the labs"
	@echo "make bench        time the modules against their peers; BENCH=part/bench_slug: one file"
	@echo "make assignments  make student and autograder versions"
	@echo "make grade        SUBMISSIONS=folder OUT=grades.csv [PART=similarity] [TIME=60]"
	@echo "make paper        PART=part SLUG=slug: the four rooms of a new paper, from templates"
	@echo "make notebook     NB=path.ipynb: run it and store its outputs"

$(INSTALLED): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 found; set PYTHON=path"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

book: $(INSTALLED)
	$(BIN)/jupyter-book build . -W --keep-going -n --quiet
	@echo "The book is built: open _build/html/index.html, or run 'make serve'."

serve: book
	@echo "http://localhost:$(PORT)/"
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

# The pieces of 'make test', in the order of what fails fastest.
test: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadscope --doctest-modules src tests --ignore tests/book --ignore tests/benchmarks
	$(PYTEST) -n 2 --dist loadscope --nbval-lax --nbval-cell-timeout 300 chapters labs
	$(PYTEST) tests/book

check: $(INSTALLED)
	$(BIN)/python book/_tools/check.py

lab: $(INSTALLED)
	$(BIN)/jupyter lab labs

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/run.py --keep $(BENCH)

assignments: $(INSTALLED)
	$(BIN)/python book/_tools/assignments.py

grade: $(INSTALLED)
	@test -n "$(SUBMISSIONS)" && test -n "$(OUT)" || { echo "usage: make grade SUBMISSIONS=folder OUT=grades.csv"; exit 2; }
	$(BIN)/python book/_tools/grade.py $(SUBMISSIONS) $(OUT) --part $(PART) --time $(TIME)

paper: $(INSTALLED)
	@test -n "$(PART)" && test -n "$(SLUG)" || { echo "usage: make paper PART=part SLUG=slug"; exit 2; }
	$(BIN)/python book/_tools/new_paper.py $(PART) $(SLUG)

notebook: $(INSTALLED)
	$(BIN)/python book/_tools/run_notebook.py $(NB)

# requirements.txt is what the extras of pyproject.toml resolve to beside one torch and its torchvision. The libraries of
# torch's CUDA build, and a local version label such as +cpu, belong to one machine and are not pins.
TORCH := torch==2.13.0 torchvision==0.28.0
# From 4.25 on, jsonschema compiles a grammar of URIs when it is imported, which is a second or two in every notebook.
FAST := jsonschema==4.24.1
pins:
	rm -rf .venv-pins && $(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python -m pip install --quiet $(TORCH)
	.venv-pins/bin/python -m pip install --quiet ".[lab,full,book,test,bench,assign]" $(TORCH) $(FAST) jupyterlab ruff
	.venv-pins/bin/python -m pip freeze --exclude lossbook | sed -e 's/+[a-z0-9]*$$//' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton/d' > requirements.txt
	rm -rf .venv-pins

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
