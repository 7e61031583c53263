"""What tenants may use and what they have used, as the store keeps it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine

from tests.store.conftest import entry, reason_of
from treadle.errors import from_rpc_error
from treadle.internal.v1 import journal_pb2, usage_pb2
from treadle.v1 import adapters_pb2, admin_pb2
from treadle_store import identity, quotas, tables
from treadle_store.clock import to_timestamp
from treadle_store.usage import DAY_US


async def limited(store, tenant: str = "acme", **limits: int):
    """Makes a tenant with a quota and returns the admin's stub."""
    admin = store.tenant("admin", "admin").admin
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant=tenant))
    await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant=tenant, quota=admin_pb2.Quota(**limits)))
    return admin


def done(run: str, epoch: int, seq: int, num_tokens: int, device_us: int = 0) -> journal_pb2.JournalEntry:
    """Returns an operation with its result, which cost so much."""
    written = entry(run, epoch, appends=[seq], commits=[seq])
    written.commits[0].num_tokens, written.commits[0].device_us = num_tokens, device_us
    return written


async def debt_of(store, tenant: str = "acme") -> float:
    """Returns the seconds until a tenant's training is paid for."""
    answer = await store.usage.GetBudgets(usage_pb2.GetBudgetsRequest(tenants=[tenant]))
    return answer.budgets[0].training.debt.ToMicroseconds() / 1e6


async def test_a_quota_is_set_whole_and_read_by_its_tenant(store):
    """What is unset has no limit; another tenant's is for administrators."""
    admin = await limited(store, max_runs=3, max_stored_bytes=0)
    mine = store.tenant("acme", "sample").admin
    read = (await mine.GetQuota(admin_pb2.GetQuotaRequest())).quota
    assert read == admin_pb2.Quota(max_runs=3, max_stored_bytes=0)
    await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="acme", quota=admin_pb2.Quota(max_active_runs=1)))
    read = (await admin.GetQuota(admin_pb2.GetQuotaRequest(tenant="acme"))).quota
    assert read == admin_pb2.Quota(max_active_runs=1)
    for other in ("admin", "nobody"):
        assert await reason_of(mine.GetQuota(admin_pb2.GetQuotaRequest(tenant=other))) == "PERMISSION_DENIED"
        assert await reason_of(mine.GetUsage(admin_pb2.GetUsageRequest(tenant=other))) == "PERMISSION_DENIED"
    assert await reason_of(mine.SetQuota(admin_pb2.SetQuotaRequest(tenant="acme"))) == "PERMISSION_DENIED"
    assert await reason_of(admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="nobody"))) == "TENANT_NOT_FOUND"
    for bad in (admin_pb2.Quota(training_tokens_per_minute=0), admin_pb2.Quota(max_runs=2**60)):
        assert await reason_of(admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="acme", quota=bad))) == "BAD_VALUE"


async def test_a_result_is_charged_once_however_often_it_is_written(store, clock):
    """Also by another holder after a failover; the writer hears what is left."""
    await limited(store, training_tokens_per_minute=6000)
    run = await store.new_run()
    epoch = await store.claim(run)
    assert await debt_of(store) == -60.0
    request = journal_pb2.WriteJournalRequest(entries=[done(run, epoch, 1, 4000, 7)])
    answer = await store.journal.WriteJournal(request)
    assert answer.budgets[0].tenant == "acme"
    assert answer.budgets[0].training.tokens_per_minute == 6000
    assert round(answer.budgets[0].training.debt.ToMicroseconds() / 1e6, 1) == -20.0
    assert not (await store.journal.WriteJournal(request)).budgets
    await store.journal.ReleaseRun(journal_pb2.ReleaseRunRequest(run=run, epoch=epoch))
    epoch = await store.claim(run, "trainer-1")
    await store.write(done(run, epoch, 1, 4000, 7))
    assert round(await debt_of(store), 1) == -20.0
    await store.write(done(run, epoch, 2, 8000, 3))
    assert round(await debt_of(store), 1) == 60.0
    clock.advance(100)
    assert round(await debt_of(store), 1) == -40.0
    used = await store.tenant("acme").admin.GetUsage(admin_pb2.GetUsageRequest())
    assert (used.total.num_operations, used.total.training_tokens) == (2, 12_000)
    assert used.total.device_time.ToMicroseconds() == 10
    assert [(part.run, part.usage) for part in used.runs] == [(run, used.total)]


