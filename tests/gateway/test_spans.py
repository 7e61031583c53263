"""Spans of timelines: what is joined, what a tenant may see."""

from treadle.internal.v1 import sampler_pb2, trainer_pb2
from treadle.v1 import timeline_pb2
from treadle_gateway.spans import as_seen_by, joined_steps, span_of_pass
from treadle_gateway.timeline import Lane
from treadle_service.principal import Principal


def at(message, started: float, took: float):
    message.started.FromNanoseconds(round(started * 1e9))
    message.took.FromNanoseconds(round(took * 1e9))
    return message


def step(started: float, took: float = 0.01, **sequences: int) -> sampler_pb2.DecodeStep:
    return at(sampler_pb2.DecodeStep(num_tokens=2, sequences_by_tenant=sequences), started, took)


def shared_pass(started: float = 5.0) -> trainer_pb2.Pass:
    found = at(trainer_pb2.Pass(num_steps_beside=1), started, 0.25)
    for run, tokens in (("tenants/a/runs/r-1", 10), ("tenants/b/runs/r-2", 20), ("tenants/c/runs/r-3", 30)):
        found.shares.add(run=run, num_tokens=tokens)
    return found


def lengths(spans: list[timeline_pb2.Span]) -> list[tuple[float, float, int]]:
    return [
        (span.started.ToNanoseconds() / 1e9, round(span.took.ToNanoseconds() / 1e9, 6), span.num_decode_steps)
        for span in spans
    ]


def test_steps_without_a_pause_in_the_same_company_are_one_span() -> None:
    steps = [step(1.0, a=1), step(1.01, a=2), step(1.02, a=2, b=1), step(1.1, a=2, b=1), step(1.115, a=2, b=1)]
    spans = joined_steps(steps)
    assert lengths(spans) == [(1.0, 0.02, 2), (1.02, 0.01, 1), (1.1, 0.025, 2)]
    assert [{share.tenant: share.num_sequences for share in span.shares} for span in spans] == [
        {"a": 2},
        {"a": 2, "b": 1},
        {"a": 2, "b": 1},
    ]
    assert [span.num_tokens for span in spans] == [4, 2, 4]


def test_joined_steps_end_after_half_a_second() -> None:
    spans = joined_steps(step(n / 100, a=1) for n in range(120))
    assert sum(span.num_decode_steps for span in spans) == 120
    assert len(spans) == 3
    assert max(span.took.ToNanoseconds() for span in spans) <= 0.5e9


def test_a_tenant_sees_itself_and_one_other() -> None:
    """No name of another tenant or run, not even how many they are; an administrator sees all."""
    span = span_of_pass(shared_pass())
    assert (span.num_tokens, span.num_steps_beside) == (60, 1)
    mine = as_seen_by(span, Principal("b", frozenset({"train"})))
    assert [(share.tenant, share.run, share.num_tokens) for share in mine.shares] == [
        ("b", "tenants/b/runs/r-2", 20),
        ("", "", 40),
    ]
    stranger = as_seen_by(span, Principal("z", frozenset({"sample"})))
    assert [(share.tenant, share.run, share.num_tokens) for share in stranger.shares] == [("", "", 60)]
    assert as_seen_by(span, Principal("z", frozenset({"admin"}))) == span
    assert [share.tenant for share in span.shares] == ["a", "b", "c"]


def test_a_lane_gives_the_newest_of_what_is_asked_for() -> None:
    lane = Lane()
    lane.add_passes([shared_pass(started=float(second)) for second in range(1, 6)])
    assert lane.newest_ns == 5_000_000_000
    assert [span.started.seconds for span in lane.after(2_000_000_000, 10)] == [3, 4, 5]
    assert [span.started.seconds for span in lane.after(0, 2)] == [4, 5]
    lane.add_passes([])
    assert lane.newest_ns == 5_000_000_000
