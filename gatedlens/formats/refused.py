"""What is refused by name when a model is opened, and what says it here: other tools' options and classes, models that are not
open.

    options = heard({"fold_ln": False, "revision": "main"})        # {"revision": "main"}; fold_ln=True is an error
    why_not_opened("glm5_next")                                     # a sentence, or an empty text
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gatedlens.errors import CheckpointError

log = logging.getLogger(__name__)

FOLDING = (  # TransformerLens's options that change weights
    "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices",
)  # fmt: skip
ELSEWHERE = {  # other tools' options, and what says it here
    "hf_model": "gl.wrap(hf_model, tokenizer) takes a model that you have",
    "torch_dtype": "dtype=... says it",
    "n_devices": "device_map='auto' spreads a model over devices",
    "move_to_device": "device=... says where the model goes",
    "default_prepend_bos": "set model.cfg.default_prepend_bos",
    "default_padding_side": "set model.cfg.default_padding_side",
    "first_n_layers": "model(tokens, stop_at_layer=n) stops there",
    "checkpoint_index": "revision=... names a checkpoint of the hub",
    "checkpoint_value": "revision=... names a checkpoint of the hub",
    "n_ctx": "a recurrence has no bound",
}
NAMESAKES = {  # classes of other packages, and what to do with them
    "Mamba": "A class of this name is mambapy's or mamba-minimal's model, or one mixer of mamba-ssm. Of a model, write its "
    "tensors by mamba-ssm's names (`backbone.embedding.weight`, `backbone.layers.0.mixer.A_log`, `backbone.norm_f.weight`, "
    "`lm_head.weight`) to model.safetensors, beside a config.json with d_model, n_layer and vocab_size, and load the folder "
    "with gl.from_pretrained; of a hub name, gl.from_pretrained(name) loads it at once.",
}

NOT_OPENED = {  # models of transformers, by how their class and model_type begin, and why they are refused
    "glm5next": "GLM-5-next keeps several copies of the residual stream that it mixes among themselves (hyper-connections), so "
    "the stream is no sum of what is written to it, and chooses by an indexer what it attends to: gatedlens has no such block. "
    "Its linear layers are Kimi's: Kimi Linear and Bailing hybrid are open. So is Qwen4, whose copies are not mixed.",
    "bailingmoe": "Ring- and Ling-linear are their makers' own code, not transformers'. Bailing hybrid (Ling 3) is open.",
    "minimaxtext": "This is MiniMax's makers' own code, not transformers'. MiniMax in transformers' layout is open: "
    "MiniMaxAI/MiniMax-Text-01-hf.",
    "minimaxm1": "This is MiniMax's makers' own code, not transformers'. MiniMax in transformers' layout is open: "
    "MiniMaxAI/MiniMax-M1-40k-hf.",
    "minimaxm": "This MiniMax is a transformer: it has no recurrence.",
}


def heard(hub: Mapping[str, Any]) -> dict[str, Any]:
    """`heard(hub)`: the options without those of TransformerLens that ask for what is so anyway; its others are explained."""
    for name in (name for name in FOLDING if hub.get(name)):
        raise CheckpointError(
            f"{name}={hub[name]!r}: gatedlens folds nothing, weights are as in the file; leave it out or pass False."
        )
    for name in (name for name in ELSEWHERE if name in hub):
        raise CheckpointError(f"{name} is no option of gl.from_pretrained: {ELSEWHERE[name]}.")
    heard = [name for name in FOLDING if name in hub]
    if heard:
        log.info(
            "%s: gatedlens folds nothing, weights are as in the file.", ", ".join(f"{name}=False" for name in heard)
        )
    return {name: value for name, value in hub.items() if name not in FOLDING}


def why_not_opened(name: str) -> str:
    """`why_not_opened("qwen4_exp")`: why a model of transformers with this class or model_type is refused, where it is known well
    enough to say; else an empty text."""
    plain = name.replace("_", "").lower()
    return next((why for begin, why in NOT_OPENED.items() if plain.startswith(begin)), "")
