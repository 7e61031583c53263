"""The SDK's values: Tinker's names and argument order, checks before anything is sent, a light import."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import treadle
from treadle import types
from treadle.batches import loss_from, merge_metrics, output_from, prepare_forward_backward, target_shapes
from treadle.convert import lora_from_proto, lora_to_proto, sampling_to_proto
from treadle.custom_loss import weighted_data
from treadle.errors import BadInputError, BadSamplingParamsError
from treadle.frames import MAX_FRAME_BYTES
from treadle.v1 import training_pb2
from treadle.wire import decode_batch, encode_outputs


def test_the_public_names_are_these() -> None:
    """A change here is a change for every user."""
    assert dir(treadle) == [
        "AdamParams", "Datum", "Handle", "LoraConfig", "ModelInput", "SamplingClient", "SamplingParams",
        "ServiceClient", "TensorData", "TrainingClient", "TreadleError", "errors", "types",
    ]  # fmt: skip
    assert all(getattr(treadle, name) is not None for name in dir(treadle))
    with pytest.raises(AttributeError):
        treadle.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            treadle.ServiceClient.create_lora_training_client,
            "base_model rank seed train_mlp train_attn train_unembed user_metadata",
        ),
        (treadle.ServiceClient.create_sampling_client, "model_path base_model"),
        (treadle.TrainingClient.forward_backward, "data loss_fn loss_fn_config"),
        (treadle.TrainingClient.optim_step, "adam_params"),
        (treadle.SamplingClient.sample, "prompt num_samples sampling_params include_prompt_logprobs"),
        (treadle.SamplingParams, "max_tokens seed stop temperature top_k top_p"),
        (treadle.AdamParams, "learning_rate beta1 beta2 eps weight_decay grad_clip_norm"),
    ],
)
def test_arguments_come_in_the_order_that_users_know(function: object, parameters: str) -> None:
    """Positional calls written for Tinker mean the same here."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]
    assert names[: len(parameters.split())] == parameters.split()


def test_importing_the_package_loads_no_heavy_module() -> None:
    """`import treadle` and the value types need neither grpc's core nor torch."""
    code = "import sys, treadle; print(sorted({'grpc', 'numpy', 'torch', 'google'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys, treadle.client; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False False\n"


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_an_impossible_rank_is_refused_at_once(rank: int) -> None:
    """No call is needed to say so."""
    with pytest.raises(BadInputError, match="rank") as caught:
        types.LoraConfig(rank=rank)
    assert caught.value.reason == "BAD_LORA_CONFIG"


def test_an_adapter_that_trains_nothing_is_refused() -> None:
    """At least one part of the model must get an adapter."""
    with pytest.raises(BadInputError, match="at least one"):
        types.LoraConfig(train_attn=False, train_mlp=False, train_unembed=False)


def test_lora_settings_survive_the_wire() -> None:
    """What was asked for is what comes back."""
    lora = types.LoraConfig(rank=8, seed=5, train_mlp=False, alpha=16.0)
    assert lora_from_proto(lora_to_proto(lora)) == lora


@pytest.mark.parametrize(
    "changes", [{"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"seed": -1}]
)
def test_impossible_sampling_parameters_are_refused_at_once(changes: dict[str, float]) -> None:
    """Before anything is sent."""
    with pytest.raises(BadSamplingParamsError):
        types.SamplingParams(**changes)  # type: ignore[arg-type]


def test_stops_may_be_text_or_tokens_and_an_empty_list_ignores_the_end_of_text() -> None:
    """All forms of `stop` reach the service."""
    assert list(sampling_to_proto(types.SamplingParams(stop="\n")).stop_strings) == ["\n"]
    assert list(sampling_to_proto(types.SamplingParams(stop=[5, 6])).stop_tokens) == [5, 6]
    assert sampling_to_proto(types.SamplingParams(stop=[])).ignore_eos
    assert not sampling_to_proto(types.SamplingParams()).ignore_eos
    assert sampling_to_proto(types.SamplingParams()).HasField("seed")


def row(length: int) -> types.Datum:
    """A training sequence with free weights."""
    tokens = np.arange(length + 1) % 1000
    weights = np.linspace(0.1, 1, length)
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})


def test_a_large_batch_is_cut_and_its_results_are_joined() -> None:
    """Outputs come back per datum in order; metrics by their reduction."""
    data = [row(length) for length in (40_000, 50_000, 60_000, 10)]
    operations = prepare_forward_backward(data, loss_from("cross_entropy", None))
    assert len(operations) == 3
    assert len(prepare_forward_backward(data[:2], loss_from("cross_entropy", None))) == 1
    assert all(operation.num_bytes <= MAX_FRAME_BYTES for operation in operations)
    results = []
    for operation in operations:
        kind = training_pb2.ForwardBackward.FromString(operation.body)
        columns = decode_batch(kind.batch)
        outputs = encode_outputs(
            columns.lengths_R, columns.columns["weights"], {"loss:sum": 1.0, "n:max": columns.num_rows}
        )
        results.append(
            training_pb2.OperationResult(forward_backward=training_pb2.ForwardBackwardResult(outputs=outputs))
        )
    output = output_from(results, target_shapes(data))
    for datum, entry in zip(data, output.loss_fn_outputs, strict=True):
        assert np.array_equal(entry["logprobs"].to_numpy(), datum.array("weights"))
    assert output.metrics == {"loss:sum": 3.0, "n:max": 2.0}


def test_metrics_of_parts_are_combined_by_their_reduction() -> None:
    """Means are weighted by data; what has no known reduction is left out."""
    parts = [
        (1, {"a:sum": 1, "b:mean": 2, "c:min": 3, "d:max": 4, "e:hash": 5}),
        (3, {"a:sum": 1, "b:mean": 6, "c:min": 1, "d:max": 1}),
    ]
    assert merge_metrics(parts) == {"a:sum": 2, "b:mean": 5, "c:min": 1, "d:max": 4}


def test_loss_settings_are_numbers() -> None:
    """A setting that is not a number is named."""
    with pytest.raises(BadInputError, match="beta"):
        loss_from("dro", {"beta": "high"})  # type: ignore[dict-item]


def test_a_custom_loss_becomes_the_weights_of_a_cross_entropy() -> None:
    """The weights are minus the gradient of the user's loss by the log-probabilities."""
    pytest.importorskip("torch")
    data = [row(3), row(2)]
    logprobs = [np.array([-1.0, -2.0, -3.0], np.float32), np.array([-0.5, -0.25], np.float32)]
    weighted, metrics = weighted_data(data, logprobs, lambda _, rows: ((rows[0] ** 2).sum() - rows[1].sum(), {"k": 7}))
    assert weighted[0].array("weights").tolist() == [2.0, 4.0, 6.0]
    assert weighted[1].array("weights").tolist() == [1.0, 1.0]
    assert metrics == {"loss:sum": 14.75, "k": 7.0}


def test_model_inputs_grow_without_changing() -> None:
    """Appending gives a new input."""
    start = types.ModelInput.from_ints([1, 2])
    longer = start.append_int(3)
    assert (start.to_ints(), longer.to_ints(), longer.length) == ([1, 2], [1, 2, 3], 3)
    assert types.ModelInput.empty().to_ints() == []
