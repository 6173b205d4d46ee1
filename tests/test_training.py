"""Training: the forward is the engine's, gradient goes where it should, an interrupted run goes on as if it had not."""

import dataclasses
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext

import pytest
import safetensors
import torch
from compare import relative_error
from tokenizers import Tokenizer

from memkernel import Engine, ModelConfig
from memkernel.training import differentiable, facts, structure, train, vocabulary, words
from memkernel.training.differentiable import DifferentiableLlama, filled, initial_weights, updated
from memkernel.training.episodes import Plan, Story, make_episode, plan_step
from memkernel.training.train import Settings, Trainer, write_checkpoint

SMALL = train.GEOMETRY | {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_blocks": 4}
QUICK = Settings(steps=6, pools=3, sequences=2, items=2)
AGREE = 2e-5  # relative Frobenius error, as against the published numbers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary.write_tokenizer(folder, vocabulary.pieces())
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# -- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied,bos,first", [(True, True, 40), (False, False, 21), (True, True, 7)])
def test_the_forward_is_the_engines(tmp_path, tied, bos, first):
    raw = SMALL | {"vocab_size": 50, "tie_word_embeddings": tied, "add_bos_embedding": bos}
    config = ModelConfig.from_dict(raw)
    weights = initial_weights(config, torch.Generator().manual_seed(1))
    for name in ("bos_embedding", "new_memory_positional_emb"):  # as large as they may become
        if name in weights:
            weights[name] *= 10
    write_checkpoint(tmp_path, raw, weights, None)
    engine = Engine.from_pretrained(tmp_path, device="cpu", dtype="float32", keep_hidden=True)
    model, pool = DifferentiableLlama(config, weights), None
    L, M, W = config.num_layers, config.memory_rows, config.write_rows
    prompts = torch.randint(50, (3, 9))
    assert relative_error(model.read(prompts, None), engine.logits(prompts)) < AGREE
    for length in (first, 2 * W, W + 3, 5):  # short ones emit old rows again
        ids = torch.randint(50, (length,))
        if pool is None:
            with pytest.warns(UserWarning, match="7 tokens") if length < W else nullcontext():
                engine.update(ids, chunk_tokens=None)
            pool = filled(model.inject(ids[None], None), M)
        else:
            dropped = torch.stack([torch.randperm(M)[:W] for _ in range(L)])
            kept = torch.stack([torch.tensor(sorted(set(range(M)) - set(row))) for row in dropped.tolist()])
            with pytest.warns(UserWarning, match="5 tokens") if length < W else nullcontext():
                engine.update(ids, dropped=dropped, chunk_tokens=None)
            pool = updated(pool, model.inject(ids[None], pool[:, :, -W:]), kept[:, None])
        assert relative_error(pool[:, 0], engine.memory.hidden()) < AGREE
        assert relative_error(model.read(prompts, pool), engine.logits(prompts)) < AGREE


def test_pools_do_not_see_each_other():
    config = ModelConfig.from_dict(SMALL | {"vocab_size": 50})
    model = DifferentiableLlama(config, initial_weights(config, torch.Generator().manual_seed(1)))
    ids, prompts = torch.randint(50, (2, 20)), torch.randint(50, (4, 6))
    pool = torch.randn(config.num_layers, 2, config.memory_rows, config.hidden_size)
    both = model.inject(ids, pool[:, :, -config.write_rows :])
    alone = model.inject(ids[1:], pool[:, 1:, -config.write_rows :])
    assert relative_error(both[:, 1:], alone) < AGREE
    assert relative_error(model.read(prompts, pool)[2:], model.read(prompts[2:], pool[:, 1:])) < AGREE


def test_a_model_with_adapters_is_refused():
    config = ModelConfig.from_dict(SMALL | {"vocab_size": 50})
    with_lora = dataclasses.replace(config, lora=object())
    with pytest.raises(ValueError, match="config: expected a model without adapters"):
        DifferentiableLlama(with_lora, {})


# -- gradient ---------------------------------------------------------------------------------------------------------


def test_mixed_precision_rounds_the_products_alone(tmp_path):
    config = ModelConfig.from_dict(SMALL | {"vocab_size": 50})
    weights = initial_weights(config, torch.Generator().manual_seed(1))
    ids, results = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(0)), []
    for dtype in (torch.float32, torch.bfloat16):
        model = DifferentiableLlama(config, weights, dtype)
        delta = model.inject(ids, None)
        results.append(model.read(ids, filled(delta, config.memory_rows)))
        assert delta.dtype == results[-1].dtype == torch.float32
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "updates,graded,alone,first",
    [(1, 0, True, False), (1, 0, False, False), (3, 2, False, False), (3, 0, False, False), (2, 1, False, True)],
)
def test_gradient_reaches_the_graded_update_and_no_older_memory(tmp_path, updates, graded, alone, first):
    trainer = Trainer(tmp_path, QUICK, SMALL)
    shape = trainer.config.num_layers, QUICK.pools, trainer.config.memory_rows, trainer.config.hidden_size
    old = torch.randn(shape).requires_grad_()
    for which, reaches in ((graded, True), (-1, False)):  # -1: no update carries gradient
        plan = Plan(updates, which, alone and reaches, first, 24, 4)
        episode = make_episode(plan, [[]] * QUICK.pools, 2, 2, trainer.tokenizer, random.Random(0), False)
        for weight in trainer.weights.values():
            weight.grad = None
        loss, _, pool = trainer.run(plan, episode, old, torch.Generator().manual_seed(0))
        loss.backward()
        assert old.grad is None and not pool.requires_grad
        written = trainer.weights["new_memory_positional_emb"].grad  # only updates have it
        assert (written is not None and bool(written.abs().sum() > 0)) == reaches
        assert trainer.weights["model.norm.weight"].grad.abs().sum() > 0


