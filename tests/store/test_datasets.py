"""Completions that tenants keep: consent, bounds, listings, deletion."""

import json

import pytest
from sqlalchemy import update

from tests.store.conftest import FakeClock, reason_of, serve
from treadle.v1 import admin_pb2, datasets_pb2
from treadle_store.backends import open_blobs
from treadle_store.engines import open_engines
from treadle_store.fsck import check_store
from treadle_store.tables import tenants


def completion(name: str = "", model: str = "treadle/pip", text: str = "Hi", **metadata: str):
    """Returns a completion to be kept."""
    return datasets_pb2.StoredCompletion(
        id=name,
        model=model,
        messages_json=json.dumps([{"role": "user", "content": text}]),
        response_json=json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Yo"}}]}),
        metadata=metadata,
    )


async def consenting(store, tenant: str = "acme", **limits: int):
    """Makes a tenant that agrees; returns its datasets."""
    admin = store.tenant("admin", "admin").admin
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant=tenant))
    await admin.UpdateTenant(admin_pb2.UpdateTenantRequest(tenant=tenant, store_completions=True))
    if limits:
        await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant=tenant, quota=admin_pb2.Quota(**limits)))
    return store.tenant(tenant).datasets


async def keep(datasets, *args: str, **kwargs: str):
    request = datasets_pb2.CreateCompletionRequest(completion=completion(*args, **kwargs))
    return (await datasets.CreateCompletion(request)).completion


async def names(datasets, **request: object) -> list[str]:
    answer = await datasets.ListCompletions(datasets_pb2.ListCompletionsRequest(**request))
    return [found.id for found in answer.completions]


async def stored_bytes(store, tenant: str = "acme") -> int:
    return (await store.tenant(tenant).admin.GetUsage(admin_pb2.GetUsageRequest())).stored_bytes


async def test_nothing_is_kept_without_consent(store):
    """Which is off at first, is an administrator's to give, and ends what comes, not what is there."""
    admin = store.tenant("admin", "admin").admin
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="acme"))
    mine = store.tenant("acme").datasets
    for request in (
        datasets_pb2.CreateCompletionRequest(completion=completion()),
        datasets_pb2.CreateCompletionRequest(validate_only=True),
    ):
        assert await reason_of(mine.CreateCompletion(request)) == "PERMISSION_DENIED"
    consent = admin_pb2.UpdateTenantRequest(tenant="acme", store_completions=True)
    assert await reason_of(store.tenant("acme").admin.UpdateTenant(consent)) == "PERMISSION_DENIED"
    assert (await admin.UpdateTenant(consent)).tenant.store_completions
    await mine.CreateCompletion(datasets_pb2.CreateCompletionRequest(validate_only=True))
    assert await names(mine) == []
    kept = await keep(mine)
    unchanged = await admin.UpdateTenant(admin_pb2.UpdateTenantRequest(tenant="acme"))
    assert unchanged.tenant.store_completions
    consent.store_completions = False
    await admin.UpdateTenant(consent)
    assert [t.store_completions for t in (await admin.ListTenants(admin_pb2.ListTenantsRequest())).tenants] == [
        False,
        False,
    ]
    assert await reason_of(keep(mine)) == "PERMISSION_DENIED"
    assert await names(mine) == [kept.id]
    assert await reason_of(admin.UpdateTenant(admin_pb2.UpdateTenantRequest(tenant="nobody"))) == "TENANT_NOT_FOUND"


async def test_what_is_kept_comes_back_whole_and_repeating_it_is_harmless(store, clock):
    mine = await consenting(store)
    kept = await keep(mine, "chatcmpl-1", topic="x")
    assert (kept.messages_json, kept.response_json, dict(kept.metadata)) == ("", "", {"topic": "x"})
    again = await keep(mine, "chatcmpl-1", topic="ignored")
    assert again == kept
    assert await reason_of(keep(mine, "chatcmpl-1", text="other")) == "REQUEST_ID_REUSED"
    found = (await mine.GetCompletion(datasets_pb2.GetCompletionRequest(id="chatcmpl-1"))).completion
    wanted = completion("chatcmpl-1", topic="x")
    assert (found.messages_json, found.response_json) == (wanted.messages_json, wanted.response_json)
    assert (found.model, found.size, found.created) == ("treadle/pip", kept.size, kept.created)
    change = datasets_pb2.UpdateCompletionRequest(id="chatcmpl-1", metadata={"topic": "longer", "b": ""})
    changed = (await mine.UpdateCompletion(change)).completion
    assert dict(changed.metadata) == {"topic": "longer", "b": ""}
    assert changed.size == kept.size + len("longerb") - len("x")
    assert await stored_bytes(store) == changed.size
    await mine.DeleteCompletion(datasets_pb2.DeleteCompletionRequest(id="chatcmpl-1"))
    for call in (mine.GetCompletion, mine.DeleteCompletion, mine.UpdateCompletion):
        request = {
            mine.GetCompletion: datasets_pb2.GetCompletionRequest(id="chatcmpl-1"),
            mine.DeleteCompletion: datasets_pb2.DeleteCompletionRequest(id="chatcmpl-1"),
        }.get(call, datasets_pb2.UpdateCompletionRequest(id="chatcmpl-1"))
        assert await reason_of(call(request)) == "COMPLETION_NOT_FOUND"
    assert await stored_bytes(store) == 0


async def test_ids_of_the_service_are_in_order_of_time(store, clock: FakeClock):
    mine = await consenting(store)
    kept = []
    for _ in range(3):
        clock.advance(3600)
        kept.append((await keep(mine)).id)
    assert kept == sorted(kept) == await names(mine)


