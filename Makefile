# Every target runs in .venv, which is created on first use with the versions pinned in requirements.lock.
PYTHON ?= python3.11
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test test-all coverage lint page screenshots bench findings train image up chart ray clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.serve: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[serve]'
	touch $@

.venv/.dev: .venv/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	touch $@

serve: .venv/.serve  ## Serve the bundled checkpoint prosqa. HOST and PORT set the address (127.0.0.1:8000).
	$(BIN)/slr-serve --host $(HOST) --port $(PORT)

test: .venv/.dev  ## Run the tests (a few minutes).
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: test  ## Run the tests and the slow tests.
	$(BIN)/python -m pytest -m slow -n auto --dist worksteal --ignore tests/server --ignore tests/deploy
	$(BIN)/python -m pytest -m slow tests/server tests/deploy

coverage: .venv/.dev  ## Run the tests and show the coverage of slr_core and server.
	$(BIN)/python -m pytest -n auto --dist worksteal --cov

lint: .venv/.dev  ## Run ruff and mypy.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

page:  ## Build the page of the server from server/page/src. Needs Node.
	cd server/page && npm ci --no-audit --no-fund && npm run build

screenshots: .venv/.dev  ## Take the pictures of the page in docs. Needs chromium.
	$(BIN)/python docs/screenshots.py

bench: .venv/.dev  ## Run the engine benchmarks (ten minutes).
	$(BIN)/python -m benchmarks.engine --out benchmarks/results/engine
	$(BIN)/python -m benchmarks.metrics

findings: .venv/.dev  ## Build docs/findings.md from the committed rows of the studies.
	$(BIN)/python -m benchmarks.findings

train: .venv/.dev  ## Run the recipes of the bundled checkpoint prosqa (seven hours on one core).
	$(BIN)/slr train configs/prosqa.yaml
	$(BIN)/slr train configs/prosqa_more.yaml

image:  ## Build the container image slr:cpu, with Docker or docker/build-without-docker.
	if command -v docker > /dev/null; then docker build -f docker/Dockerfile --target cpu -t slr:cpu .; \
	else docker/build-without-docker; fi

up:  ## Run server, Prometheus and Grafana in containers; http://localhost:3000 shows dashboards.
	docker compose up --build

$(BIN)/helm: | .venv/.dev
	command -v helm > /dev/null || $(BIN)/python -m deploy.kubernetes.install_helm $(BIN)

.venv/.ray: .venv/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[ray]'
	touch $@

ray: .venv/.ray  ## Serve on Ray, on this machine, as deploy/ray/serve.yaml says.
	RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=slr_server.ray_proxy:proxy_middlewares \
	$(BIN)/serve run deploy/ray/serve.yaml

chart: $(BIN)/helm  ## Write the schema of the Helm chart's values, check the chart and package it into build/.
	$(BIN)/python -m deploy.kubernetes.make
	PATH="$(BIN):$$PATH" helm lint --strict deploy/kubernetes/slr
	PATH="$(BIN):$$PATH" helm package deploy/kubernetes/slr --destination build

clean:  ## Remove the environment and caches.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
