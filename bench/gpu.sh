#!/usr/bin/env bash
# What needs a GPU, in order of value: correctness first, then the ceilings, then figures; each part with a limit of its own.
#
#   bench/gpu.sh [losses|encoders|steps|all]
#
# One call takes at most LIMIT_S seconds (590), whatever is left: the next call goes on with the first part that is not done
# at this commit (bench/out/done; remove it to begin anew). Rows go to bench/results/ as they come, logs and a copy of the rows
# and of bench/out/done to $OUT (bench/out). Exit status: 0 all parts are done, 1 some part failed, 75 some are left for another call.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-bench/out}
LIMIT_S=${LIMIT_S:-590}
mkdir -p "$OUT" bench/out
export PYTHONUNBUFFERED=1
# Tests have just passed when a bench begins; it need not run them again.
bench() { python "bench/bench_$1.py" "${@:2}"; }
untested() { bench "$1" --untested "${@:2}"; }

python -c "import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_name())" || exit 1
commit=${CLIPCORE_COMMIT:-$(git rev-parse --short HEAD)}
touch bench/out/done
failed=()
left=()

# part NAME LIMIT_S COMMAND...: runs it unless it is done at this commit; what has failed is tried again by the next call.
part() {
    local name=$1 limit_s=$2 status
    shift 2
    if grep -qx "$commit $name" bench/out/done; then
        echo "== $name: done before"
        return 0
    fi
    if ((SECONDS + limit_s > LIMIT_S)); then
        left+=("$name")
        return 75
    fi
    echo "== $name ($SECONDS s)"
    # In a shell of its own, so that a limit can be set on a function.
    timeout --kill-after=10 "$limit_s" bash -c "$(declare -f bench untested tests); \"\$@\"" part "$@" 2>&1 | tee "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    if ((status == 0)); then echo "$commit $name" >>bench/out/done; else failed+=("$name"); fi
    cp bench/results/*.jsonl "$OUT/" 2>/dev/null
    [ "$OUT" -ef bench/out ] || cp bench/out/done "$OUT/"
    echo "== $name: exit $status"
    return "$status"
}

# Compiling ahead of time needs no GPU. Tests share the GPU among the machine's cores, since most of their time is compiling.
tests() {
    local files=()
    for name in "$@"; do files+=("tests/test_$name.py"); done
    python -m pytest -q -n 12 -p no:warnings --tb=short --durations=5 "${files[@]}" \
        -k "not ahead_of_time and not past_two"
}

part ceilings 25 bench ceilings

# Figures of an operation whose tests are red or late are not made; what does not depend on it goes on.
encoders() {
    part tests-encoders 120 tests attention attention_kernels residual layer_norm gelu patchify adamw packing || return
    part step-B-32 40 untested step --model ViT-B-32 --batch 1024
    part step-B-16 40 untested step --model ViT-B-16 --batch 512
    part step-L-14 60 untested step --model ViT-L-14 --batch 256
    export BENCH_SKIP="torch.compile,SDPA MATH"
    part attention 80 untested attention
    unset BENCH_SKIP
    for name in layer_norm gelu patchify adamw attention_pool; do part "$name" 40 untested "$name"; done
    part sweep 90 untested attention --sweep
}

losses() {
    if part tests-losses 150 tests contrastive sigmoid loss; then
        part contrastive 110 untested contrastive --widths 768 512
        part million 50 untested contrastive --once --sizes 1048576 --widths 512 --loss softmax \
            --providers "clipcore recompute" "clipcore fused"
        part largest 35 untested contrastive --largest --widths 768 --loss softmax
    fi
    if part tests-similarity 60 tests similarity similarity_topk; then
        part similarity 25 untested similarity
    fi
}

# The rest of the step's table: compiled peers, patch dropout, cached gradients, the largest model.
steps() {
    part tests-step 60 tests grad_cache || return
    part step-B-32-compiled 90 untested step --model ViT-B-32 --batch 1024 --compiled --providers clipcore open_clip "open_clip compiled"
    part step-B-16-compiled 90 untested step --model ViT-B-16 --batch 512 --compiled --providers clipcore open_clip "open_clip compiled"
    part step-L-14-compiled 120 untested step --model ViT-L-14 --batch 256 --providers clipcore open_clip "open_clip compiled"
    part step-H-14 90 untested step --model ViT-H-14 --batch 96 --providers clipcore open_clip
    for model in ViT-B-32 ViT-B-16; do part "dropout-$model" 45 untested step --model $model --batch 1024 --patch-dropout 0.5; done
    part cached-B-32 60 untested step --model ViT-B-32 --batch 8192 --micro-batch-size 1024
    part scaling 80 untested scaling
    part global-batch 90 untested global_batch --once --sizes 32768 262144
    part train 70 python -m clipcore.train --device cuda --quiet --logs "$OUT/logs" --name glyphs
}

case ${1:-all} in
    encoders | losses | steps) "$1" ;;
    all) encoders; losses; steps ;;
    *) echo "usage: bench/gpu.sh [losses|encoders|steps|all]"; exit 2 ;;
esac
python bench/harness.py
if ((${#failed[@]})); then echo "failed: ${failed[*]}"; exit 1; fi
if ((${#left[@]})); then echo "left for another call: ${left[*]}"; exit 75; fi
