"""A seeded grammar of small stories whose entropy is known exactly: what the embedded model was trained to tell.

Every random choice of a story is drawn through one `Draw`, which sums -log p. A slot ("the colour of the thing") is
drawn when it is first spoken and then kept, so what is said early must be remembered later, and a reader can find out
which choices were made from the text alone: `derivations` does so. Hence the sum is not only the probability of the
choices but that of the text, and the mean over stories is the entropy that no language model can beat.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from string import Formatter
from typing import NamedTuple

from folovllm.models.story_parts import BARE_INTRO, ENDING, FRAMES, INTRO, Fact, Let, Maybe, Part, Say
from folovllm.models.story_plots import PLOTS
from folovllm.models.story_words import PRONOUNS, TABLES

NEVER_TWICE = ("find", "friend", "dish", "skill", "creature")  # else a question without a day could have two answers
TEST_SHARE = 50  # one story identity in so many is held out


class Fork(Exception):
    """Raised by `Replay` where the recorded choices end; carries how many ways the story could go on."""

    def __init__(self, ways: int) -> None:
        super().__init__(ways)
        self.ways = ways


class Draw:
    """The only source of chance in a story. `nats` is the sum of -log p over all draws so far."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.nats = 0.0

    def index(self, cumulative: Sequence[float]) -> int:
        """An index drawn with the probabilities whose running sum is given (it ends in the total weight)."""
        if len(cumulative) == 1:
            return 0
        point = self.rng.random() * cumulative[-1]
        chosen = next(i for i, bound in enumerate(cumulative) if point < bound or i == len(cumulative) - 1)
        return self.take(chosen, cumulative)

    def take(self, chosen: int, cumulative: Sequence[float]) -> int:
        weight = cumulative[chosen] - (cumulative[chosen - 1] if chosen else 0.0)
        self.nats -= math.log(weight / cumulative[-1])
        return chosen

    def uniform(self, count: int) -> int:
        """An index below `count`, all equally likely."""
        self.nats += math.log(count)
        return int(self.rng.random() * count)

    def chance(self, probability: float) -> bool:
        return self.index((probability, 1.0)) == 0


class Replay(Draw):
    """Makes the recorded choices instead of drawing; raises Fork when they run out."""

    def __init__(self, path: Sequence[int]) -> None:
        super().__init__(0)
        self.path = path
        self.step = 0

    def _next(self, ways: int) -> int:
        if self.step == len(self.path):
            raise Fork(ways)
        self.step += 1
        return self.path[self.step - 1]

    def index(self, cumulative: Sequence[float]) -> int:
        return self.take(self._next(len(cumulative)), cumulative) if len(cumulative) > 1 else 0

    def uniform(self, count: int) -> int:
        self.nats += math.log(count)
        return self._next(count)


class Question(NamedTuple):
    """A question that the story answers. `wordings` mean the same, and all but the first may leave out the hero's name.
    `end` is where, in characters, the sentence that holds the answer ends; every one of `keys` stands in the story."""

    kind: str
    wordings: tuple[str, ...]
    answer: str
    end: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """A finished story. `nats` is -log p(text); `slots` are the facts as drawn (name, colour, thing, ...)."""

    text: str
    nats: float
    slots: dict[str, str]
    questions: tuple[Question, ...]

    @property
    def identity(self) -> str:
        """What makes it the same story: who, with what, from where. The split is by this, not by the wording."""
        return "|".join(self.slots.get(slot, "") for slot in ("name", "colour", "thing", "home"))

    @property
    def held_out(self) -> bool:
        """True if the story belongs to the test split."""
        return int(hashlib.sha256(self.identity.encode()).hexdigest()[:8], 16) % TEST_SHARE == 0


