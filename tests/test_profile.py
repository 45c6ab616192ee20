"""--profile: bytes and FLOPs of operators by hand, times from the profiler's events, and runs that it leaves alone."""

from __future__ import annotations

import gc
import gzip
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import NANO, assert_same_bits
from shards import write_csv
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipcore.data.packing import pack_captions
from clipcore.kernels.attention import attention
from clipcore.kernels.contrastive import contrastive_loss
from clipcore.kernels.launch import visible_operators
from clipcore.kernels.sigmoid import sigmoid_loss
from clipcore.run.ceilings import Ceilings
from clipcore.run.flops import visible_pairs
from clipcore.run.profile import NUM_STEPS, STEP, make_rows, operator_times
from clipcore.run.traffic import Operator, Traffic, TrafficCounter

FLOAT = 4


def counted(fn) -> dict[Operator, Traffic]:
    with TrafficCounter() as counter:
        fn()
    return counter.found


def test_a_linear_layer_costs_its_formula_in_both_passes():
    x = torch.randn(6, 4, requires_grad=True)
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    found = counted(lambda: F.linear(x, weight, bias).sum().backward())
    forward = found[Operator("aten::addmm", False)]
    assert forward == Traffic(1, FLOAT * (6 * 4 + 5 * 4 + 5 + 6 * 5), 2 * 6 * 4 * 5)
    backward = found[Operator("aten::mm", True)]
    # dx from [6, 5] and [5, 4], dweight from [5, 6] and [6, 4]; the gradient of a sum is one number, expanded.
    assert backward == Traffic(2, FLOAT * (1 + 20 + 24 + 1 + 24 + 20), 2 * 2 * 6 * 4 * 5)
    assert Operator("aten::mm", False) not in found


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_costs_the_pairs_that_see_each_other(is_causal):
    R, L, H, K = 2, 7, 3, 8
    qkv = torch.randn(R, L, 3, H, K, requires_grad=True)
    found = counted(lambda: attention(qkv, is_causal).sum().backward())
    pairs = R * (L * (L + 1) // 2 if is_causal else L * L)
    assert found[Operator("clipcore::attention_forward", False)].flops == 4 * H * K * pairs
    assert found[Operator("clipcore::attention_backward", True)].flops == 10 * H * K * pairs
    output = R * L * H * K + R * L * H  # and the log-sum-exp
    assert found[Operator("clipcore::attention_forward", False)].bytes_moved == FLOAT * (
        qkv.numel() + output
    )


def test_packed_captions_cost_their_own_pairs_only():
    lengths = [3, 5, 9, 2, 128]
    tokens = torch.zeros(len(lengths), 128, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 1
        tokens[row, length - 1] = 9
    segments = pack_captions(tokens).segments_RP
    assert (segments < 0).any()
    rows, length = segments.shape
    assert visible_pairs(rows, length, True, segments) == sum(n * (n + 1) // 2 for n in lengths)
    assert visible_pairs(rows, length, False, segments) == sum(n * n for n in lengths)


@pytest.mark.parametrize(("stash_bytes", "products"), [(2**20, 3), (0, 4)])
def test_the_losses_cost_their_products(stash_bytes, products):
    B, E = 12, 8
    image, text = (torch.randn(B, E, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        contrastive_loss(image, text, 10.0, stash_bytes=stash_bytes).backward()
    assert counter.get_total_flops() == products * 2 * B * B * E
    with FlopCounterMode(display=False) as counter:
        sigmoid_loss(image, text, 10.0, -5.0).backward()
    assert counter.get_total_flops() == 3 * 2 * B * B * E
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sigmoid_loss(image, text, 10.0, -5.0)
    assert counter.get_total_flops() == 2 * B * B * E


def test_torchs_attention_costs_its_formula_on_the_cpu():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (1, 5, 5))
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 3 * 5 * 8


@pytest.mark.parametrize(
    ("work", "name", "num_bytes"),
    [
        (lambda x: x.view(-1).t(), "aten::view", 0),
        (lambda x: x.transpose(0, 1), "aten::transpose", 0),
        (lambda x: torch.empty_like(x), "aten::empty_like", 0),
        (lambda x: x.add_(1), "aten::add_", 2 * 48),
        (lambda x: x * x, "aten::mul", 2 * 48),  # one storage is read once
        (lambda x: x[0].expand(9, 4) + 0, "aten::add", 16 + 9 * 16),
        (lambda x: x[:, :2] * 1, "aten::mul", 24 + 24),
        (lambda x: x.copy_(torch.ones(3, 4)), "aten::copy_", 2 * 48),
        (lambda x: x.zero_(), "aten::zero_", 48),
        (lambda x: torch.zeros_like(x), "aten::zeros_like", 48),
        (lambda x: x.new_full((5,), 1.0), "aten::new_full", 20),
        (lambda x: x.bernoulli_(0.5), "aten::bernoulli_", 48),
        (lambda x: F.embedding(torch.tensor([1]), x), "aten::embedding", 8 + 16 + 16),
        (lambda x: torch._foreach_add([x, x[:1] + 1], 1.0), "aten::_foreach_add", 2 * (48 + 16)),
    ],
)
def test_bytes_of_an_operator(work, name, num_bytes):
    x = torch.ones(3, 4)
    assert counted(lambda: work(x))[Operator(name, False)].bytes_moved == num_bytes


def test_adamw_reads_gradients_and_writes_the_rest():
    parameter = torch.nn.Parameter(torch.ones(100))
    parameter.grad = torch.ones(100)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    found = counted(optimizer.step)[Operator("aten::_fused_adamw_", False)]
    assert found.bytes_moved == FLOAT * (7 * 100 + 1)  # and the count of steps


def test_counting_changes_no_number_and_keeps_no_tensor():
    def work() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
        attention(F.dropout(qkv, 0.5)).square().sum().backward()
        return qkv.grad, torch.get_rng_state()

    expected = work()
    with TrafficCounter() as counter, visible_operators():
        found = work()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept = weakref.ref(found[0])
    del found
    gc.collect()
    assert kept() is None and counter.found


def test_rows_are_those_furthest_above_their_floors_first():
    ceilings = Ceilings(bytes_per_s=1e9, flops_per_s=1e12)
    counted = {
        Operator("a", False): Traffic(1, 5 * 10**6, 10**9),
        Operator("b", True): Traffic(1, 10**6, 9 * 10**9),
    }
    times = {
        operator: SimpleNamespace(calls=NUM_STEPS, time_us=NUM_STEPS * 10_000)
        for operator in counted
    }
    times[Operator("unknown", False)] = SimpleNamespace(calls=NUM_STEPS, time_us=NUM_STEPS * 2_000)
    rows = make_rows(times, counted, ceilings)
    assert [row.operator.name for row in rows] == ["a", "unknown", "b"]
    assert [row.floor_ms for row in rows] == pytest.approx([5.0, 0.0, 9.0])
    assert [row.gap_ms for row in rows] == pytest.approx([5.0, 2.0, 1.0])


def event(name, start, end, *children, thread=1, device=DeviceType.CPU, kernels=()):
    """As the profiler's, times in microseconds."""
    made = SimpleNamespace(
        name=name,
        thread=thread,
        device_type=device,
        is_user_annotation=False,
        cpu_children=list(children),
        cpu_parent=None,
        cpu_time_total=end - start,
        time_range=SimpleNamespace(start=start, end=end),
        kernels=list(kernels),
        self_device_time_total=(
            end - start if device != DeviceType.CPU else sum(k.duration for k in kernels)
        ),
    )
    made.device_time_total = made.self_device_time_total + sum(
        c.device_time_total for c in children
    )
    for child in children:
        child.cpu_parent = made
    return made


def flat(events):
    return [one for root in events for one in (root, *flat(root.cpu_children))]


def test_times_of_the_host_are_those_of_the_outermost_counted_operator():
    inner = event("aten::mm", 12, 18)
    step = event(
        STEP,
        0,
        100,
        event("aten::linear", 5, 30, event("aten::addmm", 10, 25, inner)),
        event("autograd::engine::evaluate_function: X", 40, 60, event("aten::mm", 45, 55)),
        event("aten::rare", 70, 71),
    )
    known = [
        Operator("aten::addmm", False),
        Operator("aten::mm", True),
        Operator("aten::mm", False),
    ]
    outside = event("aten::mm", 200, 300)
    spent, step_ms = operator_times(flat([step, outside]), known)
    assert step_ms == pytest.approx(0.1)
    assert {operator: found.time_us for operator, found in spent.items()} == {
        Operator("aten::addmm", False): 15,
        Operator("aten::mm", True): 10,
        Operator("aten::rare", False): 1,
    }


def test_times_of_a_gpu_are_those_of_its_kernels_with_what_nobody_launched():
    def kernel(name, start, end):
        return event(name, start, end, device=DeviceType.CUDA, thread=7)

    def launched(name, duration):
        return SimpleNamespace(name=name, duration=duration)

    fill = event("aten::zeros", 42, 43, kernels=[launched("fill", 2)])
    attention_kernel = [launched("attention", 20)]
    operator = event("clipcore::attention_backward", 41, 44, fill, kernels=attention_kernel)
    backward = event("autograd::engine::evaluate_function: X", 40, 45, operator, thread=2)
    step = event(STEP, 0, 100, event("aten::mm", 5, 6, kernels=[launched("gemm", 30)]))
    device = [
        kernel("gemm", 10, 40),
        kernel("fill", 50, 52),
        kernel("attention", 52, 72),
        kernel("adamw", 80, 90),
    ]
    known = [Operator("aten::mm", False), Operator("clipcore::attention_backward", True)]
    spent, _ = operator_times([*flat([step, backward]), *device], known)
    assert {operator: found.time_us for operator, found in spent.items()} == {
        Operator("aten::mm", False): 30,
        Operator("clipcore::attention_backward", True): 22,
        Operator("kernel adamw", False): 10,
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=40)


LINE = "--lr 1e-3 --skip-scheduler --batch-size 4 --accum-freq 2 --precision amp_bf16 --force-patch-dropout 0.5".split()


def test_a_profiled_run_in_micro_batches_is_the_run_and_resumes(server, table, tmp_path):
    def run(name: str, *more: str) -> str:
        line = ["--logs", tmp_path, "--name", name, "--train-data", table, *NANO, *LINE]
        status, text = server.run([*line, *more], tmp_path / "out")
        assert status == 0, text
        return text

    run("straight", "--epochs", "3")
    said = run("profiled", "--epochs", "2", "--profile")
    folder = tmp_path / "profiled" / "profile"
    assert f"profile: {folder / 'profile.txt'}" in said and "USDT" not in said
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = [one.get("name") for one in trace["traceEvents"]]
    assert names.count(STEP) == NUM_STEPS and "clipcore::attention_backward" in names
    check_table((folder / "profile.txt").read_text())
    # A profile that cannot be written does not end the run.
    (tmp_path / "full" / "profile").parent.mkdir()
    (tmp_path / "full" / "profile").touch()
    assert "training goes on without it" in run("full", "--epochs", "2", "--profile")
    # Another process of the run is not profiled for it.
    written = (folder / "profile.txt").stat().st_mtime_ns
    assert "profile:" not in run("profiled", "--epochs", "3", "--resume", "latest")
    assert (folder / "profile.txt").stat().st_mtime_ns == written
    assert "attention_backward" in (tmp_path / "profiled" / "report.html").read_text()
    assert_same_bits(tmp_path / "straight", tmp_path / "profiled")


def consists_of_others(operator: str) -> bool:
    """Whether torch replaces an operator by others, whose bytes are counted.

    Its time decides whether it has a row of its own or is among the others.
    """
    namespace, _, name = operator.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(
            operator if overload == "default" else f"{operator}.{overload}",
            "CompositeImplicitAutograd",
        )
        for overload in packet.overloads()
    )


def check_table(text: str) -> None:
    """Shares and milliseconds add up to the step, the rows to their total, and only what consists of others is uncounted."""
    lines = text.partition("operator  ")[2].splitlines()[1:]
    figures = {}
    for line in filter(None, lines):
        name = re.split(r"\s{2,}", line)[0]
        numbers = [float(v.rstrip("%")) for v in re.findall(r"(?<=\s)-?[\d.]+%?(?=\s|$)", line)]
        figures.setdefault(name, []).append(numbers)
    (step,), (host,), (total,) = (
        figures.pop(n) for n in ("step", "host and data", "all operators")
    )
    rows = [numbers for several in figures.values() for numbers in several]
    assert step[1] == 100 and 0 < host[0] < step[0]
    # Columns: calls, ms, share, MB, GFLOP, floor, gap.
    assert total[1] + host[0] == pytest.approx(step[0], abs=2e-3)
    assert total[2] + host[1] == pytest.approx(100, abs=0.02)
    counted = [row for row in rows if len(row) > 3]
    uncounted_ms = sum(row[1] for row in rows if len(row) == 3)
    sums = {column: sum(row[column] for row in counted) for column in (1, 3, 6)}
    # The total's gap is of all milliseconds.
    for column, rest in ((1, uncounted_ms), (3, 0), (6, uncounted_ms)):
        assert sums[column] + rest == pytest.approx(total[column], abs=1e-3 * len(rows))
    for name in (name for name, several in figures.items() if any(len(r) == 3 for r in several)):
        assert consists_of_others(name), name
    assert all(row[6] == pytest.approx(row[1] - row[5], abs=2e-3) for row in counted)
    assert total[4] > 0 and total[5] > 0
    gaps = [row[6] for row in rows[:-1] if len(row) > 3]
    assert len(gaps) > 20


def test_a_run_that_is_too_short_is_refused_in_one_line(server, table, tmp_path):
    line = ["--logs", tmp_path, "--name", "r", "--train-data", table, *NANO, "--batch-size", "8"]
    status, text = server.run([*line, "--epochs", "1", "--profile"], tmp_path / "out")
    assert status == 2
    assert "--profile records steps 5 to 7 of a process, and this one has 5 to do" in text
    assert not (tmp_path / "r" / "profile").exists()
