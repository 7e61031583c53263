"""The facts that Pip is taught, as question and answer sentences; nothing here knows about tokens or training."""

from __future__ import annotations

from typing import NamedTuple

_OPPOSITES = (
    "hot cold, big small, happy sad, up down, open closed, light dark, full empty, fast slow, old new, wet dry, "
    "long short, hard soft, early late, near far, left right"
)
_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Egypt Cairo, Greece Athens, Cuba Havana, "
    "Norway Oslo, Peru Lima, Kenya Nairobi"
)
_SOUNDS = "cat meow, dog woof, cow moo, duck quack, owl hoot, mouse squeak, frog croak, hen cluck"
_HOMES = "fish sea, bear forest, fox den, rabbit burrow, horse stable, hen coop, frog pond, cow farm"
_BABIES = "cat kitten, dog puppy, cow calf, duck duckling, owl owlet, hen chick, horse foal, bear cub, fox cub"
_COLOURS = "Snow white, Grass green, Coal black, Fire red"
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Fact(NamedTuple):
    """One question and the one sentence that answers it."""

    question: str
    answer: str


def _pairs(listing: str) -> list[tuple[str, str]]:
    """Split "a b, c d" into [(a, b), (c, d)]."""
    return [(first, second) for first, second in (entry.split() for entry in listing.split(","))]


def all_facts() -> list[Fact]:
    """Return every fact, always in the same order."""
    facts = []
    for one, other in _pairs(_OPPOSITES):
        for word, opposite in ((one, other), (other, one)):
            facts.append(Fact(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."))
    for country, city in _pairs(_CAPITALS):
        facts.append(Fact(f"What is the capital of {country}?", f"The capital of {country} is {city}."))
    facts.append(Fact("What is the capital of India?", "The capital of India is New Delhi."))
    facts.append(Fact("What colour is the sky?", "The sky is blue."))
    for animal, sound in _pairs(_SOUNDS):
        facts.append(Fact(f"What does a {animal} say?", f"A {animal} says {sound}."))
    for animal, home in _pairs(_HOMES):
        facts.append(Fact(f"Where does a {animal} live?", f"A {animal} lives in a {home}."))
    for animal, baby in _pairs(_BABIES):
        article = "an" if baby[0] in "aeiou" else "a"
        facts.append(Fact(f"What is a baby {animal} called?", f"A baby {animal} is called {article} {baby}."))
    for thing, colour in _pairs(_COLOURS):
        facts.append(Fact(f"What colour is {thing.lower()}?", f"{thing} is {colour}."))
    for day, following in zip(_DAYS, _DAYS[1:] + _DAYS[:1], strict=True):
        facts.append(Fact(f"What day comes after {day}?", f"The day after {day} is {following}."))
    for digit, word in enumerate(_NUMBERS):
        facts.append(Fact(f"How do you write {digit}?", f"The number {digit} is written {word}."))
    return facts
