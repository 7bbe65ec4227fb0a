"""A metric of `evaluate` in a local folder."""

from __future__ import annotations

MODULE = """
import datasets
import evaluate
import numpy as np
from pathlib import Path
from sklearn.metrics import f1_score


class Measured(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int32")
        features = datasets.Features({"predictions": KIND, "references": KIND})
        return evaluate.MetricInfo(description="test", citation="", features=features)

    def _compute(self, predictions, references):
        BODY
"""