# -- the run ----------------------------------------------------------------------------------------------------------


def weights_of(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.weights.items()}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = Trainer(tmp_path / "whole", QUICK, SMALL)
    train.train(whole, lambda line: None)
    before = Trainer(tmp_path / "parts", QUICK, SMALL)
    assert not before.resume()
    for _ in range(4):
        before.train_step()
    before.save()
    before.train_step()  # lost

    def half(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        before.save()
    after = Trainer(tmp_path / "parts", QUICK, SMALL)
    assert after.resume() and after.step == 4
    lines = []
    train.train(after, lines.append)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, after.weights[name]), name
    assert torch.equal(whole.pool, after.pool)
    engine = Engine.from_pretrained(tmp_path / "parts", device="cpu", dtype="float32")
    assert engine.memory.initialized and engine.generate("Where does Anna live? Answer:", max_tokens=3).token_ids


def test_a_killed_process_leaves_a_run_that_goes_on(tmp_path):
    options = {"steps": 500, "pools": 2, "sequences": 1, "items": 1}
    command = [sys.executable, "-m", "memkernel.training", str(tmp_path), "--threads", "1", "--save-every", "2"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "training.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    torch.set_num_threads(1)
    killed = Trainer(tmp_path, Settings(**options))
    assert killed.resume() and killed.step % 2 == 0
    again = Trainer(tmp_path / "again", Settings(**options))
    while again.step < killed.step:
        again.train_step()
    killed.train_step(), again.train_step()
    assert all(torch.equal(weight, again.weights[name]) for name, weight in killed.weights.items())


def test_another_runs_state_is_refused(tmp_path):
    Trainer(tmp_path, QUICK, SMALL).save()
    with pytest.raises(ValueError, match="training.pt: settings: expected"):
        Trainer(tmp_path, dataclasses.replace(QUICK, rate=1.0), SMALL).resume()
    with pytest.raises(ValueError, match="training.pt: config: expected"):
        Trainer(tmp_path, QUICK, SMALL | {"num_blocks": 8}).resume()


@pytest.mark.parametrize("where", ["own", "carried"])
def test_before_training_the_end_of_a_question_finds_the_value(tmp_path, monkeypatch, where):
    """Heads that look for words that noted the subject, or carry one that did, give most weight to that row, of a chunk
    of twice the kept rows, whose first half only its second half's rows speak for."""
    trainer, rng, seen, right = Trainer(tmp_path, QUICK), random.Random(0), [], []
    model = DifferentiableLlama(trainer.config, trainer.weights)
    attention = differentiable.reference.memory_attention

    def spy(query, memory_key, memory_value, key, *rest):
        seen.append((query, torch.cat([memory_key.expand(len(key), -1, -1, -1), key], dim=1)))
        return attention(query, memory_key, memory_value, key, *rest)

    def encode(text):
        return trainer.tokenizer.encode(text).ids

    monkeypatch.setattr(differentiable.reference, "memory_attention", spy)
    group = {"own": 0, "carried": 1}[where]  # of `structure.MATCHES`
    before = torch.tensor([encode("After the rain the long garden was quiet again. They waited for it")])
    for i in range(20):
        names = [rng.choice(words.listed("person")) for _ in range(5)]
        towns = [rng.choice(words.listed("place")) for _ in range(5)]
        told = " ".join(f"{name} lives in {town}." for name, town in zip(names, towns, strict=True))
        ids = ([trainer.tokenizer.token_to_id("quiet")] * 32 + encode(told))[-32:]
        asked = i % 2 + (3 if where == "own" else 0)
        with torch.no_grad():
            rows = model.inject(torch.tensor([ids]), model.inject(before[:, :16], None))
            seen.clear()
            model.read(torch.tensor([encode(f"Where does {names[asked]} live? Answer:")]), rows)
        row = (ids.index(encode(towns[asked])[0]) - 16) % 16
        query, key = seen[2]
        scores = query[0, -1, 2 * group : 2 * group + 2] @ key[0, :, group].T / trainer.config.head_size**0.5
        right.append(scores.softmax(-1)[:, row].mean().item())
    assert sum(right) / len(right) > 0.6


def test_heads_score_distances_as_wanted():
    """The last word before: nearer ones above farther ones and the word itself, all above those of other sentences."""
    frequencies = ModelConfig.from_dict(train.GEOMETRY | {"vocab_size": 9}).rope.frequencies(64)
    wanted = dict.fromkeys(range(320), structure.FAR) | structure.NEAR
    cos, sin = structure.by_distance(frequencies[frequencies > structure.TURNING], wanted, 0.01)
    angle = torch.arange(320)[:, None] * frequencies[frequencies > structure.TURNING]
    score = angle.cos() @ cos + angle.sin() @ sin
    assert (score[2:6].diff() < -0.3).all() and score[0] < score[5] - 0.5 and score[8:].max() < score[5] - 0.5


def test_what_is_given_is_never_trained(tmp_path):
    """Embeddings of words, and the heads that note and carry; all else moves."""
    trainer = Trainer(tmp_path, QUICK, SMALL)
    before = weights_of(trainer)
    for _ in range(QUICK.steps):
        trainer.train_step()
    for name, weight in trainer.weights.items():
        moved = weight != before[name]
        fixed = trainer.fixed.get(name, torch.zeros_like(moved))
        assert not moved[fixed].any() and (fixed.all() or moved[~fixed].any()), name
    assert trainer.fixed[train.EMBEDDING][:, 0].sum() == len(vocabulary.pieces()) - len(vocabulary.grammar())


def test_a_checkpoint_gets_the_words_that_are_added(tmp_path):
    trainer = Trainer(tmp_path, QUICK, SMALL)
    trainer.export()
    known, more = vocabulary.pieces(), vocabulary.added()
    assert more and not set(known) & set(more) and len(set(more)) == len(more)
    engine = Engine.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert engine.tokenizer.convert_ids_to_tokens(range(len(known) + len(more))) == known + more
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        embeddings = file.get_tensor(train.EMBEDDING).float()
    assert torch.equal(embeddings[: len(known)], trainer.weights[train.EMBEDDING].detach().half().float())
    nouns = [i for i, word in enumerate(known + more) if word in ("teapots", "lemons")]  # added, and held out
    assert len(nouns) == 2 and torch.equal(*(embeddings[i, : vocabulary.SPECIAL_ELEMENTS] for i in nouns))
    assert embeddings[len(known) :].norm(dim=1).sub(train.EMBEDDING_LENGTH).abs().max() < 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 2},
        {"hidden_size": 66},
        {"hidden_size": 32},
        {"add_bos_embedding": False},
    ],
)
def test_a_model_without_room_for_the_structure_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match="config: expected two layers, three groups of heads, a width of four"):
        Trainer(tmp_path, QUICK, SMALL | change)


