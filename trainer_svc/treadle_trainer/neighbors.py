"""A trainer's calls to other trainers: offering them runs and having them take what they accepted.

Knows nothing of when that is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc

from treadle.errors import from_rpc_error
from treadle.internal.v1 import trainer_pb2, trainer_pb2_grpc
from treadle_service.channels import Metadata, internal_metadata, open_channel
from treadle_service.tls import ClientTls
from treadle_trainer.balance import Move

_OFFER_SECONDS: Final = 2.0
_TAKE_SECONDS: Final = 10.0


class Neighbors:
    """Channels to other trainers, one each, opened on first use. Errors arrive as TreadleError."""

    def __init__(self, token: str, tls: ClientTls | None) -> None:
        self.metadata: Metadata = internal_metadata(token)
        """What every call to a trainer carries."""
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def offer(self, move: Move, base: str) -> bool:
        """Offers a run to the trainer that a move names; returns whether it is expected there now."""
        request = trainer_pb2.OfferRunRequest(
            run=move.run.run, base=base, demand=move.run.demand, load=move.load, state_bytes=move.run.num_bytes
        )
        stub = self.stub(move.peer.address)
        response: trainer_pb2.OfferRunResponse = await self._unary(stub.OfferRun, request, _OFFER_SECONDS)
        return response.accepted

    async def take(self, address: str, run: str) -> None:
        """Has the trainer at an address claim and load a run that is free."""
        await self._unary(self.stub(address).TakeRun, trainer_pb2.TakeRunRequest(run=run), _TAKE_SECONDS)

    async def retain(self, addresses: frozenset[str]) -> None:
        """Closes the channels to trainers that are not there any more."""
        for address in self._channels.keys() - addresses:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        """Closes all channels."""
        await self.retain(frozenset())

    def stub(self, address: str) -> trainer_pb2_grpc.TrainerServiceAsyncStub:
        """Returns a way to call the trainer at an address."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, self._tls)
        return trainer_pb2_grpc.TrainerServiceStub(channel)

    # The stubs' multicallables are generic in both messages; one caller serves them all.
    async def _unary(self, method: Callable[..., Any], request: Any, seconds: float) -> Any:
        try:
            return await method(request, metadata=self.metadata, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
