"""Few-shot prompts: a story and worked examples in front of each question, computed once.

    python examples/few_shot.py
    python examples/few_shot.py --stage m5                 # before prefix caching: every prompt is computed whole
    python examples/few_shot.py --model Qwen/Qwen3-0.6B

What stands in front is the same for all questions. Keys and values of tokens depend on what stands before them and on
nothing else, so the engine computes it for the first prompt and finds it again for all others (m6_prefix).
"""

import argparse

import folovllm

STORY = (
    "Mia had a red kite. On Friday, Mia took the red kite to the old mill. But then a cheeky goat grabbed the kite and "
    "ran away with it. Mia was upset because a goat had run away with the kite. A strong hunter heard her and came "
    "closer. Then the hunter ran after the goat and gave her the kite. That night, Mia put the red kite beside the bed "
    "and fell asleep."
)
EXAMPLES = [
    ("Who is the hero of the story?", "The hero of the story is Mia."),
    ("What colour was the kite?", "The kite was red."),
]
QUESTIONS = ["Where did Mia go?", "Who helped Mia?", "Why was Mia upset?"]

parser = argparse.ArgumentParser(description="Answer questions after worked examples.")
parser.add_argument("--model", default=str(folovllm.TINY), help="folder or hub id (default: the embedded model)")
parser.add_argument("--stage", help="m1 to m7 (default: the newest)")
args = parser.parse_args()
stage = folovllm.import_stage(args.stage)

shots = "".join(f"\n\nQuestion: {question}\nAnswer: {answer}" for question, answer in EXAMPLES)
prompts = [f"{STORY}{shots}\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS]

with stage.LLM(args.model, log_level="WARNING") as llm:
    params = stage.SamplingParams(temperature=0.0, max_tokens=24, stop=["\n"])  # an answer is one line
    outputs = llm.generate(prompts, params, use_tqdm=False)

print(f"{STORY}{shots}\n")
for question, output in zip(QUESTIONS, outputs, strict=True):
    num_prompt_tokens, num_cached = len(output.prompt_token_ids), getattr(output, "num_cached_tokens", 0)
    print(f"{question:<20} {output.text.strip():<52} [{num_cached} of {num_prompt_tokens} prompt tokens found]")
