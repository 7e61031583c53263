"""`treadle-gateway`: serves the gateway as a process."""

from treadle_gateway.app import build, make_interceptors
from treadle_gateway.settings import GatewaySettings
from treadle_service.server import run_service


def main() -> None:
    """Serves until a signal has drained the gateway."""
    run_service("gateway", GatewaySettings, build, make_interceptors)


if __name__ == "__main__":
    main()
