"""Choosing tokens and turning them into text: validation, exact distributions, whole characters, stop strings."""

import math
from random import Random
from unittest.mock import Mock
from weakref import WeakKeyDictionary

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memkernel import tiny
from memkernel.request import REPLACEMENT, Request, TextStream
from memkernel.sampling import Kind, Sampler, SamplingParams, uniform

NAN, INF = math.nan, math.inf
# fmt: off
BAD = {
    "max_tokens": [0, -1, 1.5, True, None, "3", INF], "min_tokens": [-1, 257, 1.0, False, "a"],
    "temperature": [-1, -1e-9, 1e7, NAN, INF, True, None, "1"], "top_p": [0, -0.1, 1.5, NAN, True, None],
    "top_k": [-2, 1.0, True, None], "min_p": [-0.1, 2, NAN, True, "x"],
    "repetition_penalty": [0, -1, NAN, INF, True], "logprobs": [-1, 1001, 1.0, True],
    "presence_penalty": [-2.1, 2.1, NAN, False], "frequency_penalty": [-2.1, 2.1, NAN, "0"],
    "stop": ["", ["a", ""], [1], [None], 5, {"a"}, b"a"], "stop_token_ids": [[-1], ["1"], [1.0], [True], 5, "12"],
    "ignore_eos": [1, 0, None, "yes"], "seed": [-1, 1 << 63, 1.0, True, "1"],
}
BAD = [pytest.param(name, value, id=f"{name}={value!r}") for name, values in BAD.items() for value in values]
RANKED = [0.30, 0.22, 0.15, 0.12, 0.09, 0.06, 0.04, 0.02]
PLACE = [5, 2, 7, 0, 3, 6, 1, 4]  # token of each rank: an implementation that takes ranks for tokens is found out
LOGITS = torch.empty(8).index_put_((torch.tensor(PLACE),), torch.tensor(RANKED).log() + 3)
KEPT = {  # how many of the most likely tokens are left; where an order of filters is named, other orders leave others
    "top_k": ({"top_k": 3}, 3), "top_p-least": ({"top_p": 1e-9}, 1),
    "top_p-keeps-the-token-that-crosses": ({"top_p": 0.5}, 2), "min_p": ({"min_p": 0.25}, 5),
    "temperature": ({"temperature": 0.5, "top_k": -1}, 8), "temperature-1e-40": ({"temperature": 1e-40}, 1),
    "temperature-then-min_p": ({"temperature": 2.0, "min_p": 0.45}, 5),
    "temperature-then-top_p": ({"temperature": 0.5, "top_p": 0.7}, 2),
    "top_k-then-top_p": ({"top_k": 3, "top_p": 0.76}, 2), "min_p-then-top_p": ({"min_p": 0.45, "top_p": 0.76}, 2),
    "all": ({"temperature": 2.0, "min_p": 0.45, "top_k": 4, "top_p": 0.75}, 3),
}
ROLES = ["prompt", "prompt-twice", "output", "output-twice", "both", "unseen", "zero"]
STOPS = {  # text, stop strings, what is left; min_tokens
    "inside": ("hello STOP world", ["STOP"], "hello "), "at-the-start": ("STOPabc", ["STOP"], ""),
    "at-the-end": ("hello STOP", ["STOP"], "hello "), "unfinished": ("hello STO", ["STOP"], "hello STO"),
    "begins-anew-within-itself": ("aaab", ["aab"], "a"), "end-of-another": ("xaab", ["ab", "aab"], "x"),
    "first-to-be-complete": ("abcd", ["abcd", "bc"], "a"), "start-of-another": ("xaab", ["aab", "aa"], "x"),
    "several-bytes": ("le café noir", ["é n"], "le caf"), "shared-first-bytes": ("ok 😀😁", ["😁"], "ok 😀"),
    "before-min-tokens-is-text": ("a.b.c", ["."], "a.b", 3), "begun-before-min-tokens": ("abSTOPc", ["STOP"], "ab", 5),
}
# fmt: on
TEXTS = ["naïve café €", "日本語のテキスト。", "👩\u200d👩\u200d👧 🇫🇷", "e\u0301\n\ttab  two", "\ufffd in it\ufffd."]
ENDLESS = ["letter", "emoji", "first-byte", "last-byte", "skipped", "unknown"]


