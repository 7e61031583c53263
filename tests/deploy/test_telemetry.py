"""What a running deployment says of itself: metrics, traces and logs."""

import pytest
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from tests.deploy.observed import Observed
from tests.support.cluster import ROLES
from treadle.spans import span_id_of, trace_id_of
from treadle_service import request_ids
from treadle_service.tracing import Tracing


def _sum(samples: dict, name: str, **labels: str) -> float:
    return sum(v for (n, ls), v in samples.items() if n == name and labels.items() <= dict(ls).items())


@pytest.mark.timeout(300)
def test_every_service_says_what_it_is(observed: Observed) -> None:
    """Version and readiness of each."""
    for role in ROLES:
        samples = observed.scrape(role)
        assert _sum(samples, "treadle_build_info", role=role, version="0.1.0") == 1
        assert _sum(samples, "treadle_ready") == 1
        assert _sum(samples, "treadle_draining") == 0


def test_metrics_count_what_the_loop_did(observed: Observed) -> None:
    """One batch, one step, one publication, one sample."""
    trainer, sampler, store, gateway = (observed.scrape(role) for role in ("trainer", "sampler", "store", "gateway"))
    for kind in ("forward_backward", "optim_step", "save_weights_for_sampler"):
        assert _sum(trainer, "treadle_trainer_operations_total", kind=kind, reason="OK") == 1
    assert _sum(trainer, "treadle_trainer_tokens_total") == 4
    assert _sum(trainer, "treadle_trainer_passes_total") == _sum(trainer, "treadle_trainer_pass_seconds_count") == 1
    assert _sum(trainer, "treadle_trainer_busy_seconds_total") > 0
    assert _sum(trainer, "treadle_trainer_runs") == 1
    assert _sum(trainer, "treadle_trainer_queued_operations") == 0
    assert 0 < _sum(trainer, "treadle_trainer_lease_seconds") <= 10
    assert _sum(sampler, "treadle_sampler_tokens_total") >= 1
    assert _sum(sampler, "treadle_sampler_revisions") == 1
    assert _sum(sampler, "treadle_rpc_duration_seconds_count", method="SamplingService/Sample", code="OK") == 1
    assert _sum(store, "treadle_store_commit_seconds_count") > 0
    assert _sum(store, "treadle_store_workers", kind="trainer", base="treadle/pip") == 1
    assert _sum(gateway, "treadle_gateway_workers", kind="sampler", base="treadle/pip") == 1
    assert _sum(gateway, "treadle_gateway_request_bytes_total") > 0


def test_labels_are_bounded(observed: Observed) -> None:
    """No tenant, run or adapter is in a label, so their number is nobody's trouble."""
    tenant = observed.run.split("/")[1]
    for role in ROLES:
        for name, labels in observed.scrape(role):
            assert not any(tenant in value or observed.run in value for _, value in labels), (name, labels)


def test_one_operation_is_one_trace_through_all_services(observed: Observed) -> None:
    """The spans of client, gateway, trainer and store hang on one root, though no frame carries a trace id."""
    trace_id, root_id = f"{trace_id_of(observed.run, 1):032x}", f"{span_id_of(observed.run, 1):016x}"
    parts = {"client", "gateway", "queued", "pass", "durable", "append", "commit", "operation forward_backward"}
    spans = observed.collector.wait_for(parts, trace_id=trace_id)
    services = {span.name: span.service for span in spans}
    assert services["client"] == "loop"
    assert services["gateway"] == "treadle-gateway"
    assert services["append"] == services["commit"] == "treadle-store"
    assert services["pass"] == services["operation forward_backward"] == "treadle-trainer"
    for span in spans:
        assert span.attributes["run"] == observed.run
        assert span.attributes["seq"] == 1
        if span.name == "operation forward_backward":
            assert (span.span_id, span.parent_id) == (root_id, "")
        else:
            assert span.parent_id == root_id
    (client,) = (span for span in spans if span.name == "client")
    (own,) = (span for span in observed.collector.spans if span.name == "step")
    assert client.links == (own.trace_id,)


def test_a_sample_is_one_trace_of_gateway_and_sampler(observed: Observed) -> None:
    """Other calls carry their trace with them."""
    name = "treadle.v1.SamplingService/Sample"
    (outer,) = observed.collector.wait_for({name}, name=name, service="treadle-gateway")
    (inner,) = observed.collector.wait_for({name}, name=name, service="treadle-sampler")
    assert inner.trace_id == outer.trace_id
    assert inner.parent_id == outer.span_id


def test_logs_name_the_same_trace(observed: Observed) -> None:
    """A line of the trainer's log about an operation has its trace id; a call's lines have one request id."""
    lines = [line for line in observed.log_lines("trainer") if line.get("event") == "run_loaded"]
    assert lines[0]["run"] == observed.run
    assert len(str(lines[0]["request_id"])) == 32
    assert lines[0]["method"] == "TrainingService/StreamOperations"
    assert len(str(lines[0]["trace_id"])) == 32


def test_all_services_keep_the_same_traces() -> None:
    """Whether an operation is traced follows from its name and the ratio alone, as the SDK's sampler has it."""
    tracing = Tracing()
    tracing.start("trainer", "", 0.25, exporter=_Nowhere())
    try:
        kept = [seq for seq in range(1, 2001) if tracing.keeps("tenants/a/runs/b", seq)]
        bound = TraceIdRatioBased.get_bound_for_rate(0.25)
        assert kept == [s for s in range(1, 2001) if trace_id_of("tenants/a/runs/b", s) % 2**64 < bound]
        assert 400 < len(kept) < 600
    finally:
        tracing.stop()
    assert not tracing.keeps("tenants/a/runs/b", kept[0])


class _Nowhere:
    def export(self, spans: object) -> None: ...

    def shutdown(self) -> None: ...


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, b"abc", "line\nbreak"])
def test_an_id_that_is_none_is_not_taken_over(given: str | bytes) -> None:
    """What a caller sends goes into a log line only if it is an id."""
    request_ids.begin(given, "/treadle.v1.SamplingService/Sample")
    assert len(request_ids.current()) == 32
    request_ids.begin("req-1", "/treadle.v1.SamplingService/Sample")
    assert request_ids.current() == "req-1"
