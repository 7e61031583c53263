"""The dashboard in a headless browser: from a file to an adapter, and the timeline."""

import io
import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.dashboard.conftest import Browser, fetch, write_rows
from tests.recipes.conftest import Remembering
from tests.support.cluster import Cluster
from treadle import AdamParams, Datum, ModelInput, ServiceClient
from treadle.recipes.configs import SftConfig
from treadle.recipes.job import StoppedError
from treadle.recipes.sft import sft
from treadle.records import Span
from treadle_engine import bases


@pytest.fixture(scope="module", autouse=True)
def interrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """A key, its run that stopped in the middle, and the file; made first, since a page waits before it says so."""
    key, file = cluster.new_tenant(), write_rows(tmp_path_factory.mktemp("interrupted") / "rows.jsonl")
    config = SftConfig(data=str(file), epochs=3.0, batch_size=4, rank=4, checkpoint_every=5, num_samples=0)
    observer = Remembering(stop_after=7)
    with ServiceClient(cluster.gateway_address, key) as service, pytest.raises(StoppedError):
        sft(service, config, observer)
    return key, observer.run, file


def logits(folder: Path | None) -> torch.Tensor:
    """Returns what plain transformers and peft compute for a few tokens, with an adapter or without."""
    model = transformers.AutoModelForCausalLM.from_pretrained(bases.pip_folder(), dtype=torch.float32)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_run_starts_from_the_form_moves_and_is_taken_home(cluster: Cluster, browser: Browser, tmp_path: Path) -> None:
    """Without a program: a file, a button, a curve that grows, an archive that peft loads."""
    key = cluster.new_tenant()
    browser.log_in(key)
    assert "No runs yet." in browser.text
    browser.find("a", "Start a run").click()
    browser.find("input[type=file]").send_keys(str(write_rows(tmp_path / "rows.jsonl")))
    browser.until(lambda: "rows.jsonl" in browser.text)
    for setting, value in (("name", "numbers"), ("epochs", "6"), ("batch_size", "4"), ("rank", "4")):
        browser.fill(setting, value)
    browser.find("button", "Start").click()
    browser.find("a.mono", "r-").click()
    browser.until(lambda: browser.path.startswith("/runs/"))
    before = browser.until(lambda: browser.curves("loss").get("loss"))
    after = browser.until(lambda: (now := browser.curves("loss")["loss"]) and len(now) > len(before) and now)
    assert after[: len(before)] == before
    browser.until(lambda: "finished" in browser.text)
    with ServiceClient(cluster.gateway_address, key) as service:
        last = service.list_runs()[0].latest.step
    losses = browser.until(lambda: (now := browser.curves("loss")["loss"]) and now[-1][0] == last and now)
    assert np.mean([loss for _, loss in losses[-5:]]) < 0.5 * losses[0][1]
    assert browser.curves("learning rate")
    assert browser.curves("grad norm")
    link = browser.until(lambda: browser.find("a[href$='/final.zip']")).get_attribute("href")
    assert browser.complaints() == []
    # What the link gives is a PEFT folder that changes what the base says.
    archive = fetch(cluster, link.removeprefix(browser.address), key)
    assert archive.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(archive.content)) as unpacked:
        assert unpacked.testzip() is None
        unpacked.extractall(tmp_path / "home")
    (folder,) = (tmp_path / "home").iterdir()
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not torch.allclose(logits(folder), logits(None), atol=1e-3)
    browser.open("/")
    browser.until(lambda: "numbers" in browser.text and "finished" in browser.text)


def work(cluster: Cluster, key: str, ended: threading.Event) -> None:
    """Trains small steps, a few ahead, until told to stop."""
    tokens = np.tile([1, 5, 9, 5], 10)
    data = [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(39)})]
    with ServiceClient(cluster.gateway_address, key) as service:
        client = service.create_lora_training_client("treadle/pip", rank=4)
        steps = []
        while not ended.is_set():
            client.forward_backward(data, "cross_entropy")
            steps.append(client.optim_step(AdamParams(learning_rate=1e-3)))
            if len(steps) > 3:
                steps.pop(0).result(120)


_LANES = """
const e = document.querySelector('.nicegui-echart'); const chart = e && getElement(parseInt(e.id.slice(1))).chart;
return chart ? chart.getOption().series.map((series) => [series.name, series.data.length]) : [];
"""


