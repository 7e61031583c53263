"""The exception tree and the one catalogue `reason -> status, retryable, exception`, shared by client and servers.

TreadleError
  x BadInputError             INVALID_ARGUMENT, OUT_OF_RANGE: the call is wrong; change it
    - BadNameError
    - BadBatchError
    - BadSamplingParamsError
    - SequenceError           seq gap, credit exceeded, frame that lies
  x NotFoundError             NOT_FOUND: there is no such thing, or it is not yours
  x ConflictError             ALREADY_EXISTS, FAILED_PRECONDITION: it clashes with what is there
    - SeqReusedError
    - StaleLeaseError
  x DependencyFailedError     ABORTED: an operation that this one stood on failed
  x CancelledOperationError   CANCELLED
  x AccessError               UNAUTHENTICATED, PERMISSION_DENIED
  x LimitError                RESOURCE_EXHAUSTED: too much at once, or too large
  x TimedOutError             DEADLINE_EXCEEDED
  x UnavailableError          UNAVAILABLE: try the same call again
  x ServerError               INTERNAL, DATA_LOSS: a fault of the service or of the numbers

An error crosses the wire as a reason and a sentence: in OperationResult.error for operations, in
google.rpc.ErrorInfo (domain "treadle") for calls. The class follows from the reason.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from treadle.v1 import types_pb2

DOMAIN: Final = "treadle"


class TreadleError(Exception):
    """Base of all errors; carries the catalogue's reason and a sentence that says what to do."""

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, reason: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status that the error has on the wire."""
        return spec_of(self.reason).code

    @property
    def retryable(self) -> bool:
        """Whether the same call, unchanged, may succeed later."""
        return spec_of(self.reason).retryable


class BadInputError(TreadleError):
    """The call's arguments are wrong."""

    default_reason = "BAD_VALUE"


class BadNameError(BadInputError):
    """A resource name or id is malformed."""

    default_reason = "BAD_NAME"


class BadBatchError(BadInputError):
    """A batch of training sequences cannot be used."""

    default_reason = "BAD_SHAPE"


class BadSamplingParamsError(BadInputError):
    """Sampling parameters are out of their range."""

    default_reason = "BAD_SAMPLING_PARAMS"


class SequenceError(BadInputError):
    """Operations or frames do not follow each other as agreed."""

    default_reason = "SEQ_GAP"


class NotFoundError(TreadleError):
    """There is no such thing, or it belongs to someone else: one answer for both."""

    default_reason = "RUN_NOT_FOUND"


class ConflictError(TreadleError):
    """The call clashes with what is there."""

    default_reason = "ADAPTER_EXISTS"


class SeqReusedError(ConflictError):
    """A seq was used again for other content."""

    default_reason = "SEQ_REUSED"


class StaleLeaseError(ConflictError):
    """Another worker has claimed the run since."""

    default_reason = "STALE_LEASE"


class DependencyFailedError(TreadleError):
    """An operation that this one stood on failed."""

    default_reason = "DEPENDENCY_FAILED"


class CancelledOperationError(TreadleError):
    """The operation was cancelled before it started."""

    default_reason = "CANCELLED"


class AccessError(TreadleError):
    """No key, a bad key, or a key without the scope."""

    default_reason = "UNAUTHENTICATED"


class LimitError(TreadleError):
    """Too much at once, or too large."""

    default_reason = "QUEUE_FULL"


class TimedOutError(TreadleError):
    """A deadline passed."""

    default_reason = "QUEUE_TIMEOUT"


class UnavailableError(TreadleError):
    """The service cannot answer now; the same call may succeed later."""

    default_reason = "UNAVAILABLE"


class ServerError(TreadleError):
    """A fault of the service, or numbers that stopped being finite."""

    default_reason = "INTERNAL"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """What a reason means on the wire and in Python."""

    code: grpc.StatusCode
    retryable: bool
    exception: type[TreadleError]


_C = grpc.StatusCode

