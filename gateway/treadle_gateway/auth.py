"""From `authorization: Bearer <key>` of a gRPC call to a principal that may make this call.

Knows nothing of what is called beyond its method's name, nor of how keys are checked.
"""

from typing import Final

import grpc

from treadle_gateway.authenticator import Authenticator
from treadle_gateway.live_calls import CallKind
from treadle_gateway.scopes import check_scope
from treadle_service.interceptors import RunningCall, WrappingInterceptor
from treadle_service.principal import current_principal, set_principal

_STREAM: Final = "/treadle.v1.TrainingService/StreamOperations"
REVOKE: Final = "/treadle.v1.AdminService/RevokeKey"


class AuthInterceptor(WrappingInterceptor):
    """Refuses calls without a valid key and the scope for their method; sets the principal for the others."""

    def __init__(self, authenticator: Authenticator) -> None:
        self.authenticator = authenticator

    async def before(self, details: grpc.HandlerCallDetails) -> None:
        """Sets the principal, or raises UNAUTHENTICATED, PERMISSION_DENIED or QUEUE_FULL."""
        with self.authenticator.live.admitting():
            principal = await self.authenticator.identify(_bearer(details))
            check_scope(principal, details.method)
            set_principal(principal)

    def entered(self, details: grpc.HandlerCallDetails, call: RunningCall) -> None:
        """Counts the call in, and watches over its key as long as it is open; raises QUEUE_FULL."""
        kind: CallKind = "stream" if details.method == _STREAM else "call"
        self.authenticator.enter(call, current_principal(), kind)
        if details.method == REVOKE:
            call.on_done(self.authenticator.recheck)


def _bearer(details: grpc.HandlerCallDetails) -> str:
    """Returns the key that a call carries, empty without one."""
    for name, value in details.invocation_metadata:
        if name == "authorization" and isinstance(value, str):
            return bearer_key(value)
    return ""


def bearer_key(header: str) -> str:
    """Returns the key of an authorization header, empty if it has none."""
    scheme, _, secret = header.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""
