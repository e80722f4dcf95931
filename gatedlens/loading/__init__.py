"""Where models come from: a hub name, a folder, a bundled model, or a model that you already have.

    model = gl.from_pretrained("state-spaces/mamba-130m-hf")      # transformers' layout, from the hub
    model = gl.from_pretrained("path/to/folder")                   # the same, or an original checkpoint's layout
    model = gl.from_pretrained("vim_s_midclstok_80p5acc.pth")      # an original checkpoint that is one file
    model = gl.from_pretrained("gatedlens/mamba-recall")           # bundled: trained, tiny, no network
    model = gl.wrap(hf_model, tokenizer)                           # shares hf_model's parameters
    model = gl.from_pretrained("path/to/folder", adapter="lora")   # with an adapter of peft; its own folder will do, too
    model = gl.from_pretrained("path/to/folder", offload="disk")   # larger than the memory

What is read is checked before it is used, and before anything is built: the config against its fields (`model/fields.py`), the
files and their tensors (`model/checkpoint.py`), the tensors against what the config asks for (`model/fit.py`).
"""

from gatedlens.loading.named import HubOption, from_pretrained, skeleton
from gatedlens.loading.sources import BUNDLED, bundled_models, supported
from gatedlens.loading.wrapping import Model, wrap

__all__ = ["BUNDLED", "HubOption", "Model", "bundled_models", "from_pretrained", "skeleton", "supported", "wrap"]
