# Two commands are enough: `make quickstart` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Large pages for the memory that a training step allocates on a CPU (BUILD.md, "Training is slow").
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
RUN ?= runs/quickstart
# Worker processes of `make test` and `make test-slow`, which take up to 6 GiB each; 0: everything runs in pytest's own process.
WORKERS ?= 2

.PHONY: quickstart pipeline test test-slow test-lowering test-lowering-tpu test-lowering-cuda compilers lint bench docs clean distclean help

help:
	@echo "make quickstart   install, train nano on the standard library's source, evaluate, export, check, complete"
	@echo "make pipeline     all stages on nano: tokenizer, language, code, tools, reward, dpo, ppo, grpo, distill, export"
	@echo "make test         install what tests need; lint, type check, tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make test-lowering  compile training steps for TPUs and for H200s, on a machine without one"
	@echo "make docs         the guides as a site in build/site; a broken link is an error"
	@echo "make bench        speed of the data pipeline, and of the training step compared with PyTorch"
	@echo "make clean        delete environments and caches; make distclean: also runs/ and data/, after asking"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; make PYTHON=python3.12 ... names another"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# What training needs. Its modules are not compiled, because most of them are never imported.
$(VENV)/.core: pyproject.toml | $(BIN)/python
	@echo "installing JAX and the other packages that training needs into $(VENV): half a minute"
	$(BIN)/python -m pip install --quiet --no-compile -e .
	@touch $@

$(VENV)/.stages: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[tensorboard,parity]'
	@touch $@ $(VENV)/.core $(VENV)/.parity

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.core $(VENV)/.parity $(VENV)/.stages

# torch and transformers, which check the export, are installed while the model trains, if they are missing. Installed
# packages are not changed.
quickstart: $(VENV)/.core
	@rm -f $(VENV)/.parity.failed; test -f $(VENV)/.parity || { \
	  $(BIN)/python -m pip freeze --exclude-editable > $(VENV)/core.txt; \
	  ( $(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['parity'], sep='\n')" \
	      > $(VENV)/parity.txt \
	    && nice $(BIN)/python -m pip install --quiet --no-compile -c $(VENV)/core.txt -r $(VENV)/parity.txt > $(VENV)/parity.log 2>&1 \
	    && touch $(VENV)/.parity || mv $(VENV)/parity.log $(VENV)/.parity.failed ) & \
	}; $(BIN)/python -m tools.quickstart --workdir=$(RUN) --checker=$(VENV)/.parity

# Trains every stage on nano, without a network. The same command continues an interrupted pipeline.
pipeline: $(VENV)/.stages
	$(BIN)/python -m tools.run_stages --variant=nano --workdir=runs/pipeline

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The jax plug-ins for TPUs and GPUs cannot be installed in the same environment.
$(VENV)-%/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet -e '.[$*]' pytest beartype
	@touch $@

compilers: $(VENV)-tpu/.installed $(VENV)-cuda/.installed

# CI uses LOWERING='lowering and not slow': only the largest variants, which cover everything that the others do.
LOWERING ?= lowering
test-lowering: test-lowering-tpu test-lowering-cuda

test-lowering-tpu: $(VENV)-tpu/.installed
	TPU_SKIP_MDS_QUERY=1 $(VENV)-tpu/bin/python -m pytest -m '$(LOWERING)' -s tests/lowering/test_tpu.py

test-lowering-cuda: $(VENV)-cuda/.installed
	JAX_PLATFORMS=cpu $(VENV)-cuda/bin/python -m pytest -m '$(LOWERING)' -s tests/lowering/test_h200.py

# CI leaves out the longest tests: SLOW='slow and not lowering and not extended'.
SLOW ?= slow and not lowering
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m '$(SLOW)'

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@ $(VENV)/.core

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/python -m tools.bench.data
	$(BIN)/python -m tools.bench.step --config=configs/nano.py --against=torch

# Deletes environments and caches, and keeps models and data.
clean:
	rm -rf $(VENV) $(VENV)-tpu $(VENV)-cuda build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -not -path './data/*' -prune -exec rm -rf {} +

distclean:
	@printf 'This deletes runs/ and data/: every model and all prepared data. Type yes to continue: '; \
	  read -r answer && test "$$answer" = yes || { echo "nothing was deleted"; exit 2; }
	rm -rf runs data
	$(MAKE) clean
