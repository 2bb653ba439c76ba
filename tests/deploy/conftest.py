"""The Helm chart, rendered."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.deploy.monitoring import ROOT

CHART = ROOT / "deploy/kubernetes/slr"
DIGEST = f"sha256:{64 * '0'}"


@pytest.fixture(scope="session")
def helm():
    """Runs Helm and gives what it prints."""
    binary = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    if binary is None:
        pytest.skip("helm is not installed (python -m deploy.kubernetes.install_helm .venv/bin)")

    def run(command, *options, name=(), digest=DIGEST, code=0):
        words = [binary, command, *name, str(CHART), f"--set=image.digest={digest}", *options]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == bool(code), done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run


@pytest.fixture(scope="session")
def manifests(helm):
    """The manifests of a release, by kind; of several of a kind, a list."""

    def render(*options):
        found = {}
        for manifest in yaml.safe_load_all(
            helm("template", "--namespace=reasoning", *options, name=["one", "--kube-version=1.33.0"])
        ):
            found.setdefault(manifest["kind"], []).append(manifest)
        return {kind: made[0] if len(made) == 1 else made for kind, made in found.items()}

    return render


@pytest.fixture(scope="session")
def production(manifests):
    return manifests(f"--values={CHART / 'values-production.yaml'}")
