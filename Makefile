# Needs Python 3.10 or newer, pip and make; everything else goes into $(VENV), once.
#
#   make bench     correctness, then times beside torch and every peer installed   (ARGS='--op rms_norm')
#   make test      the whole test suite                                            (ARGS='-k backward')
#   make check     every op against float64, as a table                            (ARGS='--dtype bf16')
#   make sanitize  every kernel under memcheck and racecheck, on a GPU
#   make lint      formatting, rules, types
#   make hub       the project that Hugging Face's kernel-builder builds, in dist/hub (hub/README.md)
#   make clean     remove what these made
#
# PYTHON picks the interpreter and VENV the environment's place; VENV may be an environment that exists already.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: bench test check sanitize lint hub clean

bench: $(READY)
	$(BIN)/trinorm bench $(ARGS)

# Two processes of one thread each: the interpreter computes on one core, and more threads than cores only wait. One that
# is done takes tests that wait behind the other's slow ones.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

check: $(READY)
	$(BIN)/trinorm check $(ARGS)

# Tensors of their own, so that a step past one is past its allocation.
sanitize: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/every_kernel.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python tests/every_kernel.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

hub:
	$(PYTHON) hub/layout.py dist/hub

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Where venv cannot bring pip (Debian packs the two apart), $(PYTHON)'s own pip puts one in. __init__.py has the version.
# What the build requires is constrained too: older pips pass PIP_CONSTRAINT on to it, newer ones PIP_BUILD_CONSTRAINT alone.
$(READY): pyproject.toml constraints.txt src/trinorm/__init__.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("trinorm needs Python 3.10 or newer; set PYTHON")'
	@$(BIN)/python -m pip --version 2>/dev/null || $(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip install --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --no-compile --editable '.[test,lint]'
	@# By all cores, which pip does by one. What is of another Python's syntax is left.
	@$(BIN)/python -m compileall -qq -j 0 "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
	touch $@
