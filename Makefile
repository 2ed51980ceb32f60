# Two commands: `make train` runs the main job, `make test` all the tests. Each first sets up what it needs.
#
#   make train DATA=DIR             on the MNIST files in DIR
#   make train ARGS="--epochs 3"    with other arguments of examples/train_mlp.py
#   make study                      what batch norm does, measured, with a report; ARGS="--quick" in minutes
#   make example-cpp                the same network trained and proved by a C++ program; DATA and ARGS as above
#   make test-arm64                 the kernels on arm64, under emulation
#   make sanitize                   the kernels under the address, undefined-behaviour and thread sanitizers, valgrind
#   make mutation                   deliberate faults, one at a time in a copy, each to be caught by the tests
#   make mutation ARGS="--list"     what they are; ARGS="--only NAME" for some of them
#   make fuzz SECONDS=60            fuzzing of the kernels' interface and of the C++ example's reader
#   make coverage                   what the tests reach, of C++ and Python, build/coverage/html; ARGS goes to pytest
#   make wheel                      the sdist and a manylinux wheel in dist/, installed and imported beside torch alone
#   make docs                       the documentation as a site, build/docs/index.html
#   make accuracy                   the table of errors, docs/accuracy.md; ARGS="--quick" prints a small one
#   make bench                      time against the builtin and other peers, in ten minutes
#   make bench ARGS="--docs docs"   the same, into docs/performance.md; python -m benchmarks --help has more
#   make bench-quick                fewer shapes, in about a minute
#   make bench-cpp                  the kernels alone (Google Benchmark); ARGS="--benchmark_filter=memcpy" and others
.DEFAULT_GOAL := help
.PHONY: help setup train study test test-cpp test-python test-arm64 example-cpp sanitize mutation fuzz coverage accuracy \
  bench bench-quick bench-cpp lint wheel docs clean

export VENV ?= .venv
export BUILD ?= build/dev
PLACEMENTS ?= after before
ARGS ?=
DATA ?=
PARTS ?=
SECONDS ?= 60

help:
	@sed -n 's/^# \{0,1\}//p;/^\./q' Makefile

setup:
	@scripts/setup_env.sh

train: setup
	@set -e; for placement in $(PLACEMENTS); do \
	  $(VENV)/bin/python examples/train_mlp.py --placement $$placement $(if $(DATA),--data "$(DATA)") $(ARGS); \
	done

study: setup
	@PYTHONPATH=examples $(VENV)/bin/python -m study $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint test-cpp test-python

test-cpp: setup
	@scripts/setup_tests.sh
	@$(VENV)/bin/ctest --test-dir $(BUILD) --output-on-failure

test-python: setup
	@$(VENV)/bin/python -m pytest -q

example-cpp: setup
	@DATA="$(DATA)" PLACEMENTS="$(PLACEMENTS)" ARGS="$(ARGS)" scripts/example_cpp.sh

test-arm64: test-cpp
	@scripts/test_arm64.sh

sanitize: setup
	@scripts/setup_tests.sh gtest
	@scripts/sanitize.sh $(PARTS)

mutation: setup
	@scripts/setup_tests.sh gtest
	@$(VENV)/bin/python scripts/mutate.py $(ARGS)

fuzz: setup
	@scripts/setup_tests.sh gtest
	@scripts/fuzz.sh $(SECONDS)

coverage: setup
	@scripts/setup_tests.sh gtest
	@ARGS="$(ARGS)" scripts/coverage.sh $(PARTS)

docs: setup
	@scripts/docs.sh

accuracy: setup
	@$(VENV)/bin/python benchmarks/accuracy.py $(if $(ARGS),$(ARGS),--docs docs)

bench: setup
	@$(VENV)/bin/python -m benchmarks $(ARGS)

bench-quick: setup
	@$(VENV)/bin/python -m benchmarks --quick $(ARGS)

bench-cpp: setup
	@PATH="$(VENV)/bin:$$PATH"; mkdir -p build/bench/cpp; \
	cmake -S . -B build/bench/cpp -DTORCH_BN_BENCH=ON -DTORCH_BN_KERNELS_ONLY=ON > build/bench/cpp/configure.log \
	  && cmake --build build/bench/cpp --parallel
	@build/bench/cpp/benchmarks/cpp/kernels_bench $(ARGS)

lint: setup
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python -m mypy.stubtest torch_bn._C
	@git ls-files '*.cpp' '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

wheel: setup
	@scripts/wheel.sh

clean:
	rm -rf build dist runs torch_bn/_C*.so torch_bn/_build_config.py torch_bn/lib torch_bn/include torch_bn/share $(VENV)/.installed
