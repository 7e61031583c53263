"""Samples under way: what a sampling future stands for.

A request id holds the whole request, its seed included, as long as that is short: then any gateway can answer for it,
also one that was started since, with the same tokens. A longer one is known to this gateway alone; after a restart it
is answered as gone, and the SDK sends it again. Knows nothing of HTTP.
"""

import asyncio
import base64
import binascii
import contextlib
import random
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError
from pydantic import ValidationError

from treadle.errors import TreadleError, make_error
from treadle.v1 import sampling_pb2
from treadle_gateway.http.tinker import sample_bodies
from treadle_gateway.http.tinker.bodies import TensorBody
from treadle_gateway.http.tinker.ids import unknown_request
from treadle_gateway.local_calls import LocalCalls
from treadle_service.principal import current_principal

_LONGEST_ID: Final = 48 * 1024
_MAX_UNPACKED: Final = 2**22
_KEPT_SECONDS: Final = 600.0
_KEPT_BYTES: Final = 256 * 2**20
_PATIENCE_SECONDS: Final = 600.0
_RETRY_SECONDS: Final = 0.2
_LONGEST_RETRY_SECONDS: Final = 5.0
_TRIM_SECONDS: Final = 1.0
_SEPARATOR: Final = b"\n"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample request, and the layout in which its target log-probs go back.

    `place` tells equal requests apart, so that each has a future of its own; a request that is sent again has the same.
    """

    request: sampling_pb2.SampleRequest
    place: str
    targets: TensorBody | None = None

    def encode(self) -> bytes:
        """Returns all of it as bytes."""
        layout = self.targets.model_dump_json(exclude_none=True).encode() if self.targets else b""
        return _SEPARATOR.join((self.place.encode(), layout, self.request.SerializeToString(deterministic=True)))

    @classmethod
    def decode(cls, data: bytes) -> "Wanted":
        """Returns what was encoded; raises ValueError."""
        place, layout, request = data.split(_SEPARATOR, 2)
        targets = TensorBody.model_validate_json(layout) if layout else None
        return cls(sampling_pb2.SampleRequest.FromString(request), place.decode(), targets)


@dataclass(slots=True)
class Sampling:
    """One request under way or answered."""

    task: asyncio.Task[bytes]
    session: str
    # Its place among all that were answered here; 0 while it is under way.
    place: int = 0
    began_at: float = field(default_factory=time.monotonic)


class Samples:
    """The samples that this gateway waits for or has answered lately, by tenant and request id."""

    def __init__(self, calls: LocalCalls, max_per_tenant: int) -> None:
        self._calls = calls
        self._max_per_tenant = max_per_tenant
        self._samplings: OrderedDict[tuple[str, str], Sampling] = OrderedDict()
        self._running: dict[str, int] = {}
        self._num_done = 0
        self._trimmed_at = 0.0
        self._changed = asyncio.Event()
        self.draining = asyncio.Event()

    def start(self, wanted: Wanted, session: str) -> str:
        """Begins a sample and returns its request id; QUEUE_FULL when the tenant has as many as it may."""
        data = zlib.compress(wanted.encode(), 1)
        short = len(data) * 4 / 3 < _LONGEST_ID
        request_id = (
            "s-" + base64.urlsafe_b64encode(data).rstrip(b"=").decode() if short else f"m-{secrets.token_hex(16)}"
        )
        self._begin(request_id, wanted, session)
        return request_id

    async def wait(self, request_id: str, seconds: float) -> bytes | None:
        """Returns the protobuf result, None if it is not there after `seconds`; raises what the sampler refused.

        RESULT_GONE for a request that another gateway, or an earlier life of this one, was told.
        """
        key = (current_principal().tenant, request_id)
        if key not in self._samplings:
            self._begin(request_id, self._recall(request_id), "")
        task = self._samplings[key].task
        draining = asyncio.ensure_future(self.draining.wait())
        try:
            await asyncio.wait({task, draining}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            draining.cancel()
        return task.result() if task.done() else None

    def cancel(self, request_id: str) -> None:
        """Ends a sample that nobody wants any more."""
        sampling = self._samplings.pop((current_principal().tenant, request_id), None)
        if sampling is not None:
            sampling.task.cancel()

    async def completed(self, session: str, after: int, seconds: float) -> tuple[list[tuple[str, int | None]], int]:
        """Returns a session's answered requests behind a cursor, with their sizes (None if failed), and the new one.

        Waits up to `seconds` for the first.
        """
        until = time.monotonic() + seconds
        while not (done := self._done(session, after)) and (left := until - time.monotonic()) > 0:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()
        cursor = max((sampling.place for _, sampling in done), default=after)
        return [(request_id, _size_of(sampling)) for request_id, sampling in done], cursor

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drops results that their caller has."""
        for request_id in request_ids:
            sampling = self._samplings.get((current_principal().tenant, request_id))
            if sampling is not None and sampling.task.done():
                self._samplings.pop((current_principal().tenant, request_id))

    def _begin(self, request_id: str, wanted: Wanted, session: str) -> None:
        tenant = current_principal().tenant
        key = (tenant, request_id)
        if key in self._samplings:
            return
        if self._running.get(tenant, 0) >= self._max_per_tenant:
            raise make_error("QUEUE_FULL", f"{self._max_per_tenant} of your samples are under way here; try again", 1.0)
        self._running[tenant] = self._running.get(tenant, 0) + 1
        task = asyncio.create_task(self._sample(wanted))
        self._samplings[key] = Sampling(task, session)
        task.add_done_callback(lambda done: self._on_done(tenant, request_id, done))
        self._trim()

    def _on_done(self, tenant: str, request_id: str, done: asyncio.Task[bytes]) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        if done.cancelled():
            return
        done.exception()  # Whoever asks gets it; nobody need ask.
        self._num_done += 1
        if (sampling := self._samplings.get((tenant, request_id))) is not None:
            sampling.place = self._num_done
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _recall(self, request_id: str) -> Wanted:
        if request_id.startswith("m-"):
            raise make_error("RESULT_GONE", "the gateway that knew this request is gone; send the request again")
        try:
            text = request_id.removeprefix("s-")
            data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            return Wanted.decode(zlib.decompressobj().decompress(data, _MAX_UNPACKED))
        except (ValueError, binascii.Error, zlib.error, DecodeError, ValidationError) as error:
            raise unknown_request(request_id) from error

    async def _sample(self, wanted: Wanted) -> bytes:
        until, pause = time.monotonic() + _PATIENCE_SECONDS, _RETRY_SECONDS
        while True:
            try:
                answer = await self._calls.sampling.Sample(wanted.request)
            except TreadleError as error:
                if not error.retryable or time.monotonic() > until:
                    raise
                # Thousands may be told the same at once: they come again one by one, and ever later.
                await asyncio.sleep(max(pause, error.retry_after_seconds or 0.0) * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
            else:
                return sample_bodies.to_response(answer, wanted.targets)

    def _done(self, session: str, after: int) -> list[tuple[str, Sampling]]:
        tenant = current_principal().tenant
        of_session = [(i, s) for (t, i), s in self._samplings.items() if t == tenant and s.session == session]
        return sorted(((i, s) for i, s in of_session if s.place > after), key=lambda found: found[1].place)

    def _trim(self) -> None:
        """Drops answers that are old, or the oldest if they are too many bytes; what is under way stays."""
        now, size = time.monotonic(), 0
        if now - self._trimmed_at < _TRIM_SECONDS:
            return
        self._trimmed_at = now
        for key, sampling in reversed(list(self._samplings.items())):
            task = sampling.task
            if not task.done():
                continue
            size += len(task.result()) if not task.cancelled() and task.exception() is None else 0
            if size > _KEPT_BYTES or now - sampling.began_at > _KEPT_SECONDS:
                del self._samplings[key]


def _size_of(sampling: Sampling) -> int | None:
    if sampling.task.cancelled() or sampling.task.exception() is not None:
        return None
    return len(sampling.task.result())
