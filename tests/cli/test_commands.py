"""Commands against a real gateway and store."""

import asyncio
import json
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.gateway.conftest import BASE, TOKEN, Front, bearer
from treadle.cli import COMMANDS
from treadle.cli.lazy import LazyGroup
from treadle.cli.settings import UpFile
from treadle.internal.v1 import journal_pb2, journal_pb2_grpc
from treadle.recipes.configs import SftConfig
from treadle.recipes.examples import messages_of
from treadle.recipes.rows import read_rows
from treadle.v1 import datasets_pb2, datasets_pb2_grpc, training_pb2
from treadle_service.channels import internal_metadata


async def treadle(front: Front, *arguments: str, **environment: str) -> Result:
    """Runs the command line in a thread: the gateway lives in this loop."""
    (front.folder / "up.json").write_text(json.dumps({"gateway": front.gateway.address}))
    line = [*arguments, "--data-dir", str(front.folder)]
    return await asyncio.to_thread(CliRunner().invoke, LazyGroup(COMMANDS), line, env=environment)


async def rows(front: Front, *arguments: str, **environment: str) -> list[dict]:
    done = await treadle(front, *arguments, "-f", "json", **environment)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def test_a_key_is_made_listed_and_revoked(front: Front) -> None:
    """On the same machine no address and no key need be given; the tenant is made on the way."""
    made = await treadle(front, "key", "create", "acme", "--scope", "train")
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("treadle_acme_")
    second = await rows(front, "key", "create", "acme")
    assert (second["scopes"], second["expires"]) == (["sample", "train"], None)
    listed = await rows(front, "key", "list", "--tenant", "acme")
    assert [key["scopes"] for key in listed] == [["train"], ["sample", "train"]]
    await rows(front, "key", "revoke", listed[0]["key_id"])
    assert [key["revoked"] for key in await rows(front, "key", "list", "--tenant", "acme")] == [True, False]
    assert {row["tenant"] for row in await rows(front, "tenant", "list")} == {"acme", "admin"}
    lasting = await rows(front, "key", "create", "acme", "--days", "30")
    days = datetime.fromisoformat(lasting["expires"]) - datetime.fromisoformat(lasting["created"])
    assert round(days.total_seconds() / 86_400) == 30


async def test_kept_completions_are_listed_exported_and_deleted(front: Front, tmp_path: Path) -> None:
    """As rows of a fine-tuning, one per choice; answers that were cut short are left out unless asked for."""
    await front.tenant("acme", "train")
    assert (await treadle(front, "tenant", "consent", "acme")).exit_code == 2
    await rows(front, "tenant", "consent", "acme", "--store-completions")
    assert {row["tenant"]: row["store_completions"] for row in await rows(front, "tenant", "list")}["acme"]
    key = (await rows(front, "key", "create", "acme"))["secret"]
    stub = datasets_pb2_grpc.DatasetServiceStub(front.channel)
    for number, reason in enumerate(("stop", "length", "stop")):
        choice = {"index": 0, "message": {"role": "assistant", "content": f"No {number}é"}, "finish_reason": reason}
        kept = datasets_pb2.StoredCompletion(
            model=BASE,
            messages_json=json.dumps([{"role": "user", "content": "Hi"}]),
            response_json=json.dumps({"choices": [choice, choice | {"index": 1}]}),
            metadata={"n": str(number)},
        )
        await stub.CreateCompletion(datasets_pb2.CreateCompletionRequest(completion=kept), metadata=bearer(key))
    listed = await rows(front, "dataset", "list", "--key", key)
    assert [(row["model"], row["metadata"]) for row in listed] == [(BASE, {"n": str(n)}) for n in range(3)]
    file = tmp_path / "data.jsonl"
    assert await rows(front, "dataset", "export", str(file), "--key", key) == {
        "file": str(file),
        "conversations": 4,
        "cut": 2,
    }
    config = SftConfig(data=str(file))
    conversations = [messages_of(row, config) for row in read_rows(config)]
    assert conversations[2] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No 2é"}]
    assert (await treadle(front, "dataset", "export", str(file), "--key", key)).exit_code == 1
    one = tmp_path / "one.jsonl"
    await rows(front, "dataset", "export", str(one), "--metadata", "n=1", "--with-cut", "--key", key)
    assert len(one.read_text().splitlines()) == 2
    assert (await treadle(front, "dataset", "delete", "--key", key)).exit_code == 2
    assert await rows(front, "dataset", "delete", "--metadata", "n=1", "--key", key) == {"deleted": 1}
    assert await rows(front, "dataset", "delete", listed[0]["completion"], "--key", key) == {"deleted": 1}
    assert (await treadle(front, "dataset", "delete", listed[0]["completion"], "--key", key)).exit_code == 1
    assert await rows(front, "dataset", "delete", "--all", "--key", key) == {"deleted": 1}
    assert (await rows(front, "dataset", "list", "--key", key)) == []


