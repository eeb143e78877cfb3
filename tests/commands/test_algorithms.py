from jaxppo import commands
from jaxppo.presets import ALGORITHMS


def test_the_table_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["jaxppo", "algorithms", "--settings"])
    commands.main()
    shown = capsys.readouterr().out
    for name, chosen in ALGORITHMS.items():
        assert f"\n{name} " in "\n" + shown
        assert chosen.about in shown and chosen.paper in shown
    assert "--clip-high 0.28" in shown
