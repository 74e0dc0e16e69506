"""The words, sentences and plots of the story grammar, as plain data; `stories` says what they mean and draws them.

In a template {slot} stands for a word drawn from the table of that name on first use, {a slot} adds the article and
{Slot} begins with a capital. Questions are asked in words that hold whichever wording the story used.
"""

from __future__ import annotations

from typing import NamedTuple, Union


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


Part = Union[Say, Let, Fact, Maybe]


def say(*wordings: str) -> Say:
    return Say(wordings)


def fact(kind: str, keys: str, answer: str, *wordings: str) -> Fact:
    return Fact(kind, tuple(keys.split()), answer, wordings)


def listed(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(","))


GIRLS = listed(
    "Mia, Anna, Lily, Emma, Zoe, Ruby, Nora, Ella, Maya, Lucy, Rosa, Ivy, Clara, Sara, Alice, Eva, Hana, Leila, Amina, "
    "Mei, Nina, Julia, Ada, Olive"
)
BOYS = listed(
    "Tom, Ben, Max, Sam, Leo, Jack, Finn, Noah, Omar, Hugo, Oscar, Felix, Eli, Adam, Luca, Ravi, Kenji, Peter, Theo, "
    "Milo, Oliver, David, Paul, Ali"
)
COINED = ("{low}{tail}", "{high}{tail}", "{old}{tail}", "{new}{tail}")  # names that must be copied letter by letter
PRONOUNS = {
    "girl": {"girl": "girl", "he": "she", "him": "her", "his": "her", "himself": "herself"},
    "boy": {"girl": "boy", "he": "he", "him": "him", "his": "his", "himself": "himself"},
}
RELATIVES = listed("grandmother, grandfather, mother, father, aunt, uncle, sister, brother, cousin, neighbour")

