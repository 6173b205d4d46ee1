"""Evaluation: known answers give the known scores, files are read or refused by name, long runs go on."""

import json
import random
import sys
from itertools import count

import pytest
import torch

from memkernel import Engine, ModelConfig, cli
from memkernel.engine import MIN_TOKENS
from memkernel.evaluation import cases, edits, integrity, retention
from memkernel.evaluation.cases import Case, Question
from memkernel.training import facts, train, vocabulary, words
from memkernel.training.differentiable import initial_weights


class FakeMemory:
    """Remembers the last `span` texts."""

    def __init__(self, texts=()):
        self.texts, self.seed = list(texts), 0

    def fork(self):
        return FakeMemory(self.texts)

    def reset(self):
        self.texts = []

    def reseed(self, seed):
        self.seed = seed


class FakeEngine:
    """Answers what the newest text that it remembers says; `said` maps (text, prompt) to answers."""

    class config:
        write_rows, memory_rows = 1, 4

    def __init__(self, said, span):
        self.said, self.span, self.memory = said, span, FakeMemory()

    def update(self, text, chunk_tokens):
        self.memory.texts = [*self.memory.texts, text][-self.span :]

    def generate(self, prompts, max_tokens):
        class Completion:
            def __init__(self, text):
                self.text = text

        found = [[self.said[t, p] for t in self.memory.texts if (t, p) in self.said] for p in prompts]
        return [Completion(f" {answers[-1]}" if answers else " no") for answers in found]


# -- retention --------------------------------------------------------------------------------------------------------


def asked(kind, texts, *questions):
    return Case(texts, tuple(Question(*question) for question in questions), kind)


def test_retention_of_a_known_memory():
    told = [
        asked("facts", ("A",), ("a?", ("1",)), ("b?", ("2",))),
        asked("facts", ("B",), ("c?", ("3",)), ("d?", ("wrong",))),
        asked("corrected", ("C", "D"), ("e?", ("new",), "old")),
        asked("corrected", ("E", "F"), ("f?", ("new",), "old")),
    ]
    said = {("A", "a?"): "1", ("A", "b?"): "2", ("B", "c?"): "3", ("B", "d?"): "4"}
    said |= {("C", "e?"): "old", ("D", "e?"): "new", ("E", "f?"): "old"}
    engine = FakeEngine(said, span=3)
    before = engine.memory
    facts = retention.retention(engine, told, (f"side {i}" for i in count()), later=(1, 2, 4))
    assert engine.memory is before and before.texts == []
    curve = {point["t"]: point for point in facts["curve"]}
    assert list(curve) == [0, 1, 2, 4]
    assert [curve[t]["recall"] for t in curve] == pytest.approx([4 / 6, 4 / 6, 4 / 6, 0])
    assert curve[0]["kinds"] == {"facts": 3 / 4, "corrected": 1 / 2} and curve[4]["kinds"]["facts"] == 0
    assert [curve[t]["theory"] for t in curve] == pytest.approx([4 / 6 * 0.75**t for t in curve])
    assert facts["newer_wins"] == 1 / 2 and facts["questions"] == 6
    assert facts["empty_memory"] == 0 and facts["foreign_memory"] == 0


def test_another_memory_is_that_of_the_case_before():
    told = [asked("facts", (text,), (f"{text}?", ("right",))) for text in "ABC"]
    facts = retention.retention(FakeEngine({("A", "B?"): "right"}, 1), told, iter(()), later=(0,))
    assert facts["foreign_memory"] == 1 / 3 and facts["empty_memory"] == facts["curve"][0]["recall"] == 0


def test_a_model_that_knows_by_heart_shows_in_the_controls():
    class Knows(FakeEngine):
        def generate(self, prompts, max_tokens):
            self.memory, memory = FakeMemory(["A"]), self.memory
            found = super().generate(prompts, max_tokens)
            self.memory = memory
            return found

    told = [asked("facts", ("A",), ("a?", ("1",))), asked("facts", ("B",), ("a?", ("1",)))]
    facts = retention.retention(Knows({("A", "a?"): "1"}, 3), told, iter("xyz"), later=(0,))
    assert facts["empty_memory"] == facts["foreign_memory"] == 1
    with pytest.raises(ValueError, match="cases: expected at least one"):
        retention.retention(Knows({}, 1), [], iter(()))


def test_published_answers_are_looked_for_inside():
    question = Question("?", ("Oslo",))
    assert retention.contains(" the city of Oslo, Norway", question) and not retention.exact(" in Oslo", question)
    assert retention.exact(" Oslo ", question) and not retention.contains(" Bergen", question)