def test_training_learns_to_remember(tmp_path):
    """A few steps: facts of training, and held-out ones, are answered from memory."""
    trainer = Trainer(tmp_path, dataclasses.replace(QUICK, steps=60, pools=8, rate=3e-3))
    steps = [trainer.train_step() for _ in range(60)]
    assert steps[0]["recall"] < 0.1 and sum(step["recall"] for step in steps[-10:]) / 10 > 0.3
    assert trainer.evaluate(later=(0,))[0] > 0.3


@pytest.mark.parametrize(
    "settings,change,message",
    [
        ({"dtype": "float16"}, {}, "dtype: expected one of float32"),
        ({}, {"rope_theta": 10.0}, "expected three rotary pairs"),
    ],
)
def test_settings_that_cannot_train_are_refused(tmp_path, settings, change, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tmp_path, dataclasses.replace(QUICK, **settings), SMALL | change)


def test_what_is_held_out_is_asked_of_the_first_update(tmp_path, monkeypatch):
    trainer, texts, asked = Trainer(tmp_path, QUICK, SMALL), [], []
    run = trainer.run

    def spy(plan, episode, pool, generator):
        assert plan.updates == len(episode.chunks) == 4 and not plan.alone
        for p, ids in enumerate(episode.read.tolist()):
            texts.append(trainer.tokenizer.decode(episode.chunks[0, p // 2].tolist()))
            answer = [ids[i] for i, number in enumerate(episode.answer[p].tolist()) if number >= 0]
            asked.append(trainer.tokenizer.decode(answer[:-1]))  # without the end
        return run(plan, episode, pool, generator)

    monkeypatch.setattr(trainer, "run", spy)
    trainer.evaluate(later=(3,))
    assert len(asked) == 2 * QUICK.pools and all(answer in text for answer, text in zip(asked, texts, strict=True))


def test_a_refused_run_leaves_a_finished_one_whole(tmp_path):
    trainer = Trainer(tmp_path, QUICK, SMALL)
    trainer.save()
    trainer.export()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="settings"):
        Trainer(tmp_path, dataclasses.replace(QUICK, rate=1.0), SMALL).resume()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_log_has_means_since_the_run_went_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAY_EVERY", 4)
    settings, lines = dataclasses.replace(QUICK, steps=4), []
    trainer = Trainer(tmp_path, settings, SMALL)
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    monkeypatch.setattr(
        trainer, "train_step", lambda step=trainer.train_step: losses.append((done := step())["loss"]) or done
    )
    train.train(trainer, lines.append)
    assert [float(re.search("loss ([0-9.]+)", line)[1]) for line in lines] == [
        pytest.approx(sum(losses[2:]) / 2, abs=1e-3)
    ]


# -- the data ---------------------------------------------------------------------------------------------------------


def grammar_words():
    return {piece.lower() for piece in vocabulary.grammar() if piece.isalpha()}


def test_training_text_holds_no_held_out_word(tokenizer):
    """Not as a token either, within an invented word."""
    seen, common, tokens = set(), grammar_words(), set()
    for seed in range(60):
        plan = plan_step(seed / 60, 32, 512, rng := random.Random(seed))
        episode = make_episode(plan, [[]] * 4, 2, 3, tokenizer, rng, held_out=False)
        for ids in [*episode.chunks.flatten(0, 1).tolist(), *episode.read.tolist()]:
            seen |= set(re.findall(r"[A-Za-z]+", tokenizer.decode(ids)))
            tokens |= set(map(tokenizer.id_to_token, ids))
    seen = {word for word in seen if word.lower() not in common}
    assert len(seen) > 1000 and len(tokens & words.real()) > 1000
    assert [word for word in seen if words.is_held_out(word)] == []
    assert [word for word in tokens & words.real() if words.is_held_out(word) and word not in common] == []


def test_evaluations_use_held_out_words_alone():
    drawn = facts.draw_facts(random.Random(0), 500, held_out=True)
    assert all(words.is_held_out(word) for fact in drawn for word in (fact.subject, fact.value))
    relations = Counter(fact.relation for fact in drawn)
    assert set(relations) == set(facts.RELATIONS)


def test_every_word_can_be_spelled(tokenizer):
    for word in ["Jennifer", "Zbigniew", "strawberries", "Chicago", "Xu", "Timbuktu", "Renee"]:
        assert tokenizer.decode(tokenizer.encode(f"{word} likes {word}.").ids) == f"{word} likes {word}."
    assert tokenizer.encode("Ren\u00e9e").ids == tokenizer.encode("Renee").ids
    statements = [s for r in facts.RELATIONS.values() for s in r.statements + r.questions]
    assert all("<unk>" not in tokenizer.encode(text).tokens for text in statements)


def test_a_statement_is_read_as_the_fact_it_states():
    rng = random.Random(0)
    for fact in facts.draw_facts(rng, 500, held_out=False):
        assert facts.read(fact.statement(rng)) == facts.read(fact.correction(rng)) == fact
    for sentence in (
        "It rained.",
        "Mila lives in Dresden",
        "the mayor of Rome is Ida.",
        "Mila lives in Dresden. Mila likes figs.",
    ):
        assert facts.read(sentence) is None


def test_a_story_says_what_is_asked(tokenizer):
    corrected = 0
    for seed in range(100):
        plan = Plan(3, 2, False, False, 40, 4)
        story = Story(plan, [], tokenizer, random.Random(seed), held_out=False)
        assert [len(chunk) for chunk in story.chunks] == [40] * 3
        texts = [tokenizer.decode(chunk) for chunk in story.chunks]
        for update, fact in story.truth.values():
            said = [s.format(s=fact.subject, v=fact.value) for s in facts.RELATIONS[fact.relation].statements]
            assert any(s[1:] in texts[update] for s in said)  # a correction puts a word before it
        corrected += any(facts.CORRECTIONS[0][:3] in text for text in texts)
        chosen = story.choose(4)
        assert len(chosen) == len(set(chosen)) == min(4, len(story.truth))
    assert corrected > 10


def test_facts_of_earlier_steps_are_asked_while_their_rows_are_read(tokenizer):
    rng, told = (
        random.Random(0),
        [(age, fact) for age, fact in enumerate(facts.draw_facts(random.Random(1), 20, False))],
    )
    for blocks, alone, first in (
        (1, False, False),
        (6, False, False),
        (16, False, False),
        (6, True, False),
        (6, False, True),
    ):
        plan = Plan(2, 1, alone, first, 40, blocks)
        chosen, after = set(), None
        for _ in range(200):
            story = Story(plan, told, tokenizer, rng, held_out=False)
            chosen |= set(story.choose(4))
            after = story.told()
        reach = 0 if alone or first else max(0, blocks - 2)  # two updates are of this episode
        assert chosen & {fact for _, fact in told} == {fact for age, fact in told if age < reach}
        ages = dict((fact, age) for age, fact in after)
        assert all((fact in ages) == (age < 14 and not first) for age, fact in told)
        assert all(ages[fact] == age + 2 for age, fact in told if fact in ages)
        assert all(ages[fact] == 1 - update for update, fact in story.truth.values())


def test_a_fact_of_an_earlier_step_gives_way_to_a_newer_one(tokenizer):
    plan = Plan(1, 0, False, False, 32, 4)
    _, newer = next(iter(Story(plan, [], tokenizer, random.Random(3), held_out=False).truth.values()))
    older = facts.corrected(newer, random.Random(0), held_out=False)
    story = Story(plan, [(0, older)], tokenizer, random.Random(3), held_out=False)
    assert [fact for _, fact in story.told() if fact.key == newer.key] == [newer]


def test_data_is_a_function_of_the_seed(tokenizer):
    plan = Plan(2, 1, False, False, 32, 4)
    one, other, third = (
        make_episode(plan, [[]] * 3, 2, 2, tokenizer, random.Random(seed), False) for seed in (5, 5, 6)
    )
    assert torch.equal(one.chunks, other.chunks) and torch.equal(one.read, other.read)
    assert not torch.equal(one.chunks, third.chunks)


def test_answers_are_marked(tokenizer):
    episode = make_episode(Plan(1, 0, True, False, 32, 4), [[]] * 4, 2, 3, tokenizer, random.Random(0), held_out=True)
    end, colon = tokenizer.token_to_id("</s>"), tokenizer.token_to_id(":")
    for number in range(int(episode.answer.max()) + 1):
        row, columns = (episode.answer == number).nonzero().T
        assert row.unique().numel() == 1 and (columns.diff() == 1).all()
        ids = episode.read[row[0]]
        assert ids[columns[-1]] == end and ids[columns[0] - 1] == colon
        assert words.is_held_out(tokenizer.decode(ids[columns[:-1]].tolist()))
    assert episode.scored[episode.answer >= 0].all()
    assert not episode.scored[:, 0].any() and not episode.scored[episode.read == tokenizer.token_to_id("<pad>")].any()


def test_the_curriculum_ends_in_the_published_recipe():
    rng = random.Random(0)
    begin = [plan_step(0.0, 16, 256, rng) for _ in range(200)]
    assert all(plan.alone and plan.updates == 1 for plan in begin)
    middle = [plan_step(0.15, 16, 256, rng) for _ in range(500)]  # half the way, of 16 blocks on a logarithmic scale
    assert {plan.blocks for plan in middle} == {4} and max(plan.updates for plan in middle) <= 4
    end = [plan_step(0.9, 16, 256, rng) for _ in range(4000)]
    one, several = [plan for plan in end if plan.updates == 1], [plan for plan in end if plan.updates > 1]
    assert sum(plan.alone for plan in end) == pytest.approx(1000, rel=0.1)  # half of new knowledge, itself half of all
    assert len(one) == pytest.approx(2000, rel=0.1) and not any(plan.alone for plan in several)
    assert sum(plan.graded == 0 for plan in several) == pytest.approx(1000, rel=0.1)
    assert all(plan.graded in (0, plan.updates - 1) and 16 <= plan.chunk <= 32 and plan.blocks == 16 for plan in end)
    assert max(plan.updates for plan in several) == 16


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_rows_that_are_not_visible_are_not_read(tmp_path, blocks):
    trainer = Trainer(tmp_path, QUICK, SMALL)
    shape = trainer.config.num_layers, QUICK.pools, trainer.config.memory_rows, trainer.config.hidden_size
    plan = Plan(1, 0, False, False, 24, blocks)
    episode = make_episode(plan, [[]] * QUICK.pools, 2, 2, trainer.tokenizer, random.Random(0), False)
    pool = torch.randn(shape)
    other = pool.clone()
    other[:, :, :16] = 1e4  # 16 rows drop and 16 are new: these are older than the 48 newest whatever drops
    losses = [trainer.run(plan, episode, p, torch.Generator().manual_seed(0))[0].item() for p in (pool, other)]
    assert (losses[0] == losses[1]) == (blocks < 4)
