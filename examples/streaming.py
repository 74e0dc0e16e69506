"""Text as it is made: one stream, several streams in one loop, and one that is left early.

    python examples/streaming.py
    python examples/streaming.py --model Qwen/Qwen3-0.6B "The three laws of motion are"

Each output has `delta`, what is new since the last one, and `text`, all so far. A character that is made of several
tokens comes when it is whole.
"""

import argparse
import contextlib

from folovllm import LLM, TINY, SamplingParams

parser = argparse.ArgumentParser(description="Print text while it is generated.")
parser.add_argument("prompt", nargs="?", default="Once upon a time", help="default: %(default)s")
parser.add_argument("--model", default=str(TINY), help="folder or hub id (default: the embedded model)")
args = parser.parse_args()

with LLM(args.model, log_level="WARNING") as llm:
    print("one stream:\n" + args.prompt, end="")
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=48)
    for output in llm.stream(args.prompt, params):
        print(output.delta, end="", flush=True)
    gaps = output.metrics.inter_token_latencies
    print(f"\n[first token after {output.metrics.ttft:.3f} s, longest pause {max(gaps, default=0):.3f} s]")

    # Several: the outputs of all requests come through one loop, a token of each in turn; request_id tells whose it is.
    print("\nthree streams:")
    prompts = [args.prompt, "Mia had a red kite. One day,", "Ali had an orange flute."]
    for output in llm.stream(prompts, SamplingParams(temperature=0.0, max_tokens=4)):
        print(f"{output.request_id}:{output.delta!r}", end=" ")

    # Left early: the request is aborted, and its blocks are free again, as soon as the generator is closed.
    print("\n\nuntil the first full stop:\n" + args.prompt, end="")
    with contextlib.closing(llm.stream(args.prompt, SamplingParams(temperature=0.0, max_tokens=500))) as stream:
        for output in stream:
            print(output.delta, end="", flush=True)
            if "." in output.delta:
                break
    print(f"\n[left after {len(output.token_ids)} of 500 tokens; running now: {llm.engine.has_unfinished_requests()}]")
