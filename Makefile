# Point transformers with Experts Weights Averaging. `make` lists what can be done.
SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUFF   := .venv/bin/ruff
PY     := .venv/bin/python

# Quoted for the shell, so that values may have blanks. ARGS alone goes to the tool as it is: quote its parts as needed.
q = '$(subst ','\'',$(1))'
# Variables become configuration keys only when given, so that configs/*.yaml keep the last word on defaults.
set = $(if $($(1)),$(call q,$(2)=$($(1))))
CONF  = --config $(call q,configs/$(or $(DATASET),shapes).yaml)
OTHER = $(if $(DATASET),$(CONF))
DATA  = $(call set,DATA_ROOT,data.root)
MACH  = $(call set,DEVICE,train.device)
TASKS = $(if $(TASK),--config $(call q,configs/task/$(TASK).yaml))
KEYS  = $(call set,MODEL,model.preset) $(call set,EPOCHS,train.epochs) $(call set,SEED,train.seed) \
        $(call set,RUN,run.name) $(DATA) $(MACH) $(ARGS)

# What each target takes. Another variable on the command line would be ignored, as EPOCH=3 for EPOCHS=3.
TRAINING = DATASET DATA_ROOT MODEL EPOCHS SEED RUN DEVICE NPROC ARGS
takes_data      = DATASET DATA_ROOT WHAT ARGS
takes_train     = $(TRAINING) TASK
takes_pretrain  = $(TRAINING) TASK
takes_study     = STUDY DATA_ROOT DEVICE ARGS
takes_few-shot  = CKPT DATASET DATA_ROOT MODEL EPOCHS RUN DEVICE ARGS
takes_eval      = CKPT DATASET DATA_ROOT DEVICE ARGS
takes_fold      = CKPT OUT ARGS
takes_predict   = CKPT DEVICE ARGS
takes_visualize = WHAT CKPT DATASET DATA_ROOT DEVICE OUT ARGS
takes_report    = CKPT DATA_ROOT DEVICE OUT ARGS
takes_compare   = RUNS DATA_ROOT DEVICE OUT ARGS
takes_export    = CKPT OUT FORMAT ARGS
takes_doctor    = DATASET DATA_ROOT DEVICE ARGS
takes_test      = ARGS
takes_test-all  = ARGS
takes_bench     = DEVICE ARGS
takes_soak      = ARGS
takes_clean-runs = YES

takes = $(sort $(foreach goal,$(or $(MAKECMDGOALS),help),$(takes_$(goal))))
given = $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
hint  = $(shell $(PYTHON) -c 'import difflib, sys; near = difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1); \
	print("did you mean " + near[0] + "?" if near else "it takes " + (", ".join(sys.argv[2:]) or "none"))' $(1) $(takes))
$(foreach name,$(filter-out PYTHON $(takes),$(given)),\
	$(error $(strip make $(MAKECMDGOALS)) does not take $(name): $(call hint,$(name))))

.PHONY: help setup data train pretrain study few-shot eval fold predict visualize report compare export doctor test test-all lint tensorboard bench \
        soak clean clean-runs

help:  ## list the targets (this one)
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo
	@echo 'Variables: DATASET (shapes, modelnet40, scanobjectnn, shapenet55, shapenetpart, labeled_psb, sydney, folder, images)'
	@echo '           MODEL (tiny, small, point_mae, point_bert) TASK EPOCHS SEED'
	@echo '           DATA_ROOT RUN DEVICE NPROC CKPT OUT WHAT, and ARGS="any.config.key=value ..." for everything else'
	@echo 'Examples:  make train'
	@echo '           make train DATASET=modelnet40 DATA_ROOT=data MODEL=tiny EPOCHS=10'
	@echo '           make train DATASET=folder DATA_ROOT=my_meshes'
	@echo '           make train ARGS="ewa.enabled=false"'

setup: .venv/.done  ## install everything into .venv (other targets do it when needed)

.venv/.done: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: Python 3.11 or newer is needed; say where it is with PYTHON=...' >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo 'error: this Python cannot make virtual environments: apt install python3-venv' >&2; exit 2; }
	@echo 'Installing into .venv, once; torch is large, so this takes a few minutes.'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -e .
	@$(PY) -m tools.installed
	@touch $@

data: .venv/.done  ## look at a data set: WHAT=inspect, verify, pack or download (the default): DATASET DATA_ROOT ARGS
	@$(PY) -m tools.prepare_data $(if $(WHAT)$(DATASET),$(call q,$(or $(WHAT),download)) $(CONF)) $(DATA) $(ARGS)

TRAIN = $(PY) -m tools.train $(CONF) $(TASKS) $(if $(NPROC),--nproc $(call q,$(NPROC))) $(KEYS)

train: .venv/.done  ## train, fold, evaluate, or resume RUN=x: DATASET MODEL EPOCHS SEED DATA_ROOT DEVICE NPROC ARGS
	@$(TRAIN)

pretrain: TASK ?= masked_autoencoding
pretrain: .venv/.done  ## pre-train by masking, or TASK=tokenizer; then: make train ARGS="train.init_from=runs/x": the same variables
	@$(TRAIN)

study: .venv/.done  ## arms x seeds, and a report: STUDY=configs/study/quick.yaml, ARGS="--jobs 2 --budget 3600"
	@$(if $(STUDY),,echo 'error: say which study: make study STUDY=configs/study/quick.yaml' >&2; exit 2)
	@$(PY) -m tools.study $(call q,$(STUDY)) $(ARGS) $(DATA) $(MACH)

