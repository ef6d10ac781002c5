# Two commands a newcomer needs: `make demo` and `make test`. Both set the machine up themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: setup demo demo-scratch test parity aot lint lock clean

# One stamp a set of requirements: a second `make` sees it is current and starts at once.
$(VENV)/.%.stamp: requirements/%.txt pyproject.toml
	@tools/install $(PYTHON) $(VENV) $<
	@touch $@

setup: $(VENV)/.run.stamp  ## create .venv and install what running needs

demo: setup  ## fine-tune the shipped pipeline on a colour it has never seen
	@$(BIN)/python tools/demo.py

demo-scratch: setup  ## train VAE and STDiT3 from nothing: make demo-scratch MINUTES=60
	@$(BIN)/python tools/demo.py --scratch --minutes=$(or $(MINUTES),60)

test: $(VENV)/.test.stamp  ## the whole suite, no torch needed; WORKERS=N processes
	@$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist worksteal $(ARGS)

parity: $(VENV)/.parity.stamp  ## live comparison with diffusers and transformers (torch)
	@$(BIN)/python -m pytest -m parity tests/parity $(ARGS)

aot: $(VENV)/.aot.stamp  ## compile kernels and a step for TPUs, with libtpu and without a TPU
	@$(BIN)/python -m pytest -m tpu_aot tests/kernels tests/plan $(ARGS)

lint: $(VENV)/.test.stamp
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

lock: $(VENV)/.test.stamp  ## renew the pinned requirement files
	@tools/lock $(BIN)

clean:
	rm -rf $(VENV) .cache build dist
