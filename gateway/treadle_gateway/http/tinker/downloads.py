"""Files of external weights over signed links, in parts if a client asks for parts.

A link carries its tenant and its end under a signature of this deployment's internal token, so that it works without a
key, on any gateway, for an hour. Knows nothing of how files are stored.
"""

import base64
import hmac
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from treadle.errors import make_error
from treadle.names import parse_adapter
from treadle.v1 import adapters_pb2
from treadle_gateway.http.faces import HttpGateway, json_response
from treadle_gateway.http.tinker import ids
from treadle_gateway.http.tinker.training import Training
from treadle_service.principal import Principal, current_principal, set_principal

LINK_SECONDS: Final = 3600
_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")
_PREFIX: Final = "/api/v1/files/"


class Downloads:
    """The endpoints that give files."""

    def __init__(self, gateway: HttpGateway, training: Training) -> None:
        self._calls, self._training = gateway.calls, training
        self._secret = gateway.settings.internal_token.get_secret_value().encode()

    async def external_weights_urls(self, request: Request) -> Response:
        """Returns a link per file of external weights."""
        part = request.path_params
        if part["kind"] != "external_weights":
            raise make_error("BAD_NAME", "files are given of external_weights only: save_weights_external makes them")
        name = ids.adapter_of(part["run_id"], part["kind"], part["name"], current_principal().tenant)
        saved = await self._training.saved(name)
        expires = int(time.time()) + LINK_SECONDS
        urls = {
            file.path: str(request.base_url).rstrip("/") + self._link(saved.name, file, expires) for file in saved.files
        }
        return json_response({"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()})

    async def get_file(self, request: Request) -> Response:
        """Streams a file, or the part of it that the Range header asks for."""
        name, path, size, sha256 = self._checked(request.path_params["link"])
        tag = f'"{sha256}"'
        headers = {"accept-ranges": "bytes", "etag": tag, "content-disposition": f'attachment; filename="{path}"'}
        wanted = request.headers.get("range")
        if wanted is None or request.headers.get("if-range", tag) != tag:
            first, last, status = 0, size - 1, 200
        else:
            span = _span(wanted, size)
            if span is None:
                return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
            (first, last), status = span, 206
            headers["content-range"] = f"bytes {first}-{last}/{size}"
        headers["content-length"] = str(last - first + 1)
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type="application/octet-stream")
        pull = adapters_pb2.PullAdapterRequest(name=name, path=path, offset=first)
        content = self._content(pull, last - first + 1, parse_adapter(name).tenant)
        begun = await anext(content)
        return StreamingResponse(_chained(begun, content), status, headers, media_type="application/octet-stream")

    async def _content(self, pull: adapters_pb2.PullAdapterRequest, left: int, tenant: str) -> AsyncIterator[bytes]:
        set_principal(Principal(tenant, frozenset({"train"})))
        async for frame in self._calls.adapters.PullAdapter(pull):
            data = frame.chunk.data[:left]
            left -= len(data)
            if data:
                yield data
            if not left:
                return

    def _link(self, name: str, file: adapters_pb2.AdapterFile, expires: int) -> str:
        told = orjson.dumps([name, file.path, file.size, file.sha256, expires])
        link = base64.urlsafe_b64encode(self._sign(told) + told).rstrip(b"=").decode()
        return _PREFIX + link

    def _checked(self, link: str) -> tuple[str, str, int, str]:
        refusal = make_error("PERMISSION_DENIED", "this link is not valid, or not any more; ask for a new one")
        try:
            data = base64.urlsafe_b64decode(link + "=" * (-len(link) % 4))
        except ValueError:
            raise refusal from None
        if not hmac.compare_digest(data[:32], self._sign(data[32:])):
            raise refusal
        name, path, size, sha256, expires = orjson.loads(data[32:])
        if expires < time.time():
            raise refusal
        return name, path, size, sha256

    def _sign(self, told: bytes) -> bytes:
        return hmac.digest(self._secret, b"treadle file link\n" + told, "sha256")


def _span(header: str, size: int) -> tuple[int, int] | None:
    """Returns the first and last byte that a Range header asks for; None if there are none such."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match[1] == match[2] == "":
        return None
    if not match[1]:
        return (max(0, size - int(match[2])), size - 1) if int(match[2]) and size else None
    first, last = int(match[1]), min(int(match[2]) if match[2] else size - 1, size - 1)
    return (first, last) if first <= last else None


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for data in rest:
        yield data
