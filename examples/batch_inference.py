"""Many prompts in one call: each pass over the weights serves all of them.

    python examples/batch_inference.py
    python examples/batch_inference.py --stage m1          # one at a time: the same text, later
    python examples/batch_inference.py --copies 16 --max-tokens 128

Outputs come in the order of the prompts, whichever finished first, and each prompt may have parameters of its own. A
seed makes a draw repeatable: the text does not depend on who else is in the batch.
"""

import argparse
import time

import folovllm

PROMPTS = ["Once upon a time", "Mia had a red kite. One day", "Ali had an orange flute. One day", "On Monday, Theo"]

parser = argparse.ArgumentParser(description="Continue many prompts at once.")
parser.add_argument("--model", default=str(folovllm.TINY), help="folder or hub id (default: the embedded model)")
parser.add_argument("--stage", help="m1 to m7 (default: the newest); up to m1, one request runs at a time")
parser.add_argument("--copies", type=int, default=2, help="how often each of the four prompts is asked (default: 2)")
parser.add_argument("--max-tokens", type=int, default=32, help="most tokens of an answer (default: 32)")
args = parser.parse_args()
stage = folovllm.import_stage(args.stage)

prompts = PROMPTS * args.copies
params = [
    stage.SamplingParams(temperature=0.8, seed=number, max_tokens=args.max_tokens) for number in range(len(prompts))
]

with stage.LLM(args.model, log_level="WARNING") as llm:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start

for number, output in enumerate(outputs):
    print(f"--- {number}: {output.prompt}{output.text}")

num_tokens = sum(len(output.token_ids) for output in outputs)
print(f"\n{stage.__name__}: {len(outputs)} requests, {num_tokens} tokens in {seconds:.2f} s")
print(f"{num_tokens / seconds:.0f} tokens a second")
