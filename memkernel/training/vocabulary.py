"""The tokenizer of generated English: words of the grammars and the lists whole, every other in pieces.

Such a word is split greedily into the longest ones from the left: a word, a syllable or a letter, then syllables and
letters ("Vilora" -> Vil ##o ##ra, "Emilias" -> Emilia ##s). Accents are dropped; a word with a letter that is not ASCII
becomes <unk>.
"""

import re
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernel.training import facts, words

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PREFIX = "##"
COMMON, WORD = 0, 1  # elements of a code that all tokens, and all words, have in common
COMMON_SHARE, WORD_SHARE, OWN_SHARE = 0.15, 0.15, 0.6  # of the square of a code; the rest tells its kind
ADDED = words.LISTS  # the first of `kinds`
SPECIAL_ELEMENTS = 8  # of a code: these two, and one for each of `kinds`; the others are a word's own


def grammar() -> list[str]:
    """The special tokens, the words of the sentences and questions, and symbols: the first of the vocabulary."""
    sentences = [text for relation in facts.RELATIONS.values() for text in relation.statements + relation.questions]
    sentences += [*facts.SIDE, *facts.CORRECTIONS, *facts.ADJECTIVES, facts.ANSWER]
    found = sorted({word for text in sentences for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w*}", "", text))})
    symbols = [symbol for symbol in string.printable if not symbol.isspace() and not symbol.isalpha()]
    return list(dict.fromkeys([*SPECIAL.values(), *found, "the", *symbols]))  # "the" begins a corrected statement


def kinds() -> dict[str, list[str]]:
    """All other pieces, by what they may be: people, places, other nouns, and parts of words that are spelled."""
    nouns = [word for fitting in words.FITTING.values() for word in fitting] + list(words.listed("noun"))
    syllables = words.syllables()
    return {
        "person": sorted(words.listed("person")),
        "place": sorted(words.listed("place")),
        "noun": sorted(nouns),
        "start": [*string.ascii_lowercase, *syllables],
        "Start": [*string.ascii_uppercase, *map(str.capitalize, syllables)],
        "inside": [PREFIX + piece for piece in [*string.ascii_letters, *syllables]],
    }


def pieces() -> list[str]:
    """The vocabulary in the order of its ids."""
    return list(dict.fromkeys([*grammar(), *(piece for kind in kinds().values() for piece in kind)]))


def added() -> list[str]:
    """Words that a checkpoint gets after its training, the next ids in order: their codes are as random as those of the
    words that training held out, and are read as well."""
    known = set(pieces())
    return [word for kind in ADDED for word in words.listed(f"{kind}_added") if word not in known]


def word_codes(vocabulary: list[str], width: int, generator: torch.Generator) -> Tensor:
    """Random embeddings of unit length, [len(vocabulary), width] float32, that nothing needs to learn.

    Element COMMON is the same in all of them; element WORD in all words but those of the grammar; the next ones tell
    of which of `kinds` a word is; the rest is a word's own.
    """
    own = F.normalize(torch.randn(len(vocabulary), width - SPECIAL_ELEMENTS, generator=generator), dim=1)
    codes = F.pad(OWN_SHARE**0.5 * own, (SPECIAL_ELEMENTS, 0))
    kind_of = {word: i for i, kind in enumerate(ADDED) for word in words.listed(f"{kind}_added")}
    kind_of |= {piece: i for i, kind in reversed(list(enumerate(kinds().values()))) for piece in kind}
    of_grammar = set(grammar())
    for i, piece in enumerate(vocabulary):
        codes[i, COMMON] = COMMON_SHARE**0.5
        if piece in of_grammar:
            codes[i, SPECIAL_ELEMENTS:] *= ((1 - COMMON_SHARE) / OWN_SHARE) ** 0.5
        else:
            codes[i, WORD] = WORD_SHARE**0.5
            codes[i, 2 + kind_of[piece]] = (1 - OWN_SHARE - COMMON_SHARE - WORD_SHARE) ** 0.5
    return codes


def make_tokenizer(vocabulary: list[str]):
    """The `tokenizers.Tokenizer` of a vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    # Digits one by one, as punctuation is.
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), split_digits])
    tokenizer.decoder = decoders.WordPiece(PREFIX)
    return tokenizer


def write_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    """Write the tokenizer of a vocabulary in Hugging Face's files."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(vocabulary), **SPECIAL).save_pretrained(folder)
