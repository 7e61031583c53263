"""Writes the Grafana dashboards. `python deploy/dashboards.py` writes; a test compares the files with `render`.

A panel is a title, its queries with their legends, and a unit; where it stands follows from its place in the list.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "kustomize/components/monitoring/dashboards"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """One picture: queries as (PromQL, legend), and the unit of their values."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    help: str = ""


def _rate(metric: str, by: str = "pod") -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def _quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    extra = f", {by}" if by else ""
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (
            f"histogram_quantile({q}, sum by (le{extra}) (rate({metric}_bucket[$__rate_interval])))",
            f"p{q * 100:g}{legend}",
        )
        for q in (0.5, 0.99)
    )


OVERVIEW = (
    Panel(
        "Idle share of trainers",
        (("1 - sum by (pod) (rate(treadle_trainer_busy_seconds_total[$__rate_interval]))", "{{pod}}"),),
        "percentunit",
        "Time without a pass or a step. What sharing a base is for is a small number here.",
    ),
    Panel("Trained positions per second", ((_rate("treadle_trainer_tokens_total"), "{{pod}}"),)),
    Panel("Sampled tokens per second", ((_rate("treadle_sampler_tokens_total"), "{{pod}}"),)),
    Panel(
        "Runs",
        (
            ("treadle_store_runs", "all"),
            ("treadle_store_leases", "worked on"),
            ("treadle_store_unleased_runs", "waiting for a trainer"),
            ("treadle_store_diverged_runs", "diverged"),
        ),
    ),
    Panel(
        "Operations that wait or run",
        (
            ("sum by (pod) (treadle_trainer_queued_operations)", "{{pod}}"),
            ("max(treadle_trainer_oldest_wait_seconds)", "oldest, s"),
        ),
    ),
    Panel(
        "Load of trainers",
        (("sum by (pod) (treadle_trainer_load)", "{{pod}}"),),
        "short",
        "Devices that the runs of each would keep busy. Runs move until these are even.",
    ),
    Panel("Live workers", (("sum by (kind, base) (treadle_store_workers)", "{{kind}} {{base}}"),)),
    Panel("Calls per second", ((_rate("treadle_rpc_duration_seconds_count", "method"), "{{method}}"),)),
    Panel("Errors per second", ((_rate("treadle_rpc_errors_total", "reason"), "{{reason}}"),)),
    Panel("Open streams", (("sum by (pod) (treadle_gateway_streams)", "{{pod}}"),)),
    Panel(
        "Bytes through gateways",
        (
            (_rate("treadle_gateway_request_bytes_total"), "in {{pod}}"),
            (_rate("treadle_gateway_response_bytes_total"), "out {{pod}}"),
        ),
        "Bps",
    ),
    Panel("Refused for a quota", ((_rate("treadle_quota_refusals_total", "kind"), "{{kind}}"),)),
    Panel("Releases", (("count by (role, version) (treadle_build_info)", "{{role}} {{version}}"),)),
)

