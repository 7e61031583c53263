"""The base's tokenizer, loaded only when asked for, from its folder or hub name. Needs transformers."""

import importlib
from typing import Any

from treadle.errors import UnavailableError


def load_tokenizer(name: str) -> Any:  # The type is transformers', which need not be installed.
    """Returns the tokenizer of a folder or hub name; raises UnavailableError when it cannot be loaded."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UnavailableError("get_tokenizer needs the package transformers: pip install transformers") from None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the tokenizer {name!r} cannot be loaded here: {error}") from error
