"""A conversation of several turns: the history goes into every prompt, and is found in the cache.

    python examples/chat.py
    python examples/chat.py --system "You are a storyteller." "Tell me a short story." "Who is the hero of the story?"
    python examples/chat.py --model Qwen/Qwen3-0.6B "Who are you?" "And in one word?"

`folovllm chat` does the same in the terminal.
"""

import argparse

from folovllm import LLM, TINY, SamplingParams

TURNS = ["Tell me a short story about Mia and a red kite.", "What colour was the kite?", "Thank you!"]

parser = argparse.ArgumentParser(description="Ask one thing after the other.")
parser.add_argument("turns", nargs="*", default=TURNS, help="what the user says, turn by turn")
parser.add_argument("--system", help="instructions that stand before the first turn")
parser.add_argument("--model", default=str(TINY), help="folder or hub id (default: the embedded model)")
args = parser.parse_args()

with LLM(args.model, log_level="WARNING") as llm:
    messages = [{"role": "system", "content": args.system}] if args.system else []
    for turn in args.turns:
        messages.append({"role": "user", "content": turn})
        # The tokenizer's chat template makes one prompt of all messages.
        (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=512), use_tqdm=False)
        messages.append({"role": "assistant", "content": output.text})
        print(f"user:      {turn}\nassistant: {output.text}")
        print(f"           [{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens found]\n")
