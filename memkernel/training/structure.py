"""What a model begins with that is to find facts by their subjects: heads that note words, carry them, and match them.

Hidden states have four equal parts: a token's own word; the word it notes, the last one before it, which for the value
that ends a sentence is its subject; and both of these of the token W tokens before, which it carries. Of a text of 2W
tokens the last W leave rows in memory, and so speak for the others too.

    first layer   one group of heads looks at the last word before, and notes it; another adds, weakly, the words of
                  the grammar around, which tell relations apart
    second        two groups look at the token W before, and carry what it is and what it notes
    from there    groups look for words that noted what the query notes ("Oslo" and the end of "Where does Anna live?"
                  both note Anna) or noted the query itself (the next piece of a spelled word), as rows' own or carried;
                  and pass the word on

The matrices of the heads that note words and carry them, and the norms before them, stay as they begin; all else is
trained, also what these heads read of the grammar's words and of bos. Without all this a model finds any town, or any
in which someone lives, and thousands of steps go by in which a subject makes no difference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernel.config import ModelConfig
from memkernel.training.vocabulary import COMMON, COMMON_SHARE, SPECIAL_ELEMENTS, WORD, WORD_SHARE

PARTS = 4
OWN, NOTED, CARRIED, CARRIED_NOTED = range(PARTS)
MATCHES = (  # what a query asks for, the part of rows where it is looked for, and the part that is passed on
    (NOTED, NOTED, OWN),
    (NOTED, CARRIED_NOTED, CARRIED),
    (OWN, NOTED, OWN),
    (OWN, CARRIED_NOTED, CARRIED),
)
DIFFER = 0.2  # of the usual random weights, added to the heads that are trained
NOTE, RELATION, CARRY, FOUND = 0.6, 0.3, 0.8, 0.3  # lengths of what heads add, beside those of what they look at
TURNING = 0.002  # radians a token: rotary pairs that are slower hardly tell apart where in memory a row is

# Scores by distance: of the last word before a token, itself not. They are what rotary pairs can do: falling from the
# nearest word to the farthest distance of a subject from the end of its value, 5, and low for the word itself; what
# they are beyond matters little. Where no word is as near as that, heads look at bos, which holds no word.
SCORES_NEAR = (6.9, 9.6, 10.0, 9.1, 8.3, 7.9, 7.1, 5.0, 1.8, -0.9, -1.5, 0.4, 3.1)
MATTERS, OFTEN = 3.0, (0, 2, 3, 4, 5)  # weight of the square error, at the distances where subjects are, and at 0
NEAR = {distance: (score, MATTERS if distance in OFTEN else 0.3) for distance, score in enumerate(SCORES_NEAR)}
FAR = (0.0, 0.001)  # score, and weight of its square error
NONE_NEAR = 7.35  # between the scores at distance 5 and of the word itself
# And of the token W before: distance less W. Others are below zero, which is the score of bos.
THERE = {-2: (-1.0, 1.0), -1: (0.2, 3.0), 0: (0.7, 10.0), 1: (0.2, 3.0), 2: (-1.0, 1.0)}
ELSEWHERE = (-2.5, 0.3)
SHARP_NEAR, SHARP_RELATION, SHARP_THERE = 1.1, 0.3, 8.0  # by which these scores are multiplied

# Weights of what makes up the score of a row that is looked for: the same word, any word; and of bos, between the two.
SAME, IS_WORD, NONE_SAME = 6.0, 12.0, 4.5


def by_distance(frequencies: Tensor, wanted: dict[int, tuple[float, float]], ridge: float) -> tuple[Tensor, Tensor]:
    """The coefficients of cosines and sines of `distance * frequencies` whose sums are nearest to wanted scores.

    Args: frequencies [n], radians a token; wanted: for a distance, the score and the weight of its square error.
    Returns: [n] of the cosines, [n] of the sines.
    """
    distance, score, weight = torch.tensor([(d, *pair) for d, pair in wanted.items()], dtype=torch.float64).T
    angle = distance[:, None] * frequencies.double()
    terms = torch.cat([angle.cos(), angle.sin()], dim=1)
    normal = terms.T @ (weight[:, None] * terms) + ridge * torch.eye(terms.shape[1], dtype=torch.float64)
    cos, sin = torch.linalg.solve(normal, terms.T @ (weight * score)).float().chunk(2)
    return cos, sin


def give_structure(config: ModelConfig, weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Write the heads described above into `weights`, in place.

    Embeddings must be `vocabulary.word_codes` in the first part of the hidden states, and nothing in the others.

    Returns: masks, by name, of the elements that training leaves as they are.
    Raises ValueError for a model of less than two layers or three groups of heads, without bos, whose width has not
    four parts with room for a word's own code, or whose heads have not three rotary pairs that turn and three that
    hardly do.
    """
    S, W, E = config.hidden_size // PARTS, config.write_rows, config.hidden_size
    if config.num_layers < 2 or config.num_kv_heads < 3 or E % PARTS or S <= SPECIAL_ELEMENTS or not config.has_bos:
        raise ValueError(
            "config: expected two layers, three groups of heads, a width of four parts of more than "
            f"{SPECIAL_ELEMENTS} and bos, got {config}"
        )
    structure = _Structure(config, weights)
    weights["bos_embedding"].zero_()[..., NOTED * S + COMMON] = E**0.5  # of an element that nothing else has

    near = dict.fromkeys(range(config.memory_rows + 4 * W), FAR) | NEAR
    word, token = F.one_hot(torch.tensor([WORD, COMMON]), E).float()
    structure.look_at_distance(0, 0, near, 0.01, SHARP_NEAR, word)
    common = (COMMON_SHARE * E) ** 0.5  # of a token's norm in the first layer
    structure.look_at_bos(0, 0, NONE_NEAR * SHARP_NEAR * common / E**0.5)
    structure.pass_on(0, 0, OWN, NOTED, NOTE)
    no_word = token - (COMMON_SHARE / WORD_SHARE) ** 0.5 * word
    structure.look_at_distance(0, 1, near, 0.01, SHARP_RELATION, no_word)
    structure.pass_on(0, 1, OWN, NOTED, RELATION)
    there = dict.fromkeys(range(3 * W + 1), ELSEWHERE) | {W + away: score for away, score in THERE.items()}
    for group, source, target in ((0, OWN, CARRIED), (1, NOTED, CARRIED_NOTED)):
        structure.look_at_distance(1, group, there, 0.1, SHARP_THERE, token)
        structure.pass_on(1, group, source, target, CARRY)

    for layer in range(1, config.num_layers):
        begin = 2 if layer == 1 else 0
        for group, (asked, found, source) in zip(range(begin, config.num_kv_heads), MATCHES, strict=False):
            structure.look_for_the_same(layer, group, asked, found, source, generator)
            structure.look_at_bos(layer, group, NONE_SAME)
            structure.pass_on(layer, group, source, OWN, FOUND)

    # The heads of a group must differ, or they would learn the same.
    free = [(0, 1), *((1, group) for group in range(2, config.num_kv_heads))]
    free += [(layer, group) for layer in range(2, config.num_layers) for group in range(config.num_kv_heads)]
    for group in free:
        for part in structure.parts(*group):
            part += DIFFER * E**-0.5 * torch.randn(part.shape, generator=generator)

    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qkvo"]
    fixed = {name: torch.zeros_like(weights[name], dtype=torch.bool) for name in names}
    for group in ((0, 0), (1, 0), (1, 1)):
        for part in _Structure(config, fixed).parts(*group):
            part.fill_(True)
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    return fixed | {name: torch.ones_like(weights[name], dtype=torch.bool) for name in norms}


