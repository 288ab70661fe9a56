use super::search::Options;
use super::words::Words;
use super::*;
use crate::testing;

fn relative(found: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(found.dims(), wanted.dims());
    let square = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    (square(&(found - wanted).unwrap()) / square(wanted)).sqrt()
}

struct Golden {
    _root: tempfile::TempDir,
    folder: PathBuf,
    blip: Blip,
    tensors: std::collections::BTreeMap<String, Tensor>,
}

fn golden() -> Golden {
    let root = tempfile::tempdir().unwrap();
    let folder = testing::model("blip_tiny", root.path());
    Golden {
        blip: Blip::load(&folder, DType::F32, &Device::Cpu).unwrap(),
        tensors: testing::tensors("blip"),
        folder,
        _root: root,
    }
}

impl Golden {
    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let rows = self.tensors[name]
            .to_dtype(DType::I64)
            .unwrap()
            .to_vec2::<i64>()
            .unwrap();
        rows.into_iter()
            .map(|row| row.into_iter().filter_map(|id| u32::try_from(id).ok()).collect())
            .collect()
    }
}

#[test]
fn states_and_scores_are_those_of_transformers() {
    let Golden { blip, tensors, .. } = golden();
    let states = blip.states(&tensors["pixel_values"]).unwrap();
    let states = states.narrow(0, 0, 3).unwrap();
    assert!(relative(&states, &tensors["states"]) < 2e-5);
    let ids = &tensors["input_ids"];
    let bare = blip.logits(&states, ids, None).unwrap();
    assert!(relative(&bare, &tensors["unmasked"]) < 2e-5);
    // What is said of padding means nothing.
    let mask = &tensors["attention_mask"];
    let real = mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap();
    let masked = blip.logits(&states, ids, Some(mask)).unwrap();
    let error = relative(
        &masked.broadcast_mul(&real).unwrap(),
        &tensors["logits"].broadcast_mul(&real).unwrap(),
    );
    assert!(error < 2e-5, "{error}");
}

#[test]
fn texts_are_those_of_transformers() {
    let golden = golden();
    let (blip, tensors) = (&golden.blip, &golden.tensors);
    let begin = [blip.sizes().begin];
    let states = blip.states(&tensors["pixel_values"]).unwrap();
    for (name, most, beams, length_penalty) in [
        ("greedy", 19, 1, 1.0),
        ("beams3", 19, 3, 1.0),
        ("beams4", 8, 4, 1.0),
        ("long", 19, 3, 2.0),
        ("short", 19, 3, -1.0),
    ] {
        let options = Options {
            most,
            beams,
            length_penalty,
        };
        for (row, wanted) in golden.ids(name).iter().enumerate() {
            let one = states.narrow(0, row, 1).unwrap();
            let found = blip.caption(&one, &begin, &options, &|| true).unwrap();
            assert_eq!(&found.tokens, wanted, "{name}, picture {row}");
        }
    }
    let words = Words::find(&golden.folder).unwrap();
    let said: Vec<String> = golden
        .ids("greedy")
        .iter()
        .map(|row| words.decode(row).unwrap())
        .collect();
    let wanted = String::from_utf8(tensors["words"].to_vec1::<u8>().unwrap()).unwrap();
    assert_eq!(said.join("\n"), wanted);
    // A prompt: the last of its tokens, the end, is not read, and the first is the beginning.
    let prompt = tensors["prompt"].to_vec1::<i64>().unwrap();
    let mut ids = vec![begin[0]];
    ids.extend(words.encode("A picture of").unwrap());
    let plain: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
    assert_eq!(plain, prompt[1..prompt.len() - 1]);
    let options = Options {
        most: 20 - ids.len(),
        beams: 1,
        length_penalty: 1.0,
    };
    let one = states.narrow(0, 0, 1).unwrap();
    let found = blip.caption(&one, &ids, &options, &|| true).unwrap();
    let found: Vec<i64> = found.tokens.into_iter().map(i64::from).collect();
    assert_eq!(found, tensors["prompted"].to_vec1::<i64>().unwrap());
}

