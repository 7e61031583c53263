"""Metrics of runs as the store keeps them: once, merged by step, thinned by rule, for their owner alone."""

import itertools
import math

from tests.store.conftest import Caller, FakeClock, entry, reason_of, serve
from treadle.internal.v1 import journal_pb2
from treadle.v1 import metrics_pb2, metrics_pb2_grpc
from treadle_service.channels import internal_metadata
from treadle_service.principal import Principal
from treadle_store import metrics
from treadle_store.settings import StoreSettings

OWNER = Principal("acme", frozenset({"train"}))


class Metrics:
    """The service as one principal sees it."""

    def __init__(self, store: Caller, principal: Principal = OWNER) -> None:
        self._stub = metrics_pb2_grpc.MetricsServiceStub(store.channel)
        self._metadata = internal_metadata("a-token-of-this-deployment", principal)

    async def log(self, run: str, *steps: metrics_pb2.LoggedStep) -> None:
        await self._stub.LogMetrics(metrics_pb2.LogMetricsRequest(run=run, steps=steps), metadata=self._metadata)

    async def points(self, run: str, **fields: int) -> metrics_pb2.ListMetricsResponse:
        request = metrics_pb2.ListMetricsRequest(run=run, **fields)
        return await self._stub.ListMetrics(request, metadata=self._metadata)

    async def samples(self, run: str, **fields: int) -> metrics_pb2.ListSamplesResponse:
        request = metrics_pb2.ListSamplesRequest(run=run, **fields)
        return await self._stub.ListSamples(request, metadata=self._metadata)

    async def all_steps(self, run: str) -> list[int]:
        """Returns the steps of all points, in order of step."""
        cursor, found, more = 0, [], True
        while more:
            page = await self.points(run, after_cursor=cursor)
            cursor, more = page.cursor, page.more
            found += [point.step for point in page.points]
        return sorted(found)


def logged(step: int, *texts: str, **values: float) -> metrics_pb2.LoggedStep:
    samples = [metrics_pb2.TextSample(response=text) for text in texts]
    return metrics_pb2.LoggedStep(step=step, values=values, samples=samples)


def stepped(run: str, epoch: int, seq: int, step: int, loss: float) -> journal_pb2.JournalEntry:
    """Returns an optim_step with its result and its metrics."""
    written = entry(run, epoch, appends=[seq], commits=[seq])
    written.commits[0].metrics.CopyFrom(journal_pb2.StepMetrics(step=step, values={"loss:sum": loss}))
    return written


async def test_a_steps_metrics_are_kept_once_with_its_result(store: Caller, clock: FakeClock) -> None:
    """Written again, also by the next holder, they are no second point; the run shows the newest."""
    run = await store.new_run()
    epoch = await store.claim(run)
    assert await store.write(stepped(run, epoch, 1, 1, 3.0), entry(run, epoch)) == ["", ""]
    again = await store.claim(run)
    assert await store.write(stepped(run, epoch, 2, 2, 0.0)) == ["STALE_LEASE"]
    assert await store.write(stepped(run, again, 1, 1, 9.0)) == [""]
    assert await store.write(stepped(run, again, 2, 2, 2.0)) == [""]
    page = await Metrics(store).points(run)
    assert [(p.step, p.values["loss:sum"], p.source) for p in page.points] == [(1, 3.0, 1), (2, 2.0, 1)]
    shown = (await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))).run.latest
    assert (shown, shown.step) == (page.points[1], 2)
    listed = await store.journal.ScanRuns(journal_pb2.ScanRunsRequest(tenant="acme"))
    assert listed.runs[0].latest == shown


async def test_a_run_that_went_back_writes_its_steps_anew(store: Caller) -> None:
    """One value per step, the newest; what changed is behind the cursor."""
    run = await store.new_run()
    epoch = await store.claim(run)
    for seq, step in enumerate((1, 2, 3), 1):
        await store.write(stepped(run, epoch, seq, step, float(step)))
    before = await Metrics(store).points(run)
    await store.write(stepped(run, epoch, 4, 2, 20.0))
    changed = await Metrics(store).points(run, after_cursor=before.cursor)
    assert [(p.step, p.values["loss:sum"]) for p in changed.points] == [(2, 20.0)]
    points = {p.step: p.values["loss:sum"] for p in (await Metrics(store).points(run)).points}
    assert points == {1: 1.0, 2: 20.0, 3: 3.0}
    latest = (await store.journal.LookupRun(journal_pb2.LookupRunRequest(run=run))).run.latest
    assert (latest.step, latest.values["loss:sum"]) == (2, 20.0)


async def test_what_is_logged_is_merged_by_step_and_a_repeat_changes_nothing(store: Caller) -> None:
    """Names add up, values and texts that come again replace the ones before; reading goes on where it ended."""
    mine, run = Metrics(store), await store.new_run()
    await mine.log(run, logged(5, "hello", reward=1.0), logged(5, kl=0.5), logged(6, reward=2.0))
    first = await mine.points(run)
    assert [(p.step, dict(p.values)) for p in first.points] == [(5, {"reward": 1.0, "kl": 0.5}), (6, {"reward": 2.0})]
    for _ in range(2):
        await mine.log(run, logged(5, "good", "bye", reward=3.0, nan=math.nan))
    then = await mine.points(run, after_cursor=first.cursor)
    assert [p.step for p in then.points] == [5]
    assert (then.points[0].values["reward"], then.points[0].values["kl"]) == (3.0, 0.5)
    assert math.isnan(then.points[0].values["nan"])
    assert not (await mine.points(run, after_cursor=then.cursor)).points
    assert [p.step for p in (await mine.points(run, from_step=6)).points] == [6]
    sets = (await mine.samples(run)).sets
    assert [(s.step, [sample.response for sample in s.samples]) for s in sets] == [(5, ["good", "bye"])]


