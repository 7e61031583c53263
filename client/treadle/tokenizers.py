"""The base's tokenizer, loaded only when asked for: from its folder or hub name, or else from the service itself.

Needs transformers.
"""

import importlib
from collections.abc import Callable
from typing import Any, Final

import google_crc32c

from treadle.channel import Transport
from treadle.errors import ServerError, UnavailableError
from treadle.v1 import sampling_pb2, sampling_pb2_grpc

Fetched = tuple[sampling_pb2.TokenizerHeader, str]
"""What the service says of a tokenizer, and its tokenizer.json."""

_FETCH_SECONDS: Final = 120.0


def load_tokenizer(name: str, fetch: Callable[[], Fetched] | None = None) -> Any:  # transformers' types
    """Returns the tokenizer of a folder or hub name, or one made of what `fetch` returns if it is not to be had here.

    Raises UnavailableError when neither can be had, or transformers is missing.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UnavailableError("get_tokenizer needs the package transformers: pip install transformers") from None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if fetch is None:
            raise UnavailableError(f"the tokenizer {name!r} cannot be loaded here: {error}") from error
    header, content = fetch()
    tokenizers = importlib.import_module("tokenizers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(content),
        chat_template=header.chat_template or None,
        model_max_length=header.max_context,
        **header.special_tokens,
    )


def fetch_tokenizer(transport: Transport, model: str) -> Fetched:
    """Returns the tokenizer of a model's base from the service; waits for it."""
    return transport.wait(transport.retried(lambda: _fetch(transport, model)))


async def _fetch(transport: Transport, model: str) -> Fetched:
    stub: Any = sampling_pb2_grpc.SamplingServiceStub(transport.blobs_channel)
    call = stub.GetTokenizer(
        sampling_pb2.GetTokenizerRequest(model=model), metadata=transport.metadata, timeout=_FETCH_SECONDS
    )
    header, content = sampling_pb2.TokenizerHeader(), bytearray()
    try:
        async for frame in call:
            if frame.HasField("header"):
                header = frame.header
            elif google_crc32c.value(frame.chunk.data) != frame.chunk.crc32c:
                raise ServerError("a chunk of the tokenizer was damaged on its way", "CHECKSUM_MISMATCH")
            else:
                content += frame.chunk.data
    finally:
        call.cancel()
    if len(content) != header.size:
        raise ServerError(f"{len(content)} of {header.size} bytes of the tokenizer came", "CHECKSUM_MISMATCH")
    return header, content.decode()
