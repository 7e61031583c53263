"""A TCP proxy that makes trouble on demand: cuts connections, refuses or swallows them, delays bytes, answers nonsense.

Runs in a thread of its own. Knows nothing of what the bytes mean.
"""

import asyncio
import contextlib
import threading
from collections import deque
from types import TracebackType

CHUNK_BYTES = 64 * 1024


class TroubleProxy:
    """Forwards connections to `target` (host:port) from `address`; use as a context manager."""

    def __init__(self, target: str, delay_seconds: float = 0.0) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.delay_seconds = delay_seconds
        self.refusing = False
        self.silent = False
        """Whether bytes are kept until it is over, connections new and old staying open: a hole in the network."""
        self.answer = b""
        """What every new connection is answered instead of being forwarded, if it is not empty."""
        self.num_cuts = 0
        self.num_bytes = 0
        self.address = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trouble-proxy", daemon=True)

    def __enter__(self) -> "TroubleProxy":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Resets all open connections in mid-byte."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"

    async def _stop(self) -> None:
        self._server.close()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _cut(self) -> None:
        self.num_cuts += bool(self._writers)
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        if self.answer:
            await self._answer(reader, writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        try:
            # At the end of the test the handlers are cancelled; asyncio would log that as an error.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            for end in ends:
                end.transport.abort()
            self._writers -= ends

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await reader.read(CHUNK_BYTES)
            writer.write(self.answer)
            await writer.drain()
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes bytes on, each `delay_seconds` after it came, so that the pipe stays full."""
        loop = asyncio.get_running_loop()
        held: deque[tuple[float, bytes]] = deque()
        arrived = asyncio.Event()

        async def pass_on() -> None:
            while True:
                await arrived.wait()
                while held:
                    due, data = held.popleft()
                    await asyncio.sleep(max(due - loop.time(), 0))
                    while self.silent:
                        await asyncio.sleep(0.02)
                    writer.write(data)
                    await writer.drain()
                    self.num_bytes += len(data)
                arrived.clear()

        passing = asyncio.create_task(pass_on())
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                held.append((loop.time() + self.delay_seconds, data))
                arrived.set()
        passing.cancel()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await passing
        writer.transport.abort()
