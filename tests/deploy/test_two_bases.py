"""A deployment of two bases: two sets of workers that never take each other's pods."""

from collections.abc import Iterator

import yaml

from tests.deploy.rendering import KUSTOMIZE, Manifest, manifests, rendered, run, tool, workloads

OVERLAY = "two-bases"
SUFFIXES = ("", "-int8")


def labels_of(workload: Manifest) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def selectors() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields (kind, name, labels) of whatever selects pods of one workload."""
    for manifest in manifests(OVERLAY):
        selector = manifest.get("spec", {}).get("selector")
        if selector and manifest["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget", "Service"):
            yield manifest["kind"], manifest["metadata"]["name"], selector.get("matchLabels", selector)


def test_it_is_what_kubernetes_takes() -> None:
    """Against Kubernetes' own schemas, unknown fields refused."""
    run(tool("kubernetes-validate"), "--strict", "-k", "1.34.0", "-", stdin=rendered(KUSTOMIZE / "overlays" / OVERLAY))


def test_each_selector_finds_the_pods_of_one_workload() -> None:
    """Also those of disruption budgets and services: two sets of trainers are two."""
    pods = {manifest["metadata"]["name"]: labels_of(manifest) for _, manifest, _ in workloads(OVERLAY)}
    assert len(pods) == 6
    found = list(selectors())
    assert len(found) == 3 * len(pods)
    for kind, name, selector in found:
        assert (kind, name, [pod for pod, labels in pods.items() if matches(selector, labels)]) == (kind, name, [name])


def test_both_sets_of_a_role_are_alike_but_for_the_base() -> None:
    """Same pod, with its own settings, account and, for spreading, its own name."""
    deployed = {manifest["metadata"]["name"]: (manifest, pod) for _, manifest, pod in workloads(OVERLAY)}
    configs = {config["metadata"]["name"]: config["data"] for config in manifests(OVERLAY, "ConfigMap")}
    for role in ("trainer", "sampler"):
        plain, int8 = (deployed[f"treadle-{role}{suffix}"][1] for suffix in SUFFIXES)
        sources = [pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] for pod in (plain, int8)]
        settings = [{name.partition(f"{role.upper()}_")[2]: v for name, v in configs[s].items()} for s in sources]
        names = settings[0].keys() | settings[1].keys()
        assert {name for name in names if settings[0].get(name) != settings[1].get(name)} == {"QUANTIZE"}
        assert settings[1]["QUANTIZE"] == "int8"
        text = yaml.safe_dump(int8).replace(sources[1], sources[0]).replace(f"treadle-{role}-int8", f"treadle-{role}")
        assert yaml.safe_load(text) == plain


def test_what_chooses_pods_by_component_reaches_both_sets() -> None:
    """Network policies, monitors and scalers name components, and the second set has the label of the first."""
    for role in ("trainer", "sampler"):
        found = [labels_of(m)["app.kubernetes.io/component"] for name, m, _ in workloads(OVERLAY) if name == role]
        assert found == [role, role]
    for file in (KUSTOMIZE / "components/network-policy").glob("*.yaml"):
        assert "app.kubernetes.io/name" not in file.read_text()
