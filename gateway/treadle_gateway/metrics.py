"""What a gateway tells Prometheus, read from it when it is scraped."""

from collections import Counter as Tally
from collections.abc import Iterable

from treadle_gateway.directory import Directory
from treadle_gateway.forward import Forwarder
from treadle_service.metrics import Labels, Reading


def readings(directory: Directory, forwarder: Forwarder) -> tuple[Reading, ...]:
    """Returns what is read from a gateway."""

    def workers() -> Iterable[tuple[Labels, float]]:
        tally = Tally((worker.kind, worker.base) for worker in directory.table.workers)
        return [({"kind": kind, "base": base}, float(number)) for (kind, base), number in tally.items()]

    return (
        Reading("treadle_gateway_streams", "Operation streams that are joined", lambda: forwarder.num_streams),
        Reading(
            "treadle_gateway_upstream_calls",
            "Calls to workers and store",
            forwarder.upstreams.in_flight.total,
        ),
        Reading("treadle_gateway_workers", "Workers that seem reachable", workers, labels=("kind", "base")),
        Reading(
            "treadle_gateway_request_bytes",
            "Bytes of streams to workers",
            lambda: forwarder.num_request_bytes,
            "counter",
        ),
        Reading(
            "treadle_gateway_response_bytes",
            "Bytes of streams to clients",
            lambda: forwarder.num_response_bytes,
            "counter",
        ),
    )
