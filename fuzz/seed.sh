#!/bin/sh
# Fills the corpora with the test fixtures.
set -eu
cd "$(dirname "$0")"
for target in autoencoder_reader pytorch_reader safetensors_reader config_reader tokenizer_reader tokenizer_input \
    model_spec_reader train_spec_reader recipe_reader search_state_reader; do
    mkdir -p "corpus/$target"
done
for family in ../tests/fixtures/families/*/; do
    name=$(basename "$family")
    cp "$family/config.json" "corpus/config_reader/$name"
    # Headers matter, not weights: the first kilobytes will do, and a small whole file.
    head -c 6000 "$family/case.safetensors" >"corpus/safetensors_reader/$name"
    if [ -f "$family/tokenizer.json" ]; then
        cp "$family/tokenizer.json" "corpus/tokenizer_reader/$name"
    fi
done
cp ../crates/lapidary/embedded/train.toml corpus/train_spec_reader/embedded
sed -n '/^\[model\]/,$p' ../crates/lapidary/embedded/train.toml |
    sed 's/\[model\]//; s/model\.//' >corpus/model_spec_reader/embedded
cp specs/*.toml specs/*.json corpus/model_spec_reader/
# "w", an F32 tensor of shape [1], whole.
header='{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
printf '\070\000\000\000\000\000\000\000%s\000\000\200\077' "$header" >corpus/safetensors_reader/whole
# "W_enc" and the rest of an autoencoder of one feature on a width of one, whole.
header='{"W_dec":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"W_enc":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]},"b_dec":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"b_enc":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}} '
one='\000\000\200\077'
printf "\\$(printf %o "${#header}")\\000\\000\\000\\000\\000\\000\\000%s$one$one$one$one" "$header" >corpus/autoencoder_reader/whole
cp ../crates/explain/tests/fixtures/public-autoencoder.pt corpus/autoencoder_reader/pytorch
# Stored in the archive as it is: the pickle alone.
unzip -p ../crates/explain/tests/fixtures/public-autoencoder.pt '*/data.pkl' >corpus/pytorch_reader/state_dict
printf 'the cat sees the dogs 123! na\303\257ve \360\237\230\200' >corpus/tokenizer_input/text
# Those that the documentation shows.
awk '/^```/ {
        if (shown ~ /\[\[stage\]\]/) printf "%s", shown > ("corpus/recipe_reader/shown-" ++count)
        shown = ""
        inside = /toml/
        next
    }
    inside { shown = shown $0 "\n" }' ../docs/COMPRESS.md
cat >corpus/recipe_reader/two <<'END'
[[stage]]
method = "slicegpt"
ratio = 0.2
[[stage]]
method = "gptq"
[stage.settings.quantise]
group = 64
END
printf 'batch = 4\nseed = 7\n[quantise]\ngroup = 32\n' >corpus/recipe_reader/settings
search='{"edges":0.2,"chunks":4,"state":{"domain":[[0.0,1.0],[0.0,1.0,2.0]],
"course":{"initial":2,"scale":"standardised","noise":0.01,"exploration":0.1,
"fit":{"steps":2,"reach":1.0,"lengths":[0.01,100.0],"amplitudes":[0.0001,100.0]}},
"seed":1,"starts":[],"history":{"points":[[0,1],[1,2]],"values":[0.5,-0.25]},
"hyperparameters":{"lengths":[0.1,0.1],"amplitudes":[0.5,0.5]},"pending":null}}'
printf '%s\n' "$search" >corpus/search_state_reader/two-variables
# The file of `compress --auto` around it.
cat >corpus/search_state_reader/automatic <<END
{"weights":[1,2],"data":[3,4],"held_out":[5,6],
"settings":{"parameters":1000,"methods":["block-influence","whitened"],"evaluations":12,
"levels":9,"removable":4,"batch":8,"seed":0},
"evaluations":[{"point":[0,1],"parameters":999,"loss":0.5},{"point":[1,2],"parameters":998,"loss":-0.25}],
"search":$search}
END
