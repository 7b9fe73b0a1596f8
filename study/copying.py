"""What it costs a model to write each piece of a text: where it copies, the next piece of a word is nearly free."""
import torch
import torch.nn.functional as F


@torch.no_grad()
def piece_losses(model, tokenizer, before, text):
    """{offset: nats}: the loss of each piece of the text that fits into the context, by the character at which it
    begins. before: the ids in front of it, at least one."""
    ids = tokenizer.encode(text)
    row = torch.tensor([(before + ids)[:model.config.block_size]], device=model.lm_head.weight.device)
    loss = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")[len(before) - 1:]
    # decoded from the beginning: a character may be several pieces, and one of them alone is no character
    return {len(tokenizer.decode(ids[:i])): nats for i, nats in enumerate(loss.tolist())}
