"""Choosing tokens and turning them into text: validation, exact distributions, whole characters, stop strings."""

import math
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memkernel import tiny
from memkernel.sampling import REPLACEMENT, Request, SamplingParams, TextStream

NAN, INF = math.nan, math.inf

# -- parameters -------------------------------------------------------------------------------------------------------

BAD = {
    "max_tokens": [0, -1, 1.5, True, None, "3", INF],
    "min_tokens": [-1, 257, 1.0, False, "a"],
    "temperature": [-1, -1e-9, 1e7, NAN, INF, True, None, "1"],
    "top_p": [0, -0.1, 1.5, NAN, True, None],
    "top_k": [-2, 1.0, True, None],
    "min_p": [-0.1, 2, NAN, True, "x"],
    "repetition_penalty": [0, -1, NAN, INF, True],
    "presence_penalty": [-2.1, 2.1, NAN, False],
    "frequency_penalty": [-2.1, 2.1, NAN, "0"],
    "logprobs": [-1, 1001, 1.0, True],
    "stop": ["", ["a", ""], [1], [None], 5, {"a"}, b"a"],
    "stop_token_ids": [[-1], ["1"], [1.0], [True], 5, "12"],
    "ignore_eos": [1, 0, None, "yes"],
    "seed": [-1, 1 << 63, 1.0, True, "1"],
}
BAD = [pytest.param(name, value, id=f"{name}={value!r}") for name, values in BAD.items() for value in values]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        SamplingParams.from_kwargs(**{name: value})


def test_names_of_the_parameters():
    assert SamplingParams.from_kwargs(max_new_tokens=7) == SamplingParams.from_kwargs(max_tokens=7)
    assert SamplingParams.from_kwargs(stop="ab", stop_token_ids=[3], logprobs=None) == SamplingParams(
        stop=("ab",), stop_token_ids=(3,)
    )
    with pytest.raises(ValueError, match="^max_new_tokens: expected one of .*got both"):
        SamplingParams.from_kwargs(max_tokens=7, max_new_tokens=7)
    with pytest.raises(ValueError, match="^temprature: not a sampling parameter.*'temperature'"):
        SamplingParams.from_kwargs(temprature=1.0)
    with pytest.raises(ValueError, match="^max_tokens: "):
        SamplingParams.from_kwargs(max_new_tokens=0)


def test_a_lone_stop_string_is_not_taken_for_its_letters():
    """The class is public: it must refuse or understand what `from_kwargs` understands."""
    try:
        params = SamplingParams(stop="ab")
    except ValueError as error:
        assert str(error).startswith("stop: ")
    else:
        assert params.stop == ("ab",)


# -- choosing ---------------------------------------------------------------------------------------------------------

RANKED = [0.30, 0.22, 0.15, 0.12, 0.09, 0.06, 0.04, 0.02]
PLACE = [5, 2, 7, 0, 3, 6, 1, 4]  # token of each rank: an implementation that takes ranks for tokens is found out
LOGITS = torch.empty(8).index_put_((torch.tensor(PLACE),), torch.tensor(RANKED).log() + 3)
KEPT = {  # how many of the most likely tokens are left; where an order of filters is named, other orders leave others
    "plain": ({}, 8),
    "top_k-0": ({"top_k": 0}, 8),
    "top_k-minus-1": ({"top_k": -1}, 8),
    "top_k-1": ({"top_k": 1}, 1),
    "top_k-3": ({"top_k": 3}, 3),
    "top_k-beyond-vocabulary": ({"top_k": 100}, 8),
    "top_p-least": ({"top_p": 1e-9}, 1),
    "top_p-keeps-the-token-that-crosses": ({"top_p": 0.5}, 2),
    "top_p-0.6": ({"top_p": 0.6}, 3),
    "top_p-0.95": ({"top_p": 0.95}, 7),
    "min_p-0.25": ({"min_p": 0.25}, 5),
    "min_p-1": ({"min_p": 1}, 1),
    "temperature": ({"temperature": 0.5}, 8),
    "temperature-then-min_p": ({"temperature": 2.0, "min_p": 0.45}, 5),
    "temperature-then-top_p": ({"temperature": 0.5, "top_p": 0.7}, 2),
    "top_k-then-top_p": ({"top_k": 3, "top_p": 0.76}, 2),
    "min_p-then-top_p": ({"min_p": 0.45, "top_p": 0.76}, 2),
    "all": ({"temperature": 2.0, "min_p": 0.45, "top_k": 4, "top_p": 0.75}, 3),
}


