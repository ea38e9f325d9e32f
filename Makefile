# Everything runs in .venv, made on first use. `make PYTHON=/path/to/python3.12 test` picks another interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test lint types bench-pass bench-operators gpu-check clean

demo: .venv/installed
	$(BIN)/triton-convbn demo

# What a change needs: 4 to 9 minutes on two cores.
test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

# The rest: whole models, examples, the GPU check's dry run.
.PHONY: test-slow
test-slow: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

# Each on data that ships with a package; pictures into out/. Some three minutes, most of them the C++ compiler's. Those
# of other frameworks run if their packages are installed: pip install '.[frameworks]'.
.PHONY: examples
examples: .venv/installed
	for each in digits adversarial detection_backbone branches ahead_of_time with_torchvision; do \
	  echo "== $$each"; $(BIN)/python examples/$$each.py || exit; done
	for each in accelerate lightning transformers ultralytics; do \
	  if $(BIN)/python -c "import $$each" 2>/dev/null; then \
	    echo "== with_$$each"; $(BIN)/python examples/with_$$each.py || exit; \
	  else echo "== with_$$each: left out, $$each is not installed"; fi; done

# The oldest torch and Triton that pyproject.toml allows, on Python 3.12, in an environment of its own: 5 GB, some two
# minutes to build. No part of .ci/run, which has no room for it.
# ARGS are pytest's: `make test-oldest OLDEST_PYTHON=/path/to/python3.12 ARGS=tests/test_inductor.py`.
OLDEST_PYTHON ?= python3.12
OLDEST := .venv-oldest/bin
.PHONY: test-oldest
test-oldest: .venv-oldest/installed
	$(OLDEST)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy triton_convbn kernels perf

# 10,000 random programs in every dialect: what the pass returns equals the graph that it was given. Some 10 minutes.
# `make fuzz ARGS="--examples 500 --seed 7"`. fuzz-planted plants a bug of each kind and shows that the fuzz finds it.
.PHONY: fuzz fuzz-planted
fuzz: .venv/installed
	$(BIN)/python tests/fuzz/run.py $(ARGS)

fuzz-planted: .venv/installed
	$(BIN)/python tests/fuzz/plant.py

# Milliseconds that the pass takes for each pair, up to 2,000 pairs.
bench-pass: .venv/installed
	$(BIN)/triton-convbn dev pass-cost

# Microseconds of host time that a call of the operators takes, the launch apart.
bench-operators: .venv/installed
	$(BIN)/triton-convbn dev operator-cost

# What only a GPU can tell, within nine minutes, into $OUT or out/. `make gpu-check ARGS=--dry-run` runs the same code
# without one; ARGS=--deep runs the tuner, ncu and compute-sanitizer. `python3 perf/from_checkout.py gpu_check` takes
# the torch and triton that this interpreter has, and needs neither make nor an installation.
gpu-check: .venv/installed
	$(BIN)/triton-convbn dev gpu-check $(ARGS)

# perf/results/planned_h100.csv anew: what Inductor would launch on an H100. 30 minutes, no GPU.
PLAN = $(BIN)/triton-convbn plan --csv perf/results/planned_h100.csv
.PHONY: plan
plan: .venv/installed
	rm -f perf/results/planned_h100.csv
	for dtype in float32 autocast_float16 autocast_bfloat16; do for batch in 8 2; do for train in "--train --host" ""; do \
	  $(PLAN) --model resnet50 --batch $$batch --dtype $$dtype $$train || exit; done; done; done
	for model in resnet18 mobilenet_v2; do for train in --train ""; do \
	  $(PLAN) --model $$model $$train || exit; done; done
	$(PLAN) --model resnet50 --train --frozen-affine --provider inductor --provider triton_convbn --provider triton_convbn_always
	for train in --train ""; do \
	  $(PLAN) --model mobileone_s0 --size 128 $$train --provider inductor --provider triton_convbn || exit; done

# perf/results/kernels_offline.csv: registers, spills and more of every generated kernel, for ten architectures. Some 20
# minutes of one core, no GPU. It resumes, and compiles what has changed. offline-oldest takes the oldest Triton.
OFFLINE := triton-convbn dev offline --csv perf/results
.PHONY: offline offline-oldest
offline: .venv/installed
	$(BIN)/$(OFFLINE)/kernels_offline.csv $(ARGS)

