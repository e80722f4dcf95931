"""Evaluation: which explanation is faithful, by the papers' experiments.

    scores = gl.attribution.lrp(model, images, labels)
    gl.evaluation.perturbation(model, images, scores, labels).area            # value, low, high
    gl.evaluation.segmentation(scores, masks).mean_iou

    found = gl.evaluation.evaluate(model, "digits", ["lrp", "rollout"], out="out")       # a data set, methods by name
    print(found.table())

Protocols: `protocol.py`; data sets that are read: `opening.py`; intervals: `result/bootstrap.py`. On the command line:
`gatedlens evaluate --model gatedlens/vim-digits --data digits --out out`.
"""

from gatedlens.evaluation.curves import Curve
from gatedlens.evaluation.data.opening import open_samples
from gatedlens.evaluation.data.sample import Listed, Prompt, Sample, Samples
from gatedlens.evaluation.known_truth import Located, located
from gatedlens.evaluation.overlap import Segmentation, segmentation
from gatedlens.evaluation.protocol import (
    MEASURES,
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
from gatedlens.evaluation.report_page import report
from gatedlens.evaluation.result import Evaluation
from gatedlens.evaluation.run import Explainer, evaluate, explainer
from gatedlens.evaluation.table import ScoreTable
from gatedlens.result.bootstrap import Estimate, estimate

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
