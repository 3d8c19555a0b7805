# `make demo`, `make test` and `make test-slow` set everything up themselves, in a venv per Python version.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin

.PHONY: demo test test-slow parity soak docs lint format clean

demo: $(VENV)/ready
	$(BIN)/python train.py shapes --run runs/demo
	$(BIN)/python eval.py --run runs/demo --split shapes/test
	$(BIN)/fcn-jax report runs/demo
	@echo "the same for your own data: python train.py --help; your own images: fcn-jax predict --run runs/demo IMAGE --out DIR"

test: $(VENV)/ready-dev $(VENV)/compilers/libtpu
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/parity tests/integration

# What the quick tests have a sample of: every kill, fault, layout, family, width and dtype, and 2,000 damaged files. Hours.
test-slow: $(VENV)/ready-slow $(VENV)-onnx/ready $(VENV)/compilers/libtpu $(VENV)/compilers/jax_plugins
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/unit tests/parity tests/integration
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/slow
	$(VENV)-onnx/bin/python -m pytest -m "" -k "onnx or export" tests/parity/test_export.py tests/slow/test_pages.py
	$(BIN)/python tests/slow/soak.py --kills 10
	$(BIN)/python tests/slow/soak.py --gcs --kills 10

# The table of docs/numerics.md: every network at full width against PyTorch in float64; slow, and wants 20 GB.
PARITY := $(foreach s,32 16 8,fcn$(s)s fcn$(s)s_pad100 fcn$(s)s_ladder fcn$(s)s_resize) fcn8s_pad100_atonce fcns_ladder
PARITY += fcn_resnet50 fcn_resnet101

parity: $(PARITY:%=parity-%)

# With random weights, training of the ResNets amplifies rounding unless the steps are small: docs/numerics.md.
parity-fcn_resnet%: RATE := --lr 1e-5

parity-%: $(VENV)/ready-dev
	$(BIN)/fcn-jax parity $* --dtype float64 --steps 10 $(RATE) --max-error 1e-9 --out runs/parity/$*

# Hours of kills, faults and damaged input, docs/reliability.md; `make soak SOAK_KILLS=30` takes half an hour.
SOAK_KILLS ?= 300

soak: $(VENV)/ready-dev
	$(BIN)/python tests/slow/soak.py --kills $(SOAK_KILLS)

# The site: docs/_build/html/docs/index.html
docs: $(VENV)/ready-docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -b html . docs/_build/html

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv-* build docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# XLA's compilers for TPUs and GPUs, for the tests alone: beside the environment, where JAX would look for a TPU at every
# start. Linux x86-64 only; elsewhere the tests are skipped.
COMPILERS := -m pip install --quiet --no-deps --upgrade --target $(VENV)/compilers

$(VENV)/compilers/libtpu: | $(VENV)/ready-dev
	-$(BIN)/python $(COMPILERS) libtpu

$(VENV)/compilers/jax_plugins: | $(VENV)/ready-dev
	-version=$$($(BIN)/python -c "import jaxlib; print(jaxlib.__version__)") && \
	$(BIN)/python $(COMPILERS) jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version nvidia-cuda-nvcc-cu12

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python >= 3.11 is needed: make demo PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/ready-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

$(VENV)/ready-slow: $(VENV)/ready-dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,slow]"
	@touch $@

# jax2onnx holds orbax-checkpoint below a release that it does not need: an environment of its own.
$(VENV)-onnx/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-onnx
	$(VENV)-onnx/bin/python -m pip install --quiet --editable ".[onnx]" pytest hypothesis
	@touch $@

$(VENV)/ready-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
