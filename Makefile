# `make demo` and `make test` do all their set-up: a virtual environment, CPU torch, the extras.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out
MODEL := examples/digits/dit_digits.pt
SHELL := /bin/bash

.PHONY: demo test test-slow lint setup bench wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[compile,cpu,diffusers,search,dist,tensorrt-rtx,cuda,examples,dev]'
	touch $@

demo: $(STAMP)
	mkdir -p $(OUT)
	$(BIN)/dcc compile $(MODEL) --target cpu --sampler ddim --steps 50 -o $(OUT)/digits.dcc
	$(BIN)/dcc verify $(OUT)/digits.dcc --against $(MODEL)
	$(BIN)/dcc run $(OUT)/digits.dcc -n 40 --seed 0 -o $(OUT)/digits.png
	$(BIN)/dcc bench $(OUT)/digits.dcc --against $(MODEL) --baseline eager,compile,onnxruntime --batch 1,4 --calls 20
	@echo "the picture is $(OUT)/digits.png, the artifact $(OUT)/digits.dcc"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy -p dcc

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

bench: $(STAMP)
	mkdir -p $(OUT)
	$(BIN)/dcc compile $(MODEL) --sampler ddim --steps 50 -o $(OUT)/digits.dcc
	$(BIN)/python examples/digits/evaluate.py $(OUT)/digits.dcc --guidance-scale 3
	$(BIN)/dcc bench $(OUT)/digits.dcc --against $(MODEL) --baseline eager,compile,onnxruntime --batch 1,4,16 --repeats 7
	$(BIN)/python benchmarks/samplers.py
	$(BIN)/python benchmarks/cut.py
	$(BIN)/python benchmarks/hoisting.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/schedules.py --steps 20 -o $(OUT)
	$(BIN)/python benchmarks/schedules.py --steps 50 -o $(OUT)
	$(BIN)/python benchmarks/router.py --steps 20
	$(BIN)/python benchmarks/cost_model.py --schedules 50 --images 16 --steps 20

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) $(OUT) dist build *.egg-info
