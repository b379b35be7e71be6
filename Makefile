# make            .venv ready
# make demo       train a lens on the embedded subject and write runs/tiny/report.html
# make test       the test suite (minutes); make test-slow: end-to-end checks as well
# make lint       ruff
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/tiny
export HF_HUB_OFFLINE := 1
export JAX_PLATFORMS ?= cpu

.PHONY: all demo test test-slow lint clean
all: .venv/ready

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

data/storyworld/train/meta.json: | .venv/ready
	$(BIN)/python -m data_gen.storyworld --tokenizer=configs/tiny_subject --out=data/storyworld

demo: .venv/ready data/storyworld/train/meta.json
	$(BIN)/python -m lens.main --config=configs/tiny.py --workdir=$(WORKDIR)

test: .venv/ready-test
	$(BIN)/python -m pytest -m 'not slow'

test-slow: .venv/ready-test data/storyworld/train/meta.json
	$(BIN)/python -m pytest -m slow

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-vllm runs exports data