CATALOGUE: Final[dict[str, ErrorSpec]] = {
    # Arguments.
    "BAD_VALUE": ErrorSpec(_C.INVALID_ARGUMENT, False, BadInputError),
    "BAD_NAME": ErrorSpec(_C.INVALID_ARGUMENT, False, BadNameError),
    "BAD_SCOPE": ErrorSpec(_C.INVALID_ARGUMENT, False, BadInputError),
    "BAD_LORA_CONFIG": ErrorSpec(_C.INVALID_ARGUMENT, False, BadInputError),
    "BAD_OPERATION": ErrorSpec(_C.INVALID_ARGUMENT, False, BadInputError),
    "BAD_PAGE_TOKEN": ErrorSpec(_C.INVALID_ARGUMENT, False, BadInputError),
    "BAD_SHAPE": ErrorSpec(_C.INVALID_ARGUMENT, False, BadBatchError),
    "BAD_BATCH_VALUE": ErrorSpec(_C.INVALID_ARGUMENT, False, BadBatchError),
    "UNKNOWN_LOSS": ErrorSpec(_C.INVALID_ARGUMENT, False, BadBatchError),
    "MISSING_LOSS_INPUT": ErrorSpec(_C.INVALID_ARGUMENT, False, BadBatchError),
    "TOKEN_OUT_OF_RANGE": ErrorSpec(_C.INVALID_ARGUMENT, False, BadBatchError),
    "SEQUENCE_TOO_LONG": ErrorSpec(_C.INVALID_ARGUMENT, False, BadBatchError),
    "BAD_SAMPLING_PARAMS": ErrorSpec(_C.INVALID_ARGUMENT, False, BadSamplingParamsError),
    "CONTEXT_OVERFLOW": ErrorSpec(_C.INVALID_ARGUMENT, False, BadSamplingParamsError),
    "BAD_ADAPTER_FILE": ErrorSpec(_C.INVALID_ARGUMENT, False, BadInputError),
    "BAD_FRAME": ErrorSpec(_C.INVALID_ARGUMENT, False, SequenceError),
    "FRAME_SIZE_MISMATCH": ErrorSpec(_C.INVALID_ARGUMENT, False, SequenceError),
    "SEQ_GAP": ErrorSpec(_C.OUT_OF_RANGE, False, SequenceError),
    "CREDIT_EXCEEDED": ErrorSpec(_C.OUT_OF_RANGE, False, SequenceError),
    # Things that are not there.
    "UNKNOWN_BASE": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "RUN_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "ADAPTER_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "MODEL_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "OPERATION_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "RESULT_GONE": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "TENANT_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "KEY_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "COMPLETION_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    "BLOB_NOT_FOUND": ErrorSpec(_C.NOT_FOUND, False, NotFoundError),
    # Clashes.
    "SEQ_REUSED": ErrorSpec(_C.ALREADY_EXISTS, False, SeqReusedError),
    "REQUEST_ID_REUSED": ErrorSpec(_C.ALREADY_EXISTS, False, ConflictError),
    "ADAPTER_EXISTS": ErrorSpec(_C.ALREADY_EXISTS, False, ConflictError),
    "RUN_EXISTS": ErrorSpec(_C.ALREADY_EXISTS, False, ConflictError),
    "TENANT_EXISTS": ErrorSpec(_C.ALREADY_EXISTS, False, ConflictError),
    "INCOMPATIBLE_ADAPTER": ErrorSpec(_C.FAILED_PRECONDITION, False, ConflictError),
    "NO_OPTIMIZER_STATE": ErrorSpec(_C.FAILED_PRECONDITION, False, ConflictError),
    "DIVERGED": ErrorSpec(_C.FAILED_PRECONDITION, False, ConflictError),
    "STALE_LEASE": ErrorSpec(_C.FAILED_PRECONDITION, True, StaleLeaseError),
    "DEPENDENCY_FAILED": ErrorSpec(_C.ABORTED, False, DependencyFailedError),
    "CANCELLED": ErrorSpec(_C.CANCELLED, False, CancelledOperationError),
    # Access.
    "UNAUTHENTICATED": ErrorSpec(_C.UNAUTHENTICATED, False, AccessError),
    "PERMISSION_DENIED": ErrorSpec(_C.PERMISSION_DENIED, False, AccessError),
    # Limits and time.
    "QUEUE_FULL": ErrorSpec(_C.RESOURCE_EXHAUSTED, True, LimitError),
    "RATE_LIMITED": ErrorSpec(_C.RESOURCE_EXHAUSTED, True, LimitError),
    "QUOTA_EXCEEDED": ErrorSpec(_C.RESOURCE_EXHAUSTED, False, LimitError),
    "FRAME_TOO_LARGE": ErrorSpec(_C.RESOURCE_EXHAUSTED, False, LimitError),
    "OPERATION_TOO_LARGE": ErrorSpec(_C.RESOURCE_EXHAUSTED, False, LimitError),
    "OUT_OF_MEMORY": ErrorSpec(_C.RESOURCE_EXHAUSTED, False, LimitError),
    "QUEUE_TIMEOUT": ErrorSpec(_C.DEADLINE_EXCEEDED, False, TimedOutError),
    "DEADLINE_EXCEEDED": ErrorSpec(_C.DEADLINE_EXCEEDED, True, TimedOutError),
    # Passing trouble.
    "UNAVAILABLE": ErrorSpec(_C.UNAVAILABLE, True, UnavailableError),
    "DRAINING": ErrorSpec(_C.UNAVAILABLE, True, UnavailableError),
    "NO_WORKER": ErrorSpec(_C.UNAVAILABLE, True, UnavailableError),
    "WORKER_LOST": ErrorSpec(_C.UNAVAILABLE, True, UnavailableError),
    "LEASE_HELD": ErrorSpec(_C.UNAVAILABLE, True, UnavailableError),
    # Faults.
    "UNIMPLEMENTED": ErrorSpec(_C.UNIMPLEMENTED, False, ServerError),
    "NAN_GRADIENT": ErrorSpec(_C.INTERNAL, False, ServerError),
    "NAN_LOGITS": ErrorSpec(_C.INTERNAL, False, ServerError),
    "INTERNAL": ErrorSpec(_C.INTERNAL, False, ServerError),
    "CHECKSUM_MISMATCH": ErrorSpec(_C.DATA_LOSS, True, ServerError),
}

