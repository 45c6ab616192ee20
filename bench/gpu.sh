#!/usr/bin/env bash
# What needs a GPU, in order of worth. Each word is a family of parts:
#
#   bench/gpu.sh probe         packages, bits and NaN of torch's attention, what the device reaches
#   bench/gpu.sh correctness   the tests of every kernel, one file after the other
#   bench/gpu.sh loss          both losses against their peers, similarity
#   bench/gpu.sh encoders      attention, LayerNorm, GELU, patches, AdamW, attention of one query
#   bench/gpu.sh step          the training step against open_clip, eager and compiled
#   bench/gpu.sh train         the main job, one rank, the profile, gathers, huge batches
#   bench/gpu.sh [all]         all of them
#
# Several words run one after the other. A call takes at most LIMIT_S seconds: what these do not hold is left for the next
# call, which does not run again what has passed at this commit. A bench first runs the test files that it stands on, unless
# they have been run; where one of them is red, its rows say so ("tests": "red"). Packages come from wheels/*.whl.
#
# LIMIT_S: 570. PYTHON: python3. OUT: where gpu.tgz goes, with new rows, logs and what is done (bench/out); unpacked at the
# project's root it brings them in. Exit status: 0 all is done, 1 some part failed, 75 some are left.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

families=(probe correctness loss encoders step train)
chosen=()
for word in "${@:-all}"; do
    case $word in
        all) chosen+=("${families[@]}") ;;
        probe | correctness | loss | encoders | step | train) chosen+=("$word") ;;
        *) echo "$word is none of: all ${families[*]}" >&2; exit 2 ;;
    esac
done

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
LIMIT_S=${LIMIT_S:-570}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT" bench/out/logs bench/results
commit=${CLIPCORE_COMMIT:-$(git rev-parse --short HEAD)}
[ -n "$commit" ] || { echo "no git here: CLIPCORE_COMMIT says which commit this is a copy of" >&2; exit 1; }
[ -e bench/out/begun ] || touch bench/out/begun
touch bench/out/done
failed=()
left=()

if compgen -G "wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target bench/out/site wheels/*.whl || exit 1
    export PYTHONPATH=$PWD/bench/out/site${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_name())" || exit 1

# verdict NAME: how the part ended at this commit, "passed", "failed" or nothing. The last time counts.
verdict() { awk -v commit="$commit" -v name="$1" '$1 == commit && $2 == name { found = $3 } END { print found }' bench/out/done; }

# Rows that were made here, logs, and what is done: one file, since few may come back.
pack() {
    find bench/results -name '*.jsonl' -newer bench/out/begun -print0 |
        tar czf "$OUT/gpu.tgz.new" --exclude='*.pt' --exclude='*.safetensors' --null --files-from - bench/out/done bench/out/logs &&
        mv "$OUT/gpu.tgz.new" "$OUT/gpu.tgz"
}

# part NAME LIMIT_S COMMAND...: run it, unless it has passed at this commit or there is too little time.
part() {
    local name=$1 limit_s=$2 status
    shift 2
    if [ "$(verdict "$name")" = passed ]; then
        echo "== $name: done before"
        return 0
    fi
    if ((SECONDS + limit_s > LIMIT_S)); then
        left+=("$name")
        return 75
    fi
    echo "== $name ($SECONDS s)"
    timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee "bench/out/logs/$name.log"
    status=${PIPESTATUS[0]}
    if ((status == 0)); then
        echo "$commit $name passed" >>bench/out/done
    else
        echo "$commit $name failed" >>bench/out/done
        failed+=("$name")
    fi
    pack
    echo "== $name: exit $status"
    return "$status"
}

# tests FILE LIMIT_S [ARGUMENT...]: the tests of one file, in eight processes, since most of their time is compiling.
# Ahead-of-time compilation needs no GPU.
tests() {
    local file=$1 limit_s=$2
    shift 2
    part "tests-$file" "$limit_s" "$PYTHON" -m pytest -q -n 8 -rs --skip-missing -p no:warnings --tb=short --durations=3 \
        "tests/test_$file.py" -k "not ahead_of_time and not past_two" "$@"
}

# figures NAME LIMIT_S "FILE..." BENCH ARGUMENT...: the rows of a bench, behind the tests of these files.
figures() {
    local name=$1 limit_s=$2 how=passed
    for file in $3; do
        [ -n "$(verdict "tests-$file")" ] || tests "$file" "${SECONDS_FOR[$file]:-60}"
        case $(verdict "tests-$file") in
            passed) ;;
            failed) how=failed ;;
            *) left+=("$name"); return 75 ;;
        esac
    done
    part "$name" "$limit_s" "$PYTHON" "bench/bench_$4.py" --tests "$how" "${@:5}"
}

