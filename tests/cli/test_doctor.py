"""What `treadle doctor` says of deployments that are well, ill, and not there."""

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.cluster import Cluster
from treadle import doctor as checks
from treadle.cli.doctor import doctor
from treadle.v1 import admin_pb2, training_pb2

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def findings(cluster: Cluster, key: str, *options: str) -> tuple[int, dict[str, list[str]]]:
    """Returns the exit code and the severities by check."""
    place = ["--address", cluster.gateway_address, "--key", key, "--store-dir", str(cluster.folder)]
    done = CliRunner().invoke(doctor, [*place, "-f", "json", *options])
    by_check: dict[str, list[str]] = {}
    for row in json.loads(done.stdout):
        by_check.setdefault(row["check"], []).append(row[""])
    return done.exit_code, by_check


def test_a_deployment_that_is_well(cluster: Cluster) -> None:
    """Everything is looked at; plaintext on this machine is all that is remarked."""
    code, found = findings(cluster, cluster.admin_key)
    assert code == 0
    assert found == {
        "TLS": ["warning"],
        **{name: ["ok"] for name in ("connection", "versions", "quota", "workers", "clock", "runs", "disk", "store")},
    }


def test_a_key_without_the_scope_sees_less(cluster: Cluster) -> None:
    """It is told which key would see more."""
    code, found = findings(cluster, cluster.new_tenant(["sample"]))
    assert code == 0
    assert found["workers"] == found["runs"] == ["warning"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "https://127.0.0.1:1"])
def test_a_deployment_that_is_not_there(address: str, tmp_path: Path) -> None:
    """One line and exit code 1."""
    done = CliRunner().invoke(doctor, ["--address", address, "--key", "k", "--store-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "is the gateway running there" in done.output


def test_a_store_that_lost_a_blob(tmp_path: Path, own_cluster: Cluster) -> None:
    """The quick check of its data finds it."""
    own_cluster.launch("store")
    own_cluster.wait_ready(["store"])
    own_cluster.stop("store")
    with sqlite3.connect(own_cluster.folder / "store.db") as rows:
        rows.execute(
            "INSERT INTO runs (tenant, run, base, lora, metadata, request_sha256, from_adapter, state, last_seq, "
            "last_done_seq, acked_seq, created_us) VALUES ('admin','r','treadle/pip',x'','{}','', '', 1, 1, 1, 1, 1)"
        )
        rows.execute("INSERT INTO snapshots VALUES ('admin', 'r', 1, 1, ?, 10, x'00')", ("ab" * 32,))
    command = ["--address", "127.0.0.1:1", "--key", "k", "--store-dir", str(own_cluster.folder), "-f", "json"]
    rows = json.loads(CliRunner().invoke(doctor, command).stdout)
    (store,) = (row for row in rows if row["check"] == "store")
    assert store[""] == "error"


def test_certificates_clocks_releases_and_disks() -> None:
    """Each from the facts alone."""
    assert checks.check_certificate(NOW + timedelta(days=90), NOW).severity == "ok"
    assert checks.check_certificate(NOW + timedelta(days=3), NOW).severity == "warning"
    assert checks.check_certificate(NOW - timedelta(days=1), NOW).severity == "error"
    assert checks.check_clock(NOW - timedelta(seconds=3), NOW).severity == "ok"
    assert checks.check_clock(NOW + timedelta(seconds=60), NOW).severity == "warning"
    assert checks.check_versions("0.1.0", "0.1.7").severity == "ok"
    assert checks.check_versions("0.1.0", "0.2.0").severity == "warning"
    assert checks.check_disk(checks.Disk("/data", 2**40, 2**41)).severity == "ok"
    assert checks.check_disk(checks.Disk("/data", 2**20, 2**41)).severity == "error"


def test_workers_runs_and_quotas() -> None:
    """Bases without workers, runs without trainers, limits nearly reached."""
    base = admin_pb2.BaseModel(name="a", trainable=True)
    worker = admin_pb2.Worker(worker="trainer-0", base="a", queue_depth=100, draining=True)
    seen = [finding.seen for finding in checks.check_workers([worker], [base]) if finding.severity == "warning"]
    assert len(seen) == 3
    assert [f.severity for f in checks.check_workers([], [])] == ["error"]
    stuck = training_pb2.Run(name="tenants/a/runs/b", next_seq=5, last_done_seq=2)
    ill = training_pb2.Run(name="tenants/a/runs/c", state=training_pb2.RUN_STATE_DIVERGED)
    assert [f.severity for f in checks.check_runs([stuck, ill])] == ["warning", "error", "ok"]
    quota = admin_pb2.Quota(max_runs=10)
    assert [f.severity for f in checks.check_quota(quota, admin_pb2.GetUsageResponse(num_runs=9))] == ["warning", "ok"]
