"""The training loop: a pure function of its settings and seed, whenever it is interrupted and resumed.

Every step is one episode (`episodes`) over P pools, which live on from step to step as hidden states without gradient.
The data and the draws of a step depend on the seed, the step and what the pools were told, so that a checkpoint needs
no random state.
"""

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from memkernel.config import ModelConfig
from memkernel.memory_file import write_whole
from memkernel.training import vocabulary
from memkernel.training.differentiable import (
    EMBEDDING,
    EMBEDDING_LENGTH,
    DifferentiableLlama,
    draw_kept,
    filled,
    initial_weights,
    updated,
)
from memkernel.training.episodes import Episode, Plan, make_episode, plan_step
from memkernel.training.facts import Fact
from memkernel.training.structure import PARTS, give_structure

GEOMETRY = {
    "model_type": "llama",  # as the published 8B checkpoints say
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "num_blocks": 16,
    "num_tokens": 16,
    "add_bos_embedding": True,
    "drop_memory_per_layer": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAY_EVERY = 200  # steps
WARMUP = 50  # steps
SLOW = 0.3  # of the learning rate, for the embedding and all that is not a matrix
LAST_RATE = 0.05  # of the peak learning rate, at the end of the cosine
CLIP = 1.0
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a checkpoint of other settings is not resumed."""

    steps: int = 6000
    pools: int = 32
    sequences: int = 2  # that read each pool in a step
    items: int = 3  # facts of a sequence
    rate: float = 1.5e-3
    seed: int = 0
    dtype: str = "bfloat16"  # of the matrix products; all else is float32
    device: str = "cpu"


class Trainer:
    """A run in `folder`: settings, weights, optimizer and pools; `step` counts the steps that are done."""

    def __init__(self, folder: Path, settings: Settings, geometry: dict = GEOMETRY):
        if settings.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {settings.dtype}")
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = vocabulary.make_tokenizer(vocabulary.pieces())
        self.raw = geometry | {"vocab_size": self.tokenizer.get_vocab_size()}
        self.config = ModelConfig.from_dict(self.raw)
        generator = torch.Generator().manual_seed(settings.seed)
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        weights = initial_weights(self.config, generator)
        # Words are random codes, never trained, so that one that training has not seen is like those that it has.
        weights[EMBEDDING] = self._embeddings(vocabulary.pieces(), generator)
        fixed = give_structure(self.config, weights, generator)
        fixed[EMBEDDING] = torch.zeros_like(weights[EMBEDDING], dtype=torch.bool)
        fixed[EMBEDDING][len(vocabulary.grammar()) :] = True
        self.fixed = {name: mask.to(self.device) for name, mask in fixed.items()}
        self.weights = {name: w.to(self.device).requires_grad_() for name, w in weights.items()}
        fast = [w for n, w in self.weights.items() if w.ndim == 2 and n != EMBEDDING]
        slow = [w for n, w in self.weights.items() if w.ndim != 2 or n == EMBEDDING]
        self.optimizer = torch.optim.AdamW([{"params": fast}, {"params": slow}], betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.pool = 0, None
        self.told: list[list[tuple[int, Fact]]] = [[] for _ in range(settings.pools)]  # see `Episode`

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One step of AdamW; returns its loss and its recall (see `score`)."""
        settings = self.settings
        rng = random.Random(f"{settings.seed} {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        plan = plan_step(self.step / settings.steps, self.config.write_rows, self.config.memory_rows, rng)
        if self.pool is None and not plan.first:
            plan = replace(plan, first=True)
        sizes = settings.sequences, settings.items
        episode = make_episode(plan, self.told, *sizes, self.tokenizer, rng, held_out=False)
        for group, share in zip(self.optimizer.param_groups, (1.0, SLOW), strict=True):
            group["lr"] = settings.rate * share * self._schedule()
        loss, recall, self.pool = self.run(plan, episode, self.pool, generator)
        self.optimizer.zero_grad()
        loss.backward()
        for name, fixed in self.fixed.items():
            self.weights[name].grad[fixed] = 0
        torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        self.optimizer.step()
        self.told = episode.told
        self.step += 1
        return {"loss": loss.item(), "recall": recall}

    def _embeddings(self, words: list[str], generator: torch.Generator) -> Tensor:
        """Codes in the first part of the hidden states, and nothing in the others: [len(words), E]."""
        codes = vocabulary.word_codes(words, self.config.hidden_size // PARTS, generator)
        return EMBEDDING_LENGTH * F.pad(codes, (0, self.config.hidden_size - codes.shape[1]))

    def _schedule(self) -> float:
        """Share of the peak learning rate: a warmup, and a cosine."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.step / self.settings.steps)
        return min(1.0, (self.step + 1) / WARMUP) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def run(
        self, plan: Plan, episode: Episode, pool: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, float, Tensor]:
        """The episode's updates and questions; returns loss, recall, and the pool [L, P, M, E] after it, detached."""
        model = DifferentiableLlama(self.config, self.weights, self.dtype)
        pool = None if plan.first else pool.detach()
        alone = None
        for i, chunk in enumerate(episode.chunks.to(self.device)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == plan.graded):
                delta = model.inject(chunk, None if pool is None else pool[:, :, -self.config.write_rows :].detach())
            alone = delta if i == plan.graded else alone
            if pool is None:
                pool = filled(delta, self.config.memory_rows)
            else:
                kept = draw_kept(pool, delta.shape[2], generator, self.config.drop_per_layer)
                pool = updated(pool, delta, kept)
        seen = min(plan.blocks * self.config.write_rows, self.config.memory_rows)
        read, scored = episode.read.to(self.device), episode.scored.to(self.device)
        wanted = F.pad(scored[:, 1:], (0, 1))  # whose next token is scored
        logits = model.read(read, alone if plan.alone else pool[:, :, -seen:], wanted)
        loss, recall = score(logits, read[scored], episode.answer.to(self.device)[scored])
        return loss, recall, pool.detach()

    # -- held-out recall ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, later: tuple[int, ...] = (0, 2, 8)) -> dict[int, float]:
        """Recall of held-out facts from whole pools, t updates after theirs, over all pools; the run stays as it is.

        Before the first step pools are empty.
        """
        longest, found = 2 * self.config.write_rows, {}
        for t in later:
            rng, generator = random.Random(f"held out {t}"), torch.Generator().manual_seed(0)
            # As if the first update's rows were read alone: then all questions are about it.
            asked = Plan(1 + t, 0, True, self.pool is None, longest, self.config.memory_rows // self.config.write_rows)
            nothing = [[] for _ in range(self.settings.pools)]
            episode = make_episode(asked, nothing, 2, 1, self.tokenizer, rng, held_out=True)
            found[t] = self.run(replace(asked, alone=False), episode, self.pool, generator)[1]
        return found

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of the run, whole or not at all."""
        state = {"settings": asdict(self.settings), "config": self.raw, "step": self.step, "pool": self.pool}
        state["told"] = [[(age, astuple(fact)) for age, fact in facts] for facts in self.told]
        state |= {"weights": self.weights, "optimizer": self.optimizer.state_dict()}
        write_whole(self.folder / "training.pt", lambda path: torch.save(state, path))

    def resume(self) -> bool:
        """Continue the run that `folder` holds; False if it holds none. Raises ValueError for one of other settings."""
        path = self.folder / "training.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, mine in (("settings", asdict(self.settings)), ("config", self.raw)):
            if state[name] != mine:
                raise ValueError(f"{path}: {name}: expected {mine}, got {state[name]}")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.pool = state["step"], state["pool"]
        self.told = [[(age, Fact(*fact)) for age, fact in facts] for facts in state["told"]]
        return True

    def export(self) -> None:
        """Write the checkpoint in float16, with the first of the pools as its memory and the words that are `added`."""
        words = vocabulary.added()
        more = self._embeddings(words, torch.Generator().manual_seed(self.settings.seed + 1)).to(self.device)
        weights = self.weights | {EMBEDDING: torch.cat([self.weights[EMBEDDING].detach(), more])}
        raw = self.raw | {"vocab_size": len(weights[EMBEDDING])}
        vocabulary.write_tokenizer(self.folder, vocabulary.pieces() + words)
        memory = None if self.pool is None else self.pool[:, 0]
        write_checkpoint(self.folder, raw, weights, memory, torch.float16)


def write_checkpoint(
    folder: Path, raw: dict, weights: dict[str, Tensor], memory: Tensor | None, dtype: torch.dtype = torch.float32
) -> None:
    """Write config.json and model.safetensors in the published layout; memory [L, M, E] or None, empty."""
    config = ModelConfig.from_dict(raw)
    tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    nothing = torch.zeros(config.num_layers, config.memory_rows, config.hidden_size)
    tensors["memory"] = (nothing if memory is None else memory).to("cpu", dtype).contiguous()
    tensors["initialized"] = torch.tensor(int(memory is not None), dtype=torch.uint8)
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def score(logits: Tensor, target: Tensor, answer: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy, and the share of answers whose tokens are all the likeliest: those that greedy decoding gives.

    Args: logits [n, V] float32; target [n] int64; answer [n], the number of the answer that a target is of, or -1.
    """
    wrong = (logits.argmax(-1) != target)[answer >= 0]
    counts = torch.zeros(int(answer.max()) + 1, device=logits.device)
    counts.index_add_(0, answer[answer >= 0], wrong.float())
    return F.cross_entropy(logits, target), (counts == 0).float().mean().item()


def train(trainer: Trainer, say: Callable[[str], None], save_every: int = 200) -> None:
    """Run to the end, saving the state on the way and the checkpoint at the end; every SAY_EVERY steps, say the means
    since then or since the run went on, and the held-out recall."""
    began, first, done = time.perf_counter(), trainer.step, []
    while trainer.step < trainer.settings.steps:
        done.append(trainer.train_step())
        if trainer.step % SAY_EVERY == 0:
            rate = (time.perf_counter() - began) / (trainer.step - first)
            held_out = " ".join(f"{t}:{share:.2f}" for t, share in trainer.evaluate().items())
            means = " ".join(f"{name} {sum(step[name] for step in done) / len(done):.3f}" for name in done[0])
            say(f"step {trainer.step}/{trainer.settings.steps}  {means}  held-out {held_out}  {rate:.2f} s/step")
            done = []
        if trainer.step % save_every == 0:
            trainer.save()
    trainer.save()
    trainer.export()
