"""Reinforcement from verifiable rewards: python train_rl.py --init out/sft

Whether a story has the asked words, the asked sentence, speech and an end can be checked by code. So the model writes a
group of stories for each of some new instructions, and those that meet more than their group become likelier
(REINFORCE, Williams 1992). The loop is train_sft.py's. A step's batches are stories written just before it, each
weighted by its advantage; the validation loss is 1 - the mean reward of fixed instructions: the best model is kept.

Each story is used for one update, so there is no ratio of old and new probabilities, and nothing to clip. The baseline
is the mean of the group; advantages are not divided by its standard deviation (Dr. GRPO, arXiv 2503.20783). Groups of
equally good stories have no gradient and are left out (DAPO, arXiv 2503.14476). All tokens of a step count alike.
--algo rft is rejection sampling instead (RAFT, arXiv 2504.11343): stories that meet everything, and a quarter of data.
"""
import contextlib
import itertools
import re
from collections import defaultdict
from pathlib import Path

from common import count, fail, not_negative, rank, to_path, world

import numpy as np
import torch

import figures
import lora
import train_sft
from checkpoint import find_last, find_model, load_last, load_model, resuming, save_model, save_tokenizer
from constraints import LIST_KEYS, SENTENCE, SUMMARY, WORDS, check, clauses_told, fold, outcomes, render, sentences
from data import builtin
from data.judged import add_rivals, checkable, read_rows, refuse_handwritten
from dataset import collate, encode_pair, encode_prompt, fingerprint
from decoding import generate
from evaluate import plain_loss, repetition, told_twice
from model import IGNORE, to_device
from records import split_by_story
from sample import encode_request, log_probs

JUDGED = 128    # instructions whose mean reward chooses the model
BATCH = 64      # of them that are continued at once
NEARLY = 0.8    # of a sentence, in order: worth half of it
USUAL = 0.9     # quantile of the repeated 4-grams in the rows' own stories: repetition beyond it is penalized
MISUSE = 0.5    # is taken off a story that has the words as a list, or a sentence twice
KEPT = 2        # --algo rft: stories of one instruction that are learnt from, at most
OWN = 3         # --algo rft: one story of the data to so many of the model's


# ---- the reward ----

def lcs_length(a, b):
    """Length of the longest common subsequence of two strings."""
    row = [0] * (len(b) + 1)
    for char in a:
        left = diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if char == other else max(row[j], left)
            left = row[j]
    return row[-1]


def misused(words, story):
    """Do all the words stand in the story as a list, in any order, with nothing but marks between them? Or is a
    sentence told twice?"""
    listed = len(words) > 1 and any(re.search(r"[，、；;,\s]+".join(map(re.escape, order)), story)
                                    for order in itertools.permutations(words[:5]))
    return listed or told_twice(story)


def judge(row, story, ended, usual_repetition):
    """A story for the row's instruction -> {"reward": 0 … 1, "whole": does it meet all that can be checked?, and the
    share met of each kind}. The reward: the mean over what can be checked, 0 for a story without an end, less repeated
    4-grams beyond `usual_repetition`, less MISUSE if `misused`."""
    constraints, shares = row["constraints"], {}
    met = check(story, constraints, row["rivals"])
    for key, value in met.items():
        known = [ok for ok in (value.values() if key in LIST_KEYS else [value]) if ok is not None]
        if known:
            shares[key] = sum(known) / len(known)
    if SUMMARY in shares:  # nearly all stories are closest to their own: half is for that, half for its clauses
        told = clauses_told(constraints[SUMMARY], story)
        shares[SUMMARY] = (shares[SUMMARY] + sum(told) / max(1, len(told))) / 2
    if shares.get(SENTENCE) == 0:
        asked = fold(constraints[SENTENCE])
        best = max((lcs_length(asked, fold(told)) for told in sentences(story)), default=0)
        shares[SENTENCE] = 0.5 * (best >= NEARLY * len(asked))
    again = repetition([story])["rep4"] or 0.0
    penalty = max(0.0, again - usual_repetition) + MISUSE * misused(constraints.get(WORDS, []), story)
    reward = max(0.0, ended * float(np.mean(list(shares.values()))) - penalty)
    whole = ended and not penalty and all(ok[0] for name, ok in outcomes(met).items() if name in constraints)
    return {"reward": reward, "whole": whole, "ended": ended, "rep4": again, **shares}


# ---- stories, and what is learnt from them ----

