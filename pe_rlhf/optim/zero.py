"""The DeepSpeed half of the optimizer: processes, ZeRO for one role, the base split by ZeRO-3.

The one file that imports DeepSpeed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from transformers import PreTrainedModel

from pe_rlhf.adapters.kind import Restart
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.loading import find_device, use_sound_attention
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.optim.adamw import MASTER, MOMENTS, RESTARTS, adamw, flatten, is_wide, pull, set_rate, unflatten
from pe_rlhf.system.distributed import make_whole, split_again
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.processes import accelerator_environment, launched
from reward.errors import InputError

# A rank may wait for hours while rank 0 asks a judge; one that has died is noticed by its closed connection. For the
# first contact and for gradients nobody has a reason to be late.
LONGEST_WAIT, USUAL_WAIT = timedelta(days=7), timedelta(minutes=30)


class ZeRO:
    """AdamW in a DeepSpeed engine, which splits its state over the ranks and keeps it where the configuration says.

    The engine trains one flat copy of the parameters, made when it is first needed: a run that goes on sets the
    parameters before that. It gets the gradient, which is complete already, through the loss ⟨copy, gradient⟩: a way in
    that every ZeRO stage supports.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: OptimizerConfig,
        deepspeed: dict[str, Any],
        starts: Mapping[str, Tensor],
    ) -> None:
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._config, self._deepspeed = config, deepspeed
        self._starts = starts if config.weight_decay else {}

    @cached_property
    def _copy(self) -> nn.Parameter:
        return nn.Parameter(flatten(self._parameters).float())

    @cached_property
    def _engine(self) -> Any:
        engine, *_ = import_deepspeed().initialize(
            model=nn.ParameterList([self._copy]),
            optimizer=adamw([self._copy], self._config),
            config=_role_config(self._deepspeed, self._copy.numel()),
        )
        return engine

    def step(self, rate: float, correction: float = 1.0) -> None:
        """A step of AdamW with the moments' part, but not the decay, times `correction`."""
        if self._starts:
            self._pull(rate * self._config.weight_decay)
        self._step(rate, flatten([p.grad for p in self._parameters if p.grad is not None]).float(), correction)
        for parameter, value in zip(self._parameters, unflatten(self._copy.detach(), self._parameters), strict=True):
            parameter.data.copy_(value)

    def take_over(self) -> None:
        """Go on from the parameters as they are now, which were written to."""
        self._set_whole(flatten(self._parameters).float())

    def restart(self, what: Restart) -> None:
        """Start the moments again from zero, all of them with their step count, or the momentum only."""
        for name in RESTARTS[what]:
            if name in MOMENTS:
                self._set_moment(name, torch.zeros_like(self._moment(name)))
            else:
                for state in self._adamw.state.values():
                    state[name].zero_()

    def state(self, copy: bool) -> dict[str, Tensor]:
        tensors = {}
        for kind in (*MOMENTS, MASTER):
            parts = unflatten(self._copy if kind == MASTER else self._moment(kind), self._parameters)
            for name, parameter, part in zip(self._names, self._parameters, parts, strict=True):
                if kind != MASTER or not is_wide(parameter):
                    tensors[f"{name}/{kind}"] = part.detach().to("cpu", copy=copy).contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        # Before the engine is made, which may keep a copy of its own: what the parameters were rounded from.
        for name, own in zip(self._names, unflatten(self._copy.data, self._parameters), strict=True):
            if (master := tensors.get(f"{name}/{MASTER}")) is not None:
                own.copy_(master)
        # The state exists from the first step on: one with rate 0 and gradient 0 makes it and changes no weight.
        self._step(0.0, torch.zeros_like(self._copy))
        for moment in MOMENTS:
            self._set_moment(moment, flatten([tensors[f"{name}/{moment}"] for name in self._names]))
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """The optimizer inside ZeRO's, or the engine's own where there is no ZeRO."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _step(self, rate: float, gradient: Tensor, correction: float = 1.0) -> None:
        set_rate(self._engine.optimizer.param_groups[0], rate, self._config.weight_decay, correction)
        self._engine.backward((self._copy * gradient).sum())
        self._engine.step()

    def _pull(self, share: float) -> None:
        """`adamw.pull` on the copy, and on the whole of what ZeRO keeps of it."""
        zero = {n: torch.zeros_like(p) for n, p in zip(self._names, self._parameters, strict=True)}
        start = flatten([self._starts.get(name, zero[name]) for name in self._names]).float()
        _ = self._engine
        whole = self._copy.detach()
        if hasattr(self._copy, "_hp_mapping"):
            whole = import_deepspeed().utils.safe_get_full_fp32_param(self._copy)
        whole = whole.clone()
        pull(whole, start.to(whole.device), share)
        self._set_whole(whole)

    def _set_whole(self, value: Tensor) -> None:
        """Set the copy, and the whole of what ZeRO keeps of it; every rank calls this."""
        self._copy.data.copy_(value)
        if hasattr(self._copy, "_hp_mapping"):
            import_deepspeed().utils.safe_set_full_fp32_param(self._copy, value.to(self._copy.device))

    def _moment(self, moment: str) -> Tensor:
        """The whole moment, flat; every rank calls this."""
        if not hasattr(self._copy, "_hp_mapping"):
            return self._adamw.state[self._copy][moment]
        return import_deepspeed().utils.safe_get_full_optimizer_state(self._copy, moment)

    def _set_moment(self, moment: str, value: Tensor) -> None:
        if not hasattr(self._copy, "_hp_mapping"):
            self._adamw.state[self._copy][moment].copy_(value)
        else:
            import_deepspeed().utils.safe_set_full_optimizer_state(self._copy, value.to(self._copy.device), moment)


def import_deepspeed() -> Any:
    # Its engines, and later each gathering of ZeRO-3, ask for LOCAL_RANK, which no launcher has set for one process.
    for name, value in {"LOCAL_RANK": "0", **accelerator_environment()}.items():
        os.environ.setdefault(name, value)
    try:
        import deepspeed
    except ImportError as error:
        raise TrainingError(
            "training on several processes needs DeepSpeed",
            kind="not_installed",
            fix="pip install 'pe-rlhf[deepspeed]'",
        ) from error
    # Its own reduction for CPUs, which nothing here asks for, is compiled at the first start, under a lock file that
    # stays when the process is killed: every later start would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_processes(wants_deepspeed: bool, device: str = "auto", timeout: float | None = None) -> None:
    """Join the other processes, where a launcher has started this one; otherwise be a group of one for DeepSpeed.

    device: the recipe's `backbone.device`; `cuda:K` becomes the current GPU of the one process.
    timeout: seconds that a process waits for another, in place of `LONGEST_WAIT` and `USUAL_WAIT`. Where one is late,
    gloo raises a `RuntimeError` (`distributed.late_rank`), and NCCL's watchdog ends the process.
    """
    if device.startswith("cuda:"):
        _take_gpu(device)
    elif launched() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if torch.distributed.is_initialized() or not (launched() or wants_deepspeed):
        return
    # gloo carries what lies on the CPU (counts, texts, experience), whatever the weights are on.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())  # the GPU that DeepSpeed computes on
    if launched():
        long, usual = (timedelta(seconds=timeout),) * 2 if timeout else (LONGEST_WAIT, USUAL_WAIT)
        store, rank, size = next(rendezvous("env://", timeout=usual))
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=long)
        if torch.cuda.is_available():  # as torch's own _set_pg_timeout, which would set gloo's, too
            group = torch.distributed.distributed_c10d._get_default_group()
            group._get_backend(torch.device("cuda"))._set_default_timeout(usual)
    else:
        store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented all the same
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    import_deepspeed().init_distributed(verbose=False)


def _take_gpu(device: str) -> None:
    """Make `cuda:K` the GPU of this process, also for what asks for the current one: seeds, memory, DeepSpeed."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise InputError(
            f"backbone.device: {device} is one GPU, and each of {processes} processes needs its own",
            kind="conflict",
            key="backbone.device",
            fix="leave it out: a process takes the GPU of its rank; CUDA_VISIBLE_DEVICES says which GPUs there are",
        )
    if torch.cuda.is_available():  # `find_device` refuses it otherwise
        torch.cuda.set_device(find_device(device))


