"""Computes a model's multiply-accumulates from its shape.

These are the multiply-accumulates (MACs) of one image in the image tower, in convolutions, linear layers and attention. As
in open_clip's count, the last layer's attention has a query for every token, although only one token is used.

Legend: S side of the image, G side of the grid of patches or of the last map, L tokens, D width, C channels, E embedding
size.
"""

from __future__ import annotations

from clipcore.towers.architectures import ModelConfig, VisionConfig

_BLOCK_EXPANSION = 4  # factor of a ResNet's channels in the last convolution of each block


def image_macs(config: ModelConfig) -> int:
    """Return the MACs of one image through a model's image tower, without norms and activations.

    >>> from clipcore.towers.architectures import find_model
    >>> round(2e-9 * image_macs(find_model("ViT-B-32")), 2)  # GFLOPs
    8.82
    """
    if isinstance(config.vision.layers, tuple):
        return _resnet_macs(config.vision, config.vision.layers, config.embed_dim)
    return _vit_macs(config.vision, config.vision.layers, config.embed_dim)


def _vit_macs(vision: VisionConfig, layers: int, embed_dim: int) -> int:
    assert vision.patch_size is not None
    D, G = vision.width, vision.image_size // vision.patch_size
    L = G**2 + (not vision.has_map)
    patches = G**2 * 3 * vision.patch_size**2 * D
    mlp = int(D * vision.mlp_ratio)
    layer = L * D * (4 * D + 2 * mlp) + _attention_macs(L, D)
    # SigLIP's head: the query's projections once, keys and values for every token, and an MLP of one token.
    head = D * (2 * D + 2 * mlp) + 2 * L * D**2 + 2 * L * D if vision.has_map else D * embed_dim
    return patches + layers * layer + head


def _resnet_macs(vision: VisionConfig, stages: tuple[int, int, int, int], embed_dim: int) -> int:
    half, side = vision.width // 2, vision.image_size // 2
    macs = side**2 * 9 * (3 * half + half * half + half * vision.width)

    # The stem's pool and each stage except the first halve the map.
    side, channels = side // 2, vision.width
    for stage, num_blocks in enumerate(stages):
        planes = vision.width * 2**stage
        for block in range(num_blocks):
            macs += side**2 * (channels * planes + 9 * planes**2)
            # The second convolution's map is pooled before the third.
            if block == 0 and stage > 0:
                side //= 2
            out_channels = planes * _BLOCK_EXPANSION
            macs += side**2 * planes * out_channels
            if block == 0:
                macs += side**2 * channels * out_channels
            channels = out_channels

    L = side**2 + 1
    return macs + L * channels * (3 * channels + embed_dim) + _attention_macs(L, channels)


def _attention_macs(L: int, D: int) -> int:
    """Return the MACs of scores and weighted sums."""
    return 2 * L**2 * D
