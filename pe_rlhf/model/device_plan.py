"""What a recipe leaves to the device: defaults by device, and whether the run fits into its memory.

Defaults that differ on a GPU are in `GPU_DEFAULTS`; a key that the recipe sets stays as it is. They are resolved once,
when a run starts, and `recipe.yaml` in its folder has them; a run that is resumed keeps its own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.algo.logprobs import CHUNK
from pe_rlhf.config import TASK_STAGES, PPOConfig, Recipe, RewardConfig, SamplingConfig
from pe_rlhf.config.load import load_deepspeed_config
from pe_rlhf.model.memory_plan import (
    ADAPTER_STATES,
    CONTEXT,
    ENGINE,
    GIB,
    HEAD_CHUNK,
    SLACK,
    WIDTH,
    ModelShape,
    Phase,
    model_shape,
    tokens_that_fit,
    weight_bytes,
)
from pe_rlhf.system.processes import launched
from reward.errors import InputError
from reward.judges.judge_settings import JudgeSettings

GPU_DEFAULTS: dict[str, Any] = {
    "backbone.dtype": "bfloat16",
    "preferences.sampling.batch_size": 256,
    "preferences.judge.dtype": "bfloat16",
    "ppo.rollout.batch_size": 256,
    "evaluate.sampling.batch_size": 256,
    "evaluate.judge.dtype": "bfloat16",
}
SAMPLERS = {"preferences": "sampling", "ppo": "rollout", "evaluate": "sampling"}
# What vLLM 0.32 runs with LoRA adapters by a class of its own, of the families that are trained most.
FAMILIES_OF_VLLM = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "granite", "phi3")
SMALLEST_FOR_VLLM = 10**8  # parameters; smaller models have sampled before an engine has started
# By what the card has left beside weights and states.
BY_MEMORY = ("reward.micro_batch_tokens", "ppo.micro_batch_tokens")
FULL_STATES = 4 + 4 + 8  # bytes of a fully tuned weight besides itself: gradient, master, two moments
USUAL_PROMPT = 512  # tokens of a prompt where the recipe has no limit


def settle(recipe: Recipe, saved: Recipe | None = None, *, fetch: bool = False) -> Recipe:
    """The recipe with every default that depends on the device: those of the `saved` recipe where there is one.

    What depends on the model's shape is left at the CPU's default where the model is not here yet, unless `fetch`.
    """
    settled = recipe.model_copy(deep=True)
    on_gpu = is_on_gpu(recipe)
    for key, value in GPU_DEFAULTS.items():
        _set_unless_given(settled, key, value if on_gpu else None, saved)
    shape = shape_of_recipe(settled, fetch=fetch) if on_gpu and saved is None and has_vllm() else None
    for stage, section in SAMPLERS.items():
        engine = "vllm" if shape is not None and _suits_vllm(settled, shape, stage) else None
        _set_unless_given(settled, f"{stage}.{section}.engine", engine, saved)
    for key in BY_MEMORY:
        if on_gpu and saved is None and not _is_given(settled, key):
            shape = shape or shape_of_recipe(settled, fetch=fetch)
            if shape is not None:
                room = SLACK * device_bytes(settled) - _beside_activations(settled, shape)
                _set_unless_given(settled, key, max(1024, tokens_that_fit(shape, settled.backbone, room)), None)
        else:
            _set_unless_given(settled, key, None, saved)
    for number, task in enumerate(settled.tasks or []):
        own = settle(recipe.task_recipe(number), fetch=fetch)
        for stage in TASK_STAGES:
            setattr(task, stage, getattr(own, stage))
    return settled


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _suits_vllm(recipe: Recipe, shape: ModelShape, stage: str) -> bool:
    """Whether an embedded vLLM is the engine that a stage takes where the recipe names none.

    It holds the policy as a LoRA, beside the trainer, and its weights in the machine's memory while it sleeps.
    """
    layer = kind_of(recipe.adapter_for("ppo")).layer
    is_lora = recipe.tuning == "adapter" and layer.lora_factors is not AdapterLayer.lora_factors
    is_lora = is_lora and all(len(layer) == 2 for layer in shape.linears)  # vLLM gets fused experts as merged weights
    is_whole = recipe.backbone.quantization == "none" and not is_zero3(recipe)
    is_known = shape.family in FAMILIES_OF_VLLM and shape.parameters >= SMALLEST_FOR_VLLM
    sampling = getattr(getattr(recipe, stage), SAMPLERS[stage], None)
    if sampling is None or sampling.sync == "merged" or not (is_lora and is_whole and is_known):
        return False
    weights = weight_bytes(shape, recipe.backbone)
    trainer = max(weights + CONTEXT, _beside_activations(recipe, shape))
    fits = trainer + weights + ENGINE + CONTEXT <= SLACK * device_bytes(recipe)  # and a cache of a context's size
    return fits and weights * _ranks() <= psutil.virtual_memory().total / 2


def is_on_gpu(recipe: Recipe) -> bool:
    device = recipe.backbone.device
    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def device_bytes(recipe: Recipe) -> float:
    """Memory of the device that the recipe names: of the card, or of the machine."""
    return float(torch.cuda.mem_get_info()[1] if is_on_gpu(recipe) else psutil.virtual_memory().total)


def shape_of_recipe(recipe: Recipe, *, fetch: bool = False) -> ModelShape | None:
    return model_shape(recipe.model, recipe.backbone, recipe.adapter, fetch=fetch)


def memory_phases(recipe: Recipe, shape: ModelShape, ranks: int = 1, *, on_gpu: bool = True) -> Iterator[Phase]:
    """What every stage has in memory on one device, phase by phase.

    ranks: over which ZeRO-3 splits the base; other settings hold the whole base on each device.
    """
    base = {"base": weight_bytes(shape, recipe.backbone, ranks if is_zero3(recipe) else 1)}
    base |= {"context": CONTEXT} if on_gpu else {}
    if recipe.preferences is not None:
        yield Phase("preferences", "sampling", base | _sampling(recipe, shape, recipe.preferences.sampling))
        if judge := _judge(recipe, recipe.preferences.judge):
            yield Phase("preferences", "judging", base | judge)
    if (reward := recipe.reward) is not None:
        members = 1 if reward.ensemble is None else reward.ensemble.members
        roles = {"reward role": members * _role_bytes(recipe, shape, "reward")}
        noisy = _noisy_base(recipe, shape, reward)
        yield Phase("reward", "update", base | noisy | roles | _activations(recipe, shape, reward))
    if (ppo := recipe.ppo) is not None:
        name = "policy and value" if ppo.has_critic else "policy"
        own = recipe.reward.ensemble.members if recipe.reward is not None and recipe.reward.ensemble else 5
        rewards = sum(own if source.ensemble else source.adapter is not None for source in ppo.reward)
        frozen = rewards * 4 * shape.adapter(recipe.adapter_for("ppo"))
        roles = {name: _role_bytes(recipe, shape, "ppo"), "reward adapters": frozen}
        yield Phase("ppo", "sampling", base | roles | _sampling(recipe, shape, ppo.rollout, ppo.max_prompt_tokens))
        logits = {"logits": HEAD_CHUNK if on_gpu else 4 * 4 * CHUNK * shape.vocabulary}
        noisy = _noisy_base(recipe, shape, ppo)
        yield Phase("ppo", "update", base | noisy | roles | logits | _activations(recipe, shape, ppo))
        asked = [source.judge for source in ppo.reward if source.judge is not None]
        asked += [recipe.evaluate.judge] if ppo.eval_every and recipe.evaluate else []
        for judge in filter(None, (_judge(recipe, settings) for settings in asked)):
            yield Phase("ppo", "judging", base | roles | judge)
    if recipe.evaluate is not None:
        yield Phase("evaluate", "sampling", base | _sampling(recipe, shape, recipe.evaluate.sampling))
        if judge := _judge(recipe, recipe.evaluate.judge):
            yield Phase("evaluate", "judging", base | judge)


def reserved_bytes(recipe: Recipe, stage: str, sampling: SamplingConfig) -> float:
    """What a stage's roles need of a GPU while an embedded vLLM is on it, the base and its copies included; else 0."""
    if sampling.engine == "hf" or sampling.mode == "server" or not is_on_gpu(recipe):
        return 0.0
    if (shape := shape_of_recipe(recipe)) is None:
        return 0.0
    phases = memory_phases(recipe, shape, _ranks())
    parts = next(phase.parts for phase in phases if (phase.stage, phase.name) == (stage, "sampling"))
    return sum(size for name, size in parts.items() if name not in ("engine", "cache", "logits"))


