"""Every init against an independent dense computation: numpy, brute-force gradients of plain models, PEFT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from scipy.optimize import minimize
from torch import Tensor, nn

from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics
from pe_rlhf.adapters.lora.init_registry import INITS, InitContext, get_init, init_of, register_init
from pe_rlhf.adapters.lora.inits.corda import damped_inverse
from pe_rlhf.adapters.lora.inits.cross_task import shared_directions
from pe_rlhf.config import LoRAConfig
from pe_rlhf.config.adapter import INIT_OPTIONS, parse_options
from pe_rlhf.model.backbone import load_backbone
from reward.errors import InputError
from tests.failures import raises
from tests.tiny import ALL_INITS, tiny_model
from tests.unit.adapters.first_steps import best_cosine, cosine, first_update, matrix

SHAPES = [(24, 24), (40, 16), (16, 40)]


def run(
    init: str,
    weight_OI: Tensor,
    rank: int,
    statistics: LayerStatistics | None = None,
    scale: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    registered, parsed = init_of(LoRAConfig(init=init, init_options=options))
    generator = torch.Generator().manual_seed(0)
    return registered(InitContext(weight_OI, rank, scale, generator, parsed, statistics or LayerStatistics()))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_is_orthonormal_on_both_sides(shape: tuple[int, int]) -> None:
    A, B = run("orthogonal", matrix(shape), 5)
    torch.testing.assert_close(A @ A.T, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.eye(5), atol=1e-5, rtol=0)


def test_orthogonal_directions_have_either_sign() -> None:
    """QR by Householder reflections gives the first entry of each first column the same sign, whatever was drawn."""
    registered = get_init("orthogonal")
    drawn = [
        registered(InitContext(torch.zeros(12, 10), 2, 1.0, torch.Generator().manual_seed(seed))) for seed in range(60)
    ]
    for first_entries in ([float(A[0, 0]) for A, _ in drawn], [float(B[0, 0]) for _, B in drawn]):
        assert 15 <= sum(entry > 0 for entry in first_entries) <= 45  # 30 ± 4 standard deviations


def test_gaussian_has_variance_one_over_r_or_the_given_deviation() -> None:
    A, B = run("gaussian", torch.zeros(8, 1000), 25)
    assert float(A.var()) == pytest.approx(1 / 25, rel=0.03)
    assert abs(float(A.mean())) < 0.01
    assert not B.any()
    A, _ = run("gaussian", torch.zeros(8, 1000), 25, std=1 / 25)
    assert float(A.std()) == pytest.approx(1 / 25, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_qr_of_numpy_and_that_of_peft(shape: tuple[int, int]) -> None:
    weight_OI = matrix(shape)
    A, B = run("olora", weight_OI, 4)
    Q, R = np.linalg.qr(weight_OI.double().numpy())
    np.testing.assert_allclose((B @ A).numpy(), Q[:, :4] @ R[:4], atol=1e-5)
    np.testing.assert_allclose((B.T @ B).numpy(), np.eye(4), atol=1e-5)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data.copy_(weight_OI)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=["0"])
    named = dict(get_peft_model(nn.Sequential(linear), config).named_parameters())  # type: ignore[arg-type]
    torch.testing.assert_close(A, named["base_model.model.0.lora_A.default.weight"].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(B, named["base_model.model.0.lora_B.default.weight"].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("init", "part"), [("rlpo", slice(0, 4)), ("rlmo", slice(12, 16))])
def test_rlpo_and_rlmo_take_right_singular_vectors(shape: tuple[int, int], init: str, part: slice) -> None:
    weight_OI = matrix(shape)
    A, B = run(init, weight_OI, 4)
    _, S, Vh = np.linalg.svd(weight_OI.double().numpy(), full_matrices=False)
    chosen = Vh[part] if len(S) == 16 or init == "rlpo" else Vh[-4:]
    np.testing.assert_allclose(np.abs(chosen @ A.double().numpy().T), np.eye(4), atol=1e-4)
    assert not B.any()


def test_pissa_with_power_iterations_comes_close_to_the_exact_one() -> None:
    decaying = matrix((60, 80)) @ torch.diag(0.8 ** torch.arange(80.0))
    exact, fast = run("pissa", decaying, 4), run("pissa", decaying, 4, niter=4)
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], atol=1e-3, rtol=1e-3)
    again = run("pissa", decaying, 4, niter=4)
    assert torch.equal(fast[0], again[0])


# ---- LoRA-GA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("direction", "for_A", "for_B"),
    [("ArB2r", [0, 1, 2], [3, 4, 5]), ("A2rBr", [3, 4, 5], [0, 1, 2]), ("ArBr", [1, 3, 5], [0, 2, 4])],
)
def test_lora_ga_takes_the_authors_singular_vectors(
    shape: tuple[int, int], direction: str, for_A: list[int], for_B: list[int]
) -> None:
    G = matrix(shape, 9)
    A, B = run("lora_ga", matrix(shape), 3, LayerStatistics((G,)), direction=direction, gamma=9.0)
    U, _, Vh = np.linalg.svd(G.double().numpy(), full_matrices=False)
    factor = shape[0] ** 0.25 / 3  # m^¼/√γ
    np.testing.assert_allclose(np.abs(Vh[for_A] @ A.double().numpy().T), factor * np.eye(3), atol=1e-4)
    np.testing.assert_allclose(np.abs(U[:, for_B].T @ B.double().numpy()), factor * np.eye(3), atol=1e-4)


def test_lora_ga_scales() -> None:
    G, W = matrix((24, 16), 9), matrix((24, 16))
    S = np.linalg.svd(W.numpy(), compute_uv=False)
    expected = {"unit": 1.0, "gd": 1 / 4, "weightS": float(np.sqrt(S[:2] / 4).mean()), "stable": 24**0.25 / 4}
    for scale, factor in expected.items():
        _, options = init_of(LoRAConfig(init="lora_ga", init_options={"scale": scale}))
        context = InitContext(W, 2, 4.0, torch.Generator().manual_seed(0), options, LayerStatistics((G,)))
        A, B = get_init("lora_ga")(context)
        torch.testing.assert_close(A @ A.T, factor**2 * torch.eye(2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(B.T @ B, factor**2 * torch.eye(2), atol=1e-4, rtol=1e-4)


def test_lora_ga_random_splits_the_first_2r_directions() -> None:
    G = matrix((24, 24), 9)
    A, B = run("lora_ga", matrix((24, 24)), 3, LayerStatistics((G,)), direction="random")
    assert cosine(first_update(A, B, G), G) == pytest.approx(best_cosine(G, 6), abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r(shape: tuple[int, int], rank: int) -> None:
    G = matrix(shape, 9) @ torch.diag(0.9 ** torch.arange(float(shape[1])))
    A, B = run("lora_ga", matrix(shape), rank, LayerStatistics((G,)))
    assert cosine(first_update(A, B, G), G) == pytest.approx(best_cosine(G, 2 * rank), abs=1e-4)


def first_step_of_peft(G: Tensor, rank: int) -> Tensor:
    linear = nn.Linear(G.shape[1], G.shape[0], bias=False)
    linear._peft_loraga_grad = G  # type: ignore[assignment]  # where PEFT's own preparation leaves it
    settings: Any = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    named = dict(
        get_peft_model(nn.Sequential(linear), LoraConfig(r=rank, target_modules=["0"], **settings)).named_parameters()
    )  # type: ignore[arg-type]
    A, B = (named[f"base_model.model.0.lora_{part}.default.weight"].detach() for part in "AB")
    return first_update(A, B, G)


def test_lora_ga_of_peft_depends_on_the_size_of_the_gradient() -> None:
    """It has the singular values in B and scales only B: B counts for nothing where G is small, A where large."""
    U, _ = torch.linalg.qr(matrix((64, 64), 1))
    V, _ = torch.linalg.qr(matrix((48, 48), 2))
    unit = U[:, :48] @ torch.diag(0.7 ** torch.arange(48.0)) @ V.T
    weight_OI = matrix((64, 48), 4)
    for size, of_peft in ((1e-3, best_cosine(unit, 4)), (1e3, 0.3)):
        G = size * unit
        ours = cosine(first_update(*run("lora_ga", weight_OI, 4, LayerStatistics((G,))), G), G)
        assert ours == pytest.approx(best_cosine(unit, 8), abs=1e-4)
        theirs = cosine(first_step_of_peft(G, 4), G)
        assert theirs < of_peft + 1e-3 < ours, (size, theirs)


def test_lora_ga_where_a_layer_has_fewer_than_2r_directions() -> None:
    G = matrix((16, 40), 9)
    A, B = run("lora_ga", matrix((16, 40)), 12, LayerStatistics((G,)))
    assert (A.shape, B.shape) == ((12, 40), (16, 12))
    with raises("conflict", key="adapter.rank"):
        run("lora_ga", matrix((16, 40)), 17, LayerStatistics((G,)))


# ---- inits of inputs ------------------------------------------------------------------------------------------------


def moments(X: Tensor) -> LayerStatistics:
    return LayerStatistics(inputs=InputMoments(X.T @ X / len(X), X.mean(dim=0), len(X)))


@pytest.mark.parametrize("center", [False, True])
def test_eva_is_the_svd_of_the_inputs(center: bool) -> None:
    X = matrix((200, 16)) @ torch.diag(0.8 ** torch.arange(16.0)) + 0.5
    A, B = run("eva", matrix((24, 16)), 3, moments(X), center=center)
    data = X.double().numpy()
    _, _, Vh = np.linalg.svd(data - data.mean(axis=0) if center else data, full_matrices=False)
    np.testing.assert_allclose(np.abs(Vh[:3] @ A.double().numpy().T), np.eye(3), atol=1e-3)
    assert not B.any()


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_is_the_dense_computation_of_its_paper(mode: str) -> None:
    weight_OI = matrix((24, 16))
    X = matrix((200, 16), 5) @ torch.diag(0.9 ** torch.arange(16.0))
    A, B = run("corda", weight_OI, 3, moments(X), 2.0, mode=mode)
    C = X.double().numpy().T @ X.double().numpy() / 200
    C += 0.01 * np.diag(C).mean() * np.eye(16)
    U, S, Vh = np.linalg.svd(weight_OI.double().numpy() @ C, full_matrices=False)
    part = slice(0, 3) if mode == "ipm" else slice(13, 16)
    expected = (U[:, part] * S[part]) @ Vh[part] @ np.linalg.inv(C)
    np.testing.assert_allclose((2.0 * B @ A).numpy(), expected, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose((B.T @ B).numpy(), np.diag(S[part]) / 2.0, atol=1e-3)


def test_corda_of_full_rank_is_the_weight_and_its_damping_grows_until_it_inverts() -> None:
    weight_OI = matrix((24, 16))
    A, B = run("corda", weight_OI, 16, moments(matrix((200, 16), 5)), 0.5, mode="ipm")
    torch.testing.assert_close(0.5 * B @ A, weight_OI, atol=1e-3, rtol=0)
    X = matrix((8, 16), 5)  # fewer inputs than features: singular
    damped, inverse = damped_inverse(X.T @ X / 8, 0.0)
    assert float(torch.dist(damped @ inverse, torch.eye(16))) < 0.05


# ---- cross-task -----------------------------------------------------------------------------------------------------


def test_cross_task_maximises_what_two_gradients_share() -> None:
    G1, G2 = matrix((12, 10), 1), matrix((12, 10), 1) + 0.5 * matrix((12, 10), 2)
    _, options = init_of(LoRAConfig(init="cross_task", init_options={"scale": "unit"}))
    context = InitContext(matrix((12, 10)), 3, 1.0, torch.Generator(), options, LayerStatistics((G1, G2)))
    A, B = get_init("cross_task")(context)
    for found, M in ((B, G1 @ G2.T), (A.T, G1.T @ G2)):
        torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)
        reached = float(torch.trace(found.T @ M @ found))
        eigenvalues = np.linalg.eigvalsh(((M + M.T) / 2).double().numpy())
        assert reached == pytest.approx(eigenvalues[-3:].sum(), rel=1e-4)  # Ky Fan's bound
        for seed in range(20):
            other, _ = torch.linalg.qr(matrix((len(M), 3), seed))
            assert float(torch.trace(other.T @ M @ other)) < reached


def test_the_diversity_term_is_maximised_by_the_closed_form() -> None:
    M = matrix((6, 6), 4)
    symmetric = ((M + M.T) / 2).double().numpy()
    largest = np.abs(np.linalg.eigvalsh(symmetric)).max()
    delta, rank = 0.3, 2

    def negative(flat: np.ndarray) -> float:
        B = flat.reshape(6, rank)
        B = B * np.sqrt(rank / (B**2).sum())
        return float(-np.trace(B.T @ symmetric @ B) / largest - delta * np.linalg.slogdet(B.T @ B)[1])

    found = shared_directions(M, rank, delta).double().numpy()
    assert (found**2).sum() == pytest.approx(rank, rel=1e-6)
    starts = np.random.default_rng(0)
    best = min(minimize(negative, starts.normal(size=6 * rank)).fun for _ in range(8))
    assert negative(found.ravel()) == pytest.approx(best, abs=1e-5)
    orthonormal = shared_directions(M, rank, None)
    torch.testing.assert_close(shared_directions(M, rank, 1e6), orthonormal, atol=1e-4, rtol=0)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [name for name in ALL_INITS if get_init(name).needs not in (None, "original weight")])
def test_an_init_that_reads_data_says_what_is_missing(init: str) -> None:
    backbone = load_backbone(tiny_model("llama"))
    for statistics, key in ((None, "adapter.init"), ({}, "statistics")):
        with pytest.raises(InputError) as caught:
            backbone.add_adapter("policy", init=init, rank=2, statistics=statistics)
        assert (caught.value.kind, caught.value.key) == ("missing", key)
    assert backbone.roles == ["anchor"]


@pytest.mark.parametrize(("factor", "kind"), [(0.0, "empty"), (math.inf, "not_finite")])
def test_gradients_given_by_hand_and_bad_ones(factor: float, kind: str) -> None:
    G = matrix((24, 16), 9)
    A, _ = run("lora_ga", matrix((24, 16)), 2, LayerStatistics((G,)))
    assert A.shape == (2, 16)
    with pytest.raises(InputError) as caught:
        run("lora_ga", matrix((24, 16)), 2, LayerStatistics((factor * G,)))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("init", "options", "kind", "key", "fix"),
    [
        ("pissa", {"nitre": 3}, "unknown", "nitre", "did you mean 'niter'?"),
        ("lora", {"niter": 3}, "unknown", "niter", None),
        ("lora_ga", {"gamma": -1}, "invalid", "gamma", None),
    ],
)
def test_options_that_an_init_does_not_have(
    init: str, options: dict[str, Any], kind: str, key: str, fix: str | None
) -> None:
    with pytest.raises(InputError) as caught:
        parse_options(init, INIT_OPTIONS[init], options)
    assert (caught.value.kind, caught.value.key, caught.value.fix) == (kind, f"adapter.init_options.{key}", fix)
    with pytest.raises(InputError) as caught:
        load_backbone(tiny_model("llama")).add_adapter("policy", init=init, init_options=options)
    assert caught.value.key == "adapter.init_options"


@pytest.mark.parametrize(("factor", "kind"), [(torch.ones(24, 16), "user_code"), (torch.inf, "not_finite")])
def test_an_init_that_gives_unusable_factors_is_refused(
    monkeypatch: pytest.MonkeyPatch, factor: Any, kind: str
) -> None:
    for name, registry in (("INITS", INITS), ("INIT_OPTIONS", INIT_OPTIONS)):
        monkeypatch.setattr(f"pe_rlhf.adapters.lora.init_registry.{name}", dict(registry))
    A, B = (factor, factor) if isinstance(factor, Tensor) else (torch.full((2, 16), factor), torch.zeros(24, 2))
    register_init("wrong_for_a_test", lambda context: (A, B))
    with pytest.raises(InputError) as caught:
        run("wrong_for_a_test", matrix((24, 16)), 2)
    assert caught.value.kind == kind
