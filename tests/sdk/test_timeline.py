"""The timeline over the SDK and the command line: passes and decode steps with those who shared them."""

import json
import threading
import time
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from treadle.cli.workers import worker
from treadle.records import Span, WorkerTimeline
from treadle.timeline import chrome_trace

BASE = "treadle/pip"


def work(service: ServiceClient, steps: int = 8) -> str:
    """Trains a little and samples once; returns the tenant."""
    client = service.create_lora_training_client(BASE, rank=4)
    tokens = np.tile([1, 5, 9, 5], 10)
    data = [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(39)})]
    for _ in range(steps):
        client.forward_backward(data, "cross_entropy")
        last = client.optim_step(AdamParams(learning_rate=1e-3))
    last.result(120)
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(ModelInput.from_ints(tokens[:9]), 2, SamplingParams(max_tokens=8)).result(120)
    return client.run.split("/")[1]


def spans(timelines: list[WorkerTimeline], kind: str) -> list[Span]:
    return [span for timeline in timelines if timeline.kind == kind for span in timeline.spans]


def spans_with(service: ServiceClient, *tenants: str) -> list[WorkerTimeline]:
    """Returns the timeline once every worker shows all of them: a gateway asks the workers every half second."""
    deadline = time.monotonic() + 60
    while True:
        timelines = service.list_spans()
        seen = [{share.tenant for span in timeline.spans for share in span.shares} for timeline in timelines]
        if all(set(tenants) <= lane for lane in seen):
            return timelines
        assert time.monotonic() < deadline, f"{tenants} are not in {seen}"
        time.sleep(0.1)


def test_who_shared_a_pass_is_seen_by_administrators_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Everybody sees when workers were busy; a tenant its own part by name, the others as one."""
    tenants: dict[str, str] = {}
    both_are_there = threading.Barrier(2)

    def run(key: str) -> None:
        with ServiceClient(cluster.gateway_address, key) as service:
            work(service, steps=1)
            both_are_there.wait(120)
            tenants[key] = work(service, steps=40)

    keys = [cluster.new_tenant(), cluster.new_tenant()]
    threads = [threading.Thread(target=run, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own, other = (tenants[key] for key in keys)
    with (
        ServiceClient(cluster.gateway_address, keys[0]) as mine,
        ServiceClient(cluster.gateway_address, cluster.admin_key) as admin,
    ):
        all_of_it, seen = spans_with(admin, own, other), mine.list_spans()
        last = spans(all_of_it, "trainer")[-1].started
        assert spans(admin.list_spans(after=last), "trainer") == []
    for kind in ("trainer", "sampler"):
        companies = [{share.tenant for share in span.shares} for span in spans(all_of_it, kind)]
        assert {own, other} <= set().union(*companies)
        assert {share.tenant for span in spans(seen, kind) for share in span.shares} <= {own, ""}
    assert any({own, other} <= {share.tenant for share in span.shares} for span in spans(all_of_it, "trainer"))
    shared = [span for span in spans(seen, "trainer") if {share.tenant for share in span.shares} == {own, ""}]
    assert shared
    assert all(share.run.startswith(f"tenants/{own}/") or share.run == "" for span in shared for share in span.shares)
    # The same from the command line, as a trace.
    file = tmp_path / "trace.json"
    arguments = ["trace", "--address", cluster.gateway_address, "--key", keys[0], "-o", str(file)]
    done = CliRunner().invoke(worker, arguments)
    assert done.exit_code == 0, done.output
    trace = json.loads(file.read_text())
    assert other not in file.read_text()
    tracks = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {"every pass", "every decode", own, "other"} <= tracks
    recent = CliRunner().invoke(worker, [*arguments[:-2], "--seconds", "0.1"])
    assert len(json.loads(recent.stdout)["traceEvents"]) < len(trace["traceEvents"])


def test_a_trace_has_each_pass_once_and_in_each_sharers_track(cluster: Cluster) -> None:
    """Durations in microseconds, complete events, processes with the workers' names."""
    with ServiceClient(cluster.gateway_address, cluster.new_tenant()) as service:
        tenant = work(service, steps=2)
        timelines = spans_with(service, tenant)
    events = chrome_trace(timelines)["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert set(names.values()) == {"trainer-0 (treadle/pip)", "sampler-0 (treadle/pip)"}
    tracks = {(event["pid"], event["args"]["name"]): event["tid"] for event in events if event["name"] == "thread_name"}
    for process, timeline in enumerate(timelines, 1):
        drawn = [event for event in events if event["ph"] == "X" and event["pid"] == process]
        assert sum(event["tid"] == 0 for event in drawn) == len(timeline.spans)
        mine = [span for span in timeline.spans if any(share.tenant == tenant for share in span.shares)]
        assert mine
        assert sum(event["tid"] == tracks[process, tenant] for event in drawn) == len(mine)
        whole = {event["ts"]: event["dur"] for event in drawn}
        assert all(abs(whole[round(span.started * 1e6, 3)] - span.took * 1e6) < 1 for span in mine)
