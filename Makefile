# Every target sets up .venv on first use. PYTHON chooses the interpreter: make test PYTHON=python3.12
# PINNED=1 sets it up with the very versions of requirements.lock: make test PINNED=1
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready$(if $(PINNED),-pinned)
CONSTRAINT := $(if $(PINNED),--constraint requirements.lock)
SITE_READY := .venv/site-ready
AUDIT := .venv/audit/bin
ENTROFORMER_DATA ?= $(abspath $(wildcard ../shared/data))
ifneq ($(ENTROFORMER_DATA),)
export ENTROFORMER_DATA
endif
# One more than there are cores: tests that start processes or browsers wait for them
TEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 7 ? n + 1 : 8)))

.PHONY: help setup figures site course course-run course-zip test lint lock audit lab pictures bench train-tiny clean

help:
	@echo "make figures     run every notebook on the shipped weights, draw the paper's figures, write figures/ and the numbers on pages"
	@echo "make site        render notebooks, pages, the course, explorers and the API's docs into site/ (after make figures)"
	@echo "make course      write the lessons, for students and with solutions, from notebooks/course/source"
	@echo "make course-run  run the lessons with solutions whole"
	@echo "make course-zip  pack what students need into dist/entroformer-course.zip"
	@echo "make test        lint and test (PINNED=1 sets up a new .venv with the versions of requirements.lock)"
	@echo "make lock        write the versions of .venv to requirements.lock"
	@echo "make audit       ask pip-audit for known weaknesses of these versions (needs a network)"
	@echo "make lab         open JupyterLab on the notebooks"
	@echo "make pictures    photograph the explorer and draw the overview for README.md (needs Chromium)"
	@echo "make bench       time coding beside CompressAI's models, and a training step"
	@echo "make train-tiny  train a smaller model of the same kind as the shipped one (set ENTROFORMER_DATA; one to two hours on a CPU)"

setup: $(READY)

$(READY): pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || \
		{ echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINT) --editable '.[dev]'
	touch $@

figures: $(READY)
	$(BIN)/python notebooks/run_all.py
	$(BIN)/python -m entroformer_lib.views.paper
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/tables.py

# What builds the site is installed on first use
$(SITE_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINT) --editable '.[site]'
	touch $@

site: $(SITE_READY) course-zip
	$(BIN)/python -m website.build

course: $(READY)
	$(BIN)/python notebooks/course/make_course.py

course-zip: $(READY)
	$(BIN)/python notebooks/course/make_course.py zip

course-run: $(READY)
	$(BIN)/python notebooks/course/make_course.py run

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without this package, and nothing that comes from a path of this machine
lock: $(READY)
	$(BIN)/python -m pip freeze --exclude-editable --exclude entroformer-suite > requirements.part
	@! grep -n -e ' @ ' -e '^-e' requirements.part || { echo "These come from elsewhere than a package index."; exit 1; }
	$(BIN)/python -c 'import platform; print("# Tested together on", platform.system(), platform.machine(), \
		"with Python", platform.python_version() + "; written by make lock")' | cat - requirements.part > requirements.lock
	rm requirements.part

# In an environment of its own, so that it is no part of what it looks at
audit: $(READY)
	test -x $(AUDIT)/pip-audit || { $(BIN)/python -m venv .venv/audit && \
		$(AUDIT)/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	$(AUDIT)/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict --progress-spinner off

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_OPTIONS)

pictures: $(READY)
	$(BIN)/python benchmarks/readme_pictures.py

bench: $(READY)
	$(BIN)/python benchmarks/latency.py table --out data/results/latency.json
	$(BIN)/python benchmarks/latency.py growth --out data/results/latency_growth.json
	test -z "$(ENTROFORMER_DATA)" -o ! -d "$(ENTROFORMER_DATA)/train" || $(BIN)/python benchmarks/training_step.py --data "$(ENTROFORMER_DATA)/train" \
		--out data/results/training_step.json

train-tiny: $(READY)
	@test -n "$(ENTROFORMER_DATA)" -a -d "$(ENTROFORMER_DATA)/train" || { echo "Set ENTROFORMER_DATA to a folder with train/ (pictures or tars) in it."; exit 1; }
	$(BIN)/entroformer train --data "$(ENTROFORMER_DATA)/train" --out runs/tiny-blocks --model tiny-parallel \
		--architecture transforms=blocks 'stages=[[8,192,4]]' linear_path=dct M=320 rate_aware=true \
		--lmbdas 0.00035 0.0008 0.0017 0.0035 0.007 0.014 0.029 0.06 0.12 --steps 6000 --batch 16 --crop 128 --last-crop 192 \
		--optimizer muon --lr 2e-3 --schedule linear --precision auto
	@test -d "$(ENTROFORMER_DATA)/kodak" || echo "No $(ENTROFORMER_DATA)/kodak: weights are in runs/tiny-blocks, not measured."
	test ! -d "$(ENTROFORMER_DATA)/kodak" || $(BIN)/python benchmarks/publish.py publish runs/tiny-blocks tiny-blocks \
		--kodak "$(ENTROFORMER_DATA)/kodak" --data "$(TINY_DATA)" --limits "$(TINY_LIMITS)"

TINY_DATA ?= the pictures in $(ENTROFORMER_DATA)/train
TINY_LIMITS = a small model, trained for one or two hours on a CPU core

clean:
	rm -rf .venv build site