TRAINING = (
    Panel(
        "Runs that share a pass",
        _quantiles("treadle_trainer_pass_runs"),
        "short",
        "More runs in a pass: the base's cost is shared by more.",
    ),
    Panel(
        "Passes per second",
        (
            (_rate("treadle_trainer_passes_total"), "{{pod}}"),
            (_rate("treadle_trainer_shared_passes_total"), "shared {{pod}}"),
        ),
    ),
    Panel("Seconds of a pass", _quantiles("treadle_trainer_pass_seconds"), "s"),
    Panel("Positions of a pass", _quantiles("treadle_trainer_pass_tokens")),
    Panel(
        "Pace",
        (("treadle_trainer_pace", "{{pod}}"),),
        "short",
        "How much longer passes take than their measured cost says.",
    ),
    Panel("From acceptance to start", _quantiles("treadle_trainer_queued_seconds", "kind"), "s"),
    Panel("From acceptance to result", _quantiles("treadle_trainer_operation_seconds", "kind"), "s"),
    Panel(
        "Operations per second",
        (("sum by (kind, reason) (rate(treadle_trainer_operations_total[$__rate_interval]))", "{{kind}} {{reason}}"),),
    ),
    Panel(
        "Runs by place",
        (("sum by (place) (treadle_trainer_runs)", "{{place}}"), ("sum(treadle_trainer_max_runs)", "most")),
    ),
    Panel("Memory of states", (("sum by (pod) (treadle_trainer_state_bytes)", "{{pod}}"),), "bytes"),
    Panel("Streams", (("sum by (pod) (treadle_trainer_streams)", "{{pod}}"),)),
    Panel("Journal write", _quantiles("treadle_trainer_journal_write_seconds"), "s"),
    Panel("Results withheld until durable", _quantiles("treadle_trainer_withheld_seconds"), "s"),
    Panel("Runs in a journal write", _quantiles("treadle_trainer_journal_write_runs")),
    Panel(
        "Results not durable yet",
        (
            ("sum by (pod) (treadle_trainer_unwritten_operations)", "{{pod}}"),
            (_rate("treadle_trainer_journal_failures_total"), "failed writes/s {{pod}}"),
        ),
    ),
    Panel(
        "Snapshots per second",
        (
            ("sum by (outcome) (rate(treadle_trainer_snapshots_total[$__rate_interval]))", "{{outcome}}"),
            (_rate("treadle_trainer_snapshot_bytes_total", "job"), "bytes/s"),
        ),
    ),
    Panel("Shortest lease left", (("min by (pod) (treadle_trainer_lease_seconds)", "{{pod}}"),), "s"),
    Panel(
        "Runs taken over and left",
        (
            (_rate("treadle_trainer_claims_total", "outcome"), "{{outcome}}"),
            (_rate("treadle_trainer_runs_left_total", "reason"), "left: {{reason}}"),
        ),
    ),
    Panel(
        "Runs moved by load",
        ((_rate("treadle_trainer_moves_total", "outcome"), "{{outcome}}"),),
        "short",
        "Offered to a trainer with less to do: moved, refused, unanswered, or failed after it was accepted.",
    ),
    Panel(
        "Chunks of large batches, lent and taken in",
        (
            (_rate("treadle_trainer_lent_chunks_total", "outcome"), "lent: {{outcome}}"),
            (_rate("treadle_trainer_guest_chunks_total", "outcome"), "taken in: {{outcome}}"),
        ),
        "short",
        "One user's batch over several trainers; what was lent and not computed was computed at home.",
    ),
    Panel(
        "Batches that others help with",
        (
            ("sum by (pod) (treadle_trainer_helped_batches)", "{{pod}}"),
            ("sum by (pod) (treadle_trainer_guests)", "helped here {{pod}}"),
            ("sum(treadle_trainer_unlike_trainers_total)", "trainers that compute otherwise"),
        ),
    ),
    Panel(
        "Bytes between trainers",
        ((_rate("treadle_trainer_fan_out_bytes_total", "what"), "{{what}}"),),
        "Bps",
        "Weights once for each step and helper, chunks there, gradients back.",
    ),
    Panel("Time of adding gradients", ((_rate("treadle_trainer_add_seconds_total"), "{{pod}}"),), "percentunit"),
    Panel(
        "Replayed and diverged",
        (
            (_rate("treadle_trainer_replayed_operations_total"), "replayed/s {{pod}}"),
            ("sum(treadle_trainer_divergences_total)", "diverged"),
        ),
    ),
    Panel("Base held", (("count by (base, worker) (treadle_trainer_info)", "{{worker}} {{base}}"),)),
)

_CACHED, _READ = (f"sum(rate(treadle_sampler_{what}_positions_total[$__rate_interval]))" for what in ("prefix", "read"))
_KNOWN = f"{_CACHED} / ({_CACHED} + {_READ})"

