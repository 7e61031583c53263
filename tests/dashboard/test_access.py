"""Who sees what of the dashboard, over plain HTTP: pages, downloads, sockets."""

import http.client
import re
import zipfile
from io import BytesIO
from pathlib import Path

import httpx
import pytest

from tests.dashboard.conftest import fetch
from tests.support.cluster import Cluster
from treadle import ServiceClient

PAGES = ("/", "/workers", "/start", "/runs/admin/r-0000000000", "/trace.json", "/download/tenants/a/runs/b/revisions/c")


@pytest.fixture(scope="module")
def owner(cluster: Cluster) -> tuple[str, str]:
    """A tenant's key and a revision of a run of its own that is called secret-plan."""
    key = cluster.new_tenant()
    with ServiceClient(cluster.gateway_address, key) as service:
        client = service.create_lora_training_client("treadle/pip", rank=4, user_metadata={"name": "secret-plan"})
        client.log_metrics(1, {"reward": 1.0}, samples=["a secret text"])
        return key, client.save_weights_for_sampler("mine").result(120).path


def page_of(revision: str) -> str:
    _, tenant, _, run, *_ = revision.split("/")
    return f"/runs/{tenant}/{run}"


def test_without_a_key_there_is_the_login_page_alone(cluster: Cluster) -> None:
    """Nor with a key of nobody; what the pages are made of is no secret."""
    for path in PAGES:
        for key in ("", "treadle_nobody_x_y"):
            answer = fetch(cluster, path, key)
            assert (path, answer.status_code) == (path, 303)
            assert answer.headers["location"] == f"/login?next={path}"
    login = fetch(cluster, "/login")
    assert login.status_code == 200
    assert login.headers["x-frame-options"] == "DENY"
    assert fetch(cluster, "/nowhere").json()["reason"] == "NOT_SERVED"
    assert fetch(cluster, "/runs", cluster.new_tenant()).status_code == 404


def test_logging_in_keeps_the_key_where_scripts_cannot_read_it(cluster: Cluster) -> None:
    """And leads back into the dashboard, wherever the form says."""
    key = cluster.new_tenant()
    for target, leads_to in (
        ("/workers", "/workers"),
        ("//elsewhere.example", "/"),
        ("https://elsewhere.example", "/"),
    ):
        answer = httpx.post(f"http://{cluster.http_address}/login", data={"key": key, "next": target}, timeout=60)
        assert (answer.status_code, answer.headers["location"]) == (303, leads_to)
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
    for wrong, why in (("treadle_nobody_x_y", "unknown"), (cluster.new_tenant(["sample"]), "scope")):
        answer = httpx.post(f"http://{cluster.http_address}/login", data={"key": wrong}, timeout=60)
        assert answer.headers["location"] == f"/login?refused={why}"
        assert "set-cookie" not in answer.headers
    out = fetch(cluster, "/logout", key)
    assert 'treadle_key=""' in out.headers["set-cookie"]


def test_a_tenants_things_are_its_own_and_the_administrators(cluster: Cluster, owner: tuple[str, str]) -> None:
    """Another tenant's run is answered like one that is not there, in pages and downloads."""
    key, revision = owner
    nosy, archive = cluster.new_tenant(), f"/download/{revision}.zip"
    for one in (key, cluster.admin_key):
        assert "secret-plan" in fetch(cluster, "/", one).text
        assert "a secret text" in fetch(cluster, page_of(revision), one).text
        assert fetch(cluster, archive, one).status_code == 200
    absent = revision.replace("/mine", "/yours")
    for path in ("/", page_of(revision), page_of("tenants/nobody/runs/r-0000000000")):
        assert "secret" not in fetch(cluster, path, nosy).text
    there, missing = fetch(cluster, archive, nosy), fetch(cluster, f"/download/{absent}.zip", nosy)
    assert (there.status_code, there.text) == (missing.status_code, missing.text) == (404, missing.text)
    assert fetch(cluster, f"/download/{absent}.zip", key).status_code == 404
    assert fetch(cluster, "/download/nonsense.zip", key).status_code == 400


def test_an_archive_is_the_folder_that_the_client_gets(
    cluster: Cluster, owner: tuple[str, str], tmp_path: Path
) -> None:
    """Byte for byte, also a checkpoint with its optimizer state."""
    key, revision = owner
    with ServiceClient(cluster.gateway_address, key) as service:
        client = service.attach_training_client(revision.partition("/revisions")[0])
        checkpoint = client.save_state("kept").result(120).path
        for name in (revision, checkpoint):
            pulled = service.pull_adapter(name, tmp_path / name.rpartition("/")[2])
            with zipfile.ZipFile(BytesIO(fetch(cluster, f"/download/{name}.zip", key).content)) as archive:
                found = {Path(entry).name: archive.read(entry) for entry in archive.namelist()}
            assert found == {file.name: file.read_bytes() for file in pulled.iterdir()}


def test_a_socket_is_for_whom_its_page_was_made(cluster: Cluster, owner: tuple[str, str]) -> None:
    """Who knows a page's id gets nothing through it with another key, and nothing without one."""
    key, revision = owner
    page = fetch(cluster, page_of(revision), key).text
    found = re.search(r"client_id': '([0-9a-f-]{36})'", page)
    assert found
    poll = f"/_nicegui_ws/socket.io/?client_id={found[1]}&EIO=4&transport=polling"
    assert fetch(cluster, poll, key).status_code == 200
    upload = f"/_nicegui/client/{found[1]}/upload/1"
    for wrong in ("", cluster.new_tenant()):
        assert fetch(cluster, poll, wrong).status_code == 403
        url = f"http://{cluster.http_address}{upload}"
        answer = httpx.post(url, cookies={"treadle_key": wrong}, files={"file": b"x"}, timeout=60)
        assert answer.status_code == 403
    connection = http.client.HTTPConnection(cluster.http_address, timeout=60)
    connection.putrequest("POST", upload)
    connection.putheader("cookie", f"treadle_key={key}")
    connection.putheader("content-length", str(2**30))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_nothing_comes_from_elsewhere(cluster: Cluster, owner: tuple[str, str]) -> None:
    """Pages name no other host: they work on a machine without a way out."""
    key, revision = owner
    for path in ("/login", "/", "/workers", "/start", page_of(revision)):
        text = fetch(cluster, path, key).text.replace("http://www.w3.org", "").replace(cluster.http_address, "")
        assert "https://" not in text.replace("https://quasar.dev", "").replace("https://nicegui.io", ""), path
        assert 'src="//' not in text
