"""The reward of `treadle rl`: all the code that a user writes."""


def friends(row: dict[str, str], completion: str) -> float:
    return float(completion.endswith("They were friends from that day on."))
