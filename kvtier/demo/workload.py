"""The demo's conversations: long documents from the package, and questions about them."""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final

from kvtier.errors import InvalidRequest
from kvtier.router.text import Message, Text
from kvtier.wire.pb import router_pb2

ANSWER_TOKENS: Final = 16
_SPARE_TOKENS: Final = 600  # for questions, answers and the template around a document


@dataclass(slots=True)
class Conversation:
    """One document, the questions about it, and what was said so far."""

    name: str
    document: str
    questions: list[str]
    said: list[Message] = field(default_factory=list)

    def ask(self) -> list[Message]:
        """The conversation with its next question at the end; `answered` completes the turn."""
        turn = len(self.said) // 2
        question = self.questions[turn % len(self.questions)]
        if turn == 0:
            question = f"{self.document}\n\nAnswer from the text above. {question}"
        return [*self.said, Message("user", question)]

    def answered(self, asked: list[Message], answer: str) -> None:
        """The model's answer to what `ask` gave."""
        self.said = [*asked, Message("assistant", answer)]


def conversations(text: Text, max_tokens: int) -> list[Conversation]:
    """One conversation a document, each document cut to what the model can read."""
    folder = files("kvtier.demo") / "documents"
    questions: dict[str, list[str]] = json.loads((folder / "questions.json").read_text())
    found = []
    for name, asked in questions.items():
        document = (folder / f"{name}.txt").read_text()
        while len(text.encode(document)) > max_tokens - _SPARE_TOKENS:
            document = document[: len(document) * 3 // 4]
        found.append(Conversation(name, document, asked))
    return found


def prompt(text: Text, messages: list[Message]) -> tuple[router_pb2.Prompt, list[int]]:
    """What goes to the router, and the token ids that it will make of it.

    A model without a chat template gets the conversation as plain text.
    """
    try:
        ids = text.encode_chat(messages)
    except InvalidRequest:
        plain = "".join(f"{each.role}: {each.content}\n" for each in messages) + "assistant:"
        return router_pb2.Prompt(text=plain), text.encode(plain)
    chat = router_pb2.Chat(
        messages=[router_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
    )
    return router_pb2.Prompt(chat=chat), ids
