"""functions.py computes what the plain lines compute: values and gradients against those of autograd, in float64."""
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_config

import functions
import lora
from functions import CausalAttention, LinearCrossEntropy, RMSNorm, Rotate
from model import IGNORE


def values_and_gradients(compute, *tensors, grad=None):
    """compute(*tensors) and the gradients of those that require them."""
    tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    y = compute(*tensors)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in tensors)]


def same(compute, plain, *tensors, grad=None):
    ours, theirs = (values_and_gradients(f, *tensors, grad=grad) for f in (compute, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10


def randn(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("frozen", [False, True])
def test_rms_norm(frozen):
    same(lambda x, w: RMSNorm.apply(x, w, 1e-5, torch.float64), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
         randn(3, 5, 6), randn(6, grad=not frozen), grad=randn(3, 5, 6, grad=False))


def test_rotation():
    cos, sin = randn(7, 4, grad=False), randn(7, 4, grad=False)

    def plain(x):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    same(lambda x: Rotate.apply(x, cos, sin), plain, randn(2, 3, 7, 8), grad=randn(2, 3, 7, 8, grad=False))


@pytest.mark.parametrize("cache", [2 ** 21, 100])  # all texts at once, one at a time
@pytest.mark.parametrize("T", [1, 7, 33])
def test_attention(T, cache, monkeypatch):
    monkeypatch.setattr(functions, "CACHE", cache)
    qkv = [randn(3, T, 2, 8).transpose(1, 2) for _ in range(3)]  # as the model's, not contiguous
    same(CausalAttention.apply, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv,
         grad=randn(3, 2, T, 8, grad=False))


def test_attention_in_bfloat16_is_as_exact_as_pytorchs():
    q, k, v, grad = (torch.randn(2, 3, 200, 48) for _ in range(4))

    def plain(*qkv):
        return F.scaled_dot_product_attention(*qkv, is_causal=True)

    def result(compute, dtype):
        qkv = (t.to(dtype).requires_grad_() for t in (q, k, v))
        return values_and_gradients(compute, *qkv, grad=grad.to(dtype))
    exact, theirs = result(plain, torch.float64), result(plain, torch.bfloat16)
    ours = result(CausalAttention.apply, torch.bfloat16)
    for e, t, o in zip(exact, theirs, ours):
        # PyTorch's keeps P and dS in float32 between the products; to round them costs one more rounding
        assert (o - e).abs().mean() < (t - e).abs().mean() + 2 ** -8 * e.abs().mean()


def plain_head(targets, weights, x, w, a=None, b=None):
    logits = x @ w.T + (0 if a is None else a @ b.T)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum()


@pytest.mark.parametrize("sizes", [(2 ** 21, 2 ** 28), (1000, 128 * 300 * 8)])  # one piece; many tiles and row blocks
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("frozen, with_lora", [(False, False), (True, False), (True, True), (False, True)])
def test_head_and_loss(sizes, weighted, frozen, with_lora, monkeypatch):
    monkeypatch.setattr(functions, "CACHE", sizes[0])
    monkeypatch.setattr(functions, "BUFFER", sizes[1])
    N, V = 300, 300
    targets = torch.randint(V, (N,))
    weights = randn(N, grad=False) if weighted else None
    factors = [randn(N, 5), randn(V, 5, grad=not frozen)] + ([randn(N, 2), randn(V, 2)] if with_lora else [])
    same(lambda *f: 0.5 * LinearCrossEntropy.apply(targets, weights, torch.float64, *f),
         lambda *f: 0.5 * plain_head(targets, weights, *f), *factors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_head_and_loss_on_a_gpu(monkeypatch):
    monkeypatch.setattr(functions, "BUFFER", 128 * 300 * 2)  # several row blocks
    targets, w = torch.randint(300, (600,), device="cuda"), torch.rand(600, dtype=torch.float64, device="cuda")
    factors = [t.detach().cuda().requires_grad_() for t in (randn(600, 5), randn(300, 5), randn(600, 2), randn(300, 2))]
    same(lambda *f: LinearCrossEntropy.apply(targets, w, torch.float64, *f), lambda *f: plain_head(targets, w, *f),
         *factors)


def test_head_without_rows_and_with_far_logits():
    w = randn(20, 5)
    empty = torch.empty(0, 5, dtype=torch.float64, requires_grad=True)
    loss, dx, dw = values_and_gradients(
        lambda x, w: LinearCrossEntropy.apply(torch.empty(0, dtype=torch.long), None, torch.float64, x, w), empty, w)
    assert loss == 0 and dx.shape == (0, 5) and (dw == 0).all()
    targets = torch.randint(20, (9,))
    same(lambda *f: LinearCrossEntropy.apply(targets, None, torch.float64, *f),
         lambda *f: plain_head(targets, None, *f), 1000 * randn(9, 5, grad=False).requires_grad_(), w)


def test_what_a_near_certainty_leaves_counts_in_bfloat16():
    w = torch.randn(300, 32).sign()
    targets = torch.randint(300, (200,))
    x = w[targets] / 2  # the target's logit is 16, the others' around 0: its probability about 0.998

    def result(compute, dtype):
        return values_and_gradients(compute, *(t.to(dtype).requires_grad_() for t in (x, w)))
    exact = result(lambda *f: plain_head(targets, None, *f), torch.float64)
    ours = result(lambda *f: LinearCrossEntropy.apply(targets, None, torch.bfloat16, *f), torch.bfloat16)
    for e, o in zip(exact, ours):
        assert (o - e).norm() < 0.01 * e.norm()


def test_a_second_backward_pass_is_refused():
    loss = LinearCrossEntropy.apply(torch.tensor([1]), None, torch.float64, randn(1, 4), randn(3, 4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


CONFIGS = {"small": {}, "grouped": {"n_head": 4, "n_kv_head": 2}, "untied": {"tie_embeddings": False}}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("targets", [None, ["lm_head", "q_proj"], ["q_proj", "gate_proj"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_learns_as_with_the_plain_lines(changes, targets, dtype, monkeypatch):
    """The same loss and gradients: exactly in float32, to rounding under autocast."""
    model = random_model(tiny_config(300, **changes), scale=0.03)
    if targets:
        lora.add(model, targets, 4, 8)
        for module in lora.adapters(model).values():
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    x = torch.randint(300, (3, 40))
    y = x.roll(-1, 1)
    y[0, :10] = y[1, 25:] = IGNORE
    weights = torch.rand(3, 40)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(x, y, weights)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
    ours = gradients()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the plain lines
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(ours, gradients(), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
