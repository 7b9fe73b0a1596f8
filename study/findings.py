"""What was measured, seed by seed, and the verdict that follows from it."""
import statistics
from dataclasses import dataclass

import scipy.stats

from study import report

SEEDS = (1, 2, 3)
MORE_SEEDS = (4, 5)  # of what these leave undecided
MARGIN = 0.02  # of a rate: what two methods may differ by and still be called alike


class Results(dict):
    """{(name, seed): {measure: value}} of the finished runs of an experiment."""

    def per_seed(self, name, measure="loss"):
        """One for each seed that has it."""
        return [value for seed in SEEDS + MORE_SEEDS if (value := self.get((name, seed), {}).get(measure)) is not None]

    def mean(self, name, measure="loss"):
        values = self.per_seed(name, measure)
        return statistics.fmean(values) if values else None

    def differences(self, a, b, measure="loss"):
        """[measure of a - measure of b], for the seeds that have both."""
        both = [[self.get((name, seed), {}).get(measure) for name in (a, b)] for seed in SEEDS + MORE_SEEDS]
        return [x - y for x, y in both if x is not None and y is not None]

    def cell(self, name, measure="loss", form="{:.4f}"):
        """Mean over the seeds, and the least and the most, as text."""
        return mean_and_range(self.per_seed(name, measure), form)

    def count(self, name, measure="loss"):
        return len(self.per_seed(name, measure))


def mean_and_range(values, form):
    if not values:
        return "–"
    mean, least, most = (form.format(of(values)) for of in (statistics.fmean, min, max))
    return mean if least == most else f"{mean} ({least} to {most})"


def measures_of(known):
    """What is known of a run -> {measure: rate}: what is met of everything, words, sentences, clauses of summaries and
    instructions with k constraints, and of the same instructions in several orders of their lines."""
    judged, orders = known.get("eval", {}), known.get("orders", {})
    kinds, met = judged.get("by_kind", {}), judged.get("satisfied", {})
    parts = {"everything": judged.get("everything", {}), "each_word": kinds.get("每个词", {}),
             "sentence": kinds.get("随机句子", {}), "clauses": kinds.get("摘要的分句", {}),
             **{f"all_of_{k}": met.get(str(k), {}) for k in (1, 2, 3, 4)}}
    rates = {name: part.get("rate") for name, part in parts.items()}
    rates["all_of_more"] = rate_of_all([met[k] for k in "234" if k in met])
    if "some" in orders:
        rates |= {f"orders_{name}": orders[name] for name in ("met", "every", "some")}
        rates["order_decides"] = orders["some"] - orders["every"]
    return rates


def rate_of_all(parts):
    """Parts of the instructions, each {"rate", "n"} -> the rate over all of them."""
    n = sum(part["n"] for part in parts)
    return sum(part["rate"] * part["n"] for part in parts) / n if n else None


@dataclass
class Finding:
    """What the study found, and by how much, seed by seed, we found it too: differences above 0 agree with it. A share
    is shown in points. within: the claim is instead that the two are alike, closer than this."""
    claim: str
    measured: str
    differences: list
    share: bool = False
    within: float | None = None

    def interval(self):
        """-> (mean, lo, hi), the 95% t interval of the mean; lo and hi None below three seeds."""
        n = len(self.differences)
        mean = statistics.fmean(self.differences)
        if n < 3:
            return mean, None, None
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(self.differences) / n ** 0.5
        return mean, mean - half, mean + half

    def verdict(self):
        if not self.differences:
            return "not run"
        _, lo, hi = self.interval()
        if lo is None:
            return "undecided"
        if self.within is not None:
            nearest, farthest = 0 if lo < 0 < hi else min(abs(lo), abs(hi)), max(abs(lo), abs(hi))
            lo, hi = self.within - farthest, self.within - nearest
        return "holds" if lo > 0 else "does not hold" if hi < 0 else "undecided"

    def row(self):
        def shown(value):
            return f"{value * 100:+.1f}" if self.share else f"{value:+.4f}"
        if not self.differences:
            return [self.claim, self.measured, "–", 0, self.verdict()]
        mean, lo, hi = self.interval()
        bounds = f" [{shown(lo)}, {shown(hi)}]" if lo is not None else ""
        return [self.claim, self.measured, shown(mean) + " points" * self.share + bounds, len(self.differences),
                self.verdict()]


def seeds_needed(differences, margin=MARGIN):
    """How many seeds make the 95% t interval of differences that spread like these as narrow as +-margin; None where
    nothing is known of their spread."""
    if len(differences) < 3:
        return None
    spread = statistics.stdev(differences)
    return next(n for n in range(2, 10_000) if scipy.stats.t.ppf(0.975, n - 1) * spread / n ** 0.5 <= margin)


# What evaluate.py measures, as columns of tables.
MEASURES = [
    ("validation loss", "val_loss", "{:.4f}"), ("everything met", "everything", "{:.1%}"),
    ("each word", "each_word", "{:.1%}"), ("sentence", "sentence", "{:.1%}"),
    ("clauses of the summary", "clauses", "{:.1%}"), ("loss on plain stories", "plain_nll", "{:.4f}"),
    ("4-grams repeated", "rep4", "{:.1%}"), ("longest shared with training (characters)", "lcs", "{:.1f}"),
]


def measures_table(results, first, labels=None):
    """A row for each name that is judged (of labels, where they are given), a column for each of MEASURES."""
    labels = labels or {name: name for name, _ in results}
    rows = [[label, *(results.cell(name, measure, form) for _, measure, form in MEASURES),
             results.count(name, "val_loss")] for name, label in labels.items() if results.per_seed(name, "val_loss")]
    return report.table([first, *(title for title, _, _ in MEASURES), "seeds"], rows)
