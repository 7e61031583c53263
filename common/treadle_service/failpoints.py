"""Named places in the services where a test has the process die, stall or fail, to see that nobody is hurt by it.

Every durable write has one place before it and one behind it, every hand-over between processes has one in between.
Nothing is armed unless a service's settings ask for it and allow it. Knows nothing of what the places stand between.
"""

import os
import re
import signal
import time
from dataclasses import dataclass
from typing import Final, Literal

from treadle.errors import CATALOGUE, make_error

WRITES: Final[dict[str, str]] = {
    "store.commit": "the database's commit, of whichever writes share it",
    "store.put_blob": "a blob becomes visible",
    "store.register_run": "a run is added to the catalog",
    "store.claim_run": "a lease is taken",
    "store.renew_leases": "leases are extended",
    "store.release_run": "a lease is given back",
    "store.write_journal": "operations and results are written",
    "store.write_snapshot": "a snapshot's row is written",
    "store.record_adapter": "a saved adapter's row is written",
    "trainer.claim": "the store is asked for a lease",
    "trainer.write_journal": "operations and results are sent to the store",
    "trainer.put_snapshot": "a snapshot's blob is sent to the store",
    "trainer.write_snapshot": "a snapshot's row is sent to the store",
    "trainer.put_adapter": "a saved adapter's files are sent to the store",
    "trainer.record_adapter": "a saved adapter's row is sent to the store",
    "trainer.release": "a lease is given back to the store",
    "gateway.register_run": "a new run is sent to the store",
}
"""Durable writes; each has the failpoints `NAME.before` and `NAME.after`."""

HAND_OVERS: Final[dict[str, str]] = {
    "trainer.hello": "a stream has said which run it is about",
    "trainer.accepted": "an operation is in the run's order, not yet in the journal",
    "trainer.welcome": "the stream's state is about to be told",
    "trainer.result": "a result is about to be sent",
    "trainer.loaded": "a recovered run's state is on the device, its journal not yet replayed",
    "trainer.recovered": "a recovered run's journal is queued for replay",
    "trainer.pass": "a pass has been computed, nothing of it is recorded",
    "trainer.step": "an optimizer step has been computed, nothing of it is recorded",
    "trainer.leaving": "a run's snapshot is stored, its lease not yet given back",
    "gateway.hello": "a stream's first frame has come, its trainer is not chosen",
    "gateway.forward": "a frame of a client is about to go to the trainer",
    "gateway.answer": "a frame of a trainer is about to go to the client",
}
"""Places between two processes."""

LENDING: Final[dict[str, str]] = {
    "trainer.lend": "a chunk is about to go to a trainer that helps",
    "trainer.lent": "another trainer's chunk has been computed, nothing of it is sent",
    "trainer.lent_piece": "a piece of the gradient of another trainer's chunk has been sent",
    "trainer.add_lent": "gradients that were computed apart are about to be added",
    "trainer.added_lent": "they have been added, their operation has not ended",
}
"""Places between two trainers, which only a large batch comes to."""

FAILPOINTS: Final[tuple[str, ...]] = (
    *(f"{name}.{side}" for name in WRITES for side in ("before", "after")),
    *HAND_OVERS,
    *LENDING,
)

_PLAN: Final = re.compile(
    r"(?P<name>[a-z_.]+)=(?P<action>kill|sleep|raise)(:(?P<argument>\w+(\.\d+)?))?(@(?P<hit>\d+))?"
)


@dataclass(slots=True)
class _Plan:
    """What happens at a failpoint at its `hit`-th visit; after that, nothing any more."""

    action: Literal["kill", "sleep", "raise"]
    argument: str
    hit: int


_armed: dict[str, _Plan] = {}


def arm(plans: str, *, allowed: bool) -> None:
    """Arms failpoints for the rest of the process's life.

    Args:
        plans: `NAME=ACTION[:ARGUMENT][@VISIT]`, separated by commas: `store.commit.after=kill@3`. Actions: `kill` ends
            the process as SIGKILL does, `sleep:SECONDS` holds up the thread, `raise:REASON` raises that TreadleError.
        allowed: whether this deployment may have failpoints at all.

    Raises:
        ValueError: failpoints are not allowed, or the text is wrong.
    """
    if plans and not allowed:
        raise ValueError("failpoints are for tests: they need allow_failpoints as well")
    for part in filter(None, plans.split(",")):
        match = _PLAN.fullmatch(part)
        if match is None or match["name"] not in FAILPOINTS:
            raise ValueError(
                f"{part!r} is no failpoint: NAME=kill, NAME=sleep:SECONDS or NAME=raise:REASON, then @VISIT"
            )
        action, argument = match["action"], match["argument"] or ""
        if (action == "raise" and argument not in CATALOGUE) or (action == "sleep" and not argument[:1].isdigit()):
            raise ValueError(f"{part!r}: sleep needs seconds, raise a reason of the catalogue")
        _armed[match["name"]] = _Plan(action, argument, int(match["hit"] or 1))  # type: ignore[arg-type]  # The pattern's.


def reach(name: str) -> None:
    """Says that the process is at `name`; usually nothing happens. Raises what `raise` says."""
    plan = _armed.get(name)
    if plan is None:
        return
    plan.hit -= 1
    if plan.hit > 0:
        return
    del _armed[name]
    if plan.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif plan.action == "sleep":
        time.sleep(float(plan.argument))
    else:
        raise make_error(plan.argument, f"the failpoint {name} was armed with it")


class around:  # noqa: N801  Reads as the word that it is: `with failpoints.around("store.commit"):`.
    """A durable write: reaches `NAME.before` at its beginning and, unless it raised, `NAME.after` at its end."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        reach(self._name + ".before")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            reach(self._name + ".after")
