"""``expert_ffn``: a mixture of feed-forward experts."""

from .op import expert_ffn as expert_ffn
