"""Parameter-efficient RLHF: policy, value and reward as LoRA roles on one frozen backbone."""

from typing import TYPE_CHECKING

from pe_rlhf.adapters import kind as _registers_the_kinds  # noqa: F401
from pe_rlhf.adapters.lora import inits as _registers_the_inits  # noqa: F401

if TYPE_CHECKING:
    from pe_rlhf.model.backbone import Backbone, load_backbone
    from pe_rlhf.model.names import resolve_model

__all__ = ["Backbone", "load_backbone", "resolve_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported when asked for: torch and transformers take seconds, and `pe-rlhf --help` needs neither.
    if name == "resolve_model":
        from pe_rlhf.model.names import resolve_model

        return resolve_model
    if name in __all__:
        from pe_rlhf.model import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
