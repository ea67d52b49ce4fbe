# Two commands matter: `make demo` and `make test`. Both make .venv and install the package when that is needed.

PYTHON  ?= python3
VENV    := .venv
PY      := $(VENV)/bin/python
OUT     ?= runs/stage1
ARGS    ?=
# TORCH=cpu takes PyTorch's CPU-only build: on Linux a download some ten times smaller than the default.
TORCH   ?=
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

# OpenMP threads that spin while they wait make two busy processes many times slower than one.
export OMP_WAIT_POLICY := PASSIVE
# "python3" must mean the kernel of .venv, not one that another project left in the home folder.
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PYTHONUNBUFFERED := 1

# A stamp holds the folder it was made for: a checkout that was copied or moved with its .venv must be installed again,
# or it would go on importing the library from the old folder.
# JupyterLab's own settings for this checkout: no news from elsewhere over the first page.
LAB        := runs/lab-settings
STAMP      := $(VENV)/.installed
STAMP_DEV  := $(VENV)/.installed-dev
STAMP_BOOK := $(VENV)/.installed-book
STAMP_BENCH := $(VENV)/.installed-bench
stale       = $(if $(wildcard $(1)),$(shell [ "$$(cat $(1))" = "$$(pwd -P)" ] || echo stale))

.DEFAULT_GOAL := help
.PHONY: help demo lab test notebooks book course train results results-check evidence noise checks detection ablations adaptation real fuzz course-targets viewer-targets pages bench gpu anatomies web web-targets lint clean FORCE

help:  ## this list
	@echo "mfdiff_lite: PET restoration from low-dose PET and MR"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo "Settings: PYTHON=python3.12 (who makes .venv), TORCH=cpu (smaller download on Linux), ARGS='...' (passed on)"

demo: $(STAMP)  ## restore one simulated head (notebook 00); say where the result is
	@rm -rf runs/demo
	@$(PY) notebooks/run.py --profile smoke --out runs/demo 00_quickstart
	@for f in 00_quickstart/table.txt 00_quickstart/restored.nii.gz 00_quickstart/figure.png 00_quickstart.html; do \
	  test -s runs/demo/$$f || { echo "the notebook ran but did not write runs/demo/$$f" >&2; exit 1; }; done
	@echo
	@cat runs/demo/00_quickstart/table.txt
	@echo
	@echo "restored volume  $$PWD/runs/demo/00_quickstart/restored.nii.gz"
	@echo "figure           $$PWD/runs/demo/00_quickstart/figure.png"
	@echo "to look at       file://$$PWD/runs/demo/00_quickstart.html"
	@echo
	@echo "next: make lab (the notebooks, in JupyterLab), or mfdiff restore on files of your own ($(PY) -m mfdiff_lite restore --help)"

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@mkdir -p $(LAB)/@jupyterlab/apputils-extension
	@echo '{"fetchNews": "false", "checkForUpdates": false}' > $(LAB)/@jupyterlab/apputils-extension/notification.jupyterlab-settings
	@# Root is the usual user of a container; helper files of the notebooks are not lessons.
	JUPYTERLAB_SETTINGS_DIR="$$PWD/$(LAB)" $(PY) -m jupyter lab --ServerApp.root_dir="$$PWD" \
	  --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) \
	  "--ContentsManager.hide_globs=['__pycache__','*.py','*.json','*.pyc']" $(ARGS)

test: $(STAMP_DEV)  ## the whole test suite, all notebooks included
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

notebooks: PROFILE ?= smoke
notebooks: $(STAMP)  ## run every notebook, write executed copies and HTML (PROFILE=smoke|cpu|gpu)
	$(PY) notebooks/run.py --profile $(PROFILE) --out runs/notebooks $(ARGS)

