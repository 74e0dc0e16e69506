"""The words of the story grammar: for each slot of a template, what may stand there.

Commas divide the entries. An entry may hold slots itself, which are filled in when it is first spoken.
"""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(","))


GIRLS = listed(
    "Mia, Anna, Lily, Emma, Zoe, Ruby, Nora, Ella, Maya, Lucy, Rosa, Ivy, Clara, Sara, Alice, Eva, Hana, "
    "Leila, Amina, Mei, Nina, Julia, Ada, Olive"
)
BOYS = listed(
    "Tom, Ben, Max, Sam, Leo, Jack, Finn, Noah, Omar, Hugo, Oscar, Felix, Eli, Adam, Luca, Ravi, Kenji, Peter, "
    "Theo, Milo, Oliver, David, Paul, Ali"
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
        "kind, brave, curious, quiet, clever, cheerful, shy, patient, gentle, lively, thoughtful, funny, polite, "
        "careful"
    ),
    "home": listed(
        "in a small village, in a cottage by the sea, on a farm, in a tall house on a hill, at the edge of a dark "
        "forest, in a town by the river, on a little island, in a busy city, in a house with a green door, near "
        "the harbour, in a valley between two mountains, above a bakery, in an old lighthouse, on a boat, behind "
        "the railway station, in a hut in the woods, next to a windmill, in a street full of shops, near a quiet "
        "lake, at the end of a long road"
    ),
    "colour": listed("red, blue, green, yellow, purple, orange, white, black, pink, golden, silver, brown"),
    "thing": listed(
        "kite, ball, boat, drum, hat, scarf, lantern, flute, book, basket, bell, doll, umbrella, blanket, ring, "
        "whistle, cap, bag, box, cup, button, ribbon, feather, marble, puppet, mirror, coat, shell, spoon, balloon"
    ),
    "giver": RELATIVES,
    "occasion": listed(
        "for {his} birthday, on the first day of spring, as a reward, on a rainy Sunday, after a long journey, "
        "before the winter came, on the last day of school, as a surprise"
    ),
    "size": listed("small, big, fat, young, old, fluffy, lazy, noisy"),
    "animal": listed("dog, cat, rabbit, pony, goat, duck, hen, parrot, turtle, hamster, donkey, pig"),
    "pet": listed(
        "Pip, Biscuit, Pepper, Dot, Clover, Ziggy, Mango, Waffles, Domino, Nibbles, Patch, Smoky, Coco, Pudding"
    ),
    "site": listed(
        "the old mill, the market, the beach, the big forest, the lake, the meadow, the park, the old bridge, the "
        "harbour, the orchard, the school, the castle, the railway station, the waterfall, the museum, the pine "
        "wood, the village square, the stone tower, the cherry garden, the river"
    ),
    "sad": listed("sad, worried, upset, unhappy"),
    "manner": listed("friendly, kind, clever, strong, young, old"),
    "treat": listed(
        "some bread, a ripe apple, a piece of cheese, a honey biscuit, a handful of nuts, a slice of cake, a sweet "
        "pear, a bowl of soup, a bunch of grapes, a warm pie, a jar of jam, a bag of cherries"
    ),
    "hiding": listed(
        "under a flat stone, behind a bush, between two roots, in the tall grass, inside a hollow log, on the "
        "steps, next to the well, below a bench, in a bird's nest, at the foot of a tree, in a puddle, beside the "
        "path"
    ),
    "find": listed(
        "silver key, old map, gold coin, pearl button, lost letter, pocket watch, glass bead, brass compass, "
        "wooden spoon, tiny bottle, leather glove, painted egg, rusty lock, small purse"
    ),
    "person": listed(
        "baker, miller, farmer, teacher, doctor, gardener, postman, fisherman, tailor, shoemaker, shopkeeper, old "
        "woman, old man, clockmaker, singer, painter"
    ),
    "lost": listed("last week, a year ago, on the way to work, in the winter, during the festival, long ago"),
    "errand": listed(
        "to pick flowers, to draw pictures, to watch the clouds, to gather wood, to listen to the birds, to eat "
        "{his} lunch, to look for berries, to read in the shade"
    ),
    "creature": listed(
        "lamb, bird, kitten, puppy, fawn, duckling, foal, calf, owl, bear cub, fox, hedgehog, squirrel, monkey"
    ),
    "joy": listed(
        "jumped for joy, was happy again, made a merry sound, danced around {him}, looked at {him} with bright eyes"
    ),
    "proud": listed("proud, happy, glad, warm inside"),
    "skill": listed(
        "swim, whistle, ride a bicycle, juggle, skip stones, tie a sailor's knot, milk a cow, row a boat, knit, "
        "dance, climb a rope, read a map, stand on {his} hands, walk on stilts"
    ),
    "teacher": RELATIVES,
    "tip": listed(
        "Take your time, Keep your back straight, Breathe slowly, Do not look down, Just try once more, Think of a "
        "song, Start with the easy part, Never give up"
    ),
    "count": listed("two, three, four, five, six, seven, eight, nine, ten, twelve, twenty"),
    "dish": listed(
        "plum cake, apple pie, pot of soup, loaf of bread, cherry tart, bowl of pudding, big salad, berry pie, "
        "cheese pie, carrot cake, pot of stew, tray of biscuits"
    ),
    "guest": RELATIVES,
    "ingredient": listed("flour, butter, sugar, milk, salt, honey, cream, yeast, oil, pepper, water, vinegar"),
    "scared": listed("afraid, scared, frightened, nervous"),
    "shelter": listed(
        "in an old barn, in a small cave, under a stone arch, in a shepherd's hut, inside a hollow tree, in a "
        "little chapel, under a fallen oak, in an empty stable, behind a high wall, in a garden shed"
    ),
    "pastime": listed(
        "sang old songs, told each other jokes, counted to a hundred, played cards, shared a cup of tea, talked "
        "about faraway lands, made up riddles, ate some chocolate"
    ),
    "origin": listed(
        "the mountains, the city, a distant island, the desert, the far north, a fishing port, the other side of "
        "the sea, a farm in the south"
    ),
    "lonely": listed("sad, lonely, silent, homesick"),
    "loneliness": listed(
        "nobody there was a friend yet, the new house was so empty, everything was new, all the old friends were "
        "far away, nobody had said hello"
    ),
    "game": listed(
        "hide and seek, tag, chess, pirates, hopscotch, knights, leapfrog, shop, treasure hunt, blind man's buff"
    ),
    "sight": listed(
        "a row of tall trees, a cloud in the shape of a whale, two boys on a wall, a cart full of hay, a long line "
        "of ants, an empty bench, smoke above the roofs, three white geese, a poster on a door, a rainbow"
    ),
    "snack": listed(
        "a roll with cheese, two boiled eggs, a cold potato, some raisins, a piece of gingerbread, a carrot"
    ),
    "later": listed("A year later, When summer came, Not long after, When the snow had melted, Soon after that"),
}
