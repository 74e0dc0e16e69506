"""What a story of the grammar is made of, and how it begins, is laid out in time and ends; `stories` draws from this.

In a template {slot} stands for a word drawn from the table of that name on first use, {a slot} adds the article and
{Slot} begins with a capital. Questions are asked in words that hold whichever wording the story used.
"""

from __future__ import annotations

from typing import NamedTuple

from folovllm.models.story_words import BOYS, GIRLS, listed


class Say(NamedTuple):
    """One sentence (or a few), in one of several wordings; the first ones are the likelier."""

    wordings: tuple[str, ...]


class Let(NamedTuple):
    """Draws one record. Its strings become slots, its tuples become the options of a slot still to be drawn."""

    records: tuple[dict[str, str | tuple[str, ...]], ...]


class Fact(NamedTuple):
    """A question that the sentence before answers. `keys`: the slots that make up the answer."""

    kind: str
    keys: tuple[str, ...]
    answer: str
    wordings: tuple[str, ...]


class Maybe(NamedTuple):
    """Parts that are told with this probability, if the slot `needs` is known."""

    needs: str
    probability: float
    parts: tuple[Say | Let | Fact, ...]


class Frame(NamedTuple):
    """How a story is laid out in time: each episode's opening words, and how a question names that time."""

    span: str
    at_least: int
    go_on: float
    openings: tuple[tuple[str, str], ...]


Part = Say | Let | Fact | Maybe


def say(*wordings: str) -> Say:
    return Say(wordings)


def fact(kind: str, keys: str, answer: str, *wordings: str) -> Fact:
    return Fact(kind, tuple(keys.split()), answer, wordings)


FRAMES = (
    Frame("day", 1, 0.0, (("One day,", ""),)),
    Frame(
        "day",
        1,
        0.65,
        (
            ("One morning,", " in the morning"),
            ("That afternoon,", " in the afternoon"),
            ("That evening,", " in the evening"),
        ),
    ),
    Frame(
        "week",
        2,
        0.85,
        tuple(
            (f"On {day},", f" on {day}")
            for day in listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
        ),
    ),
)

WISHES = Let(
    tuple(
        {"wish": wish, "wished": wished}
        for wish, wished in (
            ("see the open sea", "saw the open sea"),
            ("ride a horse", "rode a horse"),
            ("sleep under the stars", "slept under the stars"),
            ("climb the highest mountain", "climbed the highest mountain"),
            ("hear a nightingale sing", "heard a nightingale sing"),
            ("sail on a big ship", "sailed on a big ship"),
            ("learn to play the piano", "learned to play the piano"),
            ("fly in a hot air balloon", "flew in a hot air balloon"),
            ("grow a giant pumpkin", "grew a giant pumpkin"),
            ("build a house in a tree", "built a house in a tree"),
            ("meet a real explorer", "met a real explorer"),
            ("write a book all by {himself}", "wrote a book all by {himself}"),
        )
    )
)

MISHAPS = Let(
    tuple(
        {"mishap": mishap, "cause": cause, "rescue": rescue, "helper": listed(helpers)}
        for mishap, cause, rescue, helpers in (
            (
                "a gust of wind blew the {thing} up into a tree",
                "the wind had blown the {thing} up into a tree",
                "went up the tree",
                "squirrel, cat, woodcutter, sailor, owl, monkey",
            ),
            (
                "the {thing} slipped out of {his} hands and fell into the water",
                "the {thing} had fallen into the water",
                "jumped into the water",
                "otter, frog, duck, fisherman, swan, beaver",
            ),
            (
                "the {thing} rolled away and dropped into a deep hole",
                "the {thing} had dropped into a deep hole",
                "crept down into the hole",
                "mole, rabbit, badger, mouse, fox, lizard",
            ),
            (
                "a cheeky goat grabbed the {thing} and ran away with it",
                "a goat had run away with the {thing}",
                "ran after the goat",
                "shepherd, postman, hunter, milkmaid, sheepdog, soldier",
            ),
            (
                "the {thing} got lost in the tall grass",
                "the {thing} was lost in the tall grass",
                "searched the grass",
                "hedgehog, cricket, hen, gardener, beetle, ant",
            ),
            (
                "the {thing} fell behind a heavy rock",
                "the {thing} had fallen behind a heavy rock",
                "pushed the rock aside",
                "bear, ox, blacksmith, farmer, donkey, giant",
            ),
        )
    )
)
TROUBLES = Let(
    tuple(
        {"trouble": trouble, "cure": cure}
        for trouble, cure in (
            ("was stuck in the mud", "pulled it out with a rope"),
            ("had a thorn in its foot", "took the thorn out"),
            ("had lost its mother", "led it home to its mother"),
            ("was very hungry", "fed it some bread and milk"),
            ("was shivering with cold", "wrapped it in a warm shawl"),
            ("was caught in a net", "cut the net open"),
            ("could not get across the stream", "carried it across the stream"),
            ("had fallen into a ditch", "lifted it out of the ditch"),
            ("was afraid of a barking dog", "chased the dog away"),
        )
    )
)
WEATHERS = Let(
    tuple(
        {"storm": storm, "scare": scare}
        for storm, scare in (
            ("a thunderstorm began", "the thunder was so loud"),
            ("thick fog rolled in", "{he} could not see the path"),
            ("it started to snow hard", "the snow hid the way home"),
            ("heavy rain began to fall", "the water was rising"),
            ("a cold wind began to blow", "the wind howled like a wolf"),
            ("it grew very dark", "there were strange sounds in the dark"),
        )
    )
)
KIDS = Let(({"kid": "girl", "friend": GIRLS}, {"kid": "boy", "friend": BOYS}))

