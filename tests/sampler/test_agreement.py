"""Sampler and trainer give the same tokens nearly the same log-probs: at rounding level, bounded in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest

from bench.agreement import both, estimators
from treadle_engine.bases import pip_folder


@pytest.mark.parametrize(("dtype", "most", "most_k3"), [("float32", 3e-5, 1e-10), ("bfloat16", 0.6, 2e-3)])
def test_drawn_log_probs_are_the_trainers(dtype: str, most: float, most_k3: float) -> None:
    """Neither one token's log-prob nor the KL estimate between the two departs further than the dtype's rounding."""
    drawn, trained = both(str(pip_folder()), dtype, 8, 40)
    assert drawn.size == 320
    assert np.abs(drawn - trained).max() < most
    k1, k3 = estimators(drawn, trained)
    assert abs(k1) < np.abs(drawn - trained).max()
    assert 0 <= k3 < most_k3


def test_the_estimators_are_those_of_the_kl_divergence() -> None:
    """Over many draws from one distribution, k1 and k3 approach its KL divergence to another."""
    rng = np.random.default_rng(0)
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    tokens = rng.choice(3, size=200_000, p=q)
    expected = float((q * np.log(q / p)).sum())
    np.testing.assert_allclose(estimators(np.log(q)[tokens], np.log(p)[tokens]), expected, atol=2e-3)
