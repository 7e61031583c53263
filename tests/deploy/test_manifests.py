"""The manifests as an operator applies them: valid, and what they promise of every pod.

No cluster is here: what is checked is what can be known from the text.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tests.deploy.rendering import (
    KUSTOMIZE,
    OVERLAYS,
    ROLES,
    ROOT,
    environment,
    manifests,
    rendered,
    run,
    tool,
    workloads,
)
from treadle_trainer.trainer import HAND_OVER_SECONDS

PORTS = {"gateway": 7600, "trainer": 7610, "sampler": 7620, "store": 7630}
# Kinds of other projects, whose schemas Kubernetes does not have.
OTHERS = {"ScaledObject", "PodMonitor", "PrometheusRule", "Certificate", "Issuer", "LeaderWorkerSet"}

_spec = importlib.util.spec_from_file_location("deploy_settings", ROOT / "deploy/settings.py")
assert _spec is not None
assert _spec.loader is not None
settings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(settings)

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_overlay
def test_an_overlay_is_what_kubernetes_takes(overlay: str) -> None:
    """Against Kubernetes' own schemas, unknown fields refused."""
    known = [manifest for manifest in manifests(overlay) if manifest["kind"] not in OTHERS]
    assert len(known) >= 20
    run(tool("kubernetes-validate"), "--strict", "-k", "1.34.0", "-", stdin=yaml.dump_all(known))


def test_every_component_is_in_an_overlay_or_stands_alone() -> None:
    """Nothing lies about unused."""
    used = {
        Path(component).name
        for overlay in OVERLAYS
        for component in yaml.safe_load((KUSTOMIZE / f"overlays/{overlay}/kustomization.yaml").read_text()).get(
            "components", []
        )
    }
    assert {folder.name for folder in (KUSTOMIZE / "components").iterdir()} == used | {"leaderworkerset"}


def test_yaml_and_dockerfile_are_clean() -> None:
    """The linters of their kinds."""
    run(tool("yamllint"), "--strict", "-c", "deploy/.yamllint.yaml", "deploy")
    run(tool("hadolint"), "-c", "deploy/.hadolint.yaml", "deploy/Dockerfile")


@every_overlay
def test_every_pod_is_confined(overlay: str) -> None:
    """No root, no privileges, no writing where it should not, no token of the cluster."""
    accounts = {account["metadata"]["name"]: account for account in manifests(overlay, "ServiceAccount")}
    for role, _, pod in workloads(overlay):
        assert pod["serviceAccountName"] == f"treadle-{role}"
        assert accounts[f"treadle-{role}"]["automountServiceAccountToken"] is False
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10_000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert writable <= {"/tmp", "/cache", "/data"}


@every_overlay
def test_every_pod_is_probed_by_the_names_of_the_health_service(overlay: str) -> None:
    """Start and readiness by `readiness`, life by `liveness`, where no TLS is in the way."""
    for role, _, pod in workloads(overlay):
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        values = environment(overlay, role)
        prefix = f"TREADLE_{role.upper()}_"
        assert ports["grpc"] == PORTS[role] == int(values[f"{prefix}LISTEN"].rpartition(":")[2])
        assert ports["health"] == int(values[f"{prefix}HEALTH_LISTEN"].rpartition(":")[2])
        assert ports["metrics"] == int(values[f"{prefix}METRICS_LISTEN"].rpartition(":")[2])
        for probe, service in (("startup", "readiness"), ("readiness", "readiness"), ("liveness", "liveness")):
            assert container[f"{probe}Probe"]["grpc"] == {"port": ports["health"], "service": service}
        if role in ("trainer", "sampler"):
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


@every_overlay
def test_every_pod_says_what_it_needs(overlay: str) -> None:
    """Memory is bounded where it was asked for; who feeds a device is not throttled."""
    for role, workload, pod in workloads(overlay):
        (container,) = pod["containers"]
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" in resources["requests"]
        assert "cpu" not in resources["limits"]
        if overlay != "cpu-dev" and role in ("trainer", "sampler"):
            assert resources["limits"]["nvidia.com/gpu"] == "1"
            assert environment(overlay, role)[f"TREADLE_{role.upper()}_DEVICE"] == "cuda"
        spread = {constraint["topologyKey"] for constraint in pod["topologySpreadConstraints"]}
        assert spread == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        for constraint in pod["topologySpreadConstraints"]:
            matched = constraint["labelSelector"]["matchLabels"].items()
            assert matched <= workload["spec"]["template"]["metadata"]["labels"].items()


