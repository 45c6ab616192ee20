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

losses="tests/test_contrastive.py tests/test_sigmoid.py tests/test_loss.py"
# shellcheck disable=SC2086
part tests 200 python -m pytest tests/test_similarity.py tests/test_similarity_topk.py $losses -k "not compiles" || exit 1
part contrastive 150 python bench/bench_contrastive.py --untested --widths 768 512
part large 70 python bench/bench_contrastive.py --untested --once --sizes 1048576 --widths 512 --loss softmax \
    --providers "clipcore recompute" "clipcore fused"
part largest 40 python bench/bench_contrastive.py --untested --largest --widths 768 --loss softmax
part similarity 30 python bench/bench_similarity.py --untested
part train 90 python -m clipcore.train --device cuda --quiet --logs "$OUT/logs" --name glyphs
python bench/harness.py
