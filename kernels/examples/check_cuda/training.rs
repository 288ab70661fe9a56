//! The loss of a language model's head, and the optimiser of many tensors.

use crate::timings::seconds;
use crate::{BOTH, Case, host, master, relative_rms, tolerance_of, values};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use fulgur_kernels::adamw::{AdamW, Clipper, Counts, Slot, squared_norm, zero_moments_in};
use fulgur_kernels::average::follow;
use fulgur_kernels::cross_entropy::{Options, Reduction, TargetWatch, head, head_losses};
use fulgur_kernels::upload::Uploader;

/// What one operator is tested for beside its gradients: the errors that it found, or why it failed.
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Device) -> Result<String>,
}

impl Check {
    /// Prints a row; true if it passed.
    pub(crate) fn passes(&self, device: &Device) -> bool {
        let (verdict, detail) = match (self.run)(device) {
            Ok(detail) => ("ok  ", detail),
            Err(error) => ("FAIL", error.to_string()),
        };
        let detail = detail.lines().next().unwrap_or_default();
        println!("{verdict} {:<20} {detail}", self.name);
        verdict == "ok  "
    }
}

fn require(holds: bool, otherwise: impl Into<String>) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::Msg(otherwise.into()))
    }
}

const IGNORED: u32 = 3;

/// Targets of `rows` rows, some of them [`IGNORED`].
fn targets(rows: usize, vocabulary: usize, device: &Device) -> Result<Tensor> {
    let ids: Vec<u32> = (0..rows).map(|i| ((i * 7919 + 3) % vocabulary) as u32).collect();
    Tensor::from_vec(ids, rows, device)
}

/// The loss of `t[0]` and small weights `t[1]`, f32 masters or of the type of x.
fn loss(t: &[Tensor], masters: bool, options: &Options) -> Result<Tensor> {
    let (rows, vocabulary) = (t[0].dim(0)?, t[1].dim(0)?);
    let weight = if masters { master(&t[1])? } else { t[1].clone() };
    let targets = targets(rows, vocabulary, t[0].device())?;
    head(&t[0], &(weight * 0.2)?, &targets, options)?.to_dtype(t[0].dtype())
}

fn every_term() -> Options<'static> {
    Options {
        ignore: Some(IGNORED),
        label_smoothing: 0.1,
        z_loss: 1e-2,
        chunk: Some(96),
        ..Default::default()
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let sizes = |list: &[[usize; 3]]| {
        list.iter()
            .map(|&[m, v, d]| vec![vec![m, d], vec![v, d]])
            .collect()
    };
    vec![
        Case {
            name: "cross_entropy",
            entry: |t| loss(t, true, &Options::default()),
            dtypes: BOTH,
            shapes: sizes(&[[2, 5, 3], [100, 517, 36], [301, 50_257, 64], [64, 8192, 200]]),
        },
        Case {
            name: "cross_entropy, terms",
            entry: |t| loss(t, false, &every_term()),
            dtypes: BOTH,
            shapes: sizes(&[[7, 9, 5], [200, 1003, 64], [97, 32_000, 33]]),
        },
        Case {
            name: "cross_entropy, sum",
            entry: |t| {
                let options = Options {
                    chunk: Some(1),
                    reduction: Reduction::Sum,
                    ..Default::default()
                };
                loss(t, true, &options)
            },
            dtypes: BOTH,
            shapes: sizes(&[[5, 7, 16]]),
        },
    ]
}

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "cross_entropy losses",
            run: losses_of_tokens,
        },
        Check {
            name: "cross_entropy targets",
            run: wrong_and_ignored_targets,
        },
        Check {
            name: "adamw groups",
            run: groups_of_every_type,
        },
        Check {
            name: "adamw skips",
            run: steps_without_a_finite_norm,
        },
        Check {
            name: "upload",
            run: uploads_in_turn,
        },
    ]
}

