# Everything starts here: `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Threads that wait for each other stall on a busy machine, and nothing here is large enough to gain from two.
export OMP_NUM_THREADS ?= 1
# Tests are a hundred processes: without bytecode each of them compiles the package, and three rewrite every assertion.
unexport PYTHONDONTWRITEBYTECODE
# Test files that run at the same time, one more than cores: those with servers wait a lot. JOBS=0: one process.
JOBS ?= 3

.PHONY: setup frameworks kserve environments demo test test-quick lint types docs notebooks bench bench-badnets bench-fusion bench-loop bench-networks leaderboard test-zoo adaptive-attacks ablation rehearsal rehearsal-audits clean help

help:
	@echo "make demo   set up, backdoor a network on real images, guard it, serve it, print the verdicts"
	@echo "make test   set up and run all tests; make test-quick leaves out what starts servers or trains"
	@echo "make rehearsal   start everything, attack it, let alerts go off and clear, compare the counts (needs prometheus)"
	@echo "make lint | types | docs | bench | clean"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s. Name another with PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# The upstream of tests/test_proxy_kserve.py: an environment of its own, it wants older packages than any.
KSERVE := build/kserve
kserve: $(KSERVE)/.ready

$(KSERVE)/.ready:
	$(PYTHON) -m venv $(KSERVE)
	$(KSERVE)/bin/python -m pip install --quiet "kserve==0.21.0" "onnxruntime>=1.19"
	@touch $@

# Servers whose packages want other versions than the tests do, beside them: what they lack comes from .venv.
FRAMEWORKS := build/frameworks
frameworks: $(FRAMEWORKS)/.ready

$(FRAMEWORKS)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(FRAMEWORKS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
	  > $$(echo $(FRAMEWORKS)/lib/python3*/site-packages)/zz-parent.pth
	$(FRAMEWORKS)/bin/python -m pip install --quiet "mlserver>=1.7,<2"
	$(FRAMEWORKS)/bin/python -m pip install --quiet "bentoml>=1.4,<2"
	@touch $@

demo: setup
	$(BIN)/guard demo $(ARGS)

# All that the tests run with; two installations at a time.
environments:
	@$(MAKE) --no-print-directory -j2 setup kserve
	@$(MAKE) --no-print-directory frameworks

test: environments
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# No server, no browser, no database server; under 90 seconds on two quiet cores.
test-quick: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy --strict guard handlers

# The documentation in build/site. An environment of its own: it reads the package, and imports nothing of it.
DOCS := build/docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt -r $(DOCS)/requirements.txt
	@touch $@

# The notebooks with their outputs, after a cell has changed: a kernel beside the tests' packages. Seconds each.
NOTEBOOKS := build/notebooks
notebooks: $(NOTEBOOKS)/.ready
	$(NOTEBOOKS)/bin/python examples/notebooks/run.py examples/notebooks/*.ipynb

$(NOTEBOOKS)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(NOTEBOOKS)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
	  > $$(echo $(NOTEBOOKS)/lib/python3*/site-packages)/zz-parent.pth
	$(NOTEBOOKS)/bin/python -m pip install --quiet "nbclient>=0.10" "ipykernel>=6.29"
	@touch $@

# A bad night in four minutes: server, review page, retrainer and Prometheus; attack, bypass, failures, drift.
rehearsal: setup
	$(BIN)/python benchmarks/rehearsal/rehearse.py --runbook docs/operations.md $(ARGS)

# An attack that is caught in part, and what the audit sample says of it, in four minutes (needs prometheus).
rehearsal-audits: setup
	$(BIN)/python benchmarks/rehearsal/audits.py $(ARGS)

bench: setup
	$(BIN)/python benchmarks/detection.py
	$(BIN)/python benchmarks/lof_speed.py
	$(BIN)/python benchmarks/guard_time.py
	$(BIN)/python benchmarks/fit_time.py
	$(BIN)/python benchmarks/profile_request.py
	$(BIN)/python benchmarks/serving_overhead.py
	$(BIN)/python benchmarks/queue_speed.py
	$(BIN)/python benchmarks/observing_cost.py
	$(BIN)/python benchmarks/audit_cost.py

# What a person's answers change, from the zoo (GUARD_DATA_DIR), and what live requests notice of a retraining.
bench-loop: setup
	$(BIN)/python benchmarks/fusion/table_8.py $(ARGS)
	$(BIN)/python benchmarks/loop/stream.py $(ARGS)
	$(BIN)/python benchmarks/loop/serving_during_retraining.py

# Needs MNIST's training images (GUARD_DATA_DIR). About half an hour on one free core; an interrupted run goes on.
bench-badnets: setup
	$(BIN)/python benchmarks/badnets/single_target.py
	$(BIN)/python benchmarks/badnets/all_to_all.py
	$(BIN)/python benchmarks/badnets/poison_rate.py

# Tables of the Fusion paper from the zoo (benchmarks/zoo) and the image sets (GUARD_DATA_DIR). Two processes.
bench-fusion: setup
	$(BIN)/python benchmarks/fusion/run_all.py $(ARGS)

# The guard and every rival on the zoo (GUARD_DATA_DIR), docs/leaderboard.md. Days of one core in all; an interrupted run
# goes on, and ARGS="--minutes 60" ends by itself.
leaderboard: setup
	$(BIN)/python benchmarks/leaderboard/run.py $(ARGS)

# Models that no setting was chosen on, trained and measured for a frozen guard only (benchmarks/frozen.json, made by
# `python benchmarks/test_zoo.py --freeze`). About an hour of two cores for training; an interrupted run goes on.
test-zoo: setup
	$(BIN)/guard zoo train --plan test --missing --jobs 2
	$(BIN)/python benchmarks/test_zoo.py $(ARGS)

# Attackers who know the guard: what each adaptation hides, and what it costs (GUARD_DATA_DIR); an interrupted run goes on.
adaptive-attacks: setup
	$(BIN)/python benchmarks/adaptive_attacks.py $(ARGS)

# What each part of the default mode is worth (GUARD_DATA_DIR); an interrupted run goes on.
ablation: setup
	$(BIN)/python benchmarks/ablation.py

# A ViT, a Swin and a ConvNeXt of timm and a ResNet-18 of transformers on GTSRB (GUARD_DATA_DIR): trained, guarded, served.
# timm comes without its dependency on torchvision, which must fit the installed torch. An interrupted run goes on.
bench-networks: setup
	$(BIN)/python -m pip install --quiet --no-deps "timm>=1.0.20"
	$(BIN)/python -m pip install --quiet "transformers>=5.0"
	$(BIN)/python benchmarks/networks/training.py $(ARGS)
	$(BIN)/python benchmarks/networks/detection.py --again
	$(BIN)/python benchmarks/networks/serving.py

clean:
	rm -rf build dist model_store/*.mar .pytest_cache .mypy_cache .ruff_cache
