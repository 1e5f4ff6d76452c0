# The jobs: `make book`, `make test`, `make sweep`. Each makes the environment if it is missing, and does nothing twice.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
# Outputs of all jobs; nothing is written outside the checkout.
export PEKA_LITE_CACHE ?= $(CURDIR)/build/cache
# Waiting threads must not spin: where cores are shared, PyTorch is several times slower otherwise.
export OMP_WAIT_POLICY ?= PASSIVE
# Compiled once: containers that forbid it have every process compile PyTorch and scanpy anew, 10 s each time.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONWARNINGS ?= ignore::SyntaxWarning

# Code, ready sweeps, and what lies in data/: gene lists, published values, pretrained weights and their cards.
LIBRARY := $(shell find peka_lite -type f \( -name '*.py' -o -name '*.yml' -o -path '*/weights/*' -o -name '*.txt' -o -name '*.csv' -o -name '*.html' -o -name '*.mplstyle' -o -name '*.pyi' \) | sort)
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTED := $(NOTEBOOKS:%=book/%)
PAGES := $(shell find book -maxdepth 1 -type f) $(wildcard book/_static/* book/_templates/static/*)
HTML := book/_build/html/index.html

.PHONY: help
help:
	@echo "make book    execute the notebooks and build the book"
	@echo "make test    run the tests"
	@echo "make check-book   open every page of the book in a browser (chromium) and check it"
	@echo "make print   the book as one page and as a PDF (chromium)"
	@echo "make sweep   run the sweep quick.yml, from nothing to a table and a figure"
	@echo "make pretrain-student   make the weights of the small student in the package anew"
	@echo "make pretrain-teacher   make the weights of the small teacher in the package anew"
	@echo "make smoke   install the wheel on Python 3.13, as Colab has it, and run every step once"
	@echo "make newest, make oldest   the same with the newest versions; with the oldest, on Python 3.11"
	@echo "make lock    resolve requirements.lock and constraints-3.13.txt again"
	@echo "make clean   remove what the jobs made, except the environment"
	@echo "make address URL=https://github.com/OWNER/REPO   set the repository the Colab buttons open"

.PHONY: book
book: $(HTML)
	@echo "The book is built. First page: $(CURDIR)/$(HTML)"

# Pages of a built book are `check-book`'s.
.PHONY: test
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
	  --ignore tests/pages/test_pages.py

.PHONY: sweep
sweep: build/.fresh | $(READY)
	$(BIN)/peka-lite sweep quick --out build/sweeps/quick

# Any Python 3.11, 3.12 or 3.13 will do; PYTHON=... names one.
$(READY): requirements.lock pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
	  for p in $${PYTHON:-} python3.12 python3.11 python3.13 python3 python; do \
	    if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then found=$$p; break; fi; \
	  done; \
	  [ -n "$${found:-}" ] || { echo "peka_lite needs Python 3.11, 3.12 or 3.13 on the PATH (or make PYTHON=/path/to/python)"; exit 1; }; \
	  echo "Making .venv with $$found"; $$found -m venv .venv; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Run folders of an older library must not feed newer pages.
build/.fresh: $(LIBRARY)
	@rm -rf build/results build/sweeps build/cache/students && mkdir -p build/results && touch $@

# With -j2 two chapters run at once; these find the students of chapter 5.
$(patsubst %,book/notebooks/%.ipynb,06_spatial_pcc_maps 07_sweeps 09_paper_explained 10_leakage_and_protocols): \
  | book/notebooks/05_evaluation.ipynb

book/notebooks/%.ipynb: notebooks/%.ipynb notebooks/wrong_answers.yml build/.fresh | $(READY)
	@$(BIN)/python book/execute.py $< $@ build

$(HTML): $(EXECUTED) $(PAGES) $(LIBRARY)
	@cp build/results/front_map.png book/notebooks/front_map.png
	@$(BIN)/python book/costs_table.py book/notebooks
	$(BIN)/jupyter-book build book -W -n --keep-going --quiet
	@touch $@

# Every page in a browser; Debian's chromium, or it says that there is none.
.PHONY: check-book
check-book: $(HTML)
	$(BIN)/python -m pytest tests/pages --numprocesses auto --dist worksteal

# The whole book as one page, and that as a PDF.
.PHONY: print
print: $(HTML)
	$(BIN)/jupyter-book build book --builder singlehtml --quiet
	$(BIN)/python book/print.py book/_build/singlehtml/index.html book/_build/peka_lite.pdf

# Not part of any other job: what these write is committed. HER2ST holds sections HER2_C2 to HER2_C5 in HEST-1k's layout.
PRE := build/pretraining
HER2ST ?= data/her2st
SECTIONS := HER2_C2 HER2_C3 HER2_C4 HER2_C5
LEARN := $(BIN)/python pretraining/student.py --corpus $(PRE)/corpus --batch 64
REAL := $(LEARN) --init $(PRE)/synthetic.safetensors --summary --lr 4e-4 --minutes 3 --real-share 0.5

.PHONY: pretrain-student
pretrain-student: $(PRE)/synthetic.safetensors
	$(REAL) --sections $(SECTIONS) --log pretraining/student_stage3.csv --out peka_lite/backbones/weights/mini_student.safetensors

# What a score on a real section needs: weights that never saw it.
.PHONY: pretrain-left-out
pretrain-left-out: $(SECTIONS:%=$(PRE)/without_%.safetensors)
$(PRE)/without_%.safetensors: $(PRE)/synthetic.safetensors
	$(REAL) --sections $(filter-out $*,$(SECTIONS)) --out $@

$(PRE)/synthetic.safetensors: | $(READY)
	$(BIN)/python pretraining/corpus.py --out $(PRE)/corpus --real $(HER2ST) --sections $(SECTIONS)
	$(LEARN) --lr 8e-4 --minutes 55 --stop 0.528 --masked 0.75 --depth 2 --log pretraining/student_stage1.csv \
	  --out $(PRE)/first.safetensors
	$(LEARN) --init $(PRE)/first.safetensors --summary --lr 6e-4 --minutes 30 --log pretraining/student_stage2.csv --out $@

.PHONY: pretrain-teacher
pretrain-teacher: | $(READY)
	$(BIN)/python pretraining/teacher.py

.PHONY: lock
lock:
	@command -v uv >/dev/null || [ -x $(BIN)/uv ] || { echo "make lock needs uv: run make test once, or install uv"; exit 1; }
	$$(command -v $(BIN)/uv || command -v uv) pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --fork-strategy fewest --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --upgrade \
	  --output-file requirements.lock
	printf '%s\n' $(COLAB_TORCH) | $$(command -v $(BIN)/uv || command -v uv) pip compile pyproject.toml - --no-config \
	  --extra notebook --universal --python-version 3.13 --no-emit-index-url --no-header --no-annotate --quiet --upgrade \
	  --output-file constraints-3.13.txt

# The wheel in a fresh environment of its own: with the versions of a day, with the newest, with the oldest that
# pyproject.toml takes. Only the first is part of .ci/run.
COLAB_TORCH := torch==2.11.0 torchvision==0.26.0
.PHONY: smoke newest oldest
smoke: $(READY)
	.ci/smoke 3.13 --constraint $(CURDIR)/constraints-3.13.txt
newest: $(READY)
	.ci/smoke 3.13 --upgrade
oldest: $(READY)
	.ci/smoke 3.11 --resolution lowest-direct --requirement $(CURDIR)/pyproject.toml --extra notebook

.PHONY: address
address: $(READY)
	$(BIN)/python book/address.py "$(URL)"

.PHONY: clean
clean:
	rm -rf build book/_build book/notebooks
