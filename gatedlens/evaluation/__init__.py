"""Evaluation: which explanation is faithful, by the papers' experiments.

    scores = gl.attribution.lrp(model, images, labels)
    gl.evaluation.perturbation(model, images, scores, labels).area            # value, low, high
    gl.evaluation.segmentation(scores, masks).mean_iou

    found = gl.evaluation.evaluate(model, "digits", ["lrp", "rollout"], out="out")       # a data set, methods by name
    print(found.table())

Protocols: `protocol.py`; data sets that are read: `opening.py`; intervals: `estimate.py`. On the command line:
`gatedlens evaluate --model gatedlens/vim-digits --data digits --out out`.
"""

from gatedlens.evaluation.curve import Curve
from gatedlens.evaluation.estimate import Estimate, estimate
from gatedlens.evaluation.evaluation import Evaluation
from gatedlens.evaluation.explainer import Explainer, explainer
from gatedlens.evaluation.measurement import evaluate
from gatedlens.evaluation.measures import MEASURES
from gatedlens.evaluation.opening import open_samples
from gatedlens.evaluation.protocol import (
    PROTOCOLS,
    Protocol,
    activation_curve,
    curve,
    deletion,
    difference,
    insertion,
    perturbation,
    pruning_curve,
)
from gatedlens.evaluation.report import report
from gatedlens.evaluation.sample import Listed, Prompt, Sample, Samples
from gatedlens.evaluation.scoretable import ScoreTable
from gatedlens.evaluation.segmentation import Segmentation, segmentation
from gatedlens.evaluation.truth import Located, located

__all__ = [
    "MEASURES",
    "PROTOCOLS",
    "Curve",
    "Estimate",
    "Evaluation",
    "Explainer",
    "Listed",
    "Located",
    "Prompt",
    "Protocol",
    "Sample",
    "Samples",
    "ScoreTable",
    "Segmentation",
    "activation_curve",
    "curve",
    "deletion",
    "difference",
    "estimate",
    "evaluate",
    "explainer",
    "insertion",
    "located",
    "open_samples",
    "perturbation",
    "pruning_curve",
    "report",
    "segmentation",
]
