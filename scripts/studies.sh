#!/usr/bin/env bash
# Runs the studies of language models that docs/ reports, one after another, on one GPU:
#
#   scripts/studies.sh OUT [scaling|architectures|needles|lightnet|lightnet-masked|masked|masked-long|recall|eos|lra|clean]..
#
# Needs fulgur on the PATH (or FULGUR=...) and data/english (fulgur data fetch english). Results go to OUT/NAME; the same command
# goes on where it was stopped. With RESULTS=DIR, DIR/NAME.tgz has what is small of them, renewed every 20 seconds.
# SECONDS_EACH limits each study.
set -euo pipefail
cd "$(dirname "$0")/.."

out="${1:?usage: scripts/studies.sh OUT [NAME..]}"
shift
names=("$@")
[[ ${#names[@]} -gt 0 ]] || names=(scaling architectures needles lightnet lightnet-masked masked masked-long recall eos lra clean)
fulgur="${FULGUR:-fulgur}"
limit="${SECONDS_EACH:-86400}"
tokens=data/scaling
mkdir -p "$out" "$tokens"
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*"; }

keep() {
    [[ -z "${RESULTS:-}" || ! -d "$out/$1" ]] && return
    tar czf "$RESULTS/.$1" -C "$out" --exclude=runs --exclude='*.safetensors' --exclude='*.u16' --exclude=checkpoints "$1" &&
        mv "$RESULTS/.$1" "$RESULTS/$1.tgz"
}

# study NAME COMMAND..: with its time limit, and with its results kept meanwhile.
study() {
    local name="$1" code=0
    shift
    (while sleep 20; do keep "$name" || true; done) &
    local keeper=$!
    timeout --signal INT --kill-after 20 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    kill "$keeper" 2>/dev/null || true
    keep "$name"
    say "$name ended with $code"
    tail -n 40 "$out/$name.log"
}

# encode TEXT TOKENS
encode() {
    [[ -e "$2" ]] || "$fulgur" lm tokenizer encode "$1" --tokenizer "$tokens/tokenizer.json" --tokens "$2" -q
}

[[ -e "$tokens/tokenizer.json" ]] || cp models/english/tokenizer.json "$tokens/"
encode data/english/train.jsonl "$tokens/train.u16"
encode data/english/held_out.jsonl "$tokens/held_out.u16"
say tokens

for name in "${names[@]}"; do
    case "$name" in
    scaling)
        mkdir -p "$out/scaling"
        cp -n docs/studies/scaling/* "$out/scaling/" 2>/dev/null || true
        study scaling "$fulgur" scaling run recipes/scaling.toml --out "$out/scaling" -q
        "$fulgur" scaling fit "$out/scaling" || true
        ;;
    architectures | lightnet | lightnet-masked | masked | masked-long)
        study "$name" "$fulgur" scaling run "recipes/$name.toml" --out "$out/$name" -q
        ;;
    needles)
        # The models of `architectures`, trained on windows of 512: facts in texts up to 16 times as long, and losses by length.
        mkdir -p "$out/needles"
        haystack="$out/needles.txt"
        [[ -e "$haystack" ]] || python3 -c 'import json, sys
for line in sys.stdin: print(json.loads(line)["text"])' <data/english/held_out.jsonl >"$haystack"
        for model in "$out"/architectures/runs/*/full/model; do
            name="$(basename "${model%/full/model}")"
            for kind in easy standard; do
                study needles "$fulgur" lm eval needle --model "$model" --tokenizer "$tokens/tokenizer.json" --haystack "$haystack" \
                    --lengths 256,512,1024,2048,4096,8192 --kind "$kind" --picture "$out/needles/$name-$kind.svg" --json -q
                # What is said besides the result goes to the same file.
                grep '^{' "$out/needles.log" >"$out/needles/$name-$kind.json" || true
            done
            for context in 512 2048 8192; do
                "$fulgur" lm eval perplexity --model "$model" --context "$context" "$tokens/held_out.u16" --json -q \
                    >"$out/needles/$name-perplexity-$context.json" || true
            done
        done
        keep needles
        ;;
    recall)
        # Each architecture by itself, at the better of two rates; those that have none also with short convolutions.
        mkdir -p "$out/recall"
        for model in llama transnormer tnl hgrn2 cosformer2 lightnet lightnet-encoded tnl-convolved hgrn2-convolved lightnet-convolved; do
            name="${model%%-*}"
            settings=()
            case "$model" in
            *-encoded) settings=(--set recall.model.variant.use_tpe=true --set recall.model.variant.use_lrpe=true) ;;
            *-convolved) settings=(--set recall.model.variant.conv_size=4) ;;
            esac
            for rate in 1e-3 3e-3; do
                run="$out/recall/$model-$rate"
                study recall "$fulgur" train recipes/recall.toml --set recall.model.architecture="\"$name\"" "${settings[@]}" \
                    --set optimiser.lr="$rate" --set run_dir="\"$run\"" -q
                "$fulgur" lm eval recall --model "$run/model" --vocabulary 1024 --context 256,512,1024 --pairs 8,16,32,64 --json -q \
                    >"$run.json" || true
            done
        done
        keep recall
        ;;
    eos)
        study eos "$fulgur" eos sweep --data "$tokens/train.u16" --vocabulary 4096 --steps "${EOS_STEPS:-3000}" --out "$out/eos" -q
        ;;
    lra)
        study lra "$fulgur" lra sweep --steps "${LRA_STEPS:-10000}" --batch 128 --out "$out/lra" -q
        ;;
    clean)
        # One round of self-cleaning: the tenth that the English model finds hardest is left out; both are trained on equally many tokens.
        mkdir -p "$out/clean" "$out/texts"
        [[ -e "$out/texts/cleaned.jsonl" ]] || "$fulgur" data clean data/english/train.jsonl -o "$out/texts/cleaned.jsonl" \
            --score-with models/english --drop 0.1
        [[ -e "$out/texts/ruled.jsonl" ]] || "$fulgur" data clean data/english/train.jsonl -o "$out/texts/ruled.jsonl"
        for text in ruled cleaned; do
            encode "$out/texts/$text.jsonl" "$out/texts/$text.u16"
            study clean "$fulgur" train recipes/english.toml --set train.max_steps="${CLEAN_STEPS:-3400}" \
                --set run_dir="\"$out/clean/$text\"" --set lm.tokens="\"$out/texts/$text.u16\"" -q
            grep validation "$out/clean/$text/metrics.jsonl" | tail -n 1
        done
        ;;
    *)
        echo "studies: no study $name" >&2
        exit 2
        ;;
    esac
done
say end
