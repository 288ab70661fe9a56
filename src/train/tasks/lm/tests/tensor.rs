//! Runs whose layers lie on several ranks beside the run of one.

use super::ranks::{apart, left, of_steps, over_ranks, recipe, task};
use super::*;
use crate::train::checkpoint;

const MODEL: &str = "heads = 4";
const SETTINGS: &str =
    "keep_best = true\nvalidate_every = 5\n[optimiser]\nlr = 1e-3\neps = 1e-4\nclip = 0.1\n";

/// Degrees 2 and 4, with data and sequences over ranks beside them, make the run of one rank: losses, weights, averages, moments
/// and figures; and a run goes on with another degree.
#[test]
fn degrees_make_the_run_of_one() {
    for (own, architecture) in [
        ("", "tnl"),
        ("recompute = true", "transnormer"),
        ("packing = 'documents'", "tnl"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, distributed: &str| {
            let model = format!("architecture = '{architecture}'\n{MODEL}");
            let settings = format!("{SETTINGS}[distributed]\n{distributed}");
            // The second number of heads stands.
            let text = recipe(folder.path(), name, &settings, own, "architecture = 'tnl'");
            recipe_of(text, &model)
        };
        let one = of("one", "");
        let expected_outcome = run(&*task(&one).unwrap(), &one, &RunOptions::default(), |_| ()).unwrap();
        let (expected, weights) = left(&one);
        for (world, tensor, sequence) in [(2, 2, 1), (4, 4, 1), (4, 2, 1), (4, 2, 2)] {
            let name = format!("{world}-{tensor}-{sequence}");
            let many = of(&name, &format!("tensor = {tensor}\nsequence = {sequence}"));
            let outcome = over_ranks(&many, world, &RunOptions::default()).unwrap();
            let (losses, found) = left(&many);
            assert_eq!(losses.len(), 12);
            for (found, expected) in losses.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() < 1e-4,
                    "{architecture}, {name}: {losses:?} {expected:?}"
                );
            }
            let error = apart(&found, &weights);
            assert!(error < 1e-5, "{architecture}, {name}: {error:e}");
            let [best, own] = [&expected_outcome, &outcome].map(|outcome| outcome.best.unwrap());
            assert!(
                (best - own).abs() < 1e-4,
                "{architecture}, {name}: validation {own}, {best}"
            );
            let kept = |recipe: &Recipe| {
                let found = checkpoint::load_newest(&recipe.run_dir.join("checkpoints"), |_| ());
                found.unwrap().unwrap()
            };
            let (own, whole) = (kept(&many), kept(&one));
            for (own, whole) in [(&own.ema, &whole.ema), (&own.optimiser, &whole.optimiser)] {
                assert!(own.keys().eq(whole.keys()));
                for (name, tensor) in whole {
                    assert_eq!(own[name].dims(), tensor.dims(), "{name}");
                }
            }
            assert!(apart(&own.ema, &whole.ema) < 1e-5);
            for file in ["best.safetensors", "model/model.safetensors"] {
                let read = |recipe: &Recipe| {
                    let path = recipe.run_dir.join(file);
                    fulgur_lightnet::params::file::read(&path, &Device::Cpu)
                        .unwrap()
                        .tensors
                };
                assert!(apart(&read(&many), &read(&one)) < 1e-5, "{file}");
            }
        }
        // Four more steps, by two ranks and then by one.
        let options = RunOptions {
            resume: true,
            ..RunOptions::default()
        };
        let one = [14, 16].map(|steps| of_steps(steps, of("one", "")));
        for longer in &one {
            run(&*task(longer).unwrap(), longer, &options, |_| ()).unwrap();
        }
        let first = of_steps(14, of("4-4-1", "tensor = 2"));
        over_ranks(&first, 2, &options).unwrap();
        let second = of_steps(16, of("4-4-1", ""));
        run(&*task(&second).unwrap(), &second, &options, |_| ()).unwrap();
        let [expected, found] = [&one[1], &second].map(|recipe| left(recipe).1);
        assert!(apart(&found, &expected) < 1e-5, "{:e}", apart(&found, &expected));
    }
}

/// The recipe with another table of the model.
fn recipe_of(recipe: Recipe, model: &str) -> Recipe {
    let text = recipe.resolved();
    let mut table: toml::Table = text.parse().unwrap();
    let lm = table["lm"].as_table_mut().unwrap();
    let own: toml::Table = model.parse().unwrap();
    lm["model"].as_table_mut().unwrap().extend(own);
    Recipe::check(table, "test".into(), &recipe.run_dir).unwrap()
}

#[test]
fn what_does_not_split_over_ranks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (world, settings, model, words) in [
        (
            2,
            "[distributed]\ntensor = 2",
            "architecture = 'hgrn2'",
            "[lm]: architecture is hgrn2, expected tnl or transnormer with distributed.tensor = 2",
        ),
        (
            4,
            "[distributed]\ntensor = 4",
            "architecture = 'tnl'",
            "[lm]: num_attention_heads is 2, expected a multiple of the ranks",
        ),
        (
            4,
            "[distributed]\ntensor = 3",
            "architecture = 'tnl'",
            "distributed.tensor: found 3, expected a number that divides 4",
        ),
        (
            4,
            "[distributed]\ntensor = 2\nsequence = 4",
            "architecture = 'tnl'",
            "distributed.sequence: found 4, expected a number that divides 2",
        ),
        (
            2,
            "[optimiser]\nmuon = ['mlp']\n[distributed]\ntensor = 2",
            "architecture = 'tnl'",
            "distributed.tensor: found 2, expected 1 with optimiser.muon",
        ),
    ] {
        let recipe = recipe(folder.path(), "run", settings, "", model);
        let line = over_ranks(&recipe, world, &RunOptions::default())
            .unwrap_err()
            .to_string();
        assert!(line.contains(words), "{line}");
        assert!(!recipe.run_dir.join("checkpoints").exists());
    }
    let text = "tensor = 2\nshard = 'moments'".parse::<toml::Table>().unwrap();
    let options: crate::distributed::Distributed = text.try_into().unwrap();
    assert_eq!(options.wrong().unwrap().0, "distributed.tensor");
}
