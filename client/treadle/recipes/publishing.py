"""A folder on its way to a model hub: repository, model card, files in one commit, with the user's own token.

Knows the package huggingface_hub, which is optional, by three of its calls.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from treadle.errors import BadInputError, ServerError
from treadle.records import AdapterInfo

_CARD = """---
base_model: {base}
library_name: {library}
tags: [lora, treadle]
---

# {name}

A LoRA adapter (rank {rank}, alpha {alpha:g}) of {base} after {step} optimizer steps, trained with Treadle.
"""


def publish_folder(
    folder: Path,
    repository: str,
    info: AdapterInfo,
    base_name: str = "",
    *,
    token: str | None = None,
    private: bool = False,
    hub: str = "",
) -> str:
    """Uploads the folder's files with a model card; returns the address of the commit.

    Args:
        folder: a PEFT folder or a whole model; its card and its base's name are written into it.
        repository: owner/name; made when it is not there.
        info: the adapter that the folder came from.
        base_name: what the hub calls the base; the service's name of it when empty.
        token: of the hub; the one that the user is logged in with when None.
        private: whether a new repository is private.
        hub: the hub's address, when it is not Hugging Face's.

    Raises:
        BadInputError: huggingface_hub is not installed, or the repository's name is none.
        ServerError: the hub refused.
    """
    try:
        package: Any = importlib.import_module("huggingface_hub")  # Optional, so untyped here.
    except ImportError as error:
        raise BadInputError("this needs the package huggingface_hub: pip install huggingface_hub") from error
    base = base_name or info.base
    config = folder / "adapter_config.json"
    if config.exists() and base_name:
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}, indent=2))
    library = "peft" if config.exists() else "transformers"
    card = _CARD.format(
        base=base,
        library=library,
        name=repository.rpartition("/")[2],
        rank=info.lora.rank,
        alpha=info.lora.alpha,
        step=info.step,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    api = package.HfApi(endpoint=hub or None, token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=f"Add {info.name.rpartition('/')[2]}"
        )
    except package.errors.HFValidationError as error:
        raise BadInputError(str(error), "BAD_NAME") from error
    except (package.errors.HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise ServerError(f"the hub refused: {error}") from error
    return str(commit.commit_url)
