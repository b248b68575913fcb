"""`shira` and `rosa`: a sparse change of the weight, by itself and beside a LoRA."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.layer_statistics import LayerStatistics
from pe_rlhf.adapters.sparse import PATTERN
from reward.errors import InputError
from tests.unit.adapters.dense import IN, OUT, base_layer, check_all, gradients, inputs, made, perturbed, settings

DENSITY = 0.1
COUNT = round(DENSITY * OUT * IN)
ROSA: dict[str, Any] = {"density": DENSITY, "rank": 3, "alpha": 4.5}


def mask_by_hand(statistics: LayerStatistics, count: int) -> list[tuple[int, int]]:
    """The places of the greatest sums of squares, found one by one, in the order of rows."""
    score = sum(g.double().numpy() ** 2 for g in statistics.gradients_OI)
    order = sorted(((score[o, i], o, i) for o in range(OUT) for i in range(IN)), reverse=True)  # type: ignore[index]
    return sorted((o, i) for _, o, i in order[:count])


def sparse(tensors: dict[str, Tensor], statistics: LayerStatistics) -> Tensor:
    rows, columns = (list(places) for places in zip(*mask_by_hand(statistics, COUNT), strict=True))
    return torch.zeros(OUT, IN, dtype=torch.double).index_put(
        (torch.tensor(rows), torch.tensor(columns)), tensors["values"]
    )


def rosa_delta(tensors: dict[str, Tensor], statistics: LayerStatistics) -> Tensor:
    delta = 1.5 * tensors["lora_B"] @ tensors["lora_A"] + sparse(tensors, statistics)
    if "initial_B_OR" in tensors:
        delta = delta - 1.5 * tensors["initial_B_OR"] @ tensors["initial_A_RI"]
    return delta


@pytest.mark.parametrize("batches", [1, 2])
def test_shira_is_a_dense_matrix_that_is_zero_outside_the_mask(batches: int) -> None:
    statistics = gradients(batches)
    check_all("shira", lambda tensors: sparse(tensors, statistics), statistics, density=DENSITY)


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_rosa_is_a_lora_and_a_sparse_matrix(init: str) -> None:
    check_all("rosa", lambda tensors: rosa_delta(tensors, gradients()), gradients(), init=init, **ROSA)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("name", ["shira", "rosa"])
def test_the_mask_is_the_top_of_the_accumulated_squared_gradients(name: str, batches: int) -> None:
    statistics = gradients(batches)
    _, layer = made(base_layer(), name, statistics, **(ROSA if name == "rosa" else {"density": DENSITY}))
    with torch.no_grad():
        layer.values.fill_(1.0)
    assert layer.sparse_change().nonzero().tolist() == [list(place) for place in mask_by_hand(statistics, COUNT)]


@pytest.mark.parametrize("density", [1e-9, 1.0])
def test_from_one_entry_to_all_of_them(density: float) -> None:
    base = base_layer()
    _, layer = made(base, "shira", gradients(), density=density)
    assert len(layer.values) == (1 if density < 1 else OUT * IN)
    perturbed(layer)
    expected = base(inputs()) + inputs() @ layer.delta_weight(base.weight).T
    torch.testing.assert_close(layer(inputs(), base), expected, atol=1e-5, rtol=1e-5)


def test_what_a_pass_keeps_and_makes_follows_the_density() -> None:
    """Nothing as large as the weight is made in either pass, and what is kept beside x is P long, or a side."""
    base = torch.nn.Linear(600, 500).requires_grad_(False)
    _, layer = made(base, "shira", LayerStatistics((torch.randn(500, 600),)), density=0.01)
    largest: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.layout == torch.strided:
                largest.append(found.numel())
            return found

    x = torch.randn(4, 600, requires_grad=True)
    kept: list[Tensor] = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x, base).sum().backward()
    assert len(largest) > 10
    assert max(n for n in largest if n != base.weight.numel()) <= 3000
    assert sum(n == base.weight.numel() for n in largest) <= 2  # the base's own weight, transposed, in its two passes
    own = {base.weight.data_ptr(), x.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) < 5 * 3000


def test_places_are_whole_numbers_that_no_change_of_dtype_rounds() -> None:
    _, layer = made(base_layer(), "shira", gradients(), density=DENSITY)
    layer.to(torch.bfloat16)
    assert all(layer.get_buffer(name).dtype == torch.int32 for name in PATTERN)


@pytest.mark.parametrize(
    ("statistics", "kind"),
    [
        (LayerStatistics(), "missing"),
        (LayerStatistics((torch.zeros(OUT, IN),)), "empty"),
        (LayerStatistics((torch.full((OUT, IN), torch.nan),)), "not_finite"),
    ],
)
def test_a_gradient_that_cannot_choose_is_refused(statistics: LayerStatistics, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        made(base_layer(), "shira", statistics)
    assert caught.value.kind == kind


def test_rosa_takes_inits_that_read_gradients_and_refuses_those_that_read_inputs() -> None:
    assert kind_of(settings("rosa")).needs == "gradient"
    assert kind_of(settings("rosa", init="cross_task")).needs == "two gradients"
    sized = settings("rosa", init="lora_ga", init_options={"batch_size": 3})
    assert kind_of(sized).batch_size == 3
    with pytest.raises(InputError) as caught:
        kind_of(settings("rosa", init="eva"))
    assert (caught.value.kind, caught.value.key) == ("conflict", "adapter.init")


def test_the_sparse_part_of_rosa_may_learn_faster() -> None:
    kind = kind_of(settings("rosa", sparse_rate=3.0))
    assert [kind.rate(name) for name in ("values", "lora_A", "lora_B")] == [3.0, 1.0, 1.0]
