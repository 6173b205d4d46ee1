"""The tokenizer of generated English: words of the grammars and the lists whole, every other by syllables and letters.

Such a word is split greedily into the longest pieces from the left ("Vilora" -> Vil ##o ##ra, "Zanthor" -> Zan ##t
##hor), which training has seen in other words. Accents are dropped; a word with a letter that is not ASCII becomes
<unk>.
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
OWN_SHARE = 0.5  # of the variance of a word's code
KIND_SHARE = 0.3  # by its kind; the rest all tokens have in common


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
    syllables = [a + b + c for a in words.ONSETS for b in words.VOWELS for c in words.ENDINGS]
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


def word_codes(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings of about unit length, and what they have in common.

    Returns: codes [pieces, width] float32; common [width], a unit vector in all of them; by_kind [kinds, width], one in
    those of each of `kinds`.
    """
    vocabulary, by_name = pieces(), kinds()
    kind_of = {piece: i for i, kind in reversed(list(enumerate(by_name.values()))) for piece in kind}
    codes = torch.randn(len(vocabulary), width, generator=generator) * width**-0.5
    common = F.normalize(torch.randn(width, generator=generator), dim=0)
    by_kind = F.normalize(torch.randn(len(by_name), width, generator=generator), dim=1)
    for i, piece in enumerate(vocabulary):
        if piece in kind_of:
            codes[i] = OWN_SHARE**0.5 * codes[i] + KIND_SHARE**0.5 * by_kind[kind_of[piece]]
        else:
            codes[i] *= (OWN_SHARE + KIND_SHARE) ** 0.5
    return codes + (1 - OWN_SHARE - KIND_SHARE) ** 0.5 * common, common, by_kind


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer in Hugging Face's files."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(pieces())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    # Digits one by one, as punctuation is.
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), split_digits])
    tokenizer.decoder = decoders.WordPiece(PREFIX)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
