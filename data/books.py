"""What the base model is pretrained on: the built-in stories, arranged as in children's readers.

    python data/books.py --n 150000 --seed 1 --out out/data/books.jsonl
    python data/books.py --n 80000 --seed 1 --exercises --out out/data/exercises.jsonl

A small model learns to use what stands before a text only where texts have something before them: a title, a list of
words, a sentence to look for, a line that says what the text is about. Some of it stands behind the text instead. Short
texts are made of scenes alone, so that there is more to copy in them; authored stories come in between. None of them
has an instruction: those are left to fine-tuning. Exercises are texts in which nothing but copying pays: a line, and
the same line again.
"""
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import check_writable, command_line, fail, positive, seed_number, to_path, write_jsonl  # noqa: E402

from tqdm import tqdm  # noqa: E402

from constraints import SENTENCE, SUMMARY, WORDS, sentences  # noqa: E402
from data import generate, language  # noqa: E402

# probabilities
AUTHORED, SHORT = 0.05, 0.3                # texts that are authored stories; of the others, those of scenes alone
NAMED = {WORDS: 0.9, SENTENCE: 0.6, SUMMARY: 0.35}     # what stands before or behind a text
FIELD = {WORDS: "words", SENTENCE: "sentence", SUMMARY: "summary"}  # of a story record, and of books.toml
TITLE, BEFORE, ELSEWHERE, SECOND = 0.3, 0.9, 0.05, 0.06
STRANGE = {"words": 0.15, "characters": 0.15}    # sentences of scenes that no grammar makes
EXERCISED = 2000    # stories whose sentences are read out in exercises
AGAIN = 7           # times, at most, that an exercise repeats its line


def load():
    """-> (the world of language.py, phrasings of books.toml). Raises ValueError for bad language files."""
    path = generate.LANGUAGE / "books.toml"
    forms = language.read_toml(path)
    names = ("title", "words", "sentence", "summary", "elsewhere", "next_story", "again")
    language.check_fields(forms, path, dict.fromkeys(names, list), {})
    return language.load(), forms


def around(text, labels, title, world, forms, rng, second=""):
    """The text with lines before and behind it that name what is in it, and what is not. labels: {key: value} of what
    is named; second: a story that comes after it."""
    before, behind = [], []
    if title and rng.random() < TITLE:
        before.append(rng.choice(forms["title"]).format(n=rng.choice("一二三四五六七八九"), **title))
    for key in rng.sample(list(labels), len(labels)):
        value = labels[key]
        name = FIELD[key]
        value = rng.choice("、， ").join(value) if key == WORDS else value
        (before if rng.random() < BEFORE else behind).append(rng.choice(forms[name]).format(**{name: value}))
    if rng.random() < ELSEWHERE:
        absent = [entry["word"] for entry in generate.asked_words(world, rng, rng.randint(1, 4))]
        absent = [word for word in absent if word not in text + second]
        if absent:
            before.insert(rng.randint(0, len(before)), rng.choice(forms["elsewhere"]).format(words="、".join(absent)))
    return "\n".join(before + [text] + behind)


def story(world, forms, rng):
    """A book of one story, now and then of two."""
    named = [key for key in NAMED if rng.random() < NAMED[key]]
    rng.shuffle(named)
    record, source = generate.compose(world, rng, named)
    values = source["values"]
    title = source["plot"] and {"hero": values["hero"], "full": values["hero.full"],
                                "thing": values[source["plot"]["central"]]}
    second = ""
    if rng.random() < SECOND:
        other, _ = generate.compose(world, rng, like=source)
        second = "\n\n" + rng.choice(forms["next_story"]) + other["text"]
    return around(record["text"], record["asked"], title, world, forms, rng, second) + second


def strange_sentence(world, rng):
    """Words in a row, characters at random; or else a sentence as in a fine-tuning story."""
    of = rng.random()
    if (of := of - STRANGE["words"]) < 0:
        words = generate.asked_words(world, rng, rng.randint(2, 6))
        return "".join(entry["word"] for entry in words) + rng.choice(generate.MARKS)
    if (of := of - STRANGE["characters"]) < 0:
        return "".join(rng.choices(generate.CHARACTERS, k=rng.randint(5, 14))) + rng.choice(generate.MARKS)
    return generate.free_sentence(world, rng)


