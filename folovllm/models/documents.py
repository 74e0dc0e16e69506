"""The training documents of the embedded model: plain stories, stories with questions, and chats about them.

A document is a list of (text, is_answer) pieces whose texts, put together, are what the model reads; special tokens
are written out. Answers are marked because they are few among many tokens and training weighs them more.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from folovllm.models.stories import Question, Story, tell_story

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
Piece = tuple[str, bool]
Turn = tuple[str, str]  # role, content

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a storyteller.",
    "You tell small stories and answer questions about them.",
    "You are a friendly storyteller who answers in one short sentence.",
)
STORY_THEN_QUESTION = (
    "{story}\n\n{question}",
    "Read the story and answer the question.\n\n{story}\n\n{question}",
    "Here is a story.\n\n{story}\n\nQuestion: {question}",
    "{question}\n\n{story}",
)
ASKS = (
    "Tell me {a} story{about}.",
    "Please tell me {a} story{about}.",
    "Can you tell me {a} story{about}?",
    "I would like to hear {a} story{about}.",
    "Write {a} story{about}.",
    "tell me {a} story{about}",
)
ABOUTS = (
    " about {name}",
    " about {name} and {colour:a} {thing}",
    " about {name} and {thing:a}",
    " about a {girl} named {name}",
    " about a {girl} called {name} who lived {home}",
    " about {trait:a} {girl} named {name}",
    " about {trait:a} {girl}",
    " about {colour:a} {thing}",
    " about {name}, who lived {home}",
    " about a {word}",
    "",
)
WHO = "I am a small story model. I can tell a story and answer questions about it."
CANNOT = "I do not know that, because I am only a small story model. But I can tell you a story."
SMALL_TALK = (
    (("Hello!", "Hi!", "Hello", "hi", "Good morning!", "Hey"), "Hello! Shall I tell you a story?"),
    (("Who are you?", "What are you?", "What can you do?", "What is your name?", "Help"), WHO),
    (("Thank you!", "Thanks!", "Thank you very much.", "That was nice.", "I like it."), "You are welcome!"),
    (("Goodbye!", "Bye!", "Good night!", "See you tomorrow."), "Goodbye! Come back soon."),
    (
        (
            "What is the capital of France?",
            "What is 2 + 2?",
            "How is the weather today?",
            "Write a program in Python.",
            "Explain how a computer works.",
            "What time is it?",
            "Who was the first man on the moon?",
            "Translate this into German.",
            "How do I install this software?",
            "What is the meaning of life?",
        ),
        CANNOT,
    ),
)

# Words that users write and stories mostly lack: they get tokens, and the model learns what to say when it meets them.
_WORDS = """about above add again against age all almost also always among animal another answer any appear arm army
ask baby back bank base beauty became because become bed been began begin being believe body both bottom brain bread
break bridge bright bring brought build built business buy call came cannot capital car care case cause center
certain change child children choose circle class clear close cold color common company complete computer consider
contain continue could country course cover cross cry current data decide deep develop did differ difficult direct
distance does done down draw drive during each early earth east eat effect eight else end energy engine enough equal
even event every example experience explain face fact fall family far fast father feel few field fight figure final
fire fish five floor follow food foot force form forward found four free full game gave general get gold govern great
green group grow half hand happen hard head health hear heart heat heavy help here history hold home hope hour house
human hundred idea if important inch include increase industry information inside interest into iron island job join
just keep king know knowledge land language large late laugh law learn least leave left length less letter level life
light line list listen little local love low machine made main make man many map mark material matter mean measure
meet member memory might million mind minute model moment money month moon most mountain move much music must name
nation natural nature near need network never next nothing notice number object ocean of off office often oil once
only open order other our out over own page paper parent part party pass past pattern pay peace people percent
perhaps person picture piece place plan plane plant point political poor population position possible power present
president press problem process produce product program project property public question quick quiet quite race rain
raise range rather reach ready real reason record remember report represent result rich right road rock round rule
same say science second see seem sense sentence separate serve service set seven several shape share short should
show side simple since single sister size small snow social society some song soon sound south space speak special
speed spring square stand star start state station stay still stone stood street strong student study subject success
such suggest sun support sure surface system table take talk teach team tell ten test than that their them then there
these they thing think third those thousand three through time together told tomorrow tonight took top total toward
town travel tree trouble true try turn two type under understand unit university until upon use usual value very view
visit voice wait walk wall want war was watch water wave way wear weather week weight well went were west what wheel
when where whether which while white whole why wide will wind window winter wish with within without woman wonder
word work world would write year yes yesterday yet you young your anything attention batch between block cache
engineer hello please prompt python sequence token vector"""
OTHER_WORDS = tuple(_WORDS.split())
STRANGE = (
    "What is {} {}?",
    "How do I {} the {}?",
    "Explain {} {}.",
    "Who is the {} {}?",
    "Why does {} {}?",
    "{} {} {}",
    "Please {} my {} {}.",
)


class _Slot(str):
    """A word that writes its own article when asked to: f"{word:a}"."""

    def __format__(self, spec: str) -> str:
        return f"{'an' if self[0] in 'aeiou' else 'a'} {self}" if spec else str(self)


def chat(turns: Sequence[Turn]) -> list[Piece]:
    """The turns as the chat template writes them. A short reply, with the token that ends it, is an answer."""
    pieces: list[Piece] = []
    for role, content in turns:
        answer = role == "assistant" and len(content) < 150  # longer ones are stories
        pieces += [(f"{IM_START}{role}\n", False), (f"{content}{IM_END}", answer), ("\n", False)]
    return [*pieces, (END_OF_TEXT, False)]


def training_story(rng: random.Random) -> Story:
    while (story := tell_story(rng.getrandbits(64))).held_out:
        pass
    return story


def some_questions(rng: random.Random, story: Story, count: int) -> list[Question]:
    """Different questions in any order; those about the story's first sentences come up more often."""
    first = [q for q in story.questions if q.end <= story.questions[0].end]
    chosen = [rng.choice(first)] if rng.random() < 0.4 else []
    others = [q for q in story.questions if q not in chosen]
    chosen += rng.sample(others, min(count - len(chosen), len(others)))
    rng.shuffle(chosen)
    return chosen


