//! Ways from noise to data for networks of other libraries, over any noise schedule: DDIM (Song et al., 2021), DPM-Solver++ of the second
//! order (Lu et al., 2022) and Euler steps (Karras et al., 2022).
//!
//! Reference: `DDIMScheduler`, `DPMSolverMultistepScheduler` and `EulerDiscreteScheduler` of diffusers, whose `scheduler_config.json` is read.
//!
//! ```text
//! x = sqrt(a) x0 + sqrt(1 - a) e        s = sqrt((1 - a) / a)        l = -ln s
//! DDIM         x' = sqrt(a') x0 + sqrt(1 - a') e
//! Euler        x' / sqrt(a') = x / sqrt(a) + (s' - s) e
//! DPM++        x' = (s' / s) sqrt(a' / a) x - sqrt(a') (exp(l - l') - 1) (x0 + D),   D = (x0 - x0_before) (l' - l) / (2 (l - l_before))
//! ```
//!
//! Here x always has unit power, also for Euler steps: what the network sees is what is kept.

use std::path::Path;

use candle_core::{Result, Tensor, bail};
use serde::Deserialize;

use crate::config::{self, ConfigError};

/// Steps of training that a schedule has at most.
const MOST_STEPS: usize = 1 << 20;

/// How the noise of a step grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Betas {
    /// By the same amount at each step.
    #[default]
    Linear,
    /// Its root by the same amount.
    ScaledLinear,
}

/// What a network predicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Prediction {
    /// The noise e.
    #[default]
    #[serde(rename = "epsilon")]
    Noise,
    /// `sqrt(a) e - sqrt(1 - a) x0`.
    #[serde(rename = "v_prediction")]
    Velocity,
    /// The data x0.
    #[serde(rename = "sample")]
    Data,
}

/// Which steps of training are visited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    /// The first one, and others at equal distances.
    #[default]
    Leading,
    /// The last one, and others at equal distances.
    Trailing,
    /// Both ends.
    Linspace,
}

/// How steps are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// DDIM without fresh noise.
    Ddim,
    /// DPM-Solver++ of the second order.
    DpmSolver,
    /// Euler steps.
    Euler,
}

/// A noise schedule and the steps on it, as `scheduler_config.json` has them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct SolverConfig {
    /// Steps of training.
    pub num_train_timesteps: usize,
    /// Noise of the first step.
    pub beta_start: f64,
    /// Noise of the last step.
    pub beta_end: f64,
    /// How it grows between them.
    pub beta_schedule: Betas,
    /// What the network predicts.
    pub prediction_type: Prediction,
    /// Which steps are visited.
    pub timestep_spacing: Spacing,
    /// Added to steps of leading spacing.
    pub steps_offset: usize,
    /// Whether DDIM ends at data without noise, or with that of the first step.
    pub set_alpha_to_one: bool,
    /// Whether DDIM cuts the data that it expects to a range.
    pub clip_sample: bool,
    /// That range, on both sides of zero.
    pub clip_sample_range: f64,
    thresholding: bool,
    rescale_betas_zero_snr: bool,
    use_karras_sigmas: bool,
    use_exponential_sigmas: bool,
    use_beta_sigmas: bool,
    use_lu_lambdas: bool,
    use_flow_sigmas: bool,
    trained_betas: Option<Vec<f64>>,
    algorithm_type: String,
    solver_order: usize,
    solver_type: String,
    final_sigmas_type: String,
}

impl Default for SolverConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: Betas::Linear,
            prediction_type: Prediction::Noise,
            timestep_spacing: Spacing::Leading,
            steps_offset: 0,
            set_alpha_to_one: true,
            clip_sample: false,
            clip_sample_range: 1.0,
            thresholding: false,
            rescale_betas_zero_snr: false,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            use_lu_lambdas: false,
            use_flow_sigmas: false,
            trained_betas: None,
            algorithm_type: "dpmsolver++".to_owned(),
            solver_order: 2,
            solver_type: "midpoint".to_owned(),
            final_sigmas_type: "zero".to_owned(),
        }
    }
}

impl SolverConfig {
    /// The schedule of TAVDiffusion, shared by both streams.
    #[must_use]
    pub fn published() -> Self {
        Self {
            beta_start: super::schedule::FIRST_BETA,
            beta_end: super::schedule::LAST_BETA,
            steps_offset: 1,
            ..Self::default()
        }
    }

    /// Reads a file of this form.
    ///
    /// # Errors
    /// The file is unreadable, or describes no schedule.
    pub fn read(path: &Path) -> std::result::Result<Self, ConfigError> {
        config::read_checked(path, Self::check)
    }

