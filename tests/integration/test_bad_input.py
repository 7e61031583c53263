"""Every kind of bad input gets its own reason and a sentence that helps, and a neighbour's run goes on unharmed.

All calls go through the gateway with the generated stubs, as a foreign client would make them.
"""

from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from tests.support.cluster import Cluster
from treadle.errors import from_rpc_error
from treadle.v1 import sampling_pb2, sampling_pb2_grpc, training_pb2, training_pb2_grpc, types_pb2

Operation = training_pb2.Operation
Request = training_pb2.StreamOperationsRequest


class Caller:
    """A tenant that speaks the public protos by hand."""

    def __init__(self, cluster: Cluster) -> None:
        self.channel = grpc.insecure_channel(cluster.gateway_address)
        self.metadata = (("authorization", f"Bearer {cluster.new_tenant()}"),)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.sampling = sampling_pb2_grpc.SamplingServiceStub(self.channel)

    def create_run(self, base: str = "treadle/pip", rank: int = 4) -> str:
        request = training_pb2.CreateRunRequest(base=base, lora=types_pb2.LoraConfig(rank=rank))
        return self.training.CreateRun(request, metadata=self.metadata, timeout=30).run.name

    def submit(self, run: str, operation: Operation) -> training_pb2.SubmitOperationResponse:
        request = training_pb2.SubmitOperationRequest(run=run, operation=operation)
        return self.training.SubmitOperation(request, metadata=self.metadata, timeout=30)

    def wait(self, run: str, seq: int) -> training_pb2.OperationResult:
        request = training_pb2.WaitOperationRequest(run=run, seq=seq)
        answer = self.training.WaitOperation(request, metadata=self.metadata, timeout=40)
        assert answer.done
        return answer.result

    def run_operation(self, run: str, operation: Operation) -> training_pb2.OperationResult:
        self.submit(run, operation)
        return self.wait(run, operation.seq)

    def stream(self, frames: list[Request]) -> list[training_pb2.StreamOperationsResponse]:
        return list(self.training.StreamOperations(iter(frames), metadata=self.metadata, timeout=30))

    def next_seq(self, run: str) -> int:
        request = training_pb2.GetRunRequest(name=run)
        return int(self.training.GetRun(request, metadata=self.metadata, timeout=30).run.next_seq)


@pytest.fixture
def caller(cluster: Cluster) -> Iterator[Caller]:
    made = Caller(cluster)
    yield made
    made.channel.close()


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = from_rpc_error(caught.value)
    assert len(error.message.split()) >= 4, f"not a sentence that helps: {error.message!r}"
    return error.reason


def forward_backward(seq: int, loss: str = "cross_entropy", **changes: object) -> Operation:
    """A small readable batch; `changes` replaces tokens, target_tokens or loss inputs."""
    tokens = changes.pop("tokens", [1, 5, 9])
    targets = changes.pop("target_tokens", [5, 9, 2])
    inputs = changes or {"weights": [1.0, 1.0, 1.0]}
    datum = types_pb2.Datum(
        tokens=tokens,
        target_tokens=targets,
        loss_fn_inputs={name: types_pb2.FloatList(values=values) for name, values in inputs.items()},
    )
    batch = types_pb2.Batch(list=types_pb2.DatumList(data=[datum]))
    return Operation(
        seq=seq,
        forward_backward=training_pb2.ForwardBackward(batch=batch, loss_fn=training_pb2.LossFn(name=loss)),
    )


def hello(run: str) -> Request:
    return Request(hello=training_pb2.Hello(protocol=1, run=run))


def test_an_unknown_run_and_a_foreign_run_get_the_same_answer(cluster: Cluster, caller: Caller) -> None:
    """Nobody can find out whether a run of somebody else exists."""
    owner = Caller(cluster)
    foreign = owner.create_run()
    unknown = foreign[:-3] + "zzz"
    for name in (foreign, unknown):
        assert reason_of(lambda n=name: caller.submit(n, forward_backward(1))) == "RUN_NOT_FOUND"
        assert reason_of(lambda n=name: caller.stream([hello(n)])) == "RUN_NOT_FOUND"
    messages = []
    for name in (foreign, unknown):
        with pytest.raises(grpc.RpcError) as caught:
            caller.training.GetRun(training_pb2.GetRunRequest(name=name), metadata=caller.metadata, timeout=30)
        messages.append(caught.value.details().replace(name, "NAME"))
    assert messages[0] == messages[1]


