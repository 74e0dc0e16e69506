"""Files of `folovllm quantize` load in gptqmodel, and its files load here: equal weights, and logits but for rounding.

A script, not a test: gptqmodel pins numpy and 25 more packages, so it wants an environment of its own, which `make
interop` sets up:

    python -m venv FOLDER; FOLDER/bin/pip install torch==2.13.0 transformers==5.23 . && echo torch==2.13.0 > c.txt
    FOLDER/bin/pip install -c c.txt gptqmodel==7.6.0
    FOLDER/bin/python tests/integration/gptqmodel_interop.py --json docs/results/interop_m7.json

Exit code 1 if a weight differs at all, or logits by more than a hundredth of the largest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it asks for more than it grants
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from folovllm import TINY, import_stage  # noqa: E402
from folovllm.models.stories import stories  # noqa: E402
from folovllm.quantize import quantize  # noqa: E402

TOLERANCE = 1e-2
# bits, group_size, act-order, symmetric
OURS = [(4, 128, False, True), (4, 32, True, True), (4, 64, True, False), (4, -1, False, False), (8, 128, False, True)]
# and the format, which we choose by the symmetry
THEIRS = [
    (4, 64, False, True, "gptq"),
    (4, 32, True, True, "gptq_v2"),
    (4, 128, False, False, "gptq_v2"),
    (8, 128, False, True, "gptq"),
]


def load_theirs(folder: Path) -> torch.nn.Module:
    """gptqmodel's model of a quantised checkpoint."""
    from gptqmodel import BACKEND, GPTQModel

    model: torch.nn.Module = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    return model.eval()


def take_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Their quantised layers' weights by name, float32 [N, K]; in the module, plain layers of float32 take their place.

    Their product rounds otherwise for every backend; what the weights are does not.
    """
    weights = {}
    for path, layer in list(module.named_modules()):
        if hasattr(layer, "qweight"):
            weights[path] = weight = layer.dequantize_weight().T.float().contiguous()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
            linear.weight.data = weight
            if layer.bias is not None:
                linear.bias.data = layer.bias.float()
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, linear)
    module.float()
    return weights


def load_ours(stage: Any, folder: Path, token_ids: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [T, V], and weights by name, in float32."""
    evaluate = importlib.import_module(f"{stage.__name__}.evaluate")
    with stage.LLM(folder, dtype="float32", device="cpu", log_level="WARNING", max_model_len=512) as llm:
        model = llm.model
        with torch.inference_mode(), evaluate.window_metadata(model, 1, len(token_ids)) as (positions, metadata):
            logits = model.compute_logits(model(torch.tensor(token_ids), positions, metadata))
        weights = {}
        for path, layer in model.named_modules():
            if getattr(layer, "quantized", None) is not None:
                parent, _, leaf = path.rpartition(".")
                names = model.packed_modules_mapping.get(leaf, [leaf])
                parts = layer.quantized.dequantize(torch.float32).split(layer.output_sizes)
                weights.update({f"{parent}.{name}": part for name, part in zip(names, parts, strict=True)})
    return logits, weights


def compare(stage: Any, folder: Path, token_ids: list[int]) -> dict[str, float]:
    """The largest difference of a weight, and of a logit relative to the largest logit.

    Their weights are in float16, as their scales are; ours are rounded likewise before they are compared.
    """
    logits, weights = load_ours(stage, folder, token_ids)
    theirs = load_theirs(folder)
    wanted = take_weights(theirs)
    if weights.keys() != wanted.keys():
        raise SystemExit(f"other layers are quantised here than there: {sorted(weights.keys() ^ wanted.keys())}")
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids])).logits[0].float()
    differences = [float((weights[name].half().float() - wanted[name]).abs().max()) for name in wanted]
    return {
        "largest_weight_difference": max(differences),
        "relative_logits_difference": float((logits - expected).abs().max() / expected.abs().max()),
    }


def main() -> int:
    """Both directions; prints a line for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", default="m7_gptq")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    import gptqmodel
    import numpy
    import transformers

    started = time.monotonic()
    stage = import_stage(args.stage)
    told = [story.text for story in stories(False, "interop", 12)]
    token_ids = transformers.AutoTokenizer.from_pretrained(TINY).encode(told[0], add_special_tokens=False)[:256]
    cases: list[dict[str, Any]] = []
    report_file = args.json and args.json.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # gptqmodel writes its logs where it runs
        for number, (bits, group_size, act_order, sym) in enumerate(OURS):
            out = Path(scratch) / f"ours{number}"
            kind: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym}
            options: dict[str, Any] = {"num_samples": 4, "sample_length": 128, "log_level": "WARNING", "device": "cpu"}
            options |= {"calibration": "\n".join(told), "use_tqdm": False, "stage": args.stage}
            quantize(TINY, out, act_order=act_order, **kind, **options)
            case = {"writer": "folovllm", **kind, "desc_act": act_order, "format": "gptq" if sym else "gptq_v2"}
            cases.append({**case, **compare(stage, out, token_ids)})
            print(json.dumps(cases[-1]), flush=True)
        for number, (bits, group_size, act_order, sym, file_format) in enumerate(THEIRS):
            out = Path(scratch) / f"theirs{number}"
            kind = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": act_order, "format": file_format}
            ordering = {"act_group_aware": False} if act_order else {}
            config = gptqmodel.QuantizeConfig(**kind, **ordering, device="cpu", pack_impl="original")
            model = gptqmodel.GPTQModel.load(str(TINY), config)
            model.quantize(told[:8], batch_size=4)
            model.save(str(out))
            cases.append({"writer": "gptqmodel", **kind, **compare(stage, out, token_ids)})
            print(json.dumps(cases[-1]), flush=True)
        os.chdir(ROOT)
    passed = all(
        case["largest_weight_difference"] == 0 and case["relative_logits_difference"] <= TOLERANCE for case in cases
    )
    report = {
        "command": "python tests/integration/gptqmodel_interop.py " + " ".join(sys.argv[1:]),
        "stage": stage.__name__,
        "model": "folovllm/models/tiny",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gptqmodel": gptqmodel.__version__,
        "numpy": numpy.__version__,
        "seconds": round(time.monotonic() - started, 1),
        "logits_tolerance": TOLERANCE,
        "passed": passed,
        "cases": cases,
    }
    if report_file:
        report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("all equal" if passed else "THEY DIFFER", f"({report['seconds']} s)")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