    fn check(&self) -> Result<()> {
        config::within("num_train_timesteps", self.num_train_timesteps, MOST_STEPS)?;
        for (field, beta) in [("beta_start", self.beta_start), ("beta_end", self.beta_end)] {
            if !(beta > 0.0 && beta < 1.0) {
                bail!("{field} is {beta}, expected a number between 0 and 1");
            }
        }
        if !(self.clip_sample_range > 0.0 && self.clip_sample_range.is_finite()) {
            bail!(
                "clip_sample_range is {}, expected a number above zero",
                self.clip_sample_range
            );
        }
        self.understood()
    }

    /// Refuses ways that are not taken here.
    fn understood(&self) -> Result<()> {
        for (field, found) in [
            ("thresholding", self.thresholding),
            ("rescale_betas_zero_snr", self.rescale_betas_zero_snr),
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("use_lu_lambdas", self.use_lu_lambdas),
            ("use_flow_sigmas", self.use_flow_sigmas),
        ] {
            if found {
                bail!("{field} is true, expected false");
            }
        }
        if self.trained_betas.is_some() {
            bail!("trained_betas is a list, expected null");
        }
        for (field, found, expected) in [
            ("algorithm_type", &self.algorithm_type, "dpmsolver++"),
            ("solver_type", &self.solver_type, "midpoint"),
            ("final_sigmas_type", &self.final_sigmas_type, "zero"),
        ] {
            if found != expected {
                bail!("{field} is {found:?}, expected {expected:?}");
            }
        }
        match self.solver_order {
            2 => Ok(()),
            other => bail!("solver_order is {other}, expected 2"),
        }
    }

    /// Remaining signal power after each step of training.
    #[must_use]
    pub fn alpha_bars(&self) -> Vec<f64> {
        let count = self.num_train_timesteps;
        let along = |t: usize, first: f64, last: f64| match count {
            1 => first,
            _ => first + t as f64 * (last - first) / (count - 1) as f64,
        };
        let beta = |t: usize| match self.beta_schedule {
            Betas::Linear => along(t, self.beta_start, self.beta_end),
            Betas::ScaledLinear => along(t, self.beta_start.sqrt(), self.beta_end.sqrt()).powi(2),
        };
        let mut product = 1.0;
        (0..count)
            .map(|t| {
                product *= 1.0 - beta(t);
                product
            })
            .collect()
    }

    /// Steps that are visited, the noisiest first: whole numbers but for [`Spacing::Linspace`] where steps are interpolated.
    fn timesteps(&self, method: Method, steps: usize) -> Vec<f64> {
        let count = self.num_train_timesteps;
        let (whole, last) = (count as f64, (count - 1) as f64);
        // The reference leaves out the step that ends at data.
        let extra = usize::from(method == Method::DpmSolver);
        match self.timestep_spacing {
            Spacing::Leading => {
                let ratio = count / (steps + extra);
                let step = |k: usize| (k * ratio + self.steps_offset).min(count - 1) as f64;
                (extra..steps + extra).rev().map(step).collect()
            }
            Spacing::Trailing => {
                let ratio = whole / steps as f64;
                let step = |k: usize| ((whole - k as f64 * ratio).round_ties_even() - 1.0).max(0.0);
                (0..steps).map(step).collect()
            }
            Spacing::Linspace => {
                let parts = (steps + extra).saturating_sub(1).max(1) as f64;
                let step = |k: usize| {
                    let t = k as f64 * last / parts;
                    if method == Method::Euler {
                        t
                    } else {
                        t.round_ties_even()
                    }
                };
                (extra..steps + extra).rev().map(step).collect()
            }
        }
    }
}

/// Signal power where a step starts and ends, and the step of training that the network is asked at.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Move {
    timestep: f64,
    now: f64,
    next: f64,
}

/// Noise over signal.
fn sigma(alpha_bar: f64) -> f64 {
    ((1.0 - alpha_bar) / alpha_bar).sqrt()
}

/// A way from noise to data in a number of steps; it may remember the last one.
#[derive(Clone, Debug)]
pub struct Solver {
    method: Method,
    prediction: Prediction,
    spacing: Spacing,
    /// What DDIM cuts the data to.
    range: Option<f64>,
    moves: Vec<Move>,
    /// What the last step took the data to be.
    before: Option<Tensor>,
}

