"""gatedlens: open up gated-linear recurrent models."""

from gatedlens.cache import ActivationCache
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.loading import bundled_models, from_pretrained, wrap
