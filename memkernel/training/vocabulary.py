"""The tokenizer of generated English: the grammars' own words whole, every other word by syllables and letters.

A word is split greedily into the longest pieces from the left ("Vilora" -> Vi ##lo ##ra, "Jennifer" -> Je ##n ##ni ##fe
##r), so that a name which nobody has seen is spelled from pieces that training has. Accents are dropped; a word with a
letter that is not ASCII becomes <unk>.
"""

import re
import string
from pathlib import Path

from memkernel.training import facts, words

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PREFIX = "##"


def pieces() -> list[str]:
    """The vocabulary in the order of its ids."""
    sentences = [text for relation in facts.RELATIONS.values() for text in relation.statements + relation.questions]
    sentences += [*facts.SIDE, *facts.CORRECTIONS, *facts.ADJECTIVES, facts.ANSWER]
    grammar = sorted({word for text in sentences for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w*}", "", text))})
    grammar += ["the"]  # of a corrected statement
    syllables = [onset + vowel for onset in words.ONSETS for vowel in words.VOWELS]
    symbols = [letter for letter in string.printable if not letter.isspace()]
    starts = grammar + symbols + syllables + [syllable.capitalize() for syllable in syllables]
    inside = [PREFIX + piece for piece in [*string.ascii_letters, *syllables]]
    return list(dict.fromkeys([*SPECIAL.values(), *starts, *inside]))


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
