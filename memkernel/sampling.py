"""Choosing tokens and turning them into text: sampling parameters, one request's state, stop strings."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished UTF-8 sequence to
UNFINISHED_TOKENS = 16  # no character takes so many: what still ends in REPLACEMENT then is not UTF-8


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and meanings are vLLM's; the default is greedy.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p, min_p: nucleus and relative cut-offs, applied in the
    order temperature, min_p, top_k, top_p. repetition_penalty counts prompt and output, presence_penalty and
    frequency_penalty the output. stop: strings that end the output and are not part of it. stop_token_ids: tokens that
    end it beside the model's end-of-sequence. min_tokens: nothing ends it before so many. max_new_tokens: another name
    of max_tokens. seed: makes the request reproducible on its own, whatever it is batched with. logprobs: so many most
    likely tokens are reported at each step, before penalties and temperature.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int = 0

    @classmethod
    def from_kwargs(cls, **given) -> "SamplingParams":
        """Validate keyword arguments. Raises ValueError naming the argument, what was expected and what came."""
        if "max_new_tokens" in given:
            if "max_tokens" in given:
                raise ValueError("max_new_tokens: expected one of max_tokens and max_new_tokens, got both")
            given["max_tokens"] = given.pop("max_new_tokens")
        if unknown := sorted(set(given) - {field.name for field in fields(cls)}):
            raise ValueError(
                f"{unknown[0]}: not a sampling parameter; there are {[field.name for field in fields(cls)]}"
            )
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        for name in ("stop", "stop_token_ids"):
            given[name] = _tuple(name, given.get(name))
        if given.get("logprobs") is None:
            given["logprobs"] = 0
        return cls(**given)

    def __post_init__(self):
        for name, low, high, whole in (
            ("max_tokens", 1, 1 << 20, True),
            ("min_tokens", 0, self.max_tokens, True),
            ("temperature", 0, 1e6, False),
            ("top_p", 1e-9, 1, False),
            ("top_k", -1, math.inf, True),
            ("min_p", 0, 1, False),
            ("repetition_penalty", 1e-6, 1e6, False),
            ("presence_penalty", -2, 2, False),
            ("frequency_penalty", -2, 2, False),
            ("logprobs", 0, 1000, True),
        ):
            value = getattr(self, name)
            kind = int if whole else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise ValueError(
                    f"{name}: expected {'an integer' if whole else 'a number'} in [{low}, {high}], got {value!r}"
                )
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop: expected non-empty strings, got {self.stop!r}")
        tokens = self.stop_token_ids
        if not isinstance(tokens, tuple) or not all(type(token) is int and token >= 0 for token in tokens):
            raise ValueError(f"stop_token_ids: expected token ids, got {tokens!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: expected true or false, got {self.ignore_eos!r}")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
            raise ValueError(f"seed: expected an integer in [0, 2^63) or None, got {seed!r}")


def _tuple(name: str, value) -> tuple:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: expected a list, got {value!r}")
    return tuple(value)


@dataclass
class Completion:
    """What one prompt was answered.

    text: the new text without the stop string; None for a model without a tokenizer.
    token_ids: the new tokens, the one that ended them included. logprobs: the log-probability of each.
    top_logprobs: for each, {token id: log-probability} of the most likely, if `logprobs` asked for it.
    finish_reason: "stop" (end-of-sequence, stop token, stop string) or "length".
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]] | None = None


