//! States that leave one run folder for another.

use super::*;

/// Through shards of a limited size: weights come out exactly, the rest nearly.
#[test]
fn a_state_that_was_exported_starts_another_run() {
    use checkpoint::portable::{self, SMALLEST_SHARD};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let root = at("first/checkpoints");
    let no_checkpoint = portable::export(&root, &at("state"), SMALLEST_SHARD, |_| ()).unwrap_err();
    assert!(
        no_checkpoint
            .to_string()
            .ends_with("checkpoints: no checkpoint to export")
    );

    train(&Toy::new(), &recipe(&at("first"), ""), &Options::default()).unwrap();
    let small = portable::export(&root, &at("state"), SMALLEST_SHARD - 1, |_| ()).unwrap_err();
    assert!(
        small.to_string().contains("65535 bytes, expected 65536 or more"),
        "{small}"
    );
    let exported = portable::export(&root, &at("state"), SMALLEST_SHARD, |_| ()).unwrap();
    assert_eq!((exported.step, exported.shards), (60, 4));
    let again = portable::export(&root, &at("state"), SMALLEST_SHARD, |_| ()).unwrap_err();
    assert!(again.to_string().contains("not empty"), "{again}");
    let file = portable::export(&root, &at("first/recipe.toml"), SMALLEST_SHARD, |_| ()).unwrap_err();
    assert!(file.to_string().contains("recipe.toml"), "{file}");

    let options = Options {
        import: Some(at("state")),
        ..Options::default()
    };
    // Nothing is left to do but to finish.
    let outcome = train(&Toy::new(), &recipe(&at("second"), ""), &options).unwrap();
    assert_eq!((outcome.step, outcome.finished), (60, true));
    let (first, second) = (newest(&at("first")), newest(&at("second")));
    assert_eq!(bits(&first.weights), bits(&second.weights));
    let apart = |a: &Tensor, b: &Tensor| {
        let most = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        (most((a - b).unwrap()), most(a.clone()))
    };
    for (name, tensor) in &first.ema {
        let (off, _) = apart(tensor, &second.ema[name]);
        let (gap, _) = apart(tensor, &first.weights[name]);
        assert!(off <= gap / 128.0, "{name}: {off} of {gap}");
    }
    for (name, tensor) in &first.optimiser {
        let (off, size) = apart(tensor, &second.optimiser[name]);
        assert!(off <= size / 128.0, "{name}: {off} of {size}");
    }
    assert_ne!(bits(&first.optimiser), bits(&second.optimiser));

    // It goes on, and not over another run.
    let longer = recipe(&at("third"), "train.max_steps=70");
    let outcome = train(&Toy::new(), &longer, &options).unwrap();
    assert_eq!((outcome.step, outcome.finished), (70, true));
    let error = train(&Toy::new(), &longer, &options).unwrap_err().to_string();
    assert!(error.contains("holds a run already"), "{error}");
    // Another model is refused, and nothing is written that looks like a run.
    let other = Toy::new();
    candle_nn::linear(2, 2, other.params.builder().pp("third")).unwrap();
    let error = train(&other, &recipe(&at("fourth"), ""), &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("state: not the weights of this model: 2 missing: third.bias, third.weight"),
        "{error}"
    );
    assert!(checkpoint::list(&at("fourth/checkpoints")).unwrap().is_empty());
}

#[test]
fn damage_to_an_exported_state_is_named() {
    use checkpoint::portable::{self, SMALLEST_SHARD};
    /// A model whose files need several shards each.
    fn wide() -> Toy {
        let toy = Toy::new();
        candle_nn::linear(200, 200, toy.params.builder().pp("unused")).unwrap();
        toy
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sets = "train.max_steps=2";
    train(&wide(), &recipe(&at("run"), sets), &Options::default()).unwrap();
    let export = || {
        let _ = fs::remove_dir_all(at("state"));
        portable::export(&at("run/checkpoints"), &at("state"), SMALLEST_SHARD, |_| ()).unwrap()
    };
    let exported = export();
    let sizes: Vec<u64> = fs::read_dir(at("state"))
        .unwrap()
        .map(|item| item.unwrap().metadata().unwrap().len())
        .collect();
    assert_eq!(sizes.len(), exported.shards + 1);
    assert!(
        exported.shards > 8 && sizes.iter().all(|size| *size <= SMALLEST_SHARD),
        "{sizes:?}"
    );
    // One after another the shards of a name are a file that other programs read.
    let mut whole = Vec::new();
    for number in 0..3 {
        whole.extend(fs::read(at(&format!("state/weights.safetensors.{number:05}"))).unwrap());
    }
    fs::write(at("whole.safetensors"), whole).unwrap();
    let weights = Frozen::open(&at("whole.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(bits(weights.tensors()), bits(&newest(&at("run")).weights));

    fn edit(path: &Path, with: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        with(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
    type Spoil = fn(&Path);
    let damage: [(Spoil, &str); 6] = [
        (
            |state| fs::remove_file(state.join("optimiser.safetensors.00001")).unwrap(),
            "optimiser.safetensors.00001: No such file",
        ),
        (
            |state| edit(&state.join("weights.safetensors.00002"), |bytes| bytes[90] ^= 4),
            "weights.safetensors.00002: its content changed",
        ),
        (
            |state| edit(&state.join("ema.safetensors.00000"), |bytes| bytes.truncate(7)),
            "ema.safetensors.00000: 7 bytes, expected",
        ),
        (
            |state| fs::remove_file(state.join("manifest.json")).unwrap(),
            "manifest.json: No such file",
        ),
        (
            |state| {
                edit(&state.join("manifest.json"), |bytes| {
                    let text = String::from_utf8_lossy(bytes).replace("\"format\": 1", "\"format\": 7");
                    *bytes = text.into_bytes();
                });
            },
            "format 7 is newer than this program, which reads 1",
        ),
        (
            |state| {
                edit(&state.join("manifest.json"), |bytes| {
                    let text = String::from_utf8_lossy(bytes).replace("state.json", "../state.json");
                    *bytes = text.into_bytes();
                });
            },
            "the manifest names `../state.json`, which is unknown",
        ),
    ];
    for (spoil, words) in damage {
        export();
        spoil(&at("state"));
        let options = Options {
            import: Some(at("state")),
            ..Options::default()
        };
        let error = train(&wide(), &recipe(&at("new"), sets), &options)
            .unwrap_err()
            .to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{words}: {error}");
        assert!(checkpoint::list(&at("new/checkpoints")).unwrap().is_empty());
    }
}
