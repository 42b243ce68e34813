"""What the lessons in notebooks/course call: checks that answer in words, hints, and photographs."""

from entroformer_lib.teaching.exercises import check, hint
from entroformer_lib.teaching.photographs import grey

__all__ = ["check", "grey", "hint"]
