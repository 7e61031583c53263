"""Batches and results on the wire: exact both ways, small, and safe to read from strangers."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from treadle import wire
from treadle.errors import BadBatchError
from treadle.packing import split_rows
from treadle.types import Datum, ModelInput, TensorData
from treadle.v1 import types_pb2

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
IDS = st.integers(0, 2**31 - 1)


@st.composite
def batches(draw: st.DrawFn) -> list[Datum]:
    """Batches of all shapes: shifted or free targets, one or K per position, masks, constants, free floats."""
    width = draw(st.sampled_from([0, 0, 1, 3]))
    shifted = draw(st.booleans())
    kinds = {
        name: draw(st.sampled_from(["mask", "constant", "free"])) for name in draw(st.sets(st.sampled_from("abc")))
    }
    rows = []
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)):
        tokens = np.array(draw(st.lists(IDS, min_size=length + 1, max_size=length + 1)), np.int64)
        shape = (length, width) if width else (length,)
        if shifted and not width:
            targets = tokens[1:]
        else:
            targets = draw(hnp.arrays(np.int64, shape, elements=st.integers(-1, 2**31 - 1)))
        inputs: dict[str, object] = {"target_tokens": targets}
        for name, kind in kinds.items():
            if kind == "constant":
                inputs[name] = np.full(shape, draw(FLOATS), np.float32)
            else:
                elements = st.sampled_from([0.0, 1.0]) if kind == "mask" else FLOATS
                inputs[name] = draw(hnp.arrays(np.float32, shape, elements=elements))
        rows.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return rows


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Tells whether two float32 arrays have equal shapes and bits."""
    return left.shape == right.shape and left.tobytes() == right.tobytes()


@given(batches())
@settings(max_examples=200, deadline=None)
def test_a_batch_comes_back_bit_for_bit(data: list[Datum]) -> None:
    """Whatever layout the encoder chooses, decoding gives the columns that the data spell out."""
    expected = wire.columns_from_data(data)
    message = types_pb2.Batch.FromString(types_pb2.Batch(packed=wire.encode_batch(data)).SerializeToString())
    columns = wire.decode_batch(message)
    assert columns.lengths_R.tolist() == [datum.model_input.length for datum in data]
    assert columns.tokens_T.tolist() == [token for datum in data for token in datum.model_input.to_ints()]
    assert np.array_equal(columns.targets, np.concatenate([datum.array("target_tokens") for datum in data]))
    assert columns.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        assert same_bits(columns.columns[name], column)
        assert same_bits(column, np.concatenate([datum.array(name) for datum in data]))


