import jax
import numpy as np
import pytest
from runs import RUN

from jaxppo import ppo, tasks
from jaxppo.data.examples import Example
from jaxppo.errors import UserError
from jaxppo.run import load
from jaxppo.run.sampler import Sample
from jaxppo.tasks import Task, TaskConfig, measure

TASK = Task("", "exact", ("exact",), prompt="{prompt}=", response=" {reference}")


@pytest.fixture(scope="module")
def policy():
    return load.load_policy(RUN)[1]


def test_texts_and_arrays_of_examples():
    features = np.ones((4, 2))
    examples = [
        Example(
            "a", "b", {"context": features, "context_length": 3, "other": [1], "task": "a name"}
        )
    ] * 2
    found = measure.format_examples(TASK, examples)
    assert found[:3] == (["a=", "a="], [" b", " b"], ["b", "b"])
    assert set(found.extra) == {"context", "context_length"}
    assert found.extra["context"].shape == (2, 4, 2) and found.extra["context"].dtype == np.float32
    assert found.extra["context_length"].tolist() == [3, 3]


def test_an_example_that_lacks_what_the_task_needs():
    task = TASK._replace(prompt="{prompt} {aspect}")
    assert measure.format_examples(task, [Example("a", "b", {"aspect": "c"})]).prompts == ["a c"]
    with pytest.raises(
        UserError,
        match="an example has no 'aspect', which the prompt format '{prompt} {aspect}' needs",
    ):
        measure.format_examples(task, [Example("a", "b")])
    with pytest.raises(UserError, match='recordings need "context"'):
        measure.format_examples(TASK._replace(source="speech"), [Example("", "b")])


def test_a_prompt_may_begin_a_document(policy):
    config = TaskConfig(prompt_length=4, response_length=3)
    task = TASK._replace(prompt="{prompt}", start=True)
    prompts, _ = measure.encode_examples(
        config, policy, task, [Example("ab", "x"), Example("abcdef", "x")]
    )
    start = policy.tokenizer.start_id
    assert (
        prompts.tokens[:, :2].tolist()[1][0] == start and prompts.tokens[0, 1] == start
    )  # never cut off
    assert policy.tokenizer.decode(prompts.tokens[1, 1:]) == "def"


def test_what_is_expected_of_a_response_is_not_cut(policy, capsys):
    config = TaskConfig(prompt_length=4, response_length=3)
    task = TASK._replace(expected=lambda reference: reference.partition("#")[2])
    rows = [Example("a", "because#12345"), Example("b", "so#1")]
    prompts, references = measure.encode_examples(config, policy, task, rows)
    assert references == ["12345", "1"] and prompts.extra["reference_length"].tolist() == [5, 1]
    assert policy.tokenizer.decode(prompts.extra["reference"][0]) == "12345"
    assert capsys.readouterr().out == ""


def test_prompts_carry_their_references_as_the_policy_would_write_them(policy, capsys):
    config = TaskConfig(prompt_length=4, response_length=3)
    prompts, references = measure.encode_examples(
        config, policy, TASK, [Example("abcdef", "x"), Example("a", "wxyz")]
    )
    assert capsys.readouterr().out.splitlines() == [
        # abcdef=
        "note: 1 of 2 prompts has more than 4 tokens (--prompt-length of the run)"
        " and lost its beginning",
        # " wxyz"
        "note: 1 of 2 references has more than 3 tokens (--response-length):"
        " rewards see its beginning",
    ]
    decode = policy.tokenizer.decode
    assert references == ["x", "wxyz"]
    assert decode(prompts.tokens[0]) == "def="  # a prompt that is too long loses its beginning
    assert prompts.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert prompts.extra["reference_length"].tolist() == [2, 3]
    assert (
        decode(prompts.extra["reference"][0][:2]) == " x"
        and decode(prompts.extra["reference"][1]) == " wx"
    )


