"""From `authorization: Bearer <key>` to a principal that may make this call.

The store knows the keys; answers are remembered for a moment, refusals are not. Keys are kept in memory only as
hashes. Knows nothing of what is called beyond its method's name.
"""

from hashlib import sha256

import grpc

from treadle.errors import from_rpc_error, make_error
from treadle.internal.v1 import identity_pb2, identity_pb2_grpc
from treadle_gateway.cache import AsyncCache
from treadle_gateway.scopes import check_scope
from treadle_service.channels import internal_metadata, open_channel
from treadle_service.interceptors import WrappingInterceptor
from treadle_service.principal import Principal, set_principal

_LONGEST_KEY = 512
_AUTHENTICATE_SECONDS = 10.0
_HINT = "send the metadata `authorization: Bearer <key>` with a key of this deployment"


class AuthInterceptor(WrappingInterceptor):
    """Refuses calls without a valid key and the scope for their method; sets the principal for the others."""

    def __init__(self, store_address: str, internal_token: str, cache_seconds: float) -> None:
        self._store_address = store_address
        self._internal_token = internal_token
        self._principals: AsyncCache[bytes, Principal] = AsyncCache(cache_seconds)
        self._stub: identity_pb2_grpc.IdentityServiceAsyncStub | None = None

    async def before(self, details: grpc.HandlerCallDetails) -> None:
        """Sets the principal, or raises UNAUTHENTICATED or PERMISSION_DENIED."""
        secret = _bearer(details)
        key = sha256(secret.encode()).digest()
        principal = await self._principals.get(key, lambda: self._authenticate(secret))
        check_scope(principal, details.method)
        set_principal(principal)

    async def _authenticate(self, secret: str) -> Principal:
        if self._stub is None:  # Opened here because a channel belongs to the loop that runs.
            self._stub = identity_pb2_grpc.IdentityServiceStub(open_channel(self._store_address))
        try:
            answer = await self._stub.Authenticate(
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


def _bearer(details: grpc.HandlerCallDetails) -> str:
    for name, value in details.invocation_metadata:
        if name == "authorization" and isinstance(value, str):
            scheme, _, secret = value.partition(" ")
            secret = secret.strip()
            if scheme.lower() == "bearer" and 0 < len(secret) <= _LONGEST_KEY:
                return secret
    raise make_error("UNAUTHENTICATED", f"this call carries no key; {_HINT}")
