"""Names and nouns, a fixed fifth of them never used in training.

Most are real words, each a token of its own; the others are invented, and spelled in pieces: a real word, a syllable or
a letter, then syllables and letters. Whether a word is held out is a hash of its first piece, so that training does not
see a real word that is held out, not even within others.
"""

import random
import zlib
from functools import cache
from itertools import chain
from pathlib import Path

HELD_OUT_OF = 5  # one word of so many is held out

INVENTED_SHARE = 0.2
ONSETS = tuple("bdfghjklmnprstvwz")
VOWELS = tuple("aeiou")
ENDINGS = ("", *"dklmnrst")  # of a syllable
SYLLABLES = (1, 2, 2, 2, 3)  # of an invented word
LONGER_SHARE = 0.3  # of the invented words: a real one and an ending
LONGER_ENDINGS = ("s", "s", "s", *"aeiouy", "er", "en", "ton", "land", "ing", "man", "ine", "ette", "ville", "berg")
UNEVEN_SHARE = 0.2  # of the invented words: their syllables may begin, sound and end in any of these
UNEVEN_ONSETS = """b c d f g h j k l m n p q r s t v w x y z
    bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sh sl sp st th tr wh"""
UNEVEN_ONSETS = ("", *UNEVEN_ONSETS.split())
UNEVEN_VOWELS = """a e i o u
    y ae ai au ea ee ei eu ia ie io oa oo ou ue ui"""
UNEVEN_VOWELS = tuple(UNEVEN_VOWELS.split())
CODAS = """b c d f g k l m n p r s t x y z
    ck ll nd ng nn nt rd rg rn rt sh ss st th tt"""
CODAS = (*[""] * 24, *CODAS.split())

FITTING_SHARE = 0.5  # of the real words of a kind that has its own list here; the others are any nouns
FITTING = {
    "job": """actor artist baker barber butcher carpenter chemist clerk cook dancer dentist doctor driver farmer
        fisherman gardener hunter judge lawyer mason miner nurse painter pilot plumber poet potter sailor
        singer soldier tailor teacher waiter weaver writer""",
    "thing": """almonds apples bananas beans beets bread butter cakes carrots cheese cherries chess coffee cookies
        dates drums figs flutes garlic grapes guitars honey kites lemons lilies mangoes melons milk
        mushrooms nuts olives onions oranges pancakes peaches pears pepper pianos plums potatoes pumpkins
        raisins rice roses salad soup spinach tea tennis tomatoes tulips violins walnuts""",
    "pet": """badger beetle camel canary cat crow dog donkey duck falcon ferret fox goat goose hamster hare
        hedgehog hen horse lizard mouse otter owl parrot pig pigeon pony rabbit raven sheep snail snake
        spider toad turtle wolf""",
    "colour": """amber azure beige black blue bronze brown copper coral crimson cyan golden green grey indigo ivory
        khaki lilac maroon olive orange pink purple red ruby rust scarlet silver teal turquoise violet
        white yellow""",
    "material": """bamboo brass brick bronze clay concrete copper cork cotton glass gold granite iron ivory jade lead
        leather linen marble nickel paper pewter plastic rubber silk silver steel stone straw tin wax wood
        wool zinc""",
}
FITTING = {kind: tuple(words.split()) for kind, words in FITTING.items()}
CAPITALISED = ("person", "place")
LISTS = (*CAPITALISED, "noun")


@cache
def listed(name: str) -> tuple[str, ...]:
    """The words of a file in `lists`."""
    lines = (Path(__file__).parent / "lists" / f"{name}.txt").read_text().splitlines()
    return tuple(word for line in lines if not line.startswith("#") for word in line.split())


@cache
def real() -> frozenset[str]:
    """All real words that are drawn."""
    return frozenset(chain(*map(listed, LISTS), *FITTING.values()))


def syllables() -> list[str]:
    """Those of even invented words, in lower case."""
    return [a + b + c for a in ONSETS for b in VOWELS for c in ENDINGS]


@cache
def firsts() -> frozenset[str]:
    """What may stand first where a word is spelled, letters aside."""
    return real() | {case(syllable) for syllable in syllables() for case in (str.lower, str.capitalize)}


def is_held_out(word: str) -> bool:
    """Whether training never uses this word: a hash of the longest piece that it begins with."""
    first = next((word[:n] for n in range(len(word), 1, -1) if word[:n] in firsts()), word[:1])
    return zlib.crc32(first.lower().encode()) % HELD_OUT_OF == 0


def draw(kind: str, held_out: bool, rng: random.Random) -> str:
    """A word of a kind, of the training words or of those held out."""
    while True:
        if rng.random() < INVENTED_SHARE:
            word = invent(kind, rng)
        elif kind in CAPITALISED:
            word = rng.choice(listed(kind))
        else:
            word = rng.choice(FITTING[kind] if rng.random() < FITTING_SHARE else listed("noun"))
        if is_held_out(word) == held_out:
            return word


def invent(kind: str, rng: random.Random) -> str:
    """A word of one to three syllables, or a listed one with an ending."""
    upper = kind in CAPITALISED
    if rng.random() < LONGER_SHARE:
        return rng.choice(listed(kind if upper else "noun")) + rng.choice(LONGER_ENDINGS)
    parts = (ONSETS, VOWELS, ENDINGS)
    if rng.random() < UNEVEN_SHARE:
        parts = (UNEVEN_ONSETS, UNEVEN_VOWELS, CODAS)
    word = "".join(rng.choice(part) for _ in range(rng.choice(SYLLABLES)) for part in parts)
    return word.capitalize() if upper else word
