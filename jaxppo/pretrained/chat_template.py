"""Render chat templates, which come with checkpoints: transformers runs them in a
sandbox.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxppo.errors import PretrainedError, first_line


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Return the text of messages {"role": ..., "content": ...}.

    special_tokens: names such as "bos_token", and the tokens.

    Raises PretrainedError for a template that is not Jinja's, fails, or does not take
    the messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes a second

    given = [{name: x for name, x in message.items() if x is not None} for message in messages]
    options: dict[str, Any] = dict(special_tokens) | {
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        (text,), _ = render_jinja_template([given], **options)
    # what a stranger's template makes Python raise is not documented
    except Exception as error:
        raise PretrainedError(
            f"the checkpoint's chat template does not take these messages ({first_line(error)})"
        ) from error
    return text
