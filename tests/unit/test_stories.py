"""The grammar behind the embedded model. Its entropy is the yardstick of the model's quality, so it is checked by means
that share nothing with it: by counting, and by reading stories back."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from folovllm.models import documents
from folovllm.models.stories import Draw, Fork, Replay, Story, Teller, derivations, stories, tell_story
from folovllm.models.story_parts import Let, Maybe, Part, say
from folovllm.models.story_words import BOYS, COINED, GIRLS, PRONOUNS, TABLES

TOLD = [tell_story(seed) for seed in range(400)]


def test_a_seed_always_tells_the_same_story() -> None:
    assert [tell_story(seed) for seed in range(400)] == TOLD
    assert [documents.document(seed) for seed in range(50)] == [documents.document(seed) for seed in range(50)]


def test_there_are_at_least_20000_distinct_stories() -> None:
    assert len({tell_story(f"distinct/{seed}").identity for seed in range(21_000)}) >= 20_000


def test_no_story_of_one_split_is_in_the_other() -> None:
    train = list(stories(held_out=False, seed="a", count=3000))
    test = list(stories(held_out=True, seed="b", count=200))
    assert not {story.identity for story in train} & {story.identity for story in test}
    assert not any(story.held_out for story in train) and all(story.held_out for story in test)


@pytest.mark.parametrize("kind", documents.KINDS[:4] + documents.KINDS[5:])
def test_no_training_document_holds_a_test_story(
    kind: Callable[[random.Random], list[documents.Piece]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Story] = []
    real = documents.training_story

    def watched(rng: random.Random) -> Story:
        used.append(real(rng))
        return used[-1]

    monkeypatch.setattr(documents, "training_story", watched)
    for seed in range(60):
        used.clear()
        text = "".join(piece for piece, _ in kind(random.Random(seed)))
        assert used and not any(story.held_out for story in used)
        assert any(story.text in text for story in used)  # what was watched is what was written


def test_lengths_reach_from_short_to_long() -> None:
    words = [len(re.findall(r"\w+|[^\w\s]", story.text)) for story in TOLD]  # about what a tokenizer counts
    assert min(words) < 90 and max(words) > 700


def test_answers_can_be_derived_from_the_story() -> None:
    for story in TOLD:
        assert len(story.questions) >= 3
        for question in story.questions:
            said = story.text[: question.end].lower()
            assert said.endswith((".", '"', "!", "?")), question
            for key in question.keys:
                assert key.lower() in said, (question, story.text)


def test_answers_agree_with_a_reading_by_pattern() -> None:
    """Four kinds of question, answered from the text by regular expressions instead of by the grammar's memory."""
    checked: Counter[str] = Counter()
    for story in TOLD:
        for question in story.questions:
            if question.kind == "colour":
                thing = question.wordings[1].removeprefix("What colour was the ").removesuffix("?")
                colours = set(re.findall(rf"({'|'.join(TABLES['colour'])}) {thing}\b", story.text))
                assert question.answer == f"The {thing} was {colours.pop()}." and not colours
            elif question.kind == "pet":
                match = re.search(r"(?:had|was) an? \w+ (\w+) called (\w+)\.", story.text)
                assert match and question.answer.endswith(f"'s {match[1]} was called {match[2]}.")
            elif question.kind == "count":
                day = re.search(r" (on \w+day|in the \w+)\?", question.wordings[0])
                part = story.text
                if day:
                    opening = {"in the morning": "One morning", "in the afternoon": "That afternoon"}
                    start = opening.get(day[1], "That evening") if day[1].startswith("in") else "O" + day[1][1:]
                    part = next(p for p in story.text.split("\n\n") if p.startswith(start))
                match = re.search(r"(?:After|took) (\w+) tries", part)
                assert match and f" {match[1]} tries." in question.answer
            elif question.kind == "hero":
                known = {*GIRLS, *BOYS, story.slots["name"]}
                name = next(word for word in re.findall(r"\w+", story.text) if word in known)
                assert question.answer == f"The hero of the story is {name}."
            else:
                continue
            checked[question.kind] += 1
    assert len(checked) == 4 and min(checked.values()) >= 50


