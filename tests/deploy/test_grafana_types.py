"""Check the dashboards against the types that Grafana publishes, with the TypeScript compiler."""

import json
import re
import shutil
import subprocess

import pytest

from tests.deploy.monitoring import ROOT, dashboards, panels

pytestmark = pytest.mark.slow

RAW = "./node_modules/@grafana/schema/dist/esm/raw"
IMPORTS = f"""
import type {{ Dashboard }} from '{RAW}/dashboard/x/dashboard_types.gen';
import type * as timeseries from '{RAW}/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type * as heatmap from '{RAW}/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '{RAW}/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
// JSON holds the value of an enumeration, which TypeScript does not accept for the enumeration.
type Plain<T> = T extends string ? `${{T}}` : T extends object ? {{ [K in keyof T]: Plain<T[K]> }} : T;
"""
OPTIONS = {
    "compilerOptions": {
        **{"module": "preserve", "moduleResolution": "bundler", "types": []},
        **{"strict": True, "skipLibCheck": True, "noEmit": True},
    },
    "include": ["*.ts"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with Grafana's types, of the version in compose.yaml, and the compiler."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (version,) = re.findall(r"grafana/grafana:([\d.]+)", (ROOT / "docker/compose.yaml").read_text())
    made = tmp_path_factory.mktemp("types")
    packages = [f"@grafana/schema@{version}", "typescript@5"]
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
    if subprocess.run(command, cwd=made, capture_output=True, check=False).returncode:
        pytest.skip("npm cannot install @grafana/schema")
    (made / "tsconfig.json").write_text(json.dumps(OPTIONS))
    return made


def compile_types(folder, **sources):
    for old in folder.glob("*.ts"):
        old.unlink()
    for name, lines in sources.items():
        (folder / f"{name}.ts").write_text(IMPORTS + "\n".join(lines))
    run = subprocess.run(["node_modules/.bin/tsc", "-p", "."], cwd=folder, capture_output=True, text=True, check=False)
    return run.stdout


def lines_of(dashboard):
    yield f"export const dashboard: Dashboard = {json.dumps(dashboard)};"
    for place, panel in enumerate(panels(dashboard)):
        kind = f"Plain<{panel['type']}.Options>"
        yield f"export const options{place}: {kind} = {json.dumps(panel['options'])};"
        if panel["type"] == "timeseries":
            custom = json.dumps(panel["fieldConfig"]["defaults"]["custom"])
            yield f"export const custom{place}: Plain<timeseries.FieldConfig> = {custom};"


def test_dashboard_types(folder):
    found = compile_types(folder, **{name.replace("-", "_"): lines_of(made) for name, made in dashboards().items()})
    assert found == ""


def test_compiler_finds_faults(folder):
    made = dashboards()["slr-overview"]
    made["refresh"] = 5
    panels(made)[0]["options"]["graphMode"] = "volume"
    found = compile_types(folder, broken=lines_of(made))
    assert len(found.splitlines()) == 2, found
