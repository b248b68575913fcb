"""Full gradients of frozen weights, and moments of layers' inputs, for the inits that need them.

The base needs no gradient of its own for this. The gradient of a layer's weight is the product of two things that a
backward pass has in hand at that layer, its inputs X and the gradient dY of its outputs: G_OI = Σ_tokens dY·Xᵀ. Hooks
take both, the init makes its factors of G at once, and G is gone before the next layer's turn. So beyond what the
forward pass keeps, one layer's gradient is held at a time.

That works where the batch is one forward pass. Where it takes several, G is a sum over them, and all passes are run
for one group of layers after the other; a group's gradients together have at most a sixteenth of the model's weights
(or it is one layer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics, Need
from reward.errors import InputError

GROUPS = 16


@dataclass(frozen=True)
class Probe:
    """One forward pass of the batch that an init looks at.

    Attributes:
        loss: runs the pass and returns this part of the loss; the parts of all probes add up to it.
        mask_BT: True at real tokens, in the rows of that pass.
        batch_B: which of the init's batches (or tasks), 0 or 1, each row belongs to.
        sample_B: which sample each row belongs to, where that is not simply the row: a pair has two.
    """

    loss: Callable[[], Tensor]
    mask_BT: Tensor
    batch_B: Tensor
    sample_B: Tensor | None = None


See = Callable[[str, Tensor, Tensor], None]


@contextmanager
def watched(layers: Mapping[str, nn.Module], see: See, *, backward: bool = True) -> Iterator[Counter[str]]:
    """Within the block, `see(name, x, dy)` is called at each pass through a layer; yields how many are still to come.

    x are the layer's inputs and dy the gradient of its outputs, as the layer has them. Without `backward` it is called
    in the forward pass, and dy is x.
    """
    open_passes: Counter[str] = Counter()

    def on_forward(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if not backward:
                see(name, x, x)
                return
            if not output.requires_grad:
                output.requires_grad_()  # nothing below needs a gradient: the backward pass ends here
            open_passes[name] += 1

            def on_backward(dy: Tensor) -> None:
                open_passes[name] -= 1
                see(name, x, dy)

            output.register_hook(on_backward)

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(on_forward(name)).remove)
        yield open_passes


class ProbedStatistics:
    """Statistics from real passes through the model: what the stages give `add_adapter` (a `StatisticsSource`).

    Args:
        layers: gives the frozen module of a layer by name.
        probes: gives the passes; it is called when, and if, an init wants statistics.

    The base must play no role while this runs: the gradient is taken at the anchor. The passes are of padded rows: a
    backbone's own functions pack them unless its `packing` is False.
    """

    def __init__(self, layers: Callable[[str], nn.Module], probes: Callable[[Need], Sequence[Probe]]) -> None:
        self._layers, self.probes = layers, probes

    def visit(self, modules: Sequence[str], need: Need, take: Callable[[str, LayerStatistics], None]) -> None:
        """Hand over each layer's statistics. On the CPU, the same bits every time."""
        probes = self.probes(need)
        layers = {name: self._layers(name) for name in modules}
        in_one_pass = len(probes) == 1
        for group in [layers] if in_one_pass else _groups(layers, need):
            visit = _visit_inputs if need == "inputs" else _visit_gradients
            visit(group, probes, need, take, in_one_pass)


Take = Callable[[str, LayerStatistics], None]


