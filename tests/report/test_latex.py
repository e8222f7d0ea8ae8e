"""LaTeX tables: the numbers of the other tables, escaped, in a tabular that compiles."""

import pytest

from sdd.report import write_report
from sdd.report.latex import cell, escaped, tabular
from sdd.report.library import find_evaluated


@pytest.fixture(autouse=True)
def tables_only(monkeypatch):
    monkeypatch.setattr("sdd.report.plots.write_plots", lambda study, out: None)
    monkeypatch.setattr("sdd.report.page.write_page", lambda *parts: None)


def test_special_characters():
    assert escaped(r"a_b & 50% of $x^2$ {#1} ~ \n") == (
        r"a\_b \& 50\% of \$x\textasciicircum{}2\$ \{\#1\} \textasciitilde{} \textbackslash{}n"
    )


def test_numbers():
    assert cell("61.2 [58.0, 64.1]") == r"61.2 {\footnotesize [58.0, 64.1]}"
    assert cell("-0.5 [-1.2, +0.3]") == r"$-$0.5 {\footnotesize [$-$1.2, +0.3]}"
    assert (cell("-"), cell("1,706,112"), cell("0 1 2"), cell("a_b")) == ("--", "1,706,112", "0 1 2", r"a\_b")


def test_a_tabular_by_hand():
    lines = tabular(["arm", "seeds", "average", "nll"], [["sft lr=1e-3", "0 1", "50.0 [40.0, 60.0]", "-"]])
    assert lines == [
        r"\begin{tabular}{llr}",
        r"\toprule",
        r"arm & seeds & average \\",
        r"\midrule",
        r"sft lr=1e-3 & 0 1 & 50.0 {\footnotesize [40.0, 60.0]} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_tables_of_a_study(shared_study, tmp_path):
    write_report(find_evaluated(shared_study.root), shared_study.root, tmp_path)
    text = (tmp_path / "table.tex").read_text()
    assert text.count(r"\\") == 1 + 8
    assert r"self\_distill n4 & 0 1 2 & " in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    contrasts = (tmp_path / "contrasts.tex").read_text()
    assert r"self\_distill n4 - sft n4 & 0 1 2 & +" in contrasts
    assert contrasts.count(r"\\") == 1 + 7
