"""What a sampler tells Prometheus, read from it when it is scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle_service.metrics import Reading

if TYPE_CHECKING:
    from treadle_sampler.sampler import Sampler


def readings(sampler: Sampler, base: str, worker: str) -> tuple[Reading, ...]:
    """Returns what is read from a sampler of a base."""
    engine, cache, store = sampler.engine, sampler.cache, sampler.store
    info = {"base": base, "worker": worker}
    return (
        Reading("treadle_sampler_info", "Which base is held", lambda: [(info, 1.0)], labels=("base", "worker")),
        Reading("treadle_sampler_requests", "Requests that run or wait", lambda: engine.num_requests),
        Reading("treadle_sampler_active_sequences", "Sequences that have a place", lambda: engine.load.num_active),
        Reading("treadle_sampler_waiting_sequences", "Sequences that have none yet", lambda: engine.load.num_waiting),
        Reading("treadle_sampler_steps", "Decode steps", lambda: engine.load.num_steps, "counter"),
        Reading("treadle_sampler_tokens", "Tokens drawn", lambda: engine.load.num_tokens, "counter"),
        Reading("treadle_sampler_busy_seconds", "Time in decode steps", lambda: engine.trace.busy_seconds, "counter"),
        Reading("treadle_sampler_cache_positions", "Keys and values held", lambda: engine.load.cache.num_positions),
        Reading("treadle_sampler_max_cache_positions", "As many may be", lambda: engine.load.cache.max_positions),
        Reading(
            "treadle_sampler_read_positions", "Prompt positions read", lambda: engine.load.cache.num_read, "counter"
        ),
        Reading(
            "treadle_sampler_prefix_positions",
            "Prompt positions kept of earlier requests",
            lambda: engine.load.cache.num_cached,
            "counter",
        ),
        Reading(
            "treadle_sampler_preemptions",
            "Samples that gave up their place",
            lambda: engine.load.cache.num_preemptions,
            "counter",
        ),
        Reading("treadle_sampler_revisions", "Revisions in memory", lambda: len(cache.names)),
        Reading("treadle_sampler_revision_bytes", "Memory of all revisions", lambda: cache.num_bytes),
        Reading(
            "treadle_sampler_received_bytes",
            "Bytes of revisions that were sent here",
            lambda: store.num_received_bytes,
            "counter",
        ),
    )
