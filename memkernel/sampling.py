"""How tokens are chosen: the parameters, and the choice itself, for a batch of sequences on the model's device."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from memkernel.reference import MASK_32, _mix


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and meanings are vLLM's; the default is greedy.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p, min_p: nucleus and relative cut-offs, applied in the
    order temperature, min_p, top_k, top_p. repetition_penalty counts prompt and output, presence_penalty and
    frequency_penalty the output. stop: strings that end the output and are not part of it. stop_token_ids: tokens that
    end it beside the model's end-of-sequence. min_tokens: nothing ends it before so many. max_new_tokens: another name
    of max_tokens. seed: makes the request reproducible on its own, whatever it is batched with
    and on whatever device, up to the logits' rounding. logprobs: so many most
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


class Kind(NamedTuple):
    """What choosing takes for the requests of a batch; a captured graph is of one kind."""

    draws: bool  # some temperature is above 0
    sorts: bool  # some top_k or top_p cuts off
    penalises: bool
    bars: bool  # some min_tokens keep endings out
    top: int  # so many most likely tokens are reported

    @classmethod
    def of(cls, batch: list[SamplingParams], vocab: int) -> "Kind":
        return cls(
            draws=any(p.temperature > 0 for p in batch),
            sorts=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in batch),
            penalises=any((p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0) for p in batch),
            bars=any(p.min_tokens > 0 for p in batch),
            top=min(vocab, max(p.logprobs for p in batch)),
        )

    def unpack(self, row: list[float]) -> tuple[int, float, list[int], list[float]]:
        """One sequence's row of `Sampler.outcome`: the arguments of `Request.take`."""
        most, their_logprobs = row[2 : 2 + self.top], row[2 + self.top :]
        return int(row[0]), row[1], list(map(int, most)), their_logprobs


class Sampler:
    """Chooses the next token of each of B sequences on the device, where the host need not wait for it.

    All tensors keep their addresses. A draw is a pure function of a sequence's seed, the position in its output and its
    probabilities: the token v with the largest p_v / -log(u_v), where u_v is a hash of (seed, position, v) as a uniform
    number. Of so many exponential clocks with rates p_v each is the first to ring with probability p_v. Unlike a number
    looked up in the cumulative distribution, where rounding of one p shifts all tokens after it, this moves few winners
    when the p are rounded otherwise.

    Attributes:
        tokens: [B] int64, those chosen last.
        outcome: [B, 2 + 2 top] float64, of the last choice: token, its log-probability before penalties and
            temperature (NaN if a logit is), the most likely tokens and their log-probabilities.
    """

    def __init__(self, kind: Kind, batch: int, vocab: int, device: torch.device):
        self.kind, self.vocab = kind, vocab
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.tokens)
        self.outcome = torch.zeros(batch, 2 + 2 * kind.top, dtype=torch.float64, device=device)
        self.reals = torch.zeros(6, batch, dtype=torch.float64, device=device)
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = self.reals
        self.integers = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self.seed, self.top_k, self.min_tokens = self.integers
        if kind.penalises:
            self.seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device)  # in the prompt or the output
            self.count = torch.zeros(batch, vocab, dtype=torch.int32, device=device)  # in the output
        if kind.bars:
            self.barred = torch.zeros(batch, vocab, dtype=torch.bool, device=device)

    def begin(self, requests: list) -> None:
        """Take over the parameters of at most B requests that have no token yet; rows beyond are greedy."""
        reals, integers = (torch.zeros(x.shape, dtype=x.dtype) for x in (self.reals, self.integers))
        reals[1], reals[3], integers[1] = 1.0, 1.0, self.vocab
        for i, request in enumerate(requests):
            p = request.params
            top_p = p.top_p if p.top_p < 1 else math.inf  # rounding must not cut anything off
            penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
            reals[:, i] = torch.tensor([p.temperature, top_p, p.min_p, *penalties], dtype=torch.float64)
            top_k = p.top_k if 0 < p.top_k < self.vocab else self.vocab
            integers[:, i] = torch.tensor([request.seed, top_k, p.min_tokens])
        self.reals.copy_(reals)
        self.integers.copy_(integers)
        self.position.zero_()
        if self.kind.penalises:
            self.count.zero_()
            self.seen.copy_(self._members([request.prompt_ids for request in requests]))
        if self.kind.bars:
            self.barred.copy_(self._members([torch.tensor(sorted(r.barred), dtype=torch.int64) for r in requests]))

    def _members(self, sets: list[Tensor]) -> Tensor:
        """[B, V]: whether row i's set holds the token."""
        members = torch.zeros(len(self.tokens), self.vocab, dtype=torch.bool)
        for row, tokens in zip(members, sets, strict=False):
            row[tokens] = True
        return members

    def choose(self, logits: Tensor) -> None:
        """Set `tokens` and `outcome` from logits [B, V] float32, which are not written to."""
        kind, top = self.kind, self.kind.top
        log_probabilities = logits.log_softmax(-1)
        scores = self._penalised(logits) if kind.penalises else logits
        if kind.bars:
            early_B1 = (self.position < self.min_tokens)[:, None]
            scores = scores.masked_fill(self.barred & early_B1, -math.inf)
        tokens = scores.argmax(-1)
        if kind.draws:
            tokens = torch.where(self.temperature > 0, self._drawn(scores), tokens)
        self.tokens.copy_(tokens)
        self.outcome[:, 0] = tokens
        self.outcome[:, 1] = log_probabilities.gather(1, tokens[:, None])[:, 0]
        if top:
            most = log_probabilities.topk(top)
            self.outcome[:, 2 : 2 + top], self.outcome[:, 2 + top :] = most.indices, most.values
        if kind.penalises:
            self.seen.scatter_(1, tokens[:, None], True)
            self.count.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
        self.position += 1

    def _penalised(self, logits: Tensor) -> Tensor:
        repetition, presence, frequency = self.reals[3:, :, None].float()
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        penalty = (presence + frequency * self.count.float()).masked_fill(self.count == 0, 0.0)
        return torch.where(self.seen, repeated, logits) - penalty

    def _drawn(self, scores: Tensor) -> Tensor:
        """[B] tokens from the distributions that temperature, min_p, top_k and top_p, in this order, leave."""
        temperature = self.temperature.masked_fill(self.temperature == 0, 1.0)[:, None]
        scores = scores.double()
        probabilities = ((scores - scores.amax(-1, True)) / temperature).softmax(-1)  # no overflow, however cold
        least = self.min_p[:, None] * probabilities.amax(-1, True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
        if self.kind.sorts:
            ordered, index = probabilities.sort(descending=True, stable=True)
            rank = torch.arange(self.vocab, device=scores.device)
            ordered = ordered.masked_fill(rank >= self.top_k[:, None], 0)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p[:, None] * ordered.sum(-1, True), 0)
            probabilities = torch.zeros_like(ordered).scatter_(1, index, ordered)
        return (probabilities / uniform(self.seed, self.position, self.vocab).log_().neg_()).argmax(-1)


def uniform(seed: Tensor, position: Tensor, count: int) -> Tensor:
    """[B, count] float64 numbers in (0, 1), multiples of 2^-33, from seed and position [B] int64; on any device."""
    keys = []
    for constant in (0x9E3779B9, 0x7F4A7C15):
        key = torch.full_like(seed, constant)
        for word in (seed, seed >> 32, position, position >> 32):
            key = _mix(key ^ (word & MASK_32))
        keys.append(key[:, None])
    hashed = _mix(_mix(torch.arange(count, device=seed.device) ^ keys[0]) ^ keys[1])
    return hashed.double().add_(0.5).mul_(2.0**-32)
