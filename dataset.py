"""From records to tensors: the prompt template, the one encoder, the batches."""
import hashlib
import random

import numpy as np
import torch

from constraints import normalize, vary
from model import IGNORE, to_device

PROMPT = "Instruct: {}\nOutput:"  # the story follows at once, then EOS (the style of Phi-2)


# ---- encoding ----

def encode_prompt(tokenizer, instruction):
    """An instruction as users write it -> the ids of the prompt. Training, sampling and evaluation all call this."""
    return tokenizer.encode(PROMPT.format(normalize(instruction)))


def encode_pair(tokenizer, instruction, output, block_size):
    """-> (ids, labels), lists of equal length; labels are IGNORE on the prompt, the ids on story and EOS.

    Prompt and story are encoded apart, so that the prompt has the same ids with and without a story behind it. What
    exceeds block_size is cut, without an EOS that the story does not have there. None if the prompt leaves no room.
    """
    prompt = encode_prompt(tokenizer, instruction)
    story = tokenizer.encode(output) + [tokenizer.eos_id]
    if len(prompt) >= block_size:
        return None
    ids = (prompt + story)[:block_size]
    return ids, [IGNORE] * len(prompt) + ids[len(prompt):]


def with_prompt(row, prompt):
    """The row with another prompt, which is no longer than its own."""
    ids, labels = row
    own = labels.count(IGNORE)
    return prompt + ids[own:], [IGNORE] * len(prompt) + labels[own:]


def varied_prompts(tokenizer, instructions, block_size, shuffle, drop):
    """-> prompt(i, rng) for PairBatches: the constraints of row i of `encode_pairs` in random order, some left out."""
    fitting = [text for text in instructions if len(encode_prompt(tokenizer, text)) < block_size]  # as encode_pair

    def prompt(i, rng):
        return encode_prompt(tokenizer, vary(fitting[i], rng, shuffle, drop))
    return prompt


def encode_pairs(tokenizer, pairs, block_size, name):
    """Encode all; what is cut or skipped is counted and printed. Raises ValueError if no row is left."""
    rows = [encode_pair(tokenizer, *pair, block_size) for pair in pairs]
    kept = [row for row in rows if row is not None]
    cut = sum(ids[-1] != tokenizer.eos_id for ids, _ in kept)
    print(f"{name}: {len(kept)} rows, {sum(len(ids) for ids, _ in kept):,} tokens; "
          f"{cut} stories cut to --block-size {block_size}, {len(rows) - len(kept)} skipped (prompt too long)")
    if rows and not kept:
        raise ValueError(f"{name}: all {len(rows)} prompts are longer than --block-size {block_size}")
    return kept


