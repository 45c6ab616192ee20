"""The models of open_clip that clipcore's towers can be, in the layout of open_clip's JSON files.

A key that is left out has the default of ``VisionConfig`` or ``TextConfig``. Sources: Radford et al. 2021, tables 19 and 20;
open_clip's model_configs for all others; timm's models.vision_transformer for SigLIP's image towers.
"""

from __future__ import annotations

from typing import Any

Description = dict[str, Any]


def _text(width: int, layers: int = 12, **more: Any) -> Description:
    return {"width": width, "heads": width // 64, "layers": layers, **more}


def _vit(
    embed_dim: int, layers: int, width: int, patch: int, text: Description, **vision: Any
) -> Description:
    tower = {"layers": layers, "width": width, "patch_size": patch, **vision}
    return {"embed_dim": embed_dim, "vision_cfg": tower, "text_cfg": text}


def _resnet(
    embed_dim: int, layers: list[int], width: int, image_size: int, text: Description
) -> Description:
    tower = {"layers": layers, "width": width, "image_size": image_size}
    return {"embed_dim": embed_dim, "vision_cfg": tower, "text_cfg": text}


# The image towers that are larger than L.
_H = {"head_width": 80}
_G = {"head_width": 104, "mlp_ratio": 4.9231}


# CLIPA (Li et al. 2023): no class token in the output, and BERT's vocabulary.


def _clipa_text(width: int, layers: int) -> Description:
    return _text(
        width,
        layers,
        context_length=32,
        vocab_size=32000,
        hf_tokenizer_name="bert-base-uncased",
        tokenizer_kwargs={"strip_sep_token": True},
        pool_type="last",
        no_causal_mask=True,
    )


_CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}

# The models of many languages (Chuang et al. 2025, MetaCLIP 2).
_XLM_V: Description = {
    "hf_tokenizer_name": "facebook/xlm-v-base",
    "vocab_size": 901629,
    "pool_type": "eos",
    "eos_id": 2,
}
_MT5: Description = {
    "hf_tokenizer_name": "google/mt5-base",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "vocab_size": 250100,
    "pool_type": "eos",
    "eos_id": 1,
}


# SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025).


def _siglip_tower(
    width: int, layers: int, heads: int, mlp_ratio: float, patch: int, image_size: int, tanh: bool
) -> Description:
    return {
        "image_size": image_size,
        "layers": layers,
        "width": width,
        "patch_size": patch,
        "head_width": width // heads,
        "mlp_ratio": mlp_ratio,
        "pool_type": "map",
        "norm_eps": 1e-6,
        "gelu_tanh": tanh,
    }


# Width, layers, heads and MLP ratio.
_SIGLIP_SIZES = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
# timm's names for SigLIP's image towers, which open_clip's descriptions have, with the fields of ``VisionConfig``. The
# activation follows the name: of a shape that both SigLIP and SigLIP 2 have, it is SigLIP's.
TIMM_TOWERS: dict[str, Description] = {
    f"vit_{size}_patch{patch}_siglip_{image_size}": _siglip_tower(
        *_SIGLIP_SIZES[size], patch, image_size, tanh
    )
    for size, patch, image_size, tanh in (
        *(("base", 16, image_size, False) for image_size in (224, 256, 384, 512)),
        *(("large", 16, image_size, False) for image_size in (256, 384)),
        *(("so400m", 14, image_size, False) for image_size in (224, 378, 384)),
        ("base", 32, 256, True),
        ("large", 16, 512, True),
        *(("so400m", 16, image_size, True) for image_size in (256, 384, 512)),
        *(("giantopt", 16, image_size, True) for image_size in (256, 384)),
    )
}
# Of SigLIP's text towers: every token sees every other, padding included, and the row's last one has the features.
SIGLIP_TEXT: Description = {"no_causal_mask": True, "pool_type": "last"}
# What open_clip's descriptions say beside the name of such a tower.
TIMM_KEYS: Description = {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}


