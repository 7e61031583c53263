"""The OpenAI face: completions, chat completions and models over Treadle's sampling.

Keeps no state; completions that are to be kept go to the store.
"""

from treadle_gateway.http.openai.face import make_face

__all__ = ["make_face"]