def test_a_call_without_a_key_is_refused(caller: Caller) -> None:
    """No key, no answer."""
    assert reason_of(lambda: caller.training.ListRuns(training_pb2.ListRunsRequest(), timeout=30)) == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("base", "rank", "reason"),
    [
        ("no/such-base", 4, "UNKNOWN_BASE"),
        ("treadle/pip", 4096, "BAD_LORA_CONFIG"),
        ("treadle/pip", 0, "BAD_LORA_CONFIG"),
    ],
)
def test_a_run_that_cannot_be_is_refused_at_creation(caller: Caller, base: str, rank: int, reason: str) -> None:
    """An unknown base or an impossible rank fails before anything is made."""
    assert reason_of(lambda: caller.create_run(base, rank)) == reason


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("BAD_SHAPE", {"weights": [1.0]}),
        ("TOKEN_OUT_OF_RANGE", {"tokens": [1, 5, 4096]}),
        ("TOKEN_OUT_OF_RANGE", {"target_tokens": [1, 5, 4096]}),
        ("SEQUENCE_TOO_LONG", {"tokens": [1] * 513, "target_tokens": [1] * 513, "weights": [1.0] * 513}),
        ("UNKNOWN_LOSS", {"loss": "hinge"}),
        ("MISSING_LOSS_INPUT", {"loss": "ppo", "weights": [1.0, 1.0, 1.0]}),
        (
            "BAD_BATCH_VALUE",
            {"loss": "importance_sampling", "logprobs": [0.0, 0.0, 0.0], "advantages": [1.0, float("nan"), 1.0]},
        ),
    ],
)
def test_a_bad_batch_fails_alone_and_the_run_goes_on(caller: Caller, reason: str, changes: dict[str, object]) -> None:
    """The operation carries the error; the next good one of the same run works."""
    run = caller.create_run()
    result = caller.run_operation(run, forward_backward(1, **changes))
    assert result.error.reason == reason, result.error.message
    assert len(result.error.message.split()) >= 4
    step = Operation(seq=2, optim_step=training_pb2.OptimStep())
    failed = caller.run_operation(run, step)
    assert failed.error.reason == "DEPENDENCY_FAILED"
    assert caller.run_operation(run, forward_backward(3)).error.reason == ""
    assert caller.run_operation(run, Operation(seq=4, optim_step=training_pb2.OptimStep())).optim_step.step == 1


def test_a_packed_tensor_whose_bytes_do_not_fit_its_shape_is_refused(caller: Caller) -> None:
    """A batch that claims more tokens than it carries fails as BAD_SHAPE."""
    run = caller.create_run()
    tokens = np.array([1, 5, 9], dtype="<i4")
    packed = types_pb2.PackedBatch(
        lengths=np.array([400], dtype="<u4").tobytes(),
        tokens=types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=[400], data=tokens.tobytes()),
        targets_shifted=True,
    )
    work = training_pb2.ForwardBackward(
        batch=types_pb2.Batch(packed=packed), loss_fn=training_pb2.LossFn(name="cross_entropy")
    )
    result = caller.run_operation(run, Operation(seq=1, forward_backward=work))
    assert result.error.reason == "BAD_SHAPE"


def test_a_seq_gap_and_a_reused_seq_are_told_apart(caller: Caller) -> None:
    """A gap says which seq comes next; other content under an old seq is refused; the same content is not."""
    run = caller.create_run()
    assert reason_of(lambda: caller.stream([hello(run), Request(operation=forward_backward(3))])) == "SEQ_GAP"
    assert reason_of(lambda: caller.stream([hello(run), Request(operation=forward_backward(500))])) == "CREDIT_EXCEEDED"
    assert reason_of(lambda: caller.submit(run, forward_backward(500))) == "QUEUE_FULL"
    assert not caller.submit(run, forward_backward(1)).replayed
    assert caller.submit(run, forward_backward(1)).replayed
    assert reason_of(lambda: caller.submit(run, forward_backward(1, weights=[2.0, 2.0, 2.0]))) == "SEQ_REUSED"
    assert caller.wait(run, 1).error.reason == ""


