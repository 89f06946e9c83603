# make demo   generate a long-tailed data set, train a detector with EQL on it, evaluate it
# make test   lint and tests
# make lint   lint and types alone
# make docs   the site of docs/, into site/, from the code and without a network
# make bench  the benchmarks, sized for this machine
# Each installs what it needs into .venv first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: demo test lint docs bench clean

# Where pip installs, and where Detectron2 lies in the wheel that carries it.
SITE = $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")
CARRIED := geowatch_tpl/submodules_static/detectron2

$(READY): requirements.txt requirements-detectron2.txt pyproject.toml tools/restore_detectron2.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-detectron2.txt
	$(PY) tools/restore_detectron2.py "$(SITE)/$(CARRIED)/detectron2"
	echo $(CARRIED) > "$(SITE)/detectron2.pth"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

.venv: $(READY)

demo: $(READY)
	$(PY) -m balanced_det.data.shapes --out datasets/shapes
	$(PY) train_net.py --config-file configs/quickstart.yaml BALANCE.OVERWRITE True

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

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
