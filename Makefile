# The three things that people do with a checkout. `make help` lists them.
#
# Everything goes through cargo; this file only adds what cargo cannot install (scripts/setup.sh). Tests and
# lints share one profile, the optimised dev profile, so that the dependencies are compiled once.

CARGO ?= cargo
FLAGS ?= --locked

.PHONY: help setup build test

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install missing system packages (FFmpeg libraries, clang, pkg-config)
	@./scripts/setup.sh

build: setup ## build the program: target/release/fulgur
	$(CARGO) build $(FLAGS) --release

test: setup ## format check, lints, and every test
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(FLAGS) --workspace --all-targets -- -D warnings
	$(CARGO) test $(FLAGS) --workspace