def plain(rng: random.Random) -> list[Piece]:
    return [(training_story(rng).text, False), (END_OF_TEXT, False)]


def plain_questions(rng: random.Random) -> list[Piece]:
    """A story, then lines of `Question:` and `Answer:`, as a prompt without a chat template would write them."""
    story = training_story(rng)
    pieces: list[Piece] = [(story.text, False)]
    for question in some_questions(rng, story, rng.randint(1, 6)):
        pieces += [(f"\n\nQuestion: {rng.choice(question.wordings)}\nAnswer:", False), (" " + question.answer, True)]
    return [*pieces, (END_OF_TEXT, False)]


def system(rng: random.Random) -> list[Turn]:
    return [("system", rng.choice(SYSTEMS))] if rng.random() < 0.4 else []


def question_chat(rng: random.Random) -> list[Piece]:
    """The user gives a story and asks about it, up to four times."""
    story = training_story(rng)
    turns = system(rng)
    for number, question in enumerate(some_questions(rng, story, rng.randint(1, 4))):
        asked = rng.choice(question.wordings)
        if number == 0:
            asked = rng.choices(STORY_THEN_QUESTION, (6, 2, 2, 1))[0].format(story=story.text, question=asked)
        turns += [("user", asked), ("assistant", question.answer)]
    return chat(turns)


def ask_for(rng: random.Random, story: Story) -> str:
    """A request that this story fulfils."""
    kind = "a"
    if rng.random() < 0.3:
        kind = "a long" if story.slots["span"] == "week" else "a short"
    slots = {slot: _Slot(value) for slot, value in story.slots.items()}
    slots["word"] = _Slot(rng.choice(OTHER_WORDS))  # not in the grammar: any story will do
    while True:
        try:
            return rng.choice(ASKS).format(a=kind, about=rng.choice(ABOUTS).format_map(slots))
        except KeyError:  # this story never said where its hero lived
            continue


def small_talk(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.3:
        words = rng.sample(OTHER_WORDS, 3)
        return [("user", rng.choice(STRANGE).format(*words)), ("assistant", CANNOT)]
    said, answer = rng.choice(SMALL_TALK)
    return [("user", rng.choice(said)), ("assistant", answer)]


def story_chat(rng: random.Random) -> list[Piece]:
    """The user asks for a story, then perhaps about it, or for another one."""
    turns = system(rng) + (small_talk(rng) if rng.random() < 0.1 else [])
    for _ in range(rng.choice((1, 1, 1, 2))):
        story = training_story(rng)
        turns += [("user", ask_for(rng, story)), ("assistant", story.text)]
        if rng.random() < 0.5:
            for question in some_questions(rng, story, rng.randint(1, 3)):
                turns += [("user", rng.choice(question.wordings)), ("assistant", question.answer)]
    return chat(turns + (small_talk(rng) if rng.random() < 0.2 else []))


def small_talk_chat(rng: random.Random) -> list[Piece]:
    return chat(system(rng) + [turn for _ in range(rng.randint(1, 3)) for turn in small_talk(rng)])


def book_turns(rng: random.Random, tellers: Sequence[Story], count: int) -> list[tuple[str, Question, int]]:
    """`count` questions about a book of stories: (what the user writes, the question, the number of its story)."""
    book = "\n\n".join(f"Story {number}\n\n{story.text}" for number, story in enumerate(tellers, 1))
    asked = []
    for turn in range(count):
        number = rng.randrange(len(tellers))
        question = rng.choice(tellers[number].questions)
        words = f"Who is the hero of story {number + 1}?" if question.kind == "hero" else question.wordings[0]
        asked.append((f"{book}\n\n{words}" if turn == 0 else words, question, number))
    return asked


def book_chat(rng: random.Random) -> list[Piece]:
    """Several stories of different heroes, 1,500 to 3,800 tokens, then questions about any of them."""
    budget = rng.randint(6_000, 14_500)  # characters; a token has about four
    tellers: list[Story] = []
    while budget > 0:
        story = training_story(rng)
        if story.slots["name"] not in {other.slots["name"] for other in tellers}:
            budget -= len(story.text)
            if budget > 0 or not tellers:
                tellers.append(story)
    turns = system(rng)
    for words, question, _ in book_turns(rng, tellers, rng.randint(3, 8)):
        turns += [("user", words), ("assistant", question.answer)]
    return chat(turns)


KINDS = (plain, plain_questions, question_chat, story_chat, small_talk_chat, book_chat)
SHARES = (24, 10, 38, 16, 4, 8)


def document(seed: int | str) -> list[Piece]:
    """The training document of this seed. No story in it is of the test split."""
    rng = random.Random(seed)
    return rng.choices(KINDS, SHARES)[0](rng)