TABLES: dict[str, tuple[str, ...]] = {
    "girl names": GIRLS + COINED,
    "boy names": BOYS + COINED,
    "low": listed("Bar, Dor, Gol, Mur, Ulm, Vor"),
    "high": listed("Bri, Fli, Kee, Pri, Tee, Zil"),
    "old": listed("Ash, Elm, Hes, Osk, Thal, Wen"),
    "new": listed("Jax, Kov, Nyx, Quo, Rix, Yul"),
    "tail": listed("a, an, della, en, ika, ina, mo, on, ra, tan, to, via"),
    "trait": listed(
        "kind, brave, curious, quiet, clever, cheerful, shy, patient, gentle, lively, thoughtful, funny, polite, careful"
    ),
    "home": listed(
        "in a small village, in a cottage by the sea, on a farm, in a tall house on a hill, at the edge of a dark forest,"
        "in a town by the river, on a little island, in a busy city, in a house with a green door, near the harbour,"
        "in a valley between two mountains, above a bakery, in an old lighthouse, on a boat, behind the railway station,"
        "in a hut in the woods, next to a windmill, in a street full of shops, near a quiet lake, at the end of a long road"
    ),
    "colour": listed("red, blue, green, yellow, purple, orange, white, black, pink, golden, silver, brown"),
    "thing": listed(
        "kite, ball, boat, drum, hat, scarf, lantern, flute, book, basket, bell, doll, umbrella, blanket, ring, whistle,"
        "cap, bag, box, cup, button, ribbon, feather, marble, puppet, mirror, coat, shell, spoon, balloon"
    ),
    "giver": RELATIVES,
    "occasion": listed(
        "for {his} birthday, on the first day of spring, as a reward, on a rainy Sunday, after a long journey,"
        "before the winter came, on the last day of school, as a surprise"
    ),
    "size": listed("small, big, fat, young, old, fluffy, lazy, noisy"),
    "animal": listed("dog, cat, rabbit, pony, goat, duck, hen, parrot, turtle, hamster, donkey, pig"),
    "pet": listed(
        "Pip, Biscuit, Pepper, Dot, Clover, Ziggy, Mango, Waffles, Domino, Nibbles, Patch, Smoky, Coco, Pudding"
    ),
    "site": listed(
        "the old mill, the market, the beach, the big forest, the lake, the meadow, the park, the old bridge, the harbour,"
        "the orchard, the school, the castle, the railway station, the waterfall, the museum, the pine wood, the village "
        "square, the stone tower, the cherry garden, the river"
    ),
    "sad": listed("sad, worried, upset, unhappy"),
    "manner": listed("friendly, kind, clever, strong, young, old"),
    "treat": listed(
        "some bread, a ripe apple, a piece of cheese, a honey biscuit, a handful of nuts, a slice of cake, a sweet pear,"
        "a bowl of soup, a bunch of grapes, a warm pie, a jar of jam, a bag of cherries"
    ),
    "hiding": listed(
        "under a flat stone, behind a bush, between two roots, in the tall grass, inside a hollow log, on the steps,"
        "next to the well, below a bench, in a bird's nest, at the foot of a tree, in a puddle, beside the path"
    ),
    "find": listed(
        "silver key, old map, gold coin, pearl button, lost letter, pocket watch, glass bead, brass compass, wooden spoon,"
        "tiny bottle, leather glove, painted egg, rusty lock, small purse"
    ),
    "person": listed(
        "baker, miller, farmer, teacher, doctor, gardener, postman, fisherman, tailor, shoemaker, shopkeeper, old woman,"
        "old man, clockmaker, singer, painter"
    ),
    "lost": listed("last week, a year ago, on the way to work, in the winter, during the festival, long ago"),
    "errand": listed(
        "to pick flowers, to draw pictures, to watch the clouds, to gather wood, to listen to the birds, to eat {his} lunch,"
        "to look for berries, to read in the shade"
    ),
    "creature": listed(
        "lamb, bird, kitten, puppy, fawn, duckling, foal, calf, owl, bear cub, fox, hedgehog, squirrel, monkey"
    ),
    "joy": listed(
        "jumped for joy, was happy again, made a merry sound, danced around {him}, looked at {him} with bright eyes"
    ),
    "proud": listed("proud, happy, glad, warm inside"),
    "skill": listed(
        "swim, whistle, ride a bicycle, juggle, skip stones, tie a sailor's knot, milk a cow, row a boat, knit, dance,"
        "climb a rope, read a map, stand on {his} hands, walk on stilts"
    ),
    "teacher": RELATIVES,
    "tip": listed(
        "Take your time, Keep your back straight, Breathe slowly, Do not look down, Just try once more, Think of a song,"
        "Start with the easy part, Never give up"
    ),
    "count": listed("two, three, four, five, six, seven, eight, nine, ten, twelve, twenty"),
    "dish": listed(
        "plum cake, apple pie, pot of soup, loaf of bread, cherry tart, bowl of pudding, big salad, berry pie, cheese pie,"
        "carrot cake, pot of stew, tray of biscuits"
    ),
    "guest": RELATIVES,
    "ingredient": listed("flour, butter, sugar, milk, salt, honey, cream, yeast, oil, pepper, water, vinegar"),
    "scared": listed("afraid, scared, frightened, nervous"),
    "shelter": listed(
        "in an old barn, in a small cave, under a stone arch, in a shepherd's hut, inside a hollow tree, in a little chapel,"
        "under a fallen oak, in an empty stable, behind a high wall, in a garden shed"
    ),
    "pastime": listed(
        "sang old songs, told each other jokes, counted to a hundred, played cards, shared a cup of tea,"
        "talked about faraway lands, made up riddles, ate some chocolate"
    ),
    "origin": listed(
        "the mountains, the city, a distant island, the desert, the far north, a fishing port, the other side of the sea,"
        "a farm in the south"
    ),
    "lonely": listed("sad, lonely, silent, homesick"),
    "loneliness": listed(
        "nobody there was a friend yet, the new house was so empty, everything was new, all the old friends were far away,"
        "nobody had said hello"
    ),
    "game": listed("hide and seek, tag, chess, pirates, hopscotch, knights, leapfrog, shop, treasure hunt, blind man's buff"),
    "sight": listed(
        "a row of tall trees, a cloud in the shape of a whale, two boys on a wall, a cart full of hay, a long line of ants,"
        "an empty bench, smoke above the roofs, three white geese, a poster on a door, a rainbow"
    ),
    "snack": listed("a roll with cheese, two boiled eggs, a cold potato, some raisins, a piece of gingerbread, a carrot"),
    "later": listed("A year later, When summer came, Not long after, When the snow had melted, Soon after that"),
}