async def test_both_sources_have_a_point_of_the_same_step(store: Caller) -> None:
    run = await store.new_run()
    epoch = await store.claim(run)
    await Metrics(store).log(run, logged(1, **{"loss:sum": 7.0}))
    await store.write(stepped(run, epoch, 1, 1, 3.0))
    points = (await Metrics(store).points(run)).points
    assert [(p.source, p.values["loss:sum"]) for p in points] == [
        (metrics_pb2.METRIC_SOURCE_USER, 7.0),
        (metrics_pb2.METRIC_SOURCE_SERVICE, 3.0),
    ]


async def test_old_points_are_thinned_evenly(store: Caller) -> None:
    """The newest thousand stay; a name that comes in a call of its own is as dense as the others."""
    mine, run = Metrics(store), await store.new_run()
    total = 5 * metrics.WINDOW
    for start in range(0, total, 128):
        await mine.log(run, *(logged(step, a=1.0) for step in range(start, start + 128)))
        await mine.log(run, *(logged(step, b=1.0) for step in range(start, start + 128)))
    steps = await mine.all_steps(run)
    assert steps[-metrics.WINDOW :] == list(range(total - metrics.WINDOW, total))
    assert len(steps) <= metrics.WINDOW + metrics.WINDOW // 2 * 3 + 128
    gaps = [right - left for left, right in itertools.pairwise(steps)]
    assert max(gaps) <= 8
    assert gaps == sorted(gaps, reverse=True)
    points = (await mine.points(run)).points
    assert all(set(point.values) == {"a", "b"} for point in points)


async def test_recorded_points_and_texts_are_thinned_too(store: Caller) -> None:
    mine, run = Metrics(store), await store.new_run()
    epoch, total = await store.claim(run), 2 * metrics.WINDOW + 128
    for start in range(0, total, 128):
        seqs = range(start + 1, start + 129)
        written = entry(run, epoch, appends=seqs, commits=seqs)
        for commit in written.commits:
            commit.metrics.step = commit.seq
        assert await store.write(written) == [""]
    steps = await mine.all_steps(run)
    assert len(steps) < total - metrics.WINDOW // 2
    assert steps[-metrics.WINDOW :] == list(range(total - metrics.WINDOW + 1, total + 1))
    for step in range(200):
        await mine.log(run, logged(step, f"text {step}"))
    cursor, texts, more = 0, [], True
    while more:
        page = await mine.samples(run, after_cursor=cursor)
        cursor, more = page.cursor, page.more
        texts += [found.step for found in page.sets]
    assert texts[-metrics.SAMPLE_WINDOW :] == list(range(200 - metrics.SAMPLE_WINDOW, 200))
    assert metrics.SAMPLE_WINDOW < len(texts) < 160


async def test_bad_metrics_are_refused_whole(store: Caller) -> None:
    """And say what is wrong."""
    mine, run = Metrics(store), await store.new_run()
    names = {f"name-{n}": 0.0 for n in range(metrics.MAX_NAMES)}
    await mine.log(run, logged(1, **names))
    bad = [
        [logged(2, a=1.0), logged(2**53 + 1, a=1.0)],
        [logged(2, **{**names, "more": 0.0})],
        [logged(1, more=0.0)],
        [metrics_pb2.LoggedStep(step=2, values={"": 0.0})],
        [metrics_pb2.LoggedStep(step=2, values={"a\n": 0.0})],
        [metrics_pb2.LoggedStep(step=2, values={"a" * 65: 0.0})],
        [logged(2, *["text"] * 9)],
        [logged(2, "t" * 8200)],
        [logged(step, a=0.0) for step in range(300)],
    ]
    for steps in bad:
        assert await reason_of(mine.log(run, *steps)) == "BAD_VALUE"
    assert await mine.all_steps(run) == [1]
    assert await reason_of(mine.log("nonsense", logged(1, a=1.0))) == "BAD_NAME"


async def test_nobody_else_sees_or_writes_them_and_they_go_with_the_run(
    settings: StoreSettings, clock: FakeClock
) -> None:
    """They outlive the store's process; another tenant gets the answer of a run that is not there."""
    async with serve(settings, clock) as store:
        run = await store.new_run()
        await Metrics(store).log(run, logged(1, "secret", reward=1.0))
        nosy = Metrics(store, Principal("nosy", frozenset({"train"})))
        for call in (nosy.log(run, logged(1, a=1.0)), nosy.points(run), nosy.samples(run)):
            assert await reason_of(call) == "RUN_NOT_FOUND"
    async with serve(settings, clock) as store:
        mine = Metrics(store)
        assert [dict(point.values) for point in (await mine.points(run)).points] == [{"reward": 1.0}]
        await store.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=run))
        for call in (mine.log(run, logged(1, a=1.0)), mine.points(run), mine.samples(run)):
            assert await reason_of(call) == "RUN_NOT_FOUND"
