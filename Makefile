# Every target sets up .venv on first use. PYTHON chooses the interpreter: make test PYTHON=python3.12
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
ENTROFORMER_DATA ?= $(abspath $(wildcard ../shared/data))
export ENTROFORMER_DATA

.PHONY: help setup figures test lint lab bench train-tiny clean

help:
	@echo "make figures     run every notebook on the shipped weights, draw the paper's figures, write figures/"
	@echo "make test        lint and test"
	@echo "make lab         open JupyterLab on the notebooks"
	@echo "make bench       time coding beside CompressAI's models, write data/results/latency.json"
	@echo "make train-tiny  repeat the training of the shipped model (set ENTROFORMER_DATA; about an hour on two cores)"

setup: $(READY)

$(READY): pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || \
		{ echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

figures: $(READY)
	$(BIN)/python notebooks/run_all.py
	$(BIN)/python -m entroformer_lib.views.paper

test: $(READY) lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_OPTIONS)

bench: $(READY)
	$(BIN)/python -m entroformer_lib.studies.latency --out data/results/latency.json

train-tiny: $(READY)
	@test -d "$(ENTROFORMER_DATA)/train" || { echo "Set ENTROFORMER_DATA to a folder with train/ (pictures or tars) in it."; exit 1; }
	$(BIN)/entroformer train --data "$(ENTROFORMER_DATA)/train" --out runs/tiny-parallel --model tiny-parallel \
		--steps 24000 --batch 8 --crop 128 --lr 1e-3 --decay 0.5 --lmbda 0.0035 --pretrain 0.4 --pretrain-lmbda 0.1 \
		--precision bfloat16
	@test -d "$(ENTROFORMER_DATA)/kodak" || echo "No $(ENTROFORMER_DATA)/kodak: weights are in runs/tiny-parallel, not measured."
	test ! -d "$(ENTROFORMER_DATA)/kodak" || $(BIN)/python -m entroformer_lib.studies.model_card runs/tiny-parallel tiny-parallel \
		--kodak "$(ENTROFORMER_DATA)/kodak" --data "$(TINY_DATA)" --limits "$(TINY_LIMITS)"

TINY_DATA = 1,172 photographs: 250 of CID22 (CC BY-SA 4.0) and 922 of ImageNet and BSDS500 (for research use)
TINY_LIMITS = a small model trained for about an hour on two CPU cores, for one rate; fine texture is smoothed away

clean:
	rm -rf .venv build runs
