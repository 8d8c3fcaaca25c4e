# Two commands do all set-up on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
# Each first brings .venv to the pinned versions, from whatever state it is in.

DATA ?= text
RUN := runs/demo-$(DATA)
PROMPT := $(if $(filter dna,$(DATA)),ATGACC,Call me Ishmael. It was)
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11 python
BIN := .venv/bin
CHROMOSOME := .data/ce2chrX.fa.gz
GENOMES := .data/ragout

# What is installed depends on these files alone, the sources of the compiled kernels among them; a change in any
# installs again.
KEY := $(shell cat pyproject.toml constraints.txt hatch_build.py src/crocuta/ops/kernels/cpp/* | cksum)

# A Python that can make a .venv; a .venv whose installed packages have all their files (an interrupted one has not).
USABLE := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
WHOLE := import sys, pip, importlib.metadata as m; sys.exit(sys.version_info < (3, 11) or not all( \
	d.files and all(f.suffix == ".pyc" or f.locate().exists() for f in d.files) for d in m.distributions()))

# $(call install,EXTRA): bring .venv to KEY. The stamp goes before the first change and comes after the last one, so
# what an interruption leaves is looked at file by file and, like a .venv moved here from elsewhere, made anew if bad.
define install
@if grep -qsF "$(CURDIR)/.venv" $(BIN)/activate && grep -qsxF "$(KEY)" .venv/.installed-$(1) .venv/.installed-dev \
  && $(BIN)/python -Ic '' 2>/dev/null; then exit 0; fi; \
echo "Installing the pinned versions into .venv; the first time takes some minutes." >&2; \
if ! { grep -qsF "$(CURDIR)/.venv" $(BIN)/activate && $(BIN)/python -Ic '$(WHOLE)' 2>/dev/null; }; then \
  rm -rf .venv; python=; \
  for p in $(PYTHON); do if "$$p" -Ic '$(USABLE)' 2>/dev/null; then python=$$p; break; fi; done; \
  if [ -z "$$python" ]; then \
    echo "Crocuta needs Python 3.11 or newer with venv, found none: make PYTHON=path/to/python3" >&2; exit 1; fi; \
  "$$python" -m venv .venv || exit 1; \
fi; \
rm -f .venv/.installed-*; \
PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
  $(BIN)/python -m pip install --quiet --editable '.[$(1)]' $(if $(filter dev,$(1)),&& $(install-triton)) \
  && echo "$(KEY)" > .venv/.installed-$(1)
endef

# Not among the constraints: a torch build for CUDA brings a Triton of its own. Its interpreter runs the GPU kernels in the
# tests; where there is no wheel for the machine they are skipped, and say so.
install-triton = { $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet triton==3.6.0 \
  || echo "No Triton for this machine: the tests of its kernels will be skipped." >&2; }

.PHONY: help setup demo test fuzz sanitize lint types quality bench bench-long soak format clean

help: ## List these targets.
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: ## Make .venv with everything for development.
	$(call install,dev)

demo: ## Train a small StripedHyena on DATA=text or DATA=dna, then generate from it.
	$(call install,train)
	$(BIN)/crocuta train examples/$(DATA).yaml --output $(RUN) --overwrite
	$(BIN)/crocuta generate $(RUN) --prompt '$(PROMPT)'

test: ## Run the test suite (under 10 minutes on 2 cores); ARGS="-k word" narrows it.
	$(call install,dev)
	$(BIN)/python -m pytest $(ARGS)

fuzz: ## Read 20,000 mutated checkpoints of every format (an hour); ARGS="--format evo2 --count 500" narrows it.
	$(call install,dev)
	$(BIN)/python tests/fuzz/fuzz_files.py --count 20000 $(ARGS)

sanitize: ## Run the tests of the compiled kernels under ASan and UBSan, then build them as they were.
	$(call install,dev)
	$(BIN)/python hatch_build.py --sanitize
	status=0; LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/ops/kernels tests/ops/test_window.py --timeout 600 -k "not compiles and not opcheck" $(ARGS) \
	  || status=$$?; $(BIN)/python hatch_build.py; exit $$status

lint: ## Check style: ruff check, ruff format --check.
	$(call install,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: ## Check types: mypy.
	$(call install,dev)
	$(BIN)/mypy

quality: ## Train every kind of layer on recall, copying, text and genomes (under an hour); ARGS="--tasks text" narrows it.
	$(call install,quality)
	@if ! [ -d $(GENOMES) ] && { command -v apt-get && command -v dpkg-deb; } >/dev/null; then mkdir -p .data/package && cd .data/package \
	  && apt-get download ragout-examples && dpkg-deb -x ragout-examples_*.deb . \
	  && mv usr/share/doc/ragout/examples "$(CURDIR)/$(GENOMES)" ; cd "$(CURDIR)" && rm -rf .data/package; fi
	$(BIN)/python quality/run.py $(ARGS)

bench: ## Run every benchmark but the longest, the published peers beside ours first; ARGS=--smoke for tiny sizes.
	$(call install,dev)
	$(BIN)/python benchmarks/suite/peers/install.py
	$(BIN)/python benchmarks/suite/run.py $(ARGS)
	for script in $(filter-out benchmarks/long_% benchmarks/soak_%,$(wildcard benchmarks/[a-z]*.py)); do $(BIN)/python "$$script" $(ARGS) || exit 1; done

bench-long: ## Score a million bases of C. elegans: hours; ARGS="--models modal" takes minutes. Fetches them by apt-get.
	$(call install,dev)
	@if ! [ -f $(CHROMOSOME) ] && { command -v apt-get && command -v dpkg-deb; } >/dev/null; then mkdir -p .data/package && cd .data/package \
	  && apt-get download r-bioc-bsgenome && dpkg-deb -x r-bioc-bsgenome_*.deb . \
	  && mv usr/lib/R/site-library/BSgenome/extdata/$(notdir $(CHROMOSOME)) .. ; cd "$(CURDIR)" && rm -rf .data/package; fi
	$(BIN)/python benchmarks/long_context.py $(ARGS)

soak: ## Generate a million tokens (about 20 minutes): all finite, no growth, no slower at the end.
	$(call install,dev)
	$(BIN)/python benchmarks/soak_generation.py $(ARGS)

format: ## Apply ruff's fixes and its format.
	$(call install,dev)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv, caches and builds; runs/ stays.
	rm -rf .venv .venv-peers src/crocuta/ops/kernels/_native.* .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
