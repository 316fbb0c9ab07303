# make quickstart: train, evaluate and export a draft for a real model on two CPU cores
# make test:       run the whole test suite
# Both create .venv first. On a machine without a GPU they install the CPU build of torch; with a GPU they keep your torch.

VENV ?= .venv
PYTHON ?= python3
GPU := $(shell nvidia-smi -L 2>/dev/null)
EXTRAS ?= dev,gguf,redis
CONSTRAINTS := $(if $(GPU),constraints.txt,constraints-cpu.txt)
# PyTorch's index of CPU builds. If it does not answer, torch comes from the package index.
CPU_WHEELS := https://download.pytorch.org/whl/cpu

SPECFORGE := $(VENV)/bin/specforge
TARGET := models/SmolLM2-135M-Instruct
RUN := runs/quickstart

.PHONY: install quickstart test lint docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt constraints-cpu.txt
	$(PYTHON) -m venv --upgrade-deps $(if $(GPU),--system-site-packages) $(VENV)
	index=$$($(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_WHEELS)/torch/', timeout=3)" 2>/dev/null \
	  && echo --extra-index-url $(CPU_WHEELS)); \
	$(VENV)/bin/python -m pip install --quiet $(if $(GPU),,$$index) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

quickstart: install
	$(SPECFORGE) target fetch --name SmolLM2-135M-Instruct --output models
	$(SPECFORGE) prepare --data configs/quickstart/conversations.jsonl --target $(TARGET) --output $(RUN)/prompts
	$(SPECFORGE) capture --target $(TARGET) --prompts $(RUN)/prompts --output $(RUN)/features --layer_ids '[14, 22, 28]' --limit_samples 1116
	$(SPECFORGE) fit --config quickstart.yaml --ckpt_path last
	$(SPECFORGE) export --draft $(RUN)/checkpoints/last.ckpt --output $(RUN)/draft --to sglang
	$(SPECFORGE) evaluate --draft $(RUN)/checkpoints/last.ckpt --prompts $(RUN)/prompts --baselines '[ngram]' \
	  --max_new_tokens 80 --batch_size 64 --speed_prompts 6 --json $(RUN)/evaluation.json
	$(SPECFORGE) prepare --data configs/quickstart/unseen.jsonl --target $(TARGET) --output $(RUN)/unseen
	$(SPECFORGE) evaluate --draft $(RUN)/checkpoints/last.ckpt --prompts $(RUN)/unseen --baselines '[ngram]' \
	  --max_new_tokens 80 --batch_size 64 --speed_prompts 0 --json $(RUN)/evaluation-unseen.json

test: install
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not ray" --durations 20 # bit-identical runs, on the CPU
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest -m ray tests/test_cluster*.py --durations 10 || test $$? = 5 # none without Ray; one cluster at a time
	$(if $(GPU),$(VENV)/bin/python -m pytest tests/test_gpu.py tests/modeling/layers/test_flex_attention.py \
	  tests/test_algorithms.py::test_two_ranks_are_one_whole_or_sharded)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

docs: .docs/.installed # the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --strict

.docs/.installed: pyproject.toml # an environment of its own, without torch
	$(PYTHON) -m venv --upgrade-deps .docs
	.docs/bin/python -m pip install --quiet $$($(PYTHON) -c \
	  "import tomllib as t; print(*t.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

clean:
	rm -rf $(VENV) .docs build dist *.egg-info
