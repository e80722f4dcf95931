"""Terms: what an architecture says of its recurrence. Everything else about a scan is made of them.

    S_t    = decay_t * S_{t-1}  -  erase_t (probe_t . S_{t-1})  +  value_t key_t^T          value_t = amount_t u_t
    scan_t = S_t read_t                                                                    S [head, value, key]

b batch, l pos, h head, v value, k key (the axis that is called `state` where a head is a channel). decay multiplies the key
axis of a head, or the whole of it; erase and probe are vectors of the key axis: the rank-one "remove" of a delta rule. u is the
content, which the implicit attention is an operator on; all else is held there.

    Mamba, ViM      heads are channels, v = 1      decay exp(dt A) by key      key B, read C shared by all      amount dt
    RG-LRU, HGRN    heads are channels, v = k = 1  decay a
    Mamba-2         v = 64, k = 128                decay exp(dt A) by head     key B, read C shared by a group  amount dt
    delta rules     v = k = 128                    by head or by key           erase and probe beside the key

`scan(terms, u, state)` runs them (scanning.py); `literal.py` is the equation above, word for word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError


class Terms(NamedTuple):
    """`Terms(dt * A, key=B, read=C, amount=dt)`: one recurrence, over any run of positions.

    The decay is exp(log_decay * rate) * (1 - fresh), log_decay * rate <= 0; its key axis is 1 where a head decays as one. `key`
    and `read` may have fewer heads, groups, each shared by the heads of its group in a row. A factor that is None is 1 (erase
    and probe: 0).
    """

    log_decay: Float[Tensor, "batch pos head #key"]
    key: Float[Tensor, "batch pos group key"]
    read: Float[Tensor, "batch pos group key"]
    amount: Float[Tensor, "batch pos head"] | None = None
    erase: Float[Tensor, "batch pos head key"] | None = None
    probe: Float[Tensor, "batch pos head key"] | None = None
    rate: Float[Tensor, "head key"] | None = None
    fresh: Float[Tensor, "batch pos one"] | None = None  # 1 where a document begins: the state before it is forgotten

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return self.log_decay.shape[2]

    @property
    def share(self) -> int:
        """How many heads share the keys of a group."""
        return self.sharing(self.key)

    def sharing(self, x: Float[Tensor, "batch pos group key"]) -> int:
        """How many heads share each group of a key or a read."""
        groups = x.shape[2]
        if groups == 0 or self.heads % groups:
            raise InputError(f"{self.heads} heads cannot share the keys of {groups} groups evenly.")
        return self.heads // groups

    def even(self) -> Terms:
        """The same with key and read of the same groups: each head's own, where they differ."""
        if self.key.shape[2] == self.read.shape[2]:
            return self
        return self._replace(key=self.of_heads(self.key), read=self.of_heads(self.read))

    @property
    def by_key(self) -> bool:
        """Whether the keys of a head decay each at its own pace."""
        return self.log_decay.shape[3] > 1 or (self.rate is not None and self.rate.shape[1] > 1)

    @property
    def has_delta_rule(self) -> bool:
        """Whether a step also removes what its probe finds."""
        return self.erase is not None

    def value(self, u: Float[Tensor, "batch pos head value"]) -> Float[Tensor, "batch pos head value"]:
        """What is written of the content: amount * u."""
        return u if self.amount is None else self.amount.unsqueeze(-1) * u

    def write(self, u: Float[Tensor, "batch pos head value"]) -> Float[Tensor, "batch pos head value key"]:
        """What each position writes: value key^T."""
        return self.value(u).unsqueeze(-1) * self.of_heads(self.key).unsqueeze(-2)

    def at(self, some: slice) -> Terms:
        """The same at some positions."""
        return Terms(*(x if name == "rate" or x is None else x[:, some] for name, x in self._asdict().items()))

    def log_decays(self) -> Float[Tensor, "batch pos head #key"]:
        """The logarithm of the decay, rate and fresh included; -inf where nothing is left."""
        log = self.log_decay if self.rate is None else self.log_decay * self.rate
        if self.fresh is None:
            return log
        ends = self.fresh.unsqueeze(-1) >= 1
        kept = torch.log1p(-self.fresh.unsqueeze(-1).masked_fill(ends, 0))  # no gradient of log(0)
        return (log + kept).masked_fill(ends, -torch.inf)

    def decays(self) -> Float[Tensor, "batch pos head #key"]:
        """exp(log_decay * rate) * (1 - fresh)"""
        decay = torch.exp(self.log_decay if self.rate is None else self.log_decay * self.rate)
        return decay if self.fresh is None else decay * (1 - self.fresh).unsqueeze(-1)

    def probes(self) -> Float[Tensor, "batch pos head key"] | None:
        """The probe of the state that is left: where a document begins it finds nothing."""
        if self.probe is None or self.fresh is None:
            return self.probe
        return self.probe * (1 - self.fresh).unsqueeze(-1)

    def with_probe(self, probe: Float[Tensor, "batch pos head key"]) -> Terms:
        """The same with another probe of the state before each step, as it stands: what a document's beginning forgets is in
        the decays alone."""
        if self.fresh is None:
            return self._replace(probe=probe)
        return self._replace(log_decay=self.log_decays(), rate=None, fresh=None, probe=probe)

    def of_heads(self, x: Float[Tensor, "batch pos group key"]) -> Float[Tensor, "batch pos head key"]:
        """A key or read of each group as one of each head."""
        share = self.sharing(x)
        return x if share == 1 else x.repeat_interleave(share, dim=2)
