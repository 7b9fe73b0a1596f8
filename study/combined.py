"""Are combined constraints harder than their sum? python study/combined.py out/sft [more model directories]

Every instruction with two constraints or more is given as it is, and each of its constraints alone. If a constraint is
met as often among others as alone, and independently of them, all of them are met as often as the product of the
single outcomes says. Paired by instruction; the models (seeds of one recipe, say) are pooled.
"""
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail  # noqa: E402

import numpy as np  # noqa: E402

from checkpoint import load_model  # noqa: E402
from constraints import FEATURE, KEYS, check, outcomes, render  # noqa: E402
from data.judged import add_rivals, builtin_rows, read_rows  # noqa: E402
from evaluate import interval, write_stories  # noqa: E402

SAMPLING = {"temperature": 0.2, "top_p": 0.9, "top_k": 30, "max_new_tokens": 400}  # evaluate.py's
SAMPLES = 1  # stories an instruction
SEED = 1337


def is_checked_whole(row):
    """Can a rule tell of all its constraints, two at least, and of every feature?"""
    known = outcomes(check("", row["constraints"], row["rivals"]))
    return len(row["constraints"]) > 1 and all(
        f"{FEATURE} {name}" in known for name in row["constraints"].get(FEATURE, []))


def met_shares(model, tokenizer, rows):
    """-> for each row {key: share of its stories that meet this constraint}, and with "all" those that meet all."""
    stories, *_ = write_stories(model, tokenizer, [render(row["constraints"]) for row in rows], SAMPLES, SEED, SAMPLING)
    shares = []
    for row, some in zip(rows, stories):
        met = [outcomes(check(story, row["constraints"], row["rivals"])) for story in some]
        by_key = {key: [of[key][0] for of in met] for key in row["constraints"]}
        shares.append({key: float(np.mean(ok)) for key, ok in by_key.items()}
                      | {"all": float(np.mean(list(map(all, zip(*by_key.values())))))})
    return shares


def measure(models, rows):
    """What every row's constraints are met by together and alone: {name: [(together, alone) of each row]}, the mean of
    the models; name is the number of constraints, for which `alone` is the product, or a key."""
    single = [row | {"constraints": {key: row["constraints"][key]}} for row in rows for key in row["constraints"]]
    pairs = defaultdict(list)
    for model, tokenizer in models:
        together, alone = met_shares(model, tokenizer, rows), iter(met_shares(model, tokenizer, single))
        for i, row in enumerate(rows):
            own = {key: next(alone)[key] for key in row["constraints"]}
            pairs[i, len(own)].append((together[i]["all"], float(np.prod(list(own.values())))))
            for key, share in own.items():
                pairs[i, key].append((together[i][key], share))
    by_name = defaultdict(list)
    for (_, name), some in pairs.items():
        by_name[name].append(tuple(np.mean(some, axis=0)))
    return by_name


def summary(pairs):
    """What `measure` gives -> {name, as text: {"n", "together", "alone", and of the difference "rate", "lo", "hi"}}."""
    names = [name for name in KEYS if name in pairs] + sorted(name for name in pairs if name not in KEYS)
    found = {}
    for name in names:
        together, alone = map(float, np.mean(pairs[name], axis=0))
        found[name if name in KEYS else f"all of {name}"] = {
            "together": together, "alone": alone} | interval([[a - b] for a, b in pairs[name]], SEED)
    return found


def lines(pairs):
    """The table, as lines."""
    yield f"{'':<10}{'n':>5}{'together':>10}{'alone':>8}{'difference, points':>26}"
    for name, of in summary(pairs).items():
        label = name + " " * (10 - len(name) - sum(c > "z" for c in name))  # Chinese characters are two columns wide
        bounds = f"{of['rate'] * 100:+.1f} [{of['lo'] * 100:+.1f}, {of['hi'] * 100:+.1f}]"
        yield f"{label}{of['n']:5}{of['together']:10.1%}{of['alone']:8.1%}{bounds:>26}"


def main(argv=None):
    parser = command_line("Are combined constraints harder than their sum?")
    parser.add_argument("ckpt", type=Path, nargs="+", help="model directories")
    parser.add_argument("--data", type=Path, help="instruction records (default: handwritten and generated ones)")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.data) if args.data else builtin_rows()
        models = []
        for path in args.ckpt:
            model, tokenizer = load_model(path)
            models.append((model.float().eval(), tokenizer))
        add_rivals(rows, SEED)
        sources = defaultdict(list)
        for row in filter(is_checked_whole, rows):
            sources[row.get("source", args.data)].append(row)
        if not sources:
            raise ValueError("no instruction with two constraints of which a rule can tell")
        for source, some in sources.items():
            print(source)
            print("\n".join(lines(measure(models, some))), flush=True)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from study.combined import main
    main()
