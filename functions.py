"""What PyTorch does slowly on a CPU, done faster: functions with a backward pass of their own, in place of plain lines
of model.py and equal to them but for rounding. Head and loss in one serve a GPU, too.

Memory is what a small model waits for. So these read their tensors as few times as they can, convert between float32
and bfloat16 in passes of their own (an operation on both at once is slower than two), work on pieces that fit into the
processor's caches, and use large memory again instead of allocating it, as fresh memory is mapped page by page.
"""
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import Function, once_differentiable

CACHE = 2 ** 21  # numbers that are worked on at once: 4 to 8 MB, about the second-level caches of two cores
BUFFER = 2 ** 28  # bytes of the largest tensor: exp(logits) of so many rows at a time


def on_cpu(x):
    """Is x on a CPU, and the code not being compiled? If not, the plain lines are the faster ones."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def sizes(device):
    """CACHE and BUFFER, for a CPU. A GPU likes large pieces."""
    return (CACHE, BUFFER) if device.type == "cpu" else (2 ** 62, 2 * BUFFER)


def uncompiled(function):
    """A function that torch.compile leaves alone. Its own way to say so, a decorator, takes a second to import."""
    @functools.wraps(function)
    def run(*args):
        return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)
    return run


def precision(x):
    """The type in which matrix products of x are computed: autocast's, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(Function):
    """y = x r w with r = 1 / sqrt(mean(x²) + eps) for each row of x (..., C), w (C,); y is in `dtype`, that of the
    matrix products that read it.

    dx = r (w dy) - x r³ mean(x w dy),   dw = sum over rows of r x dy
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x.dtype))
        r = r.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        dx = dy.to(r.dtype, copy=True, memory_format=torch.contiguous_format)
        rows, x_rows, r = dx.view(-1, x.size(-1)), x.flatten(0, -2), r.flatten(0, -2)  # (N, C), (N, C), (N, 1)
        w = weight.to(r.dtype)
        products = rows * x_rows
        mean = (products @ w).unsqueeze(-1).div_(x.size(-1))  # (N, 1)
        dw = (r.T @ products)[0].to(weight.dtype) if ctx.needs_input_grad[1] else None
        rows.mul_(w).mul_(r).addcmul_(x_rows, mean.mul_(r ** 3), value=-1)
        return dx.to(x.dtype), dw, None, None


class Rotate(Function):
    """Rotary embedding of x (..., T, D) by cos, sin (..., T, D/2). Its gradient is rotated back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = torch.cat((cos, cos), dim=-1).to(x.dtype), sin.to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return Rotate.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return Rotate.rotate(dy, cos, -sin), None, None

    @staticmethod
    def rotate(x, cos, sin):  # cos (..., T, D), sin (..., T, D/2)
        y = x * cos
        (x1, x2), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
        y1.addcmul_(x2, sin, value=-1)
        y2.addcmul_(x1, sin)
        return y


