//! The loss of a language model's head.

use crate::{BOTH, Case, host, master, relative_rms, tolerance_of, values};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use fulgur_kernels::cross_entropy::{Options, Reduction, TargetWatch, head, head_losses};

/// What one operator is tested for beside its gradients: the errors that it found, or why it failed.
pub(crate) struct Check {
    pub(crate) name: &'static str,
    run: fn(&Device) -> Result<String>,
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
