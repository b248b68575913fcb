"""Adapter inits: where A and B start. One file per init, one line here.

An init is a function of an `InitContext` that returns `(A_RI, B_OR)`. The anchored layer subtracts their product, so an
init never has to change the base weight.

A recipe is checked against the options of these inits before torch is imported, which takes seconds. So their files
import torch, and what imports torch, inside the functions.
"""

from pe_rlhf.adapters.lora.inits import (  # noqa: F401
    corda,
    cross_task,
    eva,
    gaussian,
    geora,
    loftq,
    lora,
    lora_ga,
    mica,
    milora,
    olora,
    orthogonal,
    pissa,
    rlpo,
)
