"""The service client: where a program begins. Makes training and sampling clients, and reads the catalog.

with treadle.ServiceClient() as service:
    training = service.create_lora_training_client("treadle/pip", rank=8)
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from treadle.adapters import AdapterCalls
from treadle.admin import AdminCalls
from treadle.channel import Transport
from treadle.convert import lora_to_proto, run_from
from treadle.datasets import DatasetCalls
from treadle.errors import BadNameError
from treadle.metrics import MetricCalls
from treadle.names import is_adapter, parse_adapter, parse_run
from treadle.peft_folders import for_upload, read_shape
from treadle.records import AdapterInfo, RunInfo
from treadle.sampling import SamplingClient
from treadle.settings import ClientSettings, client_settings
from treadle.timeline import TimelineCalls
from treadle.training import TrainingClient
from treadle.types import LoraConfig
from treadle.v1 import training_pb2, training_pb2_grpc, types_pb2

_CLOSE_SECONDS = 30.0
_PAGE_SIZE = 500


class ServiceClient(AdapterCalls, AdminCalls, DatasetCalls, MetricCalls, TimelineCalls):
    """One connection to a Treadle gateway, for any number of runs and threads.

    `base_url` (or TREADLE_ADDRESS) is host:port, `api_key` (or TREADLE_API_KEY) says who you are. The calls of this
    class wait for their answer; those of the clients that it makes return handles.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        address: str | None = None,
        settings: ClientSettings | None = None,
    ) -> None:
        transport = Transport(settings or client_settings(base_url or address, api_key))
        AdapterCalls.__init__(self, transport)
        AdminCalls.__init__(self, transport)
        DatasetCalls.__init__(self, transport)
        MetricCalls.__init__(self, transport)
        TimelineCalls.__init__(self, transport)
        self._training = training_pb2_grpc.TrainingServiceStub(transport.ops_channel)
        self._clients: list[TrainingClient] = []
        self._tokenizers: dict[str, str] = {}

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        alpha: float = 32.0,
    ) -> TrainingClient:
        """Creates a run, one new adapter on a base, and returns its training client."""
        lora = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn, alpha)
        return self._create(base_model, lora_to_proto(lora), user_metadata)

    def create_training_client_from_state(
        self, path: str, user_metadata: Mapping[str, str] | None = None
    ) -> TrainingClient:
        """Creates a run that starts with the weights of a revision or checkpoint, and a fresh optimizer."""
        saved = self._get_adapter(path)
        if parse_adapter(path).kind == "revisions":
            return self._create(saved.base, saved.lora, user_metadata, from_adapter=path)
        # A run made from a checkpoint takes its optimizer state too, so here the weights are loaded alone.
        client = self._create(saved.base, saved.lora, user_metadata)
        client.load_state(path).result()
        return client

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: Mapping[str, str] | None = None
    ) -> TrainingClient:
        """Creates a run that goes on exactly where a checkpoint was saved, optimizer state included."""
        if parse_adapter(path).kind != "checkpoints":
            raise BadNameError(f"{path} is a revision: it has weights only; use create_training_client_from_state")
        saved = self._get_adapter(path)
        return self._create(saved.base, saved.lora, user_metadata, from_adapter=path)

    def attach_training_client(self, run: str) -> TrainingClient:
        """Returns a training client that goes on with an existing run; one at a time may send to a run."""
        return self._client_of(self._get_run(run))

    def import_adapter(
        self, folder: str | Path, base_model: str, revision_id: str = "imported"
    ) -> tuple[TrainingClient, AdapterInfo]:
        """Creates a run of the shape of a PEFT folder from anywhere, with its weights; returns it and their revision.

        Raises BadInputError when the folder holds no LoRA adapter, or one that a run here cannot go on with.
        """
        path = Path(folder)
        shape = read_shape(path)
        client = self._create(base_model, lora_to_proto(shape), {"imported_from": path.name})
        with for_upload(path, shape, base_model) as copy:
            revision = self.push_adapter(client.run, copy, revision_id)
        client.load_state(revision.name).result()
        return client, revision

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> SamplingClient:
        """Returns a client that samples from a saved revision, or from a base as it is."""
        if (model_path is None) == (base_model is None):
            raise BadNameError("give either model_path (a revision) or base_model")
        model = model_path or base_model or ""
        base = self.get_adapter(model).base if is_adapter(model) else model
        return SamplingClient(self._transport, model, base, self._tokenizer_of(base))

    def list_runs(self) -> list[RunInfo]:
        """Lists your runs, newest first."""
        found: list[RunInfo] = []
        token = ""
        while True:
            request = training_pb2.ListRunsRequest(page_size=_PAGE_SIZE, page_token=token)
            page: training_pb2.ListRunsResponse = self._transport.call(self._training.ListRuns, request)
            found.extend(run_from(run) for run in page.runs)
            token = page.next_page_token
            if not token:
                return found

    def get_run(self, run: str) -> RunInfo:
        """Returns one run; raises NotFoundError."""
        return run_from(self._get_run(run))

    def delete_run(self, run: str) -> None:
        """Deletes a run; its saved revisions and checkpoints stay. Raises NotFoundError."""
        self._transport.call(self._training.DeleteRun, training_pb2.DeleteRunRequest(name=str(parse_run(run))))

    def close(self, wait_seconds: float = _CLOSE_SECONDS) -> None:
        """Waits for outstanding operations, at most so long per run, and disconnects."""
        clients, self._clients = self._clients, []
        for client in clients:
            client.close(wait_seconds)
        self._transport.close()

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # When the program fails, nobody is left to read the outstanding results.
        self.close(_CLOSE_SECONDS if kind is None else 0.0)

    def _create(
        self,
        base: str,
        lora: types_pb2.LoraConfig,
        metadata: Mapping[str, str] | None,
        from_adapter: str = "",
    ) -> TrainingClient:
        request = training_pb2.CreateRunRequest(
            base=base,
            lora=lora,
            request_id=uuid.uuid4().hex,
            metadata=dict(metadata or {}),
            from_adapter=from_adapter,
        )
        answer: training_pb2.CreateRunResponse = self._transport.call(self._training.CreateRun, request)
        return self._client_of(answer.run)

    def _client_of(self, run: training_pb2.Run) -> TrainingClient:
        client = TrainingClient(self._transport, run_from(run), self._tokenizer_of(run.base))
        self._clients.append(client)
        return client

    def _get_run(self, run: str) -> training_pb2.Run:
        request = training_pb2.GetRunRequest(name=str(parse_run(run)))
        answer: training_pb2.GetRunResponse = self._transport.call(self._training.GetRun, request)
        return answer.run

    def _tokenizer_of(self, base: str) -> str:
        if base not in self._tokenizers:
            models = self.get_server_capabilities().supported_models
            self._tokenizers = {model.model_name: model.tokenizer for model in models}
        # A base whose workers are all away right now is not listed.
        return self._tokenizers.get(base, "")
