"""`VisionMamba` and its variants, by the name of the file that they were in: see formats/vision_mamba.py."""

from gatedlens.formats.vision_mamba import OFFICIAL, SHORT, PatchEmbed, VisionMamba, variant_config

__all__ = ["OFFICIAL", "SHORT", "PatchEmbed", "VisionMamba", "variant_config"]
