from jaxppo.commands.export import card
from jaxppo.config import RunConfig


def test_the_hub_id_in_the_front_matter_is_quoted():
    assert (
        card.front_matter('a/b"\nx: y', adapter=False).split("\n")[5]
        == 'base_model: "a/b\\"\\nx: y"'
    )
    assert card.hub_id(RunConfig(model="a/b\nlicense: mit")) == ""


def test_the_licence_is_that_of_a_bundled_model():
    assert "license: apache-2.0" in card.front_matter(
        "", adapter=False, licence="Apache-2.0"
    ).split("\n")
    assert "license" not in card.front_matter("a/b", adapter=False)


def test_the_card_tells_how_to_format_a_prompt():
    """The tokenizer alone adds neither the format nor the start."""
    found = card.prompting(
        RunConfig(prompt_start=True, prompt_format="{prompt}\n="), "<|endoftext|>"
    )
    assert (
        "'{prompt}\\n='" in found[0]
        and "'<|endoftext|>', which the tokenizer does not add" in found[1]
    )
    assert card.prompting(RunConfig(), "") == []


def test_the_card_tells_of_chats_and_stop_texts():
    chats, stops = card.prompting(RunConfig(chats=True, stop=("###", "\n")), "")
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True)" in chats
    assert "'###', '\\n'" in stops and "stop_strings=[...]" in stops