@every_overlay
def test_every_pod_has_the_time_that_its_drain_takes(overlay: str) -> None:
    """The kubelet waits for the sleep, for hand-overs and for the grace of running calls."""
    for role, _, pod in workloads(overlay):
        (container,) = pod["containers"]
        needed = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed += float(environment(overlay, role)[f"TREADLE_{role.upper()}_DRAIN_GRACE_SECONDS"])
        if role == "trainer":
            needed += HAND_OVER_SECONDS
        assert pod["terminationGracePeriodSeconds"] > needed


@every_overlay
def test_trainers_keep_their_names(overlay: str) -> None:
    """A trainer's id is its pod's name, in a set whose pods come back under their names."""
    ((_, workload, _),) = (found for found in workloads(overlay) if found[0] == "trainer")
    assert workload["kind"] == "StatefulSet"
    assert workload["spec"]["podManagementPolicy"] == "Parallel"
    assert "metadata.name" in environment(overlay, "trainer")["TREADLE_TRAINER_WORKER"]
    headless = [s for s in manifests(overlay, "Service") if s["spec"].get("clusterIP") == "None"]
    assert workload["spec"]["serviceName"] in {service["metadata"]["name"] for service in headless}


@every_overlay
def test_disruptions_take_one_at_a_time(overlay: str) -> None:
    """Each workload has a budget that selects its pods and lets a node be drained."""
    budgets = {
        b["metadata"]["labels"]["app.kubernetes.io/component"]: b for b in manifests(overlay, "PodDisruptionBudget")
    }
    assert budgets.keys() == set(ROLES)
    for role, workload, _ in workloads(overlay):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert budgets[role]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert budgets[role]["spec"]["maxUnavailable"] in (1, "50%")


@every_overlay
def test_images_are_pinned(overlay: str) -> None:
    """One image per service, of a release."""
    for role, _, pod in workloads(overlay):
        (container,) = pod["containers"]
        name, _, tag = container["image"].partition(":")
        assert name == f"treadle/{role}"
        assert tag not in ("", "latest")


def _allowed(overlay: str) -> set[tuple[str, str, int]]:
    """Returns who may call whom at which port, by what both sides' policies let through."""
    ways: dict[str, set[tuple[str, str, int]]] = {"ingress": set(), "egress": set()}
    for policy in manifests(overlay, "NetworkPolicy"):
        here = policy["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component", "")
        for way, key in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(way, []):
                for peer in rule.get(key, [{}]):
                    there = peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component", "")
                    other = there or "anyone"
                    if "namespaceSelector" in peer:
                        other = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
                    for port in rule["ports"]:
                        arrow = (other, here, port["port"]) if way == "ingress" else (here, other, port["port"])
                        ways[way].add(arrow)
    inside = {arrow for arrow in ways["ingress"] if arrow[0] in ROLES}
    assert inside == {arrow for arrow in ways["egress"] if arrow[1] in ROLES}, "a call that only one side allows"
    return ways["ingress"] | ways["egress"]


@pytest.mark.parametrize("overlay", ["single-gpu", "production"])
def test_only_the_drawn_arrows_may_be_called(overlay: str) -> None:
    """Default deny; clients to gateways, gateways to workers and store, workers to the store, trainers to trainers."""
    denied = [p for p in manifests(overlay, "NetworkPolicy") if p["metadata"]["name"] == "treadle-default-deny"]
    assert denied[0]["spec"] == {
        "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "treadle"}},
        "policyTypes": ["Ingress", "Egress"],
    }
    for _, workload, _ in workloads(overlay):
        assert workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"] == "treadle"
    arrows = {
        ("anyone", "gateway", 7600),
        ("anyone", "gateway", 7680),
        ("gateway", "trainer", 7610),
        ("gateway", "sampler", 7620),
        ("gateway", "store", 7630),
        ("trainer", "store", 7630),
        ("trainer", "trainer", 7610),
        ("sampler", "store", 7630),
        ("", "kube-system", 53),
    }
    if overlay == "production":
        arrows |= {("store", "anyone", 5432), ("store", "anyone", 443)}
        arrows |= {("monitoring", "", 9090), ("", "monitoring", 4317)}
    assert _allowed(overlay) == arrows


@pytest.mark.parametrize("role", ROLES)
def test_every_setting_is_found_where_it_is_set(role: str) -> None:
    """Run `python deploy/settings.py` after adding a setting."""
    assert settings.file_of(role).read_text() == settings.render(role)


