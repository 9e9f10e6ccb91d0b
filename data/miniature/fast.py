"""A CPU forward and decoder for the miniature: the same maths as transformers' Qwen3.5, several times faster.

transformers' pure-torch GatedDeltaNet loops over the rows of every chunk, and its vision tower over the
images of a batch. Here each chunk's recurrence is one triangular solve and the images of a batch share one
call. Prompts are padded on the right: every layer is causal, so padding needs no mask. tests/data checks
equality with the library.

Shapes: B batch, T tokens, H heads, D head dimension, C chunk, N image tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5ForConditionalGeneration

from vopd.backbone.delta_rule import gated_delta_rule, unit


def _norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), 1.0 + module.weight, module.eps)


def delta_step(
    q_B1HD: Tensor, k_B1HD: Tensor, v_B1HD: Tensor, g_B1H: Tensor, beta_B1H: Tensor, state_BHDD: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the same recurrence; shapes as `gated_delta_rule` with T = 1."""
    q, k, v = unit(q_B1HD)[:, 0] * q_B1HD.shape[-1] ** -0.5, unit(k_B1HD)[:, 0], v_B1HD[:, 0]
    state = state_BHDD * g_B1H[:, 0, :, None, None].exp()
    fresh = (v - torch.einsum("bhd,bhde->bhe", k, state)) * beta_B1H[:, 0, :, None]
    state = state + k[..., None] * fresh[..., None, :]
    return torch.einsum("bhd,bhde->bhe", q, state)[:, None], state


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels; the rest pass."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class FastMiniature:
    """Functions over a model's own parameters: training them here trains the model."""

    def __init__(self, model: Qwen3_5ForConditionalGeneration) -> None:
        self.model = model
        self.text = model.model.language_model
        self.visual = model.model.visual
        self.image_token = model.config.image_token_id
        self._grids: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    # ---- vision
    def _grid(self, rows: int, cols: int) -> tuple[Tensor, ...]:
        """Bilinear indices and weights of the position table, and rotary angles, in merge-window order."""
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
        return x.masked_scatter((ids_BT == self.image_token)[..., None], seen_BND.to(x.dtype))

    @staticmethod
    def positions(before: int, rows: int, cols: int, length: int) -> Tensor:
        """(3, T) temporal, height and width positions: `before` text tokens, rows x cols image, text."""
        if rows == 0:
            return torch.arange(length).expand(3, -1)
        picture = torch.stack(
            [
                torch.zeros(rows * cols),
                torch.arange(rows).repeat_interleave(cols),
                torch.arange(cols).repeat(rows),
            ]
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

    def _delta(self, layer: torch.nn.Module, x: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
        m, (batch, length, _) = layer.linear_attn, x.shape
        raw = m.in_proj_qkv(x).transpose(1, 2)
        if cache:
            wide = torch.cat([cache["conv"], raw], 2)
        else:
            wide = F.pad(raw, (m.conv_kernel_size - 1, 0))
        mixed = F.silu(F.conv1d(wide, m.conv1d.weight, groups=m.conv_dim)).transpose(1, 2).float()
        q, k, v = (
            part.reshape(batch, length, -1, m.head_k_dim)
            for part in mixed.split([m.key_dim, m.key_dim, m.value_dim], -1)
        )
        beta = m.in_proj_b(x).float().sigmoid()
        g = -m.A_log.exp() * F.softplus(m.in_proj_a(x).float() + m.dt_bias)
        with torch.autocast("cpu", enabled=False):
            if cache:
                out, state = delta_step(q, k, v, g, beta, cache["state"])
            else:
                out, state = gated_delta_rule(q, k, v, g, beta)
        if cache is not None:
            cache["conv"], cache["state"] = wide[:, :, length:], state
        gate = m.in_proj_z(x).reshape(out.shape)
        out = F.rms_norm(out, (out.shape[-1],), m.norm.weight, m.norm.variance_epsilon) * F.silu(gate)
        return m.out_proj(out.reshape(batch, length, -1))

    def _attend(
        self, layer: torch.nn.Module, x: Tensor, turn: tuple[Tensor, Tensor], cache: dict[str, Tensor] | None
    ) -> Tensor:
        m, (batch, length, _) = layer.self_attn, x.shape
        q, gate = m.q_proj(x).view(batch, length, -1, 2 * m.head_dim).chunk(2, -1)
        k = m.k_proj(x).view(batch, length, -1, m.head_dim)
        v = m.v_proj(x).view(batch, length, -1, m.head_dim).transpose(1, 2)
        q, k = _norm(q, m.q_norm).transpose(1, 2), _norm(k, m.k_norm).transpose(1, 2)
        q, k = _rotate(q, *turn), _rotate(k, *turn)
        if cache:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        if cache is not None:
            cache["k"], cache["v"] = k, v
        out = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), is_causal=length > 1, enable_gqa=True
        )
        return m.o_proj(
            out.transpose(1, 2).reshape(batch, length, -1) * gate.reshape(batch, length, -1).sigmoid()
        )

    def hidden(
        self, x_BTD: Tensor, positions_3T: Tensor, caches: list[dict[str, Tensor]] | None = None
    ) -> Tensor:
        """Embeddings -> last hidden states (B, T, D). All rows share one layout of positions.

        Without caches rows may be padded on the right. With caches (one dict a layer, filled here) the
        first call reads equally long prompts and every later call one token.
        """
        turn = self._angles(positions_3T[:, None])
        x = x_BTD
        for i, layer in enumerate(self.text.layers):
            cache = caches[i] if caches is not None else None
            y = _norm(x, layer.input_layernorm)
            if layer.layer_type == "linear_attention":
                x = x + self._delta(layer, y, cache)
            else:
                x = x + self._attend(layer, y, turn, cache)
            y = _norm(x, layer.post_attention_layernorm)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
        return _norm(x, self.text.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.text.embed_tokens.weight)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        images_BHWC: Tensor,
        limit: int,
        end: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Responses (with `end` where it was said) to prompts of ONE length; temperature 0 is greedy."""
        ids = torch.tensor(prompts)
        draws = torch.Generator().manual_seed(seed)
        before = int((ids[0] == self.image_token).nonzero()[0])
        rows, cols = (side // (2 * self.visual.config.patch_size) for side in images_BHWC.shape[1:3])
        positions = self.positions(before, rows, cols, ids.shape[1] + limit)
        caches: list[dict[str, Tensor]] = [{} for _ in self.text.layers]
        x, at = self.embed(ids, self.see(images_BHWC)), ids.shape[1]
        h = self.hidden(x, positions[:, :at], caches)[:, -1:]
        said, done = [], torch.zeros(len(prompts), dtype=torch.bool)
        for step in range(limit):
            logits = self.logits(h)[:, 0]
            if temperature:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws)[:, 0]
            else:
                token = logits.argmax(-1)
            said.append(token)
            done |= token == end
            if done.all() or step == limit - 1:
                break
            h = self.hidden(self.embed(token[:, None], None), positions[:, at + step : at + step + 1], caches)
        rows_said = torch.stack(said, 1).tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows_said]
