# Everything runs in .venv, made on first use from the pinned versions of requirements.lock.
PYTHON ?= python3.11
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test test-all lint bench train image up clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.serve: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[serve]'
	touch $@

.venv/.dev: .venv/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	touch $@

serve: .venv/.serve  ## serve the bundled checkpoint on HOST:PORT (127.0.0.1:8000)
	$(BIN)/slr-serve --host $(HOST) --port $(PORT)

test: .venv/.dev  ## the tests, in a few minutes
	$(BIN)/python -m pytest -n auto

test-all: test  ## the slow tests as well
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.dev  ## what the engine costs and gains, as ratios measured side by side (ten minutes)
	$(BIN)/python -m benchmarks.engine --out benchmarks/results/engine
	$(BIN)/python -m benchmarks.metrics

train: .venv/.dev  ## train the bundled checkpoint again, into runs/prosqa_more (about seven hours on one core)
	$(BIN)/slr train configs/prosqa.yaml
	$(BIN)/slr train configs/prosqa_more.yaml

image:  ## the container image slr:cpu, with Docker, or without (docker/build-without-docker)
	if command -v docker > /dev/null; then docker build -f docker/Dockerfile --target cpu -t slr:cpu .; \
	else docker/build-without-docker; fi

up:  ## server, Prometheus and Grafana in containers: http://localhost:3000 has the dashboards
	docker compose up --build

clean:  ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