async def test_a_quota_is_set_limit_by_limit(front: Front) -> None:
    """What is not given stays, `none` lifts a limit, a table says so in words."""
    await front.tenant("acme", "train")
    quota = ("tenant", "quota", "acme")
    assert set((await rows(front, *quota)).values()) == {"acme", None}
    await rows(front, *quota, "--max-runs", "3", "--training-tokens-per-minute", "60000")
    found = await rows(front, *quota, "--max-runs", "none", "--max-stored-bytes", "0")
    assert (found["max_runs"], found["training_tokens_per_minute"], found["max_stored_bytes"]) == (None, 60_000, 0)
    assert "no limit" in (await treadle(front, *quota)).stdout
    refused = await treadle(front, *quota, "--max-runs", "-1")
    assert refused.exit_code == 2
    assert "TENANT_NOT_FOUND" in (await treadle(front, "tenant", "quota", "nobody")).output


async def test_usage_is_shown_to_its_tenant_and_to_administrators(front: Front) -> None:
    """By run with a total, as a table and as JSON; another tenant's needs an admin key."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    internal = internal_metadata(TOKEN)
    journal = journal_pb2_grpc.JournalServiceStub(front.store_channel)
    claim = journal_pb2.ClaimRunRequest(run=run, holder="t", address="h:1")
    epoch = (await journal.ClaimRun(claim, metadata=internal)).lease.epoch
    entry = journal_pb2.JournalEntry(run=run, epoch=epoch)
    entry.appends.add(seq=1, digest=1, payload=b"op")
    entry.commits.add(seq=1, result=b"done", num_tokens=321, device_us=1_500_000)
    await journal.WriteJournal(journal_pb2.WriteJournalRequest(entries=[entry]), metadata=internal)
    own = {"TREADLE_API_KEY": key[0][1].removeprefix("Bearer ")}
    for line, environment in ((("usage",), own), (("usage", "--tenant", "acme"), {})):
        found = await rows(front, *line, **environment)
        assert found["by_run"] == [{"run": run, **found["total"]}]
        assert (found["total"]["training_tokens"], found["total"]["device_seconds"]) == (321, 1.5)
        assert (found["tenant"], found["runs"], found["active_runs"]) == ("acme", 1, 1)
    assert run in (await treadle(front, "usage", **own)).stdout
    past = await rows(front, "usage", "--until", "2020-01-01", **own)
    assert (past["total"]["training_tokens"], past["by_run"]) == (0, [])
    assert "PERMISSION_DENIED" in (await treadle(front, "usage", "--tenant", "admin", **own)).output


async def test_runs_are_listed_shown_and_deleted(front: Front) -> None:
    """With the key of their tenant, from the environment."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    environment = {"TREADLE_API_KEY": key[0][1].removeprefix("Bearer ")}
    assert [row["run"] for row in await rows(front, "run", "list", **environment)] == [run]
    assert (await rows(front, "run", "show", run, **environment))["base"] == BASE
    table = await treadle(front, "run", "list", **environment)
    assert run in table.stdout
    await rows(front, "run", "delete", run, **environment)
    assert (await treadle(front, "run", "list", **environment)).stdout == "no runs\n"
    assert await rows(front, "adapter", "list", **environment) == []
    assert [row["worker"] for row in await rows(front, "worker", "list")] == ["trainer-0"]


