"""Zero-shot numbers published for the released DiHT weights, to verify them against.

Called by `diht_jax.evaluate`. From the official repository (facebookresearch/diht): top-1 on
ImageNet, recall at 1 on COCO and Flickr30K, in percent.
"""

from __future__ import annotations

from typing import Any

_COLUMNS = (
    ("imagenet", "top1"),
    ("coco_retrieval", "t2i_r1"),
    ("coco_retrieval", "i2t_r1"),
    ("flickr30k_retrieval", "t2i_r1"),
    ("flickr30k_retrieval", "i2t_r1"),
)
_PERCENT = {
    "diht_vitb32_224px": (68.0, 40.6, 59.3, 68.6, 84.4),
    "diht_vitb16_224px": (72.2, 43.3, 60.3, 72.9, 89.8),
    "diht_vitl14_224px": (77.0, 48.0, 65.1, 76.7, 92.0),
    "diht_vitl14_336px": (77.9, 49.3, 65.3, 78.2, 91.1),
}


def published_results(model: str) -> dict[str, Any] | None:
    """The published numbers in the form of a results file; None for another model."""
    if model not in _PERCENT:
        return None
    results: dict[str, dict[str, Any]] = {}
    for (task, metric), percent in zip(_COLUMNS, _PERCENT[model], strict=True):
        result = results.setdefault(
            task, {"task": task, "metrics": {}, "protocol": {}, "counts": {}}
        )
        result["metrics"][metric] = percent / 100
    return {"model": f"{model}, as published", "results": list(results.values())}