def shard_base(model: PreTrainedModel, deepspeed: dict[str, Any], device: torch.device) -> None:
    """Split a frozen base on the CPU over the ranks by ZeRO-3, with its parts on `device`.

    While it is split, one layer at a time is whole. A pass gathers each layer's weights, ahead of the layer once a pass
    with a gradient was recorded.
    """
    config = {**_common(deepspeed), "zero_optimization": dict(deepspeed.get("zero_optimization", {}))}
    config["zero_optimization"].pop("offload_optimizer", None)
    # By default it gathers some mixtures' blocks as one, with all modules in them: adapters are not its weights.
    config["zero_optimization"].setdefault("leaf_module", {"classes": []})
    library = import_deepspeed()
    for module in model.modules():
        if own := list(module.parameters(recurse=False)):
            for parameter in own:
                # A copy: DeepSpeed writes into it, and would make a page of memory of each page of the file.
                parameter.data = parameter.data.to(device, copy=True)
            library.zero.Init(module=nn.ParameterList(own), config_dict_or_path=config)
    for buffer in model.buffers():  # DeepSpeed leaves them where they are
        buffer.data = buffer.data.to(device)
    if device.type == "cuda":
        use_sound_attention()  # the model was not there yet when the backbone was made
    _gather_ahead(model, library, config)


