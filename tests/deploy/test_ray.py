"""Ray: the server as an application of Ray Serve, batches and sweeps, on one cluster of two nodes on this machine."""

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT
from slr_core.cli import app
from slr_core.errors import ConfigError, SLRError
from tests.deploy.monitoring import ROOT
from tests.deploy.test_prometheus import free_port
from tests.training.recipe import DATA

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
PROMPT = "Max is a impus. Every impus is a rompus. Is Max a rompus or lempus?"
LONG = {"prompt": PROMPT, "max_iterations": 64, "convergence": {"criterion": "fixed"}}
TIGHT = {"max_ongoing_requests": 2, "max_queued_requests": 1, "graceful_shutdown_timeout_s": 20}
SCALING = {
    **{"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 2, "look_back_period_s": 2},
    "policy": {"policy_function": "slr_server.ray_serve:scale_on_answers"},
}


def until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < ends, "not in time"
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")
def cluster():
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "slr_server.ray_proxy:proxy_middlewares"
    from ray.cluster_utils import Cluster

    # GPUs that are not there: replicas get shares of them, and the engines compute on the CPU.
    options = {"num_cpus": 4, "num_gpus": 4, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        made.add_node(**options)
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def deploy(cluster, tmp_path_factory):
    """Deploys the application, and waits until it is ready; gives its URL."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    folder = tmp_path_factory.mktemp("sets")
    shutil.copytree(DEFAULT_CHECKPOINT, folder / "other")
    settings = {"slots": 4, "log_level": "warning", "loop_sets": str(folder), "max_queue": 64}
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    (application,) = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())["applications"]
    common = {"name": "LatentServer", "health_check_period_s": 1, "health_check_timeout_s": 10}
    resources = {"num_cpus": 1, "num_gpus": 0.25}

    def run(changes=(), **options):
        made = {**application, "args": {**settings, **dict(changes)}}
        made["deployments"] = [{**common, "ray_actor_options": resources, **options}]
        # As `serve deploy`, which needs Ray's dashboard.
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [made]}))
        time.sleep(1)  # until the controller has seen it
        until(lambda: serve.status().applications["slr"].status == "RUNNING", 120)
        return f"http://127.0.0.1:{port}"

    yield run
    serve.shutdown()


@pytest.fixture(scope="module")
def url(deploy):
    return deploy(num_replicas=2, max_ongoing_requests=12, user_config={})


def replicas():
    """The processes of replicas, and the parent of each, which stands for its node."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name().startswith("ray::ServeRepl") or "ServeReplica:slr:" in " ".join(process.cmdline()[:1]):
                found[process.pid] = process.ppid()
    return found


def scraped(url):
    """Metrics of every replica that answers, by its start time."""
    found = {}
    for _ in range(20):
        lines = re.findall(r"^(\w+(?:{.*})?) (\S+)$", httpx.get(f"{url}/metrics", timeout=30).text, re.MULTILINE)
        metrics = {name: float(value) for name, value in lines}
        found[metrics["process_start_time_seconds"]] = metrics
    return list(found.values())


@asynccontextmanager
async def load(url, clients, body):
    """Statuses of clients that ask without a pause while the context lasts."""
    statuses, over = Counter(), asyncio.Event()

    async def client(http):
        while not over.is_set():
            statuses[(await http.post("/generate", json=body)).status_code] += 1

    async with httpx.AsyncClient(base_url=url, timeout=60) as http, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(http))
        yield statuses
        over.set()


async def loaded(url, clients, during, after_s=0.0, body=LONG):
    async with load(url, clients, body) as statuses:
        await asyncio.sleep(1)
        await asyncio.to_thread(during)
        await asyncio.sleep(after_s)
    return statuses


def test_requests_spread(url):
    statuses = asyncio.run(loaded(url, 8, lambda: time.sleep(3)))
    assert statuses.keys() == {200}
    assert len(set(replicas().values())) == 2, "a replica on each node"
    assert ray.available_resources()["GPU"] == 8 - 2 * 0.25
    counts = [metrics['slr_requests_total{endpoint="/generate",status="ok"}'] for metrics in scraped(url)]
    assert len(counts) == 2
    assert min(counts) > 0.2 * sum(counts)


def test_streams_are_unbuffered(url):
    began = time.perf_counter()
    with httpx.stream("POST", f"{url}/generate", json={**LONG, "stream": True}, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        times = [time.perf_counter() for line in response.iter_lines() if line.startswith("event:")]
    assert len(times) > 64
    assert times[-1] - times[0] > 0.3 * (times[-1] - began)


def test_kept_connections(url):
    """No response waits for the client's acknowledgment, which Linux delays by 40 ms."""
    body = {"prompt": PROMPT, "max_iterations": 0, "max_new_tokens": 1}
    with httpx.Client(base_url=url, timeout=60) as client:
        seconds = [client.post("/generate", json=body).elapsed.total_seconds() for _ in range(20)]
    assert min(seconds[5:]) < 0.04


def test_client_leaves(url):
    name = 'slr_loop_exits_total{reason="cancelled"}'
    body = {**LONG, "stream": True, "n": 16, "temperature": 1.0}
    for _ in range(3):
        with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as response:
            next(response.iter_lines())
    until(lambda: sum(metrics[name] for metrics in scraped(url)) > 0)
    until(lambda: all(metrics["slr_slots_in_use"] == 0 for metrics in scraped(url)))


def test_thresholds_change_live(url, deploy):
    def iterations():
        return httpx.post(f"{url}/generate", json={"prompt": PROMPT}, timeout=60).json()["results"][0]["iterations"]

    before, pids = iterations(), replicas().keys()
    deploy(num_replicas=2, max_ongoing_requests=12, user_config={"convergence": {"threshold": 100.0}})
    until(lambda: iterations() < before)
    assert replicas().keys() == pids, "no replica was replaced"
    deploy(num_replicas=2, max_ongoing_requests=12, user_config={})
    until(lambda: iterations() == before)


def test_loop_set_is_loaded(url):
    header = {"serve_multiplexed_model_id": "other"}
    body = {"prompt": PROMPT, "loop_set": "other"}
    assert httpx.post(f"{url}/generate", json=body, headers=header, timeout=60).status_code == 200
    # Ray sends later ones to the replica that has it.
    for _ in range(8):
        assert httpx.post(f"{url}/generate", json=body, headers=header, timeout=60).status_code == 200
    served = {"serve_multiplexed_model_id": httpx.get(f"{url}/v1/models").json()["data"][0]["id"]}
    own = httpx.post(f"{url}/generate", json={"prompt": PROMPT}, headers=served, timeout=60)
    assert own.status_code == 200
    gone = httpx.post(f"{url}/generate", json=body, headers={"serve_multiplexed_model_id": "gone"}, timeout=60)
    assert gone.status_code == 404
    assert gone.json()["error"]["param"] == "name"


def test_killed_replica(url):
    """Only the requests that it ran fail, with a 5xx, and it comes back."""
    before = replicas()
    victim = next(iter(before))
    statuses = asyncio.run(loaded(url, 8, lambda: os.kill(victim, signal.SIGKILL), after_s=4))
    assert statuses[200] >= 5
    assert all(status == 200 or status >= 500 for status in statuses), statuses
    assert sum(statuses.values()) - statuses[200] <= 8
    until(lambda: len(replicas()) == 2 and victim not in replicas())


def test_lost_node(url, cluster):
    head = ray.get_runtime_context().get_node_id()
    (other,) = [node for node in cluster.list_all_nodes() if node.node_id != head]
    statuses = asyncio.run(loaded(url, 8, lambda: cluster.remove_node(other, allow_graceful=False), after_s=4))
    assert statuses[200] >= 5
    assert all(status == 200 or status >= 500 for status in statuses), statuses
    assert sum(statuses.values()) - statuses[200] <= 8
    until(lambda: len(replicas()) == 2 and len(set(replicas().values())) == 1)


def test_rolling_update(url, deploy):
    """Another limit replaces all replicas, without a refused request."""
    before = replicas().keys()
    update = lambda: deploy({"max_queue": 60}, max_ongoing_requests=12, autoscaling_config=SCALING)  # noqa: E731
    statuses = asyncio.run(loaded(url, 4, update, after_s=2))
    assert statuses.keys() == {200}
    assert not before & replicas().keys()


def test_scales_with_load(url):
    until(lambda: len(replicas()) == 1)
    asyncio.run(loaded(url, 10, lambda: until(lambda: len(replicas()) == 2)))
    until(lambda: len(replicas()) == 1)


def test_backpressure(url, deploy):
    deploy(num_replicas=1, backpressure_config={"status_code": 429, "retry_after_s": 3}, **TIGHT)

    async def burst():
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            return await asyncio.gather(*(http.post("/generate", json=LONG) for _ in range(16)))

    replies = asyncio.run(burst())
    assert {reply.status_code for reply in replies} == {200, 429}
    assert all(reply.headers["retry-after"] == "3" for reply in replies if reply.status_code == 429)


# -- batches and sweeps ---------------------------------------------------------------------------------------------


def test_batch(cluster, tmp_path):
    """Every line once and in order, from two engines, also after a first part was answered."""
    from slr_server.ray_batch import run_ray_batch

    lines = [{"id": i, "prompt": PROMPT, "max_iterations": i % 4} for i in range(600)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "out.jsonl").write_text("".join(f'{{"id": {i}}}\n' for i in range(10)) + '{"id": 10, "te')
    assert run_ray_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", {"model": None}, engines=2) == 590
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in found] == list(range(600))
    assert all(answer["iterations"] <= i % 4 for i, answer in enumerate(found) if i >= 10)


def test_eval(cluster, tmp_path):
    """As on one machine; a repeated command answers nothing again, and one with a part of the answers the others."""

    def run(name, *options):
        results, figures = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        questions = ["--task=prosqa", "--generate=60", "--batch-size=16", "--method=slr_vote"]
        files = [f"--results={results}", f"--output={figures}"]
        done = CliRunner().invoke(app, ["eval", *questions, *files, "--json", *options])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == json.loads(figures.read_text())
        overall = {**json.loads(done.stdout)["overall"], "seconds": 0}
        outcomes = [json.loads(line) for line in results.read_text().splitlines() if line.startswith('{"of"')]
        return overall, {outcome["key"]: {**outcome, "seconds": 0} for outcome in outcomes}, results

    here, alone, _ = run("here")
    there, spread, results = run("there", "--ray=2")
    assert list(spread) == list(alone)
    for name in ("questions", "accuracy", "iterations", "tokens", "forward_passes"):
        assert there[name] == pytest.approx(here[name], rel=0.02), name
    assert sum(spread[key]["text"] == alone[key]["text"] for key in alone) >= 58
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:24]))
    again, continued, _ = run("there", "--ray=1")
    assert (list(continued), again["questions"]) == (list(spread), 60)