def request(prompt=(0,), eos=(), tokenizer=None, **params):
    return Request(torch.tensor(prompt), SamplingParams.from_kwargs(**params), eos, tokenizer)


def draw(count, logits, **params):
    drawing = request(**{"max_tokens": count + 1, "temperature": 1.0, "seed": 1} | params)
    return [drawing.step(logits) for _ in range(count)]


def only(token, size=8):
    """Logits that leave greedy choice no choice, whatever the penalties."""
    return torch.full((size,), -1e6).index_fill_(0, torch.tensor([token]), 1e6)


@pytest.mark.parametrize("name", KEPT)
def test_draws_have_exactly_the_distribution(name):
    params, kept = KEPT[name]
    weights = [p ** (1 / params.get("temperature", 1)) for p in RANKED[:kept]]
    tokens = draw(2000, LOGITS, **params)
    assert set(tokens) == set(PLACE[:kept])  # the rarest is expected 40 times
    expected = [2000 * weight / sum(weights) for weight in weights]
    statistic = sum((tokens.count(PLACE[i]) - e) ** 2 / e for i, e in enumerate(expected))
    # 99.9% quantiles of chi-square with kept - 1 degrees of freedom
    assert statistic <= [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.33][kept - 1]


def test_top_k_of_equal_logits_keeps_k():
    assert len(set(draw(300, torch.zeros(50), top_k=3))) == 3


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-12])
def test_temperature_towards_zero_is_greedy(temperature):
    assert draw(20, LOGITS, temperature=temperature) == [PLACE[0]] * 20


def test_a_seed_makes_a_request_reproducible_whatever_runs_beside_it():
    alone = draw(50, LOGITS, seed=5)
    torch.manual_seed(99)
    one, other = (request(max_tokens=99, temperature=1.0, seed=seed) for seed in (5, 6))
    pairs = [(one.step(LOGITS), other.step(LOGITS)) for _ in range(50)]
    assert [a for a, _ in pairs] == alone != [b for _, b in pairs]
    torch.manual_seed(99)
    unseeded = draw(50, LOGITS, seed=None)
    torch.manual_seed(99)
    assert draw(50, LOGITS, seed=None) != unseeded  # the default generator has no say


PENALTIES = {
    "repetition-up": {"repetition_penalty": 1.7},
    "repetition-down": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 0.9},
    "presence-negative": {"presence_penalty": -1.3},
    "frequency": {"frequency_penalty": 0.7},
    "all": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4},
}


@pytest.mark.parametrize("token", range(7), ids="prompt prompt-twice output output-twice both unseen zero".split())
@pytest.mark.parametrize("raw", [2.5, -1.5])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_those_of_vllm(name, raw, token):
    """A probe that no penalty touches wins just above the penalised logit and loses just below it."""
    params, prompt, output = PENALTIES[name], [0, 1, 1, 4, 6], [2, 3, 4, 3]
    raw = 0.0 if token == 6 else raw
    want = raw
    if token in prompt + output:  # repetition: prompt and output, towards minus infinity
        repetition = params.get("repetition_penalty", 1)
        want = want / repetition if want > 0 else want * repetition
    want -= params.get("frequency_penalty", 0) * output.count(token)
    want -= params.get("presence_penalty", 0) * (token in output)
    for difference, winner in ((-1e-4, token), (1e-4, 7)):
        asked = request(prompt, **params)
        assert [asked.step(only(made)) for made in output] == output
        logits = torch.full((8,), -1e6)
        logits[token], logits[7] = raw, want + difference
        assert asked.step(logits) == winner


