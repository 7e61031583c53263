"""The gateway's fixture, for commands that talk to one."""

from tests.gateway.conftest import front, gateway_settings

__all__ = ["front", "gateway_settings"]
