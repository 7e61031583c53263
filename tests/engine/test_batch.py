"""What a training batch is refused for, and how it is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.builders import make_batch
from treadle_engine.base_model import BaseModel
from treadle_engine.batch import TokenBatch
from treadle_engine.errors import EngineError
from treadle_engine.passes import TrainingEngine


def refused(batch: TokenBatch, base: BaseModel, loss: str = "cross_entropy") -> EngineError:
    """Return the error that validation ends in."""
    with pytest.raises(EngineError) as caught:
        batch.validate(base.info, loss)
    return caught.value


def test_good_batches_pass(pip: BaseModel) -> None:
    """Every loss accepts its own inputs; forward alone needs no weights."""
    for loss in ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"):
        make_batch([5, 9], 0, 1024, loss).validate(pip.info, loss)
    replace(make_batch([5], 0, 1024), columns={}).validate(pip.info, "cross_entropy", forward_only=True)


def test_values_out_of_range_name_datum_and_position(pip: BaseModel) -> None:
    """The message points at the first wrong number."""
    batch = make_batch([5, 9], 0, 1024)
    batch.tokens_T[7] = 1024
    error = refused(batch, pip)
    assert error.reason == "TOKEN_OUT_OF_RANGE"
    assert "datum 1, position 2: token is 1024" in error.message
    batch = make_batch([5, 9], 0, 1024)
    batch.targets_TK[4] = -2
    assert "datum 0, position 4: target is -2" in refused(batch, pip).message
    batch = make_batch([5, 9], 0, 1024)
    batch.columns["weights"][13] = np.inf
    error = refused(batch, pip)
    assert error.reason == "BAD_VALUE"
    assert "datum 1, position 8: weights is inf" in error.message


def test_long_sequences_are_refused_with_both_numbers(pip: BaseModel) -> None:
    """A datum longer than the context, or than a pass, says how long and how long it may be."""
    error = refused(make_batch([3, 513], 0, 1024), pip)
    assert error.reason == "SEQUENCE_TOO_LONG"
    assert "datum 1 has 513 tokens" in error.message
    assert "512" in error.message
    with pytest.raises(EngineError, match="2000 tokens, this trainer takes at most 1024"):
        TrainingEngine(pip, max_tokens_per_pass=1024).split(make_batch([10, 2000], 0, 1024))


def test_shapes_must_agree(pip: BaseModel) -> None:
    """Lengths, targets and columns that do not fit each other are BAD_SHAPE."""
    good = make_batch([5, 9], 0, 1024)
    wrong = [
        replace(good, lengths_R=np.array([5, 8])),
        replace(good, lengths_R=np.array([14, 0])),
        replace(good, lengths_R=np.array([], dtype=np.int64)),
        replace(good, targets_TK=good.targets_TK[:-1]),
        replace(good, columns={"weights": good.columns["weights"][:-1]}),
    ]
    assert {refused(batch, pip).reason for batch in wrong} == {"BAD_SHAPE"}
    two = replace(make_batch([5], 0, 1024, "ppo"), targets_TK=np.zeros((5, 2), dtype=np.int32), columns={})
    assert refused(two, pip, "ppo").reason == "BAD_SHAPE"


def test_missing_and_unknown_inputs_are_refused(pip: BaseModel) -> None:
    """A loss without its inputs, an unknown loss, and a column that nothing reads."""
    batch = make_batch([5], 0, 1024)
    assert refused(batch, pip, "ppo").reason == "MISSING_LOSS_INPUT"
    assert refused(batch, pip, "mse").reason == "UNKNOWN_LOSS"
    batch.columns["weihgts"] = batch.columns["weights"]
    assert refused(batch, pip).reason == "BAD_VALUE"
