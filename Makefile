# Each target sets up what it needs; ARGS goes to the program, as in: make demo ARGS="--quick"
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
HOOK := --jaxtyping-packages=cyclevae,beartype.beartype
UNHOOKED := tests/examples/ tests/hosts/ tests/package/ tests/situations/  # call what others test
OLDEST := einops==0.8.0 jaxtyping==0.2.36 beartype==0.18.5
ARGS ?=
unexport PYTHONDONTWRITEBYTECODE  # what is imported is compiled then: compiling all of torch ahead takes a minute
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS)

.PHONY: help demo recipes bench gpu ablation ablation-full ablation-quick ablation-repair ablation-map ablation-confirm pitfalls evidence test test-hooked test-slow test-min test-host lint docs dist ci mutate clean

help:
	@echo "make demo   train on real sentences with and without the cycles (ARGS=--quick: 90 s)"
	@echo "            ARGS=--pictures: on names and pictures of emoji, in one image"
	@echo "make bench  times and bytes against other code, side by side (ARGS=--quick: a minute)"
	@echo "make gpu    all that a GPU is needed for, in eight minutes"
	@echo "make ablation   what cycles gain, five seeds (2.5 h on 2 cores; -quick: 10 min; -repair, -map, -confirm, -full: more)"
	@echo "make recipes   every training loop of docs/recipes on the same data, and their table"
	@echo "make pitfalls   fall into each pitfall of docs/pitfalls.md, and out again"
	@echo "make evidence   tables and plots of docs/evidence.md from the stored results"
	@echo "make test   the fast tests"
	@echo "make test-hooked test-slow lint docs   what .ci/run adds"
	@echo "make ci     all of .ci/run on a clean clone of the last commit"
	@echo "make dist   wheel and sdist, checked and tried"
	@echo "make test-host CYCLEVAE_HOST=PATH   the tests in a checkout of LGDLM; of CCDD and D-DiT, CYCLEVAE_CCDD, CYCLEVAE_DDIT"
	@echo "make test-min   the fast tests at the oldest versions that are supported (several GB)"
	@echo "make clean  remove environments and what was built"
	@echo "make mutate   break the losses in thousands of ways: which does no test notice?"

demo: .venv/demo
	@$(BIN)/python examples/demo.py $(ARGS)

bench: .venv/bench
	@$(BIN)/python examples/bench/bench.py $(ARGS)

gpu: .venv/test .venv/bench
	@$(BIN)/python examples/bench/gpu.py $(ARGS)

ablation: .venv/demo
	@$(BIN)/python examples/ablation/ablation.py $(ARGS)
	@$(BIN)/python examples/ablation/evidence.py --results runs/ablation/results --page runs/ablation/evidence.md

ablation-full: ablation
	@$(BIN)/python examples/ablation/ablation.py --tier exploratory $(ARGS)
	@$(BIN)/python examples/ablation/ablation.py --tier glance --corpus glosses $(ARGS)
	@$(BIN)/python examples/ablation/evidence.py --results runs/ablation/results --page runs/ablation/evidence.md

ablation-repair: .venv/demo  # against stronger opponents: 2 h on 2 cores
	@$(BIN)/python examples/ablation/ablation.py --tier repair --corpus seen $(ARGS)
	@$(BIN)/python examples/ablation/decoding.py
	@$(BIN)/python examples/ablation/evidence.py --results runs/ablation/results --page runs/ablation/evidence.md

ablation-map: .venv/demo  # by the number of pairs and the kind of latents: 3 h on 2 cores
	@for corpus in sentences inner pictures autoencoder; do \
		$(BIN)/python examples/ablation/ablation.py --tier map --corpus $$corpus $(ARGS) || exit 1; done
	@$(BIN)/python examples/ablation/evidence.py --results runs/ablation/results --page runs/ablation/evidence.md

