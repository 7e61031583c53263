"""Kustomizations as kubectl renders them, and the few ways in which tests look at the result."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZE = ROOT / "deploy/kustomize"
OVERLAYS = ("cpu-dev", "single-gpu", "production")
ROLES = ("gateway", "trainer", "sampler", "store")
Manifest = dict[str, Any]  # What Kubernetes takes: nested maps of anything.


def tool(name: str) -> str:
    """Returns a program of this environment."""
    return str(Path(sys.executable).with_name(name))


def run(*command: str, stdin: str = "") -> str:
    """Returns what a program prints; its complaint fails the test."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def rendered(folder: Path) -> str:
    """Returns a kustomization as it would be applied."""
    return run(tool("kubectl"), "kustomize", str(folder))


def manifests(overlay: str, kind: str = "") -> list[Manifest]:
    """Returns what an overlay deploys, all or of one kind."""
    found = [m for m in yaml.safe_load_all(rendered(KUSTOMIZE / "overlays" / overlay)) if m]
    return [manifest for manifest in found if not kind or manifest["kind"] == kind]


def workloads(overlay: str) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Yields (role, workload, its pod's spec)."""
    for kind in ("Deployment", "StatefulSet"):
        for manifest in manifests(overlay, kind):
            role = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
            yield role, manifest, manifest["spec"]["template"]["spec"]


def environment(overlay: str, role: str) -> dict[str, str]:
    """Returns the variables that a role's container gets; of secrets and fields, where they come from."""
    (pod,) = (pod for name, _, pod in workloads(overlay) if name == role)
    (container,) = pod["containers"]
    values: dict[str, str] = {}
    for source in container["envFrom"]:
        name = source["configMapRef"]["name"]
        (config,) = (c for c in manifests(overlay, "ConfigMap") if c["metadata"]["name"] == name)
        values |= config["data"]
    for variable in container["env"]:
        values[variable["name"]] = variable.get("value", str(variable.get("valueFrom")))
    return values