async def test_a_debt_is_in_tokens_whatever_the_rate(store):
    """A raised quota is felt at once, a lowered one is not a pardon, and lifting the limit is one."""
    admin = await limited(store, training_tokens_per_minute=600)
    run = await store.new_run()
    epoch = await store.claim(run)
    await store.write(done(run, epoch, 1, 1800))
    for rate, debt in ((600, 120.0), (6000, 12.0), (60, 1200.0)):
        quota = admin_pb2.Quota(training_tokens_per_minute=rate)
        await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="acme", quota=quota))
        assert await debt_of(store) == pytest.approx(debt, abs=0.1)
    await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="acme", quota=admin_pb2.Quota()))
    await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="acme", quota=quota))
    assert await debt_of(store) == -60.0


async def test_a_claim_says_what_may_be_used(store):
    """A trainer that meets a tenant for the first time need not ask."""
    await limited(store, training_tokens_per_minute=60, max_unfinished_operations=5)
    run = await store.new_run()
    claim = await store.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=run, holder="t", address="h:1"))
    assert (claim.budget.training.tokens_per_minute, claim.budget.max_unfinished_operations) == (60, 5)
    free = await store.new_run("other")
    claim = await store.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=free, holder="t", address="h:1"))
    assert claim.budget == usage_pb2.Budget(tenant="other")


async def test_no_more_runs_than_the_quota_says(store):
    """A repeated request still finds its run; deleting one makes room."""
    await limited(store, max_runs=2)
    runs = [await store.new_run(request_id=name) for name in ("a", "b")]
    assert await reason_of(store.new_run(request_id="c")) == "QUOTA_EXCEEDED"
    assert await store.new_run(request_id="a") == runs[0]
    await store.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=runs[1]))
    assert await store.new_run(request_id="c")


async def test_no_more_active_runs_than_the_quota_says(store, clock):
    """The error says when to try again; the holder's own runs, freed and expired ones do not count."""
    await limited(store, max_active_runs=2)
    runs = [await store.new_run() for _ in range(3)]
    epoch = await store.claim(runs[0])
    await store.claim(runs[1])
    await store.claim(runs[1])
    claim = store.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=runs[2], holder="t", address="h:1"))
    with pytest.raises(Exception, match="runs of yours are active") as caught:
        await claim
    error = from_rpc_error(caught.value)
    assert (error.reason, error.retryable, error.retry_after_seconds) == ("RATE_LIMITED", True, 2.0)
    await store.journal.ReleaseRun(journal_pb2.ReleaseRunRequest(run=runs[0], epoch=epoch))
    await store.claim(runs[2])
    assert await reason_of(store.claim(runs[0])) == "RATE_LIMITED"
    clock.advance(11)
    await store.claim(runs[0])


async def test_no_more_bytes_than_the_quota_says(store):
    """A save that would go beyond fails and leaves nothing; a repeat of an earlier one does not; deleting helps."""
    await limited(store, max_stored_bytes=10)
    run = await store.new_run()
    epoch = await store.claim(run)
    blob = await store.put_blob(b"7 bytes")

    def save(name: str, seq: int):
        file = adapters_pb2.AdapterFile(path="adapter_config.json", sha256=blob, size=7)
        adapter = adapters_pb2.Adapter(name=f"{run}/revisions/{name}", base="treadle/pip", files=[file])
        request = journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=seq)
        return store.journal.RecordAdapter(request)

    await save("a", 1)
    assert await reason_of(save("b", 2)) == "QUOTA_EXCEEDED"
    await save("a", 1)
    mine = store.tenant("acme")
    assert (await mine.admin.GetUsage(admin_pb2.GetUsageRequest())).stored_bytes == 7
    listed = await mine.adapters.ListRevisions(adapters_pb2.ListRevisionsRequest())
    assert [revision.name for revision in listed.revisions] == [f"{run}/revisions/a"]
    await mine.adapters.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=f"{run}/revisions/a"))
    await save("b", 2)


def report(seq: int, *uses: usage_pb2.SamplingUse) -> usage_pb2.ReportUsageRequest:
    return usage_pb2.ReportUsageRequest(reporter="sampler-0/life", seq=seq, uses=uses)