ablation-confirm: .venv/demo  # the second preregistered test, once: 5 h of one core; needs Debian's wordnet-base
	@for corpus in fresh_pictures fresh_sentences fresh_glosses; do \
		$(BIN)/python examples/ablation/ablation.py --tier confirmation --corpus $$corpus $(ARGS) || exit 1; done
	@$(BIN)/python examples/ablation/evidence.py --results runs/ablation/results --page runs/ablation/evidence.md

ablation-quick: .venv/demo
	@$(BIN)/python examples/ablation/ablation.py --tier quick --out runs/ablation-quick $(ARGS)

recipes: .venv/recipes
	@$(BIN)/python examples/recipes/run_recipes.py

pitfalls: .venv/demo
	@$(BIN)/python examples/pitfalls/pitfalls.py $(ARGS)

evidence: .venv/demo
	@$(BIN)/python examples/ablation/evidence.py

test: .venv/test
	$(PYTEST) -m "not slow" src tests --doctest-modules

test-hooked: .venv/test  # tests of the library itself once more, every annotated shape and dtype checked
	HYPOTHESIS_PROFILE=few $(PYTEST) -m "not slow and not unhooked" $(HOOK) $(filter-out $(UNHOOKED),$(wildcard tests/*/))

test-slow: .venv/test .venv/recipes .venv/release
	$(PYTEST) --dist loadfile --no-loadscope-reorder --durations 60 -m slow tests

test-min:  # several GB; what this torch lacks is skipped by name
	test -x .venv-min/bin/python || $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet torch==2.5.1 -e ".[test]"
	.venv-min/bin/python -m pip install --quiet --no-deps $(OLDEST)  # older than some of [test] wants
	OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest --numprocesses $(JOBS) -m "not slow" tests $(ARGS)

test-host: .venv/host  # of those that are named
	@test -n "$(CYCLEVAE_HOST)$(CYCLEVAE_CCDD)$(CYCLEVAE_DDIT)" || { echo "which host? make test-host CYCLEVAE_HOST=/path/to/LGDLM"; exit 1; }
	CYCLEVAE_HOST="$(abspath $(CYCLEVAE_HOST))" CYCLEVAE_CCDD="$(abspath $(CYCLEVAE_CCDD))" CYCLEVAE_DDIT="$(abspath $(CYCLEVAE_DDIT))" \
		$(BIN)/python -m pytest $(if $(CYCLEVAE_HOST),tests/adapters/host) $(if $(CYCLEVAE_CCDD),tests/hosts/test_ccdd.py) \
		$(if $(CYCLEVAE_DDIT),tests/hosts/test_dual_diffusion.py) $(ARGS)

lint: .venv/dev
	$(BIN)/ruff format --check src tests examples docs
	$(BIN)/ruff check src tests examples docs
	$(BIN)/mypy

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@! grep -rE '(src|href)="(https?:)?//[^"]+[.](js|css|woff2?|svg|png)"' --include='*.html' site \
		|| { echo "the pages above need a network to be read"; exit 1; }

dist: .venv/release  # build, check, and run the wheel in an environment of its own
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && wheel/bin/python -m cyclevae

ci:  # .ci/run on the last commit, as on a new machine
	rm -rf build/ci
	git clone --quiet . build/ci
	bash build/ci/.ci/run

mutate: .venv/mutate
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/mutmut results

clean:
	rm -rf .venv .venv-min build dist site mutants

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cyclevae needs Python 3.11 or newer, got %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "this Python has no venv module: install it (Debian: apt install python3-venv)"; exit 1; }

.venv/%: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing cyclevae[$(EXTRAS_$*)] into .venv (once) ..."
	$(PIP) -e ".[$(EXTRAS_$*)]"
	@touch $@

# of .ci/run, in one resolution: apart they take twice as long
.venv/all: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[dev,recipes,release]"
	@touch $@ .venv/demo .venv/dev .venv/recipes .venv/release

EXTRAS_demo := demo
EXTRAS_bench := demo,bench
EXTRAS_test := test
EXTRAS_host := test,demo,host
EXTRAS_recipes := recipes
EXTRAS_release := release
EXTRAS_dev := dev
EXTRAS_mutate := test,mutate