def _gather_ahead(model: PreTrainedModel, library: Any, config: dict[str, Any]) -> None:
    """Let DeepSpeed gather the weights of a base for its passes.

    DeepSpeed fetches ahead along the order of modules that it has recorded from one forward pass of its root to the
    next. Our passes call the decoder, and the head once or not at all: so the decoder is the root, and the head gathers
    its own weights. Passes without a gradient are the first half of those with one, and end with their last layer.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    assert isinstance(head, nn.Module)  # that there is one was checked
    inside = {id(parameter) for part in (decoder, head) for parameter in part.parameters()}
    if any(id(parameter) not in inside for parameter in model.parameters()):
        library.initialize(model=model, config=config)
        return
    engine, *_ = library.initialize(model=decoder, config=config)
    coordinator = engine.optimizer.get_param_coordinator()
    for parameter in decoder.parameters():
        parameter.in_flight = decoder.ds_inflight_param_registry  # type: ignore[attr-defined]  # see `gathered`

    def end_pass(*_: Any) -> None:
        if not torch.is_grad_enabled():
            coordinator.reset_step()

    decoder.register_forward_hook(end_pass)
    if head is decoder:
        return
    gathered: list[list[Any]] = []

    def gather(*_: Any) -> None:
        gathered.append(make_whole(head))

    def part(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        parts = gathered.pop()
        if not logits.requires_grad:  # with a gradient the backward pass reads the weights once more: they stay whole
            split_again(parts)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(part)


def _role_config(deepspeed: dict[str, Any], size: int) -> dict[str, Any]:
    """ZeRO-3 shards the base; a role's own weights are whole on each rank, with their states split as in ZeRO-2."""
    zero = dict(deepspeed.get("zero_optimization", {}))
    zero["stage"] = min(2, zero.get("stage", 0))
    zero = {key: value for key, value in zero.items() if not key.startswith(("stage3", "offload_param"))}
    if zero["stage"] == 0:
        zero.pop("offload_optimizer", None)
    else:
        # Its own default are 2 GB of fp32 for each role. DeepSpeed wants an even number.
        size += size % 2
        zero = {"reduce_bucket_size": size, "allgather_bucket_size": size} | zero
    return {**_common(deepspeed), "zero_optimization": zero}


def _common(deepspeed: dict[str, Any]) -> dict[str, Any]:
    own = {"optimizer", "scheduler", "train_batch_size", "gradient_clipping", "bf16", "fp16"}
    return {key: value for key, value in deepspeed.items() if key not in own} | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # gradients come clipped; DeepSpeed's own default may clip them once more
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