impl Solver {
    /// Plans `steps` steps.
    ///
    /// # Errors
    /// No steps, more than there are steps of training, or a schedule that cannot be.
    pub fn new(config: &SolverConfig, method: Method, steps: usize) -> Result<Self> {
        config.check()?;
        let most = config.num_train_timesteps - usize::from(method == Method::DpmSolver);
        if !(1..=most).contains(&steps) {
            bail!("steps is {steps}, expected 1 to {most}");
        }
        let alpha_bars = config.alpha_bars();
        let at = |t: f64| {
            // Between two steps noise over signal is what is interpolated.
            let (low, rest) = (t.floor() as usize, t.fract());
            let first = alpha_bars[low.min(alpha_bars.len() - 1)];
            match alpha_bars.get(low + 1) {
                Some(&second) if rest > 0.0 => {
                    let sigma = sigma(first) * (1.0 - rest) + sigma(second) * rest;
                    1.0 / (1.0 + sigma * sigma)
                }
                _ => first,
            }
        };
        let timesteps = config.timesteps(method, steps);
        let stride = (config.num_train_timesteps / steps) as f64;
        let end = match config.set_alpha_to_one {
            true => 1.0,
            false => alpha_bars[0],
        };
        let moves = timesteps.iter().enumerate().map(|(k, &timestep)| {
            let next = match method {
                Method::Ddim if timestep >= stride => at(timestep - stride),
                Method::Ddim => end,
                _ => timesteps.get(k + 1).map_or(1.0, |&next| at(next)),
            };
            Move {
                timestep,
                now: at(timestep),
                next,
            }
        });
        Ok(Self {
            method,
            prediction: config.prediction_type,
            spacing: config.timestep_spacing,
            range: (method == Method::Ddim && config.clip_sample).then_some(config.clip_sample_range),
            moves: moves.collect(),
            before: None,
        })
    }

    /// Steps of training that the network is asked at, in order.
    #[must_use]
    pub fn timesteps(&self) -> Vec<f64> {
        self.moves.iter().map(|step| step.timestep).collect()
    }

    /// What to start from, for standard normal `noise`.
    ///
    /// # Errors
    /// A failing operation.
    pub fn start(&self, noise: &Tensor) -> Result<Tensor> {
        match (self.method, self.spacing, self.moves.first()) {
            // The reference starts from pure noise where the last step of training is visited.
            (Method::Euler, Spacing::Trailing | Spacing::Linspace, Some(first)) => {
                noise * (1.0 - first.now).sqrt()
            }
            _ => Ok(noise.clone()),
        }
    }

    /// `clean` with as much of `noise` as belongs to step `k`.
    ///
    /// # Errors
    /// Shapes that differ, or no such step.
    pub fn noisy(&self, clean: &Tensor, noise: &Tensor, k: usize) -> Result<Tensor> {
        let now = self.step(k)?.now;
        (clean * now.sqrt())? + (noise * (1.0 - now).sqrt())?
    }

    /// `x` after step `k`, the first of which is 0, with what the network `predicted` for it. Steps are taken in order.
    ///
    /// # Errors
    /// Shapes that differ, or no such step.
    pub fn advance(&mut self, x: &Tensor, predicted: &Tensor, k: usize) -> Result<Tensor> {
        let Move { now, next, .. } = self.step(k)?;
        let (signal, noise) = (now.sqrt(), (1.0 - now).sqrt());
        let (data, e) = match self.prediction {
            Prediction::Noise => (((x - (predicted * noise)?)? / signal)?, predicted.clone()),
            Prediction::Velocity => (
                ((x * signal)? - (predicted * noise)?)?,
                ((predicted * signal)? + (x * noise)?)?,
            ),
            Prediction::Data => (predicted.clone(), ((x - (predicted * signal)?)? / noise)?),
        };
        let data = match self.range {
            Some(range) => data.clamp(-range, range)?,
            None => data,
        };
        match self.method {
            Method::Ddim => (data * next.sqrt())? + (e * (1.0 - next).sqrt())?,
            Method::Euler => ((x / signal)? + (e * (sigma(next) - sigma(now)))?)? * next.sqrt(),
            Method::DpmSolver => self.dpm(x, data, k),
        }
    }

    fn dpm(&mut self, x: &Tensor, data: Tensor, k: usize) -> Result<Tensor> {
        let Move { now, next, .. } = self.step(k)?;
        let last = k + 1 == self.moves.len();
        // Data without noise are infinitely far.
        let h = sigma(now).ln() - sigma(next).ln();
        let shrink = (-h).exp() - 1.0;
        let before = self.before.replace(data.clone());
        let direction = match before {
            Some(before) if !last && k > 0 => {
                let h_before = sigma(self.step(k - 1)?.now).ln() - sigma(now).ln();
                let slope = ((&data - before)? * (h / (2.0 * h_before)))?;
                (data + slope)?
            }
            _ => data,
        };
        let kept = ((1.0 - next) / (1.0 - now)).sqrt();
        (x * kept)? + (direction * (-next.sqrt() * shrink))?
    }