class Request:
    """One prompt being answered: chooses its tokens with its own generator, and knows when it is done."""

    def __init__(self, prompt_ids: Tensor, params: SamplingParams, eos_token_ids: tuple[int, ...], tokenizer):
        self.params = params
        self.prompt_ids = prompt_ids.cpu()
        self.endings = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self.barred = {*params.stop_token_ids, *eos_token_ids}
        self.generator = torch.Generator()
        self.generator.seed() if params.seed is None else self.generator.manual_seed(params.seed)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.finish_reason: str | None = None
        self.text = None if tokenizer is None else TextStream(tokenizer, params.stop)

    def step(self, logits: Tensor) -> int:
        """Choose the next token from logits [V] float32, on any device, and take note of it."""
        params = self.params
        log_probabilities = logits.log_softmax(-1)
        if log_probabilities[0].isnan():  # one NaN makes all of them NaN
            raise ValueError("logits: expected numbers, got NaN: the weights or the memory are damaged")
        token = self._choose(logits.clone())
        self.token_ids.append(token)
        self.logprobs.append(log_probabilities[token].item())
        if params.logprobs:
            top = log_probabilities.topk(min(params.logprobs, len(logits)))
            self.top_logprobs.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        enough = len(self.token_ids) >= params.min_tokens
        ended = enough and token in self.endings
        if self.text is not None and not ended:
            self.text.push(token, search=enough)
        last = ended or len(self.token_ids) >= params.max_tokens
        if last and self.text is not None:
            self.text.close()
        if ended or (self.text is not None and self.text.stopped):
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        return token

    def completion(self) -> Completion:
        text = None if self.text is None else self.text.released
        top = self.top_logprobs if self.params.logprobs else None
        return Completion(text, self.token_ids, self.logprobs, self.finish_reason, top)

    def _choose(self, logits: Tensor) -> int:
        params = self.params
        self._penalise(logits)
        if len(self.token_ids) < params.min_tokens and self.barred:
            logits[list(self.barred)] = -math.inf
        if params.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().double()
        probabilities = ((logits - logits.max()) / params.temperature).softmax(-1)  # no overflow, however cold
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
        if params.top_k > 0 or params.top_p < 1:
            ordered, index = probabilities.sort(descending=True, stable=True)
            if params.top_k > 0:
                ordered[params.top_k :] = 0
            if params.top_p < 1:
                before = ordered.cumsum(0) - ordered
                ordered[before >= params.top_p * ordered.sum()] = 0
            probabilities = torch.zeros_like(probabilities).scatter_(0, index, ordered)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def _penalise(self, logits: Tensor) -> None:
        params = self.params
        if params.repetition_penalty != 1:
            seen = (
                torch.cat([self.prompt_ids, torch.tensor(self.token_ids, dtype=torch.int64)]).unique().to(logits.device)
            )
            logits[seen] = torch.where(
                logits[seen] > 0, logits[seen] / params.repetition_penalty, logits[seen] * params.repetition_penalty
            )
        if self.token_ids and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = torch.tensor(self.token_ids).unique(return_counts=True)
            penalty = params.presence_penalty + params.frequency_penalty * counts.float()
            logits[tokens.to(logits.device)] -= penalty.to(logits.device)


class TextStream:
    """Tokens in, text out: whole characters only, and never a part of a stop string.

    `released` is the text that is certain so far. Tokens are decoded in a short window that starts at the last point
    where the text was whole, since a token's text may depend on its neighbours.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.token_ids: list[int] = []
        self.window = self.read = 0  # the window's first token, and the first token whose text is not in `text`
        self.text = ""
        self.searched = 0  # length of the text that was searched for stop strings, or was exempt
        self.released = ""
        self.stopped = False

    def push(self, token: int, search: bool) -> None:
        """Add a token; with `search`, a stop string that ends within its text ends the stream."""
        if not self.tokenizer.decode([token, token], skip_special_tokens=True):
            return  # special or unknown to the tokenizer: a leading space may decode to nothing, but not two
        self.token_ids.append(token)
        known, text = self._decode(self.window, self.read), self._decode(self.window, len(self.token_ids))
        overdue = len(self.token_ids) - self.read >= UNFINISHED_TOKENS
        if len(text) > len(known) and (overdue or not text.endswith(REPLACEMENT)):
            self._append(text[len(known) :], search)
            self.window, self.read = self.read, len(self.token_ids)
        self.released = self.text[: len(self.text) - (0 if self.stopped else self._held())]

    def close(self) -> None:
        """No more tokens: what was held back is released, but for an unfinished character."""
        if not self.stopped:
            known = self._decode(self.window, self.read)
            rest = self._decode(self.window, len(self.token_ids))[len(known) :]
            self._append(rest.rstrip(REPLACEMENT), search=True)
        self.released = self.text

    def _append(self, text: str, search: bool) -> None:
        self.text += text
        if search:
            found = [
                at for stop in self.stop if (at := self.text.find(stop, max(0, self.searched - len(stop) + 1))) >= 0
            ]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        self.searched = len(self.text)

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        lengths = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self.stop)), 0)

    def _decode(self, begin: int, end: int) -> str:
        return self.tokenizer.decode(self.token_ids[begin:end], skip_special_tokens=True)