def test_min_tokens_bars_endings():
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0])  # eos 1, stop token 2
    asked = request(eos=(1,), min_tokens=3, stop_token_ids=[2], max_tokens=9)
    assert [asked.step(logits) for _ in range(3)] == [3, 3, 3] and asked.finish_reason is None
    assert asked.step(logits) == 1 and asked.completion().finish_reason == "stop"
    asked = request(eos=(1,), min_tokens=3, stop_token_ids=[2], max_tokens=9, temperature=1.0, seed=0)
    assert {1, 2}.isdisjoint(asked.step(logits) for _ in range(3))


def test_endings():
    for params, token, reason in (
        ({}, 1, "stop"),
        ({"ignore_eos": True}, 1, None),
        ({"ignore_eos": True, "max_tokens": 1}, 1, "length"),
        ({"stop_token_ids": [2]}, 2, "stop"),
        ({"stop_token_ids": [2]}, 1, "stop"),
        ({"stop_token_ids": [2], "ignore_eos": True}, 1, None),
        ({"stop_token_ids": [2]}, 3, None),
        ({"max_tokens": 1}, 1, "stop"),
        ({"max_tokens": 1}, 3, "length"),
    ):
        asked = request(eos=(1,), **params)
        assert asked.step(only(token)) == token
        assert asked.finish_reason == reason, (params, token)
        assert asked.token_ids == [token]


def test_logprobs_are_those_of_the_raw_logits():
    given = LOGITS.clone()
    asked = request((5,), logprobs=3, temperature=0.3, repetition_penalty=2.0, presence_penalty=1.0, top_k=2, seed=0)
    for _ in range(4):
        token = asked.step(given)
        assert asked.logprobs[-1] == pytest.approx(math.log(RANKED[PLACE.index(token)]), abs=1e-6)
        assert list(asked.top_logprobs[-1]) == PLACE[:3]
        assert list(asked.top_logprobs[-1].values()) == pytest.approx([math.log(p) for p in RANKED[:3]], abs=1e-6)
    assert torch.equal(given, LOGITS)  # the caller's logits are not written to
    assert request().completion().top_logprobs is None
    everything = request(logprobs=100)
    everything.step(given)
    assert sorted(everything.top_logprobs[0]) == list(range(8))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("damaged", [[3], range(8)], ids=["one", "all"])
def test_nan_logits_raise(params, damaged):
    logits = LOGITS.clone()
    logits[list(damaged)] = NAN
    with pytest.raises(ValueError, match="^logits: .*NaN"):
        request(**params).step(logits)


# -- text -------------------------------------------------------------------------------------------------------------


def byte_pairs():
    """Byte-level BPE with tokens that hold a letter and the first byte of a longer character, as Llama 3 has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    euro = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("€")[0][0]
    merges = [("b", euro[0]), ("Ġ", "a"), ("a", "b"), (euro[1], euro[2])]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words(decoder):
    """Words with their space in front; the first space of a text is not decoded. Bytes as <0x..>, as Llama 2 has."""
    pieces = [*"▁a ▁b ▁ab a ing , ▁ ▁▁ é ▁本".split(), *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "byte-pairs", "metaspace", "llama-2"])
def tokens(request, tmp_path_factory):
    """A tokenizer, and what texts are made of: runs of its tokens that are whole characters."""
    if request.param == "bytes":
        folder = tmp_path_factory.mktemp("tokenizer")
        tiny.write_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif request.param == "byte-pairs":
        tokenizer = byte_pairs()
    elif request.param == "metaspace":
        tokenizer = words(decoders.Metaspace())
        return tokenizer, [[i] for i in range(10)]
    else:
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer = words(decoders.Sequence(parts))
        return tokenizer, [[i] for i in range(10)] + [[10 + byte for byte in c.encode()] for c in "é本😀"]
    return tokenizer, [tokenizer(c).input_ids for c in (*"aab  ,é本😀\n\u0301", "b€", "ab")]


def stream(tokenizer, ids, stop=()):
    """What is released after each token, then after the end."""
    text, released = TextStream(tokenizer, tuple(stop)), []
    for token in ids:
        text.push(token, search=True)
        released.append(text.released)
        if text.stopped:
            break
    text.close()
    return [*released, text.released]


def defined(tokenizer, ids, stop):
    """(text, tokens taken): all decoded anew at each token, cut where the first stop string to be complete begins."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if n == len(ids):
            text = text.rstrip(REPLACEMENT)
        found = [text.find(string) for string in stop if string in text]
        if found and not text.endswith(REPLACEMENT):
            return text[: min(found)], n
    return text, len(ids)