def plan_lines(recipe: Recipe, stages: list[str], ranks: int = 1) -> list[str]:
    """The plan of some stages for people, one line a phase, or one that says that there is none."""
    if (shape := shape_of_recipe(recipe)) is None:
        return ["memory: no plan, since the model is not on this machine yet or its config does not say its shape"]
    on_gpu, room = is_on_gpu(recipe), device_bytes(recipe)
    where = "card" if on_gpu else "machine"
    lines = [f"memory (estimated; the {where} has {room / GIB:.1f} GiB):"]
    for phase in memory_phases(recipe, shape, ranks, on_gpu=on_gpu):
        if phase.stage in stages:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in phase.parts.items())
            lines.append(f"  {phase.stage} {phase.name}: {phase.total / GIB:.2f} GiB ({parts})")
    return lines


def refuse_impossible(recipe: Recipe, ranks: int = 1, room: float | None = None) -> None:
    """Raise `InputError` for a run that cannot fit on its GPU, with the numbers and the nearest that does.

    room: bytes of the card; default: those of this machine's. A CPU's memory can be swapped: nothing is refused.
    """
    if room is None and not is_on_gpu(recipe):
        return
    room = device_bytes(recipe) if room is None else room
    if (shape := shape_of_recipe(recipe)) is None:
        return
    for phase in memory_phases(recipe, shape, ranks):
        # Prompts are shorter than they may be: a cache that might not fit is no reason to refuse.
        if phase.total - phase.parts.get("cache", 0.0) <= room:
            continue
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in phase.parts.items())
        activations = phase.parts.get("activations", 0.0)
        fitting = tokens_that_fit(shape, recipe.backbone, SLACK * room - (phase.total - activations))
        key, fix = "backbone", "use backbone.quantization: 4bit, deepspeed: zero3 on more GPUs, or a smaller model"
        if activations and fitting:
            key = f"{phase.stage}.micro_batch_tokens"
            fix = f"set {key}: {fitting}, or backbone.gradient_checkpointing: true"
        elif "judge" in phase.parts:
            key, fix = f"{phase.stage}.judge", "use a judge behind a server (base_url), or a smaller one"
        elif "engine" in phase.parts:
            key, fix = phase.stage, "use vLLM servers on other cards (mode: server), or engine: hf"
        raise InputError(
            f"{phase.stage} {phase.name} needs about {phase.total / GIB:.1f} GiB ({parts}), the card has"
            f" {room / GIB:.1f}",
            kind="memory",
            key=key,
            fix=fix,
        )


