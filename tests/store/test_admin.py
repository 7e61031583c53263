"""Tenants, keys, capabilities and workers."""

import stat

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.duration_pb2 import Duration

from tests.store.conftest import reason_of, serve
from treadle.internal.v1 import identity_pb2, workers_pb2
from treadle.v1 import admin_pb2
from treadle_store.__main__ import SERVICES
from treadle_store.clock import to_timestamp
from treadle_store.settings import StoreSettings
from treadle_store.tables import heard_workers, holds, metadata, usage_reporters


def authenticate(store, secret: str):
    return store.identity.Authenticate(identity_pb2.AuthenticateRequest(secret=secret))


async def test_the_first_start_writes_an_admin_key(settings: StoreSettings, clock):
    """The file is for its owner alone, the key works, and later starts leave both."""
    async with serve(settings, clock) as store:
        path = settings.data_dir / "admin.key"
        secret = path.read_text().strip()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        principal = await authenticate(store, secret)
        assert (principal.tenant, list(principal.scopes)) == ("admin", ["admin", "sample", "train"])
    async with serve(settings, clock) as store:
        assert path.read_text().strip() == secret
        assert (await authenticate(store, secret)).tenant == "admin"


async def test_a_key_lives_from_issue_to_revocation(store):
    """Its secret is shown once and says whose it is."""
    admin = store.tenant("admin", "admin").admin
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="acme"))
    made = await admin.CreateKey(admin_pb2.CreateKeyRequest(tenant="acme"))
    assert made.secret.startswith(f"treadle_acme_{made.key.key_id}_")
    principal = await authenticate(store, made.secret)
    assert (principal.tenant, list(principal.scopes), principal.key_id) == (
        "acme",
        ["sample", "train"],
        made.key.key_id,
    )
    listed = await admin.ListKeys(admin_pb2.ListKeysRequest(tenant="acme"))
    assert list(listed.keys) == [made.key]
    assert made.secret not in str(listed)
    await admin.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=made.key.key_id))
    assert await reason_of(authenticate(store, made.secret)) == "UNAUTHENTICATED"
    assert (await admin.ListKeys(admin_pb2.ListKeysRequest())).keys[0].revoked


async def test_a_key_expires(store, clock):
    """After its end it is like an unknown one."""
    admin = store.tenant("admin", "admin").admin
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="acme"))
    request = admin_pb2.CreateKeyRequest(
        tenant="acme", scopes=["sample"], expires=to_timestamp(clock.now_us + 60_000_000)
    )
    made = await admin.CreateKey(request)
    assert list((await authenticate(store, made.secret)).scopes) == ["sample"]
    clock.advance(61)
    assert await reason_of(authenticate(store, made.secret)) == "UNAUTHENTICATED"
    assert await reason_of(admin.CreateKey(request)) == "BAD_VALUE"


@pytest.mark.parametrize("secret", ["", "x", "treadle_a_b", "treadle_acme_12345678_" + "a" * 32, "treadle_a_b_c_d"])
async def test_an_unknown_key_is_refused(store, secret):
    """Whatever it looks like, the answer is the same."""
    assert await reason_of(authenticate(store, secret)) == "UNAUTHENTICATED"


async def test_almost_the_right_secret_is_refused(store, settings):
    """The key id alone opens nothing."""
    secret = (settings.data_dir / "admin.key").read_text().strip()
    wrong = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    assert await reason_of(authenticate(store, wrong)) == "UNAUTHENTICATED"


async def test_bad_requests_have_their_reasons(store):
    """Names, scopes and unknown things."""
    admin = store.tenant("admin", "admin").admin
    assert await reason_of(admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="Bad Name"))) == "BAD_NAME"
    assert await reason_of(admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="admin"))) == "TENANT_EXISTS"
    request = admin_pb2.CreateKeyRequest(tenant="nobody")
    assert await reason_of(admin.CreateKey(request)) == "TENANT_NOT_FOUND"
    request = admin_pb2.CreateKeyRequest(tenant="admin", scopes=["train", "root"])
    assert await reason_of(admin.CreateKey(request)) == "BAD_SCOPE"
    assert await reason_of(admin.RevokeKey(admin_pb2.RevokeKeyRequest(key_id="none"))) == "KEY_NOT_FOUND"


async def test_only_administrators_administer(store):
    """Without the scope `admin` every call but GetCapabilities is refused."""
    admin = store.tenant("acme", "train", "sample").admin
    for call in (
        admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="mine")),
        admin.ListTenants(admin_pb2.ListTenantsRequest()),
        admin.CreateKey(admin_pb2.CreateKeyRequest(tenant="acme")),
        admin.ListKeys(admin_pb2.ListKeysRequest()),
        admin.RevokeKey(admin_pb2.RevokeKeyRequest(key_id="x")),
        admin.ListWorkers(admin_pb2.ListWorkersRequest()),
    ):
        assert await reason_of(call) == "PERMISSION_DENIED"
    assert (await admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest())).tenant == "acme"


