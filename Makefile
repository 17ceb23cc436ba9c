# Every target installs what it needs into .venv, once. ARGS passes flags on: make serve ARGS="--model DIR --port 8123"
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
ARGS   ?=
SOURCES := pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: serve test check sanitize bench aot demo clean
.DELETE_ON_ERROR:

serve: $(VENV)/.installed                ## serve the bundled demo model on 127.0.0.1:8000
	$(BIN)/moe-serve $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.node  ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.installed-test           ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy does not see the editable install's import hook: show it the package as the wheel lays it out.
	@rm -rf build/types && mkdir -p build/types/moe_runtime
	@ln -s $(CURDIR)/moe_runtime/* $(CURDIR)/experts $(CURDIR)/server build/types/moe_runtime/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p moe_runtime

# A program without Python that runs every kernel, built and run with AddressSanitizer and UBSan, then ThreadSanitizer.
# Their shadow memory wants the addresses that a machine without randomisation gives, where that may be switched off.
sanitize: $(VENV)/.installed             ## memory, undefined behaviour and races in csrc/
	@set -e; for kind in address,undefined thread; do \
		echo "sanitize: $$kind"; build=build/sanitize-$${kind%%,*}; \
		$(BIN)/cmake -S csrc -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=None \
			-DMOE_SANITIZE=$$kind >/dev/null; \
		$(BIN)/cmake --build $$build -- --quiet; \
		TSAN_OPTIONS=die_after_fork=0 $$(setarch -R true 2>/dev/null && echo setarch -R) $$build/sanitize; \
	done

bench: $(VENV)/.installed-test           ## kernel micro-benchmarks; ARGS="--help" lists their options
	$(BIN)/python -m pytest bench/kernels.py --benchmark-only --benchmark-quiet --benchmark-disable-gc $(ARGS)

aot: $(VENV)/.installed-test             ## compile every Triton kernel for every chip, without a GPU; the table also in build/aot.json
	$(BIN)/python -m moe_runtime.kernels.triton.aot --json build/aot.json $(ARGS)

demo: $(VENV)/.installed-test            ## train the demo model again from its seeded recipe (under an hour on 2 cores)
	$(BIN)/python -m moe_runtime.experts.demo $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Build tools first, then the package without build isolation, so that nothing is downloaded twice
# and a rebuild after an edit in csrc/ takes seconds.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt scikit-build-core pybind11 cmake ninja
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test,check]"
	@touch $@

# The official Node client is part of the API's proof; without npm its tests say why they are skipped.
$(VENV)/.node: tests/server/node/package.json tests/server/node/package-lock.json | $(BIN)/python
	@if command -v npm >/dev/null; then cd tests/server/node && npm ci --silent --no-audit --no-fund; \
	else echo "npm not found: tests of the Node client will be skipped"; fi
	@touch $@

clean:
	rm -rf $(VENV) build
