#!/usr/bin/env bash
# What needs a GPU, most useful first. Each word is a family of parts:
#
#   bench/gpu.sh probe         packages, bits and NaN of torch's attention, what the device reaches
#   bench/gpu.sh correctness   the tests of every kernel, one file after the other
#   bench/gpu.sh loss          both losses against their peers, similarity
#   bench/gpu.sh encoders      attention, LayerNorm, GELU, patches, AdamW, attention of one query
#   bench/gpu.sh step          the training step against open_clip, eager and compiled
#   bench/gpu.sh train         the main job, one rank, the profile, gathers, huge batches
#   bench/gpu.sh [all]         all of them
#   bench/gpu.sh commit        print what CLIPCORE_COMMIT has to be on a machine without git
#
# Several words run one after the other. A call takes at most LIMIT_S seconds: parts that no longer fit are left for the next
# call. What has passed with this code on this device is not run again; what has failed is, if its family is named. A bench
# stands on test files, which are run first unless they have been; while one of them fails, rows say so ("tests": "red").
#
# Where nothing can be installed, wheels/*.whl are; git ignores that folder and bench/out, so they have to be copied along.
# OUT (bench/out) gets one file, gpu.tgz: new rows, logs, what is done. Bring it home with
#
#   tar xzf gpu.tgz && python bench/harness.py bench/out/rows/*/*.jsonl
#
# LIMIT_S: 570. PYTHON: python3. Exit status: 0 all is done, 1 some part failed, 75 some are left.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

# Print COMMIT@CODE, or COMMIT+@CODE where code differs from the commit. CODE is a hash of all that is run: rows and pages
# that are brought home change nothing of it.
commit_of_tree() {
    local code=(clipcore kernels csrc tests 'bench/*.py' bench/gpu.sh setup.py pyproject.toml) commit changed=
    if ! commit=$(git rev-parse --short HEAD 2>/dev/null); then
        echo "no git here: set CLIPCORE_COMMIT to what \`bench/gpu.sh commit\` prints where there is" >&2
        return 2
    fi
    [ -z "$(git status --porcelain -- "${code[@]}")" ] || changed=+
    echo "$commit$changed@$({
        git ls-files -s -- "${code[@]}"
        git diff -- "${code[@]}"
        git ls-files --others --exclude-standard -z -- "${code[@]}" | xargs -0r sha1sum
    } | sha1sum | cut -c1-8)"
}

families=(probe correctness loss encoders step train)
chosen=()
is_named=yes
for word in "${@:-all}"; do
    case $word in
        all) chosen+=("${families[@]}") is_named= ;;
        commit) commit_of_tree; exit ;;
        probe | correctness | loss | encoders | step | train) chosen+=("$word") ;;
        *) echo "$word is none of: all ${families[*]} commit" >&2; exit 2 ;;
    esac
done

commit=${CLIPCORE_COMMIT:-$(commit_of_tree)} || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
LIMIT_S=${LIMIT_S:-570}
# A folder for this call's rows, so that those of two calls never meet in one file.
BENCH_ROWS=$PWD/bench/out/rows/$(date -u +%Y%m%d-%H%M%S)-$$
export CLIPCORE_COMMIT=$commit BENCH_ROWS PYTHONUNBUFFERED=1 \
    PYTHONPATH=$PWD:$PWD/bench/out/site${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT" bench/out/logs "$BENCH_ROWS"
touch bench/out/done
failed=()
left=()

# One wheel that does not fit costs no other.
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] || break
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target bench/out/site "$wheel" ||
        echo "$wheel is not installed"
