# make setup | demo | test | search | check | format | bench       (make help says what each does)

PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
TEST_ARGS ?=
IMAGE ?=
ENGINE ?= all
MODULE ?=
SECONDS ?= 600
SEED ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# Written by every in-place build of the native modules.
NATIVE := xattn_kernels/_build.json
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find cmake csrc build_backend -type f \
	-not -path '*/__pycache__/*')
CPP_SOURCES := $(shell find csrc tests/cuda/twin -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test search check format bench bench-full gpu-check \
	expected-tests

help:
	@echo "make setup     virtual environment in $(VENV), dependencies, native modules"
	@echo "make demo      cross-task and cross-scale attention on a photograph [IMAGE=path]"
	@echo "make test      all tests, and that none is missing or skipped unannounced"
	@echo "make search    random cases against float64, for some time [SECONDS=600] [SEED=first]"
	@echo "make check     formatting, lint, types and which way imports run"
	@echo "make format    reformat Python and C++"
	@echo "make bench     speed and memory side by side, in 3 minutes; a page in out/bench/quick"
	@echo "make bench-full  the same for everything, in half an hour; a page in out/bench/full"
	@echo "make gpu-check OUT=dir  the GPU engines on this machine's GPU, with its own python [ENGINE=cuda]"
	@echo "make expected-tests    write tests/expected_tests.json anew"

setup: $(INSTALLED)
	@$(MAKE) --silent --no-print-directory $(NATIVE)

# torch first and by itself, so that nothing below chooses another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[models,onnx,bench,dev]'
	@touch $@

$(NATIVE): $(NATIVE_SOURCES) | $(INSTALLED)
	echo "Native sources changed: building"
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(if $(IMAGE),--image '$(IMAGE)')

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --expected-tests=check $(TEST_ARGS)

search: setup
	$(BIN)/python -m tests.search --seconds $(SECONDS) $(if $(SEED),--from $(SEED))

expected-tests: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --expected-tests=write

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: setup
	$(BIN)/python -m xattn_kernels bench --preset quick

bench-full: setup
	$(BIN)/python -m xattn_kernels bench --preset full

gpu-check:
	@test -n "$(OUT)" || { echo "OUT: expected a folder, as in make gpu-check OUT=out/gpu"; exit 2; }
	$(PYTHON) -m benchmarks.gpu_check '$(OUT)' --engine $(ENGINE) $(if $(MODULE),--module '$(MODULE)')