#[test]
fn texts_end_where_there_is_no_more_room() {
    let Golden { blip, tensors, .. } = golden();
    let states = blip
        .states(&tensors["pixel_values"])
        .unwrap()
        .narrow(0, 2, 1)
        .unwrap();
    for beams in [1, 3] {
        let options = Options {
            most: 1000,
            beams,
            length_penalty: 1.0,
        };
        let found = blip
            .caption(&states, &[blip.sizes().begin], &options, &|| true)
            .unwrap();
        assert!(
            found.tokens.len() <= blip.sizes().longest,
            "{}",
            found.tokens.len()
        );
    }
    assert!(
        blip.caption(
            &states,
            &[],
            &Options {
                most: 5,
                beams: 1,
                length_penalty: 1.0
            },
            &|| true
        )
        .is_err()
    );
    let ids = |id: u32, n: usize| Tensor::full(id, (1, n), &Device::Cpu).unwrap();
    let line = |ids: &Tensor| blip.logits(&states, ids, None).unwrap_err().to_string();
    assert!(line(&ids(54, 2)).contains("expected ids from 0 to below 54"));
    assert!(line(&ids(5, 25)).contains("expected 1 to 24 in all"));
}

#[test]
fn older_folders_load_and_others_are_refused() {
    let golden = golden();
    let Golden {
        folder,
        blip,
        tensors,
        ..
    } = &golden;
    let path = folder.join("model.safetensors");
    let weights = crate::params::file::read(&path, &Device::Cpu).unwrap().tensors;
    let write = |change: &dyn Fn(&mut std::collections::BTreeMap<String, Tensor>)| {
        let mut weights = weights.clone();
        change(&mut weights);
        crate::params::file::write(
            &path,
            &weights,
            &Default::default(),
            crate::params::Precision::F32,
        )
        .unwrap();
        Blip::load(folder, DType::F32, &Device::Cpu).map_err(|error| error.to_string())
    };
    // Copies of what is tied, and numbers of places.
    let old = write(&|weights| {
        let table = weights["text_decoder.bert.embeddings.word_embeddings.weight"].clone();
        let bias = weights["text_decoder.cls.predictions.bias"].clone();
        weights.insert("text_decoder.cls.predictions.decoder.weight".into(), table);
        weights.insert("text_decoder.cls.predictions.decoder.bias".into(), bias);
        let places = Tensor::arange(0f32, 24., &Device::Cpu).unwrap();
        weights.insert("text_decoder.bert.embeddings.position_ids".into(), places);
    })
    .unwrap();
    let states = blip
        .states(&tensors["pixel_values"])
        .unwrap()
        .narrow(0, 0, 3)
        .unwrap();
    let logits = |blip: &Blip| blip.logits(&states, &tensors["input_ids"], None).unwrap();
    assert_eq!(relative(&logits(&old), &logits(blip)), 0.0);
    let line = write(&|weights| {
        weights.remove("vision_model.post_layernorm.bias");
        weights.insert(
            "text_encoder.x".into(),
            Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap(),
        );
    })
    .unwrap_err();
    assert!(
        line.contains("vision_model.post_layernorm.bias") && line.contains("text_encoder.x"),
        "{line}"
    );
    write(&|_| {}).unwrap();
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    for (from, to, words) in [
        (
            "\"num_attention_heads\": 4",
            "\"num_attention_heads\": 7",
            "text_config.num_attention_heads is 7",
        ),
        (
            "\"image_size\": 12",
            "\"image_size\": 20",
            "vision_config.image_size is 20, expected 3 patches of 4",
        ),
        (
            "\"vocab_size\": 54",
            "\"vocab_size\": 30524",
            "text_config.vocab_size is 30524, expected 54",
        ),
        (
            "\"sep_token_id\": 20",
            "\"sep_token_id\": 102",
            "text_config.sep_token_id is 102",
        ),
    ] {
        assert!(config.contains(from), "{from}");
        std::fs::write(folder.join("config.json"), config.replace(from, to)).unwrap();
        let line = Blip::load(folder, DType::F32, &Device::Cpu)
            .unwrap_err()
            .to_string();
        assert!(line.contains("config.json") && line.contains(words), "{line}");
    }
    std::fs::remove_file(folder.join("vocab.txt")).unwrap();
    let line = Words::find(folder).unwrap_err().to_string();
    assert!(
        line.contains("found no vocabulary, expected tokenizer.json or vocab.txt"),
        "{line}"
    );
    std::fs::write(folder.join("vocab.txt"), "a\nb\n").unwrap();
    assert!(
        Words::find(folder)
            .unwrap_err()
            .to_string()
            .contains("2 pieces without [UNK]")
    );
}