done
name_device="import torch; assert torch.cuda.is_available(), 'no GPU here'; print(torch.cuda.get_device_name())"
device=$("$PYTHON" -c "$name_device") || exit 1
echo "$device, $commit"
# What verdicts belong to: the code and the device.
where=${commit##*@}@${device// /-}

# verdict NAME: how a part last ended here: passed, red (made while its tests failed), failed, late or nothing.
verdict() {
    awk -v where="$where" -v name="$1" '$1 == where && $2 == name { found = $3 } END { print found }' bench/out/done
}

# part NAME LIMIT_S COMMAND...: run it, if it is not done and there is time. PASSED is its verdict if it passes. What came
# late in an earlier call waits for the second round, behind all that has not been tried, and fails if it is late again.
declare -A tried=()
part() {
    local name=$1 limit_s=$2 before status found began
    shift 2
    before=$(verdict "$name")
    if [ "$before" = "${PASSED:-passed}" ]; then
        [ -n "${tried[$name]:-}" ] || ((round == 2)) || echo "== $name: done before"
        return 0
    fi
    [ -z "${tried[$name]:-}" ] || return 1
    if [ "$before" = failed ] && [ -z "$is_named" ]; then
        failed+=("$name (failed)")
        return 1
    fi
    [ "$before" != late ] || ((round == 2)) || return 75
    if ((SECONDS + limit_s > LIMIT_S)); then
        left+=("$name")
        return 75
    fi

    echo "== $name ($SECONDS s)"
    tried[$name]=yes
    began=$SECONDS
    timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee "bench/out/logs/$name.log"
    status=${PIPESTATUS[0]}
    found=failed
    if ((status == 0)); then
        found=${PASSED:-passed}
    # 137 is also what the kernel's memory killer leaves behind.
    elif ((status == 124 || (status == 137 && SECONDS - began >= limit_s))) && [ "$before" != late ]; then
        found=late
    fi
    ((status == 0)) || failed+=("$name ($found)")
    echo "$where $name $found" >>bench/out/done
    tar czf "$OUT/gpu.tgz.new" --exclude=checkpoints -C "$PWD" bench/out/done bench/out/logs bench/out/rows &&
        mv "$OUT/gpu.tgz.new" "$OUT/gpu.tgz"
    echo "== $name: $found"
    return "$status"
}

# tests FILE: the tests of one file, in eight processes, since most of their time is compiling; those that start ranks are in
# one. Ahead-of-time compilation needs no GPU.
declare -A SECONDS_FOR=(
    [attention_kernels]=100 [contrastive]=150 [sigmoid]=90 [loss]=100 [grad_cache]=150 [distributed]=150 [pack_kernels]=90
)
tests() {
    local PASSED=passed
    part "tests-$1" "${SECONDS_FOR[$1]:-60}" "$PYTHON" -m pytest -q -n 8 -rs --skip-missing -p no:warnings --tb=short \
        --durations=3 "tests/test_$1.py" -k "not ahead_of_time and not past_two"
}

# figures NAME LIMIT_S "FILE..." BENCH ARGUMENT...: the rows of a bench, behind the tests of these files.
figures() {
    local name=$1 limit_s=$2 files=$3 file found ended=passed PASSED=passed
    for file in $files; do
        found=$(verdict "tests-$file")
        case $found in
            passed | failed) ;;
            *) tests "$file"; found=$(verdict "tests-$file") ;;
        esac
        # Late in an earlier call says nothing yet.
        [ "$found" != late ] || [ -n "${tried[tests-$file]:-}" ] || found=
        case $found in
            passed) ;;
            failed | late) ended=failed PASSED=red failed+=("tests-$file ($found)") ;;
            *) ((round == 1)) || left+=("$name"); return 75 ;;
        esac
    done
    part "$name" "$limit_s" "$PYTHON" "bench/bench_$4.py" --tests "$ended" "${@:5}"
}

probe() {
    part probe 60 "$PYTHON" bench/probe.py
    part ceilings 40 "$PYTHON" bench/bench_ceilings.py
}

kernels="attention_kernels layer_norm residual attention gelu patchify adamw packing"

