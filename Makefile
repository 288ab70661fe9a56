# What people do with a checkout. `make help` lists it.
#
# Everything goes through cargo; this file only adds what cargo cannot install (scripts/setup.sh). Tests and
# lints share one profile, the optimised dev profile, so that the dependencies are compiled once.

CARGO ?= cargo
FLAGS ?= --locked
# Goes into checkpoints; nothing where this is no checkout.
REVISION = $(shell git describe --always --dirty --abbrev=40 --match= 2>/dev/null)
PROGRAM := $(or $(CARGO_TARGET_DIR),./target)/release/fulgur

.PHONY: help setup build demo test soak check-cuda bench bench-gpu bench-lm bench-vision engine-gpu sanitize-gpu soak-annotate

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install missing system packages (FFmpeg libraries, clang, pkg-config)
	@./scripts/setup.sh

build: setup ## build the program: target/release/fulgur
	FULGUR_REVISION="$(REVISION)" $(CARGO) build $(FLAGS) --release

demo: build ## make a clip from a sentence: demo.mp4, with demo.png and demo.json
	$(PROGRAM) generate "a dog barks as it drops in from the left" -o demo.mp4 --report demo.png
	@echo
	@echo "demo.mp4   the clip; any player plays it. A dog falls in from the upper left, and its bark should begin as it"
	@echo "           lands."
	@echo "demo.png   the clip on one page: frames above the waveform and the spectrogram, on one axis of time. Look for"
	@echo "           the frame in which the dog first stands on the ground: the sound should begin under it."
	@echo "demo.json  everything that made the clip: the same prompt, seed and settings make it again."
	@echo
	@echo "Your own: $(PROGRAM) generate \"a bell rings as it bounces on the floor\" --seed 7 -o bell.mp4"
	@echo "docs/vocabulary.md lists the things, motions, places and times that the model knows."

test: setup ## format check, lints, and every test
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(FLAGS) --workspace --all-targets -- -D warnings
	$(CARGO) test $(FLAGS) --workspace
	@./scripts/gpu-record.sh

soak: ## kill training at 20 random moments of saving; takes a minute
	$(CARGO) test $(FLAGS) -p fulgur --test end_to_end -- --ignored soak

soak-annotate: ## kill the annotation of 100,000 clips at 10 random moments, and compare manifests; takes a minute
	$(CARGO) test $(FLAGS) -p fulgur --test end_to_end -- --ignored --nocapture kills_of_a_hundred_thousand_clips

check-cuda: ## compile everything for GPUs, without one; fetches a CUDA toolkit where there is none
	@./scripts/check-cuda.sh

bench: ## time the operators on the CPU, after their tests
	$(CARGO) test $(FLAGS) --release -p fulgur-kernels --lib -- additive decay ema log_sum
	$(CARGO) bench $(FLAGS) -p fulgur-kernels --bench decay
	$(CARGO) bench $(FLAGS) -p fulgur-kernels --bench additive

bench-gpu: ## time the operators and their peers on a GPU, after their tests: docs/benchmarks.md
	$(CARGO) build $(FLAGS) --release -p fulgur-kernels --features cuda --example check_cuda --example bench_cuda
	./scripts/bench-gpu.py

bench-lm: ## time whole training steps of language models and their peers on a GPU: docs/benchmarks-training.md
	FULGUR_REVISION="$(REVISION)" $(CARGO) build $(FLAGS) --release --no-default-features --features cuda
	./scripts/bench-lm.py --fulgur $(PROGRAM)

bench-vision: ## time classifiers of pictures and their peers on a GPU: docs/benchmarks-vision.md
	FULGUR_REVISION="$(REVISION)" $(CARGO) build $(FLAGS) --release --no-default-features --features cuda
	./scripts/bench-vision.py --fulgur $(PROGRAM)

sanitize-gpu: ## small cases of the recurrences under compute-sanitizer
	$(CARGO) build $(FLAGS) --release -p fulgur-kernels --features cuda --example check_cuda
	./scripts/sanitize-gpu.sh

engine-gpu: ## try the promises of training on a GPU: kills, agreement with the CPU, stalls; 100 s
	$(CARGO) build $(FLAGS) --release --features cuda
	rm -rf target/tiny
	$(CARGO) run $(FLAGS) --example tiny_models -- target/tiny
	FULGUR="$(PROGRAM)" MODELS=target/tiny ./scripts/engine-gpu.py
