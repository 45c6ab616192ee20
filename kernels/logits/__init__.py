"""The logits of two sets of embeddings, block by block: what the losses over all pairs have in common.

    z_bg = scale * <x_b, y_g>      x, y = the rows as they are, or over their lengths (normalize.py)

Legend: B image rows, G text rows, E embedding size, R and C rows and columns of a block, N and M those of a kernel's
tile.

A loss walks over blocks of R x C logits. Only its pass over a block and its sums are its own; the walk is the same
for all of them: ``walk_gpu.LogitWalk`` and ``walk_cpu.LogitWalk``. Two engines make a block on a GPU:

- "library": the vendor's product into a float32 block, then one memory-bound Triton pass over it;
- "fused": a Triton product whose epilogue does the pass on the accumulators, with operands from tensor descriptors.

Either leaves the gradient of the block, which two library products with float32 sums turn into those of the
embeddings. The operands of the images are made for a row of blocks, those of the texts once for all: nothing but them and
the sums grows with B or G. In a small workspace each block makes its own. The CPU walks over smaller blocks, and in each
over chunks of rows that stay in its cache.

Precision: rows are normalised in float32 and rounded once to the operand dtype. For float16 and bfloat16 that is
float16 by default: a row of length one has nothing near the ends of its range, and its rounding moves a logit eight
times less than bfloat16's. float32 operands multiply in float32.

Files: ``pairs.py`` what both devices are given and its checks; ``walk_gpu.py`` and ``walk_cpu.py`` the walks;
for the first ``sides.py`` the sides of blocks, ``block.py`` a block, ``launch_rows.py`` how kernels over it are launched,
``gradient_sums.py`` and ``program_sums.py`` what is summed over all blocks, for the second ``pages.py`` large buffers;
``reference.py`` what the references share.
"""