def test_the_timeline_fills_and_shows_a_tenant_itself_and_other(cluster: Cluster, browser: Browser) -> None:
    """Two tenants train at once: each sees its own name and nobody else's, an administrator both."""
    keys, ended = [cluster.new_tenant(), cluster.new_tenant()], threading.Event()
    own, other = (key.split("_")[1] for key in keys)
    threads = [threading.Thread(target=work, args=(cluster, key, ended)) for key in keys]
    for thread in threads:
        thread.start()
    try:
        browser.log_in(keys[0])
        browser.open("/workers")
        blocks = browser.until(
            lambda: (seen := dict(browser.chrome.execute_script(_LANES))) and {own, "other"} <= seen.keys() and seen
        )
        assert set(blocks) == {own, "other"}
        assert all(blocks.values())
        assert other not in browser.chrome.page_source
        trace = fetch(cluster, "/trace.json", keys[0])
        assert other not in trace.text
        assert {"every pass", own, "other"} <= {
            event["args"].get("name") for event in json.loads(trace.text)["traceEvents"]
        }
        browser.log_in(cluster.admin_key)
        browser.open("/workers")
        browser.until(lambda: {own, other} <= dict(browser.chrome.execute_script(_LANES)).keys())
        assert "trainer-0" in browser.text
        assert browser.complaints() == []
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    # Blocks share a lane's height where tenants shared a pass.
    with ServiceClient(cluster.gateway_address, cluster.admin_key) as admin:
        spans: list[Span] = [span for lane in admin.list_spans() for span in lane.spans if lane.kind == "trainer"]
    assert any({own, other} <= {share.tenant for share in span.shares} for span in spans)


def test_a_page_ends_with_its_key(cluster: Cluster, browser: Browser) -> None:
    """When the key is revoked while a page is open, the browser is back at the login page."""
    key = cluster.new_tenant()
    browser.log_in(key)
    with ServiceClient(cluster.gateway_address, cluster.admin_key) as admin:
        (info,) = admin.list_keys(key.split("_")[1])
        admin.revoke_key(info.key_id)
    browser.until(lambda: browser.path == "/login")
    assert fetch(cluster, "/", key).status_code == 303
    browser.find("input[name=key]").send_keys(key)
    browser.find("button[type=submit]").click()
    browser.until(lambda: "unknown, revoked or expired" in browser.text)


def test_runs_are_compared_in_one_chart(cluster: Cluster, browser: Browser) -> None:
    """Another run's curves join those of the run, by their names."""
    key = cluster.new_tenant()
    with ServiceClient(cluster.gateway_address, key) as service:
        for name in ("first", "second"):
            client = service.create_lora_training_client("treadle/pip", rank=4, user_metadata={"name": name})
            for step in range(3):
                client.log_metrics(step, {"reward": step + len(name)}, samples=[f"<b>{name}</b> says {step}"])
            client.close()
    browser.log_in(key)
    browser.find("a", "second").click()
    browser.until(lambda: browser.curves("reward"))
    assert [point[1] for point in browser.curves("reward")["reward"]] == [6, 7, 8]
    assert "<b>second</b> says 2" in browser.text
    browser.find("main .q-select").click()
    browser.find(".q-menu .q-item", "first").click()
    compared = browser.until(lambda: (now := browser.curves("reward")) and len(now) == 2 and now)
    assert {name: curve[0][1] for name, curve in compared.items()} == {"second": 6, "first": 5}
    assert browser.complaints() == []


def test_an_interrupted_run_goes_on_at_a_click(
    cluster: Cluster, browser: Browser, interrupted: tuple[str, str, Path]
) -> None:
    """From its last checkpoint to its end, once its file is given again."""
    key, run, file = interrupted
    with ServiceClient(cluster.gateway_address, key) as service:
        before = service.get_run(run).latest.step
        browser.log_in(key)
        page = f"/runs/{run.split('/')[1]}/{run.split('/')[3]}"
        browser.open(page)
        browser.until(lambda: "Interrupted" in browser.text)
        browser.find("input[type=file]").send_keys(str(file))
        browser.until(lambda: browser.text.count("rows.jsonl") > 1)
        browser.find("button", "Resume").click()
        browser.until(lambda: service.get_run(run).latest.step > before)
        browser.open(page)
        browser.until(lambda: "finished" in browser.text)
        assert [saved.name for saved in service.list_revisions(run) if saved.name.endswith("/final")]
