"""Which tokens stay in the draw: min-p, top-k and top-p (nucleus sampling: Holtzman et al. 2019, arXiv 1904.09751).

Each is a cutoff: tokens whose logit is below it are out, so tokens of equal logit share one fate and the result does
not depend on how a sort breaks ties.
"""

from __future__ import annotations

import torch


def apply_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Remove tokens less than min_p times as likely as the most likely one.

    Args:
        logits: float32 [N, V], already divided by the temperature.
        min_p: float32 [N] in [0, 1]; 0 removes nothing.
    """
    # p_i >= min_p * p_max, without computing any probability.
    cutoff = logits.amax(dim=-1) + min_p.log()
    return logits.masked_fill(logits < cutoff[:, None], float("-inf"))


def apply_top_k_top_p(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, max_top_k: int | None = None
) -> torch.Tensor:
    """Keep the top_k most likely tokens, and of these the most likely ones whose probabilities reach top_p.

    Args:
        logits: float32 [N, V].
        top_k: int64 [N] in [1, V]; None: no row uses it.
        top_p: float32 [N] in (0, 1]; None: no row uses it.
        max_top_k: the largest of top_k; None: it is asked of the device, which the host then waits for.
    """
    if top_k is None and top_p is None:
        return logits
    num_candidates = logits.shape[-1] if top_k is None else max_top_k or int(top_k.max())
    candidates = logits.topk(num_candidates, dim=-1).values  # [N, K], descending
    cutoff = candidates[:, -1:]  # [N, 1]
    if top_k is not None:
        cutoff = candidates.gather(-1, top_k[:, None] - 1)
        candidates = candidates.masked_fill(candidates < cutoff, float("-inf"))
    if top_p is not None:
        weights = (candidates - candidates[:, :1]).exp()
        total = weights.cumsum(dim=-1)
        # By the tokens before each one; nothing before the first, which always stays. A row that keeps everything must
        # not lose its tail to rounding.
        outside = (total - weights >= top_p[:, None] * total[:, -1:]) & (top_p < 1)[:, None]
        cutoff = cutoff.maximum(candidates.masked_fill(outside, float("inf")).amin(dim=-1, keepdim=True))
    return logits.masked_fill(logits < cutoff, float("-inf"))
