#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: correctness first, then figures, each part with a limit
# of its own. Rows go to bench/results/, logs and a copy of the rows to $OUT (default: bench/out).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-bench/out}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
python -c "import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_name())" || exit 1

part() {
    local name=$1 limit_s=$2
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    cp bench/results/*.jsonl "$OUT/" 2>/dev/null
    echo "== $name: exit $status"
    return "$status"
}

# Compiling ahead of time needs no GPU. Figures of an operation whose tests are red or late are refused; what does not
# depend on it goes on.
tests() {
    local name=$1 limit_s=$2
    shift 2
    part "$name" "$limit_s" python -m pytest -q --durations=5 "$@" \
        -k "not ahead_of_time and not compiles_without_spills and not compiles_every_launch"
}

failed=0
if tests losses_tests 230 tests/test_contrastive.py tests/test_sigmoid.py tests/test_loss.py; then
    part contrastive 110 python bench/bench_contrastive.py --untested --widths 768 512 || failed=1
    part large 50 python bench/bench_contrastive.py --untested --once --sizes 1048576 --widths 512 --loss softmax \
        --providers "clipcore recompute" "clipcore fused" || failed=1
    part largest 35 python bench/bench_contrastive.py --untested --largest --widths 768 --loss softmax || failed=1
else
    failed=1
    echo "== the losses' tests have failed: no figures of theirs"
fi
if tests similarity_tests 60 tests/test_similarity.py tests/test_similarity_topk.py; then
    part similarity 25 python bench/bench_similarity.py --untested || failed=1
else
    failed=1
    echo "== the similarity's tests have failed: no figures of theirs"
fi
part train 70 python -m clipcore.train --device cuda --quiet --logs "$OUT/logs" --name glyphs || failed=1
python bench/harness.py
exit "$failed"