HERO_FACTS: tuple[Fact, ...] = (
    fact(
        "hero", "name", "The hero of the story is {name}.", "Who is the hero of the story?", "Who is the story about?"
    ),
    fact(
        "colour",
        "colour thing",
        "The {thing} was {colour}.",
        "What colour was {name}'s {thing}?",
        "What colour was the {thing}?",
        "What color was the {thing}?",
    ),
    fact("trait", "trait", "{name} was {a trait} {girl}.", "What was {name} like?", "What kind of {girl} was {name}?"),
)
INTRO: tuple[Part, ...] = (
    say(
        "Once upon a time, there was {a trait} {girl} named {name} who lived {home}. {He} had {a colour} {thing}.",
        "{name} was {a trait} {girl} who lived {home}. {He} had {a colour} {thing}.",
        "Once upon a time, {a trait} {girl} named {name} lived {home}. Of all {his} things, {he} liked {his} {colour} "
        "{thing} best.",
        "There was once {a trait} {girl} named {name}. {He} lived {home} and had {a colour} {thing}.",
        "{name} had {a colour} {thing}. {He} was {a trait} {girl} who lived {home}.",
        "This is the story of {name}, {a trait} {girl} who lived {home}. {He} had {a colour} {thing}.",
    ),
    *HERO_FACTS,
    fact("home", "home", "{name} lived {home}.", "Where did {name} live?", "Where was {name}'s home?"),
    Maybe(
        "name",
        0.7,
        (
            say(
                "{His} {giver} had given it to {him} {occasion}.",
                "It was a gift from {his} {giver}, who had given it to {him} {occasion}.",
                "{He} had got it from {his} {giver} {occasion}.",
            ),
            fact("giver", "giver", "{His} {giver} gave {name} the {thing}.", "Who gave {name} the {thing}?"),
        ),
    ),
    Maybe(
        "name",
        0.5,
        (
            say(
                "{He} also had {a size} {animal} called {pet}.", "{His} best friend was {a size} {animal} called {pet}."
            ),
            fact("pet", "animal pet", "{name}'s {animal} was called {pet}.", "What was the name of {name}'s {animal}?"),
            fact("animal", "size animal", "{name} had {a size} {animal}.", "Which animal did {name} have?"),
        ),
    ),
    Maybe(
        "name",
        0.6,
        (
            WISHES,
            say("More than anything, {name} wanted to {wish}.", "{He} often dreamed that one day {he} would {wish}."),
            fact("wish", "wish", "{name} wanted to {wish}.", "What did {name} want to do more than anything?"),
        ),
    ),
)
BARE_INTRO: tuple[Part, ...] = (
    say("{name} had {a colour} {thing}.", "{name} was {a trait} {girl} who had {a colour} {thing}."),
    *HERO_FACTS,
)
ENDING: tuple[Part, ...] = (
    Maybe("wish", 0.7, (say("{later}, {name} {wished} at last.", "{later}, the wish came true: {name} {wished}."),)),
    say(
        "That night, {name} put the {colour} {thing} beside the bed and fell asleep.",
        "{name} never forgot that {span}.",
        "{name} went home, tired but happy, and told {his} {giver} everything.",
        "And from that {span} on, {name} was never afraid to ask for help.",
        "{name} still has the {colour} {thing} today.",
    ),
    Maybe("name", 0.3, (say("The end."),)),
)
