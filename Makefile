# Point transformers with Experts Weights Averaging. `make` lists what can be done.
SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUFF   := .venv/bin/ruff
PY     := .venv/bin/python

# Variables become configuration keys only when given, so that configs/*.yaml keep the last word on defaults.
set = $(if $($(1)),$(2)=$($(1)))
DATA  = $(call set,DATA_ROOT,data.root)
MACH  = $(call set,DEVICE,train.device)
TASKS = $(if $(TASK),--config configs/task/$(TASK).yaml)
KEYS  = $(call set,MODEL,model.preset) $(call set,EPOCHS,train.epochs) $(call set,SEED,train.seed) \
        $(call set,RUN,run.name) $(DATA) $(MACH) $(ARGS)

.PHONY: help setup data train pretrain study eval fold predict visualize report export doctor test test-all lint tensorboard bench soak clean

help:  ## list the targets (this one)
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo
	@echo 'Variables: DATASET (shapes, modelnet40, scanobjectnn, shapenet55, folder, images) MODEL (tiny, small, point_mae, point_bert) TASK EPOCHS SEED'
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

data: .venv/.done  ## look at a data set: WHAT=inspect, verify, pack or download (the default); DATASET DATA_ROOT ARGS
	@$(PY) -m tools.prepare_data $(or $(WHAT),download) --config configs/$(or $(DATASET),shapes).yaml $(DATA) $(ARGS)

# torchrun's own report of a process that died is long: the last line says what to do.
LAUNCH = $(if $(NPROC),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$((($$(nproc) + $(NPROC) - 1) / $(NPROC)))} \
        .venv/bin/torchrun --standalone --nproc-per-node=$(NPROC),$(PY))
ENDED  = $(if $(NPROC),|| { echo 'error: the processes have ended; see above. The same command resumes.' >&2; exit 2; })

train: .venv/.done  ## train, fold, evaluate, or resume RUN=x: DATASET MODEL EPOCHS SEED DATA_ROOT DEVICE NPROC ARGS
	@$(LAUNCH) -m tools.train --config configs/$(or $(DATASET),shapes).yaml $(TASKS) $(KEYS) $(ENDED)

pretrain: TASK = masked_autoencoding
pretrain: .venv/.done  ## pre-train by masking; then: make train ARGS="train.init_from=runs/x": the same variables
	@$(LAUNCH) -m tools.train --config configs/$(or $(DATASET),shapes).yaml $(TASKS) $(KEYS) $(ENDED)

study: .venv/.done  ## arms x seeds, and a report: STUDY=configs/study/quick.yaml, ARGS="--jobs 2 --budget 3600"
	@$(if $(STUDY),,echo 'error: say which study: make study STUDY=configs/study/quick.yaml' >&2; exit 2)
	@$(PY) -m tools.study $(STUDY) $(ARGS) $(DATA) $(MACH)

eval: .venv/.done  ## evaluate the dense model of CKPT=runs/x on its test split, or on that of DATASET
	@$(if $(CKPT),,echo 'error: say which model: make eval CKPT=runs/x' >&2; exit 2)
	@$(PY) -m tools.evaluate $(CKPT) $(if $(DATASET),--config configs/$(DATASET).yaml) $(DATA) $(MACH) $(ARGS)

fold: .venv/.done  ## fold an EWA run CKPT=runs/x into OUT=model.safetensors
	@$(if $(and $(CKPT),$(OUT)),,echo 'error: make fold CKPT=runs/x OUT=model.safetensors' >&2; exit 2)
	@$(PY) -m tools.fold $(CKPT) $(OUT) $(ARGS)

predict: .venv/.done  ## classify clouds and meshes by the model of CKPT=runs/x: ARGS="chair.ply table.off"
	@$(if $(CKPT),,echo 'error: make predict CKPT=runs/x ARGS="chair.ply"' >&2; exit 2)
	@$(PY) -m tools.predict $(CKPT) $(ARGS)

visualize: .venv/.done  ## draw WHAT=cloud, patches, saliency, errors, reconstruction, embedding, experts to OUT: DATASET CKPT ARGS
	@$(if $(WHAT),,echo 'error: make visualize WHAT=cloud DATASET=shapes OUT=cloud.png' >&2; exit 2)
	@$(PY) -m tools.visualize $(WHAT) $(if $(CKPT),--run $(CKPT)) $(if $(DATASET),--config configs/$(DATASET).yaml) \
		$(if $(OUT),--out $(OUT)) $(DATA) $(MACH) $(ARGS)

report: .venv/.done  ## one HTML page of a finished run CKPT=runs/x: figures, curves, mistakes, saliency
	@$(if $(CKPT),,echo 'error: make report CKPT=runs/x' >&2; exit 2)
	@$(PY) -m tools.report $(CKPT) $(if $(OUT),--out $(OUT)) $(DATA) $(MACH) $(ARGS)

export: .venv/.done  ## write the model of CKPT=runs/x to OUT for others: FORMAT=onnx, torchscript, torch_export, point_mae
	@$(if $(and $(CKPT),$(OUT),$(FORMAT)),,echo 'error: make export CKPT=runs/x OUT=model.onnx FORMAT=onnx' >&2; exit 2)
	@$(PY) -m tools.export $(CKPT) $(OUT) --format $(FORMAT) $(ARGS)

doctor:  ## what is installed, used and found here, what is missing, and what mends it: DATASET DATA_ROOT
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.doctor $(if $(DATASET),--config configs/$(DATASET).yaml) $(DATA) $(MACH) $(ARGS)

PYTEST = $(PY) -m pytest -n auto --maxprocesses 8 --dist loadscope

test: .venv/.done  ## run the tests, without those that take long: ARGS="tests/ewa -x"
	@$(PYTEST) -m "not slow and not hostile" $(ARGS)

test-all: .venv/.done  ## run all tests, also long trainings, and sweeps over damaged and hostile files
	@$(PYTEST) $(ARGS)

lint: .venv/.done  ## check style, names, annotations and docstrings
	@$(RUFF) check . && $(RUFF) format --check .

bench: .venv/.done  ## measure training, inference and operators against a plain twin: DEVICE, ARGS="--budget 60"
	@$(PY) -m benchmarks.bench $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

soak: .venv/.done  ## kill and resume trainings, compare bit for bit: ARGS="--kills 30"
	@$(PY) -m benchmarks.soak $(ARGS)

tensorboard: .venv/.done  ## show the curves of all runs in a browser
	@$(PY) -m tensorboard.main --logdir runs

clean:  ## remove runs and tool caches; .venv and prepared data stay
	rm -rf runs .pytest_cache .ruff_cache
