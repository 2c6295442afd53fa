"""What has been said in a chat."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]


@dataclass(slots=True)
class Conversation:
    """A system prompt and whole turns: each user's message has its answer, complete or cut short."""

    system: str = ""
    """Empty: none."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(user's message, answer), in order."""

    def asked(self, text: str) -> list[Message]:
        """The messages to send for the user's next one, which is kept only once it has an answer."""
        return [*self.messages(), {"role": "user", "content": text}]

    def messages(self) -> list[Message]:
        """All that has been said."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.turns:
            said += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return said

    def to_dict(self) -> dict[str, Any]:
        """In the shape of the OpenAI API."""
        return {"messages": self.messages()}
