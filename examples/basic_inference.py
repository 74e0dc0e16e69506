"""The smallest program: a model, a prompt, a continuation.

    python examples/basic_inference.py
    python examples/basic_inference.py "Mia had a red kite. One day"
    python examples/basic_inference.py --model Qwen/Qwen3-0.6B "The capital of France is"
    python examples/basic_inference.py --stage m0

With --stage the same program runs on any of the eight stages.
"""

import argparse

import folovllm

parser = argparse.ArgumentParser(description="Continue one prompt.")
parser.add_argument("prompt", nargs="?", default="Once upon a time", help="default: %(default)s")
parser.add_argument("--model", default=str(folovllm.TINY), help="folder or hub id (default: the embedded model)")
parser.add_argument("--stage", help="m0 to m7 (default: the newest; it has the most options and is the fastest)")
args = parser.parse_args()

# In a program of your own this is `from folovllm import LLM, SamplingParams`.
stage = folovllm.import_stage(args.stage)

with stage.LLM(args.model, log_level="WARNING") as llm:  # as a context manager it gives its memory back
    params = stage.SamplingParams(temperature=0.0, max_tokens=48)  # 0: always the most likely token
    (output,) = llm.generate(args.prompt, params, use_tqdm=False)

print(f"stage:   {stage.__name__}")
print(f"text:    {output.prompt}{output.text}".rstrip())
print(f"tokens:  {len(output.prompt_token_ids)} in, {len(output.token_ids)} out")
print(f"ended by: {output.outputs[0].finish_reason}")  # "stop": the model's own end, or "length": max_tokens
print(f"timing:  first token after {output.metrics.ttft:.3f} s, the last after {output.metrics.e2e_latency:.3f} s")
