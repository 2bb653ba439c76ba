"""The Helm chart, rendered and validated. There is no Kubernetes API server here: nothing is applied."""

import json
import re
import shutil
import subprocess

import jsonschema
import pytest
import yaml

from deploy.kubernetes import make
from slr_server.auth import PROBES
from slr_server.cli import _END_S, _FLUSH_S
from slr_server.settings import ServerSettings
from tests.deploy.conftest import CHART, DIGEST
from tests.deploy.monitoring import DASHBOARDS, ROOT, RULES

VALUES = sorted(CHART.glob("values*.yaml"))
CUSTOM = ("keda.sh/", "monitoring.coreos.com/")
"""API groups that Kubernetes itself does not have: of these, only what the tests name is checked."""

every_values_file = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)


def merged(path):
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for name, value in yaml.safe_load(path.read_text()).items():
        values[name] = {**values[name], **value} if isinstance(values[name], dict) else value
    return values


# -- values -------------------------------------------------------------------------------------------


def test_schema_is_current():
    assert make.SCHEMA.read_text() == make.render(), "run `python -m deploy.kubernetes.make`"
    generated = make.settings()["properties"]
    assert generated.keys() == ServerSettings.model_fields.keys() - make.CHART_SETS
    assert {value["description"] for value in generated.values()} >= {ServerSettings.model_fields["slots"].description}


