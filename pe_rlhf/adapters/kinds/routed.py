"""A LoRA with a part for each of several tasks, of which a prompt's task takes its own mixture.

    y = W0 x + s·B·(k ∘ A x)        A: the shared part's rows, then those of each task; B: likewise, columns

k depends on the task of the token's row: with fixed weights it is a row of a matrix, with learned weights a softmax of
trained logits over the parts. The shared part has 1. Where a pass is of one task, what is computed is a plain LoRA of
the parts whose weight is not 0: the one that this task exports to. Without tasks it is a LoRA.

The policy of all tasks is made by `continual: {method: joint, route: …}`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pe_rlhf.adapters.kind import LayerContext, Layers
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors, RoleState
from pe_rlhf.adapters.lora.anchored import (
    AnchoredLoRA,
    LoRA,
    add_low,
    add_product,
    anchored_tensors,
    scale_of,
    writable,
)
from pe_rlhf.adapters.lora.init_registry import InitContext
from pe_rlhf.config.adapter import AdapterConfig, LoRAConfig, LowRankConfig
from pe_rlhf.config.continual import RouteConfig
from reward.errors import InputError

LOGITS = "route_logits_TT"


N = TypeVar("N")


class RoutedConfig(LoRAConfig, RouteConfig):
    """A LoRA with a part for each task, made by `continual: {route: …}`."""

    tasks: list[str] = Field(
        default_factory=list, description="names of the tasks, as the prompts' column `source` has them"
    )

    @property
    def routes(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    @property
    def whole_rank(self) -> int:
        """The rank of all parts together."""
        return self.shared_rank + self.rank * len(self.tasks) if self.tasks else self.rank

    @model_validator(mode="after")
    def _values_fit(self) -> RoutedConfig:
        if self.tasks:
            self.refuse_misfits("adapter", self.tasks, self.rank)
        return self

    def gates_TP(self, layer: str) -> Tensor:
        """The fixed weight of every rank-one part for each task, in a layer of that name."""
        own_TTR = torch.tensor([[self._weight(task, part, layer) for part in self.tasks] for task in self.tasks])
        return torch.cat([torch.ones(len(self.tasks), self.shared_rank), own_TTR.flatten(1)], dim=1)

    def _weight(self, task: str, part: str, layer: str) -> list[float]:
        weight = self.values.get(task, {task: 1.0}).get(part, 0.0)
        if isinstance(weight, dict):
            weight = number_at(weight, layer)
        return weight if isinstance(weight, list) else [weight] * self.rank


def number_at(numbers: Mapping[str, N], layer: str) -> N | float:
    """What the first pattern has that fits a layer's name; 0 where none does."""
    return next((number for pattern, number in numbers.items() if re.search(pattern, layer)), 0.0)


def check_patterns(patterns: Iterable[str], layers: Collection[str], key: str) -> None:
    """Raise `InputError` for a pattern that is no regular expression, or that no layer's name has."""
    for pattern in patterns:
        try:
            if any(re.search(pattern, layer) for layer in layers):
                continue
        except re.error as error:
            message = f"{key}: {pattern!r} is no regular expression: {error}"
            raise InputError(message, kind="invalid", key=key) from error
        message = f"{key}: {pattern!r} fits the name of no layer with an adapter; one is {next(iter(layers))}"
        raise InputError(message, kind="unknown", key=key)


