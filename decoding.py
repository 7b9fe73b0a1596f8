"""Decoding: texts are continued, token by token. `stream` yields them as they come, `generate` collects them.

`Decoder` is the model once more, without backward pass and with a cache. A single token is so few numbers that most of
the time would go into calling modules and operations; so there are as few of them as can be.
"""
import torch
import torch.nn.functional as F

from functions import Rotate
from model import rope_angles


class Decoder:
    """What model.py computes, one piece of B texts after the other: of the tokens before, keys and values are kept.

    rows: B. slots: S, the most tokens that a text can have. Weights that read the same vector stand in one matrix, and
    LoRA adapters are merged. `used`: slots that are filled.
    """

    def __init__(self, model, rows, slots):
        c = self.config = model.config
        self.embedding, self.head = whole(model.model.embed_tokens), weights(model.lm_head)
        self.norm = norm_factors(model.model.norm)
        self.layers = []
        for block in model.model.layers:
            attn, mlp = block.self_attn, block.mlp
            self.layers.append((
                norm_factors(block.input_layernorm), weights(attn.q_proj, attn.k_proj, attn.v_proj),
                self.qk_factors(attn), weights(attn.o_proj), norm_factors(block.post_attention_layernorm),
                weights(mlp.gate_proj, mlp.up_proj), weights(mlp.down_proj)))
        cos, sin = rope_angles(torch.arange(slots, device=self.head.device), c)  # (1, S, D/2)
        self.cos, self.sin = torch.cat((cos, cos), dim=-1)[0].to(self.head.dtype), sin[0].to(self.head.dtype)
        self.cache = self.head.new_zeros(2 * c.n_layer, rows, c.n_kv_head, slots, c.head_size)
        self.used = 0

    def qk_factors(self, attn):
        """-> (biases of q, k and v (outs,), factors of the norm of q's and k's heads); None for what is not there."""
        c = self.config
        bias = torch.cat([linear.bias for linear in (attn.q_proj, attn.k_proj, attn.v_proj)]) if c.qkv_bias else None
        if not c.qk_norm:
            return bias, None
        (q, least), (k, _) = norm_factors(attn.q_norm), norm_factors(attn.k_norm)
        return bias, (torch.stack([q] * c.n_head + [k] * c.n_kv_head)[:, None], least)  # (H + H_kv, 1, D)

    def __call__(self, idx, pos, mask=None):
        """idx (B, T) ids of the next T slots, pos (B, T) their places in the text -> logits (B, V) of the last.
        mask (B, 1, T, used): True where a token sees a slot; None: all up to its own."""
        c, (B, T) = self.config, idx.shape
        before, self.used = self.used, self.used + T
        seen = self.cache[..., :self.used, :].unbind()  # keys and values of each layer, (B, H_kv, used, D)
        new = self.cache[..., before:self.used, :].unbind()
        cos, sin = self.cos[pos].unsqueeze(1), self.sin[pos].unsqueeze(1)  # (B, 1, T, D or D/2)
        x = F.embedding(idx.flatten(), self.embedding)  # (B T, C)
        for i, (norm1, qkv, (bias, qk_norm), o, norm2, gate_up, down) in enumerate(self.layers):
            heads = torch.mm(normed(x, norm1), qkv)
            heads = (heads if bias is None else heads + bias).view(B, T, -1, c.head_size).transpose(1, 2)
            q_k, v = heads.split((c.n_head + c.n_kv_head, c.n_kv_head), dim=1)
            q_k = q_k if qk_norm is None else normed(q_k, qk_norm)
            q, k = Rotate.rotate(q_k, cos, sin).split((c.n_head, c.n_kv_head), dim=1)
            new[2 * i].copy_(k)
            new[2 * i + 1].copy_(v)
            y = F.scaled_dot_product_attention(q, seen[2 * i], seen[2 * i + 1], mask, is_causal=mask is None and T > 1,
                                               enable_gqa=c.n_head != c.n_kv_head)  # (B, H, T, D)
            x = torch.addmm(x, y.transpose(1, 2).reshape(B * T, -1), o)
            gate, up = torch.mm(normed(x, norm2), gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        return torch.mm(normed(x.view(B, T, -1)[:, -1], self.norm), self.head)

    def repeat(self, times):
        """Go on with so many copies of each row, side by side."""
        self.cache = self.cache.repeat_interleave(times, dim=1)

    def keep(self, rows):
        """Go on with these rows (a rising list) alone."""
        for new, old in enumerate(rows):
            if new != old:
                self.cache[:, new, :, :self.used] = self.cache[:, old, :, :self.used]
        self.cache = self.cache[:, :len(rows)]


def whole(module):
    """A module's weight; what an adapter adds is in it."""
    return (module.weight + module.delta()).to(module.weight.dtype) if hasattr(module, "delta") else module.weight


def weights(*linears):
    """The weights of Linears that read the same, side by side, a copy: (in, all their outs), laid out so that the outs
    of one input are neighbours, which is read faster."""
    return torch.cat(list(map(whole, linears))).T.contiguous()


def norm_factors(norm):
    """An RMSNorm of x is x / sqrt(|x|² + C eps), times sqrt(C) weight. -> sqrt(C) weight (C,), sqrt(C eps) ()."""
    w = norm.weight.float()
    return w * len(w) ** 0.5, w.new_tensor((len(w) * norm.eps) ** 0.5)


def normed(x, factors):
    """F.rms_norm in half the time, of few rows."""
    gain, least = factors
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / torch.hypot(length, least) * gain).to(x.dtype)


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, eos_id=None, seed=None, samples=1,
           steer=None):
    """Continue several prompts at once; after each step yield a list with one new id a prompt.

    prompts: lists of ids, of unequal length if need be. A row ends with eos_id (which is not yielded), after
    max_new_tokens, or when block_size is full; from then on its entry is None. temperature 0 is argmax; top_k
    keeps the k likeliest ids, top_p of these the fewest that hold that share of the probability. The same seed
    gives the same ids. samples: each prompt is read once and continued so many times, as if the list had it so many
    times in a row. steer(prompt, new ids so far) -> {id: what is added to its logit}, asked before every token. Raises
    ValueError for a prompt without room and for sampling values out of range.
    """
    limit = model.config.block_size
    if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 1")
    if not prompts or not all(0 < len(p) <= limit for p in prompts):
        raise ValueError(f"a prompt must have 1 to {limit} tokens")
    device = model.lm_head.weight.device
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)

    # Prompts are padded on the left, so that all rows write the same slot of the cache; what pads is never seen.
    longest = max(map(len, prompts))
    max_new_tokens = min(max_new_tokens, limit - min(map(len, prompts)))
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)  # (B,)
    idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
    slots = torch.arange(longest + max_new_tokens, device=device)
    pos = (slots[:longest] - pads[:, None]).clamp(min=0)
    decoder = Decoder(model, len(prompts), len(slots))
    seen = mask = None  # (B, 1, 1, S): the slots that are no padding
    if pads.any():
        seen = (slots >= pads[:, None])[:, None, None]
        itself = torch.eye(longest, dtype=torch.bool, device=device)  # what pads sees no other slot
        mask = (slots[:longest] <= slots[:longest, None]) & seen[..., :longest] | itself  # (B, 1, T, T)

    prompts = [prompt for prompt in prompts for _ in range(samples)]
    rows = list(range(len(prompts)))  # the prompts in the batch
    alive = [i for i in rows if len(prompts[i]) < limit]  # the places in the batch that go on
    told = [[] for _ in prompts]
    for used in range(longest, len(slots)):  # slots in use
        logits = decoder(idx, pos, mask).float()  # (B, V)
        if used == longest and samples > 1:
            decoder.repeat(samples)
            logits, pads = logits.repeat_interleave(samples, dim=0), pads.repeat_interleave(samples)
            seen = seen if seen is None else seen.repeat_interleave(samples, dim=0)
        if steer:
            for i in alive:
                for token, added in steer(prompts[rows[i]], told[rows[i]]).items():
                    logits[i, token] += added
        ids = sample_next(logits, temperature, top_k, top_p, rng)  # (B,)
        new = ids.tolist()
        alive = [i for i in alive if new[i] != eos_id]
        if not alive:
            return
        out = [None] * len(prompts)
        for i in alive:
            out[rows[i]] = new[i]
            told[rows[i]].append(new[i])
        yield out
        alive = [i for i in alive if len(prompts[rows[i]]) + used + 1 - longest < limit]
        if not alive:
            return
        if len(alive) <= 7 / 8 * len(rows):  # what has ended leaves the batch; seldom, as the cache is copied
            decoder.keep(alive)
            keep = torch.tensor(alive, device=device)
            ids, pads, seen = ids[keep], pads[keep], seen if seen is None else seen[keep]
            rows = [rows[i] for i in alive]
            alive = list(range(len(rows)))
        idx, pos = ids[:, None], (used - pads)[:, None]
        mask = seen if seen is None else seen[..., :used + 1]


def generate(model, prompts, max_new_tokens, samples=1, **sampling):
    """`stream`, collected: a list of new ids a prompt, or `samples` of them."""
    out = [[] for _ in range(len(prompts) * samples)]
    for ids in stream(model, prompts, max_new_tokens, samples=samples, **sampling):
        for row, i in zip(out, ids):
            if i is not None:
                row.append(i)
    return out


def sample_next(logits, temperature, top_k, top_p, rng):
    """logits (B, V) -> ids (B,)."""
    if temperature < 1e-6:  # as good as 0, and by less nothing can be divided in float32
        return logits.argmax(-1)
    top, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), falling
    probs = F.softmax((top - top[:, :1]) / temperature, dim=-1)  # minus the maximum: no overflow near temperature 0
    beyond = probs.cumsum(-1) - probs >= top_p
    beyond[:, 0] = False  # the likeliest always stays
    probs = probs.masked_fill(beyond, 0)
    return index.gather(-1, torch.multinomial(probs, 1, generator=rng))[:, 0]