# -- generated cases --------------------------------------------------------------------------------------------------


def test_generated_cases_fit_and_can_be_answered_from_their_texts():
    made = cases.generated(20, 40, lambda text: len(text.split()), seed=3)
    assert [case.kind for case in made] == [
        kind for kind in ("facts", "same subject", "same relation", "corrected") for _ in range(20)
    ]
    for case in made:
        assert all(len(text.split()) <= 40 for text in case.texts)
        for question in case.questions:
            assert question.answers[0] in case.texts[-1] and words.is_held_out(question.answers[0])
            assert question.older is None or question.older in case.texts[0] and question.older != question.answers[0]
    assert all(len(case.questions) == 2 and len(case.texts[0].split()) > 30 for case in made[20:40])
    assert made == cases.generated(20, 40, lambda text: len(text.split()), seed=3)
    with pytest.raises(ValueError, match="longest: expected room for a fact"):
        cases.generated(1, 3, len)


def test_unrelated_texts_depend_on_their_number_alone():
    def length(text):
        return len(text.split())

    one, other = cases.unrelated(30, length), cases.unrelated(30, length, begin=2)
    texts = [next(one) for _ in range(4)]
    assert texts[2:] == [next(other) for _ in range(2)] and len(set(texts)) == 4
    told = [facts.read(sentence) for text in texts for sentence in cases.sentences(text)]
    assert len(told) > 10 and not any(words.is_held_out(fact.subject) for fact in told)
    known = frozenset(fact.subject for fact in told[:3])
    others = cases.unrelated(30, length, known=known)
    assert not any(facts.read(s).subject in known for _ in range(4) for s in cases.sentences(next(others)))


@pytest.mark.parametrize(
    "text", ["Anna left.  Ben\nstayed.", "It cost 3.5 euros. Ben stayed", "Anna left! Ben stayed?!"]
)
def test_all_of_a_text_is_told(text):
    first, second = cases.sentences(text)
    assert f"{first} {second}" == " ".join(text.split())


# -- files ------------------------------------------------------------------------------------------------------------

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Anna lives in Oslo.",
                    "qas": [
                        {"question": "Where does Anna live?", "is_impossible": False, "answers": [{"text": "Oslo"}]},
                        {"question": "Who is Ben?", "is_impossible": True, "answers": []},
                    ],
                }
            ]
        }
    ]
}
WORDS = ["<p>", "Anna", "lives", "in", "Oslo", ".", "</p>"]
NQ = {
    "question_text": "where does anna live",
    "document_tokens": [{"token": word, "html_token": word.startswith("<")} for word in WORDS],
    "annotations": [
        {"long_answer": {"start_token": 0, "end_token": 7}, "short_answers": [{"start_token": 4, "end_token": 5}]}
    ],
}
ZSRE = {"src": "Where does Anna live?", "rephrase": "What is Anna's home?", "alt": "Rome"}
ZSRE |= {"loc": "nq question: who is ben?", "loc_ans": "a baker"}
COUNTERFACT = {
    "requested_rewrite": {
        "prompt": "{} lives in",
        "subject": "Anna",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Oslo"},
    },
    "paraphrase_prompts": ["The home of Anna is", "Anna's town is"],
    "neighborhood_prompts": ["Ben lives in"],
}


