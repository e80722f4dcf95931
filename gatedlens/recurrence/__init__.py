"""The one recurrence, as a scan and as a matrix. It knows no model, no hook point, and of padding a mask at most.

state_t = decay_t * state_{t-1} + write_t            scan_t = sum over state of read_t * state_t

scan(terms, sequences, constants, state)     # scanning.py: forward and backward, segment by segment
ChannelTerms(log_decay, amount, key, read)   # channels.py: what `scan` runs where a head is a channel
chunked(Terms(...), u, state)                # chunks.py: heads with matrix states, delta rules; literal.py: word for word
doubling.py, delta_states.py                 # positions side by side; every state of a delta rule
wkv_scan.py                                  # RWKV-4's normalised scan
DecayScan(time, rate, read, amount, key)     # decay_matrix.py: the same as a matrix, its blocks in decay_blocks.py
HeadScan(terms, width, channels)             # head_matrix.py: of heads with matrix states, in head_blocks.py
PriorScan.of(terms, width)                   # prior_matrix.py: where a step is read from the next position on
WkvScan, PatternScan                         # the matrix of the normalised scan, of softmax attention
Factors, Branch                              # factors.py, operator.py: A = diag(gate) (S + diag(skip)) diag(act) M
convolution.py, autocast.py, transforms.py   # within documents; under autocast; under torch.func
"""

from gatedlens.recurrence.channels import ChannelTerms
from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.decay_matrix import DecayScan
from gatedlens.recurrence.factors import Factors, reach
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.operator import Branch
from gatedlens.recurrence.pattern_matrix import PatternScan
from gatedlens.recurrence.prior_matrix import PriorScan
from gatedlens.recurrence.scanning import (
    LinearScan,
    SegmentedScan,
    StepTerms,
    at_least_float32,
    linear_scan,
    readout,
    scan,
)
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.wkv_matrix import WkvScan

# fmt: off
__all__ = [
    "Branch", "ChannelTerms", "DecayScan", "Factors", "HeadScan", "LinearScan", "PatternScan", "PriorScan", "SegmentedScan",
    "StepTerms", "Terms", "WkvScan", "at_least_float32", "chunked", "linear_scan", "reach", "readout", "scan",
]
# fmt: on
