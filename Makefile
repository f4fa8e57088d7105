# Every target that needs Python runs it from .venv, which is made on demand.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
# Beside which `psgd bench` puts ours. quad-torch 0.3.0 is its last release that steps; 0.4.5, in a folder of its own,
# shows why. psgd-jax imports flax without asking for it.
PEERS := kron-torch==0.3.3 quad-torch==0.3.0 heavyball==3.2.1 pytorch-optimizer==4.1.0
PEERS_JAX := psgd-jax==0.2.9 optax==0.2.4 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
PEERS_QUAD := quad-torch==0.4.5

# One numerical thread per test worker; more only fight for the same cores.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: help venv demo test lint format golden stubs soak fuzz mesh measures wheel peers

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

venv: $(STAMP) ## make or renew .venv with the pinned dependencies

demo: $(STAMP) ## run the demonstration, about a minute, and write report.html
	$(BIN)/psgd demo --report report.html

# A test worker compiles by itself: the two processes that PyTorch would start for each of them load PyTorch first.
test: export TORCHINDUCTOR_COMPILE_THREADS := 1
test: $(STAMP) ## run every test; with XLA_FLAGS= JAX compiles for them as for users, which takes twice as long
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP) ## check style, formatting and types; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## fix what ruff can fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## replay the recorded runs of the published packages
	$(BIN)/psgd golden conformance/internal/golden

stubs: $(STAMP) ## write the type stubs of the backends from the registry of methods
	$(BIN)/python -m conformance.internal.stubs

soak: $(STAMP) ## walk every method for very long and see that nothing drifts
	$(BIN)/python -m conformance.internal.soak

fuzz: $(STAMP) ## walk every method on hostile gradients in both frameworks
	$(BIN)/python -m conformance.internal.fuzz

mesh: $(STAMP) ## walk every method on meshes of eight devices and count what is exchanged
	$(BIN)/python -m conformance.internal.mesh

measures: $(STAMP) ## count long functions and files, duplicates, arguments of type Any, private imports
	$(BIN)/python -m conformance.internal.measures

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m build --wheel

.venv-peers/.stamp: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q -c constraints.txt -e '.[all]' $(PEERS)
	touch $@

.venv-peers-jax/.stamp: Makefile
	$(PYTHON) -m venv .venv-peers-jax
	.venv-peers-jax/bin/pip install -q $(PEERS_JAX)
	touch $@

.venv-peers-quad/.stamp: .venv-peers/.stamp
	.venv-peers/bin/pip install -q --no-deps --upgrade --target .venv-peers-quad $(PEERS_QUAD)
	touch $@

peers: .venv-peers/.stamp .venv-peers-jax/.stamp .venv-peers-quad/.stamp ## make the environments of the optimizers that `psgd bench` puts beside ours
