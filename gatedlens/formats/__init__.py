"""What checkpoints and foreign configs look like, one file a layout.

    transformers_config.py    what a config of transformers may say, of each architecture
    mamba_stack.py            where Mamba and Mamba-2 have their layers, in transformers and in mamba-ssm
    mamba_ssm.py              mamba-ssm's layout of Mamba                     mamba2_ssm.py        and of Mamba-2
    recurrentgemma.py         Google's layout of Griffin                      rwkv_lm.py           RWKV-LM's layout
    rwkv6_lm.py               RWKV-5 and RWKV-6 in RWKV-LM's layout
    rwkv7_fla.py              RWKV-7 in RWKV-LM's layout and in fla's      fla.py               fla's other models
    vision_mamba.py           hustvl/Vim's layout and variants

Nothing here imports an architecture.
"""
