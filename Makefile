# Everything a person needs on a fresh Linux machine with Python 3.11+: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# versions to install: this one, constraints-oldest.txt for the oldest that are supported, /dev/null for the newest
CONSTRAINTS ?= constraints.txt
WORK ?= $(HOME)/.cache/dgq/embedded
MINUTES ?= 180
DEMO := build/demo
# pytest's: half of the tests each, and who is done takes half of what the other has left. So few files are divided,
# whose fixtures are made twice.
WORKERS := --numprocesses 2 --dist worksteal
DOCS_VENV := build/docs
DOCS_BIN := $(DOCS_VENV)/bin

TOOLS_VENV := build/tools
TOOLS_BIN := $(TOOLS_VENV)/bin
# Wheels run with this glibc or a newer one: torch's own ask for it too.
GLIBC := 2.28
# the compiler of the wheels' engine; it takes -target
WHEEL_CXX ?= $(abspath $(TOOLS_BIN))/python-zig c++

.PHONY: demo test test-all test-aarch64 test-wheel test-no-compiler lint types docs wheel wheel-aarch64 sdist gpu aot \
	sanitize sanitize-native fuzz bench fidelity tables embedded-data embedded-train clean

demo: $(VENV)/ready
	$(BIN)/dgq calibrate --out $(DEMO)/dgq-emoji-w4a8 --wbits 4 --abits 8 --overwrite
	$(BIN)/dgq generate "a cat" --model $(DEMO)/dgq-emoji-w4a8 --seed 1 --out $(DEMO)/a-cat.png
	@echo "The picture is $(DEMO)/a-cat.png"

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" $(WORKERS)

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(WORKERS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(VENV)/lint
	$(BIN)/mypy

# The pages of docs/ and the API from the docstrings, to build/site. Sources are read, not imported: no torch is needed.
docs: $(DOCS_VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict --site-dir build/site

# One wheel for every Python, in dist/: the engine knows neither Python nor torch. The first time Zig compiles its C++
# library, which takes minutes. The same commit gives the same bytes.
wheel: MACHINE := x86_64
wheel-aarch64: MACHINE := aarch64
wheel wheel-aarch64: $(TOOLS_VENV)/ready
	rm -rf build/wheel-$(MACHINE) dist/*_$(MACHINE).whl
	CXX="$(WHEEL_CXX) -target $(MACHINE)-linux-gnu.$(GLIBC) -s" _PYTHON_HOST_PLATFORM=linux-$(MACHINE) \
		$(TOOLS_BIN)/python -m hatchling build --target wheel --directory build/wheel-$(MACHINE)
	PATH="$(abspath $(TOOLS_BIN)):$$PATH" SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
		auditwheel repair --wheel-dir dist \
		build/wheel-$(MACHINE)/*.whl

sdist: $(TOOLS_VENV)/ready
	rm -f dist/*.tar.gz
	$(TOOLS_BIN)/python -m hatchling build --target sdist --directory dist

# The tests against the installed wheel, and against the source archive installed without a compiler, in a temporary
# folder and a new environment. TESTS are pytest's options.
TESTS ?= -m "not slow" $(WORKERS)
test-wheel: wheel
	OMP_NUM_THREADS=1 $(PYTHON) tests/installed.py dist/*_x86_64.whl --constraint $(CONSTRAINTS) $(TESTS)

test-no-compiler: sdist
	OMP_NUM_THREADS=1 CXX=/nonexistent $(PYTHON) tests/installed.py dist/*.tar.gz --no-engine \
		--constraint $(CONSTRAINTS) $(TESTS)

# The engine on aarch64, from GCC and from Zig, in an emulator of three CPUs against this machine's results.
test-aarch64: $(VENV)/ready $(TOOLS_VENV)/ready
	@command -v qemu-aarch64 > /dev/null && command -v aarch64-linux-gnu-g++ > /dev/null || \
		{ echo "qemu-aarch64 and aarch64-linux-gnu-g++ are needed (Debian: qemu-user, g++-aarch64-linux-gnu)"; false; }
	$(BIN)/python -m pytest tests/kernels/test_native_machines.py -k aarch64

# On a machine with a CUDA device, under 10 minutes: every kernel against its reference, the model on cuda against cpu,
# bench rows. PYTHON is the machine's own, whose torch and Triton are used as they are; only what it lacks is fetched,
# into build/gpu. Without an index: make gpu PIP_NO_INDEX=1 PIP_FIND_LINKS=folder-with-the-wheels
gpu:
	$(PYTHON) benchmarks/gpu/check.py

# Compile tables of the newest Triton and of 3.6, the oldest that is supported; no GPU needed.
aot: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton-3.6 "triton==3.6.*"
	$(BIN)/python -m dgq_kernels.aot --csv kernels/dgq_kernels/aot.csv --jobs 2
	PYTHONPATH=build/triton-3.6 $(BIN)/python -m dgq_kernels.aot --csv kernels/dgq_kernels/aot.csv --jobs 2

# Triton-Sanitizer over the kernels that it understands, in the interpreter; triton-viz 3.0 does not fit newer Tritons.
sanitize: $(VENV)/ready
	$(BIN)/pip install --quiet --upgrade --target build/triton-viz \
		z3-solver anytree flask flask_cloudflared cairocffi tqdm
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton-viz "triton-viz==3.0" "triton==3.6.*"
	PYTHONPATH=build/triton-viz $(BIN)/python -m pytest tests/kernels/test_triton_sanitizer.py

# The tests of the CPU engine under the address and undefined-behaviour sanitizers of GCC, one thread.
SANITIZED := build/sanitized/libdgq_cpu.so
sanitize-native: $(VENV)/ready
	mkdir -p $(dir $(SANITIZED))
	CXX="g++ -g -fsanitize=address,undefined -fsanitize=float-cast-overflow -fno-sanitize-recover=all" \
		DGQ_CPU_LIBRARY=$(SANITIZED) $(BIN)/python kernels/dgq_kernels/native/build.py
	DGQ_CPU_LIBRARY=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -p no:cacheprovider tests/kernels/test_native.py tests/kernels/test_native_hostile.py

# Checkpoints of the embedded model, damaged in every way: each is refused in one line, or draws the same picture.
CASES ?= 1000
SEED ?= 1
fuzz: $(VENV)/ready
	PYTHONHASHSEED=0 $(BIN)/python benchmarks/fuzz.py --cases $(CASES) --seed $(SEED)

bench: $(VENV)/ready
	$(BIN)/dgq bench --csv benchmarks/results.csv

fidelity: $(VENV)/ready
	$(BIN)/python benchmarks/fidelity.py --work build/fidelity --out benchmarks/fidelity-embedded \
		--grid docs/images/grid.png --grid-prompts "a cat" "a red heart" "a pizza" \
		"a smiling face with sunglasses" "a house on a blue background" "a car" "a tree" "the sun"

# The tables of README.md and docs/ that come from files of the repository.
tables: $(VENV)/ready
	$(BIN)/python benchmarks/tables.py

# The embedded model; training resumes where it stopped. WORK holds data and checkpoints, outside the repository.
embedded-data: $(VENV)/ready
	$(BIN)/python -m embedded.build_data --work $(WORK)

embedded-train: embedded-data
	nice -n 10 $(BIN)/python -m embedded.train_all --work $(WORK) --minutes $(MINUTES)

# torch first: a looser request would fetch the CUDA build
$(VENV)/ready: pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev,plots]"
	touch $@

# the requirements of an optional group of pyproject.toml, without the package: $(call group,NAME,ENVIRONMENT)
define group
	$(2)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['$(1)'], sep='\n')" > $(2)/needs-$(1).txt
	$(2)/bin/pip install --quiet --constraint constraints.txt --requirement $(2)/needs-$(1).txt
endef

$(VENV)/lint: $(VENV)/ready
	$(call group,lint,$(VENV))
	touch $@

$(DOCS_VENV)/ready $(TOOLS_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(call group,$(if $(filter $(DOCS_VENV)/%,$@),docs,wheel),$(@D))
	touch $@

clean:
	rm -rf build $(VENV)