class CausalAttention(Function):
    """scaled_dot_product_attention(q, k, v, is_causal=True) of q, k, v (B, H, T, D). PyTorch's forward pass is fast and
    kept; its backward pass takes seven times as long in bfloat16. Here, with P = softmax(q kᵀ / sqrt(D)) made anew from
    its logsumexp L, which the forward pass gives, and d = sum(y dy) of each row:

    dv = Pᵀ dy,   dS = P (dy vᵀ - d),   dq = dS k / sqrt(D),   dk = dSᵀ q / sqrt(D)

    Pᵀ and dSᵀ are what is computed, since two of three products want them. L and d are subtracted by the products
    themselves: they are columns of q and dy that meet ones in k and v.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, y, lse = ctx.saved_tensors
        B, H, T, D = q.shape
        one = torch.ones_like(k[..., :2])
        q, k = minus(q * D ** -0.5, lse), torch.cat((k, one), dim=-1)  # (B, H, T, D + 2)
        dy, v = minus(dy, (dy * y).sum(-1, dtype=lse.dtype)), torch.cat((v, one), dim=-1)
        dq, dk, dv = (q.new_empty(B, H, T, D) for _ in range(3))
        n = min(B, max(1, 2 * CACHE // (H * T * T)))  # texts at a time
        probs, dscores = scratch((2, n * H, T, T), q.dtype, q.device)
        for i in range(0, B, n):
            q_, k_, v_, dy_, dq_, dk_, dv_ = (t[i:i + n].flatten(0, 1) for t in (q, k, v, dy, dq, dk, dv))
            p = torch.bmm(k_, q_.mT, out=probs[:len(k_)]).exp_().triu_()  # (n H, T keys, T queries)
            ds = torch.bmm(v_, dy_.mT, out=dscores[:len(k_)]).mul_(p)
            torch.bmm(p, dy_[..., :D], out=dv_)
            torch.bmm(ds, q_[..., :D], out=dk_)
            torch.bmm(ds.mT, k_[..., :D], out=dq_)
        return dq.mul_(D ** -0.5), dk, dv


causal_attention = uncompiled(CausalAttention.apply)  # compiled code, too, is faster with it


class LinearCrossEntropy(Function):
    """The head and its loss in one: sum over rows n of weights[n] · cross_entropy(z[n], targets[n]), where the logits
    are z = x Wᵀ, or x Wᵀ + a Bᵀ with a LoRA on the head. factors: x (N, C), W (V, C), and then a (N, r), B (V, r).

    dz = weights · (softmax(z) - onehot(targets)),   dx = dz W,   dW = dzᵀ x

    The loss is a sum, so its gradient is known as soon as the logits are, and nothing of size N x V is kept for the
    backward pass. Rows are taken as many at a time as BUFFER holds; what softmax divides by scales x and dx instead.
    A row's target is kept apart from the others: beside a probability near 1 bfloat16 would lose what is left of it,
    which is its gradient.
    """

    @staticmethod
    def forward(ctx, targets, weights, dtype, *factors):
        wide = at_least_float32(dtype)
        V, N, C, device = len(factors[1]), len(targets), factors[1].size(1), targets.device
        cache, buffer = sizes(device)
        rows = max(128, buffer // (V * dtype.itemsize) // 128 * 128)
        spare = max(128, -(-N // 128) * 128) - N  # rows of weight 0: few distinct sizes, as each needs new kernels
        targets = F.pad(targets, (0, spare))
        weights = F.pad(torch.ones(N, dtype=wide, device=device) if weights is None else weights.to(wide), (0, spare))
        xs = [F.pad(x.to(dtype), (0, 0, 0, spare)) for x in factors[::2]]
        ws = [w.to(dtype) for w in factors[1::2]]
        dxs = [torch.empty_like(x) if need else None for x, need in zip(xs, ctx.needs_input_grad[3::2])]
        dws = [torch.empty_like(w) if need else None for w, need in zip(factors[1::2], ctx.needs_input_grad[4::2])]
        loss = torch.zeros((), dtype=wide, device=device)
        for start in range(0, len(targets), rows):
            x = [x[start:start + rows] for x in xs]
            y, weight = targets[start:start + rows], weights[start:start + rows]  # (n,)
            exps = scratch((V, len(y)), dtype, device)
            target_logits = sum((x_.to(wide) * w[y].to(wide)).sum(-1) for x_, w in zip(x, ws))
            shift = target_logits.to(dtype)  # any that is not far below the largest logit will do
            others = exp_logits(exps, x, ws, shift, y) if device.type == "cpu" else None
            if others is None or not others.isfinite().all():  # some are 88 above; to look would be to wait for a GPU
                tiles = zip(*(w.split(max(1, cache // len(y))) for w in ws))
                shift = torch.stack([sum(w @ x_.T for w, x_ in zip(tile, x)).amax(0) for tile in tiles]).amax(0)
                others = exp_logits(exps, x, ws, shift, y)
            below = target_logits - shift.to(wide)
            sums = others + below.exp()
            loss += (weight * (sums.log() - below)).sum()
            scale = (weight / sums).unsqueeze(-1)  # (n, 1)
            dz = exps.index_put_((y, torch.arange(len(y), device=device)), -others.to(dtype))  # (V, n), to be scaled
            for x_, w, dx, dw in zip(x, ws, dxs, dws):
                if dx is not None:
                    dx[start:start + rows] = (w.T @ dz).T * scale
                if dw is not None:
                    scaled = (x_ * scale).to(dtype)
                    size = max(1, cache // (4 * C))
                    for dw_, dz_ in zip(dw.split(size), dz.split(size)):
                        add_product(dw_, dz_, scaled, first=start == 0)
        ctx.grads = [grad if grad is None else grad[:len(factor)]
                     for factor, grad in zip(factors, (grad for pair in zip(dxs, dws) for grad in pair))]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        grads, ctx.grads = ctx.grads, None  # held by nobody else, a gradient becomes .grad without a copy
        if grads is None:
            raise RuntimeError("this loss has been differentiated already, and keeps no gradients for a second time")
        for grad in grads:
            if grad is not None and (dloss.device.type != "cpu" or dloss != 1):  # to look would be to wait for a GPU
                grad *= dloss
        return None, None, None, *grads


def exp_logits(out, xs, ws, shift, targets):
    """out (V, n) = exp(z - shift), 0 at the targets (n,); a tile of CACHE numbers at a time. -> its sums (n,)."""
    n = torch.arange(out.size(1), device=out.device)
    size = max(1, sizes(out.device)[0] // len(n))
    sums = torch.zeros(len(n), dtype=at_least_float32(out.dtype), device=out.device)
    for start, tile, *w in zip(range(0, len(out), size), out.split(size), *(w.split(size) for w in ws)):
        torch.addmm(-shift, w[0], xs[0].T, out=tile)
        for w_, x in zip(w[1:], xs[1:]):
            tile.addmm_(w_, x.T)
        tile.exp_()
        places = (targets - start).clamp(0, len(tile) - 1), n
        tile[places] = tile[places].masked_fill(places[0] == targets - start, 0)
        sums += sum_rows(tile, sums.dtype)
    return sums


def sum_rows(x, dtype):
    """x.sum(0, dtype=dtype)."""
    if x.device.type == "cpu":
        # Sums of 64 numbers each, as a product; in bfloat16 they are rounded one by one, and the errors cancel out.
        by_64 = torch.eye(-(-len(x) // 64), dtype=x.dtype).repeat_interleave(64, dim=1)[:, :len(x)]
        x = by_64 @ x
    return x.sum(0, dtype=dtype)


def minus(x, c):
    """x (..., D) with two columns that sum to -c, the second of which holds what rounding takes from the first."""
    high = -c.unsqueeze(-1).to(x.dtype)
    low = (-c.unsqueeze(-1) - high).to(x.dtype)
    return torch.cat((x, high, low), dim=-1)


def add_product(out, a, b, first):
    """out += a @ b, or out = a @ b at first; out may be of a higher precision."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=0 if first else 1)
    elif first:
        out.copy_(a @ b)
    else:
        out.add_((a @ b).to(out.dtype))


def at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


kept = {}


def scratch(shape, dtype, device):
    """A tensor of this shape with anything in it, in memory that the next call uses again."""
    size, key = torch.Size(shape).numel(), (dtype, device)
    if key not in kept or len(kept[key]) < size:
        kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(shape)