/// Losses of all tokens, with targets on either device, large logits among them.
fn losses_of_tokens(device: &Device) -> Result<String> {
    let (rows, vocabulary, width) = (130, 1003, 40);
    let mut details = vec![];
    for &dtype in BOTH {
        for scale in [0.2, 200.0] {
            let x = host(1, &[rows, width], dtype)?;
            let weight = (host(2, &[vocabulary, width], DType::BF16)? * scale)?.to_dtype(DType::BF16)?;
            let ids = targets(rows, vocabulary, &Device::Cpu)?;
            let run = |dtype: DType, device: &Device, ids: &Tensor| -> Result<Vec<f64>> {
                let (x, weight) = (
                    x.to_dtype(dtype)?.to_device(device)?,
                    weight.to_dtype(dtype)?.to_device(device)?,
                );
                values(&head_losses(&x, &weight, ids, &every_term())?)
            };
            let wanted = run(DType::F64, &Device::Cpu, &ids)?;
            let found = run(dtype, device, &ids)?;
            require(
                found == run(dtype, device, &ids.to_device(device)?)?,
                "targets on the GPU give other losses than those on the CPU",
            )?;
            let error = relative_rms(&found, &wanted);
            require(
                error < tolerance_of("cross_entropy", dtype),
                format!("{dtype:?}, weights of {scale}: {error:.1e}"),
            )?;
            details.push(format!("{error:.1e}"));
        }
    }
    Ok(details.join(" "))
}

/// A target out of range is seen in loss, gradients and the watch; ignored ones leave zeros.
fn wrong_and_ignored_targets(device: &Device) -> Result<String> {
    let (rows, vocabulary) = (20, 37);
    for &dtype in BOTH {
        let x = Var::from_tensor(&host(1, &[rows, 8], dtype)?.to_dtype(dtype)?.to_device(device)?)?;
        let weight = host(2, &[vocabulary, 8], dtype)?.to_dtype(DType::F32)?;
        let weight = Var::from_tensor(&weight.to_device(device)?)?;
        let watch = TargetWatch::new(vocabulary, device)?;
        let options = Options {
            ignore: Some(u32::MAX),
            chunk: Some(6),
            watch: Some(&watch),
            ..Default::default()
        };
        let run = |ids: &[u32]| -> Result<[Vec<f64>; 3]> {
            let loss = head(&x, &weight, &Tensor::new(ids, device)?, &options)?;
            let grads = loss.backward()?;
            let of = |var: &Var| match grads.get(var) {
                Some(grad) => values(grad),
                None => Err(Error::Msg("no gradient".into())),
            };
            Ok([values(&loss)?, of(&x)?, of(&weight)?])
        };
        let all_zero = |found: &[Vec<f64>]| found.iter().flatten().all(|&value| value == 0.0);
        let mut ids = vec![u32::MAX; rows];
        require(all_zero(&run(&ids)?), "ignored targets have a loss or gradients")?;
        ids[4] = 36;
        let [loss, dx, _] = run(&ids)?;
        require(loss[0] > 0.0 && loss[0].is_finite(), "no loss")?;
        require(
            all_zero(&[dx[..32].to_vec(), dx[40..].to_vec()]),
            "ignored rows have gradients",
        )?;
        watch.check()?;
        (ids[13], ids[8]) = (40, 37);
        let found = run(&ids)?;
        require(
            found
                .iter()
                .all(|values| values.iter().any(|value| value.is_nan())),
            "a wrong target leaves loss and gradients numbers",
        )?;
        let message = watch
            .check()
            .map_or_else(|error| error.to_string(), |()| String::new());
        require(
            message == "cross_entropy: targets[8] is 37, expected less than 37",
            format!("the watch says: {message}"),
        )?;
    }
    Ok("ignored, wrong, noted down".into())
}

/// Parameters of many sizes: aligned and not, less than a block and several.
const SHAPES: [&[usize]; 6] = [&[1], &[7, 9], &[30_001], &[64, 36], &[16_384], &[400, 300]];