few-shot: .venv/.done  ## few-shot folds from scratch, and from CKPT=runs/x with and without EWA: DATASET MODEL EPOCHS RUN ARGS="--jobs 2"
	@$(PY) -m tools.few_shot $(CONF) $(if $(CKPT),--init-from $(call q,$(CKPT))) $(if $(RUN),--name $(call q,$(RUN))) \
		$(call set,MODEL,model.preset) $(call set,EPOCHS,train.epochs) $(DATA) $(MACH) $(ARGS)

eval: .venv/.done  ## evaluate the dense model of CKPT=runs/x on its test split, or on that of DATASET
	@$(if $(CKPT),,echo 'error: say which model: make eval CKPT=runs/x' >&2; exit 2)
	@$(PY) -m tools.evaluate $(call q,$(CKPT)) $(OTHER) $(DATA) $(MACH) $(ARGS)

fold: .venv/.done  ## fold an EWA run CKPT=runs/x into OUT=model.safetensors
	@$(if $(and $(CKPT),$(OUT)),,echo 'error: make fold CKPT=runs/x OUT=model.safetensors' >&2; exit 2)
	@$(PY) -m tools.fold $(call q,$(CKPT)) $(call q,$(OUT)) $(ARGS)

predict: .venv/.done  ## classify clouds and meshes by the model of CKPT=runs/x: ARGS="chair.ply table.off"
	@$(if $(CKPT),,echo 'error: make predict CKPT=runs/x ARGS="chair.ply"' >&2; exit 2)
	@$(PY) -m tools.predict $(call q,$(CKPT)) $(if $(DEVICE),--device $(call q,$(DEVICE))) $(ARGS)

visualize: .venv/.done  ## draw WHAT=cloud, patches, saliency, errors, reconstruction, parts, embedding, experts to OUT: DATASET CKPT ARGS
	@$(if $(WHAT),,echo 'error: make visualize WHAT=cloud DATASET=shapes OUT=cloud.png' >&2; exit 2)
	@$(PY) -m tools.visualize $(call q,$(WHAT)) $(if $(CKPT),--run $(call q,$(CKPT))) $(OTHER) \
		$(if $(OUT),--out $(call q,$(OUT))) $(DATA) $(MACH) $(ARGS)

report: .venv/.done  ## one HTML page of a finished run CKPT=runs/x: figures, curves, mistakes, saliency
	@$(if $(CKPT),,echo 'error: make report CKPT=runs/x' >&2; exit 2)
	@$(PY) -m tools.report $(call q,$(CKPT)) $(if $(OUT),--out $(call q,$(OUT))) $(DATA) $(MACH) $(ARGS)

compare: .venv/.done  ## two or more finished runs RUNS="runs/a runs/b" side by side, and a page OUT=compare.html: McNemar's test
	@$(if $(RUNS),,echo 'error: make compare RUNS="runs/a runs/b"' >&2; exit 2)
	@$(PY) -m tools.compare $(foreach run,$(RUNS),$(call q,$(run))) $(if $(OUT),--out $(call q,$(OUT))) $(DATA) $(MACH) $(ARGS)

export: .venv/.done  ## write the model of CKPT=runs/x to OUT for others: FORMAT=onnx, torchscript, torch_export, point_mae, torch_pointcloud
	@$(if $(and $(CKPT),$(OUT),$(FORMAT)),,echo 'error: make export CKPT=runs/x OUT=model.onnx FORMAT=onnx' >&2; exit 2)
	@$(PY) -m tools.export $(call q,$(CKPT)) $(call q,$(OUT)) --format $(call q,$(FORMAT)) $(ARGS)

doctor:  ## what is installed, used and found here, what is missing, and what mends it: DATASET DATA_ROOT
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.doctor $(OTHER) $(DATA) $(MACH) $(ARGS)

PYTEST = $(PY) -m pytest -n auto --maxprocesses 8 --dist loadscope

test: .venv/.done  ## run the tests, without those that take long: ARGS="tests/ewa -x"
	@$(PYTEST) -m "not slow and not hostile" $(ARGS)

test-all: .venv/.done  ## run all tests, also long trainings, and sweeps over damaged and hostile files
	@$(PYTEST) $(ARGS)

lint: .venv/.done  ## check style, names, annotations and docstrings
	@$(RUFF) check . && $(RUFF) format --check .

bench: .venv/.done  ## measure training, inference and operators against a plain twin: DEVICE, ARGS="--budget 60"
	@$(PY) -m benchmarks.bench $(if $(DEVICE),--device $(call q,$(DEVICE))) $(ARGS)

soak: .venv/.done  ## kill and resume trainings, compare bit for bit: ARGS="--kills 30"
	@$(PY) -m benchmarks.soak $(ARGS)

tensorboard: .venv/.done  ## show the curves of all runs in a browser
	@$(PY) -m tensorboard.main --logdir runs

clean:  ## remove the caches of tools; runs, prepared data and .venv stay
	rm -rf .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-runs:  ## remove all trainings in runs/: asks, or YES=1
	@if [ '$(YES)' != 1 ]; then \
		[ -t 0 ] || { echo 'error: make clean-runs removes all trainings: YES=1 if that is meant' >&2; exit 2; }; \
		du -sh runs; read -r -p 'Remove all trainings in runs/? [y/N] ' answer; [[ $$answer == [yY]* ]] || exit 0; \
	fi; rm -rf runs