# Beyond smoke, notebook 07 trains for hours; in the book it is the smoke run.
HOURS := 07_full_gpu_training
book: PROFILE ?= cpu
book: $(STAMP_BOOK)  ## run every notebook and make one web site with search of them (runs/book/html)
	$(PY) notebooks/run.py --profile $(PROFILE) --out runs/book/executed $(filter-out %/$(HOURS).ipynb,$(wildcard notebooks/*.ipynb))
	$(PY) notebooks/run.py --profile smoke --out runs/book/executed $(HOURS)
	$(PY) notebooks/book.py runs/book/executed --out runs/book/html

course: $(STAMP)  ## make the assignments' student copies, solutions and grader (runs/course)
	$(PY) notebooks/assignments/course.py build --out runs/course $(ARGS)

train: PROFILE ?= cpu
train: $(STAMP)  ## train stage 1, or go on with it (PROFILE=cpu OUT=runs/stage1)
	$(PY) -m mfdiff_lite train --profile $(PROFILE) --out $(OUT) --resume $(ARGS)

results: $(STAMP_DEV)  ## measure the shipped weights on the test patients
	$(PY) benchmarks/results.py $(ARGS)
	$(PY) benchmarks/pages.py

results-check: $(STAMP_DEV)  ## measure the first patients again and compare with results/
	$(PY) benchmarks/results.py --check

evidence: $(STAMP_DEV)  ## measure the shipped weights against filters, wrong MRs and their own uncertainty
	$(PY) benchmarks/evidence.py $(ARGS)
	$(PY) benchmarks/pages.py

detection: $(STAMP_DEV)  ## ask observers whether known lesions at threshold survive restoring (half an hour)
	$(PY) benchmarks/detection.py $(ARGS)
	$(PY) benchmarks/pages.py

checks: $(STAMP_DEV)  ## count how often the checks of a scan are right, and measure the registration (half an hour)
	$(PY) benchmarks/checks.py $(ARGS)

ablations: $(STAMP_DEV)  ## train baselines and the model without its parts at one budget (hours), and compare
	$(PY) benchmarks/ablations.py $(ARGS)
	$(PY) benchmarks/pages.py

adaptation: $(STAMP_DEV)  ## adapt to shifted scanners without a standard-dose image (hours), and compare
	$(PY) benchmarks/adaptation.py $(ARGS)
	$(PY) benchmarks/pages.py

noise: $(STAMP_DEV)  ## filters, low counts, correlated noise, single slices against the best Gaussian (half an hour)
	$(PY) benchmarks/any_noise.py $(ARGS)
	$(PY) benchmarks/pages.py

real: $(STAMP_DEV)  ## put in what strangers bring in: bright things, edges, damaged files, kills (an hour)
	$(PY) benchmarks/real.py $(ARGS)
	$(PY) benchmarks/pages.py

fuzz: $(STAMP_DEV)  ## 10,000 mutated headers, streams, sidecars, weights and command lines (minutes)
	$(PY) benchmarks/fuzz.py $(ARGS)

course-targets: $(STAMP_DEV)  ## measure what notebooks and book cost (half an hour)
	$(PY) benchmarks/course.py $(ARGS)

bench: $(STAMP_BENCH)  ## measure speed against other packages, and how cost grows (10 minutes on an idle machine)
	OMP_NUM_THREADS=1 $(PY) benchmarks/bench.py $(ARGS)

gpu: MINUTES ?= 20
gpu: $(STAMP_BENCH)  ## everything to do with a GPU at hand, resumable (MINUTES=20 of training; says so where there is none)
	$(PY) benchmarks/gpu.py --minutes $(MINUTES) $(ARGS)

viewer-targets: $(STAMP_DEV)  ## measure the viewer in Chromium: speed, size, fit, tests (minutes)
	$(PY) benchmarks/viewer.py $(ARGS)

pages: $(STAMP_DEV)  ## write tables, claims and sentences about results/ into README, docs/ and notebooks
	$(PY) benchmarks/pages.py

anatomies: $(STAMP_DEV)  ## rebuild the embedded anatomies and compare with the stored files
	$(PY) data/build_anatomies.py --check $(ARGS)

web: $(STAMP_DEV)  ## make the page on which the model restores in a browser (runs/web/try.html)
	$(PY) web/build.py $(ARGS)

web-targets: $(STAMP_DEV)  ## measure that page in headless Chromium (make web first)
	$(PY) benchmarks/web.py $(ARGS)

lint: $(STAMP_DEV)  ## ruff and mypy
	$(PY) -m ruff check . $(ARGS)
	$(PY) -m ruff format --check .
	$(PY) -m mypy mfdiff_lite

clean:  ## remove caches, the demo and executed notebooks, also as a site (keeps .venv and trained models)
	rm -rf runs/demo runs/notebooks runs/book build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

# bin/pip is the last thing that venv writes, so a half-made .venv is completed on the next call.
$(VENV)/bin/pip:
	@command -v "$(PYTHON)" >/dev/null || { echo "No '$(PYTHON)' found: install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$$("$(PYTHON)" --version 2>&1) is too old, 3.10 or newer is needed; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version 2>&1)"
	@"$(PYTHON)" -m venv $(VENV) || { echo "'$(PYTHON) -m venv $(VENV)' failed: remove $(VENV) and see the message above" >&2; exit 1; }

define install
@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "$(VENV) has no working Python 3.10 or newer: remove it (rm -rf $(VENV)) and run make again" >&2; exit 1; }
@echo "Installing $(1) into $(VENV) (the first time this takes minutes: PyTorch is large)"
@$(PIP_INSTALL) --editable "$(1)" > $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; echo "pip could not install $(1) into $(VENV): see its message above, then run make again" >&2; exit 1; }
endef

$(STAMP): pyproject.toml $(if $(call stale,$(STAMP)),FORCE) | $(VENV)/bin/pip
	$(call install,.[course])
	@pwd -P > $@

# [book] holds [course], and [dev] holds both.
$(STAMP_BOOK): pyproject.toml $(if $(call stale,$(STAMP_BOOK)),FORCE) | $(VENV)/bin/pip
	$(call install,.[book])
	@pwd -P > $(STAMP); pwd -P > $@

$(STAMP_DEV): pyproject.toml $(if $(call stale,$(STAMP_DEV)),FORCE) | $(VENV)/bin/pip
	$(call install,.[dev])
	@pwd -P > $(STAMP); pwd -P > $(STAMP_BOOK); pwd -P > $@

# Only adds to what is there: a PyTorch that is installed already stays.
$(STAMP_BENCH): $(STAMP_DEV) $(if $(call stale,$(STAMP_BENCH)),FORCE)
	$(call install,.[bench])
	@pwd -P > $@

FORCE:
