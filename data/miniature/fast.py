"""A CPU forward and decoder for the miniature: the same maths as transformers' Qwen3.5, several times faster.

transformers' pure-torch GatedDeltaNet loops over the rows of every chunk, and its vision tower over the images of
a batch. Here each chunk's recurrence is one triangular solve and the images of a batch share one call. Prompts are
padded on the right: every layer is causal, so padding needs no mask. tests/data checks equality with the library.

Shapes: B batch, T tokens, H heads, D head dimension, C chunk, N image tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5ForConditionalGeneration

CHUNK = 32


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), 1.0 + module.weight, module.eps)


def gated_delta_rule(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHDD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chunked gated delta rule (Yang et al. 2024, arXiv:2412.06464): S_t = e^g_t S_{t-1} (I - b k k^T) + b v k^T.

    Returns o (B, T, H, D) and the last state (B, H, D_k, D_v); queries and keys are normalised here.
    """
    batch, length, heads, dim = k_BTHD.shape
    pad = -length % CHUNK
    chunks = (length + pad) // CHUNK

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        return x.transpose(1, 2).reshape(batch, heads, chunks, CHUNK, *x.shape[3:])

    q, k, v = split(_unit(q_BTHD) * dim**-0.5), split(_unit(k_BTHD)), split(v_BTHD)
    beta, decay = split(beta_BTH)[..., None], split(g_BTH).cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    growth = decay.exp()[..., None]
    k_T = k.transpose(-1, -2)
    mixing = ((k * beta) @ k_T * ratio).tril(-1)
    right = torch.cat([v * beta, k * beta * growth], -1)
    solved = torch.linalg.solve_triangular(mixing, right, upper=False, unitriangular=True)
    value, key = solved.split([v.shape[-1], dim], -1)
    local = (q @ k_T) * ratio
    q_grown = q * growth
    k_left = (k * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2)
    kept = decay[..., -1].exp()[..., None, None]
    state = q.new_zeros(batch, heads, dim, v.shape[-1]) if state_BHDD is None else state_BHDD
    out = []
    for i in range(chunks):
        fresh = value[:, :, i] - key[:, :, i] @ state
        out.append(q_grown[:, :, i] @ state + local[:, :, i] @ fresh)
        state = state * kept[:, :, i] + k_left[:, :, i] @ fresh
    o = torch.stack(out, 2).reshape(batch, heads, chunks * CHUNK, -1)[:, :, :length]
    return o.transpose(1, 2), state


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels; the rest pass."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class FastMiniature:
    """Functions over a `Qwen3_5ForConditionalGeneration`'s own parameters: training them here trains the model."""

    def __init__(self, model: Qwen3_5ForConditionalGeneration) -> None:
        self.model = model
        self.text = model.model.language_model
        self.visual = model.model.visual
        self.image_token = model.config.image_token_id
        self._grids: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    # ---- vision
    def _grid(self, rows: int, cols: int) -> tuple[Tensor, ...]:
        """Bilinear indices and weights of the position table, and the rotary angles, in merge-window order."""
        if (rows, cols) not in self._grids:
            side = self.visual.num_grid_per_side
            window = torch.arange(rows * cols).reshape(rows // 2, 2, cols // 2, 2).transpose(1, 2).flatten()
            r, c = window // cols, window % cols
            y, x = torch.linspace(0, side - 1, rows)[r], torch.linspace(0, side - 1, cols)[c]
            y0, x0 = y.long(), x.long()
            y1, x1 = (y0 + 1).clamp(max=side - 1), (x0 + 1).clamp(max=side - 1)
            dy, dx = y - y0, x - x0
            index = torch.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1])
            weight = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
            inverse = self.visual.rotary_pos_emb.inv_freq.float()
            angles = torch.cat([r[:, None] * inverse, c[:, None] * inverse], -1).repeat(1, 2)
            self._grids[rows, cols] = index, weight[..., None], angles.cos(), angles.sin()
        return self._grids[rows, cols]

    def see(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images of one size -> (B, N, hidden) image tokens."""
        vision, (batch, height, width, _) = self.visual, images_BHWC.shape
        p = vision.config.patch_size
        rows, cols = height // p, width // p
        index, weight, cos, sin = self._grid(rows, cols)
        x = images_BHWC.float().div(127.5).sub(1)
        x = x.reshape(batch, rows // 2, 2, p, cols // 2, 2, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        x = x.reshape(batch, rows * cols, 3, p * p)
        # Both frames of the temporal patch are the same picture: add their filters.
        kernel = vision.patch_embed.proj.weight.sum(2).reshape(-1, 3 * p * p)
        x = F.linear(x.flatten(2), kernel, vision.patch_embed.proj.bias)
        x = x + (vision.pos_embed.weight[index] * weight).sum(0)
        for block in vision.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(batch, rows * cols, 3, block.attn.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            seen = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + block.attn.proj(seen.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(block.norm2(x))
        return vision.merger(x.reshape(batch * rows * cols, -1)).reshape(batch, rows * cols // 4, -1)

    # ---- language
    def embed(self, ids_BT: Tensor, seen_BND: Tensor | None) -> Tensor:
        x = F.embedding(ids_BT, self.text.embed_tokens.weight)
        if seen_BND is None:
            return x
        return x.masked_scatter((ids_BT == self.image_token)[..., None], seen_BND)

    @staticmethod
    def positions(before: int, rows: int, cols: int, length: int) -> Tensor:
        """(3, T) temporal, height and width positions: `before` text tokens, an image of rows x cols, text."""
        if rows == 0:
            return torch.arange(length).expand(3, -1)
        picture = torch.stack(
            [torch.zeros(rows * cols), torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)]
        )
        after = torch.arange(length - before - rows * cols) + before + max(rows, cols)
        head = torch.arange(before).expand(3, -1)
        return torch.cat([head, picture.long() + before, after.expand(3, -1)], 1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (3, B or 1, T) -> cos, sin (B or 1, 1, T, rotary)."""
        rope = self.text.rotary_emb
        freqs = positions[..., None].float() * rope.inv_freq.float()
        freqs = rope.apply_interleaved_mrope(freqs, rope.mrope_section)
        angles = torch.cat([freqs, freqs], -1)[:, None]
        return angles.cos(), angles.sin()

    def _delta(self, layer: torch.nn.Module, x: Tensor, cache: dict | None) -> Tensor:
        m, (batch, length, _) = layer.linear_attn, x.shape
        raw = m.in_proj_qkv(x)
        old = cache.get("conv") if cache else None
        old = raw.new_zeros(batch, m.conv_kernel_size - 1, raw.shape[-1]) if old is None else old
        wide = torch.cat([old, raw], 1)
        filters = m.conv1d.weight[:, 0].T
        mixed = F.silu(sum(wide[:, j : j + length] * filters[j] for j in range(m.conv_kernel_size)))
        q, k, v = (
            part.reshape(batch, length, -1, m.head_k_dim)
            for part in mixed.split([m.key_dim, m.key_dim, m.value_dim], -1)
        )
        beta = m.in_proj_b(x).sigmoid()
        g = -m.A_log.exp() * F.softplus(m.in_proj_a(x) + m.dt_bias)
        out, state = gated_delta_rule(q, k, v, g, beta, cache.get("state") if cache else None)
        if cache is not None:
            cache["conv"], cache["state"] = wide[:, length:], state
        gate = m.in_proj_z(x).reshape(out.shape)
        out = F.rms_norm(out, (out.shape[-1],), m.norm.weight, m.norm.variance_epsilon) * F.silu(gate)
        return m.out_proj(out.reshape(batch, length, -1))

    def _attend(self, layer: torch.nn.Module, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        m, (batch, length, _) = layer.self_attn, x.shape
        q, gate = m.q_proj(x).view(batch, length, -1, 2 * m.head_dim).chunk(2, -1)
        k = m.k_proj(x).view(batch, length, -1, m.head_dim)
        v = m.v_proj(x).view(batch, length, -1, m.head_dim).transpose(1, 2)
        q, k = _norm(q, m.q_norm).transpose(1, 2), _norm(k, m.k_norm).transpose(1, 2)
        q, k = _rotate(q, *turn), _rotate(k, *turn)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return m.o_proj(out.transpose(1, 2).reshape(batch, length, -1) * gate.reshape(batch, length, -1).sigmoid())

    def hidden(self, x_BTD: Tensor, positions_3T: Tensor) -> Tensor:
        """Embeddings -> last hidden states (B, T, D). Right-padded; all rows share one layout of positions."""
        turn = self._angles(positions_3T[:, None])
        x = x_BTD
        for layer in self.text.layers:
            y = _norm(x, layer.input_layernorm)
            x = x + (self._delta(layer, y, None) if layer.layer_type == "linear_attention" else self._attend(layer, y, turn))
            y = _norm(x, layer.post_attention_layernorm)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
        return _norm(x, self.text.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.text.embed_tokens.weight)