async def test_listings_are_filtered_and_cut_into_pages(store):
    mine, other = await consenting(store), await consenting(store, "umbrella")
    for number in range(7):
        model = "treadle/pip" if number % 2 else "treadle/big"
        await keep(mine, f"c-{number}", model, topic="even" if number % 2 == 0 else "odd", n=str(number))
    await keep(other, "c-3", topic="even")
    assert await names(mine, descending=True) == [f"c-{n}" for n in reversed(range(7))]
    even = datasets_pb2.CompletionFilter(metadata={"topic": "even"})
    assert await names(mine, filter=even) == ["c-0", "c-2", "c-4", "c-6"]
    assert await names(mine, filter=datasets_pb2.CompletionFilter(metadata={"topic": "even", "n": "4"})) == ["c-4"]
    assert await names(mine, filter=datasets_pb2.CompletionFilter(model="treadle/pip")) == ["c-1", "c-3", "c-5"]
    page = await mine.ListCompletions(
        datasets_pb2.ListCompletionsRequest(filter=even, after="c-1", page_size=2, brief=True)
    )
    assert ([found.id for found in page.completions], page.has_more) == (["c-2", "c-4"], True)
    assert {found.messages_json for found in page.completions} == {""}
    last = await mine.ListCompletions(datasets_pb2.ListCompletionsRequest(filter=even, after="c-4", page_size=2))
    assert ([found.id for found in last.completions], last.has_more) == (["c-6"], False)
    assert await names(mine, after="c-2", descending=True) == ["c-1", "c-0"]
    gone = await mine.DeleteCompletions(datasets_pb2.DeleteCompletionsRequest(filter=even))
    assert gone.num_deleted == 4
    assert await names(mine) == ["c-1", "c-3", "c-5"]
    assert await names(other) == ["c-3"]
    assert (await mine.DeleteCompletions(datasets_pb2.DeleteCompletionsRequest())).num_deleted == 3
    assert await stored_bytes(store) == 0 < await stored_bytes(store, "umbrella")


async def test_long_completions_make_pages_shorter_than_a_message(store):
    mine = await consenting(store)
    for number in range(6):
        await keep(mine, f"c-{number}", text="x" * 900_000)
    page = await mine.ListCompletions(datasets_pb2.ListCompletionsRequest())
    assert ([found.id for found in page.completions], page.has_more) == (["c-0", "c-1", "c-2"], True)
    assert len(await names(mine, brief=True)) == 6


async def test_what_is_kept_counts_and_is_bounded(store):
    """By the tenant's stored bytes, and by the deployment's own bound."""
    mine = await consenting(store, max_stored_bytes=3000)
    sizes = [(await keep(mine, f"c-{n}", text="x" * 600)).size for n in range(3)]
    assert await stored_bytes(store) == sum(sizes)
    assert await reason_of(keep(mine, "c-3", text="x" * 600)) == "QUOTA_EXCEEDED"
    assert await names(mine) == ["c-0", "c-1", "c-2"]
    await mine.DeleteCompletion(datasets_pb2.DeleteCompletionRequest(id="c-0"))
    await keep(mine, "c-3", text="x" * 600)


@pytest.mark.parametrize("settings", ["sqlite and a folder"], indirect=True)
async def test_the_deployments_own_bound_holds_without_a_quota(settings, clock):
    async with serve(settings.model_copy(update={"max_completion_bytes": 1000}), clock) as store:
        mine = await consenting(store)
        await keep(mine, text="x" * 500)
        assert await reason_of(keep(mine, text="x" * 500)) == "QUOTA_EXCEEDED"


async def test_what_cannot_be_kept_is_refused(store):
    mine = await consenting(store)
    for change in (
        {"id": "not an id"},
        {"id": "x" * 65},
        {"model": ""},
        {"messages_json": "{}"},
        {"messages_json": "no json"},
        {"response_json": "[]"},
        {"response_json": '"' + "x" * 2**20 + '"'},
        {"metadata": {"": "x"}},
        {"metadata": {"k": "x" * 513}},
        {"metadata": {"k\0": "x"}},
        {"metadata": {str(n): "" for n in range(17)}},
    ):
        wanted = completion("fine")
        wanted.MergeFrom(datasets_pb2.StoredCompletion(**{k: v for k, v in change.items() if v}))
        for field in [k for k, v in change.items() if not v]:
            wanted.ClearField(field)
        request = datasets_pb2.CreateCompletionRequest(completion=wanted)
        assert (change, await reason_of(mine.CreateCompletion(request))) == (change, "BAD_VALUE")
    assert await names(mine) == []
    long = completion(text="x" * 2**20)
    request = datasets_pb2.CreateCompletionRequest(completion=long, validate_only=True)
    assert await reason_of(mine.CreateCompletion(request)) == "BAD_VALUE"


async def test_fsck_finds_a_count_that_went_wrong(settings, clock):
    async with serve(settings, clock) as store:
        await keep(await consenting(store))
    engines = open_engines(settings.database)
    try:
        blobs = open_blobs(settings, beside_a_store=True)
        report = check_store(engines, blobs)
        assert (report.problems, report.counts["completions"]) == ([], 1)
        with engines.writer.begin() as connection:
            connection.execute(update(tenants).values(completion_bytes=1))
        assert len(check_store(engines, blobs).problems) == 2  # acme's and the administrators'
    finally:
        engines.dispose()