def rl_row(length: int = 1024) -> Datum:
    """A row as RL loops send it: shifted targets, a mask, log-probs, one advantage."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, 50_000, length + 1)
    mask = np.arange(length) >= length // 4
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": rng.normal(size=length),
            "advantages": np.full(length, 0.5),
            "sequence_ratio_mask": mask,
        },
    )


def test_the_usual_batch_takes_about_eight_bytes_per_token() -> None:
    """Shifted targets, bit masks and per-row advantages are recognised; log-probs cost their 4 bytes."""
    packed = wire.encode_batch([rl_row()] * 8)
    assert packed.targets_shifted
    assert set(packed.row_columns) == {"advantages"}
    assert packed.columns["sequence_ratio_mask"].dtype == types_pb2.DTYPE_BITMASK
    assert packed.ByteSize() / (8 * 1024) < 8.2


def test_a_list_batch_gives_the_same_columns_as_a_packed_one() -> None:
    """The readable form is only another spelling."""
    data = [
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, -1], "weights": [0.5, 1]}),
        Datum(ModelInput.from_ints([7]), {"target_tokens": [9], "weights": [2]}),
    ]
    readable = types_pb2.DatumList()
    for datum in data:
        row = readable.data.add(tokens=datum.model_input.to_ints(), target_tokens=datum.array("target_tokens").tolist())
        row.loss_fn_inputs["weights"].values.extend(datum.array("weights").tolist())
    left = wire.decode_batch(types_pb2.Batch(list=readable))
    right = wire.decode_batch(types_pb2.Batch(packed=wire.encode_batch(data)))
    assert np.array_equal(left.lengths_R, right.lengths_R)
    assert np.array_equal(left.tokens_T, right.tokens_T)
    assert np.array_equal(left.targets, right.targets)
    assert same_bits(left.columns["weights"], right.columns["weights"])


def test_rows_with_different_numbers_of_targets_are_filled_up() -> None:
    """K may differ between data; the gaps have target -1 and weight 0."""
    one = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [3, 4], "weights": [1, 1]})
    two = Datum(ModelInput.from_ints([5]), {"target_tokens": [[6, 7]], "weights": [[0.25, 0.75]]})
    columns = wire.columns_from_data([one, two])
    assert columns.targets.tolist() == [[3, -1], [4, -1], [6, 7]]
    assert columns.columns["weights"].tolist() == [[1, 0], [1, 0], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("inputs", "words", "reason"),
    [
        ({}, "no target_tokens", "MISSING_LOSS_INPUT"),
        ({"target_tokens": [1]}, r"shape \[1\]", "BAD_SHAPE"),
        ({"target_tokens": [1, -2]}, "below -1", "TOKEN_OUT_OF_RANGE"),
        ({"target_tokens": [1, 2**31]}, "32 bits", "TOKEN_OUT_OF_RANGE"),
        ({"target_tokens": [1, 2], "weights": [1.0]}, "weights", "BAD_SHAPE"),
        ({"target_tokens": [1, 2], "weights": [1.0, float("nan")]}, "weights", "BAD_BATCH_VALUE"),
    ],
)
def test_bad_data_name_the_datum_and_the_field(inputs: dict[str, object], words: str, reason: str) -> None:
    """What is wrong is said before anything is sent."""
    with pytest.raises(BadBatchError, match=words) as caught:
        wire.encode_batch([Datum(ModelInput.from_ints([1, 2]), inputs)])
    assert caught.value.reason == reason
    assert "datum 0" in str(caught.value)


def test_an_empty_batch_is_refused_by_both_sides() -> None:
    """There is no batch of zero rows."""
    with pytest.raises(BadBatchError):
        wire.encode_batch([])
    for batch in (types_pb2.Batch(), types_pb2.Batch(packed=types_pb2.PackedBatch()), types_pb2.Batch(list={})):
        with pytest.raises(BadBatchError):
            wire.decode_batch(batch)


def test_a_value_that_is_not_finite_is_found_in_its_datum() -> None:
    """The server names the datum of a NaN that a foreign client sent."""
    packed = wire.encode_batch([rl_row(4), rl_row(4), rl_row(4)])
    logprobs = wire.numpy_from_tensor(packed.columns["logprobs"]).copy()
    logprobs[9] = np.inf
    packed.columns["logprobs"].CopyFrom(wire.tensor_from_numpy(logprobs))
    with pytest.raises(BadBatchError, match="datum 2: logprobs"):
        wire.decode_batch(types_pb2.Batch(packed=packed))


def test_a_row_above_the_limit_is_refused_with_both_numbers() -> None:
    """The message says how long the row is and how long it may be."""
    batch = types_pb2.Batch(packed=wire.encode_batch([rl_row(4), rl_row(8)]))
    with pytest.raises(BadBatchError, match="datum 1 has 8 positions; at most 6") as caught:
        wire.decode_batch(batch, max_positions=6)
    assert caught.value.reason == "SEQUENCE_TOO_LONG"


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=8))
@settings(max_examples=300, deadline=None)
def test_damaged_batches_give_a_batch_error_or_valid_columns(noise: bytes, position: int, patch: bytes) -> None:
    """Bytes of strangers never crash the decoder and never yield columns that do not fit."""
    honest = types_pb2.Batch(packed=wire.encode_batch([rl_row(5), rl_row(3)])).SerializeToString()
    for data in (noise, honest[:position] + patch + honest[position + len(patch) :]):
        try:
            batch = types_pb2.Batch.FromString(data)
        except DecodeError:
            continue
        try:
            columns = wire.decode_batch(batch)
        except BadBatchError:
            continue
        assert int(columns.lengths_R.sum()) == columns.num_positions == len(columns.targets)
        assert all(len(column) == columns.num_positions for column in columns.columns.values())


@given(
    st.integers(-2, 9),
    st.lists(st.integers(-(2**62), 2**62), max_size=10),
    st.binary(max_size=40),
    st.integers(0, 2),
    st.integers(0, 2**63),
)
@settings(max_examples=300, deadline=None)
def test_lying_tensors_give_a_batch_error(dtype: int, shape: list[int], data: bytes, codec: int, raw: int) -> None:
    """A tensor is what it says or an error; a huge shape allocates nothing."""
    tensor = types_pb2.Tensor(dtype=max(dtype, 0), shape=shape, data=data, codec=codec, raw_size=raw)  # type: ignore[arg-type]
    try:
        array = wire.numpy_from_tensor(tensor)
    except BadBatchError:
        return
    assert array.shape == tuple(shape)
    assert array.nbytes <= 32 * max(len(data), 1)


def test_bfloat16_arrives_as_the_same_numbers_in_float32() -> None:
    """numpy has no bfloat16; every one of them is a float32."""
    halves = np.array([0x3F80, 0xC040, 0x0000], "<u2")
    tensor = types_pb2.Tensor(dtype=types_pb2.DTYPE_BFLOAT16, shape=[3], data=halves.tobytes())
    assert wire.numpy_from_tensor(tensor).tolist() == [1.0, -3.0, 0.0]


@pytest.mark.parametrize("as_list", [False, True])
def test_outputs_come_back_row_by_row(as_list: bool) -> None:
    """Log-probabilities keep their bits and their rows in both forms."""
    logprobs = np.array([-0.1, -2.5, -3.25], np.float32)
    outputs = wire.encode_outputs(np.array([1, 2]), logprobs, {"loss:sum": 1.5}, as_list)
    rows, metrics = wire.decode_outputs(outputs)
    assert [row.tolist() for row in rows] == [logprobs[:1].tolist(), logprobs[1:].tolist()]
    assert metrics == {"loss:sum": 1.5}
    assert bool(outputs.logprobs_list) == as_list


def test_outputs_with_k_targets_keep_their_width() -> None:
    """Rows of [n, K] come back as [n, K]."""
    rows, _ = wire.decode_outputs(wire.encode_outputs(np.array([1, 2]), np.zeros((3, 4), np.float32), {}))
    assert [row.shape for row in rows] == [(1, 4), (2, 4)]


def test_tokens_of_both_forms_are_read() -> None:
    """Packed bytes and plain lists are the same tokens."""
    packed = wire.encode_tokens(np.array([1, 70_000], np.int32))
    assert wire.decode_tokens(packed).tolist() == [1, 70_000]
    assert wire.decode_tokens(types_pb2.Tokens(list={"ids": [1, 70_000]})).tolist() == [1, 70_000]
    with pytest.raises(BadBatchError):
        wire.decode_tokens(types_pb2.Tokens(packed=b"abc"))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(500, 20_000))
@settings(max_examples=50, deadline=None)
def test_cut_batches_keep_order_and_fit(lengths: list[int], limit: int) -> None:
    """Parts follow each other, lose nothing and fit unless a single row does not."""
    data = [rl_row(length) for length in lengths]
    parts = split_rows(data, limit)
    assert [datum for part in parts for datum in part] == data
    for part in parts:
        size = sum(len(tensor.data) for tensor in wire.encode_batch(part).columns.values())
        assert len(part) == 1 or size <= limit


def test_torch_tensors_are_taken_without_importing_torch() -> None:
    """Tensors are recognised by what they can do."""
    torch = pytest.importorskip("torch")
    data = TensorData.from_torch(torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True))
    assert data.to_numpy().tolist() == [0.5, 2.0]
    assert TensorData(torch.tensor([[1, 2]])).shape == (1, 2)
    assert TensorData([1, 2, 3, 4], dtype="int64", shape=[2, 2]).tolist() == [[1, 2], [3, 4]]
