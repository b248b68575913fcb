import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pe_rlhf.algo.logprobs import CHUNK, GPU_LOGITS, pieces_of, token_logprobs
from tests.pairwise import every_pair

N, H, V = 37, 16, 101


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(H, V)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    return hidden_NH, head.to(dtype), torch.randint(V, (N,), generator=generator)


def plain(hidden_NH: Tensor, head: Callable[[Tensor], Tensor], tokens_N: Tensor, temperature: float) -> Tensor:
    """The definition, over complete logits."""
    return torch.log_softmax(head(hidden_NH).float() / temperature, -1)[torch.arange(len(tokens_N)), tokens_N]


@every_pair(temperature=(1.0, 0.7, 2.5), pieces=(None, 1, 5, N, N + 3), train_head=(False, True))
def test_values_and_gradients_equal_log_softmax_over_complete_logits(
    temperature: float, pieces: int | None, train_head: bool
) -> None:
    hidden_NH, head, tokens_N = example()
    weights_N = torch.linspace(-1, 2, N)  # what a loss would put on the tokens
    logprobs_N, _ = token_logprobs(hidden_NH, head, tokens_N, temperature, pieces, train_head=train_head)
    expected_N = plain(hidden_NH, head, tokens_N, temperature)
    torch.testing.assert_close(logprobs_N, expected_N, atol=1e-5, rtol=1e-6)
    (gradient_NH,) = torch.autograd.grad((weights_N * logprobs_N).sum(), hidden_NH)
    (expected_NH,) = torch.autograd.grad((weights_N * expected_N).sum(), hidden_NH)
    torch.testing.assert_close(gradient_NH, expected_NH, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_equal_those_of_torch_distributions(temperature: float) -> None:
    hidden_NH, head, tokens_N = example()
    _, entropies_N = token_logprobs(hidden_NH, head, tokens_N, temperature, pieces=5)
    expected_N = torch.distributions.Categorical(logits=head(hidden_NH) / temperature).entropy()
    torch.testing.assert_close(entropies_N, expected_N, atol=1e-5, rtol=1e-5)
    assert not entropies_N.requires_grad


def test_the_head_gets_no_gradient() -> None:
    hidden_NH, head, tokens_N = example()
    token_logprobs(hidden_NH, head, tokens_N)[0].sum().backward()
    assert hidden_NH.grad is not None
    assert head.weight.grad is None


@pytest.mark.parametrize("pieces", [None, 1, 5, N, N + 3])
def test_a_trained_head_gets_its_gradient(pieces: int | None) -> None:
    hidden_NH, head, tokens_N = example()
    weights_N = torch.linspace(-1, 2, N)
    logprobs_N, entropies_N = token_logprobs(hidden_NH, head, tokens_N, 0.7, pieces, train_head=True)
    found = torch.autograd.grad((weights_N * logprobs_N).sum(), list(head.parameters()))
    expected_N = plain(hidden_NH, head, tokens_N, 0.7)
    expected = torch.autograd.grad((weights_N * expected_N).sum(), list(head.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    expected_N = torch.distributions.Categorical(logits=head(hidden_NH) / 0.7).entropy()
    torch.testing.assert_close(entropies_N, expected_N.detach(), atol=1e-5, rtol=1e-5)
    assert not entropies_N.requires_grad


def test_bf16_hidden_states() -> None:
    hidden_NH, head, tokens_N = example(torch.bfloat16)
    logprobs_N, entropies_N = token_logprobs(hidden_NH, head, tokens_N, pieces=5)
    expected_N = plain(hidden_NH, head, tokens_N, 1.0)
    assert logprobs_N.dtype == entropies_N.dtype == torch.float32
    # Both round the logits to bf16 and nothing after them.
    torch.testing.assert_close(logprobs_N, expected_N, atol=1e-5, rtol=1e-6)
    (gradient_NH,) = torch.autograd.grad(logprobs_N.sum(), hidden_NH)
    (expected_NH,) = torch.autograd.grad(expected_N.sum(), hidden_NH)
    assert gradient_NH.dtype == torch.bfloat16
    torch.testing.assert_close(gradient_NH, expected_NH, atol=2e-2, rtol=2e-2)


def test_without_gradients_nothing_is_recorded() -> None:
    hidden_NH, head, tokens_N = example()
    with torch.no_grad():
        logprobs_N, _ = token_logprobs(hidden_NH.detach(), head, tokens_N, pieces=5)
    assert logprobs_N.grad_fn is None
    torch.testing.assert_close(logprobs_N, plain(hidden_NH, head, tokens_N, 1.0).detach(), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("pieces", [1, 5, N + 3])
def test_the_head_is_called_once_for_each_piece(pieces: int) -> None:
    """Also for empty ones: where ranks gather the head's weight together, each has to call it equally often."""
    hidden_NH, head, tokens_N = example()
    calls: list[int] = []
    head.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    token_logprobs(hidden_NH, head, tokens_N, pieces=pieces)[0].sum().backward()
    assert (len(calls), sum(calls)) == (pieces, N)


def test_pieces_are_of_a_chunk_at_most() -> None:
    assert [pieces_of(n) for n in (0, 1, CHUNK, CHUNK + 1, 3 * CHUNK)] == [1, 1, 1, 2, 3]
    # On a GPU as many tokens as have logits of half a GiB: 2^29 / (4·2^17) = 1,024; of any vocabulary a chunk at least.
    assert GPU_LOGITS == 2**29
    assert [pieces_of(n, 2**17, "cuda") for n in (1, 1024, 1025, 3072)] == [1, 1, 2, 3]
    assert [pieces_of(n, 2**25, "cuda:1") for n in (CHUNK, CHUNK + 1)] == [1, 2]
    assert [pieces_of(1024, *where) for where in ((2**17, "cpu"), (0, "cuda"))] == [1024 // CHUNK] * 2


def test_no_tokens_at_all() -> None:
    hidden_NH, head, tokens_N = example()
    logprobs_N, entropies_N = token_logprobs(hidden_NH[:0], head, tokens_N[:0])
    assert logprobs_N.shape == entropies_N.shape == (0,)


class Saved:
    """A tensor that autograd keeps, in a wrapper whose death can be seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_sizes(run: Callable[[], Tensor], weight: Tensor) -> tuple[int, int]:
    """Elements of the tensors that autograd saves during a call: of the largest, and of all still held afterwards.

    The head's own weight does not count: it is there anyway.
    """
    records: list[tuple[int, weakref.ref[Saved]]] = []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            records.append((tensor.numel(), weakref.ref(saved)))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = run()
    held = sum(size for size, alive in records if alive() is not None)
    assert result.requires_grad
    return max(size for size, _ in records), held


def test_no_logits_of_all_tokens_are_ever_saved_and_none_are_held_for_backward() -> None:
    hidden_NH, head, tokens_N = example()
    largest, held = saved_sizes(lambda: token_logprobs(hidden_NH, head, tokens_N, pieces=10)[0], head.weight)
    assert largest <= max(4 * V, N * H)
    assert held == N * H
    # The measure itself: the plain form does hold them.
    assert saved_sizes(lambda: plain(hidden_NH, head, tokens_N, 1.0), head.weight)[1] >= N * V