def scenes(world, forms, rng):
    """A short text: scenes, each of which brings in something that is named before or behind it, and a sentence."""
    values, _, _ = generate.draw(world, {"hero": language.tables_of(world["lexicon"], language.HERO, "books.py")}, rng)
    words = generate.asked_words(world, rng, rng.choice((0, 1, 2, 2, 3, 3, 4, 5)))
    sentence = strange_sentence(world, rng) if not words or rng.random() < 0.6 else ""
    used = []
    parts = [generate.choose_scene(world, rng, word, values, True, [], used) for word in words]
    parts = generate.introduce(parts, values["hero"], values["hero.full"])
    if sentence:
        parts.insert(rng.choice((0, len(parts))), sentence)
    if rng.random() < 0.2:  # one that nothing names
        parts.insert(rng.randint(0, len(parts)), strange_sentence(world, rng))
    text = "".join(parts)
    named = [word["word"] for word in words]
    labels = ({WORDS: named} if named else {}) | ({SENTENCE: sentence} if sentence else {})
    return around(text, labels, None, world, forms, rng)


def texts(n, seed):
    """Yield n books, made one by one, less the few in which a run of what models are judged by has come about. Raises
    ValueError for bad language files."""
    world, forms = load()
    rng = random.Random(f"books-{seed}")
    authored = generate.authored("train")
    rng.shuffle(authored)
    turn = 0
    for i in range(n):
        if rng.random() < AUTHORED:
            record = authored[turn % len(authored)]
            turn += 1
            labels = {key: record[name] for key, name in FIELD.items() if rng.random() < NAMED[key]}
            text = around(record["text"], labels, None, world, forms, rng)
        else:
            own = random.Random(f"{seed}-{i}")
            text = (scenes if own.random() < SHORT else story)(world, forms, own)
        if not generate.leaks(text):
            yield text


def lines(world, rng):
    """{kind of line: a function that draws one}: sentences of stories, words of the lexicon, characters at random."""
    some = [sentence for _ in range(EXERCISED) for sentence in sentences(generate.compose(world, rng)[0]["text"])]

    def words():
        return "、".join(entry["word"] for entry in generate.asked_words(world, rng, rng.randint(2, 9)))
    return {"sentences": lambda: "".join(rng.sample(some, rng.choice((1, 1, 2)))), "words": words,
            "characters": lambda: "".join(rng.choices(generate.CHARACTERS, k=rng.randint(4, 16)))}


def exercises(n, seed):
    """Yield n exercises, as different kinds of lines in turn. Raises ValueError for bad language files."""
    world, forms = load()
    rng = random.Random(f"exercises-{seed}")
    kinds = list(lines(world, rng).values())
    for i in range(n):
        line = kinds[i % len(kinds)]()
        yield "\n".join([line] + [rng.choice(forms["again"]) + line for _ in range(rng.randint(1, AGAIN))])


def main(argv=None):
    parser = command_line("Write the texts that the base model is pretrained on.")
    parser.add_argument("--n", type=positive(int), default=10_000, help="number of texts (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=1, help="same seed, same texts (default: %(default)s)")
    parser.add_argument("--exercises", action="store_true", help="lines that are repeated, instead of books")
    parser.add_argument("--out", type=to_path, default=Path("out/data/books.jsonl"),
                        help="JSONL records with a text; overwritten")
    args = parser.parse_args(argv)
    try:
        check_writable(args.out.parent)
        written = tqdm((exercises if args.exercises else texts)(args.n, args.seed), total=args.n, unit="text",
                       disable=None)
        texts_written = [{"text": text} for text in written]
        write_jsonl(args.out, texts_written)
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{len(texts_written)} texts -> {args.out}")


if __name__ == "__main__":
    from data.books import main
    main()