def _siglip(
    size: str,
    patch: int,
    image_size: int,
    vocabulary: str,
    vocab_size: int,
    text_size: str = "",
    **text: Any,
) -> Description:
    """Return a description; the text tower has the size of the image tower, or another one's."""
    width, layers, heads, mlp_ratio = _SIGLIP_SIZES[text_size or size]
    tower = {
        "image_size": image_size,
        "timm_model_name": f"vit_{size}_patch{patch}_siglip_{image_size}",
        **TIMM_KEYS,
    }
    return {
        "embed_dim": _SIGLIP_SIZES[size][0],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": tower,
        "text_cfg": {
            "context_length": 64,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": f"timm/{vocabulary}",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": width,
            "heads": heads,
            "layers": layers,
            "mlp_ratio": mlp_ratio,
            **SIGLIP_TEXT,
            "proj_bias": True,
            "norm_kwargs": {"eps": 1e-6},
            **text,
        },
    }


def _siglip_1(size: str, patch: int, image_size: int, **text: Any) -> Description:
    return _siglip(size, patch, image_size, "ViT-B-16-SigLIP", 32000, **text)


def _siglip_i18n(size: str, patch: int, image_size: int, **text: Any) -> Description:
    return _siglip(size, patch, image_size, "ViT-B-16-SigLIP-i18n-256", 250000, **text)


def _siglip_2(name: str, size: str, patch: int, image_size: int) -> Description:
    text_size = "so400m" if size == "giantopt" else ""
    act_kwargs = {"approximate": "tanh"}
    return _siglip(size, patch, image_size, name, 256000, text_size, act_kwargs=act_kwargs)