def request(prompt=(0,), eos=(), tokenizer=None, **params):
    return Request(torch.tensor(prompt), SamplingParams.from_kwargs(**params), eos, tokenizer)


def step(asked, logits, samplers=WeakKeyDictionary()):  # noqa: B006 - it is to last
    """Choose the next token of each request, which stay together, from its row of logits [B, V]; returns the tokens."""
    kind = Kind.of([one.params for one in asked], logits.shape[1])
    sampler = samplers.get(asked[0])
    if sampler is None:
        sampler = samplers[asked[0]] = Sampler(kind, len(asked), logits.shape[1], logits.device)
        sampler.begin(asked)
    sampler.choose(logits)
    for one, row in zip(asked, sampler.outcome.tolist(), strict=True):
        one.take(*kind.unpack(row))
    return sampler.tokens.tolist()


def draw(count, logits, **params):
    """Tokens of 40 requests with seeds of their own, count / 40 of each."""
    params = {"max_tokens": count + 1, "temperature": 1.0} | params
    asked, rows = [request(seed=seed, **params) for seed in range(40)], logits.expand(40, -1)
    return [token for _ in range(count // 40) for token in step(asked, rows)]


def force(asked, tokens):
    """Step through `tokens`: greedy choice is left no choice, whatever the penalties."""
    for token in tokens:
        if not asked.finish_reason:
            size = max(300, token + 1)
            assert step([asked], torch.full((1, size), -1e6).index_fill_(1, torch.tensor([token]), 1e6)) == [token]
    return asked


@pytest.mark.parametrize("name, value", BAD)
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        SamplingParams.from_kwargs(**{name: value})


def test_names_of_the_parameters():
    made = SamplingParams.from_kwargs
    assert made(max_new_tokens=7) == made(max_tokens=7)
    assert made(stop="ab", stop_token_ids=[3], logprobs=None) == SamplingParams(stop=("ab",), stop_token_ids=(3,))
    with pytest.raises(ValueError, match="^max_new_tokens: expected one of .*got both"):
        made(max_tokens=7, max_new_tokens=7)
    with pytest.raises(ValueError, match="^temprature: not a sampling parameter.*'temperature'"):
        made(temprature=1.0)
    with pytest.raises(ValueError, match="^stop: "):
        SamplingParams(stop="ab")  # unlike from_kwargs it takes a tuple; not to be read as the letters a and b


@pytest.mark.parametrize("name", KEPT)
def test_draws_have_exactly_the_distribution(name):
    params, kept = KEPT[name]
    weights = [(p / RANKED[0]) ** (1 / params.get("temperature", 1)) for p in RANKED[:kept]]
    tokens = draw(2000, LOGITS, **params)
    assert set(tokens) == set(PLACE[:kept])  # the rarest is expected 40 times
    expected = [2000 * weight / sum(weights) for weight in weights]
    statistic = sum((tokens.count(PLACE[i]) - e) ** 2 / e for i, e in enumerate(expected))
    assert statistic <= [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.33][kept - 1]  # chi-square's 99.9% quantiles


def test_a_seed_makes_a_request_reproducible_whatever_runs_beside_it():
    def tokens_of(*seeds):
        asked = [request(max_tokens=99, temperature=1.0, seed=seed) for seed in seeds]
        for _ in range(50):
            step(asked, LOGITS.expand(len(asked), -1))
        return [one.token_ids for one in asked]

    alone = tokens_of(5)[0]
    assert tokens_of(6, 5, (1 << 63) - 1)[1] == alone != tokens_of(6)[0]
    assert tokens_of(5 + (1 << 40))[0] != alone  # all bits of a seed count
    assert tokens_of(None) != tokens_of(None)


def test_requests_of_all_kinds_together_give_what_each_gives_alone():
    kinds = [
        {},
        {"temperature": 1.0, "top_p": 0.7, "seed": 3},
        {"temperature": 1.3, "top_k": 3, "min_p": 0.1, "seed": 4, "logprobs": 2},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.8, "presence_penalty": 1.0, "min_tokens": 5, "stop_token_ids": [5, 2], "seed": 5},
        {"logprobs": 4, "min_tokens": 2},
    ]
    rows = torch.randn(20, len(kinds), 8, generator=torch.Generator().manual_seed(1)) * 2

    def make(i):
        return request(prompt=[i, 7], eos=(0,), max_tokens=20, **kinds[i])

    together, apart = [make(i) for i in range(len(kinds))], [make(i) for i in range(len(kinds))]
    for logits in rows:
        step(together, logits)
        for one, row in zip(apart, logits, strict=True):
            step([one], row[None])
    for one, other in zip(together, apart, strict=True):
        assert (one.token_ids, one.logprobs, one.top_logprobs) == (other.token_ids, other.logprobs, other.top_logprobs)
    assert together[0].token_ids == rows[:, 0].argmax(-1).tolist() != together[3].token_ids
    assert [len(one.top_logprobs[0]) if one.top_logprobs else 0 for one in together] == [0, 0, 2, 0, 0, 4]


def uniform_by_hand(seed, position, token):
    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % (1 << 32)
        x = (x ^ x >> 13) * 0xC2B2AE35 % (1 << 32)
        return x ^ x >> 16

    for key in (0x9E3779B9, 0x7F4A7C15):
        for word in (seed, seed >> 32, position, position >> 32):
            key = mix(key ^ word % (1 << 32))
        token = mix(token ^ key)
    return (token + 0.5) / (1 << 32)


def test_the_numbers_behind_the_draws_are_the_same_everywhere():
    seeds, positions = [0, 1, (1 << 63) - 1, 1 << 33], [0, 7, 1 << 20, 3]
    got = uniform(torch.tensor(seeds), torch.tensor(positions), 50)
    want = [[uniform_by_hand(*pair, token) for token in range(50)] for pair in zip(seeds, positions, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("along", ["seed", "position", "token"])
def test_the_numbers_behind_the_draws_are_uniform_and_independent(along):
    """Pairs of neighbours along one axis, in 16 x 16 equal cells: chi-square with 255 degrees of freedom."""
    count = {"seed": (4096, 1, 16), "position": (1, 4096, 16), "token": (8, 8, 1025)}[along]
    seed, position = (x.reshape(-1) for x in torch.meshgrid(*map(torch.arange, count[:2]), indexing="ij"))
    numbers = uniform(seed, position, count[2]).view(count)
    axis = ["seed", "position", "token"].index(along)
    cell = (numbers * 16).long()
    first, second = cell.narrow(axis, 0, count[axis] - 1), cell.narrow(axis, 1, count[axis] - 1)
    observed = torch.bincount((first * 16 + second).reshape(-1), minlength=256).double()
    expected = observed.sum() / 256
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert 170 < statistic < 360  # p of about 1e-5 on either side


@pytest.mark.parametrize("token", range(7), ids=ROLES)
@pytest.mark.parametrize("raw", [2.5, -0.5])
@pytest.mark.parametrize(
    "repetition, presence, frequency", [(1.7, 0, 0), (0.6, 0, 0), (1, -1.3, 0), (1, 0, 0.7), (1.3, 0.5, -0.4)]
)
def test_penalties_are_those_of_vllm(repetition, presence, frequency, raw, token):
    """A probe that no penalty touches wins just above the penalised logit and loses just below it."""
    prompt, output, probe = [0, 1, 1, 4, 6], [2, 3, 4, 3], 7
    want = raw = 0.0 if token == 6 else raw
    if token in prompt + output:  # towards minus infinity, for tokens of the prompt and of the output
        want = want / repetition if want > 0 else want * repetition
    want -= frequency * output.count(token) + presence * (token in output)
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    for difference, winner in ((-1e-4, token), (1e-4, probe)):
        logits = torch.full((300,), -1e6)  # as many as `force` gives
        logits[token], logits[probe] = raw, want + difference
        assert step([force(request(prompt, **params), output)], logits[None]) == [winner]


def test_min_tokens_bars_endings():
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0])  # eos 1, stop token 2
    asked = request(eos=(1,), min_tokens=3, stop_token_ids=[2], max_tokens=9)
    assert [step([asked], logits[None]) for _ in range(3)] == [[3]] * 3 and asked.finish_reason is None
    assert step([asked], logits[None]) == [1] and asked.finish_reason == "stop"


def test_logprobs_are_those_of_the_raw_logits():
    given = LOGITS.clone()
    asked = request((5,), logprobs=3, temperature=0.3, repetition_penalty=2.0, presence_penalty=1.0, top_k=2, seed=0)
    for _ in range(4):
        (token,) = step([asked], given[None])
        assert asked.logprobs[-1] == pytest.approx(math.log(RANKED[PLACE.index(token)]), abs=1e-6)
        assert list(asked.top_logprobs[-1]) == PLACE[:3]
        assert list(asked.top_logprobs[-1].values()) == pytest.approx([math.log(p) for p in RANKED[:3]], abs=1e-6)
    assert torch.equal(given, LOGITS)  # the caller's logits are not written to
    assert len(force(request(logprobs=1000), [3]).completion().top_logprobs[0]) == 300


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("damaged", [[3], range(8)], ids=["one", "all"])
def test_nan_logits_raise(params, damaged):
    logits = LOGITS.clone()
    logits[list(damaged)] = NAN
    with pytest.raises(ValueError, match="^logits: .*NaN"):
        step([request(**params)], logits[None])


def words(decoder):
    """Words with their space in front, the first of which is not decoded; bytes are <0x00> to <0xFF>, as in Llama 2."""
    pieces = ["▁a", "▁b", "▁ab", "a", "ing", ",", "▁", "▁▁", "é", "▁本", *(f"<0x{i:02X}>" for i in range(256)), "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "byte-pairs", "metaspace", "llama-2"])
def tokens(request, tmp_path_factory):
    """A tokenizer, and what texts are made of: runs of its tokens that are whole characters."""
    if request.param == "metaspace":
        return words(decoders.Metaspace()), [[i] for i in range(10)]
    if request.param == "llama-2":
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        return words(decoders.Sequence(parts)), [[i] for i in range(10)] + [[10 + b for b in c.encode()] for c in "é😀"]
    tiny.write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param == "byte-pairs":  # a token of Llama 3, too, may be a letter and the first byte of a character
        euro = tokenizer.tokenize("€")
        merges = [("b", euro[0]), ("Ġ", "a"), ("a", "b"), (euro[1], euro[2])]
        vocabulary = tokenizer.get_vocab() | {a + b: 260 + i for i, (a, b) in enumerate(merges)}
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.model = models.BPE(vocabulary, merges=merges)
    return tokenizer, [tokenizer(c).input_ids for c in ("a", *"ab  ,é本😀\n\u0301", "b€", "ab")]


def stream(tokenizer, ids, stop=()):
    """What is released after each token, then after the end."""
    text, released = TextStream(tokenizer, tuple(stop)), []
    for token in ids:
        if not text.stopped:
            text.push(token, search=True)
            released.append(text.released)
    text.close()
    return [*released, text.released]


def defined(tokenizer, ids, stop):
    """(text, tokens taken): all decoded anew at each token, cut where the first stop string to be complete begins."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        text = text.rstrip(REPLACEMENT) if n == len(ids) else text
        found = [text.find(string) for string in stop if string in text]
        if found and not text.endswith(REPLACEMENT):
            return text[: min(found)], n
    return text, len(ids)


def test_random_texts_with_random_stop_strings(tokens):
    tokenizer, pieces = tokens
    random, cut = Random(0), 0
    for _ in range(250):
        ids = [token for piece in random.choices(pieces, k=random.randint(1, 16)) for token in piece]
        full, stop = tokenizer.decode(ids), []
        for _ in range(random.choice([0, 1, 1, 2, 3]) if full else 0):  # parts of the text, half of them altered
            begin = random.randrange(len(full))
            stop.append(full[begin : begin + random.randint(1, 4)] + random.choice(["", random.choice("abé ,")]))
        released, (want, taken) = stream(tokenizer, ids, stop), defined(tokenizer, ids, stop)
        assert (released[-1], len(released)) == (want, taken + 1), (full, stop)  # it ended as soon as it could
        cut += want != full
        for text, later, n in zip(released, released[1:], range(1, taken), strict=False):
            assert later.startswith(text) and want.startswith(text), (full, stop)  # nothing is ever taken back
            known = tokenizer.decode(ids[:n])
            held = max((i for s in stop for i in range(len(s)) if known.endswith(s[:i])), default=0)
            if not known.endswith(REPLACEMENT):
                assert len(text) == len(known) - held, (full, stop)  # and nothing is held back needlessly
    assert cut > 80


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
@pytest.mark.parametrize("text", TEXTS)
def test_released_is_whole_characters(tokens, text):
    raw, released = text.encode(), stream(tokens[0], tokens[0](text).input_ids)
    assert (released[-1], len(released)) == (text, len(raw) + 1)
    for n, prefix in enumerate(released[:-1], start=1):
        assert prefix == raw[:n].decode(errors="ignore").rstrip(REPLACEMENT)  # U+FFFD itself looks unfinished
    assert stream(tokens[0], tokens[0](text + "😀").input_ids[:-1])[-1] == text


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
@pytest.mark.parametrize("name", STOPS)
def test_stop_strings_end_a_request(tokens, name):
    text, stop, want, *least = STOPS[name]
    ids = tokens[0](text).input_ids
    asked = request(tokenizer=tokens[0], stop=stop, max_tokens=len(ids), min_tokens=sum(least))
    done = force(asked, ids).completion()
    assert (done.text, done.finish_reason) == (want, "length" if want == text else "stop")


@pytest.mark.parametrize("tokens", ["byte-pairs"], indirect=True)
def test_a_stop_string_found_at_the_very_end_is_the_reason(tokens):
    """The last token ends in half a character, so that its whole one is searched only at the end."""
    token = tokens[0]("b€").input_ids[0]
    assert tokens[0].decode([token]) == "b" + REPLACEMENT
    done = force(request(tokenizer=tokens[0], stop=["b"], max_tokens=1), [token]).completion()
    assert (done.text, done.finish_reason) == ("", "stop")


@pytest.mark.parametrize("tokens", ["bytes"], indirect=True)
@pytest.mark.parametrize("ending", ["eos", "special", "letter", "ignored-eos", "length"])
def test_endings_are_not_text(tokens, ending):
    a, b, c, eos, special = *tokens[0]("abc").input_ids, 258, 259
    last = {"eos": eos, "special": special, "ignored-eos": eos}.get(ending, c)
    params = {"stop_token_ids": [special, c]} if ending in ("special", "letter") else {"max_tokens": 3}
    asked = request(eos=(eos,), tokenizer=tokens[0], ignore_eos=ending == "ignored-eos", **params)
    done = force(asked, [a, b, last, a]).completion()
    reason = "length" if ending in ("length", "ignored-eos") else "stop"
    assert done.token_ids == [a, b, last]
    assert (done.text, done.finish_reason) == ("abc" if ending == "length" else "ab", reason)


@pytest.mark.parametrize("tokens", ["bytes", "llama-2"], indirect=True)
@pytest.mark.parametrize("name", ENDLESS)
def test_cost_is_linear_whatever_the_tokens_are(tokens, name, monkeypatch):
    """Tokens decoded, not seconds: 16 of an unfinished character and 16 before them, in two decodes a step at most."""
    tokenizer, pieces = tokens
    decode, spy = tokenizer.decode, Mock(side_effect=tokenizer.decode)
    emoji = next(piece for piece in pieces if decode(piece) == "😀")
    units = (pieces[0], emoji, emoji[:1], emoji[-1:], [tokenizer.unk_token_id], [len(tokenizer) + 5])
    unit = dict(zip(ENDLESS, units, strict=True))[name]
    ids = unit * ((2414 if name in ENDLESS[4:] else 2400) // len(unit)) + emoji + pieces[0]  # not 16 n: some wait
    monkeypatch.setattr(tokenizer, "decode", spy)
    released = stream(tokenizer, ids)
    assert sum(len(call.args[0]) for call in spy.call_args_list) <= 2 * 32 * len(ids)
    assert released[-1] == decode(ids, skip_special_tokens=True)
    assert max(len(b) - len(a) for a, b in zip(released, released[1:], strict=False)) <= 16  # it keeps flowing