async def test_a_run_shows_its_newest_step(front: Front) -> None:
    """With the metrics that the service recorded."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    environment = {"TREADLE_API_KEY": key[0][1].removeprefix("Bearer ")}
    assert (await rows(front, "run", "show", run, **environment))["step"] == 0
    await front.claim(run, "trainer-0", "127.0.0.1:1")
    step = journal_pb2.StepMetrics(step=7, values={"loss:sum": 2.5, "grad_norm:mean": 1 / 3})
    entry = journal_pb2.JournalEntry(
        run=run,
        epoch=1,
        appends=[journal_pb2.JournalAppend(seq=1)],
        commits=[journal_pb2.JournalCommit(seq=1, result=b"result", metrics=step)],
    )
    write = journal_pb2.WriteJournalRequest(entries=[entry])
    await journal_pb2_grpc.JournalServiceStub(front.store_channel).WriteJournal(
        write, metadata=internal_metadata(TOKEN)
    )
    shown = await rows(front, "run", "show", run, **environment)
    assert (shown["step"], shown["metrics"]) == (7, {"grad_norm:mean": 0.333333, "loss:sum": 2.5})


async def test_a_diverged_run_shows_both_digests(front: Front) -> None:
    """`treadle run show` says at which operation a replay differed, and how."""
    await front.add_peer()
    key = await front.tenant("acme", "train")
    run = await front.new_run(key)
    await front.claim(run, "trainer-0", "127.0.0.1:1")
    found = training_pb2.Divergence(seq=4, recorded_digest=b"\x01\x02", replayed_digest=b"\x03", message="differs")
    mark = journal_pb2.MarkDivergedRequest(run=run, epoch=1, divergence=found)
    await journal_pb2_grpc.JournalServiceStub(front.store_channel).MarkDiverged(mark, metadata=internal_metadata(TOKEN))
    environment = {"TREADLE_API_KEY": key[0][1].removeprefix("Bearer ")}
    assert [row["state"] for row in await rows(front, "run", "list", **environment)] == ["diverged"]
    shown = await rows(front, "run", "show", run, **environment)
    assert (shown["diverged_at"], shown["recorded_digest"], shown["replayed_digest"]) == (4, "0102", "03")
    assert shown["divergence"] == "differs"


async def test_an_error_is_one_line_with_its_reason(front: Front) -> None:
    """And exit code 1; no traceback."""
    done = await treadle(front, "run", "show", "tenants/admin/runs/none")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: there is no run")
    assert "[RUN_NOT_FOUND]" in done.stderr
    assert "Traceback" not in done.output


async def test_an_unreachable_gateway_is_named(front: Front) -> None:
    """With its address."""
    done = await treadle(front, "tenant", "list", "--address", "127.0.0.1:9")
    assert done.exit_code == 1
    assert "127.0.0.1:9" in done.stderr


def test_without_any_key_the_command_says_where_to_get_one(tmp_path: Path) -> None:
    """Before anything is called."""
    done = CliRunner().invoke(LazyGroup(COMMANDS), ["run", "list", "--data-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert "TREADLE_API_KEY" in done.output


@pytest.mark.parametrize("content", ["", "{", "[]", '{"gateway": "h:1"}'])
def test_a_broken_up_file_does_no_harm(tmp_path: Path, content: str) -> None:
    """It is only a hint."""
    from treadle.cli.settings import DEFAULT_ADDRESS, gateway_address

    (tmp_path / "up.json").write_text(content)
    assert gateway_address(tmp_path) == ("h:1" if "h:1" in content else DEFAULT_ADDRESS)


def test_the_up_file_round_trips(tmp_path: Path) -> None:
    """Written whole or not at all; no scratch file stays."""
    from treadle.cli.settings import gateway_address

    up = UpFile("127.0.0.1:7", "pip", "k", 1, {"store": 2}, {"store": "127.0.0.1:8"})
    up.write(tmp_path / "up.json")
    assert gateway_address(tmp_path) == "127.0.0.1:7"
    assert [path.name for path in tmp_path.iterdir()] == ["up.json"]