_REASON_OF_CODE: Final[dict[grpc.StatusCode, str]] = {
    _C.UNAVAILABLE: "UNAVAILABLE",
    _C.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    _C.UNAUTHENTICATED: "UNAUTHENTICATED",
    _C.PERMISSION_DENIED: "PERMISSION_DENIED",
    _C.CANCELLED: "CANCELLED",
    _C.INVALID_ARGUMENT: "BAD_VALUE",
    _C.RESOURCE_EXHAUSTED: "FRAME_TOO_LARGE",
    _C.UNIMPLEMENTED: "UNIMPLEMENTED",
}


def spec_of(reason: str) -> ErrorSpec:
    """Returns the catalogue's entry; a reason from a newer peer counts as INTERNAL."""
    return CATALOGUE.get(reason, CATALOGUE["INTERNAL"])


def make_error(reason: str, message: str, retry_after_seconds: float | None = None) -> TreadleError:
    """Returns the exception that the catalogue names for `reason`."""
    return spec_of(reason).exception(message, reason, retry_after_seconds)


def to_operation_error(error: TreadleError) -> types_pb2.OperationError:
    """Returns the error as it stands in an OperationResult."""
    message = types_pb2.OperationError(
        code=error.code.value[0], reason=error.reason, message=error.message, retryable=error.retryable
    )
    if error.retry_after_seconds is not None:
        message.retry_after.FromNanoseconds(int(error.retry_after_seconds * 1e9))
    return message


def from_operation_error(message: types_pb2.OperationError) -> TreadleError:
    """Returns the exception for an error in an OperationResult."""
    wait = message.retry_after.ToNanoseconds() / 1e9 if message.HasField("retry_after") else None
    return make_error(message.reason, message.message, wait)


def to_status(error: TreadleError, request_id: str = "") -> status_pb2.Status:
    """Returns the rich gRPC status: code, sentence, ErrorInfo and, where it helps, RetryInfo.

    `request_id` is under which the service's log has the call.
    """
    metadata = {"request_id": request_id} if request_id else {}
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))]
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=details)


def from_rpc_error(error: grpc.RpcError) -> TreadleError:
    """Returns the exception for a failed call, whoever failed it."""
    code, text = error.code(), error.details() or "the call failed without a reason"
    status = rpc_status.from_call(error)
    reason, wait = _REASON_OF_CODE.get(code, "INTERNAL"), None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
        elif detail.Unpack(retry):
            wait = retry.retry_delay.ToNanoseconds() / 1e9
    return make_error(reason, text, wait)


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
