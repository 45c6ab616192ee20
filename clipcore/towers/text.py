"""The text tower: a transformer whose output is at one token, CLIP's causal and at the end-of-text token.

Legend: B captions, L tokens of a row, D width, E embedding size, V vocabulary.
Source: Radford et al. 2021, section 2.4; Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.data.packing import PackedText, check_token_rows
from clipcore.towers.architectures import TextConfig
from clipcore.towers.intermediates import Indices, run_blocks
from clipcore.towers.modules import (
    LayerNorm,
    ResidualAttentionBlock,
    Transformer,
    compute_dtype,
    freeze_all_but_last,
    is_hooked,
    read_pooled,
)


class TextTower(nn.Module):
    """Token rows [B, L] to features [B, E], read at the token that ``TextConfig.pool_type`` names.

    In CLIP's it is the end-of-text token, which has the largest id of the vocabulary. A row may be shorter than the context
    length. This token does not attend to later ones, so rows truncated to the longest caption of a batch give the same
    features, and so do captions packed without padding. SigLIP's towers attend to the padding, so there is neither.
    """

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.context_length, self.vocab_size = config.context_length, config.vocab_size
        self.ignores_padding = config.ignores_padding
        self._pool_type, self._eos_id = config.pool_type, config.eos_id
        self.transformer = Transformer(
            *(config.width, config.layers, config.heads, config.mlp_ratio, quick_gelu),
            is_causal=not config.no_causal_mask,
            gelu_tanh=config.gelu_tanh,
            norm_eps=config.norm_eps,
            ls_init_value=config.ls_init_value,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.ln_final = LayerNorm(config.width, config.norm_eps)
        # A matrix in CLIP, a layer with a bias in SigLIP, or nothing.
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if config.proj_type == "linear" and config.proj_bias:
            self.text_projection = nn.Linear(config.width, embed_dim)
        elif config.proj_type == "linear":
            self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._initialize()

    def _initialize(self) -> None:
        """Initialise as OpenAI's code does: by width, and the residual projections by depth too."""
        width, depth = self.transformer.width, len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            c_fc, _, c_proj = block.mlp
            nn.init.normal_(cast(nn.Linear, c_fc).weight, std=(2 * width) ** -0.5)
            nn.init.normal_(cast(nn.Linear, c_proj).weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def encode_text(self, text: Tensor | PackedText, normalize: bool = False) -> Tensor:
        """Return features of captions.

        Args:
            text: ids [B, L] with L at most the context length, which the CPU truncates after the longest caption; or
                captions that ``pack_captions`` has packed, with the same features.
            normalize: scale each feature to unit length.

        Raises:
            ValueError: rows or captions are too long, rows are empty, or on the CPU ids are not in the vocabulary.
            TypeError: these are not ids, but for example text.
        """
        if not isinstance(text, PackedText):
            check_token_rows(text)
        packed = text if isinstance(text, PackedText) else None
        length = text.slots_BM.shape[1] if isinstance(text, PackedText) else text.shape[-1]
        if (packed is None and text.ndim != 2) or not 1 <= length <= self.context_length:  # type: ignore[union-attr]
            shape = f"captions of {length} tokens" if packed else f"{tuple(text.shape)}"  # type: ignore[union-attr]
            raise ValueError(
                f"the model takes token rows [B, L] with L from 1 to {self.context_length}, got {shape}; "
                f"tokenize with context_length={self.context_length}"
            )
        dtype = self._dtype
        if isinstance(text, PackedText):
            self._check_packed()
            self._check_ids(text.ids_RP)
            positions_RLD = F.embedding(text.positions_RP, self.positional_embedding)
            x_RLD = self.token_embedding(text.ids_RP).to(dtype) + positions_RLD.to(dtype)
            pooled_BD = read_pooled(self.transformer, x_RLD, packed=text)
        else:
            self._check_ids(text)
            end_B = self._ends(text)
            text = self._without_padding(text, end_B)
            x_RLD = self.token_embedding(text).to(dtype)
            x_RLD = x_RLD + self.positional_embedding[: text.shape[1]].to(dtype)
            pooled_BD = read_pooled(self.transformer, x_RLD, end_B)
        features_BE = self._project(self.ln_final(pooled_BD))
        return F.normalize(features_BE, dim=-1) if normalize else features_BE

    def text_intermediates(
        self, text_BL: Tensor, indices: Indices = None, normalize_intermediates: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of single blocks at every token, [B, L, D], and the features of the captions, [B, E].

        Args:
            text_BL: ids with L at most the context length.
            indices: see ``CLIP.forward_intermediates``.
            normalize_intermediates: apply the last LayerNorm to the outputs.

        Raises:
            ValueError: rows are too long, or captions are packed.
        """
        if isinstance(text_BL, PackedText):
            raise ValueError("forward_intermediates takes token rows [B, L], not packed captions")
        check_token_rows(text_BL)
        if text_BL.ndim != 2 or not 1 <= text_BL.shape[1] <= self.context_length:
            raise ValueError(
                f"the model takes token rows [B, L] with L from 1 to {self.context_length}, got {tuple(text_BL.shape)}; "
                f"tokenize with context_length={self.context_length}"
            )
        self._check_ids(text_BL)
        dtype = self._dtype
        x_BLD = self.token_embedding(text_BL).to(dtype)
        x_BLD = x_BLD + self.positional_embedding[: text_BL.shape[1]].to(dtype)
        x_BLD, found = run_blocks(self.transformer, x_BLD, indices)
        if normalize_intermediates:
            found = [self.ln_final(y_BLD) for y_BLD in found]
        rows_B = torch.arange(len(x_BLD), device=x_BLD.device)
        pooled_BD = self.ln_final(x_BLD[rows_B, self._ends(text_BL)])
        return found, self._project(pooled_BD)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the stream."""
        projection = self.text_projection
        if isinstance(projection, Tensor):
            return compute_dtype(projection)
        module = self.transformer if projection is None else projection
        return compute_dtype(next(weight for weight in module.parameters() if weight.ndim == 2))

    def _project(self, pooled_BD: Tensor) -> Tensor:
        projection = self.text_projection
        if isinstance(projection, Tensor):
            return pooled_BD @ projection
        return pooled_BD if projection is None else projection(pooled_BD)

    def _ends(self, text_BL: Tensor) -> Tensor:
        """Return the position of the token that the features of each row are read from, [B]."""
        if self._pool_type == "last":
            return torch.full_like(text_BL[:, 0], text_BL.shape[1] - 1)
        if self._pool_type == "eos":
            return (text_BL == self._eos_id).int().argmax(-1)
        return text_BL.argmax(-1)

    def _check_packed(self) -> None:
        if not self.ignores_padding:
            raise ValueError(
                "packed captions have no padding and end at their largest id, and this text tower reads its features at "
                "another token or attends to the padding; give it padded rows [B, L]"
            )

    def _check_ids(self, text_BL: Tensor) -> None:
        """Raise ValueError for ids that the embedding does not have, on the CPU; a GPU would have to synchronise."""
        if text_BL.device.type != "cpu" or not _has_values(text_BL) or not text_BL.numel():
            return
        size = getattr(self.token_embedding, "num_embeddings", self.vocab_size)
        least, largest = (int(end) for end in text_BL.aminmax())
        if least < 0 or largest >= size:
            wrong = least if least < 0 else largest
            raise ValueError(
                f"the token {wrong} is not among the model's {size}: tokenize with the vocabulary that it was trained with, "
                "such as get_tokenizer(model_name)"
            )

    def _without_padding(self, text_BL: Tensor, end_B: Tensor) -> Tensor:
        """Return the rows truncated after the longest caption, on the CPU.

        A GPU would have to synchronise for the length, and compilers and fake tensors have no values. Modules with hooks
        or replaced ones may expect all columns, and a tower that is not causal attends to them.
        """
        if text_BL.device.type != "cpu" or not _has_values(text_BL) or not text_BL.numel():
            return text_BL
        if not isinstance(self.transformer, Transformer):
            return text_BL
        blocks = self.transformer.blocks
        hookable = (self.token_embedding, self.transformer, *blocks)
        is_as_made = type(self.token_embedding) is nn.Embedding and all(
            isinstance(block, ResidualAttentionBlock) and block.is_as_made() for block in blocks
        )
        if not self.transformer.is_causal or not is_as_made or any(map(is_hooked, hookable)):
            return text_BL
        return text_BL[:, : int(end_B.max()) + 1]

    def text_layer_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """Return the tower's parts from input to output: embeddings, blocks, last block with ln_final, projection."""
        *blocks, last = self.transformer.blocks
        groups: list[list[nn.Module | nn.Parameter]] = [
            [self.token_embedding, self.positional_embedding],
            *([block] for block in blocks),  # type: ignore[list-item]
            [last, self.ln_final],
        ]
        return groups if self.text_projection is None else [*groups, [self.text_projection]]

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze all but the last groups of ``text_layer_groups``.

        Args:
            unlocked_layers: groups left free, counted from the end.
            freeze_layer_norm: accepted, as in open_clip; a frozen group's LayerNorms are frozen with it.
        """
        freeze_all_but_last(self.text_layer_groups(), unlocked_layers)


def _has_values(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be used: fake tensors have none, and a trace would fix them as constants."""
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(tensor) is Tensor and not is_recorded