/// Parameters, moments, copies in bf16.
struct Model(Vec<[Tensor; 3]>);

impl Model {
    fn new(moments: DType, device: &Device) -> Result<Self> {
        let mut slots = vec![];
        for (i, shape) in SHAPES.into_iter().enumerate() {
            let parameter = host(i as u64, shape, DType::F32)?
                .to_dtype(DType::F32)?
                .to_device(device)?;
            let moments = zero_moments_in(&parameter, moments)?;
            slots.push([parameter, moments, Tensor::zeros(shape, DType::BF16, device)?]);
        }
        Ok(Self(slots))
    }

    fn slots<'a>(&'a self, gradients: &'a [Tensor]) -> Vec<Slot<'a>> {
        let pairs = self.0.iter().zip(gradients).enumerate();
        pairs
            .map(|(i, ([parameter, moments, copy], gradient))| Slot {
                rounded: (i != 1).then_some(copy),
                ..Slot::new(parameter, moments, gradient)
            })
            .collect()
    }

    /// Parameters and moments, then copies.
    fn state(&self) -> Result<Vec<Vec<f64>>> {
        let first = self.0.iter().flat_map(|[p, m, _]| [p, m]);
        first
            .chain(self.0.iter().map(|[_, _, copy]| copy))
            .map(values)
            .collect()
    }
}

/// Gradients of a step; one starts off the grid of vectors.
fn gradients(step: u64, dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    let mut all = vec![];
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let count: usize = shape.iter().product();
        let off = usize::from(i == 3);
        let draws = host(100 * step + i as u64, &[count + off], DType::BF16)?.to_dtype(dtype)?;
        all.push(draws.to_device(device)?.narrow(0, off, count)?.reshape(shape)?);
    }
    Ok(all)
}

/// Five clipped steps with moments and gradients of each type against the processor, twice.
fn groups_of_every_type(device: &Device) -> Result<String> {
    let mut details = vec![];
    for (moments, kind) in BOTH.iter().flat_map(|&m| BOTH.iter().map(move |&g| (m, g))) {
        let run = |device: &Device| -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
            let (model, mut clipper) = (Model::new(moments, device)?, Clipper::new(Some(3.0), device)?);
            let mut norms = vec![];
            let adamw = AdamW {
                lr: 0.01,
                beta2: 0.95,
                ..AdamW::default()
            };
            for step in 1..=5 {
                let gradients = gradients(step, kind, device)?;
                let clip = clipper.measure(&gradients.iter().collect::<Vec<_>>())?;
                adamw.step_clipped(&model.slots(&gradients), &clip)?;
                norms.extend(values(clip.norm())?);
            }
            let counts = clipper.counts()?;
            require((counts.made, counts.skipped) == (5, 0), format!("{counts:?}"))?;
            Ok((norms, model.state()?))
        };
        let (wanted, found, again) = (run(&Device::Cpu)?, run(device)?, run(device)?);
        require(found == again, "second run differs")?;
        let norms = relative_rms(&found.0, &wanted.0);
        require(norms < 1e-6, format!("norms {norms:.1e}"))?;
        let mut worst = 0f64;
        for (i, (found, wanted)) in found.1.iter().zip(&wanted.1).enumerate() {
            let error = relative_rms(found, wanted);
            // Numbers between two of bf16 may be rounded to the other one.
            let exact = moments == DType::F32 && i < 2 * SHAPES.len();
            require(
                error < if exact { 1e-6 } else { 5e-3 },
                format!("moments {moments:?}, gradients {kind:?}, result {i}: {error:.1e}"),
            )?;
            worst = worst.max(error);
        }
        details.push(format!("{worst:.1e}"));
    }
    Ok(details.join(" "))
}

