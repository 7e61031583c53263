"""What services have in common as ranks of a group that torchrun started. Knows nothing of what the ranks compute."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar

from treadle_service.logs import get_logger

log = get_logger(__name__)


class Group(Protocol):
    """The processes that torchrun started together, as one of them sees them."""

    rank: int
    size: int

    def leave(self) -> None:
        """Closes the connections, which all ranks do."""


GroupT = TypeVar("GroupT", bound=Group)
T = TypeVar("T")


class Leader(Generic[GroupT]):
    """Rank 0's place in its group, from before the base is loaded; each service adds what the others are told."""

    def __init__(self, meet: Callable[[str, float], GroupT], timeout_seconds: float) -> None:
        """`meet` takes a device and the timeout: a rank that does not answer for so long is lost."""
        self._meet, self._timeout_seconds = meet, timeout_seconds
        self._group: GroupT | None = None

    @property
    def beat_seconds(self) -> float:
        """How often the others must hear something, for them to know that rank 0 lives."""
        return self._timeout_seconds / 4

    @property
    def has_met(self) -> bool:
        """Whether `join` has succeeded."""
        return self._group is not None

    @property
    def group(self) -> GroupT:
        """The group; RuntimeError before `join`."""
        if self._group is None:
            raise RuntimeError("the ranks have not met")
        return self._group

    def join(self, device: str) -> GroupT:
        """Meets the others, on the thread that loads."""
        self._group = self._meet(device, self._timeout_seconds)
        return self._group


def tell_end(share: Callable[[None], object], lost: type[Exception]) -> None:
    """Tells the others that nothing comes any more on a line; that a rank is `lost` changes nothing now."""
    try:
        share(None)
    except lost as error:
        log.warning("rank_lost", error=str(error))


def follow_rank_0(
    load: Callable[[], tuple[GroupT, T]], obey: Callable[[GroupT, T], None], lost: type[Exception]
) -> None:
    """Loads and does what rank 0 says until it ends; ends this process when a rank is `lost` while they load."""
    leave_signals_to_rank_0()
    try:
        group, loaded = load()
    except lost as error:
        give_up(error)
    log.info("rank_ready", rank=group.rank, size=group.size)
    obey(group, loaded)
    group.leave()
    log.info("rank_ended", rank=group.rank)


def leave_signals_to_rank_0() -> None:
    """Ignores what torchrun sends to all ranks at once: rank 0 needs the others while it drains, and then ends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def give_up(error: BaseException) -> NoReturn:
    """Ends this process as a crash would, without another answer, so that torchrun starts all ranks again."""
    log.error("group_lost", error=f"{type(error).__name__}: {error}", exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
