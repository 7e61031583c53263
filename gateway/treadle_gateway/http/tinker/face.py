"""The routes of the Tinker face. Knows nothing of how each is answered."""

from starlette.responses import Response

from treadle.errors import TreadleError
from treadle_gateway.http.faces import PUBLIC, Face, HttpGateway, HttpRoute, error_response, status_of
from treadle_gateway.http.models import Models
from treadle_gateway.http.tinker.catalog import Catalog
from treadle_gateway.http.tinker.downloads import Downloads
from treadle_gateway.http.tinker.futures import Futures
from treadle_gateway.http.tinker.operations import Operations
from treadle_gateway.http.tinker.samples import Samples
from treadle_gateway.http.tinker.sampling import Sampling
from treadle_gateway.http.tinker.service import Service
from treadle_gateway.http.tinker.training import Training
from treadle_gateway.scopes import ANY_KEY, READ, SAMPLE, TRAIN

PREFIX = "/api/v1"
# The SDK sends again after each of these, for minutes.
_REPEATED = frozenset({408, 409, 429}) | frozenset(range(500, 600))
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


def make_face(gateway: HttpGateway) -> Face:
    """Returns the face."""
    models = Models(gateway.calls, gateway.settings.model_aliases)
    operations = Operations(gateway.calls)
    samples = Samples(gateway.calls, gateway.settings.max_samples_per_tenant)
    training = Training(gateway.calls, operations, models)
    sampling = Sampling(training, samples, models)

    async def end_polls() -> None:
        operations.draining.set()
        samples.draining.set()

    routes = [
        *_service_routes(Service(models)),
        *_training_routes(training),
        *_sampling_routes(sampling),
        *_future_routes(Futures(operations, samples)),
        *_catalog_routes(Catalog(gateway.calls, training, models)),
        *_file_routes(Downloads(gateway, training)),
    ]
    return Face("tinker", PREFIX, routes, on_error=on_error, on_drain=end_polls)


def on_error(error: TreadleError) -> Response:
    """Answers a failure so that the SDK repeats what may succeed later, with growing pauses, and nothing else."""
    if error.retryable:
        return error_response(error, 429)
    status = status_of(error)
    return error_response(error, 400 if status in _REPEATED else status)


def _service_routes(service: Service) -> list[HttpRoute]:
    return [
        HttpRoute("GET", "/healthz", service.healthz, PUBLIC),
        HttpRoute("POST", "/client/config", service.client_config, ANY_KEY),
        HttpRoute("POST", "/client/dynamic_config", service.dynamic_config, ANY_KEY),
        HttpRoute("POST", "/create_session", service.create_session, READ),
        HttpRoute("POST", "/session_heartbeat", service.session_heartbeat, READ),
        HttpRoute("POST", "/sessions/{session_id}/finish", service.finish_session, READ),
        HttpRoute("POST", "/telemetry", service.telemetry, ANY_KEY),
        HttpRoute("GET", "/get_server_capabilities", service.get_server_capabilities, ANY_KEY),
        HttpRoute("GET", "/auth/apikey/me", service.whoami, ANY_KEY),
        HttpRoute("POST", "/create_custom_loss", service.create_custom_loss, TRAIN),
    ]


def _training_routes(training: Training) -> list[HttpRoute]:
    return [
        HttpRoute("POST", "/create_model", training.create_model, TRAIN),
        HttpRoute("POST", "/load_weights", training.load_weights, TRAIN),
        HttpRoute("POST", "/forward_backward", training.forward_backward, TRAIN),
        HttpRoute("POST", "/optim_step", training.optim_step, TRAIN),
        HttpRoute("POST", "/save_weights", training.save_weights, TRAIN),
        HttpRoute("POST", "/save_weights_for_sampler", training.save_weights_for_sampler, TRAIN),
        HttpRoute("POST", "/save_weights_external", training.save_weights_external, TRAIN),
        HttpRoute("POST", "/copy_weights", training.copy_weights, TRAIN),
    ]


def _sampling_routes(sampling: Sampling) -> list[HttpRoute]:
    return [
        HttpRoute("POST", "/create_sampling_session", sampling.create_sampling_session, SAMPLE),
        HttpRoute("POST", "/join_sampling_session", sampling.join_sampling_session, SAMPLE),
        HttpRoute("GET", "/samplers/{sampler_id}", sampling.get_sampler, READ),
        HttpRoute("POST", "/asample", sampling.asample, SAMPLE),
    ]


def _future_routes(futures: Futures) -> list[HttpRoute]:
    return [
        HttpRoute("POST", "/retrieve_future", futures.retrieve_future, READ),
        HttpRoute("POST", "/retrieve_futures", futures.retrieve_futures, SAMPLE),
        HttpRoute("POST", "/cancel_future", futures.cancel_future, READ),
    ]


def _catalog_routes(catalog: Catalog) -> list[HttpRoute]:
    return [
        HttpRoute("POST", "/get_info", catalog.get_info, TRAIN),
        HttpRoute("POST", "/weights_info", catalog.weights_info, READ),
        HttpRoute("GET", "/training_runs", catalog.list_training_runs, TRAIN),
        HttpRoute("GET", "/training_runs/{run_id}", catalog.get_training_run, TRAIN),
        HttpRoute("GET", "/training_runs/{run_id}/checkpoints", catalog.list_run_checkpoints, READ),
        HttpRoute("GET", "/checkpoints", catalog.list_checkpoints, READ),
        HttpRoute("DELETE", _CHECKPOINT, catalog.delete_checkpoint, TRAIN),
        HttpRoute("PUT", _CHECKPOINT + "/ttl", catalog.set_ttl, TRAIN),
        HttpRoute("POST", _CHECKPOINT + "/publish", catalog.publish, TRAIN),
        HttpRoute("DELETE", _CHECKPOINT + "/publish", catalog.unpublish, TRAIN),
        HttpRoute("GET", "/sessions", catalog.list_sessions, TRAIN),
        HttpRoute("GET", "/sessions/{session_id}", catalog.get_session, TRAIN),
        HttpRoute("GET", "/billing/usage/events", catalog.usage_events, ANY_KEY),
        HttpRoute("GET", "/billing/usage/checkpoints/current", catalog.storage_usage, READ),
    ]


def _file_routes(downloads: Downloads) -> list[HttpRoute]:
    return [
        HttpRoute("GET", _CHECKPOINT + "/external_weights_urls", downloads.external_weights_urls, TRAIN),
        # Its link is signed.
        HttpRoute("GET", "/files/{link}", downloads.get_file, PUBLIC),
    ]