/// Batches of each type arrive whole while the device is busy and buffers are used again; small and large, also views.
fn uploads_in_turn(device: &Device) -> Result<String> {
    let mut uploader = Uploader::new(device);
    let busy = Tensor::randn(0f32, 1.0, (4096, 4096), device)?;
    let mut batches = vec![];
    for turn in 0..48u64 {
        for (kind, count) in [
            (DType::F32, 300_000),
            (DType::F32, 7),
            (DType::BF16, 70_001),
            (DType::U32, 300_000),
            (DType::U8, 99_999 + turn as usize),
        ] {
            let draws = (host(turn, &[count + 1], DType::BF16)? * 60.0)?.abs()?;
            batches.push(draws.to_dtype(kind)?.narrow(0, 1, count)?);
        }
    }
    // Drawn before, so that the host is far ahead of the device when it fills buffers again.
    for _ in 0..100 {
        busy.matmul(&busy)?;
    }
    let mut expected = vec![];
    for batch in batches {
        expected.push((uploader.upload(&batch)?, batch));
    }
    for (number, (found, wanted)) in expected.iter().enumerate() {
        require(
            found.device().same_device(device) && found.dtype() == wanted.dtype(),
            format!("upload {number} is of another kind"),
        )?;
        require(
            values(found)? == values(wanted)?,
            format!("upload {number} differs"),
        )?;
    }
    Ok(format!("{} tensors", expected.len()))
}

/// A gradient that is not finite, in the last element of the last tensor, changes nothing and is counted, and leaves no
/// trace in the steps and averages that follow.
fn steps_without_a_finite_norm(device: &Device) -> Result<String> {
    for &kind in BOTH {
        let run = |device: &Device, spoil: bool| -> Result<Vec<Vec<f64>>> {
            let (model, mut clipper) = (Model::new(DType::F32, device)?, Clipper::new(None, device)?);
            let parameters: Vec<Tensor> = model.0.iter().map(|[parameter, ..]| parameter.clone()).collect();
            // One average starts off the grid of vectors.
            let averages = parameters.iter().enumerate().map(|(i, parameter)| {
                let count = parameter.elem_count();
                let room = Tensor::zeros(count + 1, DType::F32, device)?;
                room.narrow(0, usize::from(i == 3), count)?
                    .reshape(parameter.shape())
            });
            let averages = averages.collect::<Result<Vec<_>>>()?;
            let mut update = |gradients: &[Tensor]| -> Result<Counts> {
                let clip = clipper.measure(&gradients.iter().collect::<Vec<_>>())?;
                AdamW::default().step_clipped(&model.slots(gradients), &clip)?;
                follow(
                    &averages.iter().zip(&parameters).collect::<Vec<_>>(),
                    0.3,
                    10.0,
                    &clip,
                )?;
                clipper.counts()
            };
            let state = || -> Result<Vec<Vec<f64>>> {
                let averages = averages.iter().map(values).collect::<Result<Vec<_>>>()?;
                Ok([model.state()?, averages].concat())
            };
            let mut skipped = 0;
            for step in 1..=6 {
                let gradients = gradients(step, kind, device)?;
                for wrong in [f64::NAN, f64::INFINITY, 1e30] {
                    if !spoil {
                        break;
                    }
                    let (before, mut gradients) = (state()?, gradients.clone());
                    let last = &mut gradients[SHAPES.len() - 1];
                    let mut host = values(last)?;
                    let end = host.len() - 1;
                    host[end] = wrong;
                    *last = Tensor::from_vec(host, last.shape(), &Device::Cpu)?
                        .to_dtype(kind)?
                        .to_device(device)?;
                    let counts = update(&gradients)?;
                    skipped += 1;
                    require(state()? == before, format!("{wrong} changed something"))?;
                    let as_expected = counts.made + 1 == step as u32
                        && counts.skipped == skipped
                        && counts.in_a_row == (skipped - 1) % 3 + 1
                        && counts.longest_row == counts.in_a_row.max(skipped.min(3));
                    require(as_expected, format!("{wrong}, step {step}: {counts:?}"))?;
                }
                let (before, counts) = (state()?, update(&gradients)?);
                require(
                    counts.made == step as u32 && counts.in_a_row == 0,
                    format!("step {step}: {counts:?}"),
                )?;
                require(state()? != before, "a step with finite gradients was skipped")?;
            }
            state()
        };
        let (found, without) = (run(device, true)?, run(device, false)?);
        require(found == without, "skipped steps left a trace")?;
        for (i, (found, wanted)) in found.iter().zip(&run(&Device::Cpu, true)?).enumerate() {
            let error = relative_rms(found, wanted);
            // Copies in bf16 may be rounded to the other neighbour.
            let copies = 2 * SHAPES.len()..3 * SHAPES.len();
            let tolerance = if copies.contains(&i) { 5e-3 } else { 1e-6 };
            require(
                error < tolerance,
                format!("gradients {kind:?}, result {i}: {error:.1e}"),
            )?;
        }
    }
    Ok("not a number, infinite, too large".into())
}

