use std::collections::BTreeMap;

use super::*;
use crate::lm::{Architecture, Config};
use crate::mixer::causal::Way;
use crate::params::{Params, Precision};
use fulgur_kernels::philox::Philox;

const CPU: &Device = &Device::Cpu;
const VOCABULARY: usize = 11;

fn layers(architecture: Architecture, count: usize) -> Config {
    Config {
        vocab_size: VOCABULARY,
        hidden_size: 16,
        intermediate_size: 20,
        num_hidden_layers: count,
        num_attention_heads: if architecture == Architecture::Hgrn1 {
            16
        } else {
            2
        },
        use_tpe: false,
        initializer_range: 0.3,
        ..Config::of(architecture)
    }
}

fn config(architecture: Architecture, form: Form, grid: Option<[usize; 2]>) -> ClassifierConfig {
    ClassifierConfig {
        classes: 3,
        input: if grid.is_some() {
            Input::Pixels
        } else {
            Input::Tokens
        },
        form,
        grid,
        positions: Positions::None,
        layers: Config {
            bidirectional: form == Form::Whole && architecture == Architecture::Lightnet,
            ..layers(architecture, 2)
        },
    }
}

fn model(config: &ClassifierConfig) -> Result<(Params, SequenceClassifier)> {
    let params = Params::random(3, CPU);
    let model = SequenceClassifier::new(config, DType::F32, &params.builder())?;
    Ok((params, model))
}

