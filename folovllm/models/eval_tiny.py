"""Measures the embedded model on held-out stories, with transformers alone: does it stay with its hero, answer rightly,
stop, and come close to the entropy of the grammar that its stories are from?

    python -m folovllm.models.eval_tiny --device cuda
    python -m folovllm.models.eval_tiny --device cpu --stories 3 --questions 6 --books 1
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from folovllm.models.documents import END_OF_TEXT, book_turns
from folovllm.models.stories import Question, Story, derivations, stories
from folovllm.models.story_words import BOYS, GIRLS, PRONOUNS

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results"
FAR = 500  # tokens between a fact and the question about it
PARSED = 100  # continued stories that are parsed as a whole: reading one back takes a tenth of a second
BOOK_CHARACTERS = 14_000  # a book of stories that fills most of 4,096 positions


class Asked(NamedTuple):
    """A prompt that ends in a question, the right answer, and how many tokens back the fact was said."""

    kind: str
    prompt: list[int]
    answer: str
    distance: int


class Judge:
    """The model, its tokenizer, and batched generation."""

    def __init__(self, path: Path, device: str, batch: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        self.model = model.to(device).eval()
        self.device, self.batch = device, batch
        self.enders = set(self.model.generation_config.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without the tokens that end it."""
        return str(self.tokenizer.decode([token for token in ids if token not in self.enders]))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], max_tokens: int, sample: bool = False) -> list[list[int]]:
        """The tokens that follow each prompt, up to and with the one that ends it; without one if it never ended."""
        found: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            inputs = self.tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, return_tensors="pt")
            torch.manual_seed(first)
            output = self.model.generate(
                **inputs.to(self.device),
                max_new_tokens=max_tokens,
                do_sample=sample,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            for i, ids in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((n + 1 for n, token in enumerate(ids) if token in self.enders), len(ids))
                found[i] = ids[:end]
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def losses(self, row: list[int]) -> torch.Tensor:
        """-log p of row[1:], float32 [len(row) - 1]."""
        ids = torch.tensor([row], device=self.device)
        logits = self.model(ids[:, :-1]).logits[0].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()


def hero_stays(story: Story, continuation: str) -> bool:
    """The hero is named again, always as a girl or always as a boy, and other children only after an introduction."""
    name, other = story.slots["name"], PRONOUNS["boy" if story.slots["girl"] == "girl" else "girl"]
    words = set(re.findall(r"[a-z]+", continuation.lower()))
    wrong_pronoun = words & {other["he"], other["him"], other["his"], other["himself"]}
    strangers = [
        child
        for child in set(re.findall(r"[A-Z][a-z]+", continuation)) & set(GIRLS + BOYS) - {name}
        if f"called {child}" not in continuation and f"My name is {child}" not in continuation
    ]
    return name in continuation and not wrong_pronoun and not strangers


def opening(story: Story) -> str:
    """The part of a story that is given: up to the first sentence of its first episode."""
    place = re.search(r"\s(One day,|One morning,|On Monday,)", story.text)
    assert place is not None, "every story has a first episode"
    return story.text[: place.end()]


def continue_stories(judge: Judge, told: Sequence[Story], sample: bool) -> dict[str, Any]:
    """Some training documents ask questions after the story, so a continuation may too; the story ends before them."""
    openings = [opening(story) for story in told]
    outputs = judge.generate([judge.encode(text) for text in openings], max_tokens=1500, sample=sample)
    texts = [judge.decode(ids) for ids in outputs]
    alone = [text.split("\n\nQuestion:")[0] for text in texts]
    whole = [start + text for start, text in zip(openings, alone, strict=True)]
    return {
        "stories": len(told),
        "hero_stays": share(hero_stays(story, text) for story, text in zip(told, texts, strict=True)),
        "eos_reached": share(ids[-1] in judge.enders for ids in outputs),
        "whole_story_in_the_grammar": share(bool(derivations(text)) for text in whole[:PARSED]),
        "of_the_first": min(PARSED, len(whole)),
        "questions_follow": share(text != story for text, story in zip(texts, alone, strict=True)),
        "mean_tokens": sum(map(len, outputs)) / len(outputs),
        "longest": max(map(len, outputs)),
    }


def share(outcomes: Iterator[bool]) -> float:
    results = list(outcomes)
    return sum(results) / len(results)


def chat_prompt(judge: Judge, turns: list[dict[str, str]]) -> list[int]:
    text = judge.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return judge.encode(str(text))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def first_and_third(judge: Judge, told: Sequence[Story]) -> Iterator[Asked]:
    """For each story a chat of three questions: the first and the third are asked, the second answered for the model.
    Of a long story both are about something far back."""
    rng = random.Random("questions")
    for story in told:
        whole = len(judge.encode(story.text))
        far = [q for q in story.questions if whole - len(judge.encode(story.text[: q.end])) >= FAR]
        near = [q for q in story.questions if q not in far]
        three: list[Question] = rng.sample(far, min(2, len(far)))
        three += rng.sample(near, 3 - len(three))
        if len(far) > 1:
            three[1], three[2] = three[2], three[1]
        turns = [said("user", f"{story.text}\n\n{rng.choice(three[0].wordings)}")]
        for number, question in enumerate(three):
            prompt = chat_prompt(judge, turns)
            if number != 1:
                before = story.text[: question.end]
                distance = len(prompt) - len(chat_prompt(judge, [said("user", before)]))
                yield Asked(question.kind, prompt, question.answer, distance)
            if number < 2:
                turns += [said("assistant", question.answer), said("user", rng.choice(three[number + 1].wordings))]


def from_books(judge: Judge, count: int) -> Iterator[Asked]:
    """Four questions about each of `count` books, a book being as many held-out stories as fit, of different heroes."""
    rng = random.Random("books")
    supply = stories(held_out=True, seed="books", count=40 * count)
    for _ in range(count):
        tellers: list[Story] = []
        length = 0
        while length < BOOK_CHARACTERS:
            story = next(supply)
            if story.slots["name"] not in {other.slots["name"] for other in tellers}:
                tellers.append(story)
                length += len(story.text)
        if length > BOOK_CHARACTERS:
            length -= len(tellers.pop().text)
        asked = book_turns(rng, tellers, 4)
        book = asked[0][0].rsplit("\n\n", 1)[0]
        for turn, question, number in asked:
            words = turn.rsplit("\n\n", 1)[-1]
            prompt = chat_prompt(judge, [said("user", f"{book}\n\n{words}")])
            end = book.index(tellers[number].text) + question.end
            yield Asked(question.kind, prompt, question.answer, len(prompt) - len(judge.encode(book[:end])))


def _is_of(kind: str, asked: Asked) -> bool:
    return asked.kind == kind


def answer_questions(judge: Judge, asked: Sequence[Asked]) -> dict[str, Any]:
    outputs = judge.generate([a.prompt for a in asked], max_tokens=48)
    right = [judge.decode(ids).strip() == a.answer for a, ids in zip(asked, outputs, strict=True)]

    def part(keep: Callable[[Asked], bool]) -> dict[str, Any]:
        results = [ok for ok, a in zip(right, asked, strict=True) if keep(a)]
        return {"questions": len(results), "right": sum(results) / len(results) if results else None}

    return {
        "all": part(lambda a: True),
        f"fact_{FAR}_or_more_tokens_back": part(lambda a: a.distance >= FAR),
        "fact_2000_or_more_tokens_back": part(lambda a: a.distance >= 2000),
        "eos_reached": share(ids[-1] in judge.enders for ids in outputs),
        "longest_prompt": max(len(a.prompt) for a in asked),
        "by_kind": {kind: part(partial(_is_of, kind)) for kind in sorted({a.kind for a in asked})},
    }


def perplexity(judge: Judge, told: Sequence[Story]) -> dict[str, Any]:
    """The model's nats against the grammar's over the same stories, from their first token to the one that ends them.
    The model is told that a story begins by the end-of-text token of the document before, as in training."""
    nats, tokens = 0.0, 0
    for story in told:
        row = judge.encode(END_OF_TEXT + story.text + END_OF_TEXT)
        nats += judge.losses(row).sum().item()
        tokens += len(row) - 1
    grammar = sum(story.nats for story in told)
    return {
        "stories": len(told),
        "tokens": tokens,
        "grammar_nats_per_token": grammar / tokens,
        "model_nats_per_token": nats / tokens,
        "grammar_perplexity": math.exp(grammar / tokens),
        "model_perplexity": math.exp(nats / tokens),
        "perplexity_ratio": math.exp((nats - grammar) / tokens),
        "nats_ratio": nats / grammar,
    }


def by_position(judge: Judge, rows: int, width: int = 512) -> dict[str, Any]:
    """Loss at each stretch of positions, on rows that are full of held-out stories one after another."""
    supply = stories(held_out=True, seed="positions", count=60 * rows)
    limit = judge.model.config.max_position_embeddings
    total = torch.zeros(limit)
    for _ in range(rows):
        row = judge.encode(END_OF_TEXT)
        while len(row) <= limit:
            row += judge.encode(next(supply).text + END_OF_TEXT)
        total += judge.losses(row[: limit + 1])
    means = (total / rows).view(-1, width).mean(dim=1).tolist()
    return {f"{n * width}-{(n + 1) * width - 1}": math.exp(mean) for n, mean in enumerate(means)}


def samples(judge: Judge) -> dict[str, str]:
    """What the model says, greedily and unedited, to prompts that a reader would try."""
    mia = (
        "Mia had a red kite. Her father had given it to her on a rainy Sunday. One day, Mia took the kite to the beach."
    )
    prompts = {
        "Once upon a time": judge.encode("Once upon a time"),
        "Mia had a red kite. One day": judge.encode("Mia had a red kite. One day"),
        f"{mia} Who gave Mia the kite? (chat)": chat_prompt(judge, [said("user", f"{mia}\n\nWho gave Mia the kite?")]),
    }
    for words in ("Tell me a story about Mia and a red kite.", "Hello!", "Who are you?"):
        prompts[f"{words} (chat)"] = chat_prompt(judge, [said("user", words)])
    outputs = judge.generate(list(prompts.values()), max_tokens=1200)
    return {title: str(judge.tokenizer.decode(ids)) for title, ids in zip(prompts, outputs, strict=True)}


def table(report: dict[str, Any]) -> str:
    """The headline figures beside their targets."""
    greedy, sampled, asked, books, ppl = (
        report[key] for key in ("greedy", "sampled", "questions", "books", "perplexity")
    )
    far = asked[f"fact_{FAR}_or_more_tokens_back"]
    stops = min(greedy["eos_reached"], sampled["eos_reached"], asked["eos_reached"], books["eos_reached"])
    lines = [
        ("hero stays the hero, greedy", f"{greedy['hero_stays']:.1%} of {greedy['stories']}", ">= 95 %"),
        ("hero stays the hero, sampled at 1.0", f"{sampled['hero_stays']:.1%} of {sampled['stories']}", ">= 95 %"),
        ("answers exactly right", f"{asked['all']['right']:.1%} of {asked['all']['questions']}", ">= 90 %"),
        (f"  fact {FAR} or more tokens back", f"{far['right'] or 0:.1%} of {far['questions']}", ">= 90 %"),
        ("  in books of up to 4,000 tokens", f"{books['all']['right']:.1%} of {books['all']['questions']}", ""),
        ("ended by itself (lowest of all parts)", f"{stops:.1%}", ">= 99 %"),
        ("perplexity / grammar's", f"{ppl['model_perplexity']:.4f} / {ppl['grammar_perplexity']:.4f}", ""),
        ("  ratio (in nats)", f"{ppl['perplexity_ratio']:.4f} ({ppl['nats_ratio']:.4f})", "<= 1.10"),
        ("whole story in the grammar, sampled", f"{sampled['whole_story_in_the_grammar']:.1%}", ""),
    ]
    return "\n".join(f"{what:40s} {figure:>20s}  {target}" for what, figure, target in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the embedded story model.")
    parser.add_argument("--model", type=Path, default=HERE / "tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stories", type=int, default=256, help="held-out stories to continue and to score")
    parser.add_argument("--questions", type=int, default=500, help="held-out stories to ask two questions about")
    parser.add_argument("--books", type=int, default=64, help="long contexts to ask four questions about")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "tiny_eval.json")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    judge = Judge(args.model, args.device, args.batch)
    told = list(stories(held_out=True, seed="eval", count=args.stories))
    report: dict[str, Any] = {
        "command": "python -m folovllm.models.eval_tiny " + " ".join(sys.argv[1:] if argv is None else argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(judge.model.dtype),
        "perplexity": perplexity(judge, told),
        "perplexity_by_position": by_position(judge, max(1, args.books // 2)),
        "greedy": continue_stories(judge, told, sample=False),
        "sampled": continue_stories(judge, told, sample=True),
    }
    asked_about = stories(held_out=True, seed="questions", count=args.questions)
    report["questions"] = answer_questions(judge, list(first_and_third(judge, list(asked_about))))
    report["books"] = answer_questions(judge, list(from_books(judge, args.books)))
    report["samples"] = samples(judge)
    report["seconds"] = time.perf_counter() - started
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