REFERENCES = ["the cat sat on the mat today", "he reads a book", "it is raining here again now"]
TEXTS = {  # what came before and after, greedy and sampled
    "supervised": ["the cat sat on a mat today", "he read books", "it rains"],
    "policy": ["the cat sat on the mat again", "he reads a book", "it is raining now"],
    "supervised_sample": ["a cat", "he has a book", "is it raining here again"],
    "policy_sample": ["the cat sat on the mat today", "reads a book", "it was raining here again"],
}


def by_sacrebleu(responses: list[str]) -> dict[str, float]:
    library = pytest.importorskip("sacrebleu")
    of = lambda name: getattr(library, f"corpus_{name}")(responses, [REFERENCES]).score
    return {"bleu": of("bleu"), "chrf": of("chrf")}


def by_rouge_score(responses: list[str]) -> dict[str, float]:
    names = ["rougeL", "rouge1", "rouge2"]
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(names)
    found = [scorer.score(y, x) for x, y in zip(responses, REFERENCES, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in found])) for name in names}


def by_jiwer(responses: list[str]) -> dict[str, float]:
    library = pytest.importorskip("jiwer")
    return {name: getattr(library, name)(REFERENCES, responses) for name in ("wer", "cer")}


@pytest.mark.parametrize(
    "task, compute",
    [("translation", by_sacrebleu), ("summarisation", by_rouge_score), ("speech", by_jiwer)],
)
def test_a_record_follows_from_its_stored_outputs(policy, task, compute):
    """As the libraries compute it from outputs.jsonl."""
    own = tasks.TASKS[task]
    evaluator = measure.Evaluator(TaskConfig(test_rows=3), policy, own, None)

    def outputs(stage: str) -> measure.Outputs:
        sampled, greedy = TEXTS[f"{stage}_sample"], TEXTS[stage]
        samples = [Sample("?", text, [], 0.5, True) for text in sampled]
        return measure.Outputs(samples, greedy, REFERENCES)

    record = evaluator.compare(outputs("supervised"), outputs("policy"))
    stored = {name: [row[name] for row in record["outputs"]] for name in TEXTS}
    first = own.metrics[0]
    for stage in ("supervised", "policy"):
        want = compute(stored[stage])
        sampled = compute(stored[f"{stage}_sample"])[first]
        found = {name: record[stage][name] for name in want}
        assert found == pytest.approx(want, abs=1e-9) and record[stage]["kl"] == 0.5
        assert record[stage][f"sampled_{first}"] == pytest.approx(sampled, abs=1e-9)
        assert abs(record[stage]["score"]) == pytest.approx(sampled, abs=1e-9)
    gain = record["policy"][first] - record["supervised"][first]
    assert record["gain"][first][0] == pytest.approx(gain)


def test_a_validation_measures_samples_alone(policy):
    config = TaskConfig(prompt_length=4, response_length=2, test_rows=2)
    task = Task("", "exact", ("exact", "cer"))
    rows = [Example("a", "x"), Example("b", "y")]
    prompts, references = measure.encode_examples(config, policy, task, rows)
    evaluator = measure.Evaluator(config, policy, task, None)
    evaluator.greedy = lambda *args, **named: pytest.fail("greedy responses were generated")
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    found = evaluator.compute(evaluator.sample(state, prompts, references, greedy=False))
    samples = evaluator.draw(state, prompts, seed=1001)
    whole = evaluator.compute(measure.Outputs(samples, references, references))
    assert found == {name: whole[name] for name in ("score", "sampled_exact", "kl")}
    assert whole["exact"] == 1  # of the greedy responses


def test_a_task_measured_on_samples_has_all_metrics_in_a_validation(policy):
    config = TaskConfig(prompt_length=4, response_length=2, test_rows=1)
    task = Task("", "exact", ("exact", "cer"), greedy=False)
    held_out = measure.encode_examples(config, policy, task, [Example("a", "x")])
    evaluator = measure.Evaluator(config, policy, task, None)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    found = evaluator.compute(evaluator.sample(state, *held_out, greedy=False))
    assert set(found) == {"score", "exact", "cer", "kl"}
