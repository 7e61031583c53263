"""Completions that a tenant keeps: looking at them, writing them as training conversations, deleting them.

Knows the JSON of a completion only as far as a conversation needs.
"""

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import Any, Final

from treadle.channel import Transport
from treadle.errors import ConflictError
from treadle.records import CompletionInfo, ExportInfo
from treadle.v1 import datasets_pb2, datasets_pb2_grpc

_PAGE: Final = 500


class DatasetCalls:
    """The calls of a service client that concern kept completions; they wait for their answer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._datasets = datasets_pb2_grpc.DatasetServiceStub(transport.ops_channel)

    def list_completions(self, model: str = "", metadata: Mapping[str, str] | None = None) -> list[CompletionInfo]:
        """Lists the completions that a model answered and whose metadata has these entries, all when not given."""
        return [
            CompletionInfo(
                found.id, found.model, found.created.ToDatetime(tzinfo=UTC), dict(found.metadata), found.size
            )
            for found in self._completions(_filter(model, metadata), brief=True)
        ]

    def export_completions(
        self,
        path: str | Path,
        model: str = "",
        metadata: Mapping[str, str] | None = None,
        *,
        with_cut: bool = False,
    ) -> ExportInfo:
        """Writes kept completions as JSON lines that `treadle sft` takes: `{"messages": [...], ...}`, one per choice.

        Answers that ended at their limit of tokens are left out unless `with_cut`: a model would learn to stop there.
        The file appears when it is whole. Raises ConflictError when there is one.
        """
        target = Path(path)
        if target.exists():
            raise ConflictError(f"{target} is there already; give another name")
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        num_written = num_cut = 0
        try:
            with partial.open("x", encoding="utf-8") as file:
                for completion in self._completions(_filter(model, metadata)):
                    for row, cut in conversations(completion):
                        if cut and not with_cut:
                            num_cut += 1
                            continue
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        num_written += 1
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return ExportInfo(num_written, num_cut)

    def delete_completion(self, completion_id: str) -> None:
        """Deletes one completion; raises NotFoundError."""
        request = datasets_pb2.DeleteCompletionRequest(id=completion_id)
        self._transport.call(self._datasets.DeleteCompletion, request)

    def delete_completions(self, model: str = "", metadata: Mapping[str, str] | None = None) -> int:
        """Deletes the completions that `list_completions` with the same arguments lists; returns how many."""
        request = datasets_pb2.DeleteCompletionsRequest(filter=_filter(model, metadata))
        answer: datasets_pb2.DeleteCompletionsResponse = self._transport.call(self._datasets.DeleteCompletions, request)
        return answer.num_deleted

    def _completions(
        self, wanted: datasets_pb2.CompletionFilter, *, brief: bool = False
    ) -> Iterator[datasets_pb2.StoredCompletion]:
        request = datasets_pb2.ListCompletionsRequest(filter=wanted, page_size=_PAGE, brief=brief)
        while True:
            page: datasets_pb2.ListCompletionsResponse = self._transport.call(self._datasets.ListCompletions, request)
            yield from page.completions
            if not page.has_more:
                return
            request.after = page.completions[-1].id


def conversations(completion: datasets_pb2.StoredCompletion) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields each choice as a training row, and whether its answer was cut at the limit of tokens."""
    asked = [{"role": m["role"], "content": m["content"]} for m in json.loads(completion.messages_json)]
    for choice in json.loads(completion.response_json)["choices"]:
        answer = {"role": "assistant", "content": choice["message"]["content"]}
        row = {
            "messages": [*asked, answer],
            "id": completion.id,
            "model": completion.model,
            "metadata": dict(completion.metadata),
        }
        yield row, choice.get("finish_reason") == "length"


def _filter(model: str, metadata: Mapping[str, str] | None) -> datasets_pb2.CompletionFilter:
    return datasets_pb2.CompletionFilter(model=model, metadata=dict(metadata or {}))