def held(text, stop):
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


def test_random_texts_with_random_stop_strings(tokens):
    tokenizer, pieces = tokens
    random, cut = Random(0), 0
    for _ in range(250):
        ids = [token for piece in random.choices(pieces, k=random.randint(1, 16)) for token in piece]
        full, stop = tokenizer.decode(ids), []
        for _ in range(random.choice([0, 1, 1, 2, 3]) if full else 0):  # parts of the text, some of them altered
            begin = random.randrange(len(full))
            part = full[begin : begin + random.randint(1, 4)]
            stop.append(part if random.random() < 0.5 else part + random.choice("abé ,"))
        released, (want, taken) = stream(tokenizer, ids, stop), defined(tokenizer, ids, stop)
        assert released[-1] == want, (full, stop)
        assert len(released) == taken + 1, (full, stop)  # it ended as soon as it could
        for n, text in enumerate(released, start=1):
            assert want.startswith(text), (full, stop)  # never a part of a stop string, never half a character
            known = tokenizer.decode(ids[:n])
            if n < taken and not known.endswith(REPLACEMENT):
                assert len(text) == len(known) - held(known, stop), (full, stop)  # and nothing is held needlessly
        assert all(later.startswith(text) for text, later in zip(released, released[1:], strict=False))
        cut += want != full
    assert cut > 80


TEXTS = [
    "plain",
    "naïve café",
    "日本語のテキスト。",
    "👩\u200d👩\u200d👧 🇫🇷",
    "e\u0301\n\ttab  two",
    "\ufffd in it\ufffd.",
    "€",
]


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
@pytest.mark.parametrize("text", TEXTS)
def test_released_is_whole_characters(tokens, text):
    tokenizer, raw = tokens[0], text.encode()
    released = stream(tokenizer, tokenizer(text).input_ids)
    assert len(released) == len(raw) + 1 and released[-1] == text
    for n, prefix in enumerate(released[:-1], start=1):
        whole = raw[:n].decode(errors="ignore")  # U+FFFD itself looks unfinished until the next character
        assert prefix == whole.rstrip(REPLACEMENT)
    unfinished = stream(tokenizer, tokenizer(text + "😀").input_ids[:-1])
    assert unfinished[-1] == text


