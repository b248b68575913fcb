"""Adapter inits: where A and B start.

One file per init, one line here. An init is a function of an `InitContext` that returns `(A_RI, B_OR)`; the anchored
layer subtracts whatever product they start with, so an init never has to think of the base weight.
"""

from pe_rlhf.adapters.lora.init_registry import INITS, register_init
from pe_rlhf.adapters.lora.inits.corda import corda
from pe_rlhf.adapters.lora.inits.cross_task import cross_task
from pe_rlhf.adapters.lora.inits.eva import eva
from pe_rlhf.adapters.lora.inits.gaussian import gaussian
from pe_rlhf.adapters.lora.inits.lora import lora
from pe_rlhf.adapters.lora.inits.lora_ga import lora_ga
from pe_rlhf.adapters.lora.inits.milora import milora
from pe_rlhf.adapters.lora.inits.olora import olora
from pe_rlhf.adapters.lora.inits.orthogonal import orthogonal
from pe_rlhf.adapters.lora.inits.pissa import pissa
from pe_rlhf.adapters.lora.inits.rlpo import rlmo, rlpo
from pe_rlhf.config.init_options import INIT_OPTIONS

register_init("lora", lora, options=INIT_OPTIONS["lora"])
register_init("gaussian", gaussian, options=INIT_OPTIONS["gaussian"])
register_init("orthogonal", orthogonal, options=INIT_OPTIONS["orthogonal"])
register_init("olora", olora, options=INIT_OPTIONS["olora"])
register_init("pissa", pissa, options=INIT_OPTIONS["pissa"])
register_init("milora", milora, options=INIT_OPTIONS["milora"])
register_init("rlpo", rlpo, options=INIT_OPTIONS["rlpo"])
register_init("rlmo", rlmo, options=INIT_OPTIONS["rlmo"])
register_init("lora_ga", lora_ga, options=INIT_OPTIONS["lora_ga"], needs="gradient")
register_init("cross_task", cross_task, options=INIT_OPTIONS["cross_task"], needs="two gradients")
register_init("corda", corda, options=INIT_OPTIONS["corda"], needs="inputs")
register_init("eva", eva, options=INIT_OPTIONS["eva"], needs="inputs")

__all__ = ["INITS", "register_init"]
