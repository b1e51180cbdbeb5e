# make help lists the targets. The two that a fresh machine needs are demo and test.
SHELL := /bin/sh
GO ?= go
BIN := bin
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X github.com/bottle-tools/bottle/lib/tool.Version=$(VERSION)
export CGO_ENABLED := 0

TOOLS := $(notdir $(wildcard cmd/bottle-*))
RUNSC_VERSION := $(shell sed -n 's/.*gvisor.dev\/gvisor v0.0.0-\([0-9]*\)-\(.*\)/\1-\2/p' tools/runsc/go.mod)

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: build
build: tools $(BIN)/bottle-runsc ## all tools and the slim runsc, into bin/

.PHONY: tools
tools:
	@mkdir -p $(BIN)
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ $(addprefix ./cmd/,$(TOOLS))

# A nested module: its graph stays out of the product's. About two minutes cold.
$(BIN)/bottle-runsc: $(wildcard tools/runsc/*.go) tools/runsc/filters_gen.go tools/runsc/go.mod tools/runsc/go.sum
	@mkdir -p $(BIN)
	cd tools/runsc && $(GO) build -trimpath -ldflags '-s -w -X gvisor.dev/gvisor/runsc/version.version=$(RUNSC_VERSION)' -o ../../$@ .

# For the machine that builds, which has to run it. A runsc that is built for another
# architecture does not take these programs, but compiles its own at each start.
tools/runsc/filters_gen.go: $(wildcard tools/runsc/filters/*.go tools/runsc/filters/programs/*) tools/runsc/go.mod tools/runsc/go.sum
	cd tools/runsc && GOOS= GOARCH= $(GO) run ./filters >filters_gen.go.new && mv filters_gen.go.new filters_gen.go

.PHONY: demo
demo: build ## a real agent in a sealed bottle, offline and without a key
	scripts/demo

.PHONY: test
test: build ## everything: unit, integration as root and as a plain user, docs
	scripts/test

.PHONY: unit
unit: ## the tests that need no bottle
	$(GO) test ./lib/... ./cmd/... ./testscripts/unit/...

.PHONY: canaries
canaries: build ## pinned programs against the recordings; needs packages from outside
	BOTTLE_CANARIES=1 $(GO) test -count=1 -v ./testscripts/canaries/...

.PHONY: bench
bench: build ## every claim of speed, as ratios in one run
	scripts/bench

.PHONY: fuzz
fuzz: ## each fuzz target for a minute
	scripts/fuzz

.PHONY: lint
lint: ## gofmt, vet for linux and darwin, shellcheck
	scripts/lint

.PHONY: smolvm
smolvm: tools ## install smolvm, two pinned versions, into your data folder
	$(BIN)/bottle-vm doctor --install smolvm@1.9.1 >/dev/null || [ $$? -eq 78 ]
	$(BIN)/bottle-vm doctor --install smolvm || [ $$? -eq 78 ]

.PHONY: rig
rig: ## a machine in which smolvm boots, where KVM does not work; needs root or user namespaces
	scripts/rig build

.PHONY: test-smolvm
test-smolvm: tools ## engine smolvm with real microVMs, inside of the rig; emulated, so it takes its time
	scripts/test-smolvm

.PHONY: record-smolvm
record-smolvm: tools ## what real smolvm answers, recorded anew, for the tests that replay it
	scripts/record-smolvm

.PHONY: up
up: build ## start the bottle of AGENT=name
	scripts/bottle start $(AGENT)

.PHONY: down
down: ## remove the bottle of AGENT=name
	scripts/bottle stop $(AGENT)

.PHONY: gc
gc: ## what was left behind; APPLY=1 removes it
	scripts/bottle gc $(if $(APPLY),--apply)

.PHONY: clean
clean: ## remove what make built
	rm -rf $(BIN)
