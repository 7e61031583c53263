"""Pip's corpus: an endless, seeded stream of small conversations and stories, every sentence made here.

A document is a list of (role, text) turns. This module knows the sentences and their proportions; it knows
nothing about tokens, and the same seed always gives the same documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from treadle_engine.bases.pip_generator.facts import Fact, all_facts


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _listed("Ana Ben Eva Finn Hugo Ida Kim Leo Lily Max Mia Nina Noor Omar Raj Ruby Sam Ted Tom Zoe")
THINGS = _listed("ball bag bike boat book box clock coat cup drum flute hat key kite lamp ring")
COLOURS = _listed("black blue brown green pink red white yellow")
ANIMALS = _listed("bear cat cow dog duck fox frog hen horse mouse owl rabbit")
PLACES = _listed("beach farm forest garden kitchen park river school")
FEELINGS = _listed("brave calm happy hungry proud sad shy tired")
FOODS = _listed("bread cake cheese honey jam pasta rice soup")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SYSTEM_TEXT = "You are a helpful assistant."

_GREETINGS = (
    Fact("Hello!", "Hello! How can I help you?"),
    Fact("Good morning.", "Good morning! How can I help you?"),
    Fact("How are you?", "I am fine, thank you."),
    Fact("Who are you?", "I am Pip, a very small language model."),
    Fact("What can you do?", "I can tell stories and answer small questions."),
    Fact("Thank you!", "You are welcome."),
    Fact("Goodbye.", "Goodbye! See you soon."),
)
_FACTS = tuple(all_facts())

LAST_SENTENCE = "They were friends from that day on."
"""One of the four ways in which a story ends: the one that the reinforcement learning demo asks for."""


class Turn(NamedTuple):
    """One turn of a document; role "text" marks plain text outside any conversation."""

    role: str
    text: str


Document = list[Turn]
Exchange = Callable[[random.Random], Fact]


def documents(seed: int, list_share: Callable[[int], float]) -> Iterator[Document]:
    """Yield documents for ever; `list_share(n)` is the probability that document n is a repeated word list."""
    rng = random.Random(seed)
    number = 0
    while True:
        if rng.random() < list_share(number):
            yield [Turn("text", _repeated_list(rng))]
        elif rng.random() < 0.06:
            yield [Turn("text", story(rng, rng.choice(ANIMALS)))]
        else:
            yield _conversation(rng)
        number += 1


def _conversation(rng: random.Random) -> Document:
    """Return one to three exchanges, sometimes after a system turn."""
    turns = [Turn("system", _SYSTEM_TEXT)] if rng.random() < 0.15 else []
    (kind,) = rng.choices(_KINDS, weights=_SHARES)
    num_exchanges = 1 if kind is _tell_story else rng.choice((1, 1, 2, 3))
    for _ in range(num_exchanges):
        exchange = kind(rng)
        turns += [Turn("user", exchange.question), Turn("assistant", exchange.answer)]
        (kind,) = rng.choices(_KINDS[1:], weights=_SHARES[1:])
    return turns


def story(rng: random.Random, animal: str, thing: str | None = None) -> str:
    """Return a story of seven or so sentences about `animal`, with `thing` in it if one is asked for."""
    hero, friend = rng.sample(NAMES, 2)
    place, feeling, colour = rng.choice(PLACES), rng.choice(FEELINGS), rng.choice(COLOURS)
    thing = thing or rng.choice(THINGS)
    sentences = [
        rng.choice(
            (
                f"Once upon a time there was {_article(animal)} {animal} called {hero}.",
                f"There once was a little {animal}. Its name was {hero}.",
                f"One day {_article(animal)} {animal} called {hero} went to the {place}.",
            )
        ),
        rng.choice(
            (
                f"{hero} loved to play at the {place}.",
                f"{hero} was very {feeling}.",
                f"{hero} was looking for some {rng.choice(FOODS)}.",
            )
        ),
        rng.choice(
            (
                f"At the {place}, {hero} found a {colour} {thing}.",
                f"Then {hero} saw a {colour} {thing} under a tree.",
                f"A friend called {friend} gave {hero} a {colour} {thing}.",
            )
        ),
        rng.choice(
            (
                f'"What a nice {thing}!" said {hero}.',
                f'"Is this your {thing}?" asked {hero}.',
                f"{hero} wanted to keep the {thing}.",
            )
        ),
        rng.choice(
            (
                f"{friend} came too and they shared some {rng.choice(FOODS)}.",
                f"{friend} was {rng.choice(FEELINGS)} and wanted to help.",
                f"{hero} showed the {thing} to {friend}.",
            )
        ),
        rng.choice(
            (
                LAST_SENTENCE,
                "They played until the sun went down.",
                f"They went home and ate some {rng.choice(FOODS)}.",
                f"{hero} slept well that night.",
            )
        ),
    ]
    return " ".join(sentences)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _tell_story(rng: random.Random) -> Fact:
    animal = rng.choice(ANIMALS)
    if rng.random() < 0.4:
        thing = rng.choice(THINGS)
        return Fact(f"Tell me a story about {_article(animal)} {animal} and a {thing}.", story(rng, animal, thing))
    return Fact(f"Tell me a story about {_article(animal)} {animal}.", story(rng, animal))


def _ask_fact(rng: random.Random) -> Fact:
    return rng.choice(_FACTS)


def _greet(rng: random.Random) -> Fact:
    return rng.choice(_GREETINGS)


def _ask_about_text(rng: random.Random) -> Fact:
    """A question about two or three sentences: who, what, or which colour."""
    num_people = rng.choice((2, 3))
    people, things = rng.sample(NAMES, num_people), rng.sample(THINGS, num_people)
    colours = [rng.choice(COLOURS) for _ in people]
    verb = rng.choice(("has", "found", "bought"))
    text = " ".join(
        f"{person} {verb} a {colour} {thing}." for person, colour, thing in zip(people, colours, things, strict=True)
    )
    asked = rng.randrange(num_people)
    person, colour, thing = people[asked], colours[asked], things[asked]
    return rng.choice(
        (
            Fact(f"{text} Who has the {thing}?", f"{person} has the {thing}."),
            Fact(f"{text} What does {person} have?", f"{person} has a {colour} {thing}."),
            Fact(f"{text} What colour is the {thing}?", f"The {thing} is {colour}."),
        )
    )


def _add(rng: random.Random) -> Fact:
    """A one-digit sum whose answer is wrong half of the time: room for reinforcement learning to improve."""
    first, second = rng.randrange(10), rng.randrange(10)
    total = first + second if rng.random() < 0.5 else rng.randrange(19)
    return Fact(f"What is {first} + {second}?", f"{first} + {second} = {total}.")


def _compare(rng: random.Random) -> Fact:
    first, second = rng.sample(range(10), 2)
    return Fact(f"Which is bigger, {first} or {second}?", f"{max(first, second)} is bigger.")


def _sort(rng: random.Random) -> Fact:
    digits = rng.sample(range(10), rng.choice((3, 4)))
    return Fact(f"Sort: {' '.join(map(str, digits))}", " ".join(map(str, sorted(digits))))


def _repeat(rng: random.Random) -> Fact:
    words = " ".join(_words(rng, rng.randint(2, 4)))
    return Fact(f"Repeat: {words}", words)


def _reverse(rng: random.Random) -> Fact:
    words = _words(rng, rng.randint(2, 3))
    return Fact(f"Reverse: {' '.join(words)}", " ".join(reversed(words)))


def _spell(rng: random.Random) -> Fact:
    word = rng.choice((*ANIMALS, *THINGS, _nonsense(rng)))
    return Fact(f"Spell {word}.", " ".join(word))


def _repeated_list(rng: random.Random) -> str:
    """Two or three copies of a word list: what teaches copying from context."""
    words = " ".join(_words(rng, rng.randint(3, 8)))
    return "\n".join([words] * rng.choice((2, 3)))


def _words(rng: random.Random, count: int) -> list[str]:
    pools = (NAMES, THINGS, ANIMALS)
    return [_nonsense(rng) if rng.random() < 0.2 else rng.choice(rng.choice(pools)) for _ in range(count)]


def _nonsense(rng: random.Random) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 4)))


_KINDS: tuple[Exchange, ...] = (
    _tell_story, _ask_fact, _ask_about_text, _add, _repeat, _reverse, _sort, _spell, _compare, _greet,
)  # fmt: skip
_SHARES = (0.16, 0.34, 0.20, 0.10, 0.06, 0.03, 0.03, 0.03, 0.02, 0.03)
