# retort: `make demo` runs the main job on this machine, `make test` passes the tests.
# Both do all the set-up themselves and can be run again at any time.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env setup build demo test test-rust test-parity ask-llama-cpp test-python fuzz fuzz-build fuzz-corpus bench-fidelity bench-teacher bench-student bench-parallel bench-quality rehearse-405b bench-shard-memory weights-quality lint fmt clippy deny layers clean-demo

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

# The fuzzer is built apart from all else: with coverage counters in every crate, which stable Rust can do,
# and for a named target, so that build scripts have none.
FUZZ_SECONDS ?= 60
# What it finds: corpus/ grows from run to run, crashes/ has a file each.
FUZZ_HOME ?= $(RETORT_CACHE)/fuzz/decode
FUZZ := crates/artifact/fuzz
FUZZ_TARGET = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_TARGET_DIR ?= $(RETORT_CACHE)/target-fuzz
FUZZ_BIN = $(FUZZ_TARGET_DIR)/$(FUZZ_TARGET)/debug/decode
FUZZ_RUSTFLAGS := -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters \
  pc-table trace-compares) -Ccodegen-units=1 --cfg fuzzing
FUZZ_OPTIONS := -max_len=8000 -len_control=0 -timeout=10 -rss_limit_mb=2048

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
	@echo "demo: a student of 10 layers learns from SmolLM2-135M; 3 to 10 minutes. Stopped, it goes on with: make demo"
	$(BIN)/retort run examples/support/job.yaml --home $(DEMO_HOME)

test: test-rust test-parity test-python ## Every test

test-rust: build $(TEACHER)/retort-import.json ## Unit, property, golden, end-to-end and kill tests
	cargo test --workspace --locked --no-fail-fast

test-parity: build $(TEACHER)/retort-import.json ## An exported student against transformers, its adapters against PEFT
	@$(FETCH) transformers peft
	cargo test --workspace --locked --features retort-tests/transformers --test transformers

# Not part of `make test`: llama.cpp moves on, and its wheel is large.
ask-llama-cpp: build $(TEACHER)/retort-import.json ## An exported GGUF file in llama.cpp: it loads and answers
	@$(FETCH) llama-cpp
	$(BIN)/retort model export $(TEACHER) --format gguf --type q8_0 --force --out $(RETORT_CACHE)/ask-llama-cpp.gguf
	$(RETORT_CACHE)/venv-llama-cpp/bin/python tests/parity/ask_llama_cpp.py $(RETORT_CACHE)/ask-llama-cpp.gguf \
	  "What is the capital of France? Answer briefly."
	@rm $(RETORT_CACHE)/ask-llama-cpp.gguf

test-python: ## retort-data, the reader in Python
	@$(FETCH) retort-data
	cd python && $(RETORT_CACHE)/venv-retort-data/bin/python -m pytest -q -p no:cacheprovider tests

fuzz-build:
	CARGO_TARGET_DIR=$(FUZZ_TARGET_DIR) RUSTFLAGS="$(FUZZ_RUSTFLAGS)" \
	  cargo build --locked --manifest-path $(FUZZ)/Cargo.toml --target $(FUZZ_TARGET)

fuzz: fuzz-build ## Fuzz the soft-target decoder for FUZZ_SECONDS (60)
	@mkdir -p $(FUZZ_HOME)/corpus $(FUZZ_HOME)/crashes
	@echo "fuzzing for $(FUZZ_SECONDS) s; log in $(FUZZ_HOME)/log"
	@$(FUZZ_BIN) $(FUZZ_OPTIONS) -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 \
	  -artifact_prefix=$(FUZZ_HOME)/crashes/ $(FUZZ_HOME)/corpus $(FUZZ)/corpus/decode 2> $(FUZZ_HOME)/log || { \
	  tail -n 40 $(FUZZ_HOME)/log; \
	  echo "The input that failed is in $(FUZZ_HOME)/crashes; replay it with: $(FUZZ_BIN) FILE"; exit 1; }
	@grep -E 'cov: |^stat::(number_of|average|peak)' $(FUZZ_HOME)/log | tail -n 4

