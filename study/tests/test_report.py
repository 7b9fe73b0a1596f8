"""The report that ships says what its runs say."""
import re
import shutil
from pathlib import Path

from conftest import ROOT

from study import reproduce, runs

SHIPPED = ROOT / "docs" / "study"
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def test_the_shipped_report_follows_from_the_shipped_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as if in a checkout of its own
    Path("base").symlink_to(ROOT / "base")
    monkeypatch.setattr(runs, "find_base", lambda: Path.cwd() / "base")
    out = Path("out/reproduce")
    out.mkdir(parents=True)
    shutil.copy(SHIPPED / runs.RESULTS, out)
    lab = runs.Lab(None, None, out, reproduce.MAIN_JOB, reproduce.SEEDS)
    assert len(lab.known) > 30
    reproduce.write_report(lab, list(reproduce.EXPERIMENTS), "python study/reproduce.py")
    for name in ("report.md", "runs.csv"):
        assert (out / name).read_text(encoding="utf-8") == (SHIPPED / name).read_text(encoding="utf-8")


def test_every_number_of_the_conclusions_stands_in_the_report():
    report, conclusions = (set(NUMBER.findall((SHIPPED / name).read_text(encoding="utf-8")))
                           for name in ("report.md", "README.md"))
    assert len(conclusions) > 20 and conclusions <= report