class Rollouts:
    """batches(step) -> micro-batches (x, y, weights), each (B, T), of stories that the model has just written for the
    instructions of the step; `measured()` says how they were.

    rows: instructions (of judged.py), `prompts` of them a step, `group` stories each, at temperature 1 from all of the
    model's probabilities: what is sampled from is what is trained. reference: the model as it was at the start. kl: a
    token's weight is its story's advantage - kl · (log p - log p of the reference).
    """

    def __init__(self, model, tokenizer, rows, reference, *, algo="pg", prompts=32, group=8, batch_size=16, kl=0.0,
                 seed=1337, max_new_tokens=400, plain=()):
        self.model, self.tokenizer, self.rows, self.reference, self.plain = model, tokenizer, rows, reference, plain
        self.algo, self.prompts, self.group, self.batch_size = algo, prompts, group, batch_size
        self.kl, self.seed, self.max_new_tokens = kl, seed, max_new_tokens
        self.steps_per_epoch = -(-len(rows) // prompts)
        again = [repetition([row["story"]])["rep4"] for row in rows if len(row["story"] or "") >= 4]
        self.usual_repetition = float(np.quantile(again, USUAL)) if again else 1.0
        self.sums = defaultdict(lambda: [0.0, 0])  # {figure: [sum, number]} since the last line of the log

    def fingerprint(self):
        """Changes with the instructions and their stories: a resumed run checks it."""
        return fingerprint(f"{render(row['constraints'])}\n{row['story']}".encode() for row in self.rows)

    def measured(self):
        """How the stories of the step, or of the validation, were: means, under torchrun those of the first process."""
        means = {name: total / n for name, (total, n) in self.sums.items()}
        self.sums.clear()
        return means

    def count(self, measured, prefix=""):
        for name, value in ((name, value) for some in measured for name, value in some.items() if name != "row"):
            self.sums[prefix + name][0] += float(value)
            self.sums[prefix + name][1] += 1

    def __call__(self, step):
        places = range(step * self.prompts + rank(), (step + 1) * self.prompts, world())
        rows = [self.rows[i % len(self.rows)] for i in places]
        seed = ((self.seed * 1_000_003 + step) * world() + rank()) % 2**63
        groups = self.write(rows, self.group, seed, temperature=1.0)
        for group in groups:
            self.count([{"equal_groups": len({story["reward"] for story in group}) == 1}, *group])
        chosen = advantages(groups) if self.algo == "pg" else rejection_sampled(groups, [
            encode_pair(self.tokenizer, render(row["constraints"]), row["story"], self.model.config.block_size)
            for row in rows if row["story"]])
        return [self.weighted(chosen[i:i + self.batch_size]) for i in range(0, len(chosen), self.batch_size)]

    def write(self, rows, n, seed, temperature):
        """n stories for each row -> a list of groups of them: what `judge` says, and (ids, labels)."""
        eos, size = self.tokenizer.eos_id, self.model.config.block_size
        prompts = [encode_prompt(self.tokenizer, render(row["constraints"])) for row in rows]
        drawn = generate(self.model, prompts, self.max_new_tokens, samples=n, temperature=temperature, eos_id=eos,
                         seed=seed)
        groups = []
        for i, (row, prompt) in enumerate(zip(rows, prompts)):
            groups.append([])
            for ids in drawn[i * n:(i + 1) * n]:
                ended = len(ids) < min(self.max_new_tokens, size - len(prompt))
                story = judge(row, self.tokenizer.decode(ids), ended, self.usual_repetition)
                completion = ids + [eos] * ended  # the end is learnt, too; a story that was cut has none
                groups[-1].append(story | {"tokens": len(completion),
                                           "row": (prompt + completion, [IGNORE] * len(prompt) + completion)})
        return groups

    def weighted(self, chosen):
        """[((ids, labels), advantage)] -> (x, y, weights): the advantage of each token."""
        x, y = collate([row for row, _ in chosen])
        weights = torch.tensor([advantage for _, advantage in chosen])[:, None].expand(y.shape).float()
        supervised = y != IGNORE
        now = log_probs(self.model, x, y).cpu()
        change = now - log_probs(self.reference, x, y).cpu()
        for name, values in (("entropy", -now[supervised]), ("kl", change[supervised])):  # means over sampled tokens
            self.sums[name][0] += values.sum().item()
            self.sums[name][1] += len(values)
        return x, y, weights - self.kl * change

    def loss(self, model, batch):
        """The loss of a batch for the loop, as of `next_token_loss`. A list of rows is for validation: 1 - reward."""
        if isinstance(batch, list):
            stories = [group[0] for group in self.write(batch, 1, self.seed, temperature=0.2)]
            self.count(stories, "val_")
            if self.plain and "plain_nll" not in self.sums:
                self.count([{"plain_nll": plain_loss(model, self.tokenizer, self.plain)}])
            return torch.tensor(sum(1 - story["reward"] for story in stories)), len(stories)
        x, y, weights = batch
        return model(to_device(x, model.lm_head.weight.device), y, weights), (y != IGNORE).sum().item()


def advantages(groups):
    """-> [((ids, labels), reward - mean reward of the group)], without groups in which all are equal."""
    chosen = []
    for group in groups:
        rewards = [story["reward"] for story in group]
        if max(rewards) > min(rewards):
            chosen += [(story["row"], reward - float(np.mean(rewards))) for story, reward in zip(group, rewards)]
    return chosen or nothing(groups)


def rejection_sampled(groups, own=()):
    """-> [((ids, labels), 1.0)] of the first KEPT stories of each group that meet everything, and of the stories that
    the data has for them, one to OWN of these."""
    kept = [story["row"] for group in groups for story in [s for s in group if s["whole"]][:KEPT]]
    return [(row, 1.0) for row in [*kept, *own[:len(kept) // OWN]]] or nothing(groups)


def nothing(groups):
    """A step without a gradient is a step, too: one token, of weight 0."""
    ids, labels = groups[0][0]["row"]
    n = labels.count(IGNORE) + 1
    return [((ids[:n], labels[:n]), 0.0)]


# ---- the command ----

def parse_args(argv=None):
    parser = train_sft.training_parser("Reinforcement: the model writes stories, code checks them, and the better ones "
                                       "of each group are made likelier.")
    flag = parser.add_argument
    flag("--adapter", type=to_path, help="LoRA adapter directory on --init: train the adapter only")
    flag("--algo", choices=["pg", "rft"], default="pg",
         help="policy gradient, or rejection sampling: only stories that meet everything (default: %(default)s)")
    flag("--prompts", type=count, default=32, help="instructions of a step (default: %(default)s)")
    flag("--group", type=count, default=8, help="stories an instruction (default: %(default)s)")
    flag("--kl", type=not_negative(float), default=0.0, help="weight of a KL penalty to the start (default: 0)")
    parser.set_defaults(out=Path("out/rl"), lr=3e-5, max_steps=40, warmup=5, dtype="32-true")
    args = train_sft.parse(parser, argv, fixed=("init", "adapter", "algo", "prompts", "group", "kl"))
    if args.group < 2 and args.algo == "pg":
        fail("--group 1: a story is compared with the others of its group")
    if args.dtype == "bf16-mixed":
        fail("--dtype bf16-mixed: stories are not written in it, so what is learnt from would not be as likely")
    if args.prompts < world():
        fail(f"--prompts {args.prompts}: each of the {world()} processes needs one")
    if args.grad_accum != 1 or args.epochs or args.block_size:
        fail("--grad-accum, --epochs and --block-size have no meaning here: --prompts, --group and --max-steps do")
    return args


def load_rows(args):
    """-> (instructions to write for, instructions to judge by), rows of judged.py that a rule can judge."""
    if args.data:
        train_file, val_file = train_sft.data_files(args)
        rows = read_rows(train_file, args.encoding)
        refuse_handwritten(rows, train_file)
        rows, judged = (rows, read_rows(val_file, args.encoding)) if val_file else split_by_story(
            rows, args.val_fraction, story=lambda row: row["story"] or render(row["constraints"]))
    else:
        rows, judged = builtin.reinforcement(), builtin.reinforcement_validation(JUDGED)
    both = []
    for some in (rows, judged[:JUDGED]):
        some = checkable(some)
        add_rivals(some, args.seed)
        both.append([row for row in some if outcomes(check("", row["constraints"], row["rivals"]))])
    if not all(both):
        raise ValueError("nothing of these instructions can be checked, or too few of them are left to judge by")
    return both


def load_models(args):
    """-> (model, tokenizer, the model as it was at the start, resume state or None)."""
    reference, tokenizer = load_model(args.init, args.adapter)
    if args.adapter:
        model = load_model(args.init)[0].float()
        last, state = find_last(args.out) if args.resume else (args.adapter, None)
        with resuming(args.out) if args.resume else contextlib.nullcontext():
            lora.load(last, model)
        for adapter in lora.adapters(model).values():  # what writes the stories has no dropout
            adapter.lora_dropout.p = 0.0
    else:
        model, tokenizer, state = load_last(args.out) if args.resume else (load_model(args.init)[0], tokenizer, None)
    return model, tokenizer, reference.requires_grad_(False).eval(), state


def main(argv=None):
    args = parse_args(argv)
    try:
        args.init = find_model(args.init, args.adapter)
        train_sft.check_out(args)
        device = train_sft.start(args)
        rows, judged = load_rows(args)
        model, tokenizer, reference, state = load_models(args)
        for row in rows + judged:
            encode_request(tokenizer, "instruction", render(row["constraints"]), model.config.block_size)
    except (ValueError, OSError) as e:
        fail(e)
    base = lora.fingerprints(model)
    rollouts = Rollouts(model, tokenizer, rows, reference.to(device, torch.float32), algo=args.algo,
                        prompts=args.prompts, group=args.group, batch_size=args.batch_size, kl=args.kl, seed=args.seed,
                        plain=builtin.plain_stories())

    def save(directory):
        if args.adapter:
            lora.save(directory, model, args.init, base)
            save_tokenizer(directory, tokenizer)
        else:
            save_model(directory, model, tokenizer)

    def draw(out):
        figures.run_curves(out)
        figures.rl_curves(out)
    train_sft.run(args, model, rollouts, [judged[i:i + BATCH] for i in range(0, len(judged), BATCH)], save, state,
                  loss_fn=rollouts.loss, measured=rollouts.measured, draw=draw)
    train_sft.show(args.out, device, *([args.init, args.out] if args.adapter else [args.out]))


if __name__ == "__main__":
    from train_rl import main
    main()
