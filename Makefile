# make demo    a pruned real model in some minutes: venv, install, fetch, prune, evaluate, verify
# make test    the whole suite, as CI runs it; JOBS=4 runs files of it four at a time
# make test-long    what takes minutes: the demo model under every memory setting, and while workers are killed
# make check   format, lint, types
# make bench   ratios of speed and memory; needs a quiet machine

VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m
RUN := runs/demo
JOBS := 2

.PHONY: demo test test-long check bench demo-model clean

demo: $(MODEL)/config.json
	$(BIN)/secateur run configs/demo.yaml
	$(BIN)/secateur verify $(RUN) --source $(MODEL)

test: $(BIN)/secateur
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

test-long: $(MODEL)/config.json
	$(BIN)/python -m pytest -m long

check: $(BIN)/secateur
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(MODEL)/config.json
	$(BIN)/python -m pytest tests/bench -m bench -rA

demo-model: $(MODEL)/config.json

$(MODEL)/config.json: | $(BIN)/secateur
	$(BIN)/secateur demo-model $(MODEL)

$(BIN)/secateur: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs
