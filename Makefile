# retort: `make demo` runs the main job on this machine, `make test` passes the tests.
# Both do all the set-up themselves and can be run again at any time.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env setup build demo test test-rust test-parity test-python lint fmt clippy deny layers clean-demo

# Everything that is downloaded or built lives here, outside the checkout.
export RETORT_CACHE ?= $(HOME)/.cache/retort
export CARGO_TARGET_DIR ?= $(RETORT_CACHE)/target
PYTHON ?= python3
FETCH := $(PYTHON) setup/fetch.py
export LIBTORCH ?= $(shell $(FETCH) libtorch-folder)
export LIBTORCH_CXX11_ABI := 1
export RUSTFLAGS ?= -C link-arg=-Wl,-rpath,$(LIBTORCH)/lib
BIN := $(CARGO_TARGET_DIR)/debug
# Checkouts may share a target folder, but cargo compares only dates: what another checkout built last
# would pass for ours. So a checkout that builds after another one makes its sources new.
LAST_CHECKOUT := $(CARGO_TARGET_DIR)/last-checkout
SOURCES := proto crates orchestrator teacher student cli tests
# Imported models; specs name them by folder name.
export RETORT_MODELS ?= $(RETORT_CACHE)/models
TEACHER := $(RETORT_MODELS)/smollm2-135m-instruct
DEMO_HOME ?= $(RETORT_CACHE)/demo

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

env: ## Print what cargo needs in its environment: eval "$$(make -s env)"
	@echo 'export RETORT_CACHE="$(RETORT_CACHE)" CARGO_TARGET_DIR="$(CARGO_TARGET_DIR)" LIBTORCH="$(LIBTORCH)" LIBTORCH_CXX11_ABI=1 RUSTFLAGS="$(RUSTFLAGS)" RETORT_MODELS="$(RETORT_MODELS)" PATH="$(BIN):$$PATH"'

setup: ## Download libtorch and the demo's teacher (checksummed, cached)
	@$(FETCH) libtorch teacher
	@mkdir -p "$(CARGO_TARGET_DIR)"
	@[ "$$(cat "$(LAST_CHECKOUT)" 2>/dev/null)" = "$(CURDIR)" ] || \
	  { find $(SOURCES) -type f -exec touch {} + && echo "$(CURDIR)" > "$(LAST_CHECKOUT)"; }

build: setup ## Build every binary
	cargo build --workspace --locked

$(TEACHER)/retort-import.json: | build
	$(BIN)/retort model import $(RETORT_CACHE)/models/src/SmolLM2-135M-Instruct.Q4_1.gguf --out $(TEACHER)

demo: build $(TEACHER)/retort-import.json ## Distil a 10-layer student from SmolLM2-135M on this machine
	$(BIN)/retort run examples/support/job.yaml --home $(DEMO_HOME) $$([ -t 1 ] || echo --plain)

test: test-rust test-parity test-python ## Every test

test-rust: build $(TEACHER)/retort-import.json ## Unit, property, golden, end-to-end and kill tests
	cargo test --workspace --locked --no-fail-fast

test-parity: build $(TEACHER)/retort-import.json ## An exported student against transformers
	@$(FETCH) transformers
	cargo test --workspace --locked --features retort-tests/transformers --test transformers

test-python: ## retort-data, the reader in Python
	@$(FETCH) retort-data
	cd python && $(RETORT_CACHE)/venv-retort-data/bin/python -m pytest -q -p no:cacheprovider tests

lint: fmt clippy layers deny ## Format, lints, dependency direction, licences

fmt: ## Check the format
	cargo fmt --all --check

clippy: setup ## Lints, warnings are errors
	cargo clippy --workspace --all-targets --locked -- -D warnings

deny: ## Licences, bans and sources of every dependency
	@$(FETCH) deny
	$(RETORT_CACHE)/bin/cargo-deny --all-features check licenses bans sources

layers: ## Who may depend on whom
	@$(PYTHON) setup/layers.py

clean-demo: ## Remove what the demo made (not the downloads)
	rm -rf "$(DEMO_HOME)"
