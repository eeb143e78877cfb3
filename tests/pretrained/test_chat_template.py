"""Chat templates as published checkpoints have them, against transformers' own rendering."""

import numpy as np
import pytest

from jaxppo.errors import PretrainedError
from jaxppo.pretrained import chat_template
from jaxppo.pretrained.tokenizer import from_transformers

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a < b & 'c' é 你"},
    {"role": "assistant", "content": "ok", "reasoning": "hm", "tool_calls": None},
    {"role": "user", "content": "\n why? "},
]

TEMPLATES = {
    "tojson": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | tojson }}\n{% endfor %}",
    "tojson, indented": "{{ messages | tojson(indent=2, sort_keys=true) }}",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ mask_token }}",
    "raise_exception, idle": "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no') }}"
    "{% endif %}{{ messages[1]['content'] }}",
    "strftime_now": "{{ strftime_now('%Y') | length }}",
    "strftime_now, guarded": "{% if strftime_now is defined %}dated{% else %}2024{% endif %}",
    "break": "{% for m in messages %}{{ m.content }}{% if loop.index == 2 %}{% break %}"
    "{% endif %}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ loop.index0 }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% set inner = 1 %}{% endgeneration %}{{ inner is defined }}{% else %}"
    "[{{ m.content }}]{% endif %}{% endfor %}",
    "tools and documents": "{% if tools is not none and tools is defined %}T{% endif %}"
    "{% if documents is not none %}D{% endif %}{% if not tools %}-{% endif %}",
    "line ends": "{% for m in messages %}\n  {% if m %}\n{{ m.content }}\n  {% endif %}\n"
    "{% endfor %}\n{{ messages[0].content }}\n",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.found = true %}{% set ns.n = ns.n + 1 %}{% endif %}"
    "{% endfor %}{{ ns.found }}{{ ns.n }}",
    "reverse": "{% for m in messages[::-1] %}{{ (messages | length - 1) - loop.index0 }}"
    "{{ m.content | trim }}{% else %}none{% endfor %}",
    "reasoning": "{% for m in messages %}{% if m.reasoning_content is string %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{% if m.tool_calls is defined %}!{% endif %}"
    "{{ m.thinking }}{% endfor %}",
    "macro": "{% macro say(m, end='') %}{{ m.role ~ ': ' ~ m.content + end }}{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ say(m, end='\\n') }}{% endfor %}",
    "set block": "{% set x | upper %}{{ messages[0].content }}{% endset %}{{ x }}{{ 2 ** 3 * 2 }}",
    "dict": "{% set d = dict(a=1) %}{{ d.items() | list }}{{ dict.fromkeys('ab', 0) }}",
    "prompt": "{{ messages[-1].content.strip() }}{% if add_generation_prompt %}<a>{% endif %}"
    "{{ '%s' % 1 }}{{ 'x' * 3 }}{{ range(3) | list }}",
    "strings": "{{ messages[1].content.split('&')[-1].lstrip() }}{{ messages[0].role[:3] }}"
    "{{ 'a{}b'.format(1) }}{{ messages[0].keys() | list }}",
}


@pytest.fixture
def folder(backend, tmp_path):
    """Writes a checkpoint's tokenizer with a template, and its special tokens."""
    from transformers import PreTrainedTokenizerFast

    def write(template):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="<|endoftext|>",
            pad_token="<pad>",
            unk_token="<unk>",
            chat_template=template,
        ).save_pretrained(place)
        return place

    return write


def theirs(folder, messages):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)
    return found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_published_forms_are_rendered_as_transformers_does(folder, name):
    place = folder(TEMPLATES[name])
    assert from_transformers(place).apply_chat(CHAT) == theirs(place, CHAT)


def test_a_folder_with_several_templates_has_a_default(folder):
    place = folder({"tool_use": "tools", "default": "{{ messages[0].content }}"})
    assert from_transformers(place).apply_chat(CHAT) == theirs(place, CHAT) == "Be brief."
    place = folder({"tool_use": "tools", "rag": "documents"})
    with pytest.raises(PretrainedError, match="no chat template named default, only rag, tool_use"):
        from_transformers(place).apply_chat(CHAT)


def test_a_template_in_a_file_of_its_own(folder):
    place = folder(None)
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert from_transformers(place).apply_chat(CHAT) == theirs(place, CHAT) == "Be brief.!"


def rendered(template, messages=CHAT):
    return chat_template.render(
        template, messages, add_generation_prompt=True, special_tokens={"bos_token": "<s>"}
    )


def test_what_is_no_plain_data_is_named():
    """An array in a message has methods that write files."""
    message = {"role": "user", "content": [{"type": "image", "image": np.zeros(2)}]}
    assert rendered("{{ messages[0].content[0].image }}", [message]) == "<ndarray>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].missing + 'x' }}", "no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__x=1) %}", "but got '__x'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "but got '_x'"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% macro m(n) %}{{ m(n - 1) }}{% endmacro %}{{ m(1) }}", "recursion"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, reason):
    with pytest.raises(PretrainedError, match=f"does not take these messages .*{reason}") as error:
        rendered(template)
    assert "\n" not in str(error.value)
