"""Alerts and dashboards: right by Prometheus' own tool, about numbers that a running deployment really serves."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.deploy.observed import Observed
from tests.deploy.rendering import KUSTOMIZE, ROOT, run

MONITORING = KUSTOMIZE / "components/monitoring"
_METRIC = re.compile(r"\btreadle_[a-z0-9_]+")
# Served only once something of the kind has happened.
RARE = {
    "treadle_quota_refusals_total",
    "treadle_trainer_fan_out_bytes_total",
    "treadle_trainer_guest_chunks_total",
    "treadle_trainer_lent_chunks_total",
    "treadle_trainer_moves_total",
    "treadle_trainer_runs_left_total",
    "treadle_trainer_snapshots_total",
}

_spec = importlib.util.spec_from_file_location("dashboards", ROOT / "deploy/dashboards.py")
assert _spec is not None
assert _spec.loader is not None
dashboards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(dashboards)


def promtool() -> str:
    """Returns Prometheus' tool; without it the test fails and says so."""
    found = shutil.which("promtool")
    assert found is not None, "install promtool: apt-get install --no-install-recommends prometheus"
    return found


def rules() -> dict:
    """Returns the rule file inside the manifest."""
    return yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]


def scalers() -> list[str]:
    """Returns the queries by which KEDA scales."""
    files = (KUSTOMIZE / f"components/keda/{role}.yaml" for role in ("trainer", "sampler"))
    triggers = [trigger for file in files for trigger in yaml.safe_load(file.read_text())["spec"]["triggers"]]
    return [trigger["metadata"]["query"] for trigger in triggers]


def check_promql(name: str, queries: list[str], folder: Path) -> None:
    """Has Prometheus read queries as the expressions of rules."""
    group = {"name": name, "rules": [{"record": f"q:{i}", "expr": query} for i, query in enumerate(queries)]}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    run(promtool(), "check", "rules", str(folder / "rules.yaml"))


def queries_of(name: str) -> list[str]:
    """Returns the queries of a dashboard."""
    dashboard = json.loads((MONITORING / f"dashboards/{name}.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_alerts_say_what_they_should(tmp_path: Path) -> None:
    """The rules parse, fire when they should, and stay silent when they should."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    shutil.copy(Path(__file__).with_name("alert_cases.yaml"), tmp_path)
    run(promtool(), "check", "rules", str(tmp_path / "rules.yaml"))
    run(promtool(), "test", "rules", str(tmp_path / "alert_cases.yaml"))


def test_every_alert_says_what_to_do() -> None:
    """Who is woken at night reads one sentence of what and one of what now."""
    for rule in rules()["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_dashboards_are_what_the_script_writes(name: str) -> None:
    """Run `python deploy/dashboards.py` after changing a panel."""
    assert (MONITORING / f"dashboards/{name}.json").read_text() == dashboards.render(name)
    listed = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    assert f"dashboards/{name}.json" in listed


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_every_query_is_promql(name: str, tmp_path: Path) -> None:
    """Read by Prometheus as the expression of a rule."""
    check_promql(name, [query.replace("$__rate_interval", "5m") for query in queries_of(name)], tmp_path)


def test_what_scales_workers_is_promql_also_by_base(tmp_path: Path) -> None:
    """The queries, and the one for several bases that stands at the head of the trainers' file."""
    (by_base,) = re.findall(r"^# (sum\(.*\))$", (KUSTOMIZE / "components/keda/trainer.yaml").read_text(), re.MULTILINE)
    check_promql("scalers", [*scalers(), by_base], tmp_path)


@pytest.mark.timeout(300)
def test_what_is_asked_for_is_served_and_what_is_served_is_shown(observed: Observed) -> None:
    """Both ways: no dead panel or alert, and no number that nobody sees."""
    served = {name for name in observed.names() if name.startswith("treadle_") and not name.endswith("_created")} | RARE
    panels = {
        metric for name in dashboards.DASHBOARDS for query in queries_of(name) for metric in _METRIC.findall(query)
    }
    alerts = {metric for rule in rules()["groups"][0]["rules"] for metric in _METRIC.findall(rule["expr"])}
    scaling = {metric for query in scalers() for metric in _METRIC.findall(query)}
    assert not (panels | alerts | scaling) - served
    shown = {_family(metric) for metric in panels | alerts}
    assert not {_family(metric) for metric in served} - shown


def _family(metric: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", metric)
