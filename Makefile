# make run: from nothing to a trained, measured MLA-Pythia, briefly.   make test: lint, types, tests.
# make stress: what the tests have no time for, 40 minutes on 2 cores.
# make compare: every architecture on the same tokens, and the report; SEED=1338 is another seed, SIZE=full for a GPU.

PYTHON ?= python3
BIN = .venv/bin
SEED ?= 1337
SIZE ?= laptop

# glibc hands large blocks back to the kernel at every step; keeping them saves a fifth of a CPU training step and more
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 4294967296

# where an image sets it, Python compiles PyTorch's code anew in every process
unexport PYTHONDONTWRITEBYTECODE

# several tests at a time share the cores
test stress: export OMP_NUM_THREADS = 1

.PHONY: run compare test stress

run: .venv/installed
	$(BIN)/python prep.py
	$(BIN)/python train.py config/mla_kv128.py config/laptop.py --max_iters=400 --out_dir=out/first
	$(BIN)/python sample.py out/first --prompt="The history of"

compare: .venv/installed
	$(BIN)/python -m tools.compare --size=$(SIZE) --seed=$(SEED)

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/pytest -n 2 --dist=worksteal

stress: .venv/installed-dev
	$(BIN)/pytest -n 2 --maxschedchunk=1 --kills=100 --long -rP tests/damage tests/commands/test_compare.py \
		tests/commands/test_harness.py tests/commands/test_tour.py tests/equations/test_models.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-eval.txt .venv/installed
	$(BIN)/pip install -q --no-compile -r requirements-dev.txt
	touch $@
