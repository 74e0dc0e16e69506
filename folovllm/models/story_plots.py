"""The plots of the story grammar: what may happen in one episode, and which questions it answers.

A plot is told part by part; a fact stands right after the sentence that answers it. See `story_parts` for the parts.
"""

from __future__ import annotations

from folovllm.models.story_parts import KIDS, MISHAPS, TROUBLES, WEATHERS, Maybe, Part, fact, say

PET_COMES = Maybe("pet", 0.6, (say("{pet} the {animal} came along.", "Of course, {pet} came too."),))
WENT = fact(
    "site", "site", "{name} went to {site}{when}.", "Where did {name} go{when}?", "To which place did {name} go{when}?"
)
ON_THE_WAY = Maybe(
    "name",
    0.6,
    (
        say(
            "On the way there, {he} passed {sight} and stopped for a moment.",
            "{He} sat down first and ate {snack}, because it had been a long walk.",
            "{He} could see {sight} in the distance.",
        ),
    ),
)
GOING_HOME = Maybe(
    "name",
    0.6,
    (
        say(
            "Then {name} went home, and {his} {teacher} asked how the day had been.",
            '"What a day!" {name} said on the way home.',
            "When it was time to go home, {name} was hungry and ate {snack}.",
            "{name} thought about it for a long time afterwards.",
        ),
    ),
)
LOST: tuple[Part, ...] = (
    say(
        "{opening} {name} took the {colour} {thing} to {site}.",
        "{opening} {name} went to {site} and took {his} {thing} along.",
        "{opening} {name} carried {his} {colour} {thing} all the way to {site}.",
    ),
    WENT,
    PET_COMES,
    ON_THE_WAY,
    say(
        "The sun was shining and the birds were singing.",
        "The sky was grey, but {he} did not mind.",
        "It was quiet there, and the air smelled of flowers.",
        "Many people were there, but nobody looked up.",
    ),
    MISHAPS,
    say("Suddenly, {mishap}.", "But then {mishap}.", "Then something bad happened: {mishap}."),
    fact(
        "mishap",
        "mishap",
        "{Mishap}.",
        "What happened to {name}'s {thing}{when}?",
        "What happened to the {thing}{when}?",
    ),
    say("{name} was {sad} because {cause}.", "{name} was very {sad}, because {cause}."),
    fact(
        "why",
        "sad cause",
        "{name} was {sad} because {cause}.",
        "Why was {name} {sad}{when}?",
        "Why did {name} feel {sad}{when}?",
    ),
    say(
        '"Oh no!" cried {name}. "How will I ever get it back?"',
        '"What shall I do now?" {he} asked.',
        '"Please, can somebody help me?" {he} called.',
    ),
    say("Just then, {a manner} {helper} came along.", "{A manner} {helper} heard {him} and came closer."),
    fact(
        "helper",
        "helper",
        "The {helper} helped {name}.",
        "Who helped {name}{when}?",
        "Who got {name}'s {thing} back{when}?",
    ),
    say(
        '"Do not worry," said the {helper}. "I will help you."',
        '"Let me try," said the {helper}.',
        '"I know what to do," said the {helper}.',
    ),
    say(
        "The {helper} {rescue} and brought the {thing} back.",
        "Then the {helper} {rescue} and gave {him} the {thing}.",
    ),
    say(
        '"Thank you so much!" said {name} and gave the {helper} {treat}.',
        "{name} was so happy that {he} gave the {helper} {treat}.",
        "To thank the {helper}, {name} shared {treat}.",
    ),
    fact("thanks", "treat", "{name} gave the {helper} {treat}.", "What did {name} give the {helper}{when}?"),
)
FOUND: tuple[Part, ...] = (
    say(
        "{opening} {name} went for a walk to {site}.",
        "{opening} {name} had nothing to do and walked to {site}.",
    ),
    WENT,
    PET_COMES,
    ON_THE_WAY,
    say(
        "There {he} found {a find} {hiding}.",
        "{Hiding} {he} found {a find}.",
        "{He} looked {hiding} and found {a find}.",
    ),
    fact(
        "find", "find", "{name} found {a find}.", "What did {name} find{when}?", "What was it that {name} found{when}?"
    ),
    fact("hiding", "find hiding", "{name} found the {find} {hiding}.", "Where did {name} find the {find}?"),
    say(
        '"Somebody must be missing this," {he} thought.',
        '"Who could have lost this?" {name} wondered.',
        "{He} wanted to keep it, but that would not have been right.",
    ),
    say(
        'It belonged to the {person}. "I lost it {lost}," said the {person}.',
        "{He} asked the {person}, who had lost it {lost}.",
        '"That is mine!" said the {person}. "I lost it {lost}."',
    ),
    fact("owner", "person find", "The {person} had lost the {find}.", "Who had lost the {find} that {name} found?"),
    say(
        "To say thank you, the {person} gave {name} {treat}.",
        "The {person} was so glad that {name} got {treat}.",
    ),
    fact("reward", "treat", "The {person} gave {name} {treat}.", "What did the {person} give {name}{when}?"),
)
RESCUE: tuple[Part, ...] = (
    say("{opening} {name} went to {site} {errand}.", "{opening} {name} walked to {site} {errand}."),
    WENT,
    fact("errand", "errand", "{name} went to {site} {errand}.", "Why did {name} go to {site}{when}?"),
    PET_COMES,
    ON_THE_WAY,
    TROUBLES,
    say(
        "On the way, {he} met a little {creature} that {trouble}.",
        "There {he} saw a little {creature} that {trouble}.",
        "Near the path was a little {creature} that {trouble}.",
    ),
    fact("creature", "creature", "{name} helped a little {creature}.", "Which animal did {name} help{when}?"),
    fact(
        "trouble",
        "creature trouble",
        "The {creature} {trouble}.",
        "What was wrong with the {creature} that {name} met?",
    ),
    say(
        '"You poor thing," said {name}. "I will not leave you here."',
        '"Do not be afraid," {he} whispered.',
        '"Let me help you," said {name}.',
    ),
    say("{He} {cure}.", "So {name} {cure}.", "{name} thought for a moment, and then {he} {cure}."),
    fact(
        "cure",
        "cure",
        "{name} {cure}.",
        "How did {name} help the {creature}?",
        "What did {name} do for the {creature}?",
    ),
    say("The little {creature} {joy}.", "The {creature} {joy}."),
    say(
        "{name} felt {proud} because {he} had helped the {creature}.",
        "{name} was {proud} because {he} had helped the {creature}.",
    ),
    fact(
        "why",
        "proud creature",
        "{name} felt {proud} because {he} had helped the {creature}.",
        "Why did {name} feel {proud}{when}?",
        "Why was {name} {proud}{when}?",
    ),
)
LEARN: tuple[Part, ...] = (
    say(
        "{opening} {name} wanted to learn how to {skill}.",
        "{opening} {name} made up {his} mind to learn how to {skill}.",
    ),
    fact("skill", "skill", "{name} learned how to {skill}.", "What did {name} learn{when}?"),
    say(
        "At first it was very hard.",
        "{He} tried and tried, but it did not work.",
        '"I will never learn it," {he} sighed.',
    ),
    say(
        "Luckily, {his} {teacher} showed {him} how to do it.",
        "Then {his} {teacher} came and helped {him}.",
        "But {his} {teacher} knew all about it and showed {him}.",
    ),
    fact("teacher", "teacher", "{His} {teacher} taught {name} how to {skill}.", "Who taught {name} how to {skill}?"),
    say('"{tip}," said {his} {teacher}.', '"{tip}!" {his} {teacher} told {him}.'),
    fact("tip", "tip", '{His} {teacher} said: "{tip}."', "What did {name}'s {teacher} say{when}?"),
    say("After {count} tries, {name} could {skill}.", "It took {count} tries, but then {name} could {skill}."),
    fact("count", "count", "{name} needed {count} tries.", "How many tries did {name} need{when}?"),
    say('"I did it!" {name} shouted.', "{name} was so proud that {he} told everybody.", "{He} laughed with joy."),
)
COOK: tuple[Part, ...] = (
    say(
        "{opening} {name} wanted to make {a dish} for {his} {guest}.",
        "{opening} {name} began to make {a dish} for {his} {guest}.",
    ),
    fact("dish", "dish", "{name} made {a dish}.", "What did {name} make{when}?"),
    fact("guest", "guest", "{name} made the {dish} for {his} {guest}.", "For whom did {name} make the {dish}?"),
    say("But there was no {ingredient} in the kitchen.", "Then {he} saw that there was no {ingredient} left."),
    fact("missing", "ingredient", "There was no {ingredient}.", "What was missing when {name} made the {dish}?"),
    say(
        "So {he} went to {site} and asked the {person} for some {ingredient}.",
        "{name} ran to {site}, where the {person} had some {ingredient}.",
    ),
    WENT,
    fact(
        "lender",
        "person ingredient",
        "The {person} gave {name} some {ingredient}.",
        "Who gave {name} some {ingredient}{when}?",
    ),
    say(
        '"Take as much as you need," said the {person}.',
        '"You can have some of mine," said the {person}.',
        '"Only if I may have a piece later," said the {person} with a smile.',
    ),
    say(
        "An hour later, it was done.",
        "Soon the whole house smelled wonderful.",
        "{He} hurried home and finished the work.",
    ),
    say(
        '"This is the best {dish} I have ever had," said {his} {guest}.',
        "{His} {guest} ate every bit of it.",
        "{His} {guest} was so happy that they danced in the kitchen.",
    ),
)
STORM: tuple[Part, ...] = (
    WEATHERS,
    say(
        "{opening} {name} was on the way to {site} when {storm}.",
        "{opening} {name} set out for {site}, but on the way {storm}.",
    ),
    fact("storm", "storm", "On the way to {site}, {storm}.", "What happened on {name}'s way to {site}{when}?"),
    say("{name} was {scared} because {scare}.", "{name} was very {scared}, because {scare}."),
    fact(
        "why",
        "scared scare",
        "{name} was {scared} because {scare}.",
        "Why was {name} {scared}{when}?",
        "Why did {name} feel {scared}{when}?",
    ),
    say("{He} ran and hid {shelter}.", "So {he} looked for a safe place and hid {shelter}."),
    fact("shelter", "shelter", "{name} hid {shelter}.", "Where did {name} hide{when}?"),
    say("{A person} was there too.", "To {his} surprise, {a person} was sitting there."),
    fact(
        "company",
        "person",
        "{name} met {a person}.",
        "Whom did {name} meet{when}?",
        "Who was there when {name} hid{when}?",
    ),
    say("Together they {pastime} until it was over.", "They {pastime}, and soon it was over."),
    fact("pastime", "pastime", "They {pastime}.", "What did {name} and the {person} do{when}?"),
)
FRIEND: tuple[Part, ...] = (
    KIDS,
    say(
        "{opening} {name} met {a kid} called {friend} near {site}.",
        '{opening} {name} saw {a kid} who sat all alone near {site}. "My name is {friend}," said the {kid}.',
    ),
    fact(
        "friend", "friend", "{name} met {friend}.", "Whom did {name} meet{when}?", "Who became {name}'s friend{when}?"
    ),
    say("{friend} had just moved there from {origin}.", '"I come from {origin}," said {friend}.'),
    fact("origin", "friend origin", "{friend} came from {origin}.", "Where did {name}'s friend {friend} come from?"),
    say("{friend} was {lonely} because {loneliness}.", "{friend} was very {lonely}, because {loneliness}."),
    fact(
        "why",
        "lonely loneliness",
        "{friend} was {lonely} because {loneliness}.",
        "Why was {name}'s friend {friend} {lonely}?",
    ),
    say(
        "{name} let {friend} play with the {colour} {thing}.",
        '"Would you like to play with my {thing}?" asked {name}.',
        "{name} showed {friend} the {colour} {thing}.",
    ),
    say("Then the two of them played {game}.", "They played {game} and laughed a lot."),
    fact("game", "game", "{name} and {friend} played {game}.", "What did {name} and {friend} play?"),
    say(
        "Soon they were the best of friends.",
        "From then on, they were good friends.",
        '"Come back soon!" said {friend}.',
    ),
)
PLOTS = tuple((*plot, GOING_HOME) for plot in (LOST, FOUND, RESCUE, LEARN, COOK, STORM, FRIEND))