declare -A SECONDS_FOR=([contrastive]=150 [sigmoid]=90 [attention_kernels]=90 [grad_cache]=90)

probe() {
    nvidia-smi -L
    part probe 60 "$PYTHON" bench/probe.py
    part ceilings 40 "$PYTHON" bench/bench_ceilings.py
}

correctness() {
    local file
    for file in attention_kernels contrastive sigmoid similarity similarity_topk loss layer_norm residual attention gelu patchify \
        adamw packing grad_cache; do
        tests "$file" "${SECONDS_FOR[$file]:-60}"
    done
}

# The sizes that people train with come first.
loss() {
    local size softmax=("clipcore recompute" "clipcore stash" open_clip)
    for size in 32768 65536; do
        figures "softmax-$size-768" 60 contrastive contrastive --budget 0.5 --loss softmax --widths 768 --sizes $size
    done
    for size in 32768 65536; do
        figures "sigmoid-$size-768" 60 sigmoid contrastive --budget 0.5 --loss sigmoid --widths 768 --sizes $size
    done
    figures similarity 40 "similarity similarity_topk" similarity --budget 0.5
    figures losses-small 40 "contrastive sigmoid" contrastive --budget 0.5 --widths 768 --sizes 1024 8192 \
        --skip "cut-cross-entropy x 2" "checkpointed chunks"
    figures million 60 contrastive contrastive --once --loss softmax --widths 512 --sizes 1048576 \
        --providers "clipcore recompute" "clipcore fused"
    figures softmax-512-1024 120 contrastive contrastive --budget 0.5 --loss softmax --widths 512 1024 --sizes 32768
    figures largest 60 contrastive contrastive --largest --loss softmax --widths 768 --providers "${softmax[@]}"
}

encoders() {
    figures attention 110 attention_kernels attention --budget 0.5 --skip torch.compile "SDPA MATH"
    figures layer_norm 50 layer_norm layer_norm --budget 0.5
    figures attention_pool 50 residual attention_pool --budget 0.5
    for name in gelu patchify adamw; do figures "$name" 40 "$name" "$name" --budget 0.5; done
    figures sweep 110 attention_kernels attention --sweep
}

step() {
    local files="packing residual attention loss"
    local compiled=(--providers clipcore open_clip "open_clip compiled")
    figures step-B-32 60 "$files" step --model ViT-B-32 --batch 1024
    figures step-B-16 60 "$files" step --model ViT-B-16 --batch 512
    figures step-L-14 70 "$files" step --model ViT-L-14 --batch 256
    figures step-B-32-compiled 90 "$files" step --model ViT-B-32 --batch 1024 "${compiled[@]}"
    figures cached-B-32 60 "$files grad_cache" step --model ViT-B-32 --batch 8192 --micro-batch-size 1024 --providers clipcore open_clip
    figures step-B-16-compiled 90 "$files" step --model ViT-B-16 --batch 512 "${compiled[@]}"
    figures step-L-14-compiled 120 "$files" step --model ViT-L-14 --batch 256 "${compiled[@]}"
    figures step-H-14 90 "$files" step --model ViT-H-14 --batch 96 --providers clipcore open_clip
    for model in ViT-B-32 ViT-B-16; do
        figures "dropout-$model" 45 "$files" step --model $model --batch 1024 --patch-dropout 0.5 --providers clipcore open_clip
    done
}

train() {
    part train 90 "$PYTHON" -m clipcore.train --device cuda --quiet --logs bench/out/logs/runs --name "glyphs-$commit"
    part train-one-rank 60 "$PYTHON" -m torch.distributed.run --nproc-per-node 1 -m -- clipcore.train --device cuda --quiet \
        --train-num-samples 2560 --epochs 1 --logs bench/out/logs/runs --name "one-rank-$commit"
    part profile 60 "$PYTHON" -m clipcore.train --device cuda --quiet --profile --epochs 1 --logs bench/out/logs/runs \
        --name "profile-$commit"
    # Kernels that pack what ranks exchange need the extension.
    part build 150 env CLIPCORE_BUILD=require "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation -e . &&
        for file in pack_kernels distributed; do tests "$file" 90; done
    figures global-batch 90 grad_cache global_batch --once --sizes 32768 262144
    figures scaling 90 "wire loss" scaling --only loss step tokens
    figures memory 90 "grad_cache contrastive sigmoid" memory
}

for family in "${chosen[@]}"; do "$family"; done
# Failed tests are their own files' parts; benches behind them have said so in their rows.
if ((${#failed[@]})); then echo "failed: ${failed[*]}"; exit 1; fi
if ((${#left[@]})); then echo "left for another call: ${left[*]}"; exit 75; fi