FRAMES = (
    Frame("day", 1, 0.0, (("One day,", ""),)),
    Frame(
        "day",
        1,
        0.65,
        (("One morning,", " in the morning"), ("That afternoon,", " in the afternoon"), ("That evening,", " in the evening")),
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

HERO_FACTS: tuple[Fact, ...] = (
    fact("hero", "name", "The hero of the story is {name}.", "Who is the hero of the story?", "Who is the story about?"),
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
            say("{He} also had {a size} {animal} called {pet}.", "{His} best friend was {a size} {animal} called {pet}."),
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

PET_COMES = Maybe("pet", 0.6, (say("{pet} the {animal} came along.", "Of course, {pet} came too."),))
WENT = fact("site", "site", "{name} went to {site}{when}.", "Where did {name} go{when}?", "To which place did {name} go{when}?")
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
    fact("mishap", "mishap", "{Mishap}.", "What happened to {name}'s {thing}{when}?", "What happened to the {thing}{when}?"),
    say("{name} was {sad} because {cause}.", "{name} was very {sad}, because {cause}."),
    fact(
        "why", "sad cause", "{name} was {sad} because {cause}.", "Why was {name} {sad}{when}?", "Why did {name} feel {sad}{when}?"
    ),
    say(
        '"Oh no!" cried {name}. "How will I ever get it back?"',
        '"What shall I do now?" {he} asked.',
        '"Please, can somebody help me?" {he} called.',
    ),
    say("Just then, {a manner} {helper} came along.", "{A manner} {helper} heard {him} and came closer."),
    fact("helper", "helper", "The {helper} helped {name}.", "Who helped {name}{when}?", "Who got {name}'s {thing} back{when}?"),
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
    say("There {he} found {a find} {hiding}.", "{Hiding} {he} found {a find}.", "{He} looked {hiding} and found {a find}."),
    fact("find", "find", "{name} found {a find}.", "What did {name} find{when}?", "What was it that {name} found{when}?"),
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
    fact("trouble", "creature trouble", "The {creature} {trouble}.", "What was wrong with the {creature} that {name} met?"),
    say(
        '"You poor thing," said {name}. "I will not leave you here."',
        '"Do not be afraid," {he} whispered.',
        '"Let me help you," said {name}.',
    ),
    say("{He} {cure}.", "So {name} {cure}.", "{name} thought for a moment, and then {he} {cure}."),
    fact("cure", "cure", "{name} {cure}.", "How did {name} help the {creature}?", "What did {name} do for the {creature}?"),
    say("The little {creature} {joy}.", "The {creature} {joy}."),
    say("{name} felt {proud} because {he} had helped the {creature}.", "{name} was {proud} because {he} had helped the {creature}."),
    fact(
        "why",
        "proud creature",
        "{name} felt {proud} because {he} had helped the {creature}.",
        "Why did {name} feel {proud}{when}?",
        "Why was {name} {proud}{when}?",
    ),
)
LEARN: tuple[Part, ...] = (
    say("{opening} {name} wanted to learn how to {skill}.", "{opening} {name} made up {his} mind to learn how to {skill}."),
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
    say("{opening} {name} wanted to make {a dish} for {his} {guest}.", "{opening} {name} began to make {a dish} for {his} {guest}."),
    fact("dish", "dish", "{name} made {a dish}.", "What did {name} make{when}?"),
    fact("guest", "guest", "{name} made the {dish} for {his} {guest}.", "For whom did {name} make the {dish}?"),
    say("But there was no {ingredient} in the kitchen.", "Then {he} saw that there was no {ingredient} left."),
    fact("missing", "ingredient", "There was no {ingredient}.", "What was missing when {name} made the {dish}?"),
    say(
        "So {he} went to {site} and asked the {person} for some {ingredient}.",
        "{name} ran to {site}, where the {person} had some {ingredient}.",
    ),
    WENT,
    fact("lender", "person ingredient", "The {person} gave {name} some {ingredient}.", "Who gave {name} some {ingredient}{when}?"),
    say(
        '"Take as much as you need," said the {person}.',
        '"You can have some of mine," said the {person}.',
        '"Only if I may have a piece later," said the {person} with a smile.',
    ),
    say("An hour later, it was done.", "Soon the whole house smelled wonderful.", "{He} hurried home and finished the work."),
    say(
        '"This is the best {dish} I have ever had," said {his} {guest}.',
        "{His} {guest} ate every bit of it.",
        "{His} {guest} was so happy that they danced in the kitchen.",
    ),
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
STORM: tuple[Part, ...] = (
    WEATHERS,
    say("{opening} {name} was on the way to {site} when {storm}.", "{opening} {name} set out for {site}, but on the way {storm}."),
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
    fact("company", "person", "{name} met {a person}.", "Whom did {name} meet{when}?", "Who was there when {name} hid{when}?"),
    say("Together they {pastime} until it was over.", "They {pastime}, and soon it was over."),
    fact("pastime", "pastime", "They {pastime}.", "What did {name} and the {person} do{when}?"),
)
KIDS = Let(({"kid": "girl", "friend": GIRLS}, {"kid": "boy", "friend": BOYS}))
FRIEND: tuple[Part, ...] = (
    KIDS,
    say(
        "{opening} {name} met {a kid} called {friend} near {site}.",
        '{opening} {name} saw {a kid} who sat all alone near {site}. "My name is {friend}," said the {kid}.',
    ),
    fact("friend", "friend", "{name} met {friend}.", "Whom did {name} meet{when}?", "Who became {name}'s friend{when}?"),
    say("{friend} had just moved there from {origin}.", '"I come from {origin}," said {friend}.'),
    fact("origin", "friend origin", "{friend} came from {origin}.", "Where did {name}'s friend {friend} come from?"),
    say("{friend} was {lonely} because {loneliness}.", "{friend} was very {lonely}, because {loneliness}."),
    fact("why", "lonely loneliness", "{friend} was {lonely} because {loneliness}.", "Why was {name}'s friend {friend} {lonely}?"),
    say(
        "{name} let {friend} play with the {colour} {thing}.",
        '"Would you like to play with my {thing}?" asked {name}.',
        "{name} showed {friend} the {colour} {thing}.",
    ),
    say("Then the two of them played {game}.", "They played {game} and laughed a lot."),
    fact("game", "game", "{name} and {friend} played {game}.", "What did {name} and {friend} play?"),
    say("Soon they were the best of friends.", "From then on, they were good friends.", '"Come back soon!" said {friend}.'),
)
PLOTS = tuple((*plot, GOING_HOME) for plot in (LOST, FOUND, RESCUE, LEARN, COOK, STORM, FRIEND))