offline-oldest: .venv-oldest/installed
	$(OLDEST)/$(OFFLINE)/kernels_offline_oldest.csv --arch sm_90 --arch sm_100 --arch gfx942 $(ARGS)

# What README and docs/performance.md show, measured on the CPU of this machine, on nothing else: some 12 minutes.
RESULTS ?= perf/results/cpu.csv
ROUNDS ?= 11
BENCH := $(BIN)/triton-convbn bench --csv $(RESULTS) --rounds $(ROUNDS)
COMPILED := --provider inductor --provider inductor_efficient_conv_bn --provider triton_convbn
.PHONY: bench
bench: .venv/installed
	$(BENCH) --model resnet18 --model resnet50 --layout contiguous --layout channels_last $(COMPILED) \
	  --provider triton_convbn_keep
	$(BENCH) --model resnet18 --model resnet50 --mode infer --batch 1 --provider eager --provider eager_folded \
	  $(COMPILED) --provider triton_convbn_always --provider inductor_freezing --provider triton_convbn_freezing
	$(BENCH) --model resnet18 --mode train-frozen $(COMPILED) --provider triton_convbn_always --provider frozen_bn
	$(BENCH) --model resnet18 --batch 1 --batch 8 $(COMPILED)
	$(BENCH) --layers resnext --layers decoder --layers heads $(COMPILED)

# perf/results/branches.csv anew: sums of branches, on one core of this machine. Most of the time is the C++
# compiler's. Plain Inductor's training step of mobileone_s0, fastvit_t8 and repvgg_a0 crashes there (2.14.1).
SUMS := triton-convbn bench --csv perf/results/branches.csv --size 128 \
  --model mobileone_s0 --model repvgg_a0 --model fastvit_t8 --model repvit_m0_9
.PHONY: bench-sums
bench-sums: export OMP_NUM_THREADS = 1
bench-sums: .venv/installed
	$(BIN)/$(SUMS) --rounds 15 --mode train --provider eager --provider triton_convbn_eager --provider triton_convbn \
	  --provider merged_once
	$(BIN)/$(SUMS) --rounds 21 --mode infer --provider inductor --provider triton_convbn --provider inductor_merged_once

# perf/results/activations.csv anew: memory and time of layers by activation, and of models that live on them, on the CPU
# of this machine. Some 40 minutes. It resumes. The last two models need ultralytics and monai.
ACTIVATION_BENCH := triton-convbn bench --csv perf/results/activations.csv --rounds 11 --mode train \
  --provider inductor --provider triton_convbn
.PHONY: bench-activations
bench-activations: .venv/installed
	$(BIN)/$(ACTIVATION_BENCH) --layers activations
	$(BIN)/$(ACTIVATION_BENCH) --size 128 --model efficientnet_b0 --model mobilenet_v3_large --model resnet50
	$(BIN)/$(ACTIVATION_BENCH) --model ultralytics.yolov8n --model monai.unet

# perf/results/numerics.csv anew: errors against fp64, on the CPU of this machine. Some 50 minutes of one core. The command
# alone goes on where a run was interrupted. Plain Inductor's backward of mobileone_s0 crashes (torch 2.14.1).
.PHONY: numerics
numerics: .venv/installed
	rm -f perf/results/numerics.csv
	$(BIN)/triton-convbn dev numerics --csv perf/results/numerics.csv $(ARGS)
	for model in mobileone_s0 repvgg_a0 fastvit_t8; do $(BIN)/triton-convbn dev numerics --csv perf/results/numerics.csv \
	  --model $$model --case $${model}_with_masks --provider eager --provider folded_graph \
	  --provider triton_convbn --provider triton_convbn_channels_last \
	  $$(test $$model = mobileone_s0 || echo --provider inductor) || exit; done
	for model in mobileone_s0 repvgg_a0 fastvit_t8; do $(BIN)/triton-convbn dev numerics --csv perf/results/numerics.csv \
	  --model $$model --case $${model}_with_masks --mode infer --provider eager --provider inductor \
	  --provider triton_convbn --provider triton_convbn_channels_last || exit; done

# perf/results/applications.csv: small models of other packages. Some 15 minutes. It resumes, and leaves out models whose
# package is not installed: pip install '.[applications]'.
.PHONY: applications
applications: .venv/installed
	$(BIN)/triton-convbn dev applications --csv perf/results/applications.csv $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test,plot]'
	touch $@

clean:
	rm -rf .venv .venv-oldest build out *.egg-info .pytest_cache .mypy_cache .ruff_cache
