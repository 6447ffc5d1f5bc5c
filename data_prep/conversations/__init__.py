"""Instruction data of any common format, as one typed record: `read_conversations` and `Conversation`."""

from data_prep.conversations.read import Tally, read_conversations, write_conversations
from data_prep.conversations.record import Conversation, Function, Location, Message, Role, ToolCall

__all__ = [
    "Conversation",
    "Function",
    "Location",
    "Message",
    "Role",
    "Tally",
    "ToolCall",
    "read_conversations",
    "write_conversations",
]
