"""Loading weights so that each of them is the file's.

transformers and PEFT give a tensor that a file lacks random values, and leave out one that they have no place for; both
only warn. Here each is an error, except what the architecture itself says can be missing, and tied weights.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from reward.errors import Failure, InputError

if TYPE_CHECKING:
    from peft import PeftModel

SAFETENSORS = "model.safetensors"
NAMED, LONGEST_REASON = 3, 500  # tensors that an error names, and characters of what a library said


def load_whole(
    kind: Any,
    path: str,
    *,
    name: str,
    key: str,
    device: torch.device | None = None,
    new_head: bool = False,
    **arguments: Any,
) -> PreTrainedModel:
    """A model by `kind.from_pretrained`, from safetensors unless it is a GGUF file.

    Args:
        name, key: what the user calls the model, and the recipe key that names it, for messages.
        device: where its weights go straight from the file, without a copy in the host's memory; default: the CPU.
        new_head: whether only the tensors below the head have to be the file's.

    Raises `InputError` for what cannot be loaded, and for tensors that are missing, left over, of another shape, or not
    finite.
    """
    if "gguf_file" not in arguments:
        arguments["use_safetensors"] = True
        refuse_without_safetensors(Path(path), name, key)
    with loading(name, key):
        if (config := arguments.get("config")) is not None:
            check_config(config, name, key)
        # To the CPU weights come without a map, which `save_pretrained` would take for offloading; a quantiser takes
        # a GPU by default.
        if device is not None and (device.type != "cpu" or "quantization_config" in arguments):
            arguments["device_map"] = {"": device}
        model, found = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **arguments)
    shapes = (f"{tensor} of {tuple(there)} for {tuple(here)}" for tensor, there, here in found["mismatched_keys"])
    own = f"{model.base_model_prefix}." if new_head else ""
    missing, extra = ([n for n in found[keys] if n.startswith(own)] for keys in ("missing_keys", "unexpected_keys"))
    _refuse(name, key, missing, extra, shapes)
    refuse_not_finite(model.named_parameters(), name, key)
    use_published_attention(model)
    return model


def refuse_without_safetensors(folder: Path, name: str, key: str) -> None:
    """Raise `InputError` for a folder whose weights are not under the names that are looked for, and say what is there.

    Pickles (`.bin`, `.pt`) can run code when they are read, and are not.
    """
    files = {file.name for file in folder.iterdir()} if folder.is_dir() else set[str]()
    if not files or files & {SAFETENSORS, f"{SAFETENSORS}.index.json"}:
        return
    others = sorted(file for file in files if file.endswith(".safetensors"))
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth")) and "training_args" not in file)
    fix = "save the model again with save_pretrained"
    if len(others) == 1:
        fix = f"rename {others[0]} to {SAFETENSORS} if its tensors have transformers' names"
    elif others:
        fix = f"add the index that belongs to {others[0]} and the others, {SAFETENSORS}.index.json"
    elif pickles:
        fix = f"{pickles[0]} is a pickle; load it once with transformers and save it with save_pretrained"
    message = f"{key}: {name!r} has no {SAFETENSORS}"
    raise InputError(message, kind="missing", key=key, file=folder / SAFETENSORS, fix=fix)


def use_published_attention(model: PreTrainedModel) -> None:
    """Attend by `eager` where the config caps the attention's logits: sdpa has no place for a cap and drops it."""
    config = model.config.get_text_config(decoder=True)
    caps = [value for key, value in config.to_dict().items() if "attn_logit" in key and "cap" in key and value]
    if caps and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def load_adapter_whole(model: PreTrainedModel, adapter: str, key: str = "model") -> PeftModel:
    """A PEFT adapter of any make on a model. Raises `InputError` as `load_whole` does."""
    from peft import PeftModel, get_peft_model_state_dict  # PEFT takes a second to import
    from peft.utils.save_and_load import load_peft_weights

    with loading(adapter, key), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing tensors, which are an error below
        loaded = PeftModel.from_pretrained(model, adapter)
        said = load_peft_weights(adapter, device="cpu")
    own = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    # Embeddings that were trained beside the adapter are the model's own tensors.
    extra = said.keys() - own.keys() - loaded.state_dict().keys()
    whole = (f"{name} of {said[name].dtype}" for name in said.keys() & own.keys() if _counts(said[name], own[name]))
    _refuse(adapter, key, own.keys() - said.keys(), extra, whole)
    refuse_not_finite(said.items(), adapter, key)
    return loaded


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], name: str, key: str | None = None) -> None:
    """Raise `InputError` for tensors with a NaN or an infinite value; `name` and `key` as in `load_whole`."""
    # The extremes tell, since NaN is both of them; `isfinite` would make a mask of the size of the tensor.
    wrong = [
        each for each, tensor in tensors if _has_values(tensor) and not all(x.isfinite() for x in tensor.aminmax())
    ]
    if wrong:
        message = f"{len(wrong)} tensors of {name!r} hold values that are not finite ({_first(sorted(wrong))})"
        raise InputError(
            message if key is None else f"{key}: {message}",
            kind="not_finite",
            key=key,
            file=name,
            fix="the file is damaged, or of a training that diverged: take an earlier one",
        )


