"""The gateway's fixture, for commands that talk to one."""

from tests.gateway.conftest import front

__all__ = ["front"]