def encode_stories(tokenizer, texts, block_size, name):
    """Plain stories -> [(ids, labels)], every token supervised; EOS stands before and after each, as in pretraining.
    Only whole ones are kept; the others are counted and printed. Raises ValueError if none is left."""
    encoded = [[tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    kept = [(ids, ids) for ids in encoded if len(ids) - 1 <= block_size]
    print(f"{name}: {len(kept)} plain stories; {len(encoded) - len(kept)} do not fit into --block-size {block_size}")
    if not kept:
        raise ValueError(f"{name}: no plain story fits into --block-size {block_size}")
    return kept


# ---- batches ----

def supervised(labels):
    """How many tokens of a row are supervised: the first has nothing before it to be predicted from."""
    return sum(label != IGNORE for label in labels[1:])


def collate(rows):
    """[(ids, labels)] -> x, y, both (B, T) int64: y[b, t] is what should follow x[b, t], or IGNORE."""
    T = max(len(ids) for ids, _ in rows) - 1
    T = -(-T // 8) * 8  # few distinct widths: kernels are set up anew for each
    x = torch.zeros(len(rows), T, dtype=torch.long)
    y = torch.full((len(rows), T), IGNORE)
    for b, (ids, labels) in enumerate(rows):
        x[b, :len(ids) - 1] = torch.tensor(ids[:-1])
        y[b, :len(ids) - 1] = torch.tensor(labels[1:])
    return x, y


def in_batches(rows, batch_size):
    """Rows -> [(x, y)], in their order."""
    return [collate(rows[i:i + batch_size]) for i in range(0, len(rows), batch_size)]


def by_length(rows, batch_size):
    """Batches of rows of like length, for validation: every row once, little padding."""
    return in_batches(sorted(rows, key=lambda row: len(row[0])), batch_size)


def fingerprint(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


class PairBatches:
    """batches(step) -> the micro-batches [(x, y)] of optimizer step 0, 1, 2, …

    A pure function of seed and step, so a resumed run needs no sampler state. In each epoch every row comes once.
    Rows are shuffled, then bucketed: within a pool of 32 steps they are sorted by length, so that a batch holds rows
    of like length and little padding, and the steps are shuffled again.
    prompt(i, rng) -> ids: another prompt for row i, in each epoch anew; None: its own.
    rank, world: of the rows of each step this process takes every world-th one.
    """

    def __init__(self, rows, batch_size, grad_accum, seed, prompt=None, rank=0, world=1):
        self.original_rows, self.batch_size, self.seed, self.prompt = rows, batch_size, seed, prompt
        self.rank, self.world = rank, world
        self.rows = rows
        self.step_size = batch_size * grad_accum
        self.steps_per_epoch = -(-len(rows) // self.step_size)
        self.epoch, self.steps = None, []

    def __call__(self, step):
        return in_batches(self.rows_of(step)[self.rank::self.world], self.batch_size)

    def rows_of(self, step):
        """The rows of a step, all processes' together."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.steps = epoch, self._plan(epoch)
        return [self.rows[i] for i in self.steps[step]]

    def fingerprint(self):
        """Changes with the data: a resumed run checks it."""
        return fingerprint(np.array(ids + labels, np.int32) for ids, labels in self.original_rows)

    def _plan(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        if self.prompt:
            choice = random.Random(f"{self.seed}-{epoch}")
            self.rows = [with_prompt(row, self.prompt(i, choice)) for i, row in enumerate(self.original_rows)]
        order = rng.permutation(len(self.rows)).tolist()
        pool = 32 * self.step_size
        order = [i for start in range(0, len(order), pool)
                 for i in sorted(order[start:start + pool], key=lambda i: len(self.rows[i][0]))]
        steps = [order[i:i + self.step_size] for i in range(0, len(order), self.step_size)]
        return [steps[i] for i in rng.permutation(len(steps))]


class Replay:
    """batches(step) with whole plain stories added, in micro-batches of their own: on average `share` of all supervised
    tokens are theirs. What `batches` gives stays as it is. A pure function of seed and step, too."""

    def __init__(self, batches, stories, share):
        self.batches, self.stories, self.share = batches, stories, share
        self.steps_per_epoch = batches.steps_per_epoch

    def __call__(self, step):
        pairs = self.batches
        wanted = self.share / (1 - self.share) * sum(supervised(labels) for _, labels in pairs.rows_of(step))
        rng = np.random.default_rng((pairs.seed, step, 1))
        rows = []
        while wanted > 0:
            row = self.stories[rng.integers(len(self.stories))]
            n = supervised(row[1])
            if n > wanted and rng.random() * n >= wanted:  # so the mean is exact, although stories are not cut
                break
            rows.append(row)
            wanted -= n
        return pairs(step) + by_length(rows[pairs.rank::pairs.world], pairs.batch_size)

    def fingerprint(self):
        stories = fingerprint(np.array(ids, np.int32) for ids, _ in self.stories)
        return f"{self.batches.fingerprint()} {stories}"


class TokenBatches:
    """The same for packed plain text: windows of block_size tokens out of one long array, every token supervised."""

    def __init__(self, tokens, block_size, batch_size, grad_accum, seed, rank=0, world=1):
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        self.rank, self.world = rank, world
        self.step_size = batch_size * grad_accum
        self.windows, self.spare = divmod(len(tokens) - 1, block_size)
        if self.windows < 1:
            raise ValueError(f"{len(tokens)} tokens do not fill one context of --block-size {block_size}")
        self.steps_per_epoch = -(-self.windows // self.step_size)
        self.epoch = None

    def __call__(self, step):
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.offset = epoch, int(rng.integers(self.spare + 1))  # other cuts in every epoch
            self.order = rng.permutation(self.windows)
        starts = self.order[step * self.step_size:(step + 1) * self.step_size] * self.block_size + self.offset
        return self._batches_at(starts[self.rank::self.world])

    def validation(self, most):
        """At most so many windows, evenly spread: [(x, y)], the same for all processes."""
        return self._batches_at(
            np.linspace(0, self.windows - 1, min(most, self.windows)).astype(np.int64) * self.block_size)

    def fingerprint(self):
        return fingerprint([self.tokens])

    def _batches_at(self, starts):
        return [self._windows_at(starts[i:i + self.batch_size]) for i in range(0, len(starts), self.batch_size)]

    def _windows_at(self, starts):
        rows = np.stack([self.tokens[s:s + self.block_size + 1] for s in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ---- the loss of a batch, and of many ----

def next_token_loss(model, batch):
    """batch: (x, y), both (B, T) int64, y IGNORE where nothing is supervised. -> (summed cross-entropy in nats, number
    of supervised tokens)."""
    x, y = batch
    return model(to_device(x, model.lm_head.weight.device), y), (y != IGNORE).sum().item()


@torch.no_grad()
def total_loss(model, batches, loss_fn=next_token_loss):
    """-> (loss_fn summed over all batches, the number of its terms)."""
    losses = [(loss.item(), n) for loss, n in (loss_fn(model, batch) for batch in batches)]
    return sum(loss for loss, _ in losses), sum(n for _, n in losses)


def mean_loss(model, batches):
    """Loss over batches [(x, y)], nats per token: sum over all supervised tokens / their number. None without any."""
    loss, n = total_loss(model, batches)
    return loss / n if n else None
