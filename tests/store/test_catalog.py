"""Registering, finding and listing runs."""

import asyncio

import pytest

from tests.store.conftest import reason_of
from treadle.internal.v1 import journal_pb2
from treadle.v1 import training_pb2, types_pb2


def register(store, tenant: str = "acme", **fields: object):
    request = training_pb2.CreateRunRequest(**{"base": "treadle/pip", **fields})
    return store.journal.RegisterRun(journal_pb2.RegisterRunRequest(tenant=tenant, run=request))


async def test_a_new_run_has_defaults(store):
    """Rank and alpha are filled in; the first seq is 1."""
    answer = await register(store, metadata={"note": "first"})
    assert not answer.replayed
    assert answer.run.name.startswith("tenants/acme/runs/r-")
    assert (answer.run.lora.rank, answer.run.lora.alpha, answer.run.next_seq) == (32, 32.0, 1)
    assert answer.run.state == training_pb2.RUN_STATE_ACTIVE
    assert dict(answer.run.metadata) == {"note": "first"}
    assert answer.run.worker == ""


async def test_a_request_id_makes_one_run(store):
    """Twenty concurrent repeats make one run; other content under the same id is refused; tenants do not clash."""
    answers = await asyncio.gather(*(register(store, request_id="id-1") for _ in range(20)))
    assert len({answer.run.name for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 19
    assert await reason_of(register(store, request_id="id-1", lora=types_pb2.LoraConfig(rank=8))) == "REQUEST_ID_REUSED"
    assert not (await register(store, "globex", request_id="id-1")).replayed
    assert (await register(store)).run.name != (await register(store)).run.name


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora": types_pb2.LoraConfig(rank=513)}, "BAD_LORA_CONFIG"),
        ({"lora": types_pb2.LoraConfig(alpha=-1)}, "BAD_LORA_CONFIG"),
        ({"lora": types_pb2.LoraConfig(alpha=float("nan"))}, "BAD_LORA_CONFIG"),
        ({"lora": types_pb2.LoraConfig(skip_attn=True, skip_mlp=True, skip_unembed=True)}, "BAD_LORA_CONFIG"),
        ({"request_id": "x" * 129}, "BAD_VALUE"),
        ({"metadata": {str(i): "" for i in range(65)}}, "BAD_VALUE"),
        ({"metadata": {"k": "v" * 17_000}}, "BAD_VALUE"),
        ({"base": ""}, "UNKNOWN_BASE"),
        ({"from_adapter": "nonsense"}, "BAD_NAME"),
        ({"from_adapter": "tenants/acme/runs/r-1/revisions/none"}, "ADAPTER_NOT_FOUND"),
        ({"tenant": "No Tenant"}, "BAD_NAME"),
    ],
)
async def test_a_bad_run_is_refused(store, fields, reason):
    """Each mistake has its reason."""
    others = {name: value for name, value in fields.items() if name != "tenant"}
    assert await reason_of(register(store, fields.get("tenant", "acme"), **others)) == reason


async def test_runs_are_listed_newest_first_page_by_page(store):
    """Pages join without gap or repeat, and hold one tenant's runs."""
    names = [(await register(store)).run.name for _ in range(7)]
    await register(store, "globex")
    seen, token = [], ""
    while True:
        request = journal_pb2.ScanRunsRequest(tenant="acme", page_size=3, page_token=token)
        page = await store.journal.ScanRuns(request)
        seen += [run.name for run in page.runs]
        token = page.next_page_token
        if not token:
            break
    assert seen == names[::-1]


@pytest.mark.parametrize("token", ["x", "bm9uc2Vuc2U=", "WzFd", "WyJhIiwiYiJd", "WzFlOTksImEiXQ==", "\u00e9"])
async def test_a_made_up_page_token_is_refused(store, token):
    """Whatever is not a token of ours is BAD_PAGE_TOKEN."""
    request = journal_pb2.ScanRunsRequest(tenant="acme", page_token=token)
    assert await reason_of(store.journal.ScanRuns(request)) == "BAD_PAGE_TOKEN"


async def test_tenants_cannot_see_each_others_runs(store):
    """A stranger gets the answer for something that does not exist, and changes nothing."""
    run = await store.new_run("acme")
    stranger, owner = store.tenant("globex"), store.tenant("acme")
    for journal, expected in ((stranger.journal, "RUN_NOT_FOUND"), (owner.journal, "")):
        assert await reason_of(journal.LookupRun(journal_pb2.LookupRunRequest(run=run))) == expected
        claim = journal_pb2.ClaimRunRequest(run=run, holder="w")
        assert await reason_of(journal.ClaimRun(claim)) == expected
    assert await reason_of(stranger.journal.RemoveRun(journal_pb2.RemoveRunRequest(run=run))) == "RUN_NOT_FOUND"
    read = journal_pb2.ReadResultRequest(run=run, seq=1)
    assert await reason_of(stranger.journal.ReadResult(read)) == "RUN_NOT_FOUND"
    scan = journal_pb2.ScanRunsRequest(tenant="acme")
    assert await reason_of(stranger.journal.ScanRuns(scan)) == "PERMISSION_DENIED"


async def test_a_caller_without_the_token_gets_nothing(store):
    """Only services of the deployment reach the store."""
    intruder = type(store)(store.channel, token="guess")
    assert await reason_of(register(intruder)) == "UNAUTHENTICATED"
