"""Names and nouns without end, a fixed fifth of them never used in training.

Invented words are strings of syllables, most of them plain, so that every word, held out or not, is spelled from the
same pieces; the others, and real words, have spellings that the pieces do not fit. Whether a word is held out is a hash
of it: there are no lists to keep.
"""

import random
import zlib

HELD_OUT_OF = 5  # one word of so many is held out

ONSETS = tuple("bdfghjklmnprstvwz")
VOWELS = tuple("aeiou")
ENDINGS = ("", "", "", "", "", "", "n", "r", "s")
SYLLABLES = (2, 2, 2, 3)  # of an invented word
REAL_SHARE = 0.15
UNEVEN_SHARE = 0.3  # of the invented words: their syllables may begin, sound and end in any of these
UNEVEN_ONSETS = """b c d f g h j k l m n p q r s t v w x y z
    bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sh sl sp st th tr wh"""
UNEVEN_ONSETS = ("", *UNEVEN_ONSETS.split())
UNEVEN_VOWELS = """a e i o u
    y ae ai au ea ee ei eu ia ie io oa oo ou ue ui"""
UNEVEN_VOWELS = tuple(UNEVEN_VOWELS.split())
CODAS = """b c d f g k l m n p r s t x y z
    ck ll nd ng nn nt rd rg rn rt sh ss st th tt"""
CODAS = (*[""] * 24, *CODAS.split())

REAL = {
    "person": """Adam Alice Amir Anna Anton Ben Bruno Carl Carmen Clara Daniel David Dora Edgar Elena Emma Eric Eva
        Felix Fiona Frank Gina Grace Greta Hanna Hector Helen Henry Hugo Ida Igor Irene Isabel Ivan Jack
        James Jane Jonas Julia Karen Karl Kate Laura Leo Lena Linda Lisa Lucas Lucy Maria Mark Martin Mary
        Max Mia Michael Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar Paul Peter Petra Rita Robert Rosa
        Sam Sara Simon Sofia Stella Thomas Tim Tina Tom Vera Victor Viola Walter""",
    "place": """Athens Bergen Berlin Bern Boston Cairo Dakar Delhi Denver Dublin Geneva Genoa Hanoi Havana
        Helsinki Kyoto Lagos Lima Lisbon London Lyon Madrid Malta Milan Moscow Munich Nairobi Naples Oslo
        Oxford Paris Perth Porto Prague Quito Riga Rome Seoul Sofia Sydney Tampa Texas Tokyo Tunis Turin
        Venice Vienna Warsaw Zagreb Zurich""",
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
REAL = {kind: tuple(words.split()) for kind, words in REAL.items()}
CAPITALISED = ("person", "place")


def is_held_out(word: str) -> bool:
    """Whether training never uses this word, whatever its case."""
    return zlib.crc32(word.lower().encode()) % HELD_OUT_OF == 0


def draw(kind: str, held_out: bool, rng: random.Random) -> str:
    """A word of a kind, real or invented, of the training words or of those held out."""
    while True:
        word = rng.choice(REAL[kind]) if rng.random() < REAL_SHARE else invent(rng)
        if is_held_out(word) == held_out:
            return word.capitalize() if kind in CAPITALISED else word


def invent(rng: random.Random) -> str:
    """A word of two or three syllables, lower case."""
    count = rng.choice(SYLLABLES)
    if rng.random() < UNEVEN_SHARE:
        return "".join(rng.choice(part) for _ in range(count) for part in (UNEVEN_ONSETS, UNEVEN_VOWELS, CODAS))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)) + rng.choice(ENDINGS)
