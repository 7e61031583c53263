"""BlobService: translates streams of frames to blobs and back."""

import asyncio
from collections.abc import AsyncIterator

from treadle.errors import make_error
from treadle.internal.v1 import blobs_pb2, blobs_pb2_grpc
from treadle_service import failpoints
from treadle_store.blob_io import hearing_out, read_chunks, read_differences, write_chunk
from treadle_store.blobs import BlobStore, blob_not_found


class BlobService(blobs_pb2_grpc.BlobServiceServicer):
    """Stores and streams blobs."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def PutBlob(
        self, request_iterator: AsyncIterator[blobs_pb2.PutBlobRequest], context: object
    ) -> blobs_pb2.PutBlobResponse:
        """Stores a blob from a header and chunks."""
        async with hearing_out(request_iterator):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("frame") != "header":
                raise make_error("BAD_FRAME", "PutBlob begins with a header")
            header = first.header
            with await asyncio.to_thread(self._blobs.open_writer, header.sha256, header.size) as writer:
                async for frame in request_iterator:
                    if frame.WhichOneof("frame") != "chunk":
                        raise make_error("BAD_FRAME", "after the header PutBlob takes chunks only")
                    await write_chunk(writer, frame.chunk.data, frame.chunk.crc32c)
                with failpoints.around("store.put_blob"):
                    existed = await asyncio.to_thread(writer.finish)
        return blobs_pb2.PutBlobResponse(existed=existed)

    async def GetBlob(
        self, request: blobs_pb2.GetBlobRequest, context: object
    ) -> AsyncIterator[blobs_pb2.GetBlobResponse]:
        """Streams a blob from an offset."""
        size = await asyncio.to_thread(self._blobs.size_of, request.sha256)
        if size is None:
            raise blob_not_found(request.sha256)
        if request.offset > size:
            raise make_error("BAD_VALUE", f"offset {request.offset} lies behind the blob's {size} bytes")
        header = blobs_pb2.BlobHeader(sha256=request.sha256, size=size)
        chunks = read_chunks(self._blobs, request.sha256, request.offset)
        base = request.base_sha256
        if base and not request.offset and await asyncio.to_thread(self._blobs.size_of, base) == size:
            header.base_sha256 = base
            chunks = read_differences(self._blobs, request.sha256, base)
        yield blobs_pb2.GetBlobResponse(header=header)
        async for data, crc32c in chunks:
            yield blobs_pb2.GetBlobResponse(chunk=blobs_pb2.BlobChunk(data=data, crc32c=crc32c))

    async def StatBlob(self, request: blobs_pb2.StatBlobRequest, context: object) -> blobs_pb2.StatBlobResponse:
        """Says whether a blob is there."""
        size = await asyncio.to_thread(self._blobs.keep, request.sha256)
        return blobs_pb2.StatBlobResponse(complete=size is not None, size=size or 0)

    async def AdoptBlob(self, request: blobs_pb2.AdoptBlobRequest, context: object) -> blobs_pb2.AdoptBlobResponse:
        """Makes a blob of a file in the incoming folder."""
        sha256 = await asyncio.to_thread(self._blobs.adopt, request.file, request.size)
        return blobs_pb2.AdoptBlobResponse(sha256=sha256 or "")
