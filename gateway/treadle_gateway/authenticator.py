"""From a key to a principal, for gRPC calls and HTTP requests alike, and the watch over the keys of open ones.

The store knows the keys; answers are remembered for a moment, refusals are not. Keys are kept in memory only as
hashes. As long as calls are open, the store is asked again and again whether their keys still hold. Knows nothing of
what is called and of how a key came here.
"""

import asyncio
import contextlib
from hashlib import sha256
from typing import Final

import grpc

from treadle.errors import from_rpc_error, make_error
from treadle.internal.v1 import identity_pb2, identity_pb2_grpc
from treadle_gateway.cache import AsyncCache
from treadle_gateway.live_calls import CallKind, CallLimits, LiveCalls
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.interceptors import RunningCall
from treadle_service.logs import get_logger
from treadle_service.principal import Principal
from treadle_service.tls import ClientTls

_LONGEST_KEY: Final = 512
_AUTHENTICATE_SECONDS: Final = 10.0
# As many as one question to the store may name.
_CHECKED_AT_ONCE: Final = 1000
_LEAST_CHECK_SECONDS: Final = 0.05
_TINKER_PREFIX: Final = "tml-"
_HINT: Final = "send the metadata `authorization: Bearer <key>` with a key of this deployment"

log = get_logger(__name__)


class Authenticator:
    """Knows who may come in, and who is in."""

    def __init__(
        self, store_address: str, internal_token: str, cache_seconds: float, limits: CallLimits, tls: ClientTls | None
    ) -> None:
        self._tls = tls
        self.live = LiveCalls(limits)
        self._check_seconds = max(cache_seconds, _LEAST_CHECK_SECONDS)
        self._check_now = asyncio.Event()
        self._checking: asyncio.Task[None] | None = None
        self._store_address = store_address
        self._internal_token = internal_token
        self._principals: AsyncCache[bytes, Principal] = AsyncCache(cache_seconds)
        self._stub: identity_pb2_grpc.IdentityServiceAsyncStub | None = None

    async def identify(self, secret: str) -> Principal:
        """Returns whose key it is; `tml-` before it is overlooked. Raises UNAUTHENTICATED or UNAVAILABLE."""
        secret = secret.strip().removeprefix(_TINKER_PREFIX)
        if not 0 < len(secret) <= _LONGEST_KEY:
            raise make_error("UNAUTHENTICATED", f"this call carries no key; {_HINT}")
        return await self._principals.get(sha256(secret.encode()).digest(), lambda: self._ask(secret))

    def enter(self, call: RunningCall, principal: Principal, kind: CallKind) -> None:
        """Counts a call in, and watches over its key as long as it is open; raises QUEUE_FULL."""
        self.live.enter(call, principal, kind)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check_while_open())

    def recheck(self) -> None:
        """Forgets who was let in, and asks about the keys of open calls at once."""
        self._principals.clear()
        self._check_now.set()

    async def _check_while_open(self) -> None:
        """Asks the store about the keys of open calls, at once when one was revoked here; ends with the last call."""
        while len(self.live):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_seconds):
                    await self._check_now.wait()
            self._check_now.clear()
            key_ids = self.live.key_ids()
            for start in range(0, len(key_ids), _CHECKED_AT_ONCE):
                await self._check(key_ids[start : start + _CHECKED_AT_ONCE])

    async def _check(self, key_ids: list[str]) -> None:
        try:
            answer = await self._identity().CheckKeys(
                identity_pb2.CheckKeysRequest(key_ids=key_ids),
                metadata=internal_metadata(self._internal_token),
                timeout=_AUTHENTICATE_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            # What runs goes on: a store that is away for a moment must not end everybody's work.
            log.warning("keys_unchecked", code=error.code().name)
            return
        if answer.ended_key_ids:
            self._principals.clear()
            self.live.end_keys(frozenset(answer.ended_key_ids))

    def _identity(self) -> "identity_pb2_grpc.IdentityServiceAsyncStub":
        if self._stub is None:  # Opened here because a channel belongs to the loop that runs.
            self._stub = identity_pb2_grpc.IdentityServiceStub(open_channel(self._store_address, self._tls))
        return self._stub

    async def _ask(self, secret: str) -> Principal:
        try:
            answer = await self._identity().Authenticate(
                identity_pb2.AuthenticateRequest(secret=secret),
                metadata=internal_metadata(self._internal_token),
                timeout=_AUTHENTICATE_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raised = from_rpc_error(error)
            if raised.reason == "UNAUTHENTICATED":
                raise make_error("UNAUTHENTICATED", f"the key is unknown, revoked or expired; {_HINT}") from error
            raise make_error("UNAVAILABLE", "keys cannot be checked now; try again", 1.0) from error
        return Principal(answer.tenant, frozenset(answer.scopes), answer.key_id)