fn random(shape: &[usize], name: &str) -> Result<Tensor> {
    let values = Philox::named(1, name).normals(shape.iter().product());
    Tensor::from_vec(values, shape, CPU)
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

fn flip(x: &Tensor, axis: usize) -> Result<Tensor> {
    let last = x.dim(axis)? as u32;
    let ids: Vec<u32> = (0..last).rev().collect();
    x.contiguous()?.index_select(&Tensor::new(ids, CPU)?, axis)
}

/// The mixers that scan.
const SCANNING: [Architecture; 7] = [
    Architecture::Tnl,
    Architecture::Transnormer,
    Architecture::Hgrn1,
    Architecture::Hgrn2,
    Architecture::Cosformer2,
    Architecture::Lightnet,
    Architecture::Eos,
];

/// A layer of each that scans, with the context it needs.
fn with_layers(test: impl Fn(Architecture, &Layer, &CausalContext<'_>) -> Result<()>) -> Result<()> {
    for architecture in SCANNING {
        let config = layers(architecture, 2);
        let params = Params::random(5, CPU);
        let layer = Layer::new(&config, 1, &params.builder())?;
        let bound = Tensor::full(0.3f32, 16, CPU)?;
        let context = CausalContext {
            lower_bound: config.has_lower_bounds().then_some(&bound),
            ..CausalContext::default()
        };
        test(architecture, &layer, &context)?;
    }
    Ok(())
}

/// A scan backwards is the scan of the reversed sequence, reversed.
#[test]
fn a_scan_backwards_is_one_of_the_reversed_sequence() -> Result<()> {
    with_layers(|architecture, layer, context| {
        let x = random(&[2, 9, 16], "x")?;
        let back: Vec<u32> = (0..9).rev().collect();
        let way = Way::through(Some(Order::new(&back, 9, CPU)?));
        let mut memory = Memory::along(Arc::new(Paths::along(vec![way], None)));
        let found = layer.mix(&x, context, None, Some(&mut memory))?;
        let expected = flip(&layer.mix(&flip(&x, 1)?, context, None, None)?, 1)?;
        let error = far(&found, &expected)?;
        assert!(error < 1e-5, "{architecture:?}: {error}");
        let forwards = layer.mix(&x, context, None, None)?;
        assert!(far(&found, &forwards)? > 1e-2, "{architecture:?}");
        Ok(())
    })
}

/// Each way through a picture is the causal mixer on every row, or column, by itself.
#[test]
fn ways_through_a_picture_are_loops_over_rows_and_columns() -> Result<()> {
    let [rows, columns] = [3, 4];
    with_layers(|architecture, layer, context| {
        let x = random(&[2, rows, columns, 16], "x")?;
        let by_column: Vec<u32> = (0..columns)
            .flat_map(|column| (0..rows).map(move |row| (row * columns + column) as u32))
            .collect();
        let order = Order::new(&by_column, rows * columns, CPU)?;
        for (way, axis, count) in [
            (Way::through(None).in_parts(rows), 1, rows),
            (Way::through(Some(order)).in_parts(columns), 2, columns),
        ] {
            // Positions of columns are those of a raster in the layers that have any.
            if axis == 2 && matches!(architecture, Architecture::Cosformer2) {
                continue;
            }
            let mut memory = Memory::along(Arc::new(Paths::along(vec![way], None)));
            let flat = x.reshape((2, rows * columns, 16))?;
            let found = layer.mix(&flat, context, None, Some(&mut memory))?;
            let lines: Vec<Tensor> = (0..count)
                .map(|line| {
                    let line = x.narrow(axis, line, 1)?.squeeze(axis)?.contiguous()?;
                    layer.mix(&line, context, None, None)
                })
                .collect::<Result<_>>()?;
            let expected = Tensor::stack(&lines, axis)?.reshape(flat.shape())?;
            let error = far(&found, &expected)?;
            assert!(error < 1e-5, "{architecture:?} along axis {axis}: {error}");
        }
        Ok(())
    })
}

/// Without positions, forms in both directions do not know a sequence, or a picture, from its mirror image.
#[test]
fn forms_have_the_symmetries_that_they_should() -> Result<()> {
    let [rows, columns] = [4, 4];
    let picture = random(&[2, rows, columns], "picture")?;
    let layout = Layout::equal(2, rows * columns)?;
    for architecture in [
        Architecture::Hgrn2,
        Architecture::Hgrn1,
        Architecture::Tnl,
        Architecture::Lightnet,
    ] {
        for form in Form::ALL {
            if form == Form::Whole {
                continue;
            }
            let (_, model) = model(&config(architecture, form, Some([rows, columns])))?;
            let logits = |picture: &Tensor| {
                let flat = picture.contiguous()?.reshape((2, rows * columns))?;
                model.logits(&Content::Pixels(&flat), &layout)
            };
            let plain = logits(&picture)?;
            let same = |other: &Tensor| Ok::<_, candle_core::Error>(far(&plain, &logits(other)?)? < 1e-5);
            let both = flip(&flip(&picture, 1)?, 2)?;
            let mirrored = [flip(&picture, 1)?, flip(&picture, 2)?];
            let turned = picture.transpose(1, 2)?;
            let two = form.needs_grid();
            let name = format!("{architecture:?} {form:?}");
            assert_eq!(same(&both)?, two || form == Form::Parallel, "{name}");
            for mirrored in mirrored {
                assert_eq!(same(&mirrored)?, two, "{name}");
            }
            assert_eq!(same(&turned)?, form == Form::Parallel2d, "{name}");
        }
    }
    Ok(())
}

/// One layer in series: a branch forwards, then the same mixer backwards over the sum.
#[test]
fn a_series_is_one_scan_over_the_result_of_another() -> Result<()> {
    for architecture in [Architecture::Hgrn2, Architecture::Lightnet] {
        let mut config = config(architecture, Form::Series, None);
        config.layers.num_hidden_layers = 1;
        let (_, model) = model(&config)?;
        let (ids, layout) = (ids(7)?, Layout::equal(1, 7)?);
        let found = model.logits(&Content::Tokens(&ids), &layout)?;
        let layer = &model.layers[0];
        let bounds = lower_bounds(&config.layers, model.lower_bounds.as_ref())?;
        let context = CausalContext {
            lower_bound: bounds.first(),
            ..CausalContext::default()
        };
        // Gains are one at first.
        let norm = |x: &Tensor| -> Result<Tensor> {
            let square = (x.sqr()?.mean_keepdim(D::Minus1)? + config.layers.rms_norm_eps)?;
            x.broadcast_div(&square.sqrt()?)
        };
        let x = lookup(&model.embedding, &ids, DType::F32)?;
        let x = (&x + layer.mix(&norm(&x)?, &context, None, None)?)?;
        let back = layer.mix(&flip(&norm(&x)?, 1)?, &context, None, None)?;
        let x = (&x + flip(&back, 1)?)?;
        let x = (&x + layer.expand(&norm(&x)?, None, None)?)?;
        let expected = norm(&x)?.mean(1)?.matmul(&model.head.t()?)?;
        assert!(far(&found, &expected)? < 1e-5, "{architecture:?}");
    }
    Ok(())
}

fn ids(count: usize) -> Result<Ids> {
    let mut noise = Philox::named(2, "ids");
    let ids: Vec<u32> = (0..count).map(|_| noise.below(VOCABULARY) as u32).collect();
    Ids::new(&ids, &[1, count], VOCABULARY)
}

fn forms_of(architecture: Architecture) -> Vec<Form> {
    let whole = matches!(architecture, Architecture::Llama | Architecture::Lightnet);
    let forms = Form::ALL.into_iter().filter(|form| !form.needs_grid());
    forms.filter(|&form| whole || form != Form::Whole).collect()
}

/// Sequences packed behind each other have the logits, and give the gradients, that they have alone: neither neighbours nor
/// the filling of shorter ones is seen.
#[test]
fn packed_sequences_are_what_they_are_alone() -> Result<()> {
    let borders = [0, 5, 6, 18, 25];
    let ids = ids(25)?;
    let targets = Tensor::new(&[2u32, 0, 1, 1], CPU)?;
    for architecture in SCANNING.into_iter().chain([Architecture::Llama]) {
        for form in forms_of(architecture) {
            let name = format!("{architecture:?} {form:?}");
            let config = ClassifierConfig {
                positions: Positions::Sine,
                ..config(architecture, form, None)
            };
            let (params, model) = model(&config)?;
            let packed = Layout::packed(&borders)?;
            let content = Content::Tokens(&ids);
            let together = model.logits(&content, &packed)?;
            let loss = model.loss(&content, &packed, &targets)?;
            let mut alone = Vec::new();
            let mut losses: Option<Tensor> = None;
            for (at, ends) in borders.windows(2).enumerate() {
                let own = &ids.list()[ends[0]..ends[1]];
                let own = Ids::new(own, &[1, own.len()], VOCABULARY)?;
                let layout = Layout::equal(1, ends[1] - ends[0])?;
                let content = Content::Tokens(&own);
                alone.push(model.logits(&content, &layout)?);
                let loss = model.loss(&content, &layout, &targets.narrow(0, at, 1)?)?;
                losses = Some(match losses {
                    Some(losses) => (losses + loss)?,
                    None => loss,
                });
            }
            let error = far(&together, &Tensor::cat(&alone, 0)?)?;
            assert!(error < 1e-5, "{name}: {error}");
            let Some(losses) = losses else { unreachable!() };
            let (one, other) = (loss.backward()?, (losses / 4.0)?.backward()?);
            for (tensor, var) in params.vars() {
                let (Some(a), Some(b)) = (one.get(&var), other.get(&var)) else {
                    panic!("{name}: no gradient of {tensor}");
                };
                let error = far(a, b)?;
                assert!(error < 1e-5, "{name}: {error} in the gradient of {tensor}");
            }
        }
    }
    Ok(())
}

/// Positions of a picture are of its rows and its columns.
#[test]
fn positions_tell_pictures_from_their_mirror_images() -> Result<()> {
    for (architecture, form) in [
        (Architecture::Llama, Form::Whole),
        (Architecture::Hgrn2, Form::Parallel2d),
    ] {
        let config = ClassifierConfig {
            positions: Positions::Sine,
            ..config(architecture, form, Some([3, 5]))
        };
        let (_, model) = model(&config)?;
        let layout = Layout::equal(2, 15)?;
        let picture = random(&[2, 3, 5], "picture")?;
        let plain = model.logits(&Content::Pixels(&picture.reshape((2, 15))?), &layout)?;
        for axis in [1, 2] {
            let other = flip(&picture, axis)?.reshape((2, 15))?;
            assert!(far(&plain, &model.logits(&Content::Pixels(&other), &layout)?)? > 1e-4);
        }
    }
    Ok(())
}

#[test]
fn a_saved_model_loads_as_it_was() -> Result<()> {
    let ids = ids(9)?;
    let (content, layout) = (Content::Tokens(&ids), Layout::packed(&[0, 4, 9])?);
    for architecture in SCANNING.into_iter().chain([Architecture::Llama]) {
        for form in forms_of(architecture) {
            let config = config(architecture, form, None);
            let (params, model) = model(&config)?;
            let folder = tempfile::tempdir()?;
            let text = serde_json::to_string(&config).expect("a configuration is JSON");
            assert!(text.contains("\"model_type\":\"sequence_classifier\""), "{text}");
            std::fs::write(folder.path().join("config.json"), text)?;
            let file = folder.path().join("model.safetensors");
            params
                .save(&file, &BTreeMap::new(), Precision::F32)
                .expect("weights are written");
            let loaded = match SequenceClassifier::load(folder.path(), DType::F32, CPU) {
                Ok(loaded) => loaded,
                Err(e) => panic!("{architecture:?} {form:?}: {e}"),
            };
            let error = far(
                &model.logits(&content, &layout)?,
                &loaded.logits(&content, &layout)?,
            )?;
            assert_eq!(error, 0.0, "{architecture:?} {form:?}");
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let line = |change: fn(&mut ClassifierConfig)| {
        let mut config = config(Architecture::Hgrn2, Form::Parallel, None);
        change(&mut config);
        config.check().unwrap_err().to_string()
    };
    for (change, words) in [
        (
            (|c| c.form = Form::Parallel2d) as fn(&mut ClassifierConfig),
            "expected one of causal, parallel, series, whole where there is no grid",
        ),
        (|c| c.form = Form::Whole, "only with llama and lightnet"),
        (|c| c.classes = 1, "classes is 1"),
        (|c| c.grid = Some([0, 4]), "grid is 0 x 4"),
        (|c| c.layers.use_tpe = true, "use_tpe is true"),
        (
            |c| {
                c.layers = layers(Architecture::Lightnet, 1);
                c.layers.bidirectional = true;
            },
            "bidirectional is true, expected false",
        ),
    ] {
        let found = line(change);
        assert!(found.contains(words), "{found}");
    }
    for (borders, words) in [
        (&[0][..], "at least one more"),
        (&[0, 3, 3], "do not rise"),
        (&[1, 3], "expected 0"),
    ] {
        let found = Layout::packed(borders).unwrap_err().to_string();
        assert!(found.contains(words), "{found}");
    }
    // What mixers cannot do on several ways, they say.
    let mut config = config(Architecture::Tnl, Form::Parallel, None);
    config.layers.conv_size = Some(3);
    let (_, model) = model(&config)?;
    let ids = ids(4)?;
    let found = model.logits(&Content::Tokens(&ids), &Layout::equal(1, 4)?);
    let found = found.unwrap_err().to_string();
    assert!(
        found.contains("several ways through the tokens are not for short convolutions"),
        "{found}"
    );
    let other = model.logits(&Content::Tokens(&ids), &Layout::equal(2, 2)?);
    assert!(
        other
            .unwrap_err()
            .to_string()
            .contains("content has shape [1, 4]")
    );
    Ok(())
}
