"""Attention scorers by their formulas, from the model's own eager attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.tiny_models import FAMILIES, Inputs


def eager_maps(family: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Softmax attention of every layer, ``[batch, heads, length, length]``."""
    model = FAMILIES[family].build(attention="eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


def expected_scores(rule: str, attention: Tensor, vision: Tensor, valid: Tensor) -> list[Tensor]:
    """Each row's scores of its vision tokens, by the formulas, one row and head at a time."""
    scores = []
    for row in range(attention.shape[0]):
        seen = vision[row].nonzero()[:, 0]
        if len(seen) == 0:
            scores.append(torch.zeros(0, dtype=torch.float64))
            continue
        text_queries = [
            t for t in range(int(seen[0]), vision.shape[1]) if valid[row, t] and not vision[row, t]
        ]
        total = torch.zeros(len(seen), dtype=torch.float64)
        for head in attention[row].double():
            among = head[text_queries][:, text_queries]
            symmetric = among + among.T - torch.diag(among.diag())
            for place, text_query in enumerate(text_queries):
                weight = {
                    "text_guided": symmetric[:, place].sum(),
                    "uniform_text": 1.0,
                    "last_token": float(text_query == text_queries[-1]),
                }[rule]
                total += weight * head[text_query, seen]
        scores.append(total)
    return scores