def written(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_retention_files_are_read(tmp_path):
    told = cases.squad(written(tmp_path / "dev.json", SQUAD))
    assert told == [
        asked("squad", ("Context: Anna lives in Oslo.",), ("Questions: Where does Anna live? Answer:", ("Oslo",)))
    ]
    told = cases.natural_questions(written(tmp_path / "dev.jsonl", json.dumps(NQ) + "\n" + json.dumps(NQ)), limit=1)
    question = ("Questions: where does anna live? Answer:", ("Oslo",))
    assert told == [asked("natural questions", ("Context: Anna lives in Oslo .",), question)]


def test_edit_files_are_read(tmp_path):
    (edit,) = edits.zsre(written(tmp_path / "zsre.json", [ZSRE]))
    assert edit.text == "Question: Where does Anna live? Answer: Rome"
    assert edit.efficacy == (edits.Check("Question: Where does Anna live? Answer:", " Rome"),)
    assert edit.specificity == (edits.Check("Question: who is ben? Answer:", " a baker"),)
    (edit,) = edits.counterfact(written(tmp_path / "counterfact.json", [COUNTERFACT]))
    assert edit.text == "Anna lives in Rome." and len(edit.generalisation) == 2
    assert edit.specificity == (edits.Check("Ben lives in", " Oslo", " Rome"),)


PAGE = """Mila lives in Dresden. The kites are
made of silk. Now Mila lives in Tampere. Nadia owns a hen."""


def test_a_page_is_read(tmp_path):
    (tmp_path / "page.txt").write_text(PAGE)

    def count(text):
        return 2 * len(text.split())

    first, second = cases.page(tmp_path / "page.txt", 32, count)
    assert [fact.subject for fact in cases.stated(PAGE)] == ["Mila", "kites", "Nadia"]
    assert first.texts == ("Mila lives in Dresden. The kites are made of silk. Now Mila lives in Tampere.",)
    assert second.texts[0].endswith(". Nadia owns a hen.") and count(second.texts[0]) >= MIN_TOKENS
    assert [question.answers for case in (first, second) for question in case.questions] == [
        ("Tampere",),
        ("silk",),
        ("hen",),
    ]
    assert all(question.prompt.endswith(" Answer:") for question in first.questions)


def test_a_page_that_states_nothing_is_refused(tmp_path):
    (tmp_path / "page.txt").write_text("It rained.")
    with pytest.raises(ValueError, match="page.txt: expected a fact"):
        cases.page(tmp_path / "page.txt", 32, len)


@pytest.mark.parametrize("read", [cases.squad, cases.natural_questions, edits.zsre, edits.counterfact])
@pytest.mark.parametrize("content", ["{", "[]", "[1]", '{"data": [{"title": "x"}]}', '[{"src": "x"}]'])
def test_bad_files_are_refused_by_name(tmp_path, read, content):
    path = written(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match="bad.json: "):
        read(path)
    with pytest.raises(ValueError, match="missing.json: "):
        read(tmp_path / "missing.json")


# -- edits ------------------------------------------------------------------------------------------------------------


class ParrotEngine(FakeEngine):
    """Letters are tokens; after a prompt that it was told how to go on it does so, else it says "z" without end."""

    def tokenizer(self, text, add_special_tokens):
        class Encoding:
            input_ids = [ord(letter) for letter in text]

        return Encoding

    def logits(self, ids):
        text = "".join(map(chr, ids))
        logits = torch.zeros(1, len(ids), 128)
        logits[:, :, ord("z")] = 1
        for (told, prompt), answer in self.said.items():
            if told in [None, *self.memory.texts] and text.startswith(prompt):
                for i, letter in enumerate(answer):
                    logits[0, len(prompt) - 1 + i, ord(letter)] = 5
        return logits


def test_edits_of_a_known_memory(tmp_path):
    engine = ParrotEngine({("t", "e"): "ab", ("t", "g"): "a", (None, "s"): "cd"}, span=1)
    edit = edits.Edit("t", (edits.Check("e", "ab"),), (edits.Check("g", "ab"),), (edits.Check("s", "cd", "ab"),))
    facts = edits.edits(engine, [edit])
    assert facts["before"] == {"efficacy": 0, "generalisation": 0, "specificity": 1, "score": 0}
    assert facts["after"]["efficacy"] == 1 and facts["after"]["generalisation"] == 0.5
    assert facts["after"]["score"] == pytest.approx(3 / (1 + 2 + 1)) and engine.memory.texts == []
    rivals = edits.Edit("t", (edits.Check("e", "ab", "xx"),), (edits.Check("e", "xx", "ab"),), ())
    after = edits.edits(engine, [rivals])["after"]
    assert after == {"efficacy": 1, "generalisation": 0, "score": 0}


# -- integrity, and the commands on a real model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny untrained model with the vocabulary of generated facts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    raw = train.GEOMETRY | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    raw |= {"vocab_size": len(vocabulary.pieces())}
    vocabulary.write_tokenizer(folder, vocabulary.pieces())
    weights = initial_weights(ModelConfig.from_dict(raw), torch.Generator().manual_seed(0))
    train.write_checkpoint(folder, raw, weights, None)
    return folder


def run_integrity(checkpoint, folder, updates, stop_at=None, settings="any"):
    engine = Engine.from_pretrained(checkpoint, device="cpu", dtype="float32")
    length = cases.counter(engine)

    def text_at(begin):
        for i, text in zip(count(begin), cases.unrelated(32, length, begin=begin), strict=False):
            if i == stop_at:
                raise KeyboardInterrupt
            yield text

    probed = [cases.several_facts(32, length, random.Random(0))]
    return integrity.integrity(engine, updates, text_at, probed, ["Anna lives in Oslo."], folder, settings)


def test_integrity_goes_on_where_it_ended(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "SAVE_EVERY", 5)
    whole = run_integrity(checkpoint, tmp_path / "whole", 24)
    assert [probe["updates"] for probe in whole["probes"]] == [1, 10, 24]
    assert all(probe["finite"] and len(probe["key_rms"]) == 2 for probe in whole["probes"])
    last, engine = whole["probes"][-1], Engine.from_pretrained(checkpoint, device="cpu", dtype="float32")
    engine.memory.load(tmp_path / "whole" / "integrity.memory")
    ids = engine.tokenizer("Anna lives in Oslo.", add_special_tokens=False).input_ids
    log_p = engine.logits(ids).squeeze().log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])
    assert last["perplexity"] == pytest.approx((-log_p.mean()).exp().item(), rel=1e-4) and last["recall"] == 0
    with pytest.raises(KeyboardInterrupt):
        run_integrity(checkpoint, tmp_path / "parts", 24, stop_at=13)
    assert json.loads((tmp_path / "parts" / "integrity.json").read_text())["updates"] == 10
    assert run_integrity(checkpoint, tmp_path / "parts", 24) == whole
    assert json.loads((tmp_path / "parts" / "integrity.json").read_text()) == whole
    with pytest.raises(ValueError, match="updates: expected at least the 24 that were done, got 23"):
        run_integrity(checkpoint, tmp_path / "parts", 23)
    with pytest.raises(ValueError, match="integrity.json: settings: expected other, got any"):
        run_integrity(checkpoint, tmp_path / "parts", 48, settings="other")