async def test_a_report_of_sampling_counts_once(store):
    """It is charged to the tenant, split by run; a repeat changes nothing and a gap is refused."""
    await limited(store, sampling_tokens_per_minute=600)
    run = await store.new_run()
    first = report(
        1,
        usage_pb2.SamplingUse(tenant="acme", run=run, num_requests=2, prompt_tokens=30, sampled_tokens=70, device_us=9),
        usage_pb2.SamplingUse(tenant="acme", num_requests=1, prompt_tokens=100),
    )
    for _ in range(3):
        budgets = (await store.usage.ReportUsage(first)).budgets
        assert [(b.tenant, round(b.sampling.debt.ToMicroseconds() / 1e6)) for b in budgets] == [("acme", -40)]
    assert await reason_of(store.usage.ReportUsage(report(3))) == "SEQ_GAP"
    await store.usage.ReportUsage(report(2, usage_pb2.SamplingUse(tenant="acme", run=run, sampled_tokens=1)))
    used = await store.tenant("acme").admin.GetUsage(admin_pb2.GetUsageRequest())
    assert [(part.run, part.usage.num_operations, part.usage.sampled_tokens) for part in used.runs] == [
        ("", 1, 0),
        (run, 2, 71),
    ]
    assert (used.total.prompt_tokens, used.total.sampled_tokens, used.num_runs) == (130, 71, 1)
    foreign = report(3, usage_pb2.SamplingUse(tenant="other", run=run, sampled_tokens=1))
    assert await reason_of(store.usage.ReportUsage(foreign)) == "BAD_NAME"


async def test_usage_is_kept_by_day_and_outlives_its_run(store, clock):
    """A span is of whole days, the listing comes in pages."""
    admin = store.tenant("admin", "admin").admin
    runs = sorted([await store.new_run() for _ in range(3)])
    began_us = clock.now_us
    for run in runs:
        epoch = await store.claim(run)
        await store.write(done(run, epoch, 1, 10))
    clock.advance(DAY_US / 1e6)
    epoch = await store.claim(runs[0])
    await store.write(done(runs[0], epoch, 2, 5))
    await store.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=runs[0]))
    first = to_timestamp(began_us)
    everything = await admin.GetUsage(admin_pb2.GetUsageRequest(tenant="acme"))
    assert (everything.total.training_tokens, everything.num_runs) == (35, 2)
    day_one = await admin.GetUsage(admin_pb2.GetUsageRequest(tenant="acme", since=first, until=first))
    assert day_one.total.training_tokens == 30
    pages = [await admin.GetUsage(admin_pb2.GetUsageRequest(tenant="acme", page_size=2))]
    pages.append(
        await admin.GetUsage(admin_pb2.GetUsageRequest(tenant="acme", page_size=2, page_token=pages[0].next_page_token))
    )
    assert [part.run for page in pages for part in page.runs] == runs
    assert (pages[1].next_page_token, pages[1].total.training_tokens) == ("", 35)


@given(
    rate=st.integers(1, 10**9),
    charges=st.lists(st.tuples(st.integers(0, 90_000_000), st.integers(0, 10**7)), max_size=20),
)
def test_a_bucket_gives_its_rate_and_one_minute_ahead(rate, charges):
    """Against the definition: a level that refills at the rate, up to one minute's worth, and may go below zero."""
    engine = create_engine("sqlite://")
    now_us, level = 10**15, float(rate)
    with engine.begin() as connection:
        tables.metadata.create_all(connection)
        identity.create_tenant(connection, "acme", 0)
        quotas.set_quota(connection, "acme", admin_pb2.Quota(training_tokens_per_minute=rate), now_us)
        for pause_us, num_tokens in charges:
            now_us += pause_us
            level = min(level + pause_us * rate / 60e6, float(rate)) - num_tokens
            budget = quotas.charge(connection, "training", {"acme": num_tokens}, now_us)["acme"]
            assert budget is not None
            # Each charge is rounded down to a microsecond.
            debt_us = budget.training.debt.ToMicroseconds()
            assert debt_us == pytest.approx(-level / rate * 60e6, abs=1 + len(charges), rel=1e-9)
    engine.dispose()


def test_the_table_of_quotas_has_a_column_for_every_limit():
    """A limit that were only in the message would be forgotten."""
    limits = {field.name for field in admin_pb2.Quota.DESCRIPTOR.fields}
    assert limits == {column.name for column in tables.quotas.columns if column.nullable}
