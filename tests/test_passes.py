"""The passes over a block of logits as sm_90 runs them: instructions of an element, spills, width of loads.

They are meant to be bound by memory. What one element takes in the strips that lie away from the diagonal and the block's
end, which are nearly all, is counted in the machine code, so that no change of ours or of the compiler's doubles it unseen.
"""

from __future__ import annotations

import pytest
import torch
from aot import Kernel, assert_compiled_well, compiled
from problems import ids_for
from sass import main_loop

from clipcore.kernels.contrastive.gpu import contrastive_bwd_gpu, contrastive_fwd_gpu
from clipcore.kernels.contrastive.targets import uniform_targets
from clipcore.kernels.logits.pairs import LossInputs, Pairs
from clipcore.kernels.sigmoid.gpu import sigmoid_fwd_gpu

AOT_ARCHITECTURES = (90,)
AOT_NAMES = "_pass$"
AOT_TURNS = True

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "ignore": {"same_id": "ignore"},
    "ignore, smoothed": {"same_id": "ignore", "label_smoothing": 0.1},
    "positive, smoothed": {"same_id": "positive", "label_smoothing": 0.1},
}

# Rows and columns of the matrix: multiples of 16 or odd.
SIZES = [(1024, 2048), (1023, 2047), (1024, 2047), (1023, 2048)]

# (pass, whether with a stash) to the most machine instructions of an element, without ids or spread targets.
MOST_INSTRUCTIONS = {
    ("contrastive_sums_pass", False): 8,
    ("contrastive_sums_pass", True): 19,
    ("contrastive_gradient_pass", False): 10,
    ("contrastive_gradient_pass", True): 12,
    ("sigmoid_pass", False): 20,
}


def aot_launches() -> None:
    """Every pass at every divisibility; with ids and targets too, which have rows of the launch table of their own.

    These at one size each: tests/test_contrastive.py has them at others.
    """
    for B, G in SIZES:
        launch_all(B, G, "plain", torch.float16)
    even, odd = SIZES[:2]
    launch_all(*odd, "plain", torch.float32, stashes=(False,))
    launch_all(*even, "ignore", torch.float16)
    launch_all(*odd, "ignore, smoothed", torch.float16)
    launch_all(*even, "positive, smoothed", torch.float16)


def launch_all(
    B: int, G: int, option: str, operand: torch.dtype, stashes: tuple[bool, ...] = (False, True)
) -> None:
    """Launch the passes of both losses, recomputed and from a stash."""
    image, text = (torch.empty(rows, 512, dtype=operand, device="meta") for rows in (B, G))
    keywords = ids_for(OPTIONS[option], B, G, "meta")
    ids = keywords.get("image_ids"), keywords.get("text_ids")
    which = Pairs(ids[0], ids[1], 0, str(keywords.get("same_id", "ignore")))
    scale, targets = torch.empty((), device="meta"), None
    if option not in ("plain", "ignore"):
        targets = uniform_targets(image, text, which, 0.1)

    inputs = LossInputs(image, text, scale, which, True, operand, "library", 576 * 10**6)
    for stash in stashes:
        outputs = contrastive_fwd_gpu(inputs, targets, stash)
        upstream = [
            *outputs.logarithms[:2],
            outputs.row_target_log2_B,
            outputs.column_target_log2_G,
        ]
        contrastive_bwd_gpu(inputs, targets, upstream, outputs, (True, True))
    if targets is None:
        for backward in (False, True):
            sigmoid_fwd_gpu(inputs, scale, backward, (backward, backward))


def passes() -> list[Kernel]:
    """Return the compiled kernels that are passes."""
    return [kernel for kernel in compiled("test_passes") if kernel.turn]


def is_plain(kernel: Kernel) -> bool:
    """Return whether a kernel has neither ids nor spread targets, and leaves what its loss needs."""
    constants = kernel.constants
    return (
        constants["IDS"] == "none"
        and not constants.get("TARGETS", False)
        and constants.get("GRADIENT", True)
    )


