"""Chats as the text that a model was trained on: through the template of its tokenizer."""

from typing import Any

from moeq.disk.texts import Render


def chat_renderer(tokenizer: Any) -> Render:
    """What makes a text of a chat, with the special tokens of the template written out.

    The text raises ValueError where the tokenizer has no template, or its template does not take a chat.
    """

    def render(messages: list[Any], where: str) -> str:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{where} is a chat, and the tokenizer of the model has no chat template; give texts, or put a "
                "chat_template.jinja into the model's folder"
            )
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise whatever it likes
            raise ValueError(
                f"{where} is a chat that the template of the tokenizer does not take ({error}); leave it out"
            ) from error
        return text

    return render
