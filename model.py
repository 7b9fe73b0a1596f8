"""The GPT: a small Llama. RMSNorm, rotary positions, SwiGLU, no biases, a head that is tied to the embedding; and, for
models that others made, what Llama 3, Qwen2 and Qwen3 do otherwise.

Read top to bottom. Shapes: B batch, T tokens, C = n_embd, H heads, D = head_size (H * D need not be C), V vocabulary.
The parameters carry the names that Hugging Face gives a Llama, so that a checkpoint is one of theirs as it stands.
Texts are written by decoding.py, which computes the same with a cache: what is changed here is changed there, too.
"""
import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import functions

IGNORE = -100  # the label of a token that is not supervised (prompt, padding)


@dataclass
class GPTConfig:
    block_size: int = 512  # longest context, in tokens
    vocab_size: int = 6144
    n_layer: int = 6
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head: grouped-query attention, several heads share a key and a value
    head_size: int = 64
    n_embd: int = 256
    intermediate_size: int = 768  # width inside the MLP
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the head uses the embedding's weight
    rope_scaling: dict | None = None  # Llama 3's, see `rope_angles`
    qkv_bias: bool = False  # Qwen2's
    qk_norm: bool = False  # Qwen3's: an RMSNorm over each head of queries and keys


PRESETS = {
    "small": GPTConfig(),
    # the study's geometry; its vocabulary is that of a large Chinese tokenizer, three quarters of all parameters
    "microstories": GPTConfig(vocab_size=65024, n_head=6, n_kv_head=6, head_size=48, n_embd=512),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):  # (B, T, C)
        if functions.on_cpu(x):
            return functions.RMSNorm.apply(x, self.weight, self.eps, functions.precision(x))
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(functions.precision(x))