def _visit_gradients(
    layers: Mapping[str, nn.Module], probes: Sequence[Probe], need: Need, take: Take, at_once: bool
) -> None:
    """Run the passes and hand over the layers' gradients: `at_once` inside the one backward pass, else at the end."""
    batches = 2 if need == "two gradients" else 1
    sums: dict[str, list[Tensor]] = {}
    done: set[str] = set()
    probe = probes[0]

    def see(name: str, x: Tensor, dy: Tensor) -> None:
        if batches > 1:
            x, dy = by_rows(name, x, probe.mask_BT), by_rows(name, dy, probe.mask_BT)
        rows = [probe.batch_B == batch if batches > 1 else None for batch in range(batches)]
        found = [weight_gradient(x, dy, part) for part in rows]
        sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found
        if at_once and not open_passes[name]:
            finish(name)

    def finish(name: str) -> None:
        if name not in sums:
            raise InputError(
                f"the loss does not depend on the layer {name}: there is no gradient to start it from",
                kind="conflict",
                key="adapter.init",
                fix="leave it out by adapter.exclude",
            )
        take(name, LayerStatistics(tuple(sums.pop(name))))
        done.add(name)

    with watched(layers, see) as open_passes, torch.enable_grad():
        for probe in probes:
            probe.loss().backward()
            open_passes.clear()  # a pass whose output the loss does not use is never closed
    for name in layers:
        if name not in done:
            finish(name)


def weight_gradient(x: Tensor, dy: Tensor, rows: Tensor | None = None) -> Tensor:
    """G_OI = Σ dY·Xᵀ over all tokens, or those of some rows of the batch; fp32. Padding has no part in it: dY is 0."""
    if rows is not None:
        x, dy = x[rows.to(x.device)], dy[rows.to(dy.device)]
    return dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()


def by_rows(name: str, x: Tensor, mask_BT: Tensor) -> Tensor:
    """A layer's inputs or outputs as _BTI: OPT and many experts see all tokens one after the other.

    Raises `InputError` for a layer that sees only some of the tokens.
    """
    if x.shape[:-1].numel() != mask_BT.numel():
        raise InputError(
            f"the layer {name} does not see its inputs row by row, which this init needs",
            kind="conflict",
            key="adapter.init",
            fix="leave it out by adapter.exclude",
        )
    return x.reshape(*mask_BT.shape, -1)


def _visit_inputs(
    layers: Mapping[str, nn.Module], probes: Sequence[Probe], need: Need, take: Take, at_once: bool
) -> None:
    """Run the passes and hand over moments of the layers' inputs: `at_once` inside the one pass, else at the end."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    probe = probes[0]

    def see(name: str, x: Tensor, _: Tensor) -> None:
        second, first, count = input_sums(name, x, probe.mask_BT)
        before = sums.get(name)
        sums[name] = (before[0] + second, before[1] + first, before[2] + count) if before else (second, first, count)
        if at_once:
            finish(name)

    def finish(name: str) -> None:
        second_II, first_I, count = sums.pop(name)
        take(name, LayerStatistics(inputs=InputMoments(second_II / count, first_I / count, count)))

    with watched(layers, see, backward=False), torch.no_grad():
        for probe in probes:
            probe.loss()
    for name in list(sums):
        finish(name)


def input_sums(name: str, x: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, int]:
    """Σ x·xᵀ, Σ x and the number of a layer's inputs at real tokens; fp32."""
    real_NI = by_rows(name, x, mask_BT)[mask_BT.to(x.device)].float()
    return real_NI.T @ real_NI, real_NI.sum(dim=0), len(real_NI)


def _groups(layers: Mapping[str, nn.Module], need: Need) -> Iterator[dict[str, nn.Module]]:
    """Layers one after the other, in groups whose statistics are at most a sixteenth of all (or that are one layer)."""

    def size(layer: nn.Module) -> int:
        weight: Any = layer.weight
        shape = getattr(weight, "ds_shape", weight.shape)  # of one that ZeRO-3 has split, nothing may be here
        in_features = getattr(layer, "in_features", shape[0])  # GPT-2's Conv1D has no name for it
        return in_features**2 if need == "inputs" else getattr(weight, "ds_numel", weight.numel())

    limit = sum(map(size, layers.values())) / GROUPS
    group: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if group and sum(map(size, group.values())) + size(layer) > limit:
            yield group
            group = {}
        group[name] = layer
    yield group
