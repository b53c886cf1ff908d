"""Skip-causal attention of the yardstick: a dense mask, FlexAttention, or one call per block.

All three take the tokens of an image in the order text, clean stream, prediction stream.
Shapes: B images, H heads, h head size, T text tokens, s tokens a block, L blocks.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

TEXT, CLEAN, PRED = range(3)
KINDS = ("sdpa", "flex", "blocks")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens of the streams that enter a layer: T text tokens, then clean blocks, then noisy blocks."""

    text: int
    clean_blocks: int
    pred_blocks: int
    tokens: int  # s

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of the text, the clean stream and the prediction stream."""
        return self.text, self.clean_blocks * self.tokens, self.pred_blocks * self.tokens

    def token_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the stream and the block (for text the position) of every token."""
        text, clean, pred = (torch.arange(n, device=device) for n in self.lengths)
        streams = torch.cat([torch.full_like(x, n) for n, x in enumerate((text, clean, pred))])
        return streams, torch.cat([text, clean // self.tokens, pred // self.tokens])


def _visible(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Returns which keys a query sees, from the stream and the block of both (section 3.2)."""
    (q_stream, q_block), (k_stream, k_block) = query, key
    from_text = (k_stream == TEXT) & ((q_stream != TEXT) | (k_block <= q_block))
    from_clean = (k_stream == CLEAN) & (q_stream != TEXT) & (k_block < q_block + (q_stream == CLEAN).int())
    from_self = (k_stream == PRED) & (q_stream == PRED) & (k_block == q_block)
    return from_text | from_clean | from_self


def make_mask(kind: str, layout: Layout, first_query: int, device: torch.device) -> Any:
    """Returns the mask that `attend` takes for the queries of all tokens from the first one on.

    It is the visible pairs, bool (queries, keys), a BlockMask of FlexAttention, or None.
    """
    streams, blocks = layout.token_table(device)
    keys = len(streams)
    if kind == "sdpa":
        rows = slice(first_query, None)
        return _visible((streams[rows, None], blocks[rows, None]), (streams[None], blocks[None]))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + first_query
        return _visible((streams[q], blocks[q]), (streams[k], blocks[k]))

    if kind == "flex":
        return create_block_mask(mask_mod, None, None, keys - first_query, keys, device=str(device), BLOCK_SIZE=128)
    return None


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def attend(kind: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Any) -> Tensor:
    """Computes the attention of the last tokens of the row, as many as there are queries.

    Args:
      kind: One of `KINDS`.
      q: Queries (B, H, queries, h).
      k: Keys (B, H, keys, h) of all tokens.
      v: Values.
      layout: The streams.
      mask: Result of `make_mask`.
    """
    if kind == "sdpa":
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if kind == "flex":
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        return flex(q, k, v, block_mask=mask)
    return _attend_by_blocks(q, k, v, layout)


def _attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Computes one attention without a mask for each block, of the clean and the noisy block in one batch."""
    s = layout.tokens
    lengths = list(layout.lengths)
    (k_text, k_clean, k_pred), (v_text, v_clean, v_pred) = k.split(lengths, 2), v.split(lengths, 2)
    omitted = k.shape[2] - q.shape[2]  # streams that end in this layer give no queries
    q_lengths = [0 if sum(lengths[:n]) < omitted else length for n, length in enumerate(lengths)]
    q_text, q_clean, q_pred = q.split(q_lengths, 2)
    outputs: list[list[Tensor]] = [[], [], []]
    if q_text.shape[2]:
        outputs[TEXT].append(scaled_dot_product_attention(q_text, k_text, v_text, is_causal=True))
    for block in range(max(layout.clean_blocks, layout.pred_blocks)):
        earlier, current = slice(0, block * s), slice(block * s, (block + 1) * s)
        members = []  # (stream, queries, keys, values)
        for stream, x, ks, vs in ((CLEAN, q_clean, k_clean, v_clean), (PRED, q_pred, k_pred, v_pred)):
            if block * s < x.shape[2]:
                keys, values = (
                    torch.cat([a, b[:, :, earlier], c[:, :, current]], 2)
                    for a, b, c in ((k_text, k_clean, ks), (v_text, v_clean, vs))
                )
                members.append((stream, x[:, :, current], keys, values))
        if members:
            streams, *qkv = zip(*members)
            result = scaled_dot_product_attention(*(torch.cat(x) for x in qkv))
            for stream, x in zip(streams, result.chunk(len(members))):
                outputs[stream].append(x)
    return torch.cat([x for stream in outputs for x in stream], 2)
