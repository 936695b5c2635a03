# Two commands do all of it: `make demo` and `make test`. Both set the environment up when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := $(BIN)/python -m monai.bundle run --config_file
SSL := bundles/ssl_pretrain/configs
PYRAMID := bundles/dual_stream_pyramid/configs
DEMO ?= runs/demo

.PHONY: help setup demo test lint format bench zips clean

help:
	@echo "make demo   set up, pretrain on random images, fine-tune, register two scans (under 3 minutes on two cores, and the set-up)"
	@echo "make test   set up and run the test suite"
	@echo "make lint   style and types"
	@echo "make zips   pack every bundle into dist/, with its sha256"
	@echo "make bench  time and memory of the core, side by side with MONAI's"

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $(STAMP)

demo: setup
	$(RUN) $(SSL)/train.json --output_dir $(DEMO)/pretrain
	$(RUN) $(SSL)/finetune.json --pretrained $(DEMO)/pretrain/model.pt --dataset_dir $(DEMO)/data --output_dir $(DEMO)/finetune
	$(RUN) $(SSL)/inference.json --checkpoint $(DEMO)/finetune/model.pt --dataset_dir $(DEMO)/data --output_dir $(DEMO)/registration
	$(RUN) $(PYRAMID)/inference.json --dataset_dir $(DEMO)/data --output_dir $(DEMO)/pyramid
	@echo
	@echo "Pretraining on random images   $(DEMO)/pretrain       pictures/, TensorBoard logs, model.pt"
	@echo "Fine-tuning on the cohort      $(DEMO)/finetune       pictures/, metrics.csv, model.pt"
	@echo "One registration               $(DEMO)/registration   report.html, moved.nii.gz, transforms both ways"
	@echo "The same by shipped weights    $(DEMO)/pyramid        likewise"

test: setup
	$(BIN)/python -m pytest -n 2 --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy common

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

zips: setup
	$(BIN)/python -m common.package all --output dist

clean:
	rm -rf $(VENV) runs build dist *.egg-info
