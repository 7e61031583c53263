"""Keeps a worker in the store's list: signs of life with its load, until it drains.

Knows nothing of what the worker does, and of its base only the facts that users ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from treadle.errors import TreadleError
from treadle.internal.v1 import workers_pb2
from treadle.v1 import admin_pb2
from treadle_service.logs import get_logger
from treadle_service.store_client import StoreClient

_TTL_PERIODS: Final = 3
_RETRY_SECONDS: Final = 0.3
log = get_logger(__name__)


class BaseFacts(Protocol):
    """What a worker says of the base that it holds."""

    @property
    def name(self) -> str:
        """Public name."""

    @property
    def path(self) -> str:
        """Folder or hub name."""

    @property
    def max_context(self) -> int:
        """Most positions of a sequence."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def dtype(self) -> str:
        """Element type that it computes in."""

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""


class Registration:
    """One worker's place in the list; `describe_load` writes into it what changes."""

    def __init__(
        self,
        store: StoreClient,
        worker: admin_pb2.Worker,
        facts: BaseFacts,
        period_seconds: float,
        describe_load: Callable[[admin_pb2.Worker], None],
    ) -> None:
        self._store, self._worker, self._period = store, worker, period_seconds
        self._describe_load = describe_load
        self._ended = False
        self._worker.base = facts.name
        self._base = admin_pb2.BaseModel(
            name=facts.name,
            max_context=facts.max_context,
            vocab_size=facts.vocab_size,
            dtype=facts.dtype,
            trainable=worker.kind == admin_pb2.WORKER_KIND_TRAINER,
            sampleable=worker.kind == admin_pb2.WORKER_KIND_SAMPLER,
            tokenizer=facts.path,
            num_parameters=facts.num_parameters,
            eos_token_ids=facts.eos_token_ids,
            max_tokens_per_pass=worker.max_tokens_per_pass,
        )

    async def reach(self) -> None:
        """Waits until the store knows this worker."""
        while not await self._beat():
            await asyncio.sleep(_RETRY_SECONDS)

    async def run_forever(self) -> None:
        """Sends signs of life until it has ended, or is cancelled."""
        while True:
            await asyncio.sleep(self._period)
            if self._ended:
                return
            await self._beat()

    async def end(self) -> None:
        """Takes the worker off the list, so that nobody is sent to it any more."""
        self._ended = True
        with suppress(TreadleError):
            await self._store.unregister(self._worker.worker)

    async def _beat(self) -> bool:
        self._describe_load(self._worker)
        self._worker.last_seen.GetCurrentTime()
        request = workers_pb2.HeartbeatRequest(worker=self._worker, base=self._base)
        request.ttl.FromNanoseconds(int(_TTL_PERIODS * self._period * 1e9))
        try:
            await self._store.heartbeat(request)
        except TreadleError as error:
            log.warning("heartbeat_failed", reason=error.reason, message=error.message)
            return False
        return True
