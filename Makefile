# make demo      generate a long-tailed data set, train a detector with EQL on it, evaluate it
# make test      lint, and the tests that take less than ten seconds each
# make test-all  lint, and all tests: what CI runs
# make test-gpu  the tests that need a CUDA device
# make lint      lint and types alone
# make docs      the site of docs/, into site/, from the code and without a network
# make bench     the benchmarks, sized for this machine
# Each installs what it needs into .venv first; with OLDEST=1 a new .venv gets the oldest torch.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: demo test test-all test-gpu lint docs bench clean

# Where pip installs, and where Detectron2 lies in the wheel that carries it.
SITE = $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")
CARRIED := geowatch_tpl/submodules_static/detectron2

$(READY): requirements.txt requirements-detectron2.txt pyproject.toml tools/restore_detectron2.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(if $(OLDEST),$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-detectron2.txt
	$(PY) tools/restore_detectron2.py "$(SITE)/$(CARRIED)/detectron2"
	echo $(CARRIED) > "$(SITE)/detectron2.pth"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

.venv: $(READY)

demo: $(READY)
	$(PY) -m balanced_det.data.shapes --out datasets/shapes
	$(PY) train_net.py --config-file configs/quickstart.yaml BALANCE.OVERWRITE True

# A process that has done its half of the files takes tests from the end of the other's: what a file
# sets up once is set up in one process, but for the files that are shared at the end.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test: lint
	$(PYTEST) -m "not slow"

# Types are checked against the newest torch alone.
test-all: $(if $(OLDEST),$(READY),lint)
	$(PYTEST)

test-gpu: $(READY)
	$(PY) -m pytest -m gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/docs-ready: $(READY) requirements-docs.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.txt
	touch $(VENV)/docs-ready

docs: $(VENV)/docs-ready
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(PY) -W ignore -m mkdocs build --strict --quiet
	@echo "Written to site/: open site/index.html"

bench: $(READY)
	$(PY) benchmarks/bench_losses.py
	$(PY) benchmarks/bench_samplers.py
	$(PY) benchmarks/bench_convolution.py
	$(PY) benchmarks/bench_roi_align.py --rounds 1
	$(PY) benchmarks/bench_detectors.py --steps 3 --rounds 1
	$(PY) benchmarks/bench_evaluation.py --images 100 --full 2000

clean:
	rm -rf $(VENV) output site datasets/shapes