def test_ahead_of_time_no_spills_at_any_divisibility() -> None:
    assert_compiled_well(compiled("test_passes"))
    lengths = {frozenset(kernel.divisible) & {"N", "M"} for kernel in passes()}
    assert lengths == {frozenset("NM"), frozenset("N"), frozenset("M"), frozenset()}


# Of the sigmoid loss's form for any logit, which divides; 52 before the passes were by strips.
MOST_DIVIDING = 36


def test_ahead_of_time_instructions_of_the_sigmoid_losss_full_form() -> None:
    chosen = [kernel for kernel in passes() if kernel.name == "sigmoid_pass" and is_plain(kernel)]
    assert len(chosen) >= len(SIZES)
    for kernel in chosen:
        elements = kernel.constants["COLS"] * kernel.constants["STEP"] // 32
        assert sum("MUFU.RCP" in text for text in kernel.dividing_turn) == elements, str(kernel)
        assert len(kernel.dividing_turn) <= MOST_DIVIDING * elements, str(kernel)


@pytest.mark.parametrize(("name", "has_stash"), MOST_INSTRUCTIONS)
def test_ahead_of_time_instructions_of_an_element(name: str, has_stash: bool) -> None:
    """In an interior strip. One exponential an element shows that a turn is of all its elements."""
    chosen = [
        kernel
        for kernel in passes()
        if kernel.name == name
        and is_plain(kernel)
        and kernel.constants.get("STASH", False) == has_stash
    ]
    assert len(chosen) >= len(SIZES)
    for kernel in chosen:
        elements = kernel.constants["COLS"] * kernel.constants["STEP"] // 32
        exponentials = sum("MUFU.EX2" in text for text in kernel.turn)
        assert exponentials == elements, str(kernel)
        count = len(kernel.turn) / elements
        assert count <= MOST_INSTRUCTIONS[name, has_stash], f"{kernel}: {count:.1f}"


def test_ahead_of_time_logits_are_loaded_16_bytes_at_a_time() -> None:
    """And gradients and codes stored, whether the lengths are multiples of 16 or not: rows begin at such ones."""
    for kernel in passes():
        elements = kernel.constants["COLS"] * kernel.constants["STEP"] // 32
        reads_codes = kernel.constants.get("STASH", False) and "gradient" in kernel.name
        wide = [text for text in kernel.turn if ".128" in text]
        loads = sum("LDG" in text for text in wide)
        assert loads >= elements * (2 if reads_codes else 4) // 16, str(kernel)

        writes_logits = kernel.constants.get("STASH", False) or kernel.constants.get("GRADIENT")
        if writes_logits or "gradient" in kernel.name:
            assert sum("STG" in text for text in wide) >= elements * 2 // 16, str(kernel)


@pytest.mark.fast
def test_the_shortest_turn_of_the_loop_of_the_most_elements() -> None:
    lines = [
        "@!P0 BRA 0x90",
        "MUFU.EX2 R1, R1",  # 0x10, the head
        "@P1 BRA 0x50",
        "FADD R2, R1, R1",
        "MUFU.EX2 R3, R2",
        "STG.E.128 desc[UR6][R10.64], R4",  # 0x50
        "BRA 0x80",
        "FADD R5, R5, R5",
        "@P2 BRA 0x10",
        "MUFU.EX2 R6, R6",  # 0x90, another loop
        "@P3 BRA 0x90",
        "EXIT",
    ]
    sass = "\n".join(f"  /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(lines))
    turn = [lines[1], "@P1 BRA 0x50", lines[5], "BRA 0x80", "@P2 BRA 0x10"]
    assert [text.strip() for text in main_loop(sass)] == turn
    # By the longer branch, and by what only the other loop has.
    turn = [*lines[1:6], "BRA 0x80", "@P2 BRA 0x10"]
    assert [text.strip() for text in main_loop(sass, through="FADD R2")] == turn
    assert main_loop(sass, through="MUFU.EX2 R6") == ()
