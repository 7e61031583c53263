"""The dashboard: what a browser shows of runs and workers, served under `/`."""

from treadle_gateway.http.dashboard.face import make_face

__all__ = ["make_face"]