@every_overlay
def test_every_variable_is_a_setting_and_has_a_value_that_it_takes(overlay: str) -> None:
    """The settings classes themselves read what the manifests set."""
    for role in ROLES:
        values = environment(overlay, role)
        ours = {name: value for name, value in values.items() if name.startswith("TREADLE_")}
        unknown = ours.keys() - settings.variables_of(role).keys()
        assert not unknown
        prefix = f"TREADLE_{role.upper()}_"
        plain = {n.removeprefix(prefix).lower(): v for n, v in ours.items() if "{" not in v and "$(" not in v}
        if f"{prefix}DATABASE_URL" in ours:
            plain["database_url"] = "postgresql://treadle:of-the-secret@postgres/treadle"
        read = settings.settings_of(role).model_validate(plain)
        if read.service_ca is None:
            assert read.allow_plaintext
        for name in ("CERT", "KEY", "CA"):
            path = ours.get(f"{prefix}SERVICE_{name}", "")
            assert (path != "") == (overlay == "production")
    with pytest.raises(ValidationError):
        settings.settings_of("store").model_validate({"replicas": 2})


@every_overlay
def test_stores_know_how_many_they_are(overlay: str) -> None:
    """Several stores share a database only if each knows of the others."""
    ((_, workload, _),) = (found for found in workloads(overlay) if found[0] == "store")
    assert int(environment(overlay, "store").get("TREADLE_STORE_REPLICAS", "1")) == workload["spec"]["replicas"]


@pytest.mark.parametrize(("role", "replaced"), [("trainer", "StatefulSet"), ("sampler", "Deployment")])
def test_a_group_of_nodes_replaces_single_workers(role: str, replaced: str, tmp_path: Path) -> None:
    """The component for several nodes renders, and keeps what is promised of a worker's pod."""
    shutil.copytree(KUSTOMIZE, tmp_path / "kustomize")
    overlay = tmp_path / "kustomize/overlays/group"
    overlay.mkdir()
    parts = {"resources": ["../../base"], "components": ["../../components/leaderworkerset"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    group = [manifest for manifest in yaml.safe_load_all(rendered(overlay)) if role in manifest["metadata"]["name"]]
    assert {m["kind"] for m in group} >= {"LeaderWorkerSet", "ConfigMap", "Service", "PodDisruptionBudget"}
    assert replaced not in {m["kind"] for m in group}
    (config,) = (m["metadata"]["name"] for m in group if m["kind"] == "ConfigMap")
    base = yaml.safe_load((KUSTOMIZE / f"components/leaderworkerset/{role}.yaml").read_text())
    template = base["spec"]["leaderWorkerTemplate"]
    single = {role: pod for role, _, pod in workloads("cpu-dev")}[role]
    for name in ("leaderTemplate", "workerTemplate"):
        pod = template[name]["spec"]
        for key in ("serviceAccountName", "securityContext", "terminationGracePeriodSeconds", "enableServiceLinks"):
            assert pod[key] == single[key]
        (container,), (alone,) = pod["containers"], single["containers"]
        for key in ("securityContext", "env"):
            assert container[key] == alone[key]
        assert container["command"][0] == "torchrun"
        assert container["command"][-1] == f"treadle_{role}"
        patience = int(next(a.partition("=")[2] for a in container["command"] if a.startswith("--shutdown-timeout=")))
        assert patience < pod["terminationGracePeriodSeconds"]
        assert ("readinessProbe" in container) == (name == "leaderTemplate")
    assert template["leaderTemplate"]["spec"]["containers"][0]["command"] == container["command"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    # The names of generated settings have a hash; kustomize must find them in this kind too.
    (deployed,) = (m["spec"]["leaderWorkerTemplate"] for m in group if m["kind"] == "LeaderWorkerSet")
    for name in ("leaderTemplate", "workerTemplate"):
        (container,) = deployed[name]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": config}}]
    (policy,) = (m for m in group if m["kind"] == "NetworkPolicy")
    here = {"matchLabels": {"leaderworkerset.sigs.k8s.io/name": f"treadle-{role}"}}
    assert policy["spec"]["podSelector"] == here
    assert [rule["from"] for rule in policy["spec"]["ingress"]] == [[{"podSelector": here}]]


def test_base_is_what_all_overlays_start_from() -> None:
    """The base renders by itself."""
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(rendered(KUSTOMIZE / "base"))]
    assert sorted(kinds).count("StatefulSet") == sorted(kinds).count("Deployment") == 2
