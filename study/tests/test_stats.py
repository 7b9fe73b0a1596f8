"""stats.py: its measures, and that the built-in corpus keeps its promises."""
from constraints import FEATURES
from data.language import Slot
from study import stats


def test_the_measures():
    assert stats.longest_common_substring("小猫在河边", "大猫在河里") == 3
    assert stats.longest_common_substring("", "河") == stats.longest_common_substring("河", "山") == 0
    assert 0 < stats.bits_per_character(["河山" * 1000]) < 1
    who, place = {"entries": []}, {"entries": []}
    source = {"plot": {"lexicon": {"who": who, "place": place}, "slots": {"hero": [who], "spot": [place]}},
              "beats": [["一天，", Slot("hero.full"), "在", Slot("spot"), "边。"], [Slot("they"), "走了。"]]}
    assert stats.skeleton(source) == "一天，{who.full}在{place}边。{they}走了。"


def test_the_corpus_keeps_its_promises():
    lines = dict(stats.grammar(3000, 4))
    assert int(lines["distinct sentence skeletons of plots"].split(";")[0].replace(",", "")) >= 3000
    assert int(lines["distinct Chinese characters"].replace(",", "")) >= 1500
    assert int(lines["free sentences: different ones, about"].replace(",", "")) >= 1_000_000
    what = "place of asked words and sentences in their story: median, share in the first third"
    median, early = lines[what].split(", ")
    assert float(median) < 0.4 and int(early.rstrip("%")) > 45
    for what, wrong in lines.items():
        if what.startswith("stories "):
            assert wrong == 0, what
    for feature in FEATURES:
        assert 0.10 <= float(lines[f"share of stories with {feature}"].rstrip("%")) / 100 <= 0.75
    assert stats.ceiling(300, 4) >= 0.7  # some summaries name nothing of their story


def test_the_stats_command(capsys):
    stats.main(["--n", "200", "--unique", "50"])
    out = capsys.readouterr().out
    assert "| plots, of these open |" in out and "| stories made again on the way to 50 different ones | 0 |" in out
    assert "authored: highest Jaccard" in out
