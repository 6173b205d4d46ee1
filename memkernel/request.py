"""One prompt being answered, on the host: its tokens, its text, and when it is done."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from memkernel.sampling import SamplingParams

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished UTF-8 sequence to
UNFINISHED_TOKENS = 16  # no character takes so many: what still ends in REPLACEMENT then is not UTF-8


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
    """One prompt being answered: takes note of the tokens chosen for it, and knows when it is done."""

    def __init__(self, prompt_ids: Tensor, params: SamplingParams, eos_token_ids: tuple[int, ...], tokenizer):
        self.params = params
        self.prompt_ids = prompt_ids.cpu()
        self.endings = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self.barred = {*params.stop_token_ids, *eos_token_ids}  # before min_tokens
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.finish_reason: str | None = None
        self.text = None if tokenizer is None else TextStream(tokenizer, params.stop)

    def take(self, token: int, logprob: float, top_ids: Sequence[int], top_logprobs: Sequence[float]) -> None:
        """Take note of the next token. Raises ValueError if its log-probability is NaN."""
        params = self.params
        if math.isnan(logprob):  # one NaN among the logits makes all log-probabilities NaN
            raise ValueError("logits: expected numbers, got NaN: the weights or the memory are damaged")
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if params.logprobs:
            self.top_logprobs.append(dict(zip(top_ids[: params.logprobs], top_logprobs, strict=False)))
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

    def completion(self) -> Completion:
        text = None if self.text is None else self.text.released
        top = self.top_logprobs if self.params.logprobs else None
        return Completion(text, self.token_ids, self.logprobs, self.finish_reason, top)


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
