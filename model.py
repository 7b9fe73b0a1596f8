"""The GPT: a small Llama. RMSNorm, rotary positions, SwiGLU, no biases, a head that is tied to the embedding.

Read top to bottom. Shapes: B batch, T tokens, C = n_embd, H heads, D = head_size (H * D need not be C), V vocabulary.
The parameters carry the names that Hugging Face gives a Llama, so that a checkpoint is one of theirs as it stands.
"""
import argparse
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import functions

IGNORE = -100  # the label of a token that is not supervised (prompt, padding)


@dataclass
class GPTConfig:
    block_size: int = 512  # longest context, in tokens
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head: grouped-query attention, several heads share a key and a value
    head_size: int = 64
    n_embd: int = 256
    intermediate_size: int = 768  # width inside the MLP
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the head uses the embedding's weight


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


@torch.compiler.disable  # once for all layers; the compiler would make it a part of each
def rope_angles(pos, head_size, base):
    """Cosines and sines for rotary embedding (Su et al., arXiv 2104.09864). pos (..., T) -> two of (..., 1, T, D/2).

    Computed anew in each forward pass: a buffer would be rounded by .to(torch.bfloat16).
    """
    freqs = base ** -(torch.arange(0, head_size, 2, device=pos.device).float() / head_size)  # (D/2,)
    angles = (pos[..., None].float() * freqs).unsqueeze(-3)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]), the rotate-half layout. x: (B, H, T, D)."""
    if functions.on_cpu(x) and torch.is_grad_enabled():
        return functions.Rotate.apply(x, cos, sin)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_size, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_size, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=False)

    def forward(self, x, rope, cache, mask, lengths):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_size).transpose(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:  # the keys and values of what came before, with room for these T at the end
            for kept, new in zip(cache, (k, v)):
                kept[:, :, -T:] = new
            k, v = cache  # (B, H_kv, S, D)
        texts = zip(*(t.split(lengths, dim=2) for t in (q, k, v))) if lengths else [(q, k, v)]
        y = torch.cat([attend(*text, mask) for text in texts], dim=2)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask):
    """Attention of q (B, H, T, D) to k, v (B, H_kv, S, D) -> (B, H, T, D); causal where there is no mask."""
    if q.dtype == torch.bfloat16 and functions.on_cpu(q) and torch.is_grad_enabled():
        groups = q.size(1) // k.size(1)
        return functions.CausalAttention.apply(q, *(t.repeat_interleave(groups, dim=1) for t in (k, v)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1,
                                          enable_gqa=q.size(1) != k.size(1))


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

    def forward(self, x, rope, cache, mask, lengths):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask, lengths)
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

    def hidden(self, idx, pos=None, cache=None, mask=None, lengths=None):
        """idx (B, T) -> what the head reads (B, T, C). pos (B, T): the tokens' places in their texts from 0.

        For cached generation: each layer's (keys, values), (B, H_kv, S, D), whose last T slots are written, and the
        slots that a token sees, mask (B, 1, T, S), True where it does; None: all up to its own.
        lengths: of the texts that stand one behind the other in each row; a token sees its own text only.
        """
        if pos is None and idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit into block_size {self.config.block_size}")
        pos = torch.arange(idx.size(1), device=idx.device) if pos is None else pos
        rope = rope_angles(pos, self.config.head_size, self.config.rope_base)
        x = self.model.embed_tokens(idx)  # (B, T, C)
        for i, block in enumerate(self.model.layers):
            x = block(x, rope, cache[i] if cache else None, mask, lengths)
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

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, eos_id=None, seed=None):
        """Continue several prompts at once; after each step yield a list with one new id a prompt.

        prompts: lists of ids, of unequal length if need be. A row ends with eos_id (which is not yielded), after
        max_new_tokens, or when block_size is full; from then on its entry is None. temperature 0 is argmax; top_k
        keeps the k likeliest ids, top_p of these the fewest that hold that share of the probability. The same seed
        gives the same ids. Raises ValueError for a prompt without room and for sampling values out of range.
        """
        limit = self.config.block_size
        if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
            raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 1")
        if not prompts or not all(0 < len(p) <= limit for p in prompts):
            raise ValueError(f"a prompt must have 1 to {limit} tokens")
        weight = self.lm_head.weight
        device = weight.device
        rng = None if seed is None else torch.Generator(device).manual_seed(seed)

        # Prompts are padded on the left, so that all rows write the same slot of the cache; what pads is never seen.
        longest = max(map(len, prompts))
        max_new_tokens = min(max_new_tokens, limit - min(map(len, prompts)))
        pads = torch.tensor([longest - len(p) for p in prompts], device=device)  # (B,)
        idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
        slots = torch.arange(longest + max_new_tokens, device=device)
        pos = (slots[:longest] - pads[:, None]).clamp(min=0)
        shape = (len(prompts), self.config.n_kv_head, len(slots), self.config.head_size)
        cache = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.model.layers]
        seen = mask = None  # (B, 1, 1, S): the slots that are no padding
        if pads.any():
            seen = (slots >= pads[:, None])[:, None, None]
            itself = torch.eye(longest, dtype=torch.bool, device=device)  # what pads sees no other slot
            mask = (slots[:longest] <= slots[:longest, None]) & seen[..., :longest] | itself  # (B, 1, T, T)

        rows = list(range(len(prompts)))  # the prompts in the batch
        alive = [i for i in rows if len(prompts[i]) < limit]  # the places in the batch that go on
        for used in range(longest, len(slots)):  # slots in use
            x = self.hidden(idx, pos, [(k[:, :, :used], v[:, :, :used]) for k, v in cache], mask)  # (B, T, C)
            ids = sample_next(self.lm_head(x[:, -1]).float(), temperature, top_k, top_p, rng)  # (B,)
            new = ids.tolist()
            alive = [i for i in alive if new[i] != eos_id]
            if not alive:
                return
            out = [None] * len(prompts)
            for i in alive:
                out[rows[i]] = new[i]
            yield out
            alive = [i for i in alive if len(prompts[rows[i]]) + used + 1 - longest < limit]
            if not alive:
                return
            if len(alive) <= 7 / 8 * len(rows):  # what has ended leaves the batch; seldom, as the cache is copied
                keep = torch.tensor(alive, dtype=torch.long, device=device)
                cache = [(k[keep], v[keep]) for k, v in cache]
                ids, pads, seen = ids[keep], pads[keep], seen if seen is None else seen[keep]
                rows = [rows[i] for i in alive]
                alive = list(range(len(rows)))
            idx, pos = ids[:, None], (used - pads)[:, None]
            mask = seen if seen is None else seen[..., :used + 1]

    def generate(self, prompts, max_new_tokens, **sampling):
        """`stream`, collected: a list of new ids a prompt."""
        out = [[] for _ in prompts]
        for ids in self.stream(prompts, max_new_tokens, **sampling):
            for row, i in zip(out, ids):
                if i is not None:
                    row.append(i)
        return out


@torch.compiler.disable  # its shapes depend on the numbers
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


def sample_next(logits, temperature, top_k, top_p, rng):
    """logits (B, V) -> ids (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    top, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), falling
    probs = F.softmax((top - top[:, :1]) / temperature, dim=-1)  # minus the maximum: no overflow near temperature 0
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # the likeliest always stays
    return index.gather(-1, torch.multinomial(probs, 1, generator=rng))[:, 0]


def main(argv=None):
    argparse.ArgumentParser(description="Print the presets and their sizes.").parse_args(argv)
    for name, config in PRESETS.items():
        with torch.device("meta"):  # shapes only, no memory
            model = GPT(config)
        print(f"{name}: {model.num_params():,} parameters; {config}")


if __name__ == "__main__":
    from model import main
    main()