@every_values_file
def test_values_fit_schema(values):
    schema = json.loads(make.SCHEMA.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(merged(values), schema, jsonschema.Draft7Validator)
    for fault in (
        {"settings": {"slotz": 3}},
        {"settings": {"slots": 0}},
        {"settings": {"api_keys": "a"}},
        {"image": {"digest": "sha256:12"}},
        {"replica": 2},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(fault, schema, jsonschema.Draft7Validator)


@every_values_file
def test_answers_per_replica(values):
    made = merged(values)
    assert made["autoscaling"]["answersPerReplica"] == round(0.7 * made["settings"].get("slots", 32))


# -- manifests ----------------------------------------------------------------------------------------


@pytest.mark.slow
@every_values_file
def test_lint_and_validate(helm, values):
    validator = pytest.importorskip("kubernetes_validate")
    helm("lint", "--strict", f"--values={values}")
    everything = "--set=autoscaling.enabled=true,monitoring.serviceMonitor=true,adminKey.secret=a,checkpoints.claim=c"
    for options in ((), (everything,)):
        rendered = helm("template", f"--values={values}", *options, name=["slr", "--kube-version=1.33.0"])
        kinds = set()
        for manifest in yaml.safe_load_all(rendered):
            if not manifest["apiVersion"].startswith(CUSTOM):
                validator.validate(manifest, "1.33", strict=True)
                kinds.add(manifest["kind"])
        assert kinds == {"Deployment", "Service", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget"}


@pytest.mark.slow
def test_refused_values(helm):
    assert "slotz" in helm("template", "--set=settings.slotz=3", code=1)
    assert "set image.digest" in helm("template", digest="", code=1)


@pytest.mark.slow
def test_settings_are_read(manifests, tmp_path, monkeypatch):
    """The server accepts the rendered file; large numbers keep their type."""
    options = ("--set=settings.max_body_bytes=4194304", "--set-json=settings.stall_timeout_s=12.5")
    (tmp_path / "settings.yaml").write_text(manifests(*options)["ConfigMap"]["data"]["settings.yaml"])
    monkeypatch.setenv("SLR_CONFIG", str(tmp_path / "settings.yaml"))
    read = ServerSettings()
    assert (read.max_body_bytes, read.stall_timeout_s, read.log_format, read.slots) == (4194304, 12.5, "json", 32)


@pytest.mark.slow
def test_deployment(manifests):
    spec = manifests()["Deployment"]["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    pod = spec["template"]["spec"]
    (server,) = pod["containers"]
    assert server["image"] == f"slr@{DIGEST}"
    probes = {kind: server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(paths.values()) <= PROBES
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 300
    assert server["ports"] == [{"name": "http", "containerPort": 8000}]
    assert "EXPOSE 8000" in (ROOT / "docker/Dockerfile").read_text()
    assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), 10001),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")} == {"/tmp"}


@pytest.mark.slow
@pytest.mark.parametrize(("grace_s", "wait"), [(30, 10), (0.5, 0), (900, 20)])
def test_grace_period(manifests, grace_s, wait):
    """The kubelet waits longer than the server takes to drain and to end itself."""
    rendered = manifests(f"--set-json=settings.grace_s={grace_s}", f"--set=preStopSeconds={wait}")
    pod = rendered["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", str(wait)]}}
    assert pod["terminationGracePeriodSeconds"] > wait + grace_s + _FLUSH_S + _END_S


@pytest.mark.slow
def test_secrets(production, manifests):
    pod = production["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert {"name": "SLR_API_KEYS_FILE", "value": "/etc/slr-keys/keys"} in server["env"]
    (keys,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys")
    assert keys == {"secretName": "slr-keys", "defaultMode": 0o440, "items": [{"key": "keys", "path": "keys"}]}
    (endpoint,) = production["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "slr-keys", "key": "metrics"}
    (server,) = manifests("--set=adminKey.secret=admin")["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "SLR_ADMIN_KEY", "valueFrom": {"secretKeyRef": {"name": "admin", "key": "admin"}}} in server["env"]
    assert "Secret" not in production


@pytest.mark.slow
def test_selectors(production):
    """Every object means the pods of this release alone."""
    labels = production["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        production["Deployment"]["spec"]["selector"]["matchLabels"],
        production["Service"]["spec"]["selector"],
        production["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        production["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels
        assert selector["app.kubernetes.io/instance"] == "one"
    monitor = production["ServiceMonitor"]["spec"]
    service = production["Service"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= service.items()
    assert service[monitor["jobLabel"]] == "slr", "the rules expect this job"
    scaled = production["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"] == {"name": production["Deployment"]["metadata"]["name"]}
    assert "replicas" not in production["Deployment"]["spec"]
    assert production["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


@pytest.mark.slow
def test_network_policy(manifests):
    spec = manifests()["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == []
    (rule,) = spec["ingress"]
    assert rule["ports"] == [{"port": "http"}]
    assert rule["from"]
    assert "NetworkPolicy" not in manifests("--set=networkPolicy.enabled=false")


@pytest.mark.slow
def test_monitoring(production, manifests):
    (dashboards,) = (made for made in production["ConfigMap"] if made["metadata"]["name"].endswith("dashboards"))
    assert dashboards["data"] == {path.name: path.read_text() for path in DASHBOARDS}
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    made = [rule["spec"]["groups"] for rule in production["PrometheusRule"]]
    assert sorted(made, key=str) == sorted((yaml.safe_load(path.read_text())["groups"] for path in RULES), key=str)
    assert not {"ServiceMonitor", "PrometheusRule", "ScaledObject"} & manifests().keys(), "these need other software"


# -- the query that scales ------------------------------------------------------------------------------

PODS = 'namespace="reasoning",service="one-slr",job="slr"'
SCALING = {
    "two pods": ({"a": (1, "3", "5"), "b": (1, "0", "4")}, 12),
    "idle": ({"a": (1, "0", "0")}, 0),
    "one of two pods lost": ({"a": (1, "3", "5"), "b": (0, None, None)}, 8 + 22),
    "no pod can be read": ({"a": (0, None, None)}, None),
    "no target": ({}, None),
}


@pytest.mark.slow
def test_scaling_query(production, tmp_path):
    """One number in Prometheus' own engine: lost pods are not taken for less load, and lost data is no number."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    (trigger,) = production["ScaledObject"]["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    other = 'namespace="other",service="one-slr"'
    tests = []
    for name, (pods, expected) in SCALING.items():
        series = [{"series": f'slr_slots_in_use{{{other},pod="x"}}', "values": "100x5"}]
        for pod, (up, queued, running) in pods.items():
            found = {"up": str(up), "slr_requests_queued": queued, "slr_slots_in_use": running}
            series += [
                {"series": f'{metric}{{{PODS},pod="{pod}"}}', "values": f"{value}x5"}
                for metric, value in found.items()
                if value is not None
            ]
        samples = [] if expected is None else [{"labels": "{}", "value": expected}]
        check = {"expr": query, "eval_time": "3m", "exp_samples": samples}
        tests.append({"name": name, "interval": "1m", "input_series": series, "promql_expr_test": [check]})
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": tests}))
    run = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert trigger["metadata"]["ignoreNullValues"] == "false", "no number is then a failure"
    assert production["ScaledObject"]["spec"]["fallback"] == {
        "failureThreshold": 3,
        "replicas": 3,
        "behavior": "currentReplicasIfHigher",
    }
    metrics = set(re.findall(r"\bslr_\w+", query))
    assert metrics == {"slr_requests_queued", "slr_slots_in_use"}


# -- KubeRay -----------------------------------------------------------------------------------------------


def test_ray_service():
    """The example deploys what deploy/ray/serve.yaml does, and its pods are hardened."""
    service = yaml.safe_load((ROOT / "deploy/kubernetes/rayservice.yaml").read_text())["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    (alone,) = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())["applications"]
    for name in ("name", "route_prefix", "import_path", "args"):
        assert application[name] == alone[name]
    (made,), (written,) = application["deployments"], alone["deployments"]
    for name in made.keys() - {"autoscaling_config"}:
        assert made[name] == written[name], name
    assert made["autoscaling_config"]["policy"] == written["autoscaling_config"]["policy"]
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert re.fullmatch(r"slr-ray@sha256:[0-9a-f]{64}", container["image"])
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        (variable,) = container["env"]
        assert f"{variable['name']}={variable['value']}" in (ROOT / "Makefile").read_text()
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > made["graceful_shutdown_timeout_s"]
    assert f"ray[data,serve]>={cluster['rayVersion'].rsplit('.', 1)[0]}" in (ROOT / "pyproject.toml").read_text()
