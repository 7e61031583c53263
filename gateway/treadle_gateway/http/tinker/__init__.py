"""The Tinker face: what the `tinker` SDK speaks, translated into operations of runs.

Keeps no state: a future's id names the operation that it stands for, and the store has the rest.
"""

from treadle_gateway.http.tinker.face import make_face

__all__ = ["make_face"]
