# make demo    install into .venv and segment a shipped sample
# make test    install what the tests need and run all checks
# make docs    the documentation as a site, in site/
# make frontend    build the viewer's scripts from app/frontend (needs node 20); what it makes is committed
# make gpu-check    on a machine with a GPU: is it right, does it survive a lack of memory, is it fast
# Give another interpreter or build of torch by name: make demo PYTHON=python3.12 TORCH=torch==2.8.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs frontend gpu-check clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: whatever depends on it then keeps this build.
$(VENV)/.medseg: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.medseg
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/medseg label install --quiet
	touch $@

demo: $(VENV)/.medseg
	mkdir -p demo
	$(BIN)/medseg infer data/samples/hippocampus_003.nii.gz -o demo --overwrite

# In a process of their own: after the tests of the back ends, training a network in the same process can crash.
BACKENDS := tests/inference/test_backends.py

# nnU-Net, to hold imported models to its own predictor. Without its dependencies: timm brings a torchvision that does not
# load beside a CPU build of torch, and its U-Nets do not use it.
$(VENV)/.nnunet: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps nnunetv2==2.8.1 dynamic-network-architectures==0.4.4 \
	  acvl-utils==0.2.6 batchgenerators==0.25.5 batchgeneratorsv2==0.3.6
	$(BIN)/python -m pip install --quiet blosc2 connected-components-3d scikit-image scikit-learn seaborn pandas tqdm requests
	touch $@

test: $(VENV)/.dev $(VENV)/.nnunet
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MKDOCS)
	$(BIN)/python -m pytest --ignore=$(BACKENDS)
	$(BIN)/python -m pytest $(BACKENDS)

# Strict: a broken link, a page that is left out, or a docstring that does not fit its function fails.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs: $(VENV)/.dev
	$(MKDOCS)

frontend:
	cd app/frontend && npm ci && npm run build && npm test

gpu-check: $(VENV)/.medseg
	mkdir -p out
	$(BIN)/python benchmarks/gpu_check.py --json out/gpu-check.json

clean:
	rm -rf $(VENV) demo site
