"""Who takes part in which step."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampler.conftest import make_prompt
from tests.sampler.driving import run
from tests.sampler.test_invariance import assert_same_bits
from treadle_engine.decode import Decoder
from treadle_engine.decode_base import DecodeBase
from treadle_engine.decode_requests import SampleRequest
from treadle_engine.lora import AdapterWeights
from treadle_engine.sampling_params import SamplingParams
from treadle_engine.step_turns import RECENT_STEPS, StepTurns

FIXED = 16.0
STEPS = 400


def drive(rows: dict[str, float], fixed: float = FIXED) -> tuple[Counter[str], float]:
    """Return how many of STEPS steps each owner was in, and the length of all in rows."""
    turns, took_part, length = StepTurns(fixed), Counter[str](), 0.0
    for _ in range(STEPS):
        chosen = turns.choose(rows)
        assert chosen, "somebody takes part"
        turns.charge({owner: rows[owner] for owner in chosen})
        took_part.update(chosen)
        length += fixed + sum(rows[owner] for owner in chosen)
    return took_part, length


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 500), min_size=1))
def test_nobody_waits_longer_than_under_ideal_sharing(rows: dict[str, float]) -> None:
    """The lightest owner waits for about N steps of its own per token, and a heavy one is not shut out."""
    took_part, length = drive(rows)
    lightest = min(rows, key=lambda owner: rows[owner])
    fair = len(rows) * (FIXED + rows[lightest])
    longest = FIXED + sum(rows.values())
    # Not exactly: about equal ones may take turns in the short steps.
    assert length / took_part[lightest] <= 1.5 * fair + longest / STEPS
    # Every owner is in each full step, of which there is one per excess that was made up for.
    assert min(took_part.values()) >= STEPS / (2 + 2 * longest / fair)


def test_equal_owners_share_every_step() -> None:
    """Merging is what the batch is for."""
    took_part, _ = drive({"a": 40, "b": 47, "c": 44})
    assert set(took_part.values()) == {STEPS}


def test_a_large_devices_steps_are_everybodys() -> None:
    """Where rows cost next to nothing, sitting out would help nobody."""
    took_part, _ = drive({"a": 1, "b": 200}, fixed=1000.0)
    assert set(took_part.values()) == {STEPS}


def test_who_had_fewest_rows_comes_first() -> None:
    """Also after a few steps away, but not for ever; who is new begins level with the first of those who are there."""
    turns = StepTurns(FIXED)
    for rows in ({"heavy": 30.0, "light": 1.0}, {"heavy": 30.0}):
        turns.choose(rows)
        turns.charge(rows)
    assert turns.in_turn(["heavy", "light"]) == ["light", "heavy"]
    assert turns.in_turn(["heavy", "a-newcomer"]) == ["a-newcomer", "heavy"]
    assert turns.fair_length({"heavy": 30.0}) == 2 * (FIXED + 1.0) - FIXED
    for _ in range(RECENT_STEPS):
        turns.choose({"heavy": 30.0})
        turns.charge({"heavy": 30.0})
    assert turns.fair_length({"heavy": 30.0}) == math.inf


def test_a_light_owner_gets_steps_of_its_own_and_the_same_bits(
    base: DecodeBase, adapters: list[AdapterWeights]
) -> None:
    """Beside forty samples of another it does not take part in theirs alone; nobody's numbers change with that."""
    params = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
    flood = SampleRequest(make_prompt(60, 1), params, adapters[0], num_samples=40, owner="flood")
    light = SampleRequest(make_prompt(20, 2), params, adapters[1], owner="light")
    other = SampleRequest(make_prompt(33, 3), params, None, num_samples=5, owner="other")
    alone = [run(Decoder(base), [request])[0] for request in (flood, light, other)]
    for outcome, expected in zip(run(Decoder(base), [flood, light, other], joins=[0, 3, 6]), alone, strict=True):
        assert_same_bits(outcome, expected)

    decoder, shared, apart = Decoder(base), 0, 0
    decoder.add(flood)
    for _ in range(3):
        decoder.step()
    number, ended = decoder.add(light), False
    while not ended:
        ended = any(event.request == number and getattr(event, "stop", None) for event in decoder.step())
        shared += decoder.owners["flood"] > 0
        apart += not decoder.owners["flood"]
    assert shared >= 5
    assert shared <= apart <= 3 * shared