def test_no_two_questions_of_a_story_are_worded_alike() -> None:
    for story in TOLD:
        wordings = [wording for question in story.questions for wording in question.wordings]
        assert len(set(wordings)) == len(wordings)


def test_pronouns_never_change() -> None:
    for story in TOLD:
        other = PRONOUNS["boy" if story.slots["girl"] == "girl" else "girl"]
        wrong = {other["he"], other["him"], other["his"], other["himself"]}
        assert not set(re.findall(r"[a-z]+", story.text.lower())) & wrong


def test_coined_names_are_all_different() -> None:
    slots = {COINED[0]: "low", COINED[1]: "high", COINED[2]: "old", COINED[3]: "new"}
    coined = [head + tail for slot in slots.values() for head in TABLES[slot] for tail in TABLES["tail"]]
    assert len(set(coined)) == len(coined) and not set(coined) & set(GIRLS + BOYS)


SMALL: tuple[Part, ...] = (
    say("{name} had {a colour} cup.", "There was {a colour} cup."),
    Maybe("name", 0.3, (say("It was {size}."),)),
    Let(({"end": "It broke.", "cause": ("glass", "clay", "tin")}, {"end": "It held."})),
    say("{end}"),
    Maybe("cause", 0.9, (say("It was not told why."),)),  # a tuple sets options, no slot: never said
)


def small(draw: Draw) -> Teller:
    teller = Teller(draw)
    teller.slots["name"] = "Mia"
    teller.options.update(colour=("red", "orange"), size=("big", "small", "tiny"))
    teller.run(SMALL)
    return teller


def test_entropy_agrees_with_counting_a_small_grammar() -> None:
    """All sentences of a small grammar, found by trying every choice: their probabilities add up to one, none comes up
    twice, they occur that often when drawn, and the mean of the nats is the entropy of what was counted."""
    exact: dict[str, float] = {}
    paths: list[tuple[int, ...]] = [()]
    while paths:
        path = paths.pop()
        try:
            teller = small(Replay(path))
        except Fork as fork:
            paths.extend((*path, way) for way in range(fork.ways))
        else:
            assert teller.text not in exact
            exact[teller.text] = math.exp(-teller.draw.nats)
    assert len(exact) == 2 * 2 * (1 + 3) * 2 and sum(exact.values()) == pytest.approx(1)
    assert exact["Mia had an orange cup. It held."] == pytest.approx(2 / 3 / 2 * 0.7 / 2)

    drawn = [small(Draw(seed)) for seed in range(40_000)]
    counts = Counter(teller.text for teller in drawn)
    for text, probability in exact.items():
        assert counts[text] / len(drawn) == pytest.approx(probability, abs=0.01)
    entropy = -sum(p * math.log(p) for p in exact.values())
    assert sum(teller.draw.nats for teller in drawn) / len(drawn) == pytest.approx(entropy, rel=0.01)


def test_a_story_has_one_derivation_and_its_nats() -> None:
    """Choices and text determine each other, so that -log p of the choices is that of the text."""
    for story in sorted(TOLD, key=lambda story: len(story.text))[:40] + TOLD[:10]:
        assert derivations(story.text) == [pytest.approx(story.nats)]


def test_what_the_grammar_cannot_say_has_no_derivation() -> None:
    story = min((s for s in TOLD if s.text.count(s.slots["colour"]) > 1), key=lambda s: len(s.text))
    colour = next(c for c in TABLES["colour"] if c[0] not in "aeiou" and c != story.slots["colour"])
    head, _, tail = story.text.rpartition(story.slots["colour"])
    assert derivations(story.text)
    assert not derivations(head + colour + tail)  # the thing changed its colour on the way
    assert not derivations(story.text[:-1])
    assert not derivations(story.text + " ")
