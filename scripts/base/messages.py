"""Made-up messages: what the training text of the base model talks about."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "3 May", "12 June", "1 October"]


@dataclass(frozen=True)
class Message:
    """A message and everything that a task may ask about it."""

    text: str
    topic: str
    level: int
    word: str
    state: str
    found: tuple[tuple[str, str], ...]  # (kind i, p or n; value) in the order of the text


@cache
def topics() -> dict[str, list[str]]:
    """Label -> words of the topic."""
    lines = (HERE / "topics.txt").read_text().splitlines()
    pairs = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
    return {label: words.split(", ") for label, words in pairs}


@cache
def phrases() -> dict[str, list[str]]:
    """Section -> phrases."""
    found: dict[str, list[str]] = {}
    for line in (HERE / "phrases.txt").read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section.append(line)
    return found


def make_id(rng: random.Random) -> str:
    """An id such as AB-4821, #48213, INV20417 or K7-22."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTVWXZ") for _ in range(rng.randint(1, 3)))
    number = str(rng.randrange(10, 10 ** rng.randint(2, 6)))
    return rng.choice(
        [f"{letters}-{number}", f"#{number}", f"{letters}{number}", f"{letters}{number[:1]}-{number}"]
    )


def make_name(rng: random.Random) -> str:
    """A made-up company or product name, of one or two words."""
    name = "".join(rng.choice(phrases()["syllables"]) for _ in range(rng.choice([2, 2, 3]))).capitalize()
    return name + rng.choice(["", "", "", " Pro", " Plus", " Desk", " One", " Mini", " Cloud"])


def _fill(rng: random.Random, phrase: str, word: str, other: str, found: list[tuple[str, str]]) -> str:
    """Replaces the slots of a phrase; names and ids are noted in the order of the text."""
    makers = {
        "{p}": lambda: rng.choice(phrases()["people"]),
        "{i}": lambda: make_id(rng),
        "{n}": lambda: make_name(rng),
    }
    for slot in sorted((s for s in makers if s in phrase), key=phrase.index):
        value = makers[slot]()
        phrase = phrase.replace(slot, value)
        found.append((slot[1], value))
    return phrase.replace("{k}", word).replace("{l}", other).replace("{d}", rng.choice(DAYS))


def make_message(rng: random.Random, topic: str) -> Message:
    """A message about a topic, of about 15 to 50 words."""
    words, book = topics()[topic], phrases()
    word, other = rng.sample(words, 2)
    level, state = rng.randrange(3), rng.choice(book["state"])
    parts = [rng.choice(book["key"]).replace("{s}", state), rng.choice(book[("low", "mid", "high")[level]])]
    parts += rng.sample(book["names"], rng.choice([0, 1, 2, 2, 3]))
    parts += rng.sample(book["context"], rng.choice([0, 1, 1])) + rng.sample(
        book["filler"], rng.choice([0, 0, 1])
    )
    rng.shuffle(parts)
    found: list[tuple[str, str]] = []
    filled = [_fill(rng, part, word, other, found) for part in parts]
    sentences = [part[0].upper() + part[1:] + rng.choice("...!") for part in filled]
    if rng.random() < 0.4:
        sentences.insert(0, rng.choice(book["open"]) + ",")
    if rng.random() < 0.3:
        sentences.append(rng.choice(book["close"]).capitalize() + ".")
    return Message(" ".join(sentences), topic, level, word, state, tuple(found))
