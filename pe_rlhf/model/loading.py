"""Loading a causal language model, freezing it, and what passes over it are given."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from huggingface_hub.utils import enable_progress_bars
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pe_rlhf.model.adapter_models import CAUSAL_LM
from pe_rlhf.model.names import check_model_name, find_adapter, model_at_hand, resolve_model
from pe_rlhf.model.round_trip import check_round_trip
from pe_rlhf.model.whole import check_vocabulary, load_whole, loading
from pe_rlhf.system.progress import console
from reward.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_causal_lm(
    name: str,
    *,
    dtype: str,
    device: torch.device,
    attention: str,
    trust_remote_code: bool,
    revision: str | None = None,
    quantization: str = "none",
    key: str = "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a hub id, a directory or `pip:NAME`; weights from safetensors only.

    Every dropout of the config is set to 0: the base is frozen and plays several roles, which must all see the same
    function. `key` is the one that names the model, for messages. Raises `InputError` as `load_whole` does.
    """
    transformers_logging.disable_progress_bar()
    if console.is_terminal:
        enable_progress_bars()  # of downloads, which the line above has switched off besides those of loading
    path = resolve_model(name)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    quantised = {} if quantization == "none" else _bitsandbytes(quantization, dtype)
    with loading(name, key):
        config = AutoConfig.from_pretrained(path, **common)
        for setting, value in config.to_dict().items():
            if ("dropout" in setting or setting.endswith("pdrop")) and isinstance(value, float):
                setattr(config, setting, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    model = load_whole(
        AutoModelForCausalLM,
        path,
        name=name,
        key=key,
        config=config,
        dtype=DTYPES[dtype],
        # Unasked, transformers takes sdpa where the model has it, else eager (GPT-Neo); asked for, it refuses.
        attn_implementation=None if attention == "sdpa" else attention,
        device=device,
        **common,
        **quantised,
    )
    check_vocabulary(model, tokenizer, name, key)
    check_round_trip(tokenizer, name, key)
    if quantised:
        modules: list[Any] = list(model.modules())
        for module in modules:
            # On CPUs with AVX512-BF16 bitsandbytes would turn weights round in place at the first pass without a
            # gradient, into a layout that has no backward pass and that cannot be read back.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def check_known(name: str, key: str, trust_remote_code: bool, task: str = CAUSAL_LM) -> None:
    """Raise `InputError` for the name of a model that can be seen to be wrong, or for one that is here and has a config
    that cannot be read or code that is not trusted."""
    check_model_name(name, key, task)
    if find_adapter(name) is None and (path := model_at_hand(name)) is not None:
        with loading(name, key):
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _bitsandbytes(quantization: str, dtype: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantised base. Raises `InputError` where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "backbone.quantization needs bitsandbytes",
            kind="not_installed",
            key="backbone.quantization",
            fix="pip install 'pe-rlhf[quantized]'",
        )
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[dtype]}
    eight: dict[str, Any] = {"load_in_8bit": True}
    config = BitsAndBytesConfig(**(four if quantization == "4bit" else eight))
    return {"quantization_config": config}


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one. Raises `InputError` for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it has no memory for weights")
    except (RuntimeError, AssertionError) as error:  # an assertion is how a CPU build says that it has no CUDA
        raise InputError(
            f"backbone.device: {name!r} cannot be used here: {str(error).splitlines()[0]}",
            kind="conflict",
            key="backbone.device",
        ) from error
    return device


def use_sound_attention() -> None:
    """Keep `scaled_dot_product_attention` from cuDNN's kernels, in this process.

    Since torch 2.11 they come first on Hopper and Blackwell cards. Their backward pass gives NaN for some masks
    (pytorch issue 196678), on B200 they corrupt sampling with few key-value heads (193893), and they take tens of
    milliseconds to plan every new shape: packed batches and the tokens of a rollout nearly always have a new one.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def freeze(model: PreTrainedModel) -> None:
    """No gradients and no dropout; the checkpoint's own sampling defaults (top-k, penalties) are dropped too."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT and others hand a number to the function
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)
    model.generation_config = GenerationConfig()


def keep_states_together(model: PreTrainedModel) -> None:
    """Let the head see hidden states that lie side by side in memory.

    The last ones of several prompts do not, and a CPU in bf16 then multiplies by as many copies of the head's weight.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)  # that there is one was checked
    if _side_by_side not in head._forward_pre_hooks.values():  # the model may have been a backbone's before
        head.register_forward_pre_hook(_side_by_side)


def _side_by_side(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(states.contiguous() for states in inputs)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """All ids that end a response: the generation config may name several, and the tokenizer may know another."""
    found: list[int] = []
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
    return sorted(set(found))


def position_arguments(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Mask and position ids for a forward pass: positions count the real tokens, wherever the padding stands."""
    if attention_mask is None:
        return {}
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask, "position_ids": position_ids}


def longest_sequence(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model of that config takes, in tokens, where it says so."""
    limits = (
        getattr(config.get_text_config(decoder=True), "max_position_embeddings", None),
        longest_turned_alike(config),
    )
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def turns_by_length(model: PreTrainedModel) -> bool:
    """Whether the model's rotary embeddings turn a key by how long the pass is that it is in."""
    return longest_turned_alike(model.config) is not None


def longest_turned_alike(config: PretrainedConfig) -> int | None:
    """The longest pass, in tokens, whose keys are turned as those of shorter ones; None where length plays no part.

    Beyond it the log-probs of a row would depend on the longest row beside it, and a response that is being sampled
    would change those of its own beginning.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)
