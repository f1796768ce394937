"""Predicted replies as the tests need them."""

from collections.abc import Sequence

from aionpredis.requests import ValueReply, parts_reply


def rows_reply(header: bytes, rows: Sequence[memoryview]) -> ValueReply:
    """What MGET answers when every value is ``header`` and as many bytes as a row has; they go straight into ``rows``."""
    return parts_reply(header, (len(rows[0]),), rows, joined=True)