class _Structure:
    """Writes groups of heads, each the query heads of one key/value head: what they compare, and what they pass on.

    Elements of a head: rotary pairs that turn compare distances; those that hardly do compare words, one of them
    whether a row is a word, and one is for bos alone.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.weights, self.D, self.S = weights, config.head_size, config.hidden_size // PARTS
        self.repeats = config.num_heads // config.num_kv_heads
        frequency = config.rope.frequencies(self.D)
        self.turning = (frequency >= TURNING).nonzero().flatten()
        self.frequency = frequency[self.turning]
        still = (frequency < TURNING).nonzero().flatten()
        if len(still) < 3 or len(self.turning) < 3:
            raise ValueError(
                f"config: expected three rotary pairs that turn less than {TURNING} a token and three that turn more, "
                f"got {len(still)} and {len(self.turning)}"
            )
        self.to_bos, *still = torch.cat([still, still + self.D // 2]).tolist()
        self.to_words, *self.to_the_same = still

    def parts(self, layer: int, group: int) -> tuple[Tensor, ...]:
        """Views of a group's weights: queries [repeats, D, E], keys [D, E], values [D, E], outputs [E, repeats, D]."""
        q, k, v, o = (self.weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkvo")
        q, k, v = (w.unflatten(0, (-1, self.D)) for w in (q, k, v))
        heads = slice(group * self.repeats, (group + 1) * self.repeats)
        return q[heads], k[group], v[group], o.unflatten(1, (-1, self.D))[:, heads]

    def look_at_distance(
        self,
        layer: int,
        group: int,
        wanted: dict[int, tuple[float, float]],
        ridge: float,
        sharp: float,
        among: Tensor,
    ) -> None:
        """Score rows by distance, as `by_distance`, times `sharp` and how far along `among` [E] they are."""
        query, key, *_ = self.parts(layer, group)
        cos, sin = by_distance(self.frequency, wanted, ridge)
        size = (cos**2 + sin**2) ** 0.25
        query.zero_(), key.zero_()
        key[self.turning] = sharp**0.5 * torch.outer(size, among)
        query[:, self.turning, COMMON] = sharp**0.5 * cos / size
        query[:, self.turning + self.D // 2, COMMON] = -(sharp**0.5) * sin / size

    def look_for_the_same(
        self, layer: int, group: int, asked: int, found: int, source: int, generator: torch.Generator
    ) -> None:
        """Score rows with a word in part `source` whose part `found` holds the word of the query's part `asked`."""
        query, key, *_ = self.parts(layer, group)
        query.zero_(), key.zero_()
        query[:, self.to_words, COMMON] = key[self.to_words, source * self.S + WORD] = IS_WORD**0.5
        own = self.S - SPECIAL_ELEMENTS
        some = torch.linalg.qr(torch.randn(own, own, generator=generator))[0][: len(self.to_the_same)]
        for r, direction in zip(self.to_the_same, SAME**0.5 * some, strict=False):
            query[:, r, asked * self.S + SPECIAL_ELEMENTS : (asked + 1) * self.S] = direction
            key[r, found * self.S + SPECIAL_ELEMENTS : (found + 1) * self.S] = direction

    def look_at_bos(self, layer: int, group: int, strength: float) -> None:
        """Score bos by `strength`: what a group that finds nothing looks at, since nothing of it is passed on."""
        query, key, *_ = self.parts(layer, group)
        query[:, self.to_bos, COMMON] = 1
        key[self.to_bos, NOTED * self.S + COMMON] = strength

    def pass_on(self, layer: int, group: int, source: int, target: int, gain: float) -> None:
        """Add part `source` of the row that is looked at, `gain` times as long, to part `target` of the query's, all
        but the element that every token has."""
        *_, value, out = self.parts(layer, group)
        value.zero_(), out.zero_()
        for i in range(1, min(self.S, self.D)):
            value[i, source * self.S + i] = 1
            out[target * self.S + i, :, i] = gain / self.repeats