@functions.uncompiled  # once for all layers; the compiler would make it a part of each
def rope_angles(pos, config):
    """Cosines and sines for rotary embedding (Su et al., arXiv 2104.09864). pos (..., T) -> two of (..., 1, T, D/2).

    Computed anew in each forward pass: a buffer would be rounded by .to(torch.bfloat16).
    """
    D = config.head_size
    freqs = config.rope_base ** -(torch.arange(0, D, 2, device=pos.device).float() / D)  # (D/2,), radians a token
    if scaling := config.rope_scaling:  # for a longer context: the slow pairs turn more slowly, the fast ones as before
        turns = freqs * scaling["original_max_position_embeddings"] / (2 * math.pi)  # in the context it was trained on
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs * (fast + (1 - fast) / scaling["factor"])
    angles = (pos[..., None].float() * freqs).unsqueeze(-3)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]), the rotate-half layout. x: (B, H, T, D)."""
    if functions.on_cpu(x):
        return functions.Rotate.apply(x, cos, sin)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.head_size, config.norm_eps) for _ in range(2))

    def forward(self, x, rope, lengths):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        texts = zip(*(t.split(lengths, dim=2) for t in (q, k, v))) if lengths else [(q, k, v)]
        y = torch.cat([attend(*text) for text in texts], dim=2)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v):
    """Causal attention of q (B, H, T, D) to k, v (B, H_kv, T, D) -> (B, H, T, D)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        groups = q.size(1) // k.size(1)
        return functions.causal_attention(q, *(t.repeat_interleave(groups, dim=1) for t in (k, v)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, lengths):
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "norm": RMSNorm(config.n_embd, config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for block in self.model.layers:
            attn, mlp = block.self_attn, block.mlp
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                nn.init.normal_(linear.weight, std=linear.in_features ** -0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            # what writes into the residual stream starts smaller, so that the stream does not grow with depth
            mlp.down_proj.weight.mul_((2 * self.config.n_layer) ** -0.5)
            # Attention starts close to what trained attention turns out to be (Trockman and Kolter, arXiv 2305.09828):
            # a token looks at tokens like itself (k = q) and passes on what it sees there as it is (o = v transposed).
            # A story model needs just that, to copy names and words from its prompt, and finds it late by itself.
            groups = self.config.n_head // self.config.n_kv_head
            heads = attn.q_proj.weight.view(self.config.n_kv_head, groups, self.config.head_size, -1)  # (H_kv, G, D, C)
            attn.k_proj.weight.copy_(heads[:, 0].reshape_as(attn.k_proj.weight))
            values = attn.v_proj.weight.view(self.config.n_kv_head, 1, self.config.head_size, -1)
            attn.o_proj.weight.copy_(values.expand_as(heads).reshape_as(attn.q_proj.weight).T)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied weight is one parameter, listed once

    def hidden(self, idx, pos=None, lengths=None):
        """idx (B, T) -> what the head reads (B, T, C). pos (B, T): the tokens' places in their texts from 0.
        lengths: of the texts that stand one behind the other in each row; a token sees its own text only.
        """
        if pos is None and idx.size(1) > -(-self.config.block_size // 8) * 8:  # batches are padded to 8 (`collate`)
            raise ValueError(f"{idx.size(1)} tokens do not fit into block_size {self.config.block_size}")
        pos = torch.arange(idx.size(1), device=idx.device) if pos is None else pos
        rope = rope_angles(pos, self.config)
        x = self.model.embed_tokens(idx)  # (B, T, C)
        for block in self.model.layers:
            x = block(x, rope, lengths)
        return self.model.norm(x)

    def forward(self, idx, targets=None, weights=None):
        """idx (B, T) token ids -> logits (B, T, V); with targets -> the summed cross-entropy, a scalar, in nats.

        targets (B, T): the id that should follow each token, IGNORE where none is asked for. weights (B, T): what its
        cross-entropy is multiplied by (a policy gradient's rewards), default 1. Both may stay on the CPU: then a GPU
        need not be waited for. The head runs only at the supervised positions: at a large vocabulary it is most of the
        arithmetic and most of the memory. The sum, not the mean: the caller divides by the supervised tokens of its
        whole optimizer step.
        """
        if targets is None:
            return self.lm_head(self.hidden(idx))  # (B, T, V)
        places, ids, weights = pick_supervised(targets, weights, idx.device)
        if functions.on_cpu(idx) and 0 < (used := used_part(targets)).sum() < 0.9 * idx.numel():
            # rows of unlike length are laid one behind the other
            pos, lengths = torch.arange(idx.size(1)).expand_as(idx)[used], [n for n in used.sum(1).tolist() if n]
            x = self.hidden(idx[used][None], pos[None], lengths=lengths)[0, targets[used] != IGNORE]  # (N, C)
        else:
            x = self.hidden(idx).flatten(0, 1).index_select(0, places)  # (N, C)
        if torch.compiler.is_compiling():
            loss = F.cross_entropy(self.lm_head(x).float(), ids, reduction="none")  # (N,)
            return (loss if weights is None else weights * loss).sum()
        factors = self.lm_head.factors(x) if hasattr(self.lm_head, "factors") else (x, self.lm_head.weight)
        return functions.LinearCrossEntropy.apply(ids, weights, functions.precision(x), *factors)


@functions.uncompiled  # its shapes depend on the numbers
def pick_supervised(targets, weights, device):
    """(B, T) -> the N supervised places in the flattened batch, targets and weights there, each (N,), on `device`."""
    places = (targets != IGNORE).flatten().nonzero()[:, 0]
    picked = [places, targets.flatten()[places], None if weights is None else weights.flatten()[places]]
    return [t if t is None else to_device(t, device) for t in picked]


def to_device(x, device):
    """x on `device`. A GPU that is at work is not waited for."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def used_part(targets):
    """(B, T) -> (B, T): each row up to its last supervised token; behind it nothing counts."""
    T = targets.size(1)
    last = ((targets != IGNORE) * torch.arange(1, T + 1)).amax(1, keepdim=True)  # (B, 1)
    return torch.arange(T) < -(-last // 16) * 16  # few distinct lengths, as each needs new kernels


def main(argv=None):
    argparse.ArgumentParser(description="Print the presets and their sizes.").parse_args(argv)
    for name, config in PRESETS.items():
        with torch.device("meta"):  # shapes only, no memory
            model = GPT(config)
        print(f"{name}: {model.num_params():,} parameters; {config}")


if __name__ == "__main__":
    from model import main
    main()
