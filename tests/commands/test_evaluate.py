import json

from jaxppo.commands import evaluate
from jaxppo.commands.evaluate import EvalOptions


def test_metrics_are_printed_and_written(tmp_path, monkeypatch, capsys):
    found = {"test_rows": 8, "cer": [0.5, 0.25, 0.75], "pass@1": 0.125, "task": "spelling"}
    outputs = [{"prompt": "p", "policy": "ö"}]
    monkeypatch.setattr(
        evaluate.measure, "evaluate_run", lambda *args, **options: found | {"outputs": outputs}
    )
    evaluate.evaluate(EvalOptions(tmp_path, "spelling"))
    assert capsys.readouterr().out == (
        "cer: 0.500 (95 % interval 0.250 to 0.750 over 8 examples)\npass@1: 0.125\n"
    )
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    assert (tmp_path / "eval.jsonl").read_text() == '{"prompt": "p", "policy": "ö"}\n'


def test_the_checkpoint_is_passed_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluate.measure,
        "evaluate_run",
        lambda *args, **options: asked.append(options["checkpoint"]) or {"outputs": []},
    )
    evaluate.evaluate(EvalOptions(tmp_path, "spelling"))
    evaluate.evaluate(EvalOptions(tmp_path, "spelling", checkpoint="20"))
    assert asked == ["best", "20"]