SAMPLING = (
    Panel(
        "Idle share of samplers",
        (("1 - sum by (pod) (rate(treadle_sampler_busy_seconds_total[$__rate_interval]))", "{{pod}}"),),
        "percentunit",
    ),
    Panel(
        "Sequences",
        (
            ("sum by (pod) (treadle_sampler_active_sequences)", "active {{pod}}"),
            ("sum by (pod) (treadle_sampler_waiting_sequences)", "waiting {{pod}}"),
        ),
    ),
    Panel("Requests", (("sum by (pod) (treadle_sampler_requests)", "{{pod}}"),)),
    Panel("Seconds of a step", _quantiles("treadle_sampler_step_seconds"), "s"),
    Panel("Sequences that share a step", _quantiles("treadle_sampler_step_sequences")),
    Panel("Steps per second", ((_rate("treadle_sampler_steps_total"), "{{pod}}"),)),
    Panel(
        "Keys and values held",
        (("treadle_sampler_cache_positions / treadle_sampler_max_cache_positions", "{{pod}}"),),
        "percentunit",
    ),
    Panel("Prompt positions known already", ((_KNOWN, "share"),), "percentunit"),
    Panel("Samples that gave up their place", ((_rate("treadle_sampler_preemptions_total"), "{{pod}}"),)),
    Panel("Revisions in memory", (("treadle_sampler_revisions", "{{pod}}"),)),
    Panel("Memory of revisions", (("treadle_sampler_revision_bytes", "{{pod}}"),), "bytes"),
    Panel("Revisions received", ((_rate("treadle_sampler_received_bytes_total"), "{{pod}}"),), "Bps"),
    Panel("Base held", (("count by (base, worker) (treadle_sampler_info)", "{{worker}} {{base}}"),)),
)

STORE = (
    Panel("Seconds of a commit", _quantiles("treadle_store_commit_seconds"), "s"),
    Panel("Writes that share a commit", _quantiles("treadle_store_commit_writes")),
    Panel("Waiting writes", (("treadle_store_waiting_writes", "{{pod}}"),)),
    Panel(
        "Journal", (("treadle_store_operations", "operations"), ("treadle_store_unfinished_operations", "unfinished"))
    ),
    Panel(
        "Bytes",
        (
            ("treadle_store_adapter_bytes", "adapters"),
            ("treadle_store_snapshot_bytes", "snapshots"),
            ("treadle_store_free_bytes", "free {{pod}}"),
        ),
        "bytes",
    ),
    Panel("Tenants and adapters", (("treadle_store_tenants", "tenants"), ("treadle_store_adapters", "adapters"))),
    Panel("Database trouble", ((_rate("treadle_store_database_troubles_total"), "{{pod}}"),)),
    Panel("Work in workers", (("sum by (kind, base) (treadle_store_worker_queue)", "{{kind}} {{base}}"),)),
    Panel(
        "Workers as gateways see them",
        (
            ("min by (kind, base) (treadle_gateway_workers)", "{{kind}} {{base}}"),
            ("sum(treadle_gateway_upstream_calls)", "calls to them"),
        ),
    ),
    Panel("Seconds of a call", _quantiles("treadle_rpc_duration_seconds", "method"), "s"),
    Panel("Calls being answered", (("sum by (method) (treadle_rpc_in_flight)", "{{method}}"),)),
    Panel("Ready", (("treadle_ready - treadle_draining", "{{pod}}"),)),
)

_SOURCE = {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}
DASHBOARDS = {"overview": OVERVIEW, "training": TRAINING, "sampling": SAMPLING, "store": STORE}


def render(name: str) -> str:
    """Returns a dashboard as Grafana reads it."""
    return json.dumps(
        {
            "uid": f"treadle-{name}",
            "title": f"Treadle: {name}",
            "tags": ["treadle"],
            "schemaVersion": 39,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "templating": {"list": [_SOURCE]},
            "panels": [_panel(number, panel) for number, panel in enumerate(DASHBOARDS[name])],
        },
        indent=1,
    ) + "\n"  # fmt: skip


def _panel(number: int, panel: Panel) -> dict[str, object]:
    row, column = divmod(number, COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + index), "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for known in DASHBOARDS:
        (FOLDER / f"{known}.json").write_text(render(known))