    fn step(&self, k: usize) -> Result<Move> {
        match self.moves.get(k) {
            Some(step) => Ok(*step),
            None => bail!("step {k} of {}", self.moves.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::file;
    use candle_core::{D, Device};
    use fulgur_kernels::philox::Philox;

    #[test]
    fn published_steps() -> Result<()> {
        let solver = Solver::new(&SolverConfig::published(), Method::Ddim, 40)?;
        let steps = solver.timesteps();
        assert_eq!((steps[0], steps[1], steps[39]), (976.0, 951.0, 1.0));
        assert!((solver.moves[0].now - 0.002_078_36).abs() < 1e-8);
        assert!((solver.moves[0].next - 0.002_782_95).abs() < 1e-8);
        assert_eq!(solver.moves[39].next, 1.0);
        for (method, steps) in [(Method::Ddim, 0), (Method::Ddim, 1001), (Method::DpmSolver, 1000)] {
            assert!(Solver::new(&SolverConfig::published(), method, steps).is_err());
        }
        let odd = SolverConfig {
            beta_end: f64::NAN,
            ..SolverConfig::published()
        };
        let line = Solver::new(&odd, Method::Ddim, 4).unwrap_err().to_string();
        assert!(
            line.contains("beta_end is NaN, expected a number between 0 and 1"),
            "{line}"
        );
        Ok(())
    }

    #[test]
    fn a_perfect_network_gives_the_clean_data() -> Result<()> {
        let draw = |name: &str| Tensor::from_vec(Philox::named(1, name).normals(24), (2, 12), &Device::Cpu);
        let (clean, noise) = (draw("clean")?, draw("noise")?);
        for method in [Method::Ddim, Method::DpmSolver, Method::Euler] {
            for prediction_type in [Prediction::Noise, Prediction::Velocity, Prediction::Data] {
                let config = SolverConfig {
                    prediction_type,
                    ..SolverConfig::published()
                };
                let mut solver = Solver::new(&config, method, 40)?;
                let mut x = solver.start(&noise)?;
                for k in 0..40 {
                    let (signal, noise) = (solver.moves[k].now.sqrt(), (1.0 - solver.moves[k].now).sqrt());
                    let e = ((&x - (&clean * signal)?)? / noise)?;
                    let predicted = match prediction_type {
                        Prediction::Noise => e,
                        Prediction::Velocity => ((e * signal)? - (&clean * noise)?)?,
                        Prediction::Data => clean.clone(),
                    };
                    x = solver.advance(&x, &predicted, k)?;
                }
                let far = (&x - &clean)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(far < 2e-5, "{method:?} {prediction_type:?}: {far}");
            }
        }
        Ok(())
    }

    /// The network of `goldens/solvers.py`.
    fn network(x: &Tensor, t: f64) -> Result<Tensor> {
        let turned = Tensor::cat(
            &[x.narrow(D::Minus1, 3, x.dim(1)? - 3)?, x.narrow(D::Minus1, 0, 3)?],
            1,
        )?;
        (((turned * 0.7)? + (t / 150.0).cos())?.tanh()? * 0.9)? + (x * 0.2)?
    }

    #[test]
    fn ways_are_those_of_diffusers() -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/solvers.safetensors");
        let mut golden = file::read(&path, &Device::Cpu)
            .map_err(candle_core::Error::wrap)?
            .tensors;
        let Some(noise) = golden.remove("noise") else {
            bail!("no noise");
        };
        assert_eq!(golden.len(), 22);
        for (name, expected) in golden {
            let parts: Vec<&str> = name.split('.').collect();
            let [method, spacing, betas, prediction] = parts[..] else {
                bail!("{name}: four words expected");
            };
            let clips = method == "clipped";
            let method = match method {
                "ddim" | "clipped" => Method::Ddim,
                "dpm" => Method::DpmSolver,
                _ => Method::Euler,
            };
            let json = format!(
                r#"{{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "{betas}", "timestep_spacing": "{spacing}",
                "prediction_type": "{prediction}", "steps_offset": 1, "clip_sample": {clips}, "clip_sample_range": 0.8, "set_alpha_to_one": {}}}"#,
                !clips
            );
            let config: SolverConfig = serde_json::from_str(&json).map_err(candle_core::Error::wrap)?;
            // One row a step of training that was visited, then the latents after it.
            let steps = expected.dim(0)?;
            let mut solver = Solver::new(&config, method, steps)?;
            let mut x = solver.start(&noise)?;
            for (k, t) in solver.timesteps().into_iter().enumerate() {
                let row = expected.get(k)?;
                let visited = f64::from(row.get(0)?.to_scalar::<f32>()?);
                assert!((visited - t).abs() < 1e-3, "{name}: step {t}, expected {visited}");
                x = solver.advance(&x, &network(&x, t)?, k)?;
                let after = row.narrow(0, 1, x.elem_count())?.reshape(x.shape())?;
                let far = (&x - &after)?.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
                let size = after.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
                assert!(far <= 1e-5 * size, "{name}, step {k}: {far} of {size}");
            }
        }
        Ok(())
    }
}
