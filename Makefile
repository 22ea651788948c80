# A new machine needs only Python 3.11+, make and a package index: uv is installed into .tools/ if it is missing.
UV := $(or $(shell command -v uv),$(CURDIR)/.tools/bin/uv)
PATH := $(dir $(UV)):$(PATH)
export PATH
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 16

$(CURDIR)/.tools/bin/uv:
	python3 -m venv .tools
	.tools/bin/pip install --quiet uv

DEMO := build/demo
.PHONY: demo
demo: $(UV) clean  ## generate a repository with the default answers, train it, print where the results are
	@set -e; uv tool run 'cookiecutter>=2.7' . --no-input --output-dir $(DEMO); \
	$(DEMO)/my-experiment/scripts/train_device.sh; \
	printf '\nThe generated repository, which the next make demo replaces and make clean deletes:\n'; \
	du -sh $(DEMO)/my-experiment; \
	printf 'Its first run:\n'; \
	ls $(DEMO)/my-experiment/logs/baseline

# Tests start Python hundreds of times. Without byte code, each start compiles torch, which takes longer than the import.
.PHONY: environment
environment: $(UV)
	uv sync --quiet --compile-bytecode

# Tests take milliseconds to minutes: an idle worker takes tests from another worker's list.
PYTEST := pytest -p no:cacheprovider --numprocesses auto --dist worksteal

.PHONY: test
test: environment  ## all tests, of the template and of generated repositories (30 to 55 minutes on 2 cores)
	uv run $(PYTEST)

.PHONY: test-fast
test-fast: environment  ## the tests that are not marked slow (about 7 minutes on 2 cores)
	uv run $(PYTEST) -m "not slow"

GITHUB := .github/workflows/ci.yml '{{cookiecutter.project_slug}}/.variants/ci/github/.github/workflows/ci.yml'
GITLAB := '{{cookiecutter.project_slug}}/.variants/ci/gitlab/.gitlab-ci.yml'
.PHONY: check
check: $(UV)  ## style, types, spelling, terminology and workflows
	uv run ruff check --no-cache . '{{cookiecutter.project_slug}}' '{{cookiecutter.project_slug}}/.variants'
	uv run ruff format --no-cache --check . '{{cookiecutter.project_slug}}' '{{cookiecutter.project_slug}}/.variants'
	cd '{{cookiecutter.project_slug}}' && uv run --project .. basedpyright
	cd '{{cookiecutter.project_slug}}' && uv run --project .. shellcheck -x -P scripts scripts/*.sh .variants/*/*/scripts/*.sh
	uv run shellcheck .ci/run
	uv run python .ci/check_glossary.py
	uv run typos --hidden
	cd '{{cookiecutter.project_slug}}' && uv run --project .. typos --hidden
	uv run zizmor --offline --quiet $(GITHUB)
	uv run check-jsonschema --quiet --builtin-schema vendor.github-workflows $(GITHUB)
	uv run check-jsonschema --quiet --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci $(GITLAB)
	uv run check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

BENCHMARKS := first_minute render loop start ddp elastic checkpoints loader gpu
.PHONY: bench $(BENCHMARKS:%=bench-%)
bench: $(filter-out bench-gpu,$(BENCHMARKS:%=bench-%))  ## all benchmarks that need no GPU; see benchmarks/README.md
$(BENCHMARKS:%=bench-%): bench-%: $(UV)
	uv run --with accelerate --with lightning --with pytorch-ignite --with timm --with tqdm python benchmarks/$*.py

CACHES := -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .hypothesis
.PHONY: clean
clean:  ## delete the demo, and the caches with which cookiecutter cannot generate from this directory
	rm -rf $(DEMO)
	find '{{cookiecutter.project_slug}}' tests -type d \( $(CACHES) \) -prune -exec rm -rf {} +