/// The head of a small language model in bf16 with its time in products alone, and a step on many tensors.
pub(crate) fn timings(device: &Device) -> Result<()> {
    let (rows, vocabulary, width) = (8192, 50_257, 1024);
    let x = Tensor::randn(0f32, 1.0, (rows, width), device)?.to_dtype(DType::BF16)?;
    let weight = Tensor::randn(0f32, 0.03, (vocabulary, width), device)?;
    let targets = targets(rows, vocabulary, device)?;
    let (x, weight) = (Var::from_tensor(&x)?, Var::from_tensor(&weight)?);
    let teraflops = 2e-12 * (rows * vocabulary * width) as f64;
    for chunk in [None, Some(2048), Some(8192)] {
        let options = Options {
            chunk,
            ..Default::default()
        };
        let losses = seconds(device, || head_losses(&x, &weight, &targets, &options).map(drop))?;
        let both = seconds(device, || {
            head(&x, &weight, &targets, &options)?.backward().map(drop)
        })?;
        println!(
            "cross_entropy {rows} x {vocabulary} x {width} bf16, chunks of {}: losses {:.0} us ({:.0} TFLOP/s), \
             with gradients {:.0} us ({:.0} TFLOP/s)",
            chunk.map_or("64 MiB".into(), |chunk| format!("{chunk} rows")),
            losses * 1e6,
            teraflops / losses,
            both * 1e6,
            3.0 * teraflops / both,
        );
    }
    let tensors = 200;
    let mut state = vec![];
    for _ in 0..tensors {
        let parameter = Tensor::randn(0f32, 1.0, (512, 512), device)?;
        let gradient = parameter.ones_like()?;
        let copy = parameter.to_dtype(DType::BF16)?;
        state.push((
            zero_moments_in(&parameter, DType::F32)?,
            copy,
            gradient,
            parameter,
        ));
    }
    let slots: Vec<Slot> = state
        .iter()
        .map(|(moments, copy, gradient, parameter)| Slot {
            rounded: Some(copy),
            ..Slot::new(parameter, moments, gradient)
        })
        .collect();
    let gradients: Vec<&Tensor> = slots.iter().map(|slot| slot.gradient).collect();
    let mut clipper = Clipper::new(Some(1.0), device)?;
    let elements = (tensors * 512 * 512) as f64;
    let clip = clipper.measure(&gradients)?;
    let step = seconds(device, || AdamW::default().step_clipped(&slots, &clip))?;
    let norm = seconds(device, || squared_norm(&gradients).map(drop))?;
    println!(
        "{tensors} tensors of 512 x 512: adamw step {:.1} us ({:.0} GB/s), norm {:.1} us ({:.0} GB/s)",
        step * 1e6,
        30.0 * elements / step / 1e9,
        norm * 1e6,
        4.0 * elements / norm / 1e9,
    );
    Ok(())
}