def _counts(found: Tensor, expected: Tensor) -> bool:
    """Whether there are whole numbers in place of real ones, which rounding has left."""
    return expected.is_floating_point() and not found.is_floating_point()


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds real numbers here: no quantised ones, none that are elsewhere."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() > 0 and not tensor.is_meta


def check_config(config: PretrainedConfig, name: str, key: str) -> None:
    """Raise `InputError` for a config that says what no model can be, or a quantisation that would be left out."""
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and (not isinstance(positions, int) or positions < 1):
        raise InputError(
            f"{key}: {name!r} has max_position_embeddings {positions!r} in its config; it is a number from 1",
            kind="invalid",
            key=key,
            file=name,
        )
    said = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if isinstance(said, Mapping) and not AutoHfQuantizer.supports_quant_method(dict(said)):
        raise InputError(
            f"{key}: {name!r} is quantised by {said.get('quant_method')!r}, which transformers does not know",
            kind="unknown",
            key=key,
            file=name,
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> None:
    """Raise `InputError` for a tokenizer that writes ids which the model has no embedding for.

    A padding token beyond them is replaced: masks come from lengths, so that any token can fill padding.
    """
    embeddings = model.get_input_embeddings()
    rows = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
    if rows is None:
        return
    if isinstance(pad := tokenizer.pad_token_id, int) and pad >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    beyond = [(token, i) for token, i in tokenizer.get_vocab().items() if i >= rows and token != tokenizer.pad_token]
    if beyond and (tokenizer.vocab_size > rows or any(i in tokenizer.all_special_ids for _, i in beyond)):
        token, number = min(beyond, key=lambda pair: pair[1])
        raise InputError(
            f"{key}: the tokenizer of {name!r} has the token {token!r} with id {number}, the model has {rows} ids",
            kind="conflict",
            key=key,
            file=name,
        )


@contextmanager
def loading(name: str, key: str) -> Iterator[None]:
    """Turn whatever a library raises over a model's files into one `InputError`, and keep its warnings quiet."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (Failure, torch.OutOfMemoryError):
        raise
    except Exception as error:  # configs and weights are anybody's: there is no end of what they can break
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, LookupError | AttributeError):  # its text is a name, and says not of what
            reason = f"{type(error).__name__}: {reason}"
        if "trust_remote_code=True" in reason:  # transformers has no class for it
            setting = "backbone.trust_remote_code: true" if key == "model" else "trust_remote_code: true beside it"
            message = f"{key}: {name!r} comes with Python code of its own, which is not run unasked"
            fix = f"if you trust it, set {setting}"
            raise InputError(message, kind="conflict", key=key, file=name, fix=fix) from error
        if len(reason) > LONGEST_REASON:  # transformers lists all that it knows
            reason = f"{reason[:LONGEST_REASON]} …"
        raise InputError(f"{key}: could not load {name!r}: {reason}", kind="unreadable", key=key, file=name) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _refuse(name: str, key: str, missing: Iterable[str], extra: Iterable[str], mismatched: Iterable[str] = ()) -> None:
    """Raise `InputError` where any tensor is not as the config says."""
    groups = {"missing": missing, "unexpected": extra, "of another shape or type": mismatched}
    wrong = [f"{len(names)} {what} ({_first(names)})" for what, each in groups.items() if (names := sorted(each))]
    if wrong:
        raise InputError(
            f"{key}: the weights of {name!r} are not those that its config describes: {', '.join(wrong)}",
            kind="unreadable",
            key=key,
            file=name,
            fix="use the files as they were saved, with the config that belongs to them",
        )


def _first(names: list[str]) -> str:
    return ", ".join([*itertools.islice(names, NAMED), *(["…"] if len(names) > NAMED else [])])
