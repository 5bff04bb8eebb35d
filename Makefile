# make demo | test | install. Needs Python 3.11 to 3.13 and make, nothing else.
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

# Slurm's tests mostly wait, for jobs to start and for nodes to be missed; the others run beside them, two files at once,
# those that take long first, and give way. What the first said is shown when both have ended.
test: install
	@$(BIN)/python -m pytest tests/slurm > .slurm-tests.txt 2>&1 & slurm=$$!; \
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  $$(ls -dr tests/*/ | grep -v slurm); others=$$?; \
	wait $$slurm; slurm=$$?; cat .slurm-tests.txt; exit $$((slurm + others))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