class RoutedLoRA(AnchoredLoRA):
    """`lora_A` _PI and `lora_B` _OP of all parts; with learned weights the logits of each task, trained, too."""

    optional = (*AnchoredLoRA.optional, LOGITS)
    settings: RoutedConfig

    def __init__(self, tensors: Mapping[str, Tensor], settings: RoutedConfig) -> None:
        super().__init__(tensors, settings)
        if (logits_TT := getattr(self, LOGITS)) is not None:
            delattr(self, LOGITS)
            self.register_parameter(LOGITS, nn.Parameter(logits_TT))
        self._state = RoleState()
        self._fixed_TP: Tensor | None = None

    def follow(self, state: RoleState) -> None:
        self._state = state

    def fix(self, gates_TP: Tensor) -> None:
        """Set the weights that are not trained."""
        self._fixed_TP = gates_TP.to(self.lora_A.device)

    def gates_TP(self) -> Tensor:
        """The weight of every rank-one part for each task."""
        if self._fixed_TP is not None:
            return self._fixed_TP
        soft_TT = getattr(self, LOGITS).softmax(dim=-1)
        own_TP = soft_TT.repeat_interleave(self.settings.rank, dim=1)
        return torch.cat([own_TP.new_ones(len(soft_TT), self.settings.shared_rank), own_TP], dim=1)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Each token by its own task's weights; where one task is played, a LoRA of its parts."""
        if not self.settings.tasks:
            return super().forward(x, base)
        task, y = self._task(), writable(base(x))
        x = x.to(y.dtype)
        if self.training and self.settings.dropout:
            x = F.dropout(x, self.settings.dropout)
        if isinstance(task, int):
            return add_product(x, y, *self._of_task(task), self.scale)
        gates_P = self.scale * self.gates_TP()[self._fitting(task, x)]
        low = F.linear(x, self.lora_A.to(y.dtype))
        return add_low(y, (low * gates_P).to(y.dtype), self.lora_B)  # multiplied in fp32: bf16 would round the weights

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors | None:
        """Those of the task that is played. Raises `InputError` where none is."""
        if not self.settings.tasks:
            return super().lora_factors()
        if not isinstance(task := self._task(), int):
            raise self._no_task()
        A_RI, B_OR = self._of_task(task)
        return LowRankFactors(A_RI.detach().clone(), B_OR.detach().clone(), self.scale)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        factors = self.lora_factors()
        assert factors is not None
        return factors.scale * (factors.B_OR @ factors.A_RI)

    @torch.no_grad()
    def shared(self) -> LowRankFactors:
        """The part of all tasks; of rank 0 where there is none."""
        rank = self.settings.shared_rank
        return LowRankFactors(self.lora_A[:rank].clone(), self.lora_B[:, :rank].clone(), self.scale)

    @torch.no_grad()
    def without_shared(self, task: int) -> LowRankFactors:
        """What a task has beside the shared part."""
        A_RI, B_OR = self._of_task(task, self.settings.shared_rank)
        return LowRankFactors(A_RI.clone(), B_OR.clone(), self.scale)

    @torch.no_grad()
    def weights_TT(self) -> Tensor:
        """The weight of each task's part for each task: the mean over its rank-one parts."""
        tasks = len(self.settings.tasks)
        return self.gates_TP()[:, self.settings.shared_rank :].view(tasks, tasks, -1).mean(dim=-1)

    def _of_task(self, task: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """A and B, weighted, of the parts that a task has, from the rank-one part `first` on."""
        gates_P = self.gates_TP()[task]
        kept = first + gates_P[first:].nonzero()[:, 0]
        A_RI, B_OR, gates_R = self.lora_A[kept], self.lora_B[:, kept], gates_P[kept]
        return A_RI, B_OR if bool((gates_R == 1).all()) else B_OR * gates_R

    def _task(self) -> int | Tensor:
        if (task := self._state.task) is None:
            raise self._no_task()
        return task

    def _no_task(self) -> InputError:
        return InputError(
            f"the adapter is another one for each task ({', '.join(self.settings.tasks)}), and no task was chosen",
            kind="missing",
            key="task",
            fix="take one task's policy: pe-rlhf export RUN --mix TASK=1",
        )

    @staticmethod
    def _fitting(task: Tensor, x: Tensor) -> Tensor:
        """The tasks, where they are those of the tokens of x. Raises `InputError` for tokens in another order."""
        if x.dim() != 3 or len(task) != len(x) or task.shape[1] not in (1, x.shape[1]):
            raise InputError(
                "the model gives a layer tokens whose rows are not known, as mixtures of experts do",
                kind="conflict",
                key="adapter.targets",
                fix="use targets: attention, or leave these layers out by exclude",
            )
        return task


class Routed(LoRA):
    """LoRA's inits that start at B = 0, for all parts together; each part is a LoRA of the rank in the settings."""

    settings_type: ClassVar[type[AdapterConfig]] = RoutedConfig
    layer: ClassVar[type[AdapterLayer]] = RoutedLoRA
    settings: RoutedConfig

    def __init__(self, settings: LowRankConfig) -> None:
        super().__init__(settings)
        if self.settings.tasks and self.init.needs is not None:
            raise _other_init("would give what it finds in the data to some of the tasks")

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        s = self.settings
        given = (context.weight_OI, s.whole_rank, scale_of(s), context.generator, self._options, context.statistics)
        made = anchored_tensors(*self.init(InitContext(*given)))
        if s.tasks and len(made) > 2:
            raise _other_init("does not start at B = 0, where all tasks are the anchor")
        if s.tasks and s.weights == "learned":
            made[LOGITS] = torch.zeros(len(s.tasks), len(s.tasks), device=context.weight_OI.device)
        return made

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank, tasks = self.settings.whole_rank, len(self.settings.tasks)
        found: dict[str, tuple[int, ...]] = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
        return found | ({LOGITS: (tasks, tasks)} if tasks and self.settings.weights == "learned" else {})

    def share(self, layers: Layers) -> None:
        if self.settings.tasks and self.settings.weights != "learned":
            parts = [part for own in self.settings.values.values() for part in own.values() if isinstance(part, dict)]
            check_patterns([pattern for part in parts for pattern in part], layers, "continual.route.values")
            for name, layer in layers.items():
                layer.fix(self.settings.gates_TP(name))

    def rate(self, name: str) -> float:
        return self.settings.rate if name == LOGITS else super().rate(name)


def _other_init(reason: str) -> InputError:
    message = f"an adapter with a part for each task cannot have an init that {reason}"
    return InputError(message, kind="conflict", key="adapter.init", fix="use another init, such as lora")
