"""A deployment that is watched: its metrics are served, its traces go to a collector in the test."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import ROLES, Cluster, free_port

# What a user's program looks like that traces itself: OpenTelemetry is set up there, and the SDK finds it.
_PROGRAM = """
import sys
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
provider = TracerProvider(resource=Resource.create({"service.name": "loop"}))
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=sys.argv[2], insecure=True)))
trace.set_tracer_provider(provider)
import treadle
from treadle import types
datum = types.Datum(types.ModelInput.from_ints([5, 6, 7, 8]), {"target_tokens": [6, 7, 8, 9], "weights": [1.0] * 4})
service = treadle.ServiceClient(sys.argv[1])
training = service.create_lora_training_client("treadle/pip", rank=4, seed=0)
with trace.get_tracer("loop").start_as_current_span("step"):
    loss = training.forward_backward([datum], "cross_entropy")
    step = training.optim_step(treadle.AdamParams(learning_rate=1e-3))
    loss.result(), step.result()
sampler = training.save_weights_and_get_sampling_client()
params = treadle.SamplingParams(max_tokens=4, seed=1)
sampler.sample(types.ModelInput.from_ints([5, 6, 7]), 1, params).result()
print(training.run)
try:
    service.create_lora_training_client("no-such-base", rank=4)
except treadle.TreadleError:
    pass
else:
    raise SystemExit("a base that nobody serves was accepted")
service.close()
provider.shutdown()
"""


@dataclass(frozen=True, slots=True)
class SeenSpan:
    """A span as the collector got it; ids in hex, the parent's empty for a root."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, str | int | float]
    links: tuple[str, ...]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans over OTLP."""

    spans: list[SeenSpan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request, context):
        """Keeps what comes."""
        with self._lock:
            for resource in request.resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                for scope in resource.scope_spans:
                    self.spans.extend(_seen(service, span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, names: set[str], *, seconds: float = 60.0, **wanted: str) -> list[SeenSpan]:
        """Returns the spans with such fields once all these names are among them: services send them in batches."""
        deadline = time.monotonic() + seconds
        while True:
            found = [span for span in self.spans if all(getattr(span, key) == value for key, value in wanted.items())]
            missing = names - {span.name for span in found}
            if not missing:
                return found
            assert time.monotonic() < deadline, f"no span {missing} in {sorted(s.name for s in found)}"
            time.sleep(0.2)


def _seen(service, span):
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    links = tuple(link.trace_id.hex() for link in span.links)
    return SeenSpan(
        service, span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), values, links
    )


@dataclass
class Observed:
    """A running deployment, where its metrics are, and what its traces say; one loop has run on it."""

    cluster: Cluster
    collector: Collector
    collector_address: str
    metrics: dict[str, str]
    key: str
    run: str = ""

    def use(self) -> None:
        """Runs the user's program once."""
        environment = {**os.environ, "TREADLE_API_KEY": self.key}
        command = [sys.executable, "-c", _PROGRAM, self.cluster.gateway_address, self.collector_address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
        self.run = done.stdout.split()[-1]

    def scrape(self, role: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Returns what a role serves: (sample name, sorted labels) -> value."""
        with urllib.request.urlopen(f"http://{self.metrics[role]}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def names(self) -> set[str]:
        """Returns the names of all samples that the deployment serves."""
        return {name for role in ROLES for name, _ in self.scrape(role)}

    def log_lines(self, role: str) -> list[dict[str, object]]:
        """Returns what a role itself logs; libraries write their own lines between."""
        lines = (self.cluster.folder / f"{role}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@contextmanager
def observed_deployment(folder: Path) -> Iterator[Observed]:
    """Gives a watched deployment."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    metrics = {role: f"127.0.0.1:{free_port()}" for role in ROLES}
    settings = {}
    for role in ROLES:
        prefix = f"TREADLE_{role.upper()}_"
        settings |= {f"{prefix}METRICS_LISTEN": metrics[role], f"{prefix}TRACE_ENDPOINT": address}
        settings |= {f"{prefix}TRACE_RATIO": "1", f"{prefix}LOG_FORMAT": "json"}
    cluster = Cluster(folder, settings=settings)
    try:
        cluster.start()
        observed = Observed(cluster, collector, address, metrics, cluster.new_tenant())
        observed.use()
        yield observed
    finally:
        cluster.close()
        server.stop(0)
