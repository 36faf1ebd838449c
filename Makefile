# make demo, make tables, make validate, make study, make test and make bench do all of their own set-up, in .venv.
PYTHON ?= python3
# Without a GPU a fixed torch; on a GPU box `make TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
VENV := .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: demo tables validate study test bench lint clean
demo: $(VENV)/ready
	$(RUN) data/demo/run_demo.py

# Every method, two seeds, the ablations; goes on where it was stopped.
tables: $(VENV)/ready
	$(RUN) data/make_sft_model.py
	$(RUN) evaluation_scripts/paper_tables.py

# Retrains 190 times: half an hour on two cores, which two runs share; goes on where it was stopped.
VALIDATE := OMP_NUM_THREADS=1 $(RUN) evaluation_scripts/validate_scores.py
validate: $(VENV)/ready
	$(RUN) data/make_sft_model.py
	$(VALIDATE) > $(VENV)/validate.log 2>&1 & second=$$!; \
	$(VALIDATE); first=$$?; wait $$second || { tail -n 3 $(VENV)/validate.log; exit 1; }; exit $$first

# A real pretrained model, fine-tuned, traced and repaired in every way, on the data that data/prepare.py brings: run that
# first. Then the same methods on the demo. Many hours on two cores; goes on where it was stopped.
HH_DATASET ?= data/hh
DATA_DIR ?= data
study: $(VENV)/ready
	$(if $(wildcard $(HH_DATASET)),HF_HUB_OFFLINE=1) $(VENV)/bin/python studies/real_model.py \
	    --HH_DATASET $(HH_DATASET) --DATA_DIR $(DATA_DIR)
	$(RUN) studies/demo_repairs.py

# Three quarters of an hour on two cores: the released recipe is slow.
bench: $(VENV)/ready
	$(RUN) benchmarks/bench.py
	$(RUN) benchmarks/growth.py

test: $(VENV)/ready lint
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# kronfluence asks for torchvision, which it never imports and which breaks transformers where it does not match
# torch; so kronfluence comes without its dependencies, and what it does import is named beside it.
$(VENV)/ready: requirements.txt requirements-dev.txt Makefile
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	grep -v '^kronfluence' requirements.txt > $(VENV)/requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -r $(VENV)/requirements.txt -r requirements-dev.txt einops einconv opt-einsum
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    "$$(grep '^kronfluence' requirements.txt)"
	touch $@

clean:
	rm -rf $(VENV)