async def test_capabilities_merge_the_bases_of_live_workers(store):
    """A base is trainable if a trainer holds it and sampleable if a sampler does."""
    kinds = {"t0": admin_pb2.WORKER_KIND_TRAINER, "s0": admin_pb2.WORKER_KIND_SAMPLER}
    for worker, kind in kinds.items():
        base = admin_pb2.BaseModel(name="treadle/pip", max_context=512, vocab_size=1024)
        beat = workers_pb2.HeartbeatRequest(
            worker=admin_pb2.Worker(worker=worker, kind=kind, base="treadle/pip"), base=base, ttl=Duration(seconds=60)
        )
        await store.workers.Heartbeat(beat)
    told = await store.tenant("acme").admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest())
    (base,) = told.bases
    assert (base.name, base.trainable, base.sampleable, base.vocab_size) == ("treadle/pip", True, True, 1024)
    assert told.version
    assert (told.max_frame_bytes, told.max_operation_bytes) == (2**20, 32 * 2**20)
    assert "cross_entropy" in told.losses
    await store.workers.Unregister(workers_pb2.UnregisterRequest(worker="t0"))
    scanned = await store.workers.ScanWorkers(workers_pb2.ScanWorkersRequest())
    assert [entry.worker.worker for entry in scanned.workers] == ["s0"]
    told = await store.tenant("acme").admin.GetCapabilities(admin_pb2.GetCapabilitiesRequest())
    assert (told.bases[0].trainable, told.bases[0].sampleable) == (False, True)


async def test_workers_are_listed_by_kind_and_base(store):
    """Trainers ask for those that they may hand runs to; the load is as they reported it."""
    trainer, sampler = admin_pb2.WORKER_KIND_TRAINER, admin_pb2.WORKER_KIND_SAMPLER
    for worker, kind, base in (("t0", trainer, "a"), ("t1", trainer, "b"), ("s0", sampler, "a")):
        beat = workers_pb2.HeartbeatRequest(
            worker=admin_pb2.Worker(worker=worker, kind=kind, base=base, load=1.5), ttl=Duration(seconds=60)
        )
        await store.workers.Heartbeat(beat)

    async def listed(**wanted) -> list[tuple[str, float]]:
        answer = await store.workers.ScanWorkers(workers_pb2.ScanWorkersRequest(**wanted))
        return [(entry.worker.worker, entry.worker.load) for entry in answer.workers]

    assert await listed(kind=trainer, base="a") == [("t0", 1.5)]
    assert await listed(base="a") == [("s0", 1.5), ("t0", 1.5)]
    assert await listed(kind=trainer) == [("t0", 1.5), ("t1", 1.5)]
    assert await listed(base="c") == []


async def test_bad_heartbeats_are_refused(store):
    """A worker has a name, a kind and a time to live."""
    kind = admin_pb2.WORKER_KIND_TRAINER
    second = Duration(seconds=1)
    for worker, ttl, reason in [
        (admin_pb2.Worker(kind=kind), second, "BAD_NAME"),
        (admin_pb2.Worker(worker="t"), second, "BAD_VALUE"),
        (admin_pb2.Worker(worker="t", kind=kind), Duration(), "BAD_VALUE"),
    ]:
        assert await reason_of(store.workers.Heartbeat(workers_pb2.HeartbeatRequest(worker=worker, ttl=ttl))) == reason


async def test_the_keys_of_open_calls_are_checked_together(store, clock):
    """Revoked, expired and unknown ones have ended; the others have not."""
    admin = store.tenant("admin", "admin").admin
    await admin.CreateTenant(admin_pb2.CreateTenantRequest(tenant="acme"))
    soon = to_timestamp(clock.now_us + 60_000_000)
    kept, revoked = [(await admin.CreateKey(admin_pb2.CreateKeyRequest(tenant="acme"))).key.key_id for _ in range(2)]
    expiring = (await admin.CreateKey(admin_pb2.CreateKeyRequest(tenant="acme", expires=soon))).key.key_id
    asked = identity_pb2.CheckKeysRequest(key_ids=[kept, revoked, expiring, "nobodys"])
    assert list((await store.identity.CheckKeys(asked)).ended_key_ids) == ["nobodys"]
    await admin.RevokeKey(admin_pb2.RevokeKeyRequest(key_id=revoked))
    clock.advance(61)
    assert list((await store.identity.CheckKeys(asked)).ended_key_ids) == [revoked, expiring, "nobodys"]
    too_many = identity_pb2.CheckKeysRequest(key_ids=["k"] * 1001)
    assert await reason_of(store.identity.CheckKeys(too_many)) == "BAD_VALUE"


def test_the_tenant_is_part_of_every_key_of_tenant_data():
    """Whatever forgets to ask for the tenant then finds nothing instead of somebody else's."""
    # Who reports use, who takes a backup and which workers live is no tenant's.
    for table in set(metadata.sorted_tables) - {usage_reporters, holds, heard_workers}:
        assert (table.name, next(iter(table.primary_key.columns)).name) == (table.name, "tenant")


@pytest.mark.parametrize("service", SERVICES)
async def test_no_method_of_the_store_answers_without_the_internal_token(store, service):
    """Enumerated from the descriptors: neither a user's key nor what a caller says of himself opens it."""
    descriptor = descriptor_pool.Default().FindServiceByName(service)
    forged = (("authorization", "Bearer nonsense"), ("x-treadle-tenant", "acme"), ("x-treadle-scopes", "admin"))
    for method in descriptor.methods:
        for headers in ((), forged):
            call = store.channel.stream_stream(f"/{service}/{method.name}")(iter([b""]), metadata=headers)
            assert (method.name, await reason_of(call)) == (method.name, "UNAUTHENTICATED")
