# On a fresh machine only Python 3.11+, make and a package index are needed: uv is brought along where it is missing.
UV := $(or $(shell command -v uv),$(CURDIR)/.tools/bin/uv)
PATH := $(dir $(UV)):$(PATH)
export PATH
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 16

$(CURDIR)/.tools/bin/uv:
	python3 -m venv .tools
	.tools/bin/pip install --quiet uv

.PHONY: demo
demo: $(UV) clean  ## render with default answers, train, and show where the results are
	@set -e; mkdir -p build; folder=$$(mktemp -d build/demo-XXXXXX); \
	uv tool run 'cookiecutter>=2.7' . --no-input --output-dir $$folder; \
	$$folder/my-experiment/scripts/train_device.sh; \
	printf '\nThe rendered repository: %s\nIts first run:\n' $$folder/my-experiment; \
	ls $$folder/my-experiment/logs/baseline

# Tests start Python hundreds of times: without byte code each start compiles torch anew, which takes longer than its import.
.PHONY: environment
environment: $(UV)
	uv sync --quiet --compile-bytecode

# A worker that is done takes tests from another one's list: they last from milliseconds to minutes.
PYTEST := pytest -p no:cacheprovider --numprocesses auto --dist worksteal

.PHONY: test
test: environment  ## all tests, of the template and of what it renders (18 minutes on 2 cores)
	uv run $(PYTEST)

.PHONY: test-fast
test-fast: environment  ## without the launch scripts and spawned workers (3 minutes)
	uv run $(PYTEST) -m "not slow"

GITHUB := .github/workflows/ci.yml '{{cookiecutter.project_slug}}/.variants/ci/github/.github/workflows/ci.yml'
GITLAB := '{{cookiecutter.project_slug}}/.variants/ci/gitlab/.gitlab-ci.yml'
.PHONY: check
check: $(UV)  ## style, types, spelling and workflows, of the template and in place of what it renders
	uv run ruff check --no-cache . '{{cookiecutter.project_slug}}' '{{cookiecutter.project_slug}}/.variants'
	uv run ruff format --no-cache --check . '{{cookiecutter.project_slug}}' '{{cookiecutter.project_slug}}/.variants'
	cd '{{cookiecutter.project_slug}}' && uv run --project .. basedpyright
	cd '{{cookiecutter.project_slug}}' && uv run --project .. shellcheck -x -P scripts scripts/*.sh .variants/*/*/scripts/*.sh
	uv run shellcheck .ci/run
	uv run typos --hidden
	cd '{{cookiecutter.project_slug}}' && uv run --project .. typos --hidden
	uv run zizmor --offline --quiet $(GITHUB)
	uv run check-jsonschema --quiet --builtin-schema vendor.github-workflows $(GITHUB)
	uv run check-jsonschema --quiet --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci $(GITLAB)
	uv run check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

BENCHMARKS := first_minute render loop start ddp checkpoints loader gpu
.PHONY: bench $(BENCHMARKS:%=bench-%)
bench: $(filter-out bench-gpu,$(BENCHMARKS:%=bench-%))  ## every benchmark but that of a GPU; see benchmarks/README.md
$(BENCHMARKS:%=bench-%): bench-%: $(UV)
	uv run --with accelerate --with lightning --with pytorch-ignite --with timm --with tqdm python benchmarks/$*.py

.PHONY: clean
clean:  ## caches that would be in the way of rendering from this folder
	find '{{cookiecutter.project_slug}}' tests -name __pycache__ -prune -exec rm -rf {} +