def test_the_commands_write_json_and_plots(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    common = ["--dtype", "float32", "--device", "cpu", "--cases", "2", "--json", "--out", str(tmp_path)]
    assert cli.main(["eval", "retention", str(checkpoint), "--later", "1", "3", "--plot", *common]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [point["t"] for point in facts["curve"]] == [0, 1, 3] and facts["cases"] == 8
    assert json.loads((tmp_path / "retention.json").read_text()) == facts
    settings = {"format": "generated", "file": None, "unrelated": None, "cases": 2, "seed": 0}
    assert facts["settings"] == settings | {"device": "cpu", "dtype": "float32"}
    assert cli.main(["eval", "integrity", str(checkpoint), "--updates", "3", "--plot", *common]) == 0
    assert json.loads(capsys.readouterr().out)["probes"][-1]["updates"] == 3
    for kind in ("retention", "integrity"):
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_read_files(checkpoint, tmp_path, capsys):
    common = ["--dtype", "float32", "--device", "cpu", "--json"]
    file = str(written(tmp_path / "dev.json", SQUAD))
    squad = ["eval", "retention", str(checkpoint), "--format", "squad", "--file", file, "--unrelated", file]
    assert cli.main([*squad, "--later", "1", *common]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 1
    for name, entry in (("zsre", ZSRE), ("counterfact", COUNTERFACT)):
        file = str(written(tmp_path / f"{name}.json", [entry]))
        assert cli.main(["eval", "edits", str(checkpoint), name, file, *common]) == 0
        assert set(json.loads(capsys.readouterr().out)["after"]) == {*edits.PARTS, "score"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["retention", "{folder}", "--format", "squad"], "--file: expected"),
        (["retention", "{folder}", "--file", "x.json"], "--file: expected"),
        (["retention", "{folder}", "--format", "nq", "--file", "x"], "--unrelated: expected"),
        (["retention", "{folder}", "--format", "page", "--file", "nowhere.txt"], "nowhere.txt: expected a file"),
        (["retention", "{folder}", "--later", "-1"], "--later: expected"),
        (["retention", "{folder}", "--cases", "0"], "--cases: expected"),
        (["edits", "{folder}", "zsre", "nowhere.json", "--cases", "0"], "--cases: expected"),
        (["retention", "{folder}", "--plot"], "--plot: expected --out"),
        (["edits", "{folder}", "zsre", "nowhere.json"], "nowhere.json: expected a file of JSON"),
        (["integrity", "{folder}", "--updates", "0", "--out", "{out}"], "updates: expected at least 1"),
    ],
)
def test_wrong_arguments_are_refused(checkpoint, tmp_path, capsys, arguments, message):
    words = [word.format(folder=checkpoint, out=tmp_path) for word in arguments]
    assert cli.main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused(monkeypatch, tmp_path):
    from memkernel.evaluation import plots

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot: it needs matplotlib"):
        plots.retention({}, tmp_path / "x.png")