correctness() {
    local file
    for file in attention_kernels contrastive sigmoid loss_vectors similarity similarity_topk loss ${kernels#* } grad_cache; do
        tests "$file"
    done
}

# The sizes that people train with come first. Kernels of others, which can take the process down, have parts of their own.
loss() {
    local size
    local softmax=("clipcore stash" "clipcore recompute" "clipcore fused" open_clip "open_clip compiled" "shared similarity"
        "shared similarity compiled" "checkpointed chunks")
    for size in 32768 65536; do
        figures "softmax-$size-768" 70 contrastive contrastive --budget 0.5 --loss softmax --widths 768 --sizes $size \
            --providers "${softmax[@]}"
    done
    for size in 32768 65536; do
        figures "sigmoid-$size-768" 60 sigmoid contrastive --budget 0.5 --loss sigmoid --widths 768 --sizes $size \
            --providers clipcore "clipcore fused" open_clip "open_clip compiled"
    done
    for size in 32768 65536; do
        figures "siglip-kernel-$size" 40 sigmoid contrastive --budget 0.5 --loss sigmoid --widths 768 --sizes $size \
            --providers siglip-kernel
        figures "inf_cl-$size" 40 contrastive contrastive --budget 0.5 --loss softmax --widths 768 --sizes $size \
            --providers inf_cl
    done
    figures similarity 40 "similarity similarity_topk" similarity --budget 0.5
    figures softmax-small 50 contrastive contrastive --budget 0.5 --loss softmax --widths 768 --sizes 1024 8192 \
        --providers "${softmax[@]:0:6}"
    figures sigmoid-small 40 sigmoid contrastive --budget 0.5 --loss sigmoid --widths 768 --sizes 1024 8192 \
        --providers clipcore "clipcore fused" open_clip
    for provider in "clipcore recompute" "clipcore fused"; do
        figures "million-${provider#* }" 60 contrastive contrastive --once --loss softmax --widths 512 --sizes 1048576 \
            --providers "$provider"
    done
    figures largest 90 contrastive contrastive --largest --loss softmax --widths 768 \
        --providers "${softmax[@]:0:2}" open_clip
    figures cut-cross-entropy 50 contrastive contrastive --budget 0.5 --loss softmax --widths 768 --sizes 32768 \
        --providers "cut-cross-entropy x 2"
    figures softmax-512-1024 140 contrastive contrastive --budget 0.5 --loss softmax --widths 512 1024 --sizes 32768 \
        --providers "${softmax[@]}"
}

encoders() {
    figures attention 110 attention_kernels attention --budget 0.5 --skip torch.compile "SDPA MATH"
    figures layer_norm 50 layer_norm layer_norm --budget 0.5
    figures attention_pool 50 residual attention_pool --budget 0.5
    for name in gelu patchify adamw; do figures "$name" 40 "$name" "$name" --budget 0.5; done
    figures sweep 110 attention_kernels attention --sweep
}

step() {
    local files="$kernels contrastive loss" model batch peer
    local -A batches=([ViT-B-32]=1024 [ViT-B-16]=512 [ViT-L-14]=256)
    for model in ViT-B-32 ViT-B-16 ViT-L-14; do
        figures "step-$model" 70 "$files" step --model $model --batch ${batches[$model]}
    done
    # What compiles has parts of its own, each beside clipcore: compiling takes a minute or two, and loses no other's row.
    for model in ViT-B-32 ViT-B-16 ViT-L-14; do
        for peer in "clipcore, blocks compiled" "open_clip compiled"; do
            figures "step-$model-${peer// /-}" 180 "$files" step --model $model --batch ${batches[$model]} \
                --providers clipcore "$peer"
        done
    done
    figures cached-B-32 120 "$files grad_cache" step --model ViT-B-32 --batch 8192 --micro-batch-size 1024 \
        --providers clipcore open_clip
    figures step-H-14 90 "$files" step --model ViT-H-14 --batch 96 --providers clipcore open_clip
    for model in ViT-B-32 ViT-B-16; do
        figures "dropout-$model" 60 "$files" step --model $model --batch 1024 --patch-dropout 0.5 \
            --providers clipcore open_clip
    done
}

# A run that was cut off goes on where its folder is still there; checkpoints do not come home.
train() {
    local files="$kernels contrastive loss grad_cache"
    local settings=(--device cuda --quiet --resume latest --logs bench/out/logs/runs)
    part train 200 "$PYTHON" -m clipcore.train "${settings[@]}" --name "glyphs-$commit"
    part train-one-rank 60 \
        "$PYTHON" -m torch.distributed.run --nproc-per-node 1 -m -- clipcore.train "${settings[@]}" \
        --name "one-rank-$commit" --train-num-samples 2560 --epochs 1
    part profile 60 "$PYTHON" -m clipcore.train "${settings[@]}" --name "profile-$commit" --profile --epochs 1
    figures global-batch 90 "$files" global_batch --once --sizes 32768
    figures scaling-loss 80 "contrastive sigmoid wire" scaling --only loss --seconds 2
    figures scaling-step 120 "$files" scaling --only step --sizes 4096 16384 65536
    figures scaling-tokens 90 "$files" scaling --only tokens
    figures memory-loss 120 "contrastive sigmoid" memory --only loss
    figures memory-step 150 "$files" memory --only step

    # Kernels that pack what ranks exchange need the extension. A fresh machine has forgotten what was built on another.
    local has_extension='from clipcore import native; raise SystemExit(native.load() is None)'
    "$PYTHON" -c "$has_extension" 2>/dev/null || sed -i "/ build passed$/d" bench/out/done
    if [ "$(verdict tests-pack_kernels)$(verdict tests-distributed)" != passedpassed ] &&
        part build 150 env CLIPCORE_BUILD=require \
            "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation -e .; then
        tests pack_kernels
        tests distributed
    fi
    figures global-batch-262144 400 "$files" global_batch --once --sizes 262144
}

for round in 1 2; do
    for family in "${chosen[@]}"; do "$family"; done
done

show() { printf '%s\n' "$@" | awk '!seen[$0]++' | paste -sd ' '; }
if ((${#left[@]})); then echo "left for another call: $(show "${left[@]}")"; fi
if ((${#failed[@]})); then echo "failed: $(show "${failed[@]}")"; exit 1; fi
((${#left[@]} == 0)) || exit 75
