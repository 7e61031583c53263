"""Spans of workers' timelines as pure values: from passes and decode steps, and as a caller may see them.

Decode steps are shorter than a line on a screen is wide: those that follow each other in the same company become one
span. Knows no gRPC calls and no clock.
"""

from collections.abc import Iterable
from typing import Final

from treadle.internal.v1 import sampler_pb2, trainer_pb2
from treadle.names import parse_run
from treadle.v1 import timeline_pb2
from treadle_service.principal import Principal

# Steps that follow each other within this time are shown as one, up to this length.
JOIN_SECONDS: Final = 0.02
LONGEST_SECONDS: Final = 0.5
_NS: Final = 1_000_000_000


def span_of_pass(found: trainer_pb2.Pass) -> timeline_pb2.Span:
    """Returns a pass as a span, a share for each run."""
    shares = [
        timeline_pb2.SpanShare(tenant=parse_run(share.run).tenant, run=share.run, num_tokens=share.num_tokens)
        for share in found.shares
    ]
    return timeline_pb2.Span(
        started=found.started,
        took=found.took,
        shares=shares,
        num_steps_beside=found.num_steps_beside,
        num_tokens=sum(share.num_tokens for share in shares),
    )


def joined_steps(steps: Iterable[sampler_pb2.DecodeStep]) -> list[timeline_pb2.Span]:
    """Returns decode steps as spans; those that follow each other in the same company are one."""
    spans: list[timeline_pb2.Span] = []
    for step in steps:
        if not spans or not _continues(spans[-1], step):
            spans.append(timeline_pb2.Span(started=step.started, shares=_shares_of(step)))
        span = spans[-1]
        ended = step.started.ToNanoseconds() + step.took.ToNanoseconds()
        span.took.FromNanoseconds(ended - span.started.ToNanoseconds())
        span.num_decode_steps += 1
        span.num_tokens += step.num_tokens
        for share in span.shares:
            share.num_sequences = max(share.num_sequences, step.sequences_by_tenant[share.tenant])
    return spans


def as_seen_by(span: timeline_pb2.Span, principal: Principal) -> timeline_pb2.Span:
    """Returns a span as a caller may see it: the shares of other tenants are one without a name."""
    if "admin" in principal.scopes:
        return span
    seen = timeline_pb2.Span()
    seen.CopyFrom(span)
    del seen.shares[:]
    others = timeline_pb2.SpanShare()
    is_shared = False
    for share in span.shares:
        if share.tenant == principal.tenant:
            seen.shares.append(share)
        else:
            is_shared = True
            others.num_tokens += share.num_tokens
            others.num_sequences += share.num_sequences
    if is_shared:
        seen.shares.append(others)
    return seen


def _shares_of(step: sampler_pb2.DecodeStep) -> list[timeline_pb2.SpanShare]:
    return [timeline_pb2.SpanShare(tenant=tenant) for tenant in sorted(step.sequences_by_tenant)]


def _continues(span: timeline_pb2.Span, step: sampler_pb2.DecodeStep) -> bool:
    started = span.started.ToNanoseconds()
    gap = step.started.ToNanoseconds() - started - span.took.ToNanoseconds()
    length = span.took.ToNanoseconds() + gap + step.took.ToNanoseconds()
    company = {share.tenant for share in span.shares}
    return gap <= JOIN_SECONDS * _NS and length <= LONGEST_SECONDS * _NS and company == set(step.sequences_by_tenant)