OPEN_CLIP_MODELS: dict[str, Description] = {
    "RN50": _resnet(1024, [3, 4, 6, 3], 64, 224, _text(512)),
    "RN101": _resnet(512, [3, 4, 23, 3], 64, 224, _text(512)),
    "RN50x4": _resnet(640, [4, 6, 10, 6], 80, 288, _text(640)),
    "RN50x16": _resnet(768, [6, 8, 18, 8], 96, 384, _text(768)),
    "RN50x64": _resnet(1024, [3, 15, 36, 10], 128, 448, _text(1024)),
    "ViT-S-32": _vit(384, 12, 384, 32, _text(384)),
    "ViT-S-32-alt": _vit(256, 12, 384, 32, _text(256, layers=10)),
    "ViT-S-16": _vit(384, 12, 384, 16, _text(384)),
    "ViT-S-16-alt": _vit(256, 12, 384, 16, _text(256, layers=10)),
    "ViT-M-32": _vit(512, 12, 512, 32, _text(512)),
    "ViT-M-32-alt": _vit(384, 12, 512, 32, _text(384)),
    "ViT-M-16": _vit(512, 12, 512, 16, _text(512)),
    "ViT-M-16-alt": _vit(384, 12, 512, 16, _text(384), ls_init_value=1e-4),
    "ViT-B-32": _vit(512, 12, 768, 32, _text(512)),
    "ViT-B-32-256": _vit(512, 12, 768, 32, _text(512), image_size=256),
    "ViT-B-32-plus-256": _vit(640, 12, 896, 32, _text(640), image_size=256),
    "ViT-B-16": _vit(512, 12, 768, 16, _text(512)),
    "ViT-B-16-plus": _vit(640, 12, 896, 16, _text(640)),
    "ViT-B-16-plus-240": _vit(640, 12, 896, 16, _text(640), image_size=240),
    "ViT-L-16": _vit(768, 24, 1024, 16, _text(768)),
    "ViT-L-16-320": _vit(768, 24, 1024, 16, _text(768), image_size=320),
    "ViT-L-14": _vit(768, 24, 1024, 14, _text(768)),
    "ViT-L-14-280": _vit(768, 24, 1024, 14, _text(768), image_size=280),
    "ViT-L-14-336": _vit(768, 24, 1024, 14, _text(768), image_size=336),
    "ViT-H-16": _vit(1024, 32, 1280, 16, _text(1024, layers=24), **_H),
    "ViT-H-14": _vit(1024, 32, 1280, 14, _text(1024, layers=24), **_H),
    "ViT-H-14-378": _vit(1024, 32, 1280, 14, _text(1024, layers=24), image_size=378, **_H),
    "ViT-g-14": _vit(1024, 40, 1408, 14, _text(1024, layers=24), head_width=88, mlp_ratio=4.3637),
    "ViT-bigG-14": _vit(1280, 48, 1664, 14, _text(1280, layers=32), **_G),
    "ViT-e-14": _vit(1280, 56, 1792, 14, _text(1280, layers=36), head_width=112, mlp_ratio=8.5715),
    "ViT-L-14-CLIPA": _vit(768, 24, 1024, 14, _clipa_text(768, 12), **_CLIPA),
    "ViT-L-14-CLIPA-336": _vit(768, 24, 1024, 14, _clipa_text(768, 12), image_size=336, **_CLIPA),
    "ViT-H-14-CLIPA": _vit(1024, 32, 1280, 14, _clipa_text(1024, 24), **_H, **_CLIPA),
    "ViT-H-14-CLIPA-336": _vit(
        1024, 32, 1280, 14, _clipa_text(1024, 24), image_size=336, **_H, **_CLIPA
    ),
    "ViT-bigG-14-CLIPA": _vit(1280, 48, 1664, 14, _clipa_text(1280, 32), **_G, **_CLIPA),
    "ViT-bigG-14-CLIPA-336": _vit(
        1280, 48, 1664, 14, _clipa_text(1280, 32), image_size=336, **_G, **_CLIPA
    ),
    "ViT-L-14-worldwide": _vit(768, 24, 1024, 14, _text(768, **_MT5)),
    "ViT-H-14-worldwide": _vit(1024, 32, 1280, 14, _text(1024, layers=24, **_XLM_V), **_H),
    "ViT-H-14-worldwide-378": _vit(
        1024, 32, 1280, 14, _text(1024, layers=24, **_XLM_V), image_size=378, **_H
    ),
    "ViT-bigG-14-worldwide": _vit(1280, 48, 1664, 14, _text(1280, layers=32, **_XLM_V), **_G),
    "ViT-bigG-14-worldwide-378": _vit(
        1280, 48, 1664, 14, _text(1280, layers=32, **_XLM_V), image_size=378, **_G
    ),
    "ViT-B-16-SigLIP": _siglip_1("base", 16, 224),
    "ViT-B-16-SigLIP-256": _siglip_1("base", 16, 256),
    "ViT-B-16-SigLIP-384": _siglip_1("base", 16, 384),
    "ViT-B-16-SigLIP-512": _siglip_1("base", 16, 512),
    "ViT-L-16-SigLIP-256": _siglip_1("large", 16, 256),
    "ViT-L-16-SigLIP-384": _siglip_1("large", 16, 384),
    "ViT-SO400M-14-SigLIP": _siglip_1("so400m", 14, 224, context_length=16),
    "ViT-SO400M-14-SigLIP-378": _siglip_1("so400m", 14, 378),
    "ViT-SO400M-14-SigLIP-384": _siglip_1("so400m", 14, 384),
    "ViT-B-16-SigLIP-i18n-256": _siglip_i18n("base", 16, 256),
    "ViT-SO400M-16-SigLIP-i18n-256": _siglip_i18n(
        "so400m", 16, 256, proj_type="none", proj_bias=False
    ),
    **{
        name: _siglip_2(name, size, patch, image_size)
        for name, size, patch, image_size in (
            ("ViT-B-32-SigLIP2-256", "base", 32, 256),
            ("ViT-B-16-SigLIP2", "base", 16, 224),
            ("ViT-B-16-SigLIP2-256", "base", 16, 256),
            ("ViT-B-16-SigLIP2-384", "base", 16, 384),
            ("ViT-B-16-SigLIP2-512", "base", 16, 512),
            ("ViT-L-16-SigLIP2-256", "large", 16, 256),
            ("ViT-L-16-SigLIP2-384", "large", 16, 384),
            ("ViT-L-16-SigLIP2-512", "large", 16, 512),
            ("ViT-SO400M-14-SigLIP2", "so400m", 14, 224),
            ("ViT-SO400M-14-SigLIP2-378", "so400m", 14, 378),
            ("ViT-SO400M-16-SigLIP2-256", "so400m", 16, 256),
            ("ViT-SO400M-16-SigLIP2-384", "so400m", 16, 384),
            ("ViT-SO400M-16-SigLIP2-512", "so400m", 16, 512),
            ("ViT-gopt-16-SigLIP2-256", "giantopt", 16, 256),
            ("ViT-gopt-16-SigLIP2-384", "giantopt", 16, 384),
        )
    },
}
