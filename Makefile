# make demo | test | install. Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
BIN = .venv/bin
RUN ?= runs/digits

.PHONY: demo test install lint

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python tools/submit.py --cluster local --procs 2 configs/digits.yaml run=$(RUN)
	$(BIN)/python tools/sample.py $(RUN) sample.per_class=64
	$(BIN)/python tools/evaluate.py $(RUN)
	@echo
	@echo "Samples: $(RUN)/samples.png    Measures: $(RUN)/report.json"
	@echo "Curves:  $(BIN)/tensorboard --logdir $(RUN)"

# Slurm's tests measure time, so they have the machine for themselves; the others run two files at once.
test: install
	$(BIN)/python -m pytest tests/slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/slurm --numprocesses 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