# Run it when the format or the decoder changes. The merge writes first what adds the most coverage.
fuzz-corpus: fuzz-build setup ## Make the fuzzer's corpus anew: seeds, FUZZ_SECONDS of fuzzing, the fewest files that cover as much
	@rm -rf $(FUZZ_HOME)/seeds $(FUZZ_HOME)/merged && mkdir -p $(FUZZ_HOME)/seeds $(FUZZ_HOME)/merged
	RETORT_WRITE_SEEDS=$(FUZZ_HOME)/seeds cargo test --workspace --locked --test soft_targets -- the_harness_takes_every_seed
	cp $(FUZZ_HOME)/seeds/* $(FUZZ)/corpus/decode/
	$(MAKE) fuzz
	$(FUZZ_BIN) $(FUZZ_OPTIONS) -set_cover_merge=1 -use_counters=0 $(FUZZ_HOME)/merged $(FUZZ_HOME)/seeds \
	  $(FUZZ)/corpus/decode $(FUZZ_HOME)/corpus 2> $(FUZZ_HOME)/merge-log
	rm $(FUZZ)/corpus/decode/*
	ls -tr $(FUZZ_HOME)/merged | head -n 22 | xargs -I FILE cp $(FUZZ_HOME)/merged/FILE $(FUZZ)/corpus/decode/
	cp $(FUZZ_HOME)/seeds/* $(FUZZ)/corpus/decode/

# Kept between runs: a run that was stopped goes on. Longer than an hour on two cores.
FIDELITY_HOME ?= $(RETORT_CACHE)/fidelity

bench-fidelity: build $(TEACHER)/retort-import.json ## What each codec costs, keeps, and does to a student: docs/fidelity.md's table and plot
	@$(FETCH) fidelity
	cargo build --workspace --locked --example fidelity
	$(BIN)/examples/fidelity $(FIDELITY_HOME)
	$(RETORT_CACHE)/venv-fidelity/bin/python tests/benches/fidelity/draw.py $(FIDELITY_HOME)/figures.json docs/fidelity.png

# About a quarter of an hour, with nothing else running; more flags in BENCH_TEACHER, of which --quick makes it two minutes.
BENCH_TEACHER ?=

bench-teacher: build $(TEACHER)/retort-import.json ## The teacher beside transformers, vLLM and the bare matrix products: docs/teacher-speed.md's tables
	@$(FETCH) transformers || echo "goes on without transformers"
	@$(FETCH) vllm || echo "goes on without vLLM"
	cargo build --workspace --locked --example teacher
	$(BIN)/examples/teacher --model $(TEACHER) --cache $(RETORT_CACHE) $(BENCH_TEACHER)

# A quarter of an hour, with nothing else running; BENCH_STUDENT="--only steps" or "--only job" is half of it.
BENCH_STUDENT ?=

bench-student: build $(TEACHER)/retort-import.json ## A distillation step beside plain PyTorch's, and what a job pays for rows and checkpoints
	@$(FETCH) transformers
	cargo build --workspace --locked --examples
	$(BIN)/examples/student --model $(TEACHER) --cache $(RETORT_CACHE) $(BENCH_STUDENT)

# As root, for a network namespace; some twenty minutes are expected, with nothing else running. BENCH_PARALLEL=--quick is a trial.
BENCH_PARALLEL ?=

bench-parallel: build $(TEACHER)/retort-import.json ## Two students that train one model, over links of three rates: docs/parallel-training.md's tables
	cargo build --workspace --locked --example parallel
	$(BIN)/examples/parallel --cache $(RETORT_CACHE) $(BENCH_PARALLEL)

# Kept between runs: a run that was stopped goes on. Some three hours on two cores; BENCH_QUALITY="--seeds 1" is a third of it.
QUALITY_HOME ?= $(RETORT_CACHE)/quality
BENCH_QUALITY ?=

bench-quality: build $(TEACHER)/retort-import.json ## A job beside the same training in PyTorch with full teacher logits: docs/quality.md's table
	@$(FETCH) transformers texts
	$(RETORT_CACHE)/venv-transformers/bin/python tests/benches/quality/compare.py --home $(QUALITY_HOME) --model $(TEACHER) \
	  --retort $(BIN)/retort --archive $(RETORT_CACHE)/texts/django.tar.gz $(BENCH_QUALITY)

# The checkpoint, 430 MB, is kept for the next time.
rehearse-405b: build ## The 405B's structure in 16 stages on this machine, its width shrunk: score, generate, lose a stage
	cargo build --workspace --locked --example rehearse_405b
	$(BIN)/examples/rehearse_405b $(RETORT_CACHE)/rehearsal

bench-shard-memory: setup ## Peak memory of writing and reading shards of 10 and 1,000 MB
	cargo build --workspace --locked --example shard_memory
	@for megabytes in 10 1000; do for what in write read; do \
	  $(BIN)/examples/shard_memory $$what $(RETORT_CACHE)/shard-memory.parquet $$megabytes || exit 1; done; done; \
	  rm $(RETORT_CACHE)/shard-memory.parquet

weights-quality: build $(TEACHER)/retort-import.json ## What keeping a teacher's weights in bf16, int8 or fp8 costs
	cargo build --workspace --locked --example weights_quality
	$(BIN)/examples/weights_quality $(TEACHER)

lint: fmt clippy layers deny ## Format, lints, dependency direction, licences

fmt: ## Check the format
	cargo fmt --all --check
	cargo fmt --manifest-path $(FUZZ)/Cargo.toml --check

clippy: setup ## Lints, warnings are errors
	cargo clippy --workspace --all-targets --locked -- -D warnings

deny: ## Licences, bans and sources of every dependency
	@$(FETCH) deny
	$(RETORT_CACHE)/bin/cargo-deny --all-features check licenses bans sources
	$(RETORT_CACHE)/bin/cargo-deny --manifest-path $(FUZZ)/Cargo.toml --config deny.toml check licenses bans sources

layers: ## Who may depend on whom
	@$(PYTHON) setup/layers.py

clean-demo: ## Remove what the demo made (not the downloads)
	rm -rf "$(DEMO_HOME)"