def test_worker_errors(cluster, tmp_path):
    """An error of a worker is one line, as on one machine."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    batch = ["generate", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    for command in (["eval", "--task=prosqa", "--generate=2"], batch):
        done = CliRunner().invoke(app, [*command, "--model=/no/where", "--ray=1"])
        assert "CheckpointError" in str(done.exception), done.output
        assert isinstance(done.exception, SLRError)
    both = CliRunner().invoke(app, ["eval", "--task=prosqa", "--generate=2", "--server=http://x", "--ray=1"])
    assert isinstance(both.exception, ConfigError)


def test_sweep(cluster, tmp_path):
    recipe = {**DATA, "stages": [{**DATA["stages"][0], "steps": 2}], "threads": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sweep = {
        **{"recipe": "recipe.yaml", "output_dir": str(tmp_path / "out"), "seeds": [0, 1]},
        "evaluate": [{"task": "prosqa", "generate": 2}],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    run = CliRunner().invoke(app, ["sweep", str(tmp_path / "sweep.yaml"), "--ray", "--json"])
    assert run.exit_code == 0, run.output
    assert [row["seed"] for row in json.loads(run.stdout)["rows"]] == [0, 1]


# -- without a cluster --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "current", "queued", "wanted"),
    [
        ({}, 3, 0, 3),  # nothing is known: no change
        ({"a": 0, "b": 0}, 2, 0, 1),
        ({"a": 10, "b": 10}, 2, 0, 1),
        ({"a": 40, "b": 30}, 2, 0, 4),
        ({"a": 20}, 2, 0, 2),  # the other one may be as busy
        ({"a": 20}, 1, 500, 8),
    ],
)
def test_policy(answers, current, queued, wanted):
    from slr_server.ray_serve import scale_on_answers

    context = SimpleNamespace(
        aggregated_metrics={"answers": answers, "slots": dict.fromkeys(answers, 32)},
        total_queued_requests=queued,
        current_num_replicas=current,
        target_num_replicas=current,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
    )
    assert scale_on_answers(context) == (wanted, {})


def test_resources(monkeypatch):
    """A replica's share of a GPU reaches Ray, and its engine has as many threads as the replica has CPUs."""
    from ray.serve.schema import ServeDeploySchema

    from slr_server.hosts import allowed_hosts
    from slr_server.ray_serve import LatentServer, replica_settings

    (application,) = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())["applications"]
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 3, "num_gpus": 0.5}
    (read,) = ServeDeploySchema.model_validate({"applications": [application]}).applications
    options = read.deployments[0].ray_actor_options
    assert (options.num_cpus, options.num_gpus) == (3, 0.5)
    deployment = LatentServer.options(ray_actor_options={"num_cpus": 3, "num_gpus": 0.5})
    assert deployment.ray_actor_options["num_gpus"] == 0.5

    def settings(assigned, **given):
        context = SimpleNamespace(get_assigned_resources=lambda: assigned)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        return replica_settings(given)

    assert settings({"CPU": 3.0, "GPU": 0.5}).threads == 3
    assert settings({"CPU": 0.5}).threads == 1
    assert settings({"CPU": 3.0}, threads=2).threads == 2
    # Ray's proxies listen for any name of the service, a replica on loopback alone.
    assert allowed_hosts(settings({})) is None
    assert allowed_hosts(settings({}, allowed_hosts="a.example")) == {"a.example"}


def test_yaml():
    from ray.serve.schema import ServeDeploySchema

    text = (ROOT / "deploy/ray/serve.yaml").read_text()
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    module, _, name = application.import_path.partition(":")
    build = getattr(__import__(module, fromlist=[name]), name)
    assert build(application.args)
    assert application.deployments[0].name == "LatentServer"