def test_a_frame_that_lies_about_its_size_ends_the_stream_and_nothing_else(caller: Caller) -> None:
    """Parts of an operation that do not add up are refused; the run is as before."""
    run = caller.create_run()
    data = forward_backward(1).SerializeToString()
    lies = [
        training_pb2.OperationFragment(total_bytes=len(data) * 2, offset=0, data=data),
        training_pb2.OperationFragment(total_bytes=len(data) * 2, offset=5, data=data),
    ]
    assert reason_of(lambda: caller.stream([hello(run), *(Request(fragment=f) for f in lies)])) == "FRAME_SIZE_MISMATCH"
    huge = training_pb2.OperationFragment(total_bytes=1 << 40, offset=0, data=data)
    assert reason_of(lambda: caller.stream([hello(run), Request(fragment=huge)])) == "OPERATION_TOO_LARGE"
    assert caller.next_seq(run) == 1
    assert caller.run_operation(run, forward_backward(1)).error.reason == ""


def test_a_stream_that_does_not_begin_with_hello_is_refused(caller: Caller) -> None:
    """The first frame must name the run."""
    assert reason_of(lambda: caller.stream([Request(operation=forward_backward(1))])) == "BAD_FRAME"


def test_a_client_that_vanishes_in_mid_stream_leaves_its_operations_to_finish(caller: Caller) -> None:
    """Accepted is kept: the result is there when somebody asks again."""
    run = caller.create_run()

    def frames() -> Iterator[Request]:
        yield hello(run)
        yield Request(operation=forward_backward(1))

    call = caller.training.StreamOperations(frames(), metadata=caller.metadata)
    assert next(call).HasField("welcome")
    while caller.next_seq(run) == 1:
        pass
    call.cancel()
    assert caller.wait(run, 1).forward_backward.outputs.metrics["loss:sum"] > 0


@pytest.mark.parametrize(
    ("reason", "params"),
    [
        ("BAD_SAMPLING_PARAMS", {"max_tokens": -1}),
        ("BAD_SAMPLING_PARAMS", {"max_tokens": 4, "temperature": float("nan")}),
        ("BAD_SAMPLING_PARAMS", {"max_tokens": 4, "top_p": 0.0}),
        ("CONTEXT_OVERFLOW", {"max_tokens": 100_000}),
    ],
)
def test_bad_sampling_parameters_are_refused(caller: Caller, reason: str, params: dict[str, float]) -> None:
    """Each has its reason."""
    request = sampling_pb2.SampleRequest(
        model="treadle/pip",
        prompt=types_pb2.Tokens(list=types_pb2.TokenList(ids=[1, 5, 9])),
        params=sampling_pb2.SamplingParams(**params),
    )
    assert reason_of(lambda: caller.sampling.Sample(request, metadata=caller.metadata, timeout=30)) == reason


def test_unknown_models_and_tokens_are_refused_by_the_sampler(caller: Caller) -> None:
    """A model that is not there, or a token outside of the vocabulary."""
    for model, ids, reason in (
        ("no/such", [1], "MODEL_NOT_FOUND"),
        ("tenants/somebody/runs/r-1/revisions/x", [1], "MODEL_NOT_FOUND"),
        ("treadle/pip", [4096], "TOKEN_OUT_OF_RANGE"),
    ):
        request = sampling_pb2.SampleRequest(
            model=model,
            prompt=types_pb2.Tokens(list=types_pb2.TokenList(ids=ids)),
            params=sampling_pb2.SamplingParams(max_tokens=2),
        )
        assert reason_of(lambda r=request: caller.sampling.Sample(r, metadata=caller.metadata, timeout=30)) == reason


def test_a_poisoned_run_leaves_its_neighbour_bit_for_bit_alone(cluster: Cluster) -> None:
    """A neighbour's losses are the same bits whether or not somebody trains to NaN beside it."""

    def train(company: bool) -> list[float]:
        good, bad = Caller(cluster), Caller(cluster)
        mine, theirs = good.create_run(), bad.create_run()
        losses = []
        for step in range(4):
            good.submit(mine, forward_backward(2 * step + 1))
            if company:
                bad.submit(theirs, forward_backward(2 * step + 1, weights=[1e30, -1e30, 1e30]))
                rate = types_pb2.AdamParams(learning_rate=1e30)
                bad.submit(theirs, Operation(seq=2 * step + 2, optim_step=training_pb2.OptimStep(adam=rate)))
            adam = types_pb2.AdamParams(learning_rate=0.01)
            good.submit(mine, Operation(seq=2 * step + 2, optim_step=training_pb2.OptimStep(adam=adam)))
        for step in range(4):
            losses.append(good.wait(mine, 2 * step + 1).forward_backward.outputs.metrics["loss:sum"])
            assert good.wait(mine, 2 * step + 2).error.reason == ""
        return losses

    alone = train(company=False)
    assert train(company=True) == alone
    assert alone[-1] < alone[0]