def _beside_activations(recipe: Recipe, shape: ModelShape) -> float:
    """The most that an update has in memory besides its activations."""
    updates = [phase for phase in memory_phases(recipe, shape, _ranks()) if "activations" in phase.parts]
    return max((phase.total - phase.parts["activations"] for phase in updates), default=0.0)


def _noisy_base(recipe: Recipe, shape: ModelShape, config: RewardConfig | PPOConfig) -> dict[str, float]:
    """The copy of the base that has noise on it (`optimizer.noise_on: model`)."""
    return {"noisy base": weight_bytes(shape, recipe.backbone)} if config.optimizer.noises_base else {}


def _activations(recipe: Recipe, shape: ModelShape, config: RewardConfig | PPOConfig) -> dict[str, float]:
    width, checkpointing = WIDTH[recipe.backbone.dtype], recipe.backbone.gradient_checkpointing
    return {"activations": config.micro_batch_tokens * shape.kept_of_a_token(width, checkpointing=checkpointing)}


def _sampling(
    recipe: Recipe, shape: ModelShape, sampling: SamplingConfig, longest_prompt: int = USUAL_PROMPT
) -> dict[str, float]:
    """The KV cache, the logits of a token of each response, and an embedded engine's own copy of the weights."""
    width = WIDTH[recipe.backbone.dtype]
    cache = sampling.batch_size * (longest_prompt + sampling.max_new_tokens) * shape.cache_of_a_token(width)
    if sampling.engine == "hf":
        # transformers' cache grows by copies of a layer; the sampler makes fp32 probabilities of all logits.
        return {"cache": cache * (1 + 1 / shape.layers), "logits": 4 * 4 * sampling.batch_size * shape.vocabulary}
    if sampling.mode == "server":
        return {}
    return {"engine": shape.parameters * width / sampling.tensor_parallel_size + ENGINE, "cache": cache}


def _judge(recipe: Recipe, judge: JudgeSettings) -> dict[str, float]:
    """The chat models of a judge, which are on the card while it judges; nothing for those behind a server."""
    kind, _, target = judge.kind.partition(":")
    size = 0.0
    for one in judge.judges if kind == "jury" else []:
        size += _judge(recipe, one).get("judge", 0.0)
    name = target or judge.target
    if kind == "llm" and name and not judge.base_url:
        shape = model_shape(name, recipe.backbone, recipe.adapter)
        size = shape.parameters * WIDTH[judge.dtype] if shape is not None else 0.0
        size += ENGINE if judge.engine == "vllm" else 0.0
    return {"judge": size} if size else {}


def _role_bytes(recipe: Recipe, shape: ModelShape, stage: str) -> float:
    """The roles that a stage trains (one of an ensemble): weights, gradients and optimizer states."""
    adapters = recipe.adapters_of(stage)
    if recipe.tuning == "full":
        return len(adapters) * shape.parameters * (WIDTH[recipe.backbone.dtype] + FULL_STATES)
    return ADAPTER_STATES * sum(map(shape.adapter, adapters))


def is_zero3(recipe: Recipe) -> bool:
    """Whether the run splits the base, so that no rank has it whole."""
    if recipe.deepspeed is None:
        return False
    return load_deepspeed_config(recipe.deepspeed).get("zero_optimization", {}).get("stage") == 3


def _ranks() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def _is_given(recipe: Recipe, key: str) -> bool:
    """Whether the recipe sets a key, or has no section for it."""
    *above, last = key.split(".")
    node: Any = recipe
    for name in above:
        if (node := getattr(node, name)) is None:
            return True
    return last in node.model_fields_set


def _set_unless_given(recipe: Recipe, key: str, value: Any, saved: Recipe | None) -> None:
    """Set a key that the recipe leaves out, to the saved recipe's value where there is one."""
    if _is_given(recipe, key):
        return
    *above, last = key.split(".")
    node: Any = recipe
    other: Any = saved
    for name in above:
        node, other = getattr(node, name), getattr(other, name, None)
    if other is not None:
        value = getattr(other, last)
    if value is not None:
        setattr(node, last, value)