@cache
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as (literal text, slot that follows it or None) pairs."""
    return tuple((literal, slot) for literal, slot, _, _ in Formatter().parse(template))


@cache
def _falling(count: int) -> tuple[float, ...]:
    """Running sum of the weights 1, 1/2, 1/3, ...: wordings have a clear favourite, so greedy text is stable."""
    return tuple(accumulate(1 / (i + 1) for i in range(count)))


class Teller:
    """Tells one story: holds the text so far and the slots that are already decided."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.text = ""
        self.slots: dict[str, str] = {}
        self.options: dict[str, tuple[str, ...]] = dict(TABLES)
        self.spoken: dict[str, set[str]] = {slot: set() for slot in NEVER_TWICE}
        self.questions: list[Question] = []

    def tell(self) -> None:
        """The whole story, into `text` and `questions`."""
        gender = ("girl", "boy")[self.draw.uniform(2)]
        self.slots.update(PRONOUNS[gender])
        self.options["name"] = TABLES[gender + " names"]
        self.run(INTRO if self.draw.chance(0.85) else BARE_INTRO)
        self.episodes()
        self.run(ENDING)

    def episodes(self) -> None:
        frame = FRAMES[self.draw.uniform(len(FRAMES))]
        self.slots["span"] = frame.span
        known, options = dict(self.slots), dict(self.options)
        plot = -1
        for number, (opening, when) in enumerate(frame.openings):
            if number >= frame.at_least and not self.draw.chance(frame.go_on):
                break
            self.slots = known | {"opening": opening, "when": when}
            self.options = dict(options)
            if len(frame.openings) > 1:
                self.text += "\n\n"
            others = [p for p in range(len(PLOTS)) if p != plot]
            plot = others[self.draw.uniform(len(others))]
            self.run(PLOTS[plot])
        self.slots, self.options = known, options
        if len(frame.openings) > 1:
            self.text += "\n\n"

    def run(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, Say):
                self.say(part.wordings)
            elif isinstance(part, Maybe):
                if part.needs in self.slots and self.draw.chance(part.probability):
                    self.run(part.parts)
            elif isinstance(part, Let):
                for slot, value in part.records[self.draw.uniform(len(part.records))].items():
                    if isinstance(value, str):
                        self.slots[slot] = value
                    else:
                        self.options[slot] = value
            else:
                self.know(part)

    def say(self, wordings: Sequence[str]) -> None:
        """One of the wordings, the first ones being likelier, as the next sentence."""
        if self.text and not self.text.endswith("\n"):
            self.text += " "
        for piece in self.spell(wordings[self.draw.index(_falling(len(wordings)))]):
            self.text += piece

    def spell(self, template: str, draws: bool = True) -> Iterator[str]:
        """The template in pieces, slots filled in: {a x} puts the article before x, {X} begins x with a capital."""
        for literal, slot in _pieces(template):
            yield literal
            if slot is None:
                continue
            bare = slot.lower().removeprefix("a ")
            if bare not in self.slots:
                if not draws:
                    raise KeyError(bare)
                self.slots[bare] = self.choose(bare)
            value = self.slots[bare]
            if "{" in value:
                value = self.slots[bare] = "".join(self.spell(value, draws))
            if len(bare) < len(slot):
                value = ("an " if value[0] in "aeiou" else "a ") + value
            yield value[0].upper() + value[1:] if slot[0].isupper() else value

    def choose(self, slot: str) -> str:
        options: Sequence[str] = self.options[slot]
        if slot in NEVER_TWICE:
            options = [value for value in options if value not in self.spoken[slot] and value != self.slots["name"]]
        value = options[self.draw.uniform(len(options))]
        if slot in NEVER_TWICE:
            self.spoken[slot].add(value)
        return value

    def know(self, fact: Fact) -> None:
        """Notes a question that the sentence just said answers, if all that it speaks of has been said."""
        try:
            answer, *wordings = ("".join(self.spell(text, draws=False)) for text in (fact.answer, *fact.wordings))
            keys = tuple("".join(self.spell("{" + key + "}", draws=False)) for key in fact.keys)
        except KeyError:
            return
        self.questions.append(Question(fact.kind, tuple(wordings), answer, len(self.text), keys))


def tell_story(seed: int | str) -> Story:
    """The story of this seed; the same seed always tells the same story."""
    teller = Teller(Draw(seed))
    teller.tell()
    return Story(teller.text, teller.draw.nats, teller.slots, tuple(teller.questions))


def stories(held_out: bool, seed: int | str, count: int) -> Iterator[Story]:
    """`count` stories of one split."""
    attempt = 0
    while count:
        story = tell_story(f"{seed}/{attempt}")
        attempt += 1
        if story.held_out == held_out:
            count -= 1
            yield story


def derivations(text: str) -> list[float]:
    """-log p of every derivation of the text: an empty list if the grammar cannot say it, one entry if it can and
    the reading is unambiguous. Depth-first over the choices, dropping a branch at the first wrong character."""
    found: list[float] = []
    paths: list[tuple[int, ...]] = [()]
    while paths:
        path = paths.pop()
        teller = Teller(Replay(path))
        try:
            teller.tell()
        except Fork as fork:
            if text.startswith(teller.text):
                paths.extend((*path, way) for way in range(fork.ways))
        else:
            if teller.text == text:
                found.append(teller.draw.nats)
    return found
