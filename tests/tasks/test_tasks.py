import pytest

from jaxppo import tasks
from jaxppo.data.examples import Example
from jaxppo.errors import UserError
from jaxppo.tasks import Task, TaskConfig, metrics, rewards, sources


def test_the_names_in_the_table_exist():
    for name, task in tasks.TASKS.items():
        assert task.source.partition(":")[0] in sources.SOURCES, name
        assert task.reward in rewards.REWARDS or task.reward == "learned", name
        assert set(task.metrics) <= set(metrics.METRICS), name
        assert "{reference}" in task.response, name


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError,
        match="--task 'translatoin': choose one of sentiment, sentiment_label, translation",
    ):
        tasks.get_task(TaskConfig(task="translatoin"))


def test_prompt_formats_use_text_fields_only():
    example = Example("p", "r", {"aspect": "outcome", "letters": ["a"], "number": 3})
    task = Task("", "exact", ("exact",), prompt="{prompt} {aspect}")
    assert tasks.format_prompt(task, example) == "p outcome"
    for name in ("letters", "number"):
        with pytest.raises(UserError, match=f"an example has no '{name}'"):
            tasks.format_prompt(task._replace(prompt=f"{{{name}}}"), example)


def test_multitask_examples():
    task = Task("", "exact", ("exact",), prompt="{prompt} ({aspect})=", response=" {reference}")
    found = tasks.multitask_examples("sums", task, 2, [Example("1+1", "2", {"aspect": "easy"})])
    assert found == [Example("sums: 1+1 (easy)=", " 2", {"task": 2})]


def test_mixed_with_and_without_weights():
    groups = [[Example("a", str(i)) for i in range(6)], [Example("b", str(i)) for i in range(2)]]
    count = lambda found: [sum(x.prompt == name for x in found) for name in "ab"]
    even = tasks.mix_tasks(groups, seed=0)
    assert count(even) == [4, 4]  # 8 examples in equal shares: b's two examples occur twice
    assert sorted(x.reference for x in even if x.prompt == "b") == ["0", "0", "1", "1"]
    assert tasks.mix_tasks(groups, seed=0) == even != sorted(even)
    assert count(tasks.mix_tasks(groups, (3, 1), seed=0)) == [6, 2]
    with pytest.raises(UserError, match="--weights has 1 numbers for 2 tasks"):
        tasks.mix_tasks(groups, (1,), seed=0)


def test_a_prompt_format_of_ones_own():
    own = TaskConfig(task="spelling", prompt_format="Q: {prompt}")
    assert tasks.get_task(own).prompt == "Q: {prompt}"
    assert tasks.get_task(TaskConfig(task="spelling")).prompt == "{prompt}\n="
