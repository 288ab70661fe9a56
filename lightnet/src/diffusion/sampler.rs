//! From noise to data: Euler steps along the flow, or DDIM on the linear schedule.

use candle_core::{Result, Tensor};

use super::objective::Objective;
use super::schedule::{LinearSchedule, STEPS};

/// A finished step, for progress and cancellation.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
}

/// The sampler of an objective.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// What the network predicts.
    pub objective: Objective,
    /// Number of steps.
    pub steps: usize,
    /// Bends the times of the flow towards noise: `s t / (1 + (s - 1) t)`; 1 is uniform.
    pub shift: f64,
}

impl Sampler {
    /// Times in [0, 1] from noise to data: `steps + 1` values for the flow, one a step for DDIM.
    pub fn times(&self) -> Vec<f64> {
        match self.objective {
            Objective::Flow => (0..=self.steps)
                .map(|k| {
                    let t = 1.0 - k as f64 / self.steps as f64;
                    self.shift * t / (1.0 + (self.shift - 1.0) * t)
                })
                .collect(),
            Objective::Ddpm => LinearSchedule::timesteps(self.steps)
                .into_iter()
                .map(|t| t as f64 / (STEPS - 1) as f64)
                .collect(),
        }
    }

    /// `x` after step `k` (the first is 0) with what the network predicted for it at `times()[k]`.
    ///
    /// # Errors
    /// The two have different shapes.
    pub fn advance(&self, x: &Tensor, prediction: &Tensor, k: usize) -> Result<Tensor> {
        match self.objective {
            Objective::Flow => {
                let times = self.times();
                x + (prediction * (times[k + 1] - times[k]))?
            }
            Objective::Ddpm => self.ddim(x, prediction, k),
        }
    }

    /// Turns `noise` into data. `predict` answers for a state and its time; `on_step` is called after each step and ends the loop
    /// with `None` by returning false.
    ///
    /// # Errors
    /// Those of `predict`.
    pub fn run(
        &self,
        noise: &Tensor,
        predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
        on_step: impl FnMut(Step) -> bool,
    ) -> Result<Option<Tensor>> {
        self.steps_from(0, noise, predict, on_step)
    }

    /// As [`Self::run`], from `clean` `[B, ..]` with as much of `noise` as belongs to the first time that is at most `strength`: what is
    /// made resembles it the more, the less that is.
    ///
    /// # Errors
    /// As [`Self::run`], or the two have different shapes.
    pub fn run_from(
        &self,
        clean: &Tensor,
        noise: &Tensor,
        strength: f64,
        predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
        on_step: impl FnMut(Step) -> bool,
    ) -> Result<Option<Tensor>> {
        let times = self.times();
        let first = times[..self.steps].iter().position(|&time| time <= strength);
        let first = first.unwrap_or(self.steps.saturating_sub(1));
        let time = vec![times[first] as f32; clean.dim(0)?];
        let mixture = self.objective.mixture(&time, clean.device())?;
        let (x, _) = self.objective.noisy(clean, noise, &mixture)?;
        self.steps_from(first, &x, predict, on_step)
    }

    fn steps_from(
        &self,
        first: usize,
        start: &Tensor,
        mut predict: impl FnMut(&Tensor, f64) -> Result<Tensor>,
        mut on_step: impl FnMut(Step) -> bool,
    ) -> Result<Option<Tensor>> {
        let times = self.times();
        let mut x = start.clone();
        for (k, &time) in times.iter().enumerate().take(self.steps).skip(first) {
            // Detached: under training weights the graph of every step would be kept to the last one.
            let prediction = predict(&x, time)?.detach();
            x = self.advance(&x, &prediction, k)?;
            let step = Step {
                done: k + 1 - first,
                total: self.steps - first,
            };
            if !on_step(step) {
                return Ok(None);
            }
        }
        Ok(Some(x))
    }

    /// One deterministic DDIM step (eta 0); the last one ends at clean data.
    fn ddim(&self, x: &Tensor, e: &Tensor, k: usize) -> Result<Tensor> {
        let schedule = LinearSchedule::default();
        let steps = LinearSchedule::timesteps(self.steps);
        let t = steps[k] as isize;
        let previous = t - (STEPS / self.steps.clamp(1, STEPS)) as isize;
        let (now, next) = (schedule.alpha_bar(t), schedule.alpha_bar(previous));
        let clean = ((x - (e * (1.0 - now).sqrt())?)? / now.sqrt())?;
        (clean * next.sqrt())? + (e * (1.0 - next).sqrt())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};
    use fulgur_kernels::philox::Philox;

    /// What a perfect network would answer.
    fn oracle(objective: Objective, clean: &Tensor, x: &Tensor, time: f64) -> Result<Tensor> {
        match objective {
            Objective::Flow => (x - clean)? / time,
            Objective::Ddpm => {
                let step = super::super::objective::ddpm_step(time as f32) as isize;
                let alpha = LinearSchedule::default().alpha_bar(step);
                (x - (clean * alpha.sqrt())?)? / (1.0 - alpha).sqrt()
            }
        }
    }

    #[test]
    fn a_perfect_network_gives_the_clean_data() -> Result<()> {
        let draw = |name: &str| Tensor::from_vec(Philox::named(1, name).normals(24), (2, 3, 4), &Device::Cpu);
        // A variable, as the weights are while a network trains.
        let clean = Var::from_tensor(&draw("clean")?)?.into_inner();
        let noise = draw("noise")?;
        for (objective, steps, shift) in [
            (Objective::Flow, 20, 1.5),
            (Objective::Flow, 1, 1.0),
            (Objective::Ddpm, 40, 1.0),
        ] {
            let sampler = Sampler {
                objective,
                steps,
                shift,
            };
            let mut seen = 0;
            let found = sampler.run(
                &noise,
                |x, time| oracle(objective, &clean, x, time),
                |step| {
                    seen = step.done;
                    step.total == steps
                },
            )?;
            let found = found.ok_or_else(|| candle_core::Error::msg("cancelled"))?;
            assert_eq!(seen, steps);
            assert!(!found.track_op(), "the graph of all steps was kept");
            let worst = (&found - &clean)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 1e-5, "{objective:?}: {worst}");
        }
        Ok(())
    }

    #[test]
    fn times_bend_towards_noise() {
        let sampler = |shift| Sampler {
            objective: Objective::Flow,
            steps: 4,
            shift,
        };
        assert_eq!(sampler(1.0).times(), [1.0, 0.75, 0.5, 0.25, 0.0]);
        let bent = sampler(3.0).times();
        assert_eq!((bent[0], bent[4]), (1.0, 0.0));
        assert!((bent[2] - 0.75).abs() < 1e-12);
    }

    #[test]
    fn a_caller_ends_the_loop() -> Result<()> {
        let sampler = Sampler {
            objective: Objective::Flow,
            steps: 9,
            shift: 1.0,
        };
        let noise = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
        let mut calls = 0;
        let found = sampler.run(
            &noise,
            |x, _| {
                calls += 1;
                Ok(x.clone())
            },
            |step| step.done < 3,
        )?;
        assert!(found.is_none() && calls == 3);
        Ok(())
    }
}
