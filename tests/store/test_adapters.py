"""Saved adapters: push, pull, list, delete, start a run from one."""

import hashlib
import json
import struct

from tests.store.conftest import blob_chunks, entry, reason_of
from treadle.internal.v1 import journal_pb2
from treadle.v1 import adapters_pb2, training_pb2, types_pb2

RANK = 4
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "base_model_name_or_path": "/models/Pip", "bias": "none"}
A, B = "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def config(**changes: object) -> bytes:
    return json.dumps({**CONFIG, **changes}).encode()


def header_of(**changes: dict[str, object]) -> dict[str, dict[str, object]]:
    return {
        A: {"dtype": "F32", "shape": [RANK, 8], "data_offsets": [0, 128], **changes.get("a", {})},
        B: {"dtype": "F32", "shape": [8, RANK], "data_offsets": [128, 256], **changes.get("b", {})},
    }


def weights(header: object = None, num_data_bytes: int = 256) -> bytes:
    text = json.dumps(header_of() if header is None else header).encode()
    return (
        struct.pack("<Q", len(text)) + text + bytes(range(256)) * (num_data_bytes // 256) + bytes(num_data_bytes % 256)
    )


def files(**contents: bytes) -> dict[str, bytes]:
    return {CONFIG_FILE: contents.get("config", config()), WEIGHTS_FILE: contents.get("weights", weights())}


def push_frames(run: str, revision: str, contents: dict[str, bytes]) -> list[adapters_pb2.PushAdapterRequest]:
    frames = [adapters_pb2.PushAdapterRequest(header=adapters_pb2.PushHeader(run=run, revision_id=revision))]
    for path, content in contents.items():
        file = adapters_pb2.AdapterFile(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        frames.append(adapters_pb2.PushAdapterRequest(file=file))
        for chunk in blob_chunks(content, 100):
            piece = adapters_pb2.FileChunk(data=chunk.data, crc32c=chunk.crc32c)
            frames.append(adapters_pb2.PushAdapterRequest(chunk=piece))
    return frames


def push(store, run: str, revision: str = "v1", contents: dict[str, bytes] | None = None):
    return store.adapters.PushAdapter(iter(push_frames(run, revision, files() if contents is None else contents)))


def get(store, name: str):
    return store.adapters.GetRevision(adapters_pb2.GetRevisionRequest(name=name))


async def pull(store, name: str) -> dict[str, bytes]:
    received: dict[str, bytes] = {}
    async for frame in store.adapters.PullAdapter(adapters_pb2.PullAdapterRequest(name=name)):
        if frame.WhichOneof("frame") == "file":
            path = frame.file.path
            received[path] = b""
        elif frame.WhichOneof("frame") == "chunk":
            received[path] += frame.chunk.data
    return received


async def save(store, run: str, epoch: int, name: str, content: bytes = b"bits", *, seq: int = 1) -> str:
    """Records an adapter as a trainer does; returns the reason if it was refused."""
    file = adapters_pb2.AdapterFile(path=WEIGHTS_FILE, size=len(content), sha256=await store.put_blob(content))
    adapter = adapters_pb2.Adapter(
        name=name, base="treadle/pip", lora=types_pb2.LoraConfig(rank=RANK, alpha=32, seed=7), step=3, files=[file]
    )
    request = journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=seq)
    return await reason_of(store.journal.RecordAdapter(request))


async def test_what_is_pushed_is_pulled(store):
    """The files come back byte for byte; a repeat is harmless; other content under the name is refused."""
    acme, run = store.tenant("acme"), await store.new_run()
    answer = await push(acme, run)
    assert answer.revision.name == f"{run}/revisions/v1"
    assert (answer.revision.base, answer.revision.lora.rank) == ("treadle/pip", RANK)
    assert await pull(acme, answer.revision.name) == files()
    assert (await push(acme, run)).revision == answer.revision
    other = files(config=config(lora_alpha=32.0))
    assert await reason_of(push(acme, run, "v1", other)) == "ADAPTER_EXISTS"
    assert (await get(acme, answer.revision.name)).revision == answer.revision


BAD_FILES = [
    {CONFIG_FILE: config()},
    {WEIGHTS_FILE: weights()},
    {**files(), "adapter_model.bin": b"pickle"},
    {**files(), "../../evil": b""},
    files(config=b"not json"),
    files(config=b"[" * 100_000),
    files(config=b"[]"),
    files(config=b"\xff\xfe"),
    files(config=config(peft_type="IA3")),
    files(config=config(r=8)),
    files(config=config(r="4")),
    files(config=config(lora_alpha=16)),
    files(config=config(lora_alpha=None)),
    files(config=config(lora_alpha=float("nan"))),
    files(config=config(use_dora=True)),
    files(config=config(use_rslora=True)),
    files(config=config(bias="all")),
    files(config=config(rank_pattern={"q_proj": 8})),
    files(config=config(modules_to_save=["lm_head"])),
    files(config=config(base_model_name_or_path="org/another-base")),
    files(config=config(pad="x" * 2**20)),
    files(weights=b""),
    files(weights=b"short"),
    files(weights=b"\xff" * 64),
    files(weights=weights()[:-1]),
    files(weights=weights() + b"x"),
    files(weights=weights([1])),
    files(weights=weights({"__metadata__": {}}, 0)),
    files(weights=weights({A: header_of()[A]}, 128)),
    files(weights=weights(header_of(a={"shape": [8, 8]}))),
    files(weights=weights(header_of(a={"shape": [RANK, 9]}))),
    files(weights=weights(header_of(a={"shape": [RANK, 8, 1]}))),
    files(weights=weights(header_of(a={"shape": [RANK, -8]}))),
    files(weights=weights(header_of(a={"shape": None}))),
    files(weights=weights(header_of(a={"dtype": "I64"}))),
    files(weights=weights(header_of(a={"dtype": ["F32"]}))),
    files(weights=weights(header_of(a={"data_offsets": [0, 10**9]}))),
    files(weights=weights(header_of(b={"data_offsets": [0, 128]}))),
    files(weights=weights({**header_of(), "base_model.model.embed.weight": {}})),
    files(weights=weights({**header_of(), A: 3})),
]


async def test_a_bad_adapter_is_refused(store):
    """Whatever does not belong to the run, or is not a LoRA in safetensors, is BAD_ADAPTER_FILE."""
    acme, run = store.tenant("acme"), await store.new_run()
    for contents in BAD_FILES:
        assert (await reason_of(push(acme, run, "v1", contents)), contents) == ("BAD_ADAPTER_FILE", contents)
    assert await reason_of(get(acme, f"{run}/revisions/v1")) == "ADAPTER_NOT_FOUND"


async def test_bad_push_streams_are_refused(store):
    """Damage on the way, frames out of order and bad names each have their reason."""
    acme, run = store.tenant("acme"), await store.new_run()
    damaged = push_frames(run, "v1", files())
    damaged[2].chunk.crc32c ^= 1
    lying = push_frames(run, "v1", files())
    lying[1].file.sha256 = "0" * 64
    cut = push_frames(run, "v1", files())[:-1]
    for frames, reason in [
        (damaged, "CHECKSUM_MISMATCH"),
        (lying, "CHECKSUM_MISMATCH"),
        (cut, "FRAME_SIZE_MISMATCH"),
        ([], "BAD_FRAME"),
        (cut[1:], "BAD_FRAME"),
        (cut[:1] + cut[2:], "BAD_FRAME"),
        (push_frames(run, "", files()), "BAD_NAME"),
        (push_frames(run, "../x", files()), "BAD_NAME"),
        (push_frames("tenants/acme/runs/none", "v1", files()), "RUN_NOT_FOUND"),
        (push_frames(run, "v1", {CONFIG_FILE: config()})[:2] * 2, "FRAME_SIZE_MISMATCH"),
    ]:
        assert await reason_of(acme.adapters.PushAdapter(iter(frames))) == reason


async def test_adapters_are_listed_newest_first_page_by_page(store):
    """By run or for all runs; revisions and checkpoints apart; other tenants' never."""
    acme = store.tenant("acme")
    first, second, foreign = await store.new_run(), await store.new_run(), await store.new_run("globex")
    names = []
    for run, kind, seq in [(first, "revisions", 1), (second, "revisions", 1), (first, "revisions", 2)]:
        names.append(f"{run}/{kind}/s{seq}")
        assert await save(store, run, await store.claim(run), names[-1], seq=seq) == ""
    await save(store, first, await store.claim(first), f"{first}/checkpoints/c", seq=3)
    await save(store, foreign, await store.claim(foreign), f"{foreign}/revisions/v")
    seen, token = [], ""
    for _ in names:
        page = await acme.adapters.ListRevisions(adapters_pb2.ListRevisionsRequest(page_size=1, page_token=token))
        seen += [adapter.name for adapter in page.revisions]
        token = page.next_page_token
    assert (seen, token) == (names[::-1], "")
    of_run = await acme.adapters.ListRevisions(adapters_pb2.ListRevisionsRequest(run=second))
    assert [adapter.name for adapter in of_run.revisions] == [names[1]]
    checkpoints = await acme.adapters.ListCheckpoints(adapters_pb2.ListCheckpointsRequest())
    assert [adapter.name for adapter in checkpoints.checkpoints] == [f"{first}/checkpoints/c"]
    assert not (await acme.adapters.ListRevisions(adapters_pb2.ListRevisionsRequest(run=foreign))).revisions
    bad = adapters_pb2.ListRevisionsRequest(page_token="?")
    assert await reason_of(acme.adapters.ListRevisions(bad)) == "BAD_PAGE_TOKEN"


async def test_a_save_is_recorded_once(store):
    """The same save, or the same content, is harmless; anything else under the name is refused."""
    run = await store.new_run()
    epoch = await store.claim(run)
    name = f"{run}/revisions/v1"
    assert await save(store, run, epoch, name) == ""
    assert await save(store, run, epoch, name, seq=9) == ""
    assert await save(store, run, epoch, name, b"replayed with other rounding") == ""
    assert await save(store, run, epoch, name, b"other", seq=9) == "ADAPTER_EXISTS"
    assert await save(store, run, epoch + 1, f"{run}/revisions/v2") == "STALE_LEASE"
    assert await save(store, run, epoch, "tenants/acme/runs/other/revisions/v1") == "BAD_NAME"
    absent = adapters_pb2.AdapterFile(path=WEIGHTS_FILE, size=1, sha256="0" * 64)
    adapter = adapters_pb2.Adapter(name=f"{run}/revisions/v3", base="treadle/pip", files=[absent])
    request = journal_pb2.RecordAdapterRequest(run=run, epoch=epoch, adapter=adapter, seq=2)
    assert await reason_of(store.journal.RecordAdapter(request)) == "BLOB_NOT_FOUND"


async def test_tenants_cannot_see_each_others_adapters(store):
    """Not-yours and not-found are one answer on every call."""
    run = await store.new_run("acme")
    name = f"{run}/revisions/v1"
    await save(store, run, await store.claim(run), name)
    stranger = store.tenant("globex")
    delete = adapters_pb2.DeleteRevisionRequest(name=name)
    assert await reason_of(get(stranger, name)) == "ADAPTER_NOT_FOUND"
    assert await reason_of(stranger.adapters.DeleteRevision(delete)) == "ADAPTER_NOT_FOUND"
    pulling = stranger.adapters.PullAdapter(adapters_pb2.PullAdapterRequest(name=name))
    assert await reason_of(pulling) == "ADAPTER_NOT_FOUND"
    assert await reason_of(push(stranger, run)) == "RUN_NOT_FOUND"
    start = training_pb2.CreateRunRequest(base="treadle/pip", from_adapter=name)
    register = journal_pb2.RegisterRunRequest(tenant="globex", run=start)
    assert await reason_of(store.journal.RegisterRun(register)) == "ADAPTER_NOT_FOUND"
    assert (await get(store.tenant("acme"), name)).revision.name == name


async def test_a_run_takes_its_shape_from_the_adapter_it_starts_from(store):
    """The adapter's base and LoRA config hold; a contradiction is refused."""
    run = await store.new_run()
    name = f"{run}/checkpoints/c1"
    await save(store, run, await store.claim(run), name)

    def start(**fields: object):
        request = training_pb2.CreateRunRequest(from_adapter=name, **{"base": "treadle/pip", **fields})
        return store.journal.RegisterRun(journal_pb2.RegisterRunRequest(tenant="acme", run=request))

    made = (await start()).run
    assert (made.lora.rank, made.lora.alpha, made.lora.seed) == (RANK, 32.0, 7)
    assert (await start(lora=types_pb2.LoraConfig(rank=RANK))).run.lora == made.lora
    claimed = await store.journal.ClaimRun(journal_pb2.ClaimRunRequest(run=made.name, holder="t"))
    assert claimed.from_adapter == name
    assert await reason_of(start(base="another")) == "INCOMPATIBLE_ADAPTER"
    assert await reason_of(start(lora=types_pb2.LoraConfig(rank=8))) == "INCOMPATIBLE_ADAPTER"
    assert await reason_of(start(lora=types_pb2.LoraConfig(rank=RANK, skip_mlp=True))) == "INCOMPATIBLE_ADAPTER"


async def test_a_deleted_adapter_is_gone_but_not_for_the_run_that_needs_it(store):
    """Users see it no more; a trainer can still rebuild a run that started from it and has no snapshot yet."""
    acme, run = store.tenant("acme"), await store.new_run()
    name = f"{run}/revisions/v1"
    await save(store, run, await store.claim(run), name)
    child = await store.new_run(from_adapter=name, lora=types_pb2.LoraConfig())
    delete = adapters_pb2.DeleteRevisionRequest(name=name)
    await acme.adapters.DeleteRevision(delete)
    assert await reason_of(get(acme, name)) == "ADAPTER_NOT_FOUND"
    assert await reason_of(acme.adapters.DeleteRevision(delete)) == "ADAPTER_NOT_FOUND"
    lookup = journal_pb2.LookupAdapterRequest(name=name)
    assert (await store.journal.LookupAdapter(lookup)).adapter.name == name
    assert await save(store, run, await store.claim(run), name, b"new", seq=5) == "ADAPTER_EXISTS"
    epoch = await store.claim(child)
    await store.write(entry(child, epoch, [1], [1]))
    saved = journal_pb2.Snapshot(seq=1, sha256=await store.put_blob(b"state"), size=5)
    await store.journal.WriteSnapshot(journal_pb2.WriteSnapshotRequest(run=child, epoch=epoch, snapshot=saved))
    assert await reason_of(store.journal.LookupAdapter(lookup)) == "ADAPTER_NOT_FOUND"
    assert await save(store, run, await store.claim(run), name, b"new", seq=5) == ""


async def test_kinds_are_not_mixed_up(store):
    """A checkpoint's name is no revision's name."""
    acme, run = store.tenant("acme"), await store.new_run()
    await save(store, run, await store.claim(run), f"{run}/checkpoints/c1")
    assert await reason_of(get(acme, f"{run}/checkpoints/c1")) == "BAD_NAME"
    request = adapters_pb2.GetCheckpointRequest(name=f"{run}/checkpoints/c1")
    assert (await acme.adapters.GetCheckpoint(request)).checkpoint.step == 3
    await acme.adapters.DeleteCheckpoint(adapters_pb2.DeleteCheckpointRequest(name=request.name))
    assert await reason_of(acme.adapters.GetCheckpoint(request)) == "ADAPTER_NOT_FOUND"


async def test_a_public_adapter_is_read_by_all_and_changed_by_its_owner_alone(store):
    """Once its owner says so, until the owner takes it back; the answer to others is that for none."""
    acme, zen, run = store.tenant("acme"), store.tenant("zen"), await store.new_run()
    name = (await push(acme, run)).revision.name
    anywhere = name.replace("tenants/acme/", "tenants/-/")

    def reads():
        lookup = journal_pb2.LookupAdapterRequest(name=name)
        return [get(zen, name), get(zen, anywhere), zen.journal.LookupAdapter(lookup), pull(zen, name)]

    async def start(request_id: str) -> str:
        wanted = training_pb2.CreateRunRequest(from_adapter=name, request_id=request_id)
        return await reason_of(zen.journal.RegisterRun(journal_pb2.RegisterRunRequest(tenant="zen", run=wanted)))

    async def set_public(caller, *, public: bool) -> str:
        return await reason_of(
            caller.adapters.SetAdapterPublic(adapters_pb2.SetAdapterPublicRequest(name=name, public=public))
        )

    assert [await reason_of(read) for read in reads()] == ["ADAPTER_NOT_FOUND"] * 4
    assert await set_public(zen, public=True) == "ADAPTER_NOT_FOUND"
    assert not (await get(acme, anywhere)).revision.public
    assert await set_public(acme, public=True) == ""
    assert [await reason_of(read) for read in reads()] == [""] * 4
    assert (await get(zen, anywhere)).revision.name == name
    assert await pull(zen, name) == files()
    assert await start("while it was public") == ""
    own = await store.new_run("zen")
    copied = await zen.adapters.CopyAdapter(adapters_pb2.CopyAdapterRequest(source=name, run=own, adapter_id="mine"))
    assert (copied.adapter.name, copied.adapter.public) == (f"{own}/revisions/mine", False)
    for change in (
        zen.adapters.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=name)),
        zen.adapters.SetAdapterTtl(adapters_pb2.SetAdapterTtlRequest(name=name)),
        zen.adapters.CopyAdapter(adapters_pb2.CopyAdapterRequest(source=name, run=run, adapter_id="x")),
        push(zen, run, "v1"),
    ):
        assert await reason_of(change) in ("ADAPTER_NOT_FOUND", "RUN_NOT_FOUND")
    assert await set_public(acme, public=False) == ""
    assert [await reason_of(read) for read in reads()] == ["ADAPTER_NOT_FOUND"] * 4
    assert await start("when it was taken back") == "ADAPTER_NOT_FOUND"
    # What others made of it while they could stays theirs: the copy, and the run that has no snapshot of its own yet.
    assert await pull(zen, copied.adapter.name) == files()
    await acme.adapters.DeleteRevision(adapters_pb2.DeleteRevisionRequest(name=name))
    assert await reason_of(store.journal.LookupAdapter(journal_pb2.LookupAdapterRequest(name=name))) == ""


async def test_a_name_without_tenant_means_ones_own_first_and_is_never_guessed(store):
    """Two public adapters of two tenants under one id: who has neither gets none."""
    names = []
    for tenant in ("acme", "zen"):
        run = await store.new_run(tenant, run_id="r-same", request_id=tenant)
        names.append((await push(store.tenant(tenant), run)).revision.name)
        public = adapters_pb2.SetAdapterPublicRequest(name=names[-1], public=True)
        await store.tenant(tenant).adapters.SetAdapterPublic(public)
    anywhere = "tenants/-/runs/r-same/revisions/v1"
    assert [(await get(store.tenant(t), anywhere)).revision.name for t in ("acme", "zen")] == names
    assert await reason_of(get(store.tenant("third"), anywhere)) == "ADAPTER_NOT_FOUND"