STOPS = {  # text, stop strings, what is left
    "inside": ("hello STOP world", ["STOP"], "hello "),
    "at-the-start": ("STOPabc", ["STOP"], ""),
    "at-the-end": ("hello STOP", ["STOP"], "hello "),
    "unfinished-at-the-end": ("hello STO", ["STOP"], "hello STO"),
    "absent": ("hello world", ["STOP"], "hello world"),
    "begins-anew-within-itself": ("aaab", ["aab"], "a"),
    "begins-anew-twice": ("ababac.", ["abac"], "ab"),
    "begins-and-breaks-off": ("abab abx", ["abac"], "abab abx"),
    "one-is-the-end-of-another": ("xaab", ["ab", "aab"], "x"),
    "one-is-the-start-of-another": ("xaab", ["aab", "aa"], "x"),
    "first-to-be-complete": ("abcd", ["abcd", "bc"], "a"),
    "earliest-of-several": ("one two three", ["three", "two", "four"], "one "),
    "twice": ("a.b.c", ["."], "a"),
    "several-bytes": ("le café noir", ["é n"], "le caf"),
    "shares-its-first-bytes": ("à é ê", ["ê"], "à é "),
    "emoji": ("ok 😀😁", ["😁"], "ok 😀"),
    "newlines": ("a\nb\n\nc", ["\n\n"], "a\nb"),
}


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
@pytest.mark.parametrize("name", STOPS)
def test_stop_strings(tokens, name):
    text, stop, want = STOPS[name]
    asked = request(tokenizer=tokens[0], stop=stop, max_tokens=len(text.encode()))
    for token in tokens[0](text).input_ids:
        asked.step(only(token, 260))
        assert want.startswith(asked.text.released)
        if asked.finish_reason:
            break
    assert asked.completion().text == want
    assert asked.finish_reason == ("length" if want == text else "stop")


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
def test_stop_strings_before_min_tokens_are_text(tokens):
    """vLLM's rule: a stop string ends the output only if it is complete after `min_tokens`, wherever it began."""
    for text, least, want in (("a.b.c", 2, "a.b"), ("a.b.c", 4, "a.b.c"), ("a.b.c", 1, "a"), ("abSTOPc", 5, "ab")):
        asked = request(tokenizer=tokens[0], stop=[".", "STOP"], min_tokens=least, max_tokens=len(text))
        for token in tokens[0](text).input_ids:
            if not asked.finish_reason:
                asked.step(only(token, 260))
        assert asked.completion().text == want, (text, least)


def test_a_stop_string_found_at_the_very_end_is_the_reason():
    """The last token ends in half a character, so that its whole one is searched only at the end."""
    tokenizer = byte_pairs()
    token = tokenizer("b€").input_ids[0]
    assert tokenizer.decode([token]) == "b" + REPLACEMENT
    for stop, text, reason in ((["b"], "", "stop"), (["c"], "b", "length")):
        asked = request(tokenizer=tokenizer, stop=stop, max_tokens=1)
        asked.step(only(token, len(tokenizer)))
        assert (asked.completion().text, asked.finish_reason) == (text, reason)


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
def test_endings_are_not_text(tokens):
    letter, eos, special = tokens[0]("x").input_ids[0], 258, 259
    for ending, params in ((eos, {}), (special, {"stop_token_ids": [special]}), (letter, {"stop_token_ids": [letter]})):
        asked = request(eos=(eos,), tokenizer=tokens[0], **params)
        for token in (*tokens[0]("ab").input_ids, ending):
            asked.step(only(token, 260))
        assert (asked.completion().text, asked.finish_reason, len(asked.token_ids)) == ("ab", "stop", 3)


class Counting:
    def __init__(self, tokenizer):
        self.tokenizer, self.tokens = tokenizer, 0

    def decode(self, ids, **options):
        self.tokens += len(ids)
        return self.tokenizer.decode(ids, **options)


ENDLESS = ["letter", "emoji", "first-byte", "last-byte", "skipped"]


@pytest.mark.parametrize("tokens", ["bytes", "llama-2"], indirect=True)
@pytest.mark.parametrize("name", ENDLESS)
def test_cost_is_linear_whatever_the_tokens_are(tokens, name):
    """Tokens decoded, not seconds: 16 of an unfinished character and 16 before them, in two decodes a step at most."""
    tokenizer, pieces = tokens
    emoji = next(piece for piece in pieces if tokenizer.decode(piece) == "😀")
    unit = dict(zip(ENDLESS, (pieces[1], emoji, emoji[:1], emoji[-1:], [tokenizer.unk_token_id]), strict=True))[name]
    ids, counting = unit * (2400 // len(unit)), Counting(tokenizer)
    released = stream(counting, ids + pieces[1] * 2)
    assert counting.tokens <= 2 * 32 * len(ids)
    assert released[-1] == tokenizer.decode(ids + pieces[1] * 2, skip_special_tokens=True)
    assert max(len(b) - len(a) for a, b in zip(released, released[1:], strict=False)) <= 16  # it keeps flowing
